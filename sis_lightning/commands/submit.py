"""`sis-lightning submit`: submits a training job to SLURM."""

from __future__ import annotations

from sis_lightning.commands.arguments import Parser, config_options, require_at_least, require_torch
from sis_lightning.commands.imports import quick_imports
from sis_lightning.errors import UsageError


def submit_parser() -> Parser:
    """The parser of the command; options that it does not know are those of `fit`."""
    parser = Parser(
        "submit",
        "Write a job script for SLURM into the run's directory, and submit it with sbatch. Shortly before its time "
        "limit, the job saves a checkpoint and requeues itself. This repeats until training has finished.",
        [
            (
                "submit --config tasks/seg_voc.yaml --data.root /data/voc --gpus-per-node 4 --time 4:00:00 --dry-run",
                "print the script only",
            ),
            ("submit --config tasks/seg_voc.yaml --data.root /data/voc --gpus-per-node 4 --array seeds=0..4", ""),
        ],
        usage="--config FILE [options] [options of fit]",
        more="Further options are those of fit, except --resume and --overwrite; see sis-lightning fit --help.",
    )
    parser.add_config(required=True)
    parser.add_argument("--nodes", type=int, default=1, metavar="N", help="Number of nodes (default: %(default)s).")
    parser.add_argument(
        "--gpus-per-node",
        type=int,
        default=0,
        metavar="N",
        help="Number of GPUs per node (default: 0, which trains on CPUs).",
    )
    parser.add_argument(
        "--tasks-per-node",
        type=int,
        metavar="N",
        help="Number of processes per node (default: one per GPU, or one without GPUs).",
    )
    parser.add_argument(
        "--time",
        default="24:00:00",
        help="Time limit of the job in the format of sbatch. Training continues when the job is requeued (default: "
        "%(default)s).",
    )
    parser.add_argument(
        "--array", metavar="seeds=A..B", help="Submit a job array with one job per seed: seeds=0..4 or seeds=0,2,7."
    )
    parser.add_argument(
        "--dependency",
        metavar="TYPE:JOB",
        help="Wait for other jobs, as sbatch does: afterok:1234. If they fail, the job is cancelled.",
    )
    parser.add_argument("--test", action="store_true", help="Run test after fit in the same job.")
    parser.add_argument(
        "--cluster",
        default="default",
        metavar="NAME",
        help="Name of a file in configs/slurm with the settings of the cluster, such as its partition (default: "
        "%(default)s).",
    )
    parser.add_argument("--dry-run", action="store_true", help="Print the script; write and submit nothing.")
    return parser


def main(arguments: list[str]) -> int:
    """Runs the command; returns the exit code."""
    parser = submit_parser()
    chosen, options = parser.parse_known_args(arguments)
    require_at_least(parser, chosen, {"nodes": 1, "gpus_per_node": 0, "tasks_per_node": 1})
    for option in options:
        key = option.partition("=")[0]
        if key in ("--resume", "--overwrite"):
            raise UsageError(f"submit takes no {key}: a job resumes the run in its directory when it is requeued")
        if key == "--run_dir" and chosen.array:
            raise UsageError("--array gives every seed a directory of its own: leave out --run_dir")
    from sis_lightning.slurm import jobs as slurm

    slurm.refuse_control_characters_in(arguments)
    cluster = slurm.read_cluster(chosen.cluster)
    seeds = slurm.seeds_of(chosen.array) if chosen.array else None
    tasks = chosen.tasks_per_node or chosen.gpus_per_node or 1
    device = [f"--trainer.num_nodes={chosen.nodes}", f"--trainer.devices={tasks}"]
    if tasks * chosen.nodes > 1 and not any(option.startswith("--trainer.strategy") for option in options):
        device.append("--trainer.strategy=ddp")
    if chosen.gpus_per_node:
        device.insert(0, "--trainer=cluster")
    files = [*chosen.config, "configs/cluster.yaml"]
    given = config_options(files, [*device, f"--max_restarts={cluster.max_restarts}", *options])
    with quick_imports():
        require_torch()
        from sis_lightning.run.run import Run
    # The whole run is built here, so that mistakes are reported now and not when the job starts.
    run = Run.from_arguments(given)
    _ = run.task, run.datamodule
    folder = run.directory if seeds is None else run.family
    text = slurm.submit(
        ["fit", *given, *([] if seeds is not None else [f"--run_dir={folder}"])],
        folder,
        cluster,
        nodes=chosen.nodes,
        gpus_per_node=chosen.gpus_per_node,
        tasks_per_node=tasks,
        time=chosen.time,
        seeds=seeds,
        then_test=chosen.test,
        dry_run=chosen.dry_run,
        dependency=chosen.dependency,
    )
    print(text, end="")
    return 0
