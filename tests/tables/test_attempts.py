"""Attempts to fool the tables: each is caught, or results/TRUST.md says why it cannot be."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from sis_lightning.commands.main import main
from sis_lightning.files import digest
from sis_lightning.option_effects import Effect
from sis_lightning.run.recipe import recipe, settled
from sis_lightning.run.record import read_record, write_with_checksum
from sis_lightning.tables import paper
from sis_lightning.tables.spec import read_specs
from sis_lightning.tasks.checkpoint_files import tensors_digest

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "results"
Content = dict[str, Any]


def records() -> list[Path]:
    return sorted(Path("results/records").glob("*.json"))


def forge(path: Path, change: Callable[[Content], object], *, rehash: bool = False) -> None:
    """Changes a file and computes its checksum again; with `rehash` also the hashes of its configuration."""
    content = json.loads(path.read_text())
    content.pop("checksum")
    change(content)
    if rehash:
        content["recipe_hash"] = digest(recipe(content["config"]))
        content["config_hash"] = digest(settled(content["config"]))
    write_with_checksum(path, content)


def set_to(dotted: str, value: object) -> Callable[[Content], object]:
    """A change of one value, by its keys with `__` between."""

    def change(content: Content) -> None:
        *outer, last = dotted.split("__")
        for key in outer:
            content = content[key]
        content[last] = value

    return change


def of_class(content: Content) -> float:
    """Raises the IoU of each class and their mean alike."""
    for key, value in content["metrics"].items():
        if key == "test/miou" or (key.startswith("test/iou/") and value is not None):
            content["metrics"][key] = value + 0.01
    return 0.0


def metric(**values: float) -> Callable[[Content], object]:
    return lambda content: content["metrics"].update({f"test/{key}": value for key, value in values.items()})


def operator_of(content: Content) -> Content:
    return content["config"]["model"]["init_args"]["backbone"]


#: Changes of one record, and what the page says of it then. The other record of the row counts as before.
OF_A_RECORD: dict[str, tuple[Callable[[Content], object], str]] = {
    "a better metric": (metric(miou=0.9), "is not the mean over its classes"),
    "a negative error": (metric(top1_error_percent=-1.0), "not within 0…100"),
    "an accuracy above 1": (metric(pixel_accuracy=1.01), "not within 0…1"),
    "an error that its accuracy contradicts": (metric(top1=0.5, top1_error_percent=20.0), "not that of its top1"),
    "AP above AP.5": (metric(AP=0.5, AP50=0.4), "its AP of 0.5 is above its AP50"),
    "top-1 above top-5": (metric(top1=0.5, top5=0.4), "its top1 of 0.5 is above its top5"),
    "weights of step 1": (set_to("checkpoint__step", 1), "its schedule ends at step 3, its weights are of step 1"),
    "curves of more steps than trained": (
        set_to("curves__train/loss", [[1, 2.0], [9, 1.0]]),
        "its curves go on to step 9",
    ),
    "the best checkpoint as the last": (set_to("checkpoint__file", "runs/x/best.ckpt"), "best on the val split"),
    "an unfinished training": (set_to("checkpoint__finished", False), "not from the end of the schedule"),
    "seven images": (set_to("data__images", 7), "7 images were scored"),
    "no images": (set_to("data__images", 0), "0 images were scored"),
    "another test split": (set_to("data__fingerprint", "0" * 64), "its files are not those"),
    "trained on other files": (set_to("data__trained_on", ["0" * 64]), "it was not trained on"),
    "trained on nobody knows what": (set_to("data__trained_on", []), "it was not trained on"),
    "another seed": (set_to("seed", 5), "its seed is 5, in its configuration"),
    "no seed": (set_to("seed", None), "it was trained without a seed"),
    "training by unknown code": (set_to("training__environments", []), "the code of its training is not known"),
    "uncommitted code": (set_to("environment__code__dirty", True), "uncommitted changes"),
    "an operator that changed after the training": (
        set_to("environment__code__operators", {"mine": "0"}),
        "operator was changed",
    ),
    "options changed on the way": (set_to("training__changed", ["trainer.max_steps"]), "changed during training"),
    "some of the test images by an option": (
        set_to("tested_otherwise", {"trainer.limit_test_batches": {"trained": None, "tested": 1}}),
        "tested with another trainer.limit_test_batches",
    ),
    "the deployed model": (set_to("checkpoint__deployed", True), "the deployed model was tested"),
    "a date in the future": (set_to("date", "2999-01-01T00:00:00+00:00"), "its date is"),
    "the hash of another configuration": (
        lambda content: operator_of(content).update(operator="basic"),
        "its configuration is not that of the row",
    ),
    "another recipe under the hash of the row": (
        lambda content: content["config"]["trainer"].update(max_epochs=7),
        "its configuration is not that of the row",
    ),
    "the name of another backbone": (set_to("backbone", "sis50-26w4s-basic"), "it calls its backbone"),
}


@pytest.mark.parametrize("attempt", OF_A_RECORD)
def test_a_forged_record_does_not_count(attempt, results):
    """Each with a checksum that fits."""
    change, said = OF_A_RECORD[attempt]
    assert results("render") == 0
    assert "n = 2" in Path("results/TABLES.md").read_text()
    forge(records()[1], change)
    assert results("render") == 0
    page = Path("results/TABLES.md").read_text()
    assert "n = 1 of 2" in page
    assert said in page


def test_an_edited_record_without_a_new_checksum(results, capfd):
    path = records()[0]
    path.write_text(path.read_text().replace('"seed": 0', '"seed": 3'))
    assert results("render") == 1
    assert "checksum mismatch" in capfd.readouterr().err


def test_the_record_of_another_operator(results, capfd):
    """With new hashes and a new name it counts, until its weights are tested again or the true record is there too."""
    assert results("render") == 0
    first, second = records()

    def swapped(content: Content) -> None:
        operator_of(content).update(operator="basic", last_split="pool")
        content["backbone"] = content["backbone"].replace("conv", "basic")

    copy = first.with_name("swapped.json")
    shutil.copy(first, copy)
    forge(copy, swapped, rehash=True)
    assert results("render") == 0
    assert "has the same weights with another configuration" in Path("results/TABLES.md").read_text()
    # Without the true record it counts, until its checkpoint is looked at.
    backbone = read_record(first).backbone
    shutil.copytree(f"runs/toy_seg/{backbone}/seed0", f"runs/toy_seg/{backbone.replace('conv', 'basic')}/seed0")
    first.unlink()
    second.unlink()
    assert results("render") == 0
    assert "n = 1 of 2" in Path("results/TABLES.md").read_text()
    capfd.readouterr()
    assert results("verify") == 1
    assert "backbone.operator is 'basic' in the record, 'conv' in the checkpoint" in capfd.readouterr().out


def test_the_same_weights_as_two_seeds(results):
    def other_seed(content: Content) -> None:
        content["seed"] = content["config"]["seed_everything"] = 1

    shutil.copy(records()[0], records()[1])
    forge(records()[1], other_seed, rehash=True)
    assert results("render") == 0
    assert "its weights are the same as those of seed 0" in Path("results/TABLES.md").read_text()


def test_records_that_check_alone_finds(results, capfd):
    """A commit of no history, and records that count for no cell but contradict themselves."""

    def git(*arguments: str) -> str:
        return subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, text=True).stdout.strip()

    # In a shallow clone nobody can tell what the history is.
    whole = git("rev-parse", "--is-shallow-repository") == "false"
    known = git("rev-parse", "HEAD") or "1" * 40
    for commit, code in ((known, 0), ("0" * 40, int(whole))):
        forge(records()[0], set_to("environment__code", {"sis_lightning": "1", "commit": commit, "dirty": False}))
        assert results("render") == 0
        capfd.readouterr()
        assert results("check") == code
        assert ("is not in the history" in capfd.readouterr().out) == bool(code)
    forge(records()[0], set_to("environment__code", {"sis_lightning": "1", "commit": known, "dirty": False}))
    forge(records()[0], set_to("config_hash", "0" * 64))
    capfd.readouterr()
    assert results("check") == 1
    assert "its hashes are not those of its configuration" in capfd.readouterr().out
    forge(records()[0], set_to("task", "of no table"), rehash=True)
    forge(records()[0], metric(top1=3.0))
    assert results("check") == 1
    assert "its top1 is 3, not within" in capfd.readouterr().out


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda content: next(iter(content["models"].values())).update(parameters=1), "parameters was 1, and is now"),
        (lambda content: next(iter(content["models"].values())).update(recipe="0"), "recipe was 0, and is now"),
        (
            lambda content: content["declared"]["sis_lightning.tasks.SegmentationTask"].update(
                loss=Effect.NOTHING.value
            ),
            "the effects that options declare are not those of the code",
        ),
    ],
    ids=["a smaller network", "another recipe", "an option without effect"],
)
def test_forged_counts(change, said, results, capfd):
    assert results("render") == 0
    forge(Path("results/models.json"), change)
    assert results("render") == 0
    assert results("check") == 1
    assert said in capfd.readouterr().out


def test_records_of_several_releases_in_one_row_are_marked(results):
    forge(records()[0], set_to("environment__packages__torch", "1.0"))
    assert results("render") == 0
    assert re.search(r"Res2Net has records of torch 1\.0, 2\.\d+", Path("results/TABLES.md").read_text())


# Table specs.


@pytest.fixture
def papers(tmp_path, monkeypatch) -> Callable[[Callable[[Content], object]], str]:
    """A function that renders the paper's tables after a change of the table spec, and returns the page."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(RESULTS, "results", ignore=shutil.ignore_patterns("figures", "benchmarks", "ours.yaml"))

    def rendered(change: Callable[[Content], object]) -> str:
        path = Path("results/paper.yaml")
        content = yaml.safe_load(path.read_text())
        change(content)
        path.write_text(yaml.safe_dump(content))
        assert main(["tables", "render"]) == 0
        return Path("results/TABLES.md").read_text()

    return rendered


