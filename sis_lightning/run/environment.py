"""The environment of a start or a test: code, machine and packages, on which numbers may depend to the last bit."""

from __future__ import annotations

import inspect
import platform
import re
import subprocess
from collections.abc import Mapping
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

from pydantic import BaseModel, Field

from sis_lightning import __version__
from sis_lightning.config_files import PACKAGED
from sis_lightning.files import digest_files
from sis_lightning.machine import processor_name


class Code(BaseModel, frozen=True, extra="forbid"):
    """The code that ran.

    Attributes:
        sis_lightning: Release.
        commit: Commit of the checkout; None if the package is installed.
        dirty: Whether the package or its YAML files were changed since the commit; None as for `commit`.
        digest: SHA-256 of the package's files if it is installed.
        operators: SHA-256 of the file of each operator that took part and is not built in, by its name.
    """

    sis_lightning: str
    commit: str | None = Field(default=None, pattern=r"^[0-9a-f]{40}$")
    dirty: bool | None = None
    digest: str | None = None
    operators: dict[str, str] = {}


class Machine(BaseModel, frozen=True, extra="forbid"):
    """The machine of a start or a test.

    Attributes:
        device: `cpu`, or the name of the GPU.
        processor: Name of the CPU.
        instructions: The vector instructions that torch's CPU kernels use, such as `AVX512`.
        threads: Number of threads that torch uses on the CPU.
        cuda: Releases of CUDA, cuDNN and the GPU's driver; empty on a CPU.
    """

    device: str
    processor: str
    instructions: str
    threads: int
    cuda: dict[str, str] = {}


class Environment(BaseModel, frozen=True, extra="forbid"):
    """What ran, on what.

    Attributes:
        code: The code.
        machine: The machine.
        python: Release of Python.
        packages: Releases of all packages that are installed, by name.
    """

    code: Code
    machine: Machine
    python: str
    packages: dict[str, str]


def environment(operators: Mapping[str, type], device: Any = "cpu") -> Environment:
    """The environment of this process.

    Args:
        operators: The operators that take part and are not built in, by name.
        device: The torch device that computes.
    """
    installed = {re.sub(r"[-_.]+", "-", entry.name).lower(): entry.version for entry in distributions() if entry.name}
    return Environment(
        code=running_code(operators),
        machine=_machine(device),
        python=platform.python_version(),
        packages=dict(sorted(installed.items())),
    )


def portable(content: Any) -> Any:
    """Returns plain data without the folders of this machine: of absolute paths, the last part stays.

    Args:
        content: Plain data. Texts such as `/home/me/voc`, `../../me/voc`, `~/voc` and `--data.root=/home/me/voc` end as
            `…/voc` and `--data.root=…/voc`; relative paths within the current folder stay.
    """
    if isinstance(content, Mapping):
        return {key: portable(value) for key, value in content.items()}
    if isinstance(content, list | tuple):
        return [portable(value) for value in content]
    if not isinstance(content, str):
        return content
    option, equals, path = content.partition("=") if content.startswith("-") else ("", "", content)
    if not re.match(r"/.|~|\.\.(/|$)|[A-Za-z]:[\\/]", path) or "://" in path:
        return content
    name = re.split(r"[/\\]+", path.rstrip("/"))[-1]
    return f"{option}{equals}…/{name}"


def _machine(device: Any) -> Machine:
    import torch

    device = torch.device(device)
    cuda: dict[str, str] = {}
    if device.type == "cuda":
        cudnn = torch.backends.cudnn.version()  # type: ignore[no-untyped-call]
        cuda = {"cuda": str(torch.version.cuda), "cudnn": str(cudnn), "driver": _driver()}
    return Machine(
        device=torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        processor=processor_name(),
        instructions=torch.backends.cpu.get_cpu_capability(),
        threads=torch.get_num_threads(),
        cuda=cuda,
    )


def _driver() -> str:
    line = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        result = subprocess.run(line, capture_output=True, text=True, check=False, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return "unknown"
    return result.stdout.strip().partition("\n")[0] or "unknown"


def running_code(operators: Mapping[str, type]) -> Code:
    """The code that runs now.

    Args:
        operators: The operators that take part and are not built in, by name.
    """
    sources = {name: inspect.getsourcefile(operator) for name, operator in operators.items()}
    digests = {name: digest_files([Path(file)], Path(file).parent) for name, file in sources.items() if file}
    return Code(sis_lightning=__version__, operators=digests, **_commit())


def _commit() -> dict[str, Any]:
    here = Path(__file__).parents[1]

    def git(*arguments: str) -> str | None:
        try:
            line = ["git", "-C", str(here), *arguments]
            result = subprocess.run(line, capture_output=True, text=True, check=False, timeout=30)
        except (OSError, subprocess.TimeoutExpired):
            return None
        return result.stdout.strip() if result.returncode == 0 else None

    # A package that is installed below another project's checkout is not that project's code.
    if git("ls-files", "--error-unmatch", str(here / "__init__.py")) is None:
        return {"digest": digest_files([*here.rglob("*.py")], here)}
    # If git does not answer, nobody can say that nothing was changed.
    files = [here, *(folder for name in ("tasks", "datamodules", "configs") if (folder := PACKAGED / name).is_dir())]
    return {"commit": git("rev-parse", "HEAD"), "dirty": git("status", "--porcelain", "--", *map(str, files)) != ""}
