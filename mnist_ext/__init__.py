"""Fused linear and softmax cross-entropy for PyTorch, with hand-written kernels.

``functional`` holds the ops, ``nn`` the modules and ``swap``, which puts them into a model of
yours, ``optim`` an SGD with one native call per step, ``TrainStep`` a whole training step in one.
``build_info`` says what was built and what is in use.
"""

from mnist_ext import _library

_library.load()

# The library registers the ops that these call.
from mnist_ext import functional, nn, optim  # noqa: E402
from mnist_ext._build_info import build_info  # noqa: E402
from mnist_ext._version import __version__  # noqa: E402
from mnist_ext.train_step import TrainStep  # noqa: E402

__all__ = ["TrainStep", "__version__", "build_info", "functional", "nn", "optim"]
