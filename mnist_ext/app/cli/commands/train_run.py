"""What ``mnist-ext train`` does, once its options are known."""

import os
import shlex
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torchvision
from torch import Tensor, nn

from mnist_ext import __version__, build_info
from mnist_ext.app import UserError
from mnist_ext.app.cli.commands.train_config import resumed_config
from mnist_ext.app.cli.commands.train_output import Json, Lines, Output
from mnist_ext.app.cli.interrupts import StopRequest
from mnist_ext.app.cli.streams import print_message
from mnist_ext.app.data import datasets
from mnist_ext.app.files.folders import locked
from mnist_ext.app.files.writing import remove_partials
from mnist_ext.app.runs import checkpoint
from mnist_ext.app.runs.checkpoint import Saved
from mnist_ext.app.runs.run import REPLACED, Run, describe
from mnist_ext.app.training import distributed
from mnist_ext.app.training.distributed import Processes
from mnist_ext.app.training.settings import TrainConfig
from mnist_ext.app.training.trainer import (
    EpochMetrics,
    StepMetrics,
    Trainer,
    at_chance,
    build,
    select_device,
)


@dataclass(frozen=True)
class Request:
    """What is asked of ``run_training``.

    Attributes:
        config: the settings of a new run; None where one is resumed.
        resume: the folder of the run to resume.
        given: the settings given anew for it.
        dry_run: write nothing.
        tensorboard: write TensorBoard's files too.
        output: ``lines``, ``json`` or ``quiet``.
        command: the command, as text.
    """

    config: TrainConfig | None
    resume: Path | None
    given: dict[str, Any]
    dry_run: bool
    tensorboard: bool
    output: str
    command: str


def run_training(request: Request) -> int:
    """Train and return the exit code."""
    processes = distributed.from_environment()
    try:
        return _run(request, processes)
    except RuntimeError as error:
        if processes.size == 1 or not distributed.is_lost_peer(error):
            raise
        return _lost(processes, None, error, Output())


def _run(request: Request, processes: Processes) -> int:
    with ExitStack() as stack:
        saved: Saved | None = None
        config, first = request.config, processes.rank == 0
        if request.resume is not None:
            if first and (request.resume / checkpoint.FILE_NAME).is_file():
                _lock(request.resume, stack)
            saved = checkpoint.read(request.resume / checkpoint.FILE_NAME)
            config = resumed_config(saved[1], request.given)
        assert config is not None
        device = _device(config, processes)
        threads = config.threads
        if threads is None and processes.size > 1:
            threads = distributed.default_threads()
        if threads is not None:
            torch.set_num_threads(threads)
        writer_class = _summary_writer() if request.tensorboard else None
        dataset = _load(config, saved, processes, device)
        model, criterion = build(config, device)
        trainer = Trainer(model, criterion, config, dataset, processes)
        if saved is not None:
            _restore(trainer, saved, request.resume)

        run = None
        if first and not request.dry_run:
            run = stack.enter_context(_open_run(request, config, dataset, saved))
            if saved is None:
                _lock(run.path, stack)
                # What a process that is killed in the first epoch leaves to go on with.
                run.save_checkpoint(trainer, None, keep=False)
        output = _output(request.output if first else "quiet", config, trainer)
        stack.enter_context(output)
        facts = _facts(config, dataset, model, processes)
        if trainer.epoch or trainer.step:
            facts["resumed"] = f"{request.resume}, {_progress(trainer)}"
        output.start(facts, _details(config, dataset, run, trainer, processes))
        if trainer.epoch >= config.epochs:
            output.finished(_finished(request.resume, config, processes))
        writer = writer_class(run, trainer) if writer_class and run is not None else None
        metrics = _last_metrics(saved)
        with StopRequest() as stop:
            session = _Session(trainer, config, output, run, stop, writer, metrics, processes)
            code = session.train()
        if code is not None:
            return code
        assert session.metrics is not None
        output.end(session.metrics, None if run is None else run.path)
        if request.dry_run:
            return 0
        return _judge(session.metrics, config, dataset, output, processes)


def _lock(run: Path, stack: ExitStack) -> None:
    """Lock the run, and remove what killed processes left half written."""
    try:
        held = stack.enter_context(locked(run))
    except OSError as error:
        raise UserError(f"cannot write {error.filename}: {error.strerror}; mend that") from error
    if held:
        for name in REPLACED:
            remove_partials(run / name)


def _finished(run: Path | None, config: TrainConfig, processes: Processes) -> str:
    text = f"finished: all {config.epochs} epochs of {run} are done; "
    if run is None or config.scheduler != "none":
        return f"{text}its {config.scheduler} schedule ends there: train anew with more --epochs"
    command = resume_command(run, processes)
    return f"{text}for more: {command} --epochs {2 * config.epochs}"


