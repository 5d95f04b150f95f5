"""`sis-lightning fit`: trains a network."""

from __future__ import annotations

from sis_lightning.commands.run_commands import run_parser, start


def main(arguments: list[str]) -> int:
    """Runs the command; returns the exit code."""
    parser = run_parser(
        "fit",
        "Train a network, and validate it during training.",
        [
            ("fit --config tasks/seg_voc.yaml --config configs/demo.yaml", "on synthetic data, in minutes on a CPU"),
            ("fit --config tasks/det_coco.yaml --data.root /data/coco --trainer ddp", "on all GPUs of this machine"),
            (
                "fit --config tasks/seg_voc.yaml --data.root /data/voc --model.backbone.operator interactive1",
                "with another operator",
            ),
            ("fit --config tasks/seg_voc.yaml --data.root /data/voc --resume auto", "resume after an interruption"),
        ],
    )
    training = parser.add_argument_group("training")
    training.add_argument(
        "--model.backbone_weights",
        metavar="WEIGHTS",
        help="Initial weights of the backbone: timm:NAME, torchvision:WEIGHTS, a file, a checkpoint or a run's "
        "directory.",
    )
    training.add_argument(
        "--model.optimizer", metavar="CLASS", help="Optimizer, such as SGD; --model.optimizer.lr is its learning rate."
    )
    training.add_argument("--trainer.max_epochs", metavar="N", help="Number of epochs.")
    training.add_argument(
        "--trainer.max_steps", metavar="N", help="Number of optimizer steps; any option of Lightning's Trainer works."
    )
    training.add_argument(
        "--checkpoint_every", metavar="N", help="Steps from one checkpoint to the next (default: 500)."
    )
    training.add_argument(
        "--resume",
        metavar="WHAT",
        help="auto: resume the run in the directory if there is one, else start it; never (default); or the path of "
        "a checkpoint.",
    )
    training.add_argument("--overwrite", metavar="BOOL", help="If true, remove an earlier run in the directory.")
    return start(parser, "fit", arguments)
