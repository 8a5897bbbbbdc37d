"""A hook of MkDocs: the site shows what the pages link to, wherever in the repository it is.

The README is the front page. A link to a file or folder outside docs/ becomes one to a page that
shows it: the site needs no other host, and `mkdocs build --strict` follows every link.
"""

import os
import re
import subprocess
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
LANGUAGES = {".h": "cpp", ".cpp": "cpp", ".cu": "cuda", ".cuh": "cuda", ".py": "python"}
NO_TEXT = {".npz", ".png", ".svg"}


def in_site(path: Path) -> str:
    """Return where the site has what is at path in the repository."""
    if path == Path("README.md"):
        return "index.md"
    if path.is_relative_to("docs"):
        return str(path.relative_to("docs"))
    if (ROOT / path).is_dir():
        return f"{path}/README.md"
    return str(path) if path.suffix == ".md" else f"{path}.md"


def page_of(path: Path, tracked: list[Path]) -> str:
    """Return the Markdown of a Markdown file, a folder (its README, or its list) or a source."""
    file = ROOT / path
    if file.is_dir() and not (file / "README.md").exists():
        inside = [
            entry.relative_to(path)
            for entry in tracked
            if entry.is_relative_to(path) and entry.suffix not in NO_TEXT
        ]
        return f"# {path}/\n\n" + "".join(f"- [{entry}]({entry})\n" for entry in inside)
    if file.is_dir() or path.suffix == ".md":
        return (file / "README.md" if file.is_dir() else file).read_text()
    code = f"````{LANGUAGES.get(path.suffix, 'text')}\n{file.read_text()}\n````\n"
    return f"---\nsearch:\n  exclude: true\n---\n# {path}\n\n{code}"


def on_files(files: Files, config: MkDocsConfig) -> None:
    """Add the README, the pages of docs/, and what they lead to."""
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    tracked = [Path(line) for line in listed.stdout.splitlines()]
    docs = [path for path in tracked if path.parent == Path("docs") and path.suffix == ".md"]
    waiting = [Path("README.md"), Path("CONTRIBUTING.md"), Path("CHANGELOG.md"), *docs]
    seen = set(waiting)
    while waiting:
        path = waiting.pop()
        folder = path if (ROOT / path).is_dir() else path.parent

        def in_the_site(link: re.Match, path: Path = path, folder: Path = folder) -> str:
            target = Path(os.path.normpath(folder / link[1]))
            if not (ROOT / target).exists():  # another host's, or none: then MkDocs says so
                return link[0]
            if target.suffix not in NO_TEXT and target not in seen:
                seen.add(target)
                waiting.append(target)
            return "](" + os.path.relpath(in_site(target), Path(in_site(path)).parent)

        text = page_of(path, tracked)
        if path.suffix == ".md" or folder == path:
            text = re.sub(r"\]\(([^)#\s]+)", in_the_site, text)
        if old := files.get_file_from_path(in_site(path)):
            files.remove(old)
        files.append(File.generated(config, in_site(path), content=text))
