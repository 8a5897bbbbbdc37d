"""PyTorch's private names: each exists, and each that is used is listed with its reason."""

import ast
import functools
from pathlib import Path

import pytest
import torch
from torch.utils import _device  # noqa: F401  (torch imports it late)

import mnist_ext
from mnist_ext import _torch_private
from mnist_ext._torch_private import NAMES

PACKAGE = Path(mnist_ext.__file__).parent
LIBRARY = [
    *(PACKAGE / f"{name}.py" for name in ("functional", "nn", "optim")),
    *PACKAGE.glob("_*.py"),
    *PACKAGE.glob("train_step/*.py"),
]
OUR_MODULES = {"_autograd", "_decision", "_fake", "_flops", "_library", "_torch_private", "_C"}


@functools.cache
def instances():
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)])
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1)
    optimizer.step()
    scheduler.step()
    return {
        "torch.nn.Module": torch.nn.Module(),
        "torch.Tensor": torch.zeros(1),
        "torch.optim.Optimizer": optimizer,
        "torch.optim.Optimizer.step": optimizer.step,
        "torch.compiler.assume_constant_result()": torch.compiler.assume_constant_result(lambda: 0),
    }


@pytest.mark.parametrize("name", NAMES)
def test_torch_still_has(name):
    owner, _, attribute = name.rpartition(".")
    if owner in instances():
        assert hasattr(instances()[owner], attribute), NAMES[name]
    else:
        _torch_private.find(name)


def test_a_name_that_torch_drops_is_named_on_import(monkeypatch):
    monkeypatch.delattr(torch._C, "_len_torch_function_stack")
    with pytest.raises(ImportError, match=r"has no torch\._C\._len_torch_function_stack, which"):
        _torch_private.find("torch._C._len_torch_function_stack")


def private_names(file: Path) -> set[str]:
    """Find the private names in a file, but for attributes of self and our own modules."""
    tree = ast.parse(file.read_text())
    imported = {
        alias.name
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("torch")
        for alias in node.names
    }
    attributes = {
        node.attr
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute)
        and not (isinstance(node.value, ast.Name) and node.value.id in ("self", "step"))
    }
    names = {name for name in imported | attributes if name.startswith("_")}
    return {name for name in names if not name.startswith("__")} - OUR_MODULES


@pytest.mark.parametrize("file", LIBRARY, ids=lambda path: path.stem)
def test_private_names_are_listed(file):
    listed = {part for name in NAMES for part in name.split(".")} | {"_ZN2at12hasCallbacksEv"}
    assert private_names(file) <= listed
