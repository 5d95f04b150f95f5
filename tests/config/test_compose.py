"""YAML files: found from anywhere, merged in order, and all of the project's valid."""

from __future__ import annotations

import json
import re
import time
from itertools import pairwise

import pytest
import yaml

from sis_lightning.config.compose import compose, load_layer, merge, resolve
from sis_lightning.config_files import PACKAGED, config_names, find_config
from sis_lightning.errors import UsageError
from sis_lightning.run.run import Run

TASKS = config_names("tasks")


@pytest.mark.parametrize("overlay", [[], ["--config", "configs/demo.yaml"]], ids=["recipe", "demo"])
@pytest.mark.parametrize("task", TASKS)
def test_every_task_resolves(command, task, overlay):
    result = command("fit", "--config", f"tasks/{task}.yaml", *overlay, "--print_config")
    assert result.code == 0, result.err
    resolved = yaml.safe_load(result.out)
    assert resolved["task"] == task
    # What was written in the file is what the run gets.
    written = compose([f"tasks/{task}.yaml", *overlay[1:]])

    def compare(want, got, key):
        if isinstance(want, dict):
            for inner, value in want.items():
                compare(value, got[inner], f"{key}.{inner}")
        else:
            assert got == want, key

    compare(written, resolved, task)


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("backbone", ["resnet50", "sis29"])
def test_a_named_backbone_replaces_all_of_the_old_one(command, task, backbone):
    options = ["--model.backbone", backbone, "--model.backbone.operator", "recurrent2", "--model.backbone.steps", "3"]
    result = command("fit", "--config", f"tasks/{task}.yaml", *options, "--print_config")
    assert result.code == 0, result.err
    got = yaml.safe_load(result.out)["model"]["init_args"]["backbone"]
    want = load_layer(find_config(backbone, "configs/backbones"))
    assert got == {**want, "operator": "recurrent2", "steps": 3}


def test_a_trainer_overrides_all_files():
    files = ["--config", "tasks/seg_voc.yaml", "--config", "configs/demo.yaml"]
    for order in ([*files, "--trainer", "gpu"], ["--trainer", "gpu", *files]):
        layers, _ = resolve(order)
        assert layers["trainer"]["accelerator"] == "gpu"
        assert layers["trainer"]["max_steps"] == 2000


@pytest.mark.parametrize("trainer", config_names("configs/trainers"))
def test_every_trainer_resolves(command, trainer):
    result = command("fit", "--config", "tasks/cls_cifar100.yaml", "--trainer", trainer, "--print_config")
    assert result.code == 0, result.err
    resolved = yaml.safe_load(result.out)["trainer"]
    file = load_layer(find_config(trainer, "configs/trainers"))
    assert {key: resolved[key] for key in file} == file
    assert resolved["max_epochs"] == 300
    assert resolved["use_distributed_sampler"] is False


@pytest.mark.parametrize("data", config_names("datamodules"))
def test_every_data_set_is_complete_and_builds(data):
    import inspect
    from importlib import import_module

    content = load_layer(find_config(data, "datamodules"))
    module, _, name = content["class_path"].rpartition(".")
    built = getattr(import_module(module), name)
    known = {
        key: parameter.kind
        for cls in built.__mro__[:-1]
        if "__init__" in vars(cls) and cls.__module__.startswith("sis_lightning")
        for key, parameter in inspect.signature(cls).parameters.items()
    }
    assert set(content["init_args"]) == {key for key, kind in known.items() if kind != inspect.Parameter.VAR_KEYWORD}
    assert built(**content["init_args"]).batch_size == content["init_args"]["batch_size"]


