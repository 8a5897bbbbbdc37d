"""Several processes that train one model, started by torchrun."""

import os
import sys
from dataclasses import dataclass
from datetime import timedelta
from typing import NoReturn

import torch
import torch.distributed as dist
from torch import Tensor

from mnist_ext.app import UserError

# What one process waits for another before it gives up: a download, at worst.
_TIMEOUT = timedelta(minutes=5)


@dataclass(frozen=True)
class Processes:
    """The processes of a run.

    Attributes:
        rank: the number of this one, from 0.
        size: how many there are.
    """

    rank: int = 0
    size: int = 1

    def sum(self, value: Tensor) -> None:
        """Replace ``value`` by its sum over the processes."""
        if self.size > 1:
            dist.all_reduce(value)


ALONE = Processes()


def from_environment() -> Processes:
    """Return what torchrun, or another launcher that sets the same variables, has started.

    Raises:
        UserError: the variables make no sense.
    """
    values = {name: os.environ.get(name, "") for name in ("RANK", "WORLD_SIZE")}
    if values["WORLD_SIZE"] in ("", "1"):
        return ALONE
    try:
        processes = Processes(int(values["RANK"]), int(values["WORLD_SIZE"]))
    except ValueError:
        raise UserError(
            f"RANK={values['RANK']!r} and WORLD_SIZE={values['WORLD_SIZE']!r} are not what a "
            "launcher sets; use torchrun, or unset both"
        ) from None
    return processes


def local_rank() -> int:
    """Return the number of this process on its machine."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def join(device: torch.device) -> None:
    """Wait for the other processes and form the group: nccl on CUDA, gloo on the CPU.

    Raises:
        UserError: the others cannot be met.
    """
    try:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=_TIMEOUT)
    except (ValueError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(
            f"cannot meet the other processes ({reason}); start with torchrun"
        ) from error


def default_threads() -> int | None:
    """Return this process's share of the cores, or None where OMP_NUM_THREADS says it."""
    if "OMP_NUM_THREADS" in os.environ:
        return None
    return max(1, len(os.sched_getaffinity(0)) // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


def is_lost_peer(error: RuntimeError) -> bool:
    """Return whether ``error`` says that another process could not be reached."""
    return isinstance(error, dist.DistError) or "gloo" in str(error)


def joined() -> bool:
    """Return whether this process belongs to a group."""
    return dist.is_available() and dist.is_initialized()


def leave(code: int) -> NoReturn:
    """End this process of a group with the exit code ``code``.

    Gloo's threads may outlive the group, and one that lets go of a tensor while the interpreter
    shuts down aborts the process, so that the interpreter is not shut down.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
