"""Fused linear and softmax cross-entropy for PyTorch, with hand-written kernels.

``functional`` holds the ops, ``nn`` the modules and ``swap``, which puts them into a model of
yours. ``build_info`` says what was built and what is in use.
"""

from mnist_ext import _library

_library.load()

from mnist_ext import functional, nn  # noqa: E402  (the library registers the ops they call)
from mnist_ext._build_info import build_info  # noqa: E402
from mnist_ext._version import __version__  # noqa: E402

__all__ = ["__version__", "build_info", "functional", "nn"]