def test_recipes_are_the_papers():
    seg, cls = compose(["tasks/seg_voc.yaml"]), compose(["tasks/cls_cifar100.yaml"])
    model, data = seg["model"]["init_args"], seg["data"]["init_args"]
    assert (data["batch_size"], data["crop_size"], data["scale"]) == (16, 513, [0.5, 2.0])
    assert model["optimizer"]["init_args"] == {"lr": 0.007, "momentum": 0.9, "weight_decay": 1e-4}
    assert model["lr_scheduler"]["init_args"] == {"total_iters": 30000, "power": 0.9}
    assert (seg["trainer"]["max_steps"], model["output_stride"], model["num_classes"]) == (30000, 16, 21)
    model, data = cls["model"]["init_args"], cls["data"]["init_args"]
    assert (data["batch_size"], model["lr_batch_size"], cls["trainer"]["max_epochs"]) == (64, 64, 300)
    assert model["optimizer"]["init_args"] == {"lr": 0.05, "momentum": 0.9, "nesterov": True, "weight_decay": 5e-4}
    assert (data["mean"], data["std"]) == ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
    assert model["lr_scheduler"]["init_args"] == {"milestones": [150, 225], "gamma": 0.1}


def test_batch_norm_over_all_devices_is_the_recipes():
    """ResNeXt's code and Simple Baselines normalise on each device alone; detection from scratch over all of them."""
    found = {name: compose([f"tasks/{name}.yaml"])["trainer"]["sync_batchnorm"] for name in config_names("tasks")}
    assert found == {
        "cls_cifar100": False,
        "cls_imagenet": False,
        "det_coco": True,
        "det_voc": True,
        "kpt_coco": False,
        "seg_voc": True,
    }
    for trainer in ("ddp", "cluster"):
        assert "sync_batchnorm" not in yaml.safe_load((PACKAGED / f"configs/trainers/{trainer}.yaml").read_text())


def test_recipes_of_detection_and_keypoints_are_the_papers():
    """The VOC recipe is mmdetection's own: "lr=0.01", 4 epochs of a list that is repeated 3 times, × 0.1 after 3."""
    recipes = {"det_coco": (80, 0.02, [8, 11], 500, (800, 1333)), "det_voc": (20, 0.01, [9], 0, (600, 1000))}
    for name, (classes, rate, milestones, warmup, size) in recipes.items():
        task = compose([f"tasks/{name}.yaml"])
        model, data = task["model"]["init_args"], task["data"]["init_args"]
        assert (data["batch_size"], model["lr_batch_size"], task["trainer"]["max_epochs"]) == (16, 16, 12)
        assert model["optimizer"]["init_args"] == {"lr": rate, "momentum": 0.9, "weight_decay": 1e-4}
        assert model["lr_scheduler"]["init_args"] == {"milestones": milestones, "gamma": 0.1}
        assert (model["warmup_steps"], model["warmup_start"]) == (warmup, 0.001)
        assert ((model["min_size"], model["max_size"]), model["num_classes"]) == (size, classes)
        assert model["freeze_norm"] is False
        assert model["backbone_weights"] is None
    task = compose(["tasks/kpt_coco.yaml"])
    model, data = task["model"]["init_args"], task["data"]["init_args"]
    assert (data["batch_size"], data["input_size"], task["trainer"]["max_epochs"]) == (128, [256, 192], 140)
    assert (data["rotation"], data["scale"], model["sigma"]) == (40, 0.3, 2.0)
    assert model["deconv_channels"] == [256, 256, 256]
    assert (model["optimizer"]["class_path"], model["optimizer"]["init_args"]) == ("torch.optim.Adam", {"lr": 1e-3})
    assert model["lr_scheduler"]["init_args"] == {"milestones": [90, 120], "gamma": 0.1}


def test_files_are_searched_here_then_on_the_path_then_in_the_package(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert find_config("tasks/seg_voc.yaml") == PACKAGED / "tasks" / "seg_voc.yaml"
    assert find_config("tasks/seg_voc") == PACKAGED / "tasks" / "seg_voc.yaml"
    elsewhere = tmp_path / "mine"
    (elsewhere / "tasks").mkdir(parents=True)
    (elsewhere / "tasks" / "seg_voc.yaml").write_text("task: mine\n")
    monkeypatch.setenv("SIS_CONFIG_PATH", str(elsewhere))
    assert find_config("tasks/seg_voc.yaml") == elsewhere / "tasks" / "seg_voc.yaml"
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "seg_voc.yaml").write_text("task: here\n")
    assert load_layer(find_config("tasks/seg_voc.yaml")) == {"task": "here"}