def _judge(
    metrics: EpochMetrics,
    config: TrainConfig,
    dataset: datasets.Dataset,
    output: Output,
    processes: Processes,
) -> int:
    """Say what is to be said of the accuracy reached; return the exit code."""
    reached, target = metrics.test_accuracy, config.target_accuracy
    if note := at_chance(reached, dataset.test, config.limit_batches):
        output.note(note)
    if target is None or reached >= target:
        return 0
    if processes.rank == 0:
        output.print_message(
            f"error: test accuracy {reached:.2f} % is below the target of {target:g} %"
        )
    return 1


@dataclass
class _Session:
    """The epochs of a process, with what is written and printed at each."""

    trainer: Trainer
    config: TrainConfig
    output: Output
    run: Run | None
    stop: StopRequest
    writer: Any
    metrics: EpochMetrics | None
    processes: Processes

    def train(self) -> int | None:
        """Train to the end; return the exit code where it was not reached."""
        trainer = self.trainer
        while trainer.epoch < self.config.epochs:
            try:
                metrics = trainer.train_epoch(self._observe)
            except RuntimeError as error:
                if self.processes.size == 1 or not distributed.is_lost_peer(error):
                    raise
                fault = self._save()
                if self.stop.signal is not None:
                    return self._stopped(fault)
                return _lost(self.processes, self.run, error, self.output)
            if metrics is None:
                return self._stopped(self._save())
            if (code := self._record(metrics)) is not None:
                return code
            if self.stop.signal is not None:
                return self._stopped(None)
        return None

    def _observe(self, images: int, loss: Tensor, rows: list[StepMetrics]) -> bool:
        if self.run is not None:
            self.run.record_steps(rows)
        if self.writer is not None:
            for row in rows:
                self.writer.add_scalar("train/loss", row.loss, row.step)
                self.writer.add_scalar("train/lr", row.lr, row.step)
        self.output.steps(images, loss, rows)
        return self.stop.signal is not None

    def _record(self, metrics: EpochMetrics) -> int | None:
        fault = self.trainer.fault(metrics)
        self.metrics = metrics
        if self.run is not None:
            self.run.record(metrics)
            if fault is None:
                self.run.save_model(self.trainer.model, metrics.epoch)
                self.run.save_checkpoint(self.trainer, metrics)
        if self.writer is not None:
            step = metrics.epoch * self.trainer.steps_per_epoch
            for name in ("train_loss", "test_loss", "test_accuracy"):
                self.writer.add_scalar(f"epoch/{name}", getattr(metrics, name), step)
            self.writer.flush()
        self.output.epoch(metrics)
        if fault is None:
            return None
        if self.processes.rank == 0:
            self.output.print_message(
                f"error: the training diverged: {fault} after epoch {metrics.epoch}; use a lower "
                f"--lr{self._kept(metrics.epoch - 1)}"
            )
        return 1

    def _kept(self, epoch: int) -> str:
        if self.run is None or epoch == 0:
            return ""
        return f"; {self.run.path} keeps model and checkpoint of epoch {epoch}"

    def _save(self) -> str | None:
        """Save the state within an epoch; where it has diverged, leave that and say why."""
        fault = self.trainer.fault()
        if self.run is not None and fault is None:
            self.run.save_checkpoint(self.trainer, self.metrics)
        return fault

    def _stopped(self, fault: str | None) -> int:
        assert self.stop.signal is not None
        epoch = self.trainer.epoch + 1
        path = command = None
        if self.run is not None and fault is None:
            path = self.run.path
            if epoch <= self.config.epochs:
                command = resume_command(path, self.processes)
        self.output.stopped(epoch, path, command)
        if self.processes.rank == 0:
            text = _progress(self.trainer)
            if command is not None:
                text += f"; continue with: {command}"
            elif fault is not None:
                text += f"; the training had diverged: {fault}; use a lower --lr"
                text += self._kept(epoch - 1)
            elif path is not None:
                text += f", the last one; written to {path}"
            self.output.print_message(f"interrupted {text}")
        return 128 + self.stop.signal


def _progress(trainer: Trainer) -> str:
    if trainer.step:
        return f"after step {trainer.step} of epoch {trainer.epoch + 1}"
    return f"after epoch {trainer.epoch}"


def resume_command(path: Path, processes: Processes) -> str:
    """Return the command that continues the run in ``path``."""
    start = "mnist-ext"
    if processes.size > 1:
        start = f"torchrun --nproc-per-node={processes.size} -m mnist_ext"
    return f"{start} train --resume {shlex.quote(str(path))}"


def _lost(processes: Processes, run: Run | None, error: RuntimeError, output: Output) -> int:
    # Gloo's message begins with a line of its source and ends with advice.
    reason = str(error).splitlines()[0].split("] ", 1)[-1].split(". ", 1)[0]
    how = "" if run is None else f"; continue with: {resume_command(run.path, processes)}"
    output.print_message(
        f"error: process {processes.rank}: another process of the run is gone ({reason}){how}"
    )
    return 1


