"""What the documentation points to exists."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SEMANTICS = (ROOT / "docs" / "semantics.md").read_text()


@pytest.mark.parametrize("test", sorted(set(re.findall(r"`(test_\w+\.py::[\w:]+)`", SEMANTICS))))
def test_tests_named_in_semantics_exist(test):
    file, *names = test.split("::")
    (path,) = (ROOT / "tests").rglob(file)
    source = path.read_text()
    for name in names:
        assert re.search(rf"^\s*(def|class) {name}\b", source, re.MULTILINE)


def test_every_behaviour_names_a_test():
    """But those for which the table says in bold, or in words, that there is nothing to test."""
    rows = [line for line in SEMANTICS.splitlines() if line.startswith("| ")]
    rows = [row for row in rows if not row.startswith(("| what", "| ---"))]
    without = [row for row in rows if ".py::" not in row]
    assert len(rows) > 40
    assert {row.split("|")[1].strip() for row in without} == {
        "calls on a few hundred logits",
        "a thousand parameters of 16 elements, against `fused=True`",
        "sums of two or three terms for a million outputs",
        "calls that take a few microseconds, without a gradient",
        "the same: what it costs",
        "one or two outputs, gradients over a million rows",
        "`torch.jit.script` (deprecated)",
        "GPUs that the kernels were not built for",
    }


@pytest.mark.parametrize(
    "file", ["README.md", "CONTRIBUTING.md", "docs/semantics.md", "docs/ladder.md"]
)
def test_links_between_files_lead_somewhere(file):
    text = (ROOT / file).read_text()
    links = [link for link in re.findall(r"\]\(([^)#]+)", text) if "://" not in link]
    assert links
    for link in links:
        assert ((ROOT / file).parent / link).exists(), link


def test_the_ladders_are_described_rung_by_rung():
    sources = sorted((ROOT / "benchmarks" / "ladder").glob("*.cpp"))
    rungs = {
        name for s in sources for name in re.findall(r"[(?:] ?\"([\w<>, ]+)\",? ", s.read_text())
    }
    text = (ROOT / "docs" / "ladder.md").read_text()
    measured = set(re.findall(r"^\| `(.+?)` \|", text, re.MULTILINE))
    explained = set(re.findall(r"^\d\. \*\*`(.+?)`\*\*", text, re.MULTILINE))
    assert len(measured) > 20
    assert measured == explained
    assert measured <= rungs
