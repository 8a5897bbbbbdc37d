"""A checkpoint: tensors and JSON values in one safetensors file, never pickle.

The values are the entry ``state`` of the file's metadata; ``sha256`` there is over both, so that
damage is noticed wherever it is.
"""

import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from mnist_ext.app import UserError
from mnist_ext.app.files.writing import replace_file

FILE_NAME = "checkpoint.safetensors"
FORMAT = "mnist_ext checkpoint 1"

# The tensors, and the values that JSON can hold.
Saved = tuple[dict[str, Tensor], dict[str, Any]]


def write(path: Path, tensors: dict[str, Tensor], values: dict[str, Any]) -> None:
    """Replace the checkpoint ``path``; it is whole at every moment.

    Args:
        path: the file.
        tensors: on any device.
        values: what JSON can hold.

    Raises:
        OSError: the file cannot be written; it is as it was then.
    """
    tensors = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
    state = json.dumps(values)
    metadata = {"format": FORMAT, "state": state, "sha256": _digest(tensors, state)}
    replace_file(path, to_bytes(tensors, metadata))


@contextmanager
def opened(path: Path) -> Iterator[Any]:
    """Open a safetensors file of any name; the library itself takes names in UTF-8 only.

    Raises:
        OSError: it cannot be opened.
        SafetensorError: it is no such file.
    """
    with path.open("rb") as file:
        try:
            name = os.fsencode(path).decode()
        except UnicodeDecodeError:
            name = f"/dev/fd/{file.fileno()}"
        with safe_open(name, "pt") as tensors:
            yield tensors


def to_bytes(tensors: dict[str, Tensor], metadata: dict[str, str]) -> bytes:
    """Return a safetensors file, always the same one for the same content.

    The library writes the metadata in an order that differs from process to process.

    Args:
        tensors: contiguous, on the CPU.
        metadata: texts by name.
    """
    content = save(tensors, metadata)
    end = 8 + int.from_bytes(content[:8], "little")
    header = json.dumps(json.loads(content[8:end]), sort_keys=True, separators=(",", ":")).encode()
    # The tensors that follow begin at a multiple of 8.
    header += b" " * (-len(header) % 8)
    return len(header).to_bytes(8, "little") + header + content[end:]


def read(path: Path) -> Saved:
    """Return the tensors, on the CPU, and the values of a checkpoint.

    Raises:
        UserError: there is no such file, it is damaged, or it is no checkpoint.
    """
    try:
        with opened(path) as file:
            metadata = file.metadata() or {}
            # The file is mapped into memory; a copy outlives it.
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
    except FileNotFoundError:
        raise UserError(
            f"{path.parent} has no {path.name}: it is not the folder of a run"
        ) from None
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error
    except SafetensorError as error:
        raise UserError(f"{path} is damaged or no safetensors file ({error})") from error
    if metadata.get("format") != FORMAT:
        raise UserError(f"{path} is not a checkpoint of this version of mnist_ext ({FORMAT})")
    state = metadata.get("state", "")
    if metadata.get("sha256") != _digest(tensors, state):
        raise UserError(f"{path} is damaged: its content does not match its checksum")
    values: dict[str, Any] = json.loads(state)
    return tensors, values


def _digest(tensors: dict[str, Tensor], state: str) -> str:
    digest = hashlib.sha256(state.encode())
    for name, value in sorted(tensors.items()):
        digest.update(f"{name} {value.dtype} {list(value.shape)}".encode())
        digest.update(value.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
