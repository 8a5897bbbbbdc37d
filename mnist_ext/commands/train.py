"""``mnist-ext train``: its options and the settings they make."""

import argparse

from mnist_ext.commands.options import folder_name, integer, number, widths
from mnist_ext.errors import UserError
from mnist_ext.settings import (
    ACTIVATIONS,
    DATASETS,
    IMPLEMENTATIONS,
    RECIPES,
    SCHEDULERS,
    TrainConfig,
)

_MOST_THREADS = 1024
_SETTINGS = TrainConfig.__dataclass_fields__


def add_parser(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the command and its options."""
    parser = commands.add_parser(
        "train",
        help="train a model and write it to a new folder",
        description="Train a model and write it, its settings and its metrics to a new folder.",
        epilog="example: mnist-ext train --recipe best --epochs 8 --target-accuracy 98",
        # An option that is not given is absent from the result, so that it does not override
        # the recipe.
        argument_default=argparse.SUPPRESS,
    )
    _add_options(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Train."""
    config = _train_config(args)
    # Takes seconds to import, and --help does without it.
    from mnist_ext.commands.train_run import run_training

    return run_training(config, args.command_line)


def _add_options(parser: argparse.ArgumentParser) -> None:
    default = TrainConfig()

    def recipe_default(name: str) -> str:
        tutorial, best = RECIPES["tutorial"][name], RECIPES["best"][name]
        return f"(default: {tutorial}; recipe best: {best})"

    positive = integer(1)
    add = parser.add_argument
    add(
        "--recipe",
        choices=RECIPES,
        help=f"settings to start from; the options below override them (default: {default.recipe})",
    )
    add(
        "--dataset",
        choices=DATASETS,
        help="auto is mnist, or the embedded digits where mnist is neither found nor can be "
        f"downloaded (default: {default.dataset})",
    )
    add(
        "--data-dir",
        metavar="DIR",
        help="folder that holds MNIST/raw, or to download to (default: $MNIST_EXT_DATA, then "
        "the user's cache folder)",
    )
    add("--epochs", type=positive, metavar="N", help=f"epochs {recipe_default('epochs')}")
    add(
        "--batch-size",
        type=positive,
        metavar="N",
        help=f"images per step {recipe_default('batch_size')}",
    )
    add(
        "--lr",
        type=number(0),
        metavar="X",
        help=f"learning rate; its peak with --scheduler onecycle {recipe_default('lr')}",
    )
    add(
        "--momentum",
        type=number(0, 1),
        metavar="X",
        help=f"momentum of SGD {recipe_default('momentum')}",
    )
    add(
        "--nesterov",
        action=argparse.BooleanOptionalAction,
        help=f"use Nesterov momentum {recipe_default('nesterov')}",
    )
    add(
        "--weight-decay",
        type=number(0),
        metavar="X",
        help=f"L2 penalty {recipe_default('weight_decay')}",
    )
    add(
        "--scheduler",
        choices=SCHEDULERS,
        help=f"how the learning rate changes {recipe_default('scheduler')}",
    )
    add(
        "--activation",
        choices=ACTIVATIONS,
        help=f"what follows each hidden layer {recipe_default('activation')}",
    )
    add(
        "--hidden",
        type=widths,
        metavar="N,N,...",
        help=f"width of each hidden layer (default: {','.join(map(str, default.hidden))})",
    )
    add(
        "--impl",
        choices=IMPLEMENTATIONS,
        help=f"operators of this package, or PyTorch's for comparison (default: {default.impl})",
    )
    add(
        "--one-call",
        action="store_true",
        help="run many training steps per native call (mnist_ext.TrainStep); only with --impl ext "
        "on the CPU",
    )
    add("--device", metavar="DEVICE", help=f"cpu, cuda or cuda:N (default: {default.device})")
    add(
        "--seed",
        type=integer(0),
        metavar="N",
        help="determines the initial weights and the order of the images "
        f"(default: {default.seed})",
    )
    add(
        "--threads",
        type=integer(1, _MOST_THREADS),
        metavar="N",
        help="CPU threads (default: PyTorch's choice)",
    )
    add(
        "--output-dir",
        metavar="DIR",
        help=f"folder to create the run's folder in (default: {default.output_dir})",
    )
    add(
        "--name",
        type=folder_name,
        help="name of the run's folder; a number is appended where it is taken (default: time, "
        "data set and implementation)",
    )
    add(
        "--target-accuracy",
        type=number(0, 100),
        metavar="PERCENT",
        help="exit with code 1 when the final test accuracy is below this (default: none)",
    )


def _train_config(args: argparse.Namespace) -> TrainConfig:
    given = {name: value for name, value in vars(args).items() if name in _SETTINGS}
    recipe = given.get("recipe", TrainConfig.recipe)
    config = TrainConfig(**{**RECIPES[recipe], **given})
    if config.nesterov and config.momentum == 0:
        raise UserError("--nesterov needs a --momentum above 0; add one or --no-nesterov")
    if config.one_call and (config.impl != "ext" or config.device != "cpu"):
        raise UserError("--one-call needs --impl ext and --device cpu; leave it out")
    return config
