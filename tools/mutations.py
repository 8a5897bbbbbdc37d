"""Small faults for csrc: what tools/mutants.py puts into a file, one at a time."""

import random
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

# Text to look for and what to put there, by the kind of the fault. clang-format has put one space
# on either side of each operator with two operands.
MINIMUM = r"(?=[^;?\n]*\?)"  # a < b ? a : b, which is the same with <=
NOT_MINIMUM = r"(?![^;?\n]*\?)"
TERM = r"[\w.]+(?:->\w+)*(?:\[\w+\]|\([^()]*\))?"
CALL = r"\([^;{\n]*\);"
KEYWORD = r"(?:return|break|using|else|case|delete)"
BARRIER = r"(?:__sync\w+|__threadfence|\w+_(?:fence|wait\w*|commit\w*)(?:<[^;>\n]*>)?)"

KINDS: dict[str, list[tuple[str, str]]] = {
    "comparison": [
        (rf" < {NOT_MINIMUM}", " <= "),
        (" <= ", " < "),
        (rf" > {NOT_MINIMUM}", " >= "),
        (" >= ", " > "),
        (rf" < {MINIMUM}", " > "),
        (rf" > {MINIMUM}", " < "),
    ],
    "equality": [(" == ", " != "), (" != ", " == ")],
    "logic": [
        (" && ", " || "),
        (r" \|\| ", " && "),
        (r"\bif \(([^();]+)\)", r"if (!(\1))"),
    ],
    "arithmetic": [
        (r" \+ ", " - "),
        (" - ", " + "),
        (r" \* ", " + "),
        (" / ", " * "),
        (" % ", " / "),
    ],
    "update": [
        (r" \+= ", " -= "),
        (r" \+= ", " = "),
        (r" \*= ", " = "),
        (r"\bmin\(", "max("),
        (r"\bmax\(", "min("),
    ],
    "constant": [(r"(?<![\w.])(\d+)(?![\w.'])", r"(\1 + 1)"), (r"(?<![\w.])(\d+\.\d+)", r"1\1")],
    "flag": [(r"\btrue\b", "false"), (r"\bfalse\b", "true")],
    "index": [
        (
            r"(?<=[\w\])])\[(?!(?:\w+::)*k[A-Z]\w*\])([^\[\]&=\n]*[a-z_][^\[\]&=\n]*)\]",
            r"[\1 + 1]",
        )
    ],
    "stride": [(r"(?<= \* )([\w.]*(?:stride|pitch|\bld\w+))\b(?!\()", r"(\1 + 1)")],
    "mask": [
        (r"(?<=, )(lanes|rest|last|size|valid_bytes)\)", r"\1 - 1)"),
        (r"(?<=[ (!])(\w*(?:mask\w*|\.data)) \?", r"!\1 ?"),
    ],
    "term": [(rf" [+-] {TERM}", ""), (rf" [*/] {TERM}", "")],
    "barrier": [(rf"(?<= )(?:{BARRIER}|[\w.\[\]]+\.(?:wait|arrive)){CALL}", ";")],
    "statement": [
        (
            rf"(?<=\n)( +)(?!{KEYWORD}|{BARRIER})[\w.>\[\]-]+(?:<\w+>)?"
            r"(?: [-+*/|&]?= [^;{}\n]+|\([^;{}\n]*\));",
            r"\1;",
        )
    ],
}

# Lines with a fault that no test need notice, and why.
EXEMPT_LINES = {
    # how work is cut up; which of two ways is the faster one
    r"constexpr .*\bk\w*(?:Grain|Bytes|Blocks?|From|Threads|Together|Chunk|Splits|Band|Stages)\b",
    r"constexpr .*\bk(?:Strip\w*|SumChain|SummedRows|LongK|Piece\w|DotK|ShortRow\w*|Fetches\w*)\b",
    r"constexpr .*\bk(?:Least|FewestRows|Small\w*|Largest\w*)\b",
    r"\bgrain|cached_bytes|most_bytes|prefetch|madvise|alignas|__launch_bounds__",  # speed alone
    r"static_assert|cpu_supports|SYS_arch_prctl",  # not at run time; of another machine
    r"\bfail<|\bfail\(|\bthrow ",  # what a message says
}
EXEMPT_FUNCTIONS = {  # the same: all that they choose from keeps the contract
    "advise_huge_pages",
    "detect",
    "has_amx",
    "is_better_transposed",
    "multiply_adds",
    "prefetch_rows",
    "processors",
    "row_threads",
    "threads_for",
    "use_amx",
    "use_dot_products",
}
NOT_CODE = r"//[^\n]*|\"(?:\\.|[^\"\\\n])*\"|'(?:\\.|[^'\\\n])'|^ *#(?:[^\n]*\\\n)*[^\n]*"


@dataclass(frozen=True)
class Mutation:
    """The text at [begin, end) of a file, and what replaces it."""

    file: str
    begin: int
    end: int
    new: str
    kind: str

    def __str__(self) -> str:
        text = (ROOT / self.file).read_text()
        number = text.count("\n", 0, self.begin) + 1
        start = text.rindex("\n", 0, self.begin) + 1
        line = text[start : text.index("\n", self.begin)].strip()
        change = f"{text[self.begin : self.end].strip()} -> {self.new.strip()}"
        return f"{self.file}:{number}:{self.begin - start} {self.kind} | {line} | {change}"


def _blank(match: re.Match[str]) -> str:
    """Return as many spaces, so that what follows stays where it is."""
    return re.sub(r"[^\n]", " ", match[0])


def _code_of(text: str) -> str:
    """Blank all in which no fault is put."""
    text = re.sub(NOT_CODE, _blank, text, flags=re.M)
    text = re.sub("|".join(rf"[^\n]*(?:{line})[^\n]*" for line in EXEMPT_LINES), _blank, text)
    functions = rf"^[\w ].*\b(?:{'|'.join(EXEMPT_FUNCTIONS)})\([^;]*?\{{\n.*?^\}}"
    return re.sub(functions, _blank, text, flags=re.M | re.S)


def _all_of(files: list[Path]) -> dict[str, list[Mutation]]:
    found: dict[str, list[Mutation]] = {}
    for path in files:
        code = _code_of(path.read_text())
        for kind, pairs in KINDS.items():
            for old, new in pairs:
                for match in re.finditer(old, code):
                    file = path.relative_to(ROOT).as_posix()
                    mutation = Mutation(file, *match.span(), match.expand(new), kind)
                    found.setdefault(kind, []).append(mutation)
    return found


def drawn(seed: int) -> Iterator[Mutation]:
    """Draw in turn from the CPU's, CUDA's and what both share: a random kind, then a place."""
    choose = random.Random(seed)
    suffixes = (".h", ".cpp", ".cuh", ".cu")
    files = sorted(path for path in (ROOT / "csrc").rglob("*") if path.suffix in suffixes)
    parts = [
        _all_of([path for path in files if path.relative_to(ROOT / "csrc").parts[0] in folders])
        for folders in (("cpu",), ("cuda",), ("api", "ops", "programs"))
    ]
    while any(parts):
        for part in filter(None, parts):
            kind = choose.choice(sorted(part))
            yield part[kind].pop(choose.randrange(len(part[kind])))
            if not part[kind]:
                del part[kind]