def row(content: Content, label: str) -> Content:
    return next(row for row in content["tables"][0]["groups"][0]["rows"] if row["label"] == label)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda c: row(c, "Basic SIS").update(reported=[28.3, 4.2, 7.99]), "the paper reports 16.74, here 7.99"),
        (lambda c: row(c, "Basic SIS").update(operator="interactive1"), "Basic SIS is sis29 with operator basic"),
        (lambda c: row(c, "Basic SIS").update(backbone="resnext29_8x64d"), "here resnext29_8x64d with basic"),
        (lambda c: c["runs"]["cls_cifar100"].update(options={"trainer.max_epochs": 1}), "here of another run"),
        (lambda c: c["runs"]["cls_cifar100"].update(data="imagenet"), "here of another run"),
        (lambda c: c["tables"][0]["columns"][2].update(metric="test/top5_error_percent"), "here test/top5_error"),
        (lambda c: c["tables"][0]["columns"][2].update(scale=0.1), "× 0.1"),
        (lambda c: c["tables"][0]["groups"][0]["rows"].pop(0), "ResNet-29 of group 1 is missing"),
        (lambda c: c["tables"][0].update(id="5"), "the paper has no such table"),
        (lambda c: c["tables"][0]["columns"][2].update(better="higher"), "Top-1 error, % is test/top1_error_percent"),
        (lambda c: c["tables"][0]["groups"][0].update(baseline="ResNet-29"), "its rows are compared with"),
        (lambda c: c["runs"]["cls_cifar100"].update(seeds=[7]), "here of another run"),
        (lambda c: c["runs"]["det_coco"].update(pretrained={"run": "cls_imagenet"}), "here of another run"),
        (lambda c: c.update(reported_by="the paper (JUSTC 2022)", tables=[{**c["tables"][0], "id": "1."}]), "no such"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_table_that_is_not_the_papers_says_so(change, said, papers):
    page = papers(change)
    assert "This is not the paper's table:" in page
    assert said in page


def test_the_released_tables_are_the_papers(papers):
    assert "This is not the paper's table" not in papers(lambda content: None)
    assert not paper.deviations(read_specs([RESULTS / "paper.yaml"]))
    values = [value for rows in paper.REPORTED.values() for _, _, text in rows.values() for value in text.split()]
    assert len(values) == 195


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (
            {"mine": {"title": "Mine", "kind": "official", "test": ["0"], "train": ["0"]}},
            "must be synthetic or stand-in",
        ),
        ({"cifar100": {"title": "CIFAR-100", "kind": "synthetic", "test": ["0"]}}, "a published data set"),
    ],
)
def test_what_is_official_is_not_a_users_to_write(data, said, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    Path("results").mkdir()
    Path("results/mine.yaml").write_text(yaml.safe_dump({"data": data}))
    assert main(["tables", "render"]) == 2
    assert said in capfd.readouterr().err


# What no file can tell: measured again.


def test_verify_measures_again(results, capfd, synthetic):
    assert results("verify", "--rows", "Res2Net") == 0
    out = capfd.readouterr().out
    assert len(re.findall(r"seed [01]: verified by re-test: largest difference 0 ", out)) == 2
    assert "table 9, Res2Net, mIoU: 2 verified by re-test" in out
    # Better values in each class, which no file contradicts.
    forge(records()[1], of_class)
    assert results("render") == 0
    assert "n = 2" in Path("results/TABLES.md").read_text()
    capfd.readouterr()
    assert results("verify") == 1
    out = capfd.readouterr().out
    assert re.search(r"seed 1: contradicted: test/\S+ is [\d.]+ in the record, now [\d.]+ \(in the same env", out)
    assert "1 verified by re-test, 1 contradicted" in out
    # Without its weights, or with others, a record is only recorded.
    checkpoint = next(Path("runs").rglob("seed1/checkpoints/last.ckpt"))
    shutil.copy(next(Path("runs").rglob("seed0/checkpoints/last.ckpt")), checkpoint)
    assert results("verify") == 0
    assert "1 verified by re-test, 1 recorded only" in capfd.readouterr().out


def test_verify_finds_weights_of_another_configuration(results, capfd):
    """The record and its configuration are rewritten, the checkpoint still holds the one that it was trained with."""
    path = records()[1]

    def other_loss(content: Content) -> None:
        content["config"]["model"]["init_args"]["background_weight"] = 0.3

    forge(path, other_loss, rehash=True)
    spec = Path("results/toys.yaml")
    spec.write_text(
        spec.read_text().replace("trainer.max_steps: 3,", "trainer.max_steps: 3, model.background_weight: 0.3,")
    )
    assert results("count") == 0
    assert results("verify", "--rows", "Res2Net") == 1
    said = (
        "contradicted: the checkpoint was trained with another configuration: model.init_args.background_weight is 0.3"
    )
    assert said in capfd.readouterr().out


def test_verify_trains_again(results, capfd):
    assert results("verify", "--rows", "Res2Net", "--sample", 1, "--retrain", 1) == 0
    out = capfd.readouterr().out
    assert "verified by re-training: all metrics and curves are the same to the last digit" in out
    assert "1 verified by re-training, 1 recorded only" in out or "1 recorded only, 1 verified by re-training" in out


def test_a_training_that_gives_something_else_is_found(results, capfd):
    """The weights of seed 1 as those of seed 0, in the checkpoint as well as in the record."""
    first, second = records()
    backbone = read_record(first).backbone
    checkpoint = Path("runs/toy_seg", backbone, "seed0/checkpoints/last.ckpt")
    content_of = torch.load(checkpoint.parents[2] / "seed1/checkpoints/last.ckpt", weights_only=True)
    content_of["run"]["config"]["seed_everything"] = 0
    torch.save(content_of, checkpoint)

    def other_seed(content: Content) -> None:
        content["seed"] = content["config"]["seed_everything"] = 0
        content["checkpoint"]["sha256"] = tensors_digest(content_of["state_dict"])

    shutil.move(second, first)
    forge(first, other_seed, rehash=True)
    assert results("verify", "--rows", "Res2Net") == 0
    assert "1 verified by re-test" in capfd.readouterr().out
    # With one seed nobody knows what chance does, unless a tolerance is stated.
    assert results("verify", "--rows", "Res2Net", "--retrain", 1) == 0
    assert "1 not confirmed" in capfd.readouterr().out
    assert results("verify", "--rows", "Res2Net", "--retrain", 1, "--tolerance", 0) == 1
    assert re.search(r"contradicted: test/miou is 0\.\d+ in the record, now 0\.\d+", capfd.readouterr().out)


def test_verify_ends_on_sigterm(results, tmp_path):
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    line = [sys.executable, "-m", "sis_lightning", "tables", "verify", "--rows", "Res2Net"]
    environment = {**os.environ, "TMPDIR": str(temporary), "MPLBACKEND": "agg"}
    with subprocess.Popen(line, env=environment, stdout=subprocess.PIPE, text=True) as process:
        while not any(temporary.glob("sis-lightning-verify-*")):
            assert process.poll() is None
            time.sleep(0.05)
        place = str(next(temporary.glob("sis-lightning-verify-*")))
        process.terminate()
        assert process.wait(60) == 143
    assert not any(temporary.glob("sis-lightning-verify-*"))
    commands = [path.read_bytes() for path in Path("/proc").glob("[0-9]*/cmdline") if os.access(path, os.R_OK)]
    assert not any(place.encode() in command for command in commands)


@pytest.mark.skipif(shutil.which("minisign") is None, reason="no minisign here")
def test_signatures(results, capfd):
    subprocess.run(["minisign", "-G", "-W", "-p", "key.pub", "-s", "key"], check=True, capture_output=True)
    assert results("render") == 0
    assert results("check", "--public-key", "key.pub") == 1
    assert "not signed with key.pub" in capfd.readouterr().out
    line = ["minisign", "-S", "-s", "key", "-m", *map(str, records())]
    subprocess.run(line, check=True, capture_output=True)
    assert results("check", "--public-key", "key.pub") == 0, capfd.readouterr().out
    forge(records()[0], metric(pixel_accuracy=0.99))
    assert results("check", "--public-key", "key.pub") == 1
    assert f"{records()[0].name}: not signed" in capfd.readouterr().out


def test_names_after_options(results, capfd):
    name = records()[0].name
    shutil.move(records()[0], "elsewhere.json")
    assert results("add", "--results", "results", "elsewhere.json") == 0
    assert name in capfd.readouterr().out
    assert results("render") == 0
    assert results("figures", "accuracy") == 0
    assert results("check") == 0, capfd.readouterr().out
