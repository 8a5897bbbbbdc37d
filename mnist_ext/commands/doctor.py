"""``mnist-ext doctor``: what was built, what is in use and why, and what to do next."""

import argparse
import json

from mnist_ext import build_info
from mnist_ext.errors import UserError


def add_parser(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the command and its options."""
    parser = commands.add_parser(
        "doctor",
        help="show what was built, what is in use and why",
        description="Show what was built, what is in use and why, and what to do next.",
        epilog="example: mnist-ext doctor --json",
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Print the report."""
    build_state = build_info()
    data_state = {name: _data_state(name) for name in ("mnist", "fashion-mnist")}
    if args.json:
        print(json.dumps({**build_state, "data": data_state}, indent=2))
        return 0
    cuda = ", ".join(build_state["cuda"]) if build_state["cuda"] else "not built"
    rows = {
        "mnist_ext": build_state["version"],
        "PyTorch": f"{build_state['torch']}, built with {build_state['torch_built_with']}",
        "Python": build_state["python"],
        "platform": build_state["platform"],
        "CPU kernels": f"{build_state['cpu_isa']}: {build_state['cpu_isa_reason']}",
        "available": ", ".join(build_state["cpu_isa_available"]),
        "threads": str(build_state["openmp_threads"]),
        "OpenMP": ", ".join(build_state["openmp_runtimes"]),
        "CUDA kernels": f"{cuda}: {build_state['cuda_reason']}",
    }
    for name, state in data_state.items():
        rows[name] = state["problem"] or state["folder"] or "not found; 'train' would download it"
    rows["digits"] = "part of the package"
    rows["next step"] = build_state["next_step"] or "mnist-ext train"
    for label, value in rows.items():
        print(f"{label:<14} {value}")
    return 0


def _data_state(name: str) -> dict[str, str | None]:
    from mnist_ext import data

    try:
        folder = data.find(name)
    except UserError as error:
        return {"folder": None, "problem": str(error)}
    return {"folder": None if folder is None else str(folder), "problem": None}
