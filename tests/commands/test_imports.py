"""The start of a command: what it leaves out of its imports is there for whoever needs it afterwards."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

FIT = ["fit", "--config", "tasks/seg_voc.yaml", "--config", "configs/demo.yaml", "--print_config"]


def run_python(program: str) -> str:
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    line = [sys.executable, "-c", program]
    result = subprocess.run(line, capture_output=True, text=True, check=False, env=environment)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_a_run_starts_without_what_it_does_not_need():
    out = run_python(
        "import gc, sys\n"
        "from sis_lightning.commands.main import main\n"
        f"assert main({FIT!r}) == 0\n"
        "unneeded = {'scipy.signal', 'scipy.stats', 'onnx', 'onnxruntime', 'faster_coco_eval', 'jinja2'}\n"
        "assert 'torchmetrics' in sys.modules\n"
        "assert not unneeded & set(sys.modules), unneeded & set(sys.modules)\n"
        "assert gc.isenabled()\n"
        "frozen = gc.get_freeze_count()\n"
        "assert frozen > 100_000, frozen\n"
        # A second command in the same process has nothing to import, so it sets nothing aside.
        f"assert main({FIT!r}) == 0\n"
        "assert gc.get_freeze_count() <= frozen\n"
        "import scipy\n"
        "assert scipy.signal.butter(1, 0.5)[0].size == 2\n"
        "import scipy.signal as signal\n"
        "assert signal is scipy.signal and not hasattr(signal, 'hamming')\n"
        "print('fine')"
    )
    assert out.endswith("fine\n")


def test_what_is_imported_already_stays():
    run_python(
        "import gc, sys, scipy.signal\n"
        "before = scipy.signal\n"
        "from sis_lightning.commands.imports import quick_imports\n"
        "try:\n"
        "    with quick_imports():\n"
        "        import torchmetrics\n"
        "        raise ValueError\n"
        "except ValueError:\n"
        "    pass\n"
        "assert gc.isenabled() and scipy.signal is before is sys.modules['scipy.signal']"
    )
