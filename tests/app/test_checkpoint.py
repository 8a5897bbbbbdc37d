"""Checkpoints: what is read is what was written, or one line says why not; also after kill -9."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from run_folders import names_in
from safetensors import safe_open
from safetensors.torch import save_file

from mnist_ext.app import UserError
from mnist_ext.app.files import writing
from mnist_ext.app.runs import checkpoint

TENSORS = {
    "model.weight": torch.arange(6, dtype=torch.float32).view(2, 3),
    "rng": torch.arange(256).to(torch.uint8),
    "double": torch.tensor(1 / 3, dtype=torch.float64),
}
VALUES = {"epoch": 3, "loss_sum": 0.1 + 0.2, "settings": {"hidden": [128, 64], "name": None}}


@pytest.fixture
def path(tmp_path) -> Path:
    (tmp_path / "run").mkdir()
    path = tmp_path / "run" / checkpoint.FILE_NAME
    checkpoint.write(path, TENSORS, VALUES)
    return path


def test_what_is_read_is_what_was_written(path):
    tensors, values = checkpoint.read(path)
    assert values == VALUES
    assert tensors.keys() == TENSORS.keys()
    for name, value in tensors.items():
        assert value.dtype == TENSORS[name].dtype
        assert torch.equal(value, TENSORS[name])
    assert names_in(path.parent) == [path.name]


def test_the_same_content_gives_the_same_bytes(path):
    """Metadata too are in one order; the library's changes from file to file."""
    metadata = {name: name for name in ("hidden", "activation", "dataset", "mean", "std", "epoch")}
    tensors = {name: TENSORS[name] for name in reversed(TENSORS)}
    files = {checkpoint.to_bytes(t, metadata) for t in (TENSORS, tensors) for _ in range(4)}
    assert len(files) == 1
    path.write_bytes(files.pop())
    with safe_open(path, "pt") as file:
        assert file.metadata() == metadata
        for name, value in TENSORS.items():
            assert torch.equal(file.get_tensor(name), value)


def test_every_damaged_byte_is_noticed(path):
    content = path.read_bytes()
    for position in (*range(0, 8), *range(8, len(content), 7), len(content) - 1):
        damaged = bytearray(content)
        damaged[position] ^= 0x10
        path.write_bytes(damaged)
        with pytest.raises(UserError):
            checkpoint.read(path)
    for size in (0, 1, 7, 8, 9, 100, len(content) - 1):
        path.write_bytes(content[:size])
        with pytest.raises(UserError, match="damaged"):
            checkpoint.read(path)


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (lambda path: None, f"has no {checkpoint.FILE_NAME}"),
        (lambda path: torch.save(TENSORS, path), "no safetensors file"),
        (lambda path: save_file(TENSORS, path), "is not a checkpoint"),
        (Path.mkdir, f"{checkpoint.FILE_NAME}: Is a directory"),
    ],
)
def test_foreign_files(tmp_path, write, message):
    path = tmp_path / checkpoint.FILE_NAME
    write(path)
    with pytest.raises(UserError, match=message):
        checkpoint.read(path)


def test_of_two_writers_at_once_the_last_one_counts(path, monkeypatch):
    rename = os.replace
    order = []

    def slow(source, target):
        order.append(source)
        if len(order) == 1:
            writing.replace_file(path, b"second")
        rename(source, target)

    monkeypatch.setattr(os, "replace", slow)
    writing.replace_file(path, b"first")
    assert path.read_bytes() == b"first"
    assert names_in(path.parent) == [path.name]


def test_a_write_that_fails_leaves_the_file_as_it_was(path, monkeypatch):
    before = path.read_bytes()

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(writing.os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        checkpoint.write(path, TENSORS, {})
    assert path.read_bytes() == before
    assert names_in(path.parent) == [path.name]


def test_file_and_folder_are_synced_before_and_after_the_rename(path, monkeypatch):
    calls = []
    replace = writing.os.replace
    monkeypatch.setattr(writing.os, "fsync", lambda descriptor: calls.append("sync"))
    monkeypatch.setattr(
        writing.os, "replace", lambda *paths: (calls.append("rename"), replace(*paths))
    )
    checkpoint.write(path, TENSORS, VALUES)
    assert calls == ["sync", "rename", "sync"]


# Each child writes checkpoints without a pause, each of one number all over, and reports which one
# is complete, until it is killed at a moment of its own. One import serves all of them.
KILLER = """
import os
import sys
import time
from pathlib import Path
import torch
from mnist_ext.app.files import writing
from mnist_ext.app.runs import checkpoint

path, n = Path(sys.argv[1]), 0
for round in range(25):
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        # A killed process loses nothing that the system has; a busy disk would take minutes.
        writing.os.fsync = lambda descriptor: None
        while True:
            n += 1
            tensors = {"a": torch.full((100_000,), n), "b": torch.full((3,), n)}
            checkpoint.write(path, tensors, {"n": n})
            os.write(write, b"%d " % n)
    os.close(write)
    with os.fdopen(read) as written:
        started = written.read(1)
        # Moments spread over the time that some checkpoints take.
        time.sleep(round * 0.0006)
        os.kill(child, 9)
        os.waitpid(child, 0)
        complete = (started + written.read()).split()
    tensors, values = checkpoint.read(path)
    n = values["n"]
    assert n >= int(complete[-1]), (n, complete)
    assert all((t == n).all() for t in tensors.values()), n
print("whole", flush=True)
"""


def test_kill_at_any_moment_leaves_the_last_good_one(path):
    result = subprocess.run(
        [sys.executable, "-c", KILLER, str(path)],
        capture_output=True,
        text=True,
        timeout=100,
        # A process whose parent has used several threads may not use any itself.
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert result.stdout == "whole\n", result.stderr
