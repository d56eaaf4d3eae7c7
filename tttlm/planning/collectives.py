"""The collectives in one execution of a compiled program, counted from its text (HLO).

A collective in the body of a loop counts once per iteration; the text has the trip count in the loop's annotation or in
its condition.
"""

import math
import re
from collections import Counter
from dataclasses import dataclass, field

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "ragged-all-to-all", "collective-permute")

_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) .*\{$")
_INSTRUCTION = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = (.*)$")
_COLLECTIVE = re.compile(rf" ({'|'.join(KINDS)})(-start)?\(([^)]*)\)")
_CALLED = re.compile(r"(?:calls|to_apply|body|true_computation|false_computation)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"(?:branch_computations|called_computations)=\{([^}]*)\}")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"')
_ALONE = re.compile(r"replica_groups=(\{\{\d+\}|\[\d+,1\])")  # groups of one device, without communication
_SHAPE = re.compile(r"([a-z]\w*)\[([\d,]*)\]")


@dataclass(frozen=True)
class Collective:
    """All collectives of one kind in one execution of a program.

    Attributes:
        kind: one of `KINDS`.
        count: number of collectives that each device takes part in.
        bytes: total bytes that one device receives or sends, whichever is more.
    """

    kind: str
    count: int
    bytes: int


@dataclass
class _Computation:
    """One named list of instructions."""

    shapes: dict[str, str] = field(default_factory=dict)  # from an instruction to its type
    constants: dict[str, int] = field(default_factory=dict)
    own: list[tuple[str, int]] = field(default_factory=list)  # kind and bytes of its collectives
    chained: list[tuple[str, int]] = field(default_factory=list)  # the same, of those that are part of a chain
    starts: bool = False  # whether it begins a chain
    calls: list[tuple[str, str]] = field(default_factory=list)  # (callee, line of the loop if it is a loop body)
    root: str = ""

    @property
    def collectives(self) -> list[tuple[str, int]]:
        """An asynchronous collective of a TPU is a chain of fusions that all name it: the first one counts."""
        return self.own + (self.chained if self.starts else [])


def collectives(hlo: str) -> tuple[list[Collective], bool]:
    """The collectives of one execution of a program, from its compiled text; all branches of a conditional are counted.

    Returns:
        One entry for each kind that occurs, and whether the trip count of every loop around a collective is known. A
        loop with an unknown count counts as one iteration.
    """
    computations, entry = _read(hlo)
    counts: Counter[str] = Counter()
    sizes: Counter[str] = Counter()
    all_known = True

    def visit(name: str, times: int) -> bool:
        """Counts the collectives of a computation, `times` executions of it; returns whether it has any."""
        nonlocal all_known
        here = computations.get(name, _Computation())
        for kind, size in here.collectives:
            counts[kind] += times
            sizes[kind] += times * size
        any_collective = bool(here.collectives)
        for callee, loop in here.calls:
            turns = _turns(loop, computations) if loop else 1
            inside = visit(callee, times * (turns or 1))
            all_known &= turns is not None or not inside
            any_collective |= inside
        return any_collective

    visit(entry, 1)
    return [Collective(kind, counts[kind], sizes[kind]) for kind in KINDS if counts[kind]], all_known


def _read(hlo: str) -> tuple[dict[str, _Computation], str]:
    computations: dict[str, _Computation] = {}
    entry = ""
    here = _Computation()
    for line in hlo.splitlines():
        if opening := _COMPUTATION.match(line):
            here = computations[opening[2]] = _Computation()
            if opening[1]:
                entry = opening[2]
        elif instruction := _INSTRUCTION.match(line):
            _note(here, *instruction.groups())
    return computations, entry


def _note(here: _Computation, root: str | None, name: str, text: str) -> None:
    if root:
        here.root = text
    here.shapes[name] = text
    if constant := re.search(r"\]\S* constant\((\d+)\)", text):
        here.constants[name] = int(constant[1])
    if (match := _COLLECTIVE.search(text)) and not _ALONE.search(text):
        kind, start, operands = match.groups()
        given = sum(_bytes(here.shapes.get(operand, "")) for operand in re.findall(r"%([\w.\-]+)", operands))
        received = _bytes(text) - (given if start and kind != "all-reduce" else 0)
        (here.chained if "chain_id=" in text else here.own).append((kind, max(given, received)))
    here.starts |= '"AsyncCollectiveStart"' in text
    loop = text if " while(" in text else ""
    callees = _CALLED.findall(text) + [
        callee for branches in _BRANCHES.findall(text) for callee in re.findall(r"[\w.\-]+", branches)
    ]
    here.calls += [(callee, loop) for callee in callees]


def _turns(loop: str, computations: dict[str, _Computation]) -> int | None:
    """The trip count of a loop; None if neither its annotation nor a condition `counter < constant` has it."""
    if annotated := _TRIPS.search(loop):
        return int(annotated[1])
    named = re.search(r"condition=%?([\w.\-]+)", loop)
    condition = computations.get(named[1]) if named else None
    if condition is None or "direction=LT" not in condition.root:
        return None
    operands = re.search(r" compare\(([^)]*)\)", condition.root)
    limits = [condition.constants.get(name) for name in re.findall(r"%([\w.\-]+)", operands[1] if operands else "")]
    return limits[1] if len(limits) == 2 else None


def _bytes(text: str) -> int:
    """Bytes of an instruction's result, from the shapes before its operation; the sum for a tuple."""
    operation = re.search(r" [a-z][\w\-]*\(", text)
    shapes = _SHAPE.findall(text[: operation.start()] if operation else text)
    return sum(_bits(kind) * math.prod(int(dim) for dim in dims.split(",") if dim) for kind, dims in shapes) // 8


def _bits(kind: str) -> int:
    """Bits of one element: the number in the type's name, as in bf16."""
    if kind == "pred":
        return 8
    named = re.search(r"\d+", kind)
    return int(named[0]) if named else 0