def test_layers_merge_key_by_key_but_never_across_classes():
    below = {"optimizer": {"class_path": "SGD", "init_args": {"lr": 1, "momentum": 2}}, "list": [1, 2]}
    assert merge(below, {"optimizer": {"init_args": {"lr": 3}}})["optimizer"]["init_args"] == {"lr": 3, "momentum": 2}
    other = {"class_path": "AdamW", "init_args": {"lr": 4}}
    assert merge(below, {"optimizer": other})["optimizer"] == other
    assert merge(below, {"list": [3]})["list"] == [3]
    assert merge(below, {"list": None})["list"] is None


def test_sections_apply_to_their_class_alone(tmp_path):
    overlay = tmp_path / "overlay.yaml"
    overlay.write_text(
        "trainer: {max_steps: 5}\n"
        "for:\n"
        "  SegmentationTask: {trainer: {max_steps: 6}}\n"
        "  CIFAR100DataModule: {data: {init_args: {batch_size: 7}}}\n"
    )
    seg = compose(["tasks/seg_voc.yaml", str(overlay)])
    cls = compose(["tasks/cls_cifar100.yaml", str(overlay)])
    assert (seg["trainer"]["max_steps"], seg["data"]["init_args"]["batch_size"]) == (6, 16)
    assert (cls["trainer"]["max_steps"], cls["data"]["init_args"]["batch_size"]) == (5, 7)
    assert "for" not in seg


def test_dotted_keys_and_plain_exponents(tmp_path):
    path = tmp_path / "a.yaml"
    path.write_text("model.init_args.lr: 1e-3\nmodel.init_args.wd: 5E-4\nn: -3\nname: e5\n")
    layer = load_layer(path)
    assert layer == {"model": {"init_args": {"lr": 0.001, "wd": 0.0005}}, "n": -3, "name": "e5"}


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("backbone: sis50\nbackbone.depth: 101\n", ["'backbone' refers to a file", "'backbone.depth' cannot"]),
        ("backbone.depth: 101\nbackbone: sis50\n", ["'backbone' is set twice"]),
        ("a: 1\na: 2\n", ["line 2", "'a'", "twice"]),
        ("a: 1\n b: 2\n", ["line 2"]),
        ("- 1\n", ["mapping", "list"]),
        ("backbone: sis5O\n", ["sis5O", "sis50"]),
        ("for: [1]\n", ["for"]),
    ],
)
def test_bad_yaml_is_refused_with_its_place(tmp_path, text, words):
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    with pytest.raises(UsageError) as caught:
        compose([str(path)])
    message = str(caught.value)
    assert all(word in message for word in words), message
    assert len(message.splitlines()) <= 5


LEVELS = "\n".join(
    f"{name}: &{name} [{', '.join([f'*{before}' if before else 'x'] * 9)}]"
    for before, name in zip(["", *"abcdefghi"], "abcdefghij", strict=True)
)
MERGES = "a: &a {x: 1}\n" + "\n".join(
    f"{name}: &{name} {{<<: [*{before}, *{before}]}}" for before, name in pairwise("abcdefghijklmnopqrstuvwxyz")
)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (LEVELS, "its aliases (*name) stand for 4,"),
        (MERGES, "its aliases (*name) stand for "),
        ("a: &a [*a]\n", "line 1: not a configuration: a value contains itself"),
        ("a: &a {b: {c: *a}}\n", "contains itself"),
        ("a: " + "[" * 5000 + "]" * 5000, "nested too deeply"),
    ],
    ids=["lists", "merges", "itself", "itself deeper", "deep"],
)
def test_files_that_would_fill_the_memory_are_refused_at_once(tmp_path, text, words):
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    began = time.process_time()
    with pytest.raises(UsageError, match=re.escape(words)) as caught:
        compose([str(path)])
    assert time.process_time() - began < 5
    assert str(path) in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


