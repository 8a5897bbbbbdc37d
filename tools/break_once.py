"""Break the code once and see whether a test notices.

    python tools/break_once.py FILE OLD NEW TEST [TEST ...]

Replaces the text OLD by NEW in FILE, in a copy of the checkout, builds there if FILE is C++, and
runs the tests. Exit code 0: a test failed, as it should. 1: none did.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def main() -> int:
    """Copy, break, build, test."""
    parser = argparse.ArgumentParser(description="See whether a test notices a fault.")
    for name in ("file", "old", "new"):
        parser.add_argument(name)
    parser.add_argument("tests", nargs="+", metavar="test", help="a file or a test, as for pytest")
    args = parser.parse_args()

    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "copy"
        patterns = shutil.ignore_patterns(".git", ".venv*", ".*_cache", "__pycache__")

        def ignored(path: str, names: list[str]) -> set[str]:
            return patterns(path, names) | ({"runs"} if Path(path) == ROOT else set())

        shutil.copytree(ROOT, copy, ignore=ignored)
        broken = copy / args.file
        text = broken.read_text()
        if args.old not in text:
            parser.error(f"{args.file} does not contain {args.old!r}")
        broken.write_text(text.replace(args.old, args.new))
        if broken.suffix in (".h", ".cpp"):
            build = [sys.executable, "setup.py", "build_ext", "--inplace"]
            subprocess.run(build, cwd=copy, check=True, stdout=subprocess.DEVNULL)
        # First on the path: the copy, not the checkout that may be installed in place.
        environment = {**os.environ, "PYTHONPATH": str(copy)}
        pytest = [sys.executable, "-m", "pytest", "-q", "-x", "--tb=line", *args.tests]
        code = subprocess.run(pytest, cwd=copy, env=environment).returncode
    print("noticed" if code == 1 else "NOT NOTICED" if code == 0 else f"pytest ended with {code}")
    return 0 if code == 1 else 1


if __name__ == "__main__":
    sys.exit(main())