def _device(config: TrainConfig, processes: Processes) -> torch.device:
    name = config.device
    if processes.size > 1:
        if config.one_call:
            raise UserError(
                f"--one-call trains in one process, and there are {processes.size}; leave it out "
                "or start without torchrun"
            )
        if torch.device(name).type == "cuda" and name != "cuda":
            raise UserError(f"--device {name} with several processes: use --device cuda")
        if name == "cuda":
            name = f"cuda:{distributed.local_rank()}"
    device = select_device(name, config.impl)
    if processes.size > 1:
        if device.type == "cuda":
            torch.cuda.set_device(device)
        distributed.join(device)
    return device


def _load(
    config: TrainConfig,
    saved: Saved | None,
    processes: Processes,
    device: torch.device,
) -> datasets.Dataset:
    name = config.dataset if saved is None else saved[1]["dataset"]["name"]
    if processes.rank > 0:
        processes.sum(torch.zeros(1, device=device))  # the first one downloads
    dataset = datasets.load(name, config.data_dir)
    if processes.rank == 0:
        processes.sum(torch.zeros(1, device=device))
        if dataset.notice:
            print_message(f"note: {dataset.notice}")
    if saved is not None:
        before, now = saved[1]["dataset"], describe(dataset)
        for key in ("train_size", "test_size", "mean", "std"):
            if before[key] != now[key]:
                raise UserError(
                    f"the run was trained on other data: {key} of {name} was {before[key]}, and is "
                    f"{now[key]} in {dataset.source}"
                )
    return dataset


def _restore(trainer: Trainer, saved: Saved, path: Path | None) -> None:
    try:
        trainer.load_state(*saved)
    except (KeyError, RuntimeError, TypeError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"the checkpoint in {path} does not fit its settings ({reason})") from error


def _last_metrics(saved: Saved | None) -> EpochMetrics | None:
    if saved is None or saved[1]["metrics"] is None:
        return None
    return EpochMetrics(**saved[1]["metrics"])


def _open_run(
    request: Request,
    config: TrainConfig,
    dataset: datasets.Dataset,
    saved: Saved | None,
) -> Run:
    environment = _environment(request.command)
    if saved is None or request.resume is None:
        return Run(config, dataset, environment)
    return Run.reopen(request.resume, config, dataset, environment, saved[1]["log_sizes"])


def _output(kind: str, config: TrainConfig, trainer: Trainer) -> Output:
    if kind == "json":
        return Json()
    if kind == "quiet":
        return Output()
    done = trainer.epoch * trainer.images_per_epoch + trainer.step * config.batch_size
    return Lines(config.epochs, trainer.images_per_epoch, done)


def _summary_writer() -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise UserError(
            "--tensorboard needs tensorboard: pip install 'mnist-ext[tensorboard]'"
        ) from None

    def make(run: Run, trainer: Trainer) -> Any:
        done = trainer.epoch * trainer.steps_per_epoch + trainer.step
        return SummaryWriter(str(run.path / "tensorboard"), purge_step=done + 1)

    return make


def _facts(
    config: TrainConfig, dataset: datasets.Dataset, model: nn.Module, processes: Processes
) -> dict[str, str]:
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
    facts = {
        "dataset": f"{dataset.name}: {len(dataset.train):,} training and {len(dataset.test):,} "
        f"test images from {dataset.source}",
        "model": f"{widths}, activation {config.activation}, {parameters:,} parameters",
        "optimizer": f"{optimizer}, batch size {config.batch_size}, seed {config.seed}",
        "impl": f"{impl}, device {config.device}, {torch.get_num_threads()} CPU threads",
    }
    if processes.size > 1:
        facts["processes"] = (
            f"{processes.size}, which share each batch of {config.batch_size}; "
            f"{torch.get_num_threads()} CPU threads each (--threads, OMP_NUM_THREADS)"
        )
    return facts


def _details(
    config: TrainConfig,
    dataset: datasets.Dataset,
    run: Run | None,
    trainer: Trainer,
    processes: Processes,
) -> dict[str, Any]:
    return {
        "run": None if run is None else str(run.path),
        "settings": asdict(config),
        "dataset": describe(dataset),
        "epochs_done": trainer.epoch,
        "steps_done": trainer.step,
        "steps_per_epoch": trainer.steps_per_epoch,
        "processes": processes.size,
    }


def _environment(command: str) -> dict[str, Any]:
    return {
        "command": command,
        "processes": int(os.environ.get("WORLD_SIZE", "1")),
        "threads": torch.get_num_threads(),
        "torchvision": torchvision.__version__,
        "numpy": np.__version__,
        "build": build_info(),
    }
