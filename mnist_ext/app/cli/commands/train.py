"""``mnist-ext train``: its options."""

import argparse
from pathlib import Path

from mnist_ext.app import UserError
from mnist_ext.app.cli.commands.train_config import config_of, read_toml
from mnist_ext.app.cli.options import (
    MOST_THREADS,
    folder_name,
    integer,
    number,
    path,
    whole_path,
    widths,
)
from mnist_ext.app.data import DATASETS
from mnist_ext.app.training.settings import (
    ACTIVATIONS,
    IMPLEMENTATIONS,
    RECIPES,
    SCHEDULERS,
    TrainConfig,
)

_SETTINGS = TrainConfig.__dataclass_fields__
_EPILOG = """\
examples:
  mnist-ext train --recipe best --epochs 8 --target-accuracy 98
  mnist-ext train --config settings.toml --lr 0.05
  mnist-ext train --resume runs/NAME
  torchrun --nproc-per-node=2 -m mnist_ext train --batch-size 128

Ctrl-C, SIGTERM, SIGHUP and SIGUSR1 save a checkpoint; a line says how to continue.
exit codes: 0 done, 1 diverged, below the target or a process lost, 2 wrong use or bad input,
130 Ctrl-C, 143 SIGTERM, 129 SIGHUP, 138 SIGUSR1"""


