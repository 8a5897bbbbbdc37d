"""The command line: ``mnist-ext train`` and ``mnist-ext doctor``.

Exit codes: 0 done, 1 the training diverged or missed its target, 2 wrong use or bad input,
130 interrupted.
"""

import argparse
import json
import math
import shlex
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch
import torchvision
from torch import nn
from tqdm import tqdm

from mnist_ext import __version__, build_info, data
from mnist_ext.errors import UserError
from mnist_ext.models import ACTIVATIONS
from mnist_ext.runs import Run
from mnist_ext.training import (
    IMPLEMENTATIONS,
    RECIPES,
    SCHEDULERS,
    Batch,
    TrainConfig,
    build,
    select_device,
    train,
)

_LARGEST_INT = 2**31 - 1
_MOST_THREADS = 1024


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code.

    Args:
        argv: the arguments after the program's name; None takes the process's own.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    try:
        args = _parser().parse_args(argv)
        if args.command == "doctor":
            return _doctor(as_json=args.json)
        return _train(_train_config(args), command=shlex.join(["mnist-ext", *argv]))
    except UserError as error:
        print(f"mnist-ext: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("mnist-ext: interrupted", file=sys.stderr)
        return 130


def _train(config: TrainConfig, command: str) -> int:
    device = select_device(config.device, config.impl)
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    dataset = data.load(config.dataset, config.data_dir)
    if dataset.notice:
        print(f"mnist-ext: note: {dataset.notice}", file=sys.stderr)
    model, criterion = build(config, device)

    with Run(config, dataset, _environment(command)) as run:
        _print_header(config, dataset, model)
        progress = _progress_bar if sys.stderr.isatty() else None
        for metrics in train(model, criterion, config, dataset, progress):
            print(
                f"epoch {metrics.epoch}/{config.epochs}"
                f"  train loss {metrics.train_loss:.4f}"
                f"  test loss {metrics.test_loss:.4f}"
                f"  test accuracy {metrics.test_accuracy:.2f} %"
                f"  {metrics.samples_per_second:,.0f} samples/s",
                flush=True,
            )
            run.record(metrics)
            if not math.isfinite(metrics.train_loss):
                print(
                    f"mnist-ext: error: the training loss is {metrics.train_loss} after epoch "
                    f"{metrics.epoch}; use a lower --lr",
                    file=sys.stderr,
                )
                return 1
            run.save_model(model, metrics.epoch)
    print(f"written to {run.path}")

    if config.target_accuracy is not None and metrics.test_accuracy < config.target_accuracy:
        print(
            f"mnist-ext: error: test accuracy {metrics.test_accuracy:.2f} % is below the target "
            f"of {config.target_accuracy:g} %",
            file=sys.stderr,
        )
        return 1
    return 0


def _print_header(config: TrainConfig, dataset: data.Dataset, model: nn.Module) -> None:
    widths = "-".join(str(width) for width in (784, *config.hidden, 10))
    parameters = sum(parameter.numel() for parameter in model.parameters())
    if config.impl == "torch":
        impl = f"torch {torch.__version__}"
    elif torch.device(config.device).type == "cuda":
        impl = f"ext {__version__}, CUDA kernels"
    else:
        impl = f"ext {__version__}, {build_info()['cpu_isa']} kernels"
    optimizer = f"SGD, learning rate {config.lr:g}"
    if config.scheduler != "none":
        optimizer += f" ({config.scheduler})"
    if config.momentum:
        optimizer += f", {'Nesterov ' if config.nesterov else ''}momentum {config.momentum:g}"
    if config.weight_decay:
        optimizer += f", weight decay {config.weight_decay:g}"
    print(
        f"dataset    {dataset.name}: {len(dataset.train):,} training and {len(dataset.test):,} "
        f"test images from {dataset.source}\n"
        f"model      {widths}, activation {config.activation}, {parameters:,} parameters\n"
        f"optimizer  {optimizer}, batch size {config.batch_size}, seed {config.seed}\n"
        f"impl       {impl}, device {config.device}, {torch.get_num_threads()} CPU threads",
        flush=True,
    )


def _progress_bar(batches: Iterable[Batch], epoch: int, steps: int) -> Iterable[Batch]:
    # Gone when the epoch is over: its line takes the place.
    return tqdm(batches, f"epoch {epoch}", total=steps, unit="batch", leave=False)


def _environment(command: str) -> dict[str, Any]:
    return {
        "command": command,
        "threads": torch.get_num_threads(),
        "torchvision": torchvision.__version__,
        "numpy": np.__version__,
        "build": build_info(),
    }


def _doctor(as_json: bool) -> int:
    build_state = build_info()
    data_state = {name: _data_state(name) for name in ("mnist", "fashion-mnist")}
    if as_json:
        print(json.dumps({**build_state, "data": data_state}, indent=2))
        return 0
    cuda = ", ".join(build_state["cuda"]) if build_state["cuda"] else "not built"
    rows = {
        "mnist_ext": build_state["version"],
        "PyTorch": f"{build_state['torch']}, built with {build_state['torch_built_with']}",
        "Python": build_state["python"],
        "platform": build_state["platform"],
        "CPU kernels": f"{build_state['cpu_isa']}: {build_state['cpu_isa_reason']}",
        "available": ", ".join(build_state["cpu_isa_available"]),
        "threads": str(build_state["openmp_threads"]),
        "OpenMP": ", ".join(build_state["openmp_runtimes"]),
        "CUDA kernels": f"{cuda}: {build_state['cuda_reason']}",
    }
    for name, state in data_state.items():
        rows[name] = state["problem"] or state["folder"] or "not found; 'train' would download it"
    rows["digits"] = "part of the package"
    rows["next step"] = build_state["next_step"] or "mnist-ext train"
    for label, value in rows.items():
        print(f"{label:<14} {value}")
    return 0


def _data_state(name: str) -> dict[str, str | None]:
    try:
        folder = data.find(name)
    except UserError as error:
        return {"folder": None, "problem": str(error)}
    return {"folder": None if folder is None else str(folder), "problem": None}


class _Parser(argparse.ArgumentParser):
    """Reports wrong use like every other mistake: in one line."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} (see '{self.prog} --help')")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="mnist-ext",
        description="Train a small network on MNIST with hand-written PyTorch operators.",
        epilog="example: mnist-ext train --recipe best",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"mnist-ext {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    doctor = commands.add_parser(
        "doctor",
        help="show what was built, what is in use and why",
        description="Show what was built, what is in use and why, and what to do next.",
        epilog="example: mnist-ext doctor --json",
        allow_abbrev=False,
    )
    doctor.add_argument("--json", action="store_true", help="print JSON instead of a table")

    train_parser = commands.add_parser(
        "train",
        help="train a model and write it to a new folder",
        description="Train a model and write it, its settings and its metrics to a new folder.",
        epilog="example: mnist-ext train --recipe best --epochs 8 --target-accuracy 98",
        # An option that is not given is absent from the result, so that it does not override
        # the recipe.
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
    )
    _add_train_options(train_parser)
    return parser


def _add_train_options(parser: argparse.ArgumentParser) -> None:
    default = TrainConfig()

    def recipe_default(name: str) -> str:
        tutorial, best = RECIPES["tutorial"][name], RECIPES["best"][name]
        return f"(default: {tutorial}; recipe best: {best})"

    positive = _integer(1, _LARGEST_INT)
    add = parser.add_argument
    add(
        "--recipe",
        choices=RECIPES,
        help=f"settings to start from; the options below override them (default: {default.recipe})",
    )
    add(
        "--dataset",
        choices=data.DATASETS,
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
        type=_number(0, math.inf),
        metavar="X",
        help=f"learning rate; its peak with --scheduler onecycle {recipe_default('lr')}",
    )
    add(
        "--momentum",
        type=_number(0, 1),
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
        type=_number(0, math.inf),
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
        type=_widths,
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
        help="run many training steps per native call (mnist_ext.TrainStep); only with --impl ext",
    )
    add("--device", metavar="DEVICE", help=f"cpu, cuda or cuda:N (default: {default.device})")
    add(
        "--seed",
        type=_integer(0, _LARGEST_INT),
        metavar="N",
        help="determines the initial weights and the order of the images "
        f"(default: {default.seed})",
    )
    add(
        "--threads",
        type=_integer(1, _MOST_THREADS),
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
        type=_folder_name,
        help="name of the run's folder; a number is appended where it is taken (default: time, "
        "data set and implementation)",
    )
    add(
        "--target-accuracy",
        type=_number(0, 100),
        metavar="PERCENT",
        help="exit with code 1 when the final test accuracy is below this (default: none)",
    )


def _train_config(args: argparse.Namespace) -> TrainConfig:
    given = vars(args).copy()
    del given["command"]
    recipe = given.get("recipe", TrainConfig.recipe)
    config = TrainConfig(**{**RECIPES[recipe], **given})
    if config.nesterov and config.momentum == 0:
        raise UserError("--nesterov needs a --momentum above 0; add one or --no-nesterov")
    if config.one_call and config.impl != "ext":
        raise UserError("--one-call needs --impl ext; leave it out")
    return config


def _integer(low: int, high: int) -> Callable[[str], int]:
    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = low - 1
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number {low} to {high}")
        return value

    return parse


def _number(low: float, high: float) -> Callable[[str], float]:
    limits = f"of at least {low}" if high == math.inf else f"from {low} to {high}"

    def parse(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not (math.isfinite(value) and low <= value <= high):
            raise argparse.ArgumentTypeError(f"{text!r} is not a number {limits}")
        return value

    return parse


def _widths(text: str) -> tuple[int, ...]:
    try:
        widths = tuple(int(part) for part in text.split(","))
    except ValueError:
        widths = ()
    if not widths or not all(1 <= width <= _LARGEST_INT for width in widths):
        raise argparse.ArgumentTypeError(
            f"{text!r} is not a list of positive whole numbers such as 128,64"
        )
    return widths


def _folder_name(text: str) -> str:
    if text in ("", ".", "..") or Path(text).name != text:
        raise argparse.ArgumentTypeError(f"{text!r} is not a folder name; see --output-dir")
    return text
