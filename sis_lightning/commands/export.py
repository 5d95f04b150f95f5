"""`sis-lightning export`: writes a trained network as a file for other runtimes."""

from __future__ import annotations

from pathlib import Path

from sis_lightning.commands.arguments import Parser, config_options, require_torch
from sis_lightning.errors import DataError, UsageError


def main(arguments: list[str]) -> int:
    """Runs the command; returns the exit code."""
    parser = Parser(
        "export",
        "Write the deployed (fused) model of a checkpoint as ONNX or as a program of torch.export, run the file, and "
        "compare its outputs with those of the model. The model takes preprocessed images; the metadata of the file "
        "describes the preprocessing and names the classes.",
        [
            ("export --ckpt runs/seg_voc/sis50-26w4s-basic/seed0/checkpoints/last.ckpt", ""),
            ("export --config tasks/seg_voc.yaml --data.root /data/voc --ckpt best --format pt2 --out voc.pt2", ""),
        ],
        usage="[--ckpt PATH] [--config FILE] [options] [options of fit]",
        more="Further options are those of fit; see sis-lightning fit --help. Detection models can be written as ONNX "
        "only.",
    )
    parser.add_argument(
        "--ckpt",
        default="last",
        metavar="PATH",
        help="Path of a checkpoint or of a run's directory; or last or best, for the checkpoint of the run that "
        "--config describes (default: %(default)s).",
    )
    parser.add_config(help="Configuration file, as for fit (default: config.yaml of the checkpoint's run).")
    parser.add_argument(
        "--format",
        choices=("onnx", "pt2"),
        default="onnx",
        help="onnx: ONNX, for onnxruntime and other runtimes. pt2: a program for torch.export.load (default: "
        "%(default)s).",
    )
    parser.add_argument("--out", metavar="FILE", help="File to write (default: model.FORMAT in the run's directory).")
    chosen, options = parser.parse_known_args(arguments)
    files = chosen.config
    if not files:
        if chosen.ckpt in ("last", "best"):
            raise UsageError(
                "export needs a checkpoint, --ckpt RUN/checkpoints/last.ckpt, or the run that it belongs to: --config "
                "tasks/NAME.yaml and options as for fit"
            )
        path = Path(chosen.ckpt)
        if path.is_dir():
            path = path / "checkpoints" / "last.ckpt"
        if not path.is_file():
            raise DataError(f"--ckpt {chosen.ckpt}: there is no checkpoint {path}")
        chosen.ckpt = str(path)
        files = [str(path.parent.parent / "config.yaml")]
        if not Path(files[0]).is_file():
            raise UsageError(
                f"{path} is not in the directory of a run, which holds config.yaml:\n"
                "  name its configuration, --config tasks/NAME.yaml and options as for fit"
            )
    require_torch()
    from sis_lightning.models.export import export
    from sis_lightning.run import Run

    run = Run.from_arguments(config_options(files, options))
    checkpoint, content = run.read_checkpoint(chosen.ckpt)
    folder = checkpoint.parent.parent if checkpoint.parent.name == "checkpoints" else run.directory
    out = Path(chosen.out) if chosen.out else folder / f"model.{chosen.format}"
    metadata = {"checkpoint": {"file": checkpoint.name, "step": content["global_step"]}}
    done = export(run.load(checkpoint), out, run.image_size, metadata=metadata)
    shapes = ", ".join("×".join(map(str, shape)) for shape in done.shapes)
    print(f"{done.path}: {done.path.stat().st_size / 1e6:.1f} MB, verified on images of shape {shapes}")
    if done.difference is None:
        print("note: the model detected nothing in these images, so the file was run but its outputs were not compared")
    else:
        print(f"largest difference of an output: {done.difference:.1g} of the largest output")
    return 0
