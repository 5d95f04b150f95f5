"""Records hold what was measured and by what; one that was edited by accident is told by its checksum."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sis_lightning.errors import DataError
from sis_lightning.files import digest, digest_files, write_text
from sis_lightning.run.environment import portable
from sis_lightning.run.recipe import recipe
from sis_lightning.run.record import OptionChange, TestRecord, read_record, write_record, write_with_checksum

plain = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@given(st.dictionaries(st.text(), plain, max_size=5))
def test_a_digest_depends_on_the_content_alone(content):
    again = json.loads(json.dumps(dict(reversed(content.items()))))
    assert digest(again) == digest(content)
    assert digest({**content, "one more": 1}) != digest(content)


def test_two_writers_of_a_file_do_not_interfere(tmp_path):
    path = tmp_path / "file"
    texts = {str(number) * 100_000 for number in range(4)}

    def write(text: str) -> bool:
        for _ in range(25):
            write_text(path, text)
            if path.read_text() not in texts:
                return False
        return True

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(write, texts))
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"]


def test_a_digest_of_files_depends_on_every_byte_and_name(tmp_path):
    for name, text in {"a/x.jpg": "1", "a/y.jpg": "2"}.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    files = sorted(tmp_path.rglob("*.jpg"))
    before = digest_files(files, tmp_path)
    assert digest_files(files[::-1], tmp_path) == before
    assert digest_files(files[:1], tmp_path) != before
    moved = tmp_path / "elsewhere"
    (tmp_path / "a").rename(moved)
    assert digest_files(sorted(moved.rglob("*.jpg")), tmp_path) != before
    moved.rename(tmp_path / "a")
    (tmp_path / "a/y.jpg").write_text("3")
    assert digest_files(files, tmp_path) != before
    with pytest.raises(DataError, match=r"z\.jpg"):
        digest_files([tmp_path / "z.jpg"], tmp_path)


@pytest.fixture
def tested(command, small) -> TestRecord:
    options = [*small("seg_voc", steps=3), "--run_dir", "run"]
    assert command("fit", *options).code == 0
    test = command("test", *options)
    assert test.code == 0, test.err
    return read_record(Path("run/test.json"))


def leaves(content: dict, prefix: tuple = ()):
    for key, value in content.items():
        if isinstance(value, dict) and value:
            yield from leaves(value, (*prefix, key))
        else:
            yield (*prefix, key), value


def test_a_record_says_what_was_measured_and_by_what(tested, command, small):
    record = tested
    assert record.task == "seg_voc"
    assert record.backbone == "res2net14-4w4s-basic-8ch"
    assert (record.seed, record.checkpoint.step, record.checkpoint.finished) == (0, 3, True)
    assert record.primary_metric == "test/miou"
    assert record.config["model"]["init_args"]["backbone"]["operator"] == "basic"
    assert record.recipe_hash == digest(recipe(record.config))
    assert record.data.identity.startswith("synthetic")
    assert record.training.seconds > 0
    assert record.training.environments == [record.environment]
    environment = record.environment
    assert {"torch", "lightning", "numpy", "segmentation-models-pytorch"} <= set(environment.packages)
    assert environment.packages["torch"] == torch.__version__.partition("+")[0]
    assert (environment.machine.device, environment.machine.threads) == ("cpu", torch.get_num_threads())
    assert environment.machine.instructions == torch.backends.cpu.get_cpu_capability()
    assert record.command[:2] == ["sis-lightning", "test"]
    assert record.training.command[:2] == ["sis-lightning", "fit"]
    assert not record.checkpoint.deployed
    # Where it was measured is nobody's business.
    assert str(Path.home()) not in record.model_dump_json()
    assert str(Path.cwd().parent) not in record.model_dump_json()
    # A second test of the same checkpoint measures the same on the same data.
    again = command("test", *small("seg_voc", steps=3), "--run_dir", "run", "--data.num_workers", 0)
    assert again.code == 0
    second = read_record(Path("run/test.json"))
    for name in ("metrics", "config_hash", "recipe_hash", "checkpoint", "data"):
        assert getattr(second, name) == getattr(record, name), name
    # No value of it can be changed without being noticed.
    path = Path("run/test.json")
    for keys, value in leaves(json.loads(path.read_text())):
        edited = json.loads(path.read_text())
        place = edited
        for key in keys[:-1]:
            place = place[key]
        place[keys[-1]] = "changed" if value != "changed" else "again"
        Path("edited.json").write_text(json.dumps(edited))
        with pytest.raises(DataError, match="checksum mismatch"):
            read_record(Path("edited.json"))


@pytest.mark.parametrize(
    ("typed", "recorded"),
    [
        ("/home/me/voc", "…/voc"),
        ("/home/me/voc/", "…/voc"),
        ("--data.root=/home/me/voc", "--data.root=…/voc"),
        ("~/voc", "…/voc"),
        ("../../me/voc", "…/voc"),
        ("C:\\Users\\me\\voc", "…/voc"),
        *(
            (text, text)
            for text in ("data/voc", "--data.root=data/voc", "timm:res2net50", "32-true", "a/../b", "/", "")
        ),
        ("https://example.org/x", "https://example.org/x"),
    ],
)
def test_folders_of_a_machine_are_left_out(typed, recorded):
    content = {"a": [typed, 1, None], "b": {"c": typed}}
    assert portable(content) == {"a": [recorded, 1, None], "b": {"c": recorded}}
    assert portable(portable(content)) == portable(content)


def test_a_recipe_does_not_depend_on_folders():
    config = {"model": {"class_path": "m", "init_args": {"weights": "/home/me/x.pt"}}, "data": {"class_path": "d"}}
    assert digest(recipe(config)) == digest(recipe(portable(config)))


def test_options_with_an_effect_are_in_the_hash(tested, command, small):
    other = [*small("seg_voc", steps=3), "--run_dir", "other", "--model.background_weight", "0.3"]
    seed = [*small("seg_voc", steps=3), "--run_dir", "seed", "--seed_everything", "1", "--data.num_workers", "1"]
    hashes = []
    for options in (other, seed):
        assert command("fit", *options).code == 0
        assert command("test", *options).code == 0
        record = read_record(Path(options[options.index("--run_dir") + 1], "test.json"))
        assert record.data.fingerprint == tested.data.fingerprint
        hashes.append(record.config_hash)
    assert hashes[0] != tested.config_hash
    assert hashes[1] == tested.config_hash


def test_a_test_under_other_options_says_so(tested, command, small):
    options = [*small("seg_voc", steps=3), "--run_dir", "run"]
    result = command("test", *options, "--trainer.limit_test_batches", 1, "--trainer.precision", "64-true")
    assert result.code == 0, result.err
    record = read_record(Path("run/test.json"))
    assert record.tested_otherwise == {"trainer.limit_test_batches": OptionChange(trained=None, tested=1)}
    assert record.computed_otherwise == {"trainer.precision": OptionChange(trained=None, tested="64-true")}


def test_other_files_are_refused(tested, tmp_path):
    path = tmp_path / "record.json"
    for text, words in (("{", "not valid JSON"), ("[]", "not a record"), ('{"metrics": {}}', "not a record")):
        path.write_text(text)
        with pytest.raises(DataError, match=words):
            read_record(path)
    write_with_checksum(path, {"schema": 1, "metrics": {}})
    with pytest.raises(DataError, match=r"a record of version 1, this release reads version 3"):
        read_record(path)
    write_with_checksum(path, {"version": 3, "metrics": {}})
    with pytest.raises(DataError, match=r"not a record .*\(task: Field required\)"):
        read_record(path)
    written = write_record(path, tested.model_copy(update={"metrics": {"test/miou": None}}))
    assert read_record(path) == written
    with pytest.raises(DataError, match="No such file"):
        read_record(tmp_path / "gone.json")