def add_parser(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the command and its options."""
    parser = commands.add_parser(
        "train",
        help="train a model and write it to a new folder",
        description="Train a model and write it, its settings and its metrics to a new folder.\n"
        "Under torchrun several processes train one model.",
        epilog=_EPILOG,
        # An option that is not given is absent from the result, so that it does not override
        # the recipe.
        argument_default=argparse.SUPPRESS,
    )
    _add_run_options(parser)
    _add_data_options(parser)
    _add_model_options(parser)
    _add_training_options(parser)
    _add_machine_options(parser)
    _add_output_options(parser)
    parser.set_defaults(run=run, parser=parser)


def run(args: argparse.Namespace) -> int:
    """Train."""
    given = {name: value for name, value in vars(args).items() if name in _SETTINGS}
    resume = getattr(args, "resume", None)
    dry_run = getattr(args, "dry_run", False)
    file = getattr(args, "config", None)
    if resume is not None and (file is not None or dry_run):
        raise UserError(
            f"--resume does not go with {'--dry-run' if file is None else '--config'}: the "
            "settings are those of the run"
        )
    if file is not None:
        tokens = read_toml(file)
        try:
            from_file = args.parser.parse_args(tokens)
        except UserError as error:
            raise UserError(f"{file}: {error}") from None
        given = {**{k: v for k, v in vars(from_file).items() if k in _SETTINGS}, **given}
    config = config_of(given, dry_run) if resume is None else None
    # Takes seconds to import, and --help does without it.
    from mnist_ext.app.cli.commands.train_run import Request, run_training

    return run_training(
        Request(
            config=config,
            resume=None if resume is None else Path(resume),
            given=given,
            dry_run=dry_run,
            tensorboard=getattr(args, "tensorboard", False),
            output=getattr(args, "output", "lines"),
            command=args.command_line,
        )
    )


def _recipe_default(name: str) -> str:
    tutorial, best = RECIPES["tutorial"][name], RECIPES["best"][name]
    return f"(default: {tutorial}; recipe best: {best})"


def _add_run_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("which run").add_argument
    add(
        "--recipe",
        choices=RECIPES,
        help="settings to start from; the options below override them "
        f"(default: {TrainConfig.recipe})",
    )
    add(
        "--config",
        type=path,
        metavar="FILE",
        help="TOML file of settings, named as the options without the dashes; options given here "
        "override it",
    )
    add(
        "--resume",
        type=path,
        metavar="RUN",
        help="continue the run in this folder, bit for bit, from its checkpoint; only --epochs "
        "(where no scheduler depends on it), --data-dir, --threads, --target-accuracy and the "
        "output can be given anew",
    )
    add(
        "--dry-run",
        action="store_true",
        help="try everything on one batch of training and one of evaluation; write nothing",
    )


def _add_data_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("data").add_argument
    add(
        "--dataset",
        choices=DATASETS,
        help="auto is mnist, or the embedded digits where mnist is neither found nor can be "
        f"downloaded (default: {TrainConfig.dataset})",
    )
    add(
        "--data-dir",
        type=whole_path,
        metavar="DIR",
        help="folder that holds MNIST/raw, or MNIST's files themselves, or to download to "
        "(default: $MNIST_EXT_DATA, then the user's cache folder)",
    )
    add(
        "--augment",
        action=argparse.BooleanOptionalAction,
        help="train on copies of the images that are rotated, scaled, sheared, translated and "
        f"elastically distorted at random, new ones in each epoch {_recipe_default('augment')}",
    )
    add(
        "--limit-batches",
        type=integer(1),
        metavar="N",
        help="use N batches per epoch of training, and of evaluation (default: all)",
    )


def _add_model_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("model").add_argument
    add(
        "--hidden",
        type=widths,
        metavar="N,N,...",
        help=f"width of each hidden layer (default: {','.join(map(str, TrainConfig.hidden))})",
    )
    add(
        "--activation",
        choices=ACTIVATIONS,
        help=f"what follows each hidden layer {_recipe_default('activation')}",
    )


def _add_training_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("training").add_argument
    add("--epochs", type=integer(1), metavar="N", help=f"epochs {_recipe_default('epochs')}")
    add(
        "-b",
        "--batch-size",
        type=integer(1),
        metavar="N",
        help=f"images per step, of all processes together {_recipe_default('batch_size')}",
    )
    add(
        "--lr",
        type=number(0),
        metavar="X",
        help=f"learning rate; its peak with --scheduler onecycle {_recipe_default('lr')}",
    )
    add(
        "--momentum",
        type=number(0, 1),
        metavar="X",
        help=f"momentum of SGD {_recipe_default('momentum')}",
    )
    add(
        "--nesterov",
        action=argparse.BooleanOptionalAction,
        help=f"use Nesterov momentum {_recipe_default('nesterov')}",
    )
    add(
        "--weight-decay",
        "--wd",
        type=number(0),
        metavar="X",
        help=f"L2 penalty {_recipe_default('weight_decay')}",
    )
    add(
        "--scheduler",
        "--lr-scheduler",
        choices=SCHEDULERS,
        help=f"how the learning rate changes, step by step {_recipe_default('scheduler')}",
    )
    add(
        "--seed",
        type=integer(0),
        metavar="N",
        help="determines the initial weights and the order of the images "
        f"(default: {TrainConfig.seed})",
    )
    add(
        "--target-accuracy",
        type=number(0, 100),
        metavar="PERCENT",
        help="exit with code 1 when the final test accuracy is below this (default: none)",
    )


def _add_machine_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("implementation and machine").add_argument
    add(
        "--impl",
        choices=IMPLEMENTATIONS,
        help="operators of this package, or PyTorch's for comparison "
        f"(default: {TrainConfig.impl})",
    )
    add(
        "--one-call",
        action=argparse.BooleanOptionalAction,
        help="run many training steps per native call (mnist_ext.TrainStep); only with --impl ext, "
        f"in one process (default: {TrainConfig.one_call})",
    )
    add("--device", metavar="DEVICE", help=f"cpu, cuda or cuda:N (default: {TrainConfig.device})")
    add(
        "--threads",
        type=integer(1, MOST_THREADS),
        metavar="N",
        help="CPU threads of each process (default: PyTorch's choice; torchrun's is 1)",
    )


def _add_output_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("output")
    add = group.add_argument
    add(
        "--output-dir",
        type=path,
        metavar="DIR",
        help=f"folder to create the run's folder in (default: {TrainConfig.output_dir})",
    )
    add(
        "--name",
        type=folder_name,
        help="name of the run's folder; a number is appended where it is taken (default: time, "
        "data set and implementation)",
    )
    add(
        "--log-interval",
        type=integer(1),
        metavar="N",
        help=f"write every N-th step to steps.csv (default: {TrainConfig.log_interval})",
    )
    add(
        "--tensorboard",
        action="store_true",
        help="write RUN/tensorboard too; needs pip install 'mnist-ext[tensorboard]'",
    )
    either = group.add_mutually_exclusive_group()
    either.add_argument(
        "-q",
        "--quiet",
        dest="output",
        action="store_const",
        const="quiet",
        help="print nothing but errors",
    )
    either.add_argument(
        "--json",
        dest="output",
        action="store_const",
        const="json",
        help="print one JSON object a line instead: start, step, epoch, stopped, end",
    )
