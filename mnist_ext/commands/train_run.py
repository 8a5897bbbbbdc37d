"""What ``mnist-ext train`` does, once its options are known."""

import math
import sys
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
import torchvision
from torch import nn
from tqdm import tqdm

from mnist_ext import __version__, build_info, data
from mnist_ext.runs import Run
from mnist_ext.settings import TrainConfig
from mnist_ext.training import Batch, build, select_device, train


def run_training(config: TrainConfig, command: str) -> int:
    """Train and return the exit code."""
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
