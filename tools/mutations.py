"""Small faults for csrc: what tools/mutants.py puts into a file, one at a time."""

import hashlib
import re
from collections import Counter
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
    # how work is cut up; which of two ways is the faster one; other matters of speed alone
    r"constexpr .*\bk\w*(?:Grain|Bytes|Blocks?|From|Threads|Together|Chunk|Splits|Band|Stages)\b",
    r"constexpr .*\bk(?:Strip\w*|SumChain|SummedRows|LongK|Piece\w|DotK|ShortRow\w*|Fetches\w*)\b",
    r"constexpr .*\bk(?:Least|FewestRows|Small\w*|Largest\w*)\b",
    r"\bgrain|cached_bytes|most_bytes|prefetch|madvise|\.reserve\(|alignas|__launch_bounds__",
    r"flops_per_byte|\b(?:by|of)_(?:rows|classes|most|cached) =",
    r"const double (?:weight|kept|again)\b",
    r"static_assert|cpu_supports|SYS_arch_prctl",  # not at run time; of another machine
    r"\bfail<|\bfail\(|\bthrow ",  # what a message says
    r"uses_fragments\(product\)",  # else the same by another kernel
    r"planes\.pairs\[i - 1\]",  # else a tile is loaded that is there
}
EXEMPT_FUNCTIONS = {  # the same: all that they choose from keeps the contract
    "advise_huge_pages",
    "column_block",
    "detect",
    "has_amx",
    "is_aliased",
    "is_better_transposed",
    "multiply_adds",
    "one_block_is_enough",
    "pays_to_pack_a",
    "pays_to_pack_b",
    "prefetch_rows",
    "processors",
    "row_threads",
    "strip_width",
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
    name: str  # the same wherever the line is moved to


def _name(file: str, text: str, match: re.Match[str], new: str, kind: str) -> str:
    start = text.rindex("\n", 0, match.start()) + 1
    line = text[start : text.index("\n", match.start())].strip()
    change = f"{text[match.start() : match.end()].strip()} -> {new.strip()}"
    return f"{file}: {kind} at {match.start() - start} | {line} | {change}"


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
    names: Counter[str] = Counter()
    for path in files:
        text = path.read_text()
        code = _code_of(text)
        file = path.relative_to(ROOT).as_posix()
        for kind, pairs in KINDS.items():
            for old, new in pairs:
                for match in re.finditer(old, code):
                    to = match.expand(new)
                    name = _name(file, text, match, to, kind)
                    names[name] += 1
                    name += f" #{names[name]}" if names[name] > 1 else ""
                    mutation = Mutation(file, *match.span(), to, kind, name)
                    found.setdefault(kind, []).append(mutation)
    return found


def drawn(seed: int) -> Iterator[Mutation]:
    """Draw in turn from the CPU's, CUDA's and what both share, from each kind in turn.

    By a hash of the names, so that a change of csrc leaves the others in their order.
    """
    suffixes = (".h", ".cpp", ".cuh", ".cu")
    files = sorted(path for path in (ROOT / "csrc").rglob("*") if path.suffix in suffixes)
    left = []
    for folders in (("cpu",), ("cuda",), ("api", "ops", "programs")):
        kinds = _all_of([p for p in files if p.relative_to(ROOT / "csrc").parts[0] in folders])
        for mutations in kinds.values():
            mutations.sort(key=lambda m: hashlib.sha256(f"{seed} {m.name}".encode()).digest())
        left.append(kinds)
    while any(any(kinds.values()) for kinds in left):
        for kind in KINDS:
            for kinds in left:
                if kinds.get(kind):
                    yield kinds[kind].pop()