def test_aliases_and_long_files_are_read(tmp_path):
    path = tmp_path / "good.yaml"
    names = [f"class {number}" for number in range(12_000)]
    path.write_text(
        f"a: {json.dumps(names)}\nb: &b {{x: 1}}\nc: [*b, *b]\nd: {{<<: *b, x: 3, y: 2}}\n"
        "e: {f: &f {<<: *b, x: 4}}\ng: {<<: *f, x: 5}\n"
    )
    assert load_layer(path) == {"a": names, "b": {"x": 1}, "c": [{"x": 1}] * 2} | {
        "d": {"x": 3, "y": 2},
        "e": {"f": {"x": 4}},
        "g": {"x": 5},
    }


def test_files_that_are_not_text_are_refused(tmp_path):
    path = tmp_path / "bad.yaml"
    path.write_bytes(b"a: \xff\xfe\n")
    with pytest.raises(UsageError, match="UTF-8"):
        load_layer(path)


SEG = ["--config", "tasks/seg_voc.yaml", "--config", "configs/demo.yaml"]
SGD = {"class_path": "torch.optim.SGD", "init_args": {"lr": 0.1}}


@pytest.mark.parametrize(
    "options",
    [
        [f"--model.optimizer={json.dumps(SGD)}"],
        ["--model.optimizer", json.dumps(SGD)],
        ["--model.optimizer", "SGD", "--model.optimizer.lr", "0.1"],
        ["--model.optimizer.class_path=torch.optim.SGD", "--model.optimizer.lr=0.1"],
        ["--model.init_args.optimizer=torch.optim.SGD", "--model.init_args.optimizer.init_args.lr=0.1"],
        ["--model.optimizer.weight_decay", "0.3", "--model.optimizer", "SGD", "--model.optimizer.lr=0.1"],
        ["--model.optimizer=Adam", "--model.optimizer.weight_decay=0.3", f"--model.optimizer={json.dumps(SGD)}"],
    ],
)
def test_an_option_that_replaces_a_class_drops_its_arguments_as_a_file_does(tmp_path, options):
    (tmp_path / "sgd.yaml").write_text(yaml.safe_dump({"model": {"init_args": {"optimizer": SGD}}}))
    by_file = Run.from_arguments([*SEG, "--config", str(tmp_path / "sgd.yaml")]).config
    by_option = Run.from_arguments([*SEG, *options]).config
    assert by_file["model"]["init_args"]["optimizer"]["init_args"]["weight_decay"] == 0
    assert by_option == by_file


def test_an_option_that_names_the_same_class_keeps_its_arguments():
    for same in ("AdamW", "torch.optim.AdamW"):
        config = Run.from_arguments([*SEG, "--model.optimizer", same, "--model.optimizer.lr", "0.5"]).config
        arguments = config["model"]["init_args"]["optimizer"]["init_args"]
        assert (arguments["lr"], arguments["weight_decay"]) == (0.5, 0.01)


def test_another_scheduler_or_data_set_by_option_keeps_nothing_of_the_old_one():
    options = ["--model.lr_scheduler", "StepLR", "--model.lr_scheduler.step_size", "5", "--model.lr_interval", "epoch"]
    scheduler = Run.from_arguments([*SEG, *options]).config["model"]["init_args"]["lr_scheduler"]
    assert scheduler["init_args"] == {"step_size": 5, "gamma": 0.1, "last_epoch": -1}
    data = Run.from_arguments([*SEG, "--data=sis_lightning.datamodules.CIFAR100DataModule", "--data.root=here"]).config
    assert data["data"]["init_args"]["synthetic"] is None


@pytest.mark.parametrize("option", ["--model.backbone", "--model.init_args.backbone"])
def test_a_backbone_in_json_is_read_behind_a_space_and_an_equals_sign(option):
    text = '{"depth": 101}'
    assert resolve([*SEG, option, text])[1] == resolve([*SEG, f"{option}={text}"])[1] == [f"--model.backbone={text}"]


def test_a_run_has_one_task():
    with pytest.raises(UsageError, match=r"seg_voc\.yaml and .*det_coco\.yaml are two tasks"):
        compose(["tasks/seg_voc.yaml", "configs/demo.yaml", "tasks/det_coco.yaml"])
    assert compose(["tasks/seg_voc.yaml", "tasks/seg_voc.yaml"]) == compose(["tasks/seg_voc.yaml"])
