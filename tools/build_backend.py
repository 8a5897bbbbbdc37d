"""The build backend: setuptools', which also asks for a CUDA compiler where one is wanted.

pip calls this after it has installed what pyproject.toml requires, so that torch can be asked: a
CPU-only torch must not bring a CUDA compiler along, and an installed toolkit makes one needless.
"""

import cuda_toolkit
from setuptools import build_meta
from setuptools.build_meta import *  # noqa: F403  (the hooks that stay as they are)


def _compiler() -> list[str]:
    import torch

    build, _ = cuda_toolkit.wanted(torch.version.cuda)
    if not build or cuda_toolkit.find(torch.version.cuda):
        return []
    return cuda_toolkit.requirements(torch.version.cuda)


def get_requires_for_build_wheel(config_settings=None):
    """Add the compiler to what setuptools asks for."""
    return [*build_meta.get_requires_for_build_wheel(config_settings), *_compiler()]


def get_requires_for_build_editable(config_settings=None):
    """Add the compiler to what setuptools asks for."""
    return [*build_meta.get_requires_for_build_editable(config_settings), *_compiler()]
