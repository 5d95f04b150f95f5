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
        help="Initial weights of the backbone: timm:NAME, torchvision:WEIGHTS, a file with a state dict, a checkpoint "
        "or a run's directory (default: random).",
    )
    training.add_argument(
        "--model.optimizer",
        metavar="CLASS",
        help="Optimizer: a class of torch.optim, such as SGD. --model.optimizer.lr sets its learning rate.",
    )
    training.add_argument("--trainer.max_epochs", metavar="N", help="Number of epochs.")
    training.add_argument(
        "--trainer.max_steps",
        metavar="N",
        help="Number of optimizer steps. Other options of Lightning's Trainer are given in the same way.",
    )
    training.add_argument("--checkpoint_every", metavar="N", help="Steps between two checkpoints (default: 500).")
    training.add_argument(
        "--resume",
        metavar="WHAT",
        help="auto: resume the run in --run_dir if there is one, otherwise start one. never (default): start a run, "
        "and stop with an error if --run_dir holds one already. A path: resume from this checkpoint.",
    )
    training.add_argument(
        "--overwrite", metavar="BOOL", help="If true, delete an earlier run in --run_dir, and start from the beginning."
    )
    return start(parser, "fit", arguments)
