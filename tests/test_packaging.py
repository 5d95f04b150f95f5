"""The wheel: holds the YAML, and starts a run from any folder."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("dist")
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(folder), str(ROOT)]
    result = subprocess.run(build, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    (path,) = folder.glob("*.whl")
    return path


def test_it_holds_every_yaml_and_no_more_than_the_package(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    for folder in ("tasks", "datamodules", "configs"):
        for path in (ROOT / folder).rglob("*.yaml"):
            assert f"sis_lightning/yaml/{path.relative_to(ROOT).as_posix()}" in names
    for name in ("paper.yaml", "ours.yaml", "models.json"):
        assert f"sis_lightning/yaml/results/{name}" in names
    assert "sis_lightning/py.typed" in names
    assert {name.partition("/")[0] for name in names if ".dist-info" not in name} == {"sis_lightning"}


def test_it_writes_the_tables_into_an_empty_folder(wheel, tmp_path):
    site, elsewhere = tmp_path / "site", tmp_path / "elsewhere"
    zipfile.ZipFile(wheel).extractall(site)
    elsewhere.mkdir()
    for action in (["render"], ["plan", "--table", "3", "--rows", "Basic SIS"]):
        done = subprocess.run(
            [sys.executable, "-m", "sis_lightning", "tables", *action],
            capture_output=True,
            text=True,
            check=False,
            cwd=elsewhere,
            env={**os.environ, "PYTHONPATH": str(site)},
        )
        assert done.returncode == 0, done.stderr
    assert done.stdout.count("sis-lightning fit --config tasks/seg_voc.yaml --model.backbone sis50") == 6
    assert "| Basic SIS" in (elsewhere / "results" / "TABLES.md").read_text()
    assert (elsewhere / "results" / "tables.html").is_file()


def test_it_starts_a_run_from_another_folder_that_holds_no_data(wheel, tmp_path):
    site, elsewhere = tmp_path / "site", tmp_path / "elsewhere"
    zipfile.ZipFile(wheel).extractall(site)
    elsewhere.mkdir()
    (elsewhere / "few.yaml").write_text("data.init_args.synthetic: {images: 20, size: 48, min_object: 12}\n")
    options = ["--config", "tasks/seg_voc.yaml", "--config", "configs/demo.yaml", "--config", "few.yaml"]
    options += ["--trainer.max_steps", "1", "--data.num_workers", "0", "--data.batch_size", "2"]
    result = subprocess.run(
        [sys.executable, "-m", "sis_lightning", "fit", *options],
        capture_output=True,
        text=True,
        check=False,
        cwd=elsewhere,
        env={**os.environ, "PYTHONPATH": str(site)},
    )
    assert result.returncode == 0, result.stderr
    assert "data/synthetic does not exist: writing synthetic data there" in result.stdout
    assert (elsewhere / "data" / "synthetic" / "contact_sheet.png").is_file()
    assert (elsewhere / "runs/seg_voc/res2net14-16w4s-basic-16ch/seed0/checkpoints/last.ckpt").is_file()
    where = "import sis_lightning.config_files as c; print(c.PACKAGED)"
    environment = {**os.environ, "PYTHONPATH": str(site)}
    ask = [sys.executable, "-c", where]
    found = subprocess.run(ask, capture_output=True, text=True, check=True, env=environment, cwd=elsewhere)
    assert Path(found.stdout.strip()) == site / "sis_lightning" / "yaml"
