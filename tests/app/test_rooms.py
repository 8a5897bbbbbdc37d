"""The library stands without the application, which stands on the library's public names."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import mnist_ext

APP = Path(mnist_ext.__file__).parent / "app"
# A room imports from itself and from those before it.
ROOMS = ("files", "data", "training", "runs", "report", "bench", "cli")


def names_imported(file: Path) -> Iterator[str]:
    """Yield what a file imports of the package: `app.data.idx_files`, `optim`, ..."""
    for node in ast.walk(ast.parse(file.read_text())):
        names = []
        if isinstance(node, ast.ImportFrom):
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        yield from (n.removeprefix("mnist_ext.") for n in names if n.startswith("mnist_ext."))


@pytest.mark.parametrize(
    "file", sorted(APP.rglob("*.py")), ids=lambda f: f"{f.parent.name}-{f.stem}"
)
def test_imports_point_downwards_and_to_public_names(file):
    room = file.relative_to(APP).parts[0]
    below = [f"app.{r}" for r in ROOMS[: ROOMS.index(room) + 1]] if room in ROOMS else []
    for name in names_imported(file):
        part = ".".join(name.split(".")[:2])
        public = name == "__version__" or not name.startswith(("_", "app."))
        assert public or name == "app.UserError" or part in below, name
