"""What a compiled program says of itself: work, transfers and time on one chip, loops counted.

XLA's own `cost_analysis` counts the body of a loop once, whatever the loop's length; a policy is a
loop over layers inside a loop over tokens. Here the optimised HLO text is walked from its entry,
and what stands in a loop counts as often as the loop runs. A loop that may end early counts to its
bound.
"""

import collections
import dataclasses
import math
import re

COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
# A ring of all-reduce passes every byte twice: once to sum, once to spread.
PASSES = collections.defaultdict(lambda: 1, {"all-reduce": 2})
BYTES = {"pred": 1, "s4": 0.5, "u4": 0.5, "bf16": 2, "f16": 2, "c64": 8, "c128": 16}

_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%(\S+) = (\(.*?\)|\S+) ([\w-]+)\((.*)$")
_COMPUTATION = re.compile(r"^(ENTRY )?%(\S+) \(")
_SHAPE = re.compile(r"(\w+)\[([\d,]*)\]")
_CALLED = re.compile(r"(?:calls|to_apply|body)=%([^\s,})]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")


@dataclasses.dataclass(frozen=True)
class Work:
    """Of one chip, in one run of the program."""

    flops: float  # of matrix products
    cycles: float  # as the compiler estimates them, transfers between chips left out
    collectives: dict[str, tuple[int, float]]  # kind: how often it runs, bytes of its results

    @property
    def link_bytes(self) -> float:
        """Bytes that pass a chip's links, where they go round in rings."""
        return sum(PASSES[kind] * size for kind, (_, size) in self.collectives.items())


@dataclasses.dataclass(frozen=True)
class _Instruction:
    name: str
    shapes: list[tuple[str, tuple[int, ...]]]  # dtype and sizes, several for a tuple
    opcode: str
    rest: str  # operands and attributes


def work(text: str, inside: str = "") -> Work:
    """Reads `compiled.as_text()` of a TPU program.

    Args:
      inside: counts only what was traced under this name, such as "target_ranks"; "": everything.
    """
    entry, computations = _parse(text)
    flops = cycles = 0.0
    runs: dict[str, int] = collections.Counter()
    sizes: dict[str, float] = collections.Counter()
    channels = set()

    def walk(name: str, times: int) -> None:
        nonlocal flops, cycles
        known = {i.name: i.shapes for i in computations[name]}
        for i in computations[name]:
            loop = times * _length(computations, name, i) if i.opcode == "while" else times
            # A reduction's scalar function is no work of its own.
            if i.opcode in ("fusion", "while", "call", "conditional") or "async" in i.opcode:
                for called in _called(i):
                    walk(called, loop)
            if inside not in i.rest:
                continue
            if i.opcode in ("convolution", "dot"):
                flops += times * _product_flops(i, known)
            if found := re.search(r'"estimated_cycles":"(\d+)"', i.rest):
                cycles += times * int(found[1])
            kind = i.opcode.removesuffix("-start")
            channel = re.search(r"channel_id=(\d+)", i.rest)
            # One that is cut into steps shows up in each of them.
            if kind in COLLECTIVES and (channel is None or channel[1] not in channels):
                channels.add(channel and channel[1])
                if "all-reduce-scatter" in name:
                    kind = "reduce-scatter"
                runs[kind] += times
                sizes[kind] += times * _result_bytes(i)

    walk(entry, 1)
    return Work(flops, cycles, {kind: (runs[kind], sizes[kind]) for kind in sorted(runs)})


def _parse(text: str) -> tuple[str, dict[str, list[_Instruction]]]:
    """The entry's name, and the instructions of every computation."""
    computations: dict[str, list[_Instruction]] = {}
    entry = ""
    for line in text.splitlines():
        if head := _COMPUTATION.match(line):
            current = computations.setdefault(head[2], [])
            entry = head[2] if head[1] else entry
        elif found := _INSTRUCTION.match(line):
            name, result, opcode, rest = found.groups()
            current.append(_Instruction(name, _shapes(result), opcode, rest))
    return entry, computations


def _shapes(text: str) -> list[tuple[str, tuple[int, ...]]]:
    return [(d, tuple(int(n) for n in sizes.split(",") if n)) for d, sizes in _SHAPE.findall(text)]


def _called(instruction: _Instruction) -> list[str]:
    branches = _BRANCHES.search(instruction.rest)
    listed = re.findall(r"%([^\s,]+)", branches[1]) if branches else []
    return _CALLED.findall(instruction.rest) + listed


def _length(computations, where: str, loop: _Instruction) -> int:
    """How often a loop runs at most: from where its counter starts to what that stays below."""
    return _bound(computations, loop) - _start(computations[where], loop)


def _start(around: list[_Instruction], loop: _Instruction) -> int:
    """What the counter, which is the first thing that a loop carries, starts from; else 0."""
    known = {i.name: i for i in around}
    found = known.get(_operands(loop)[0])
    while found and found.opcode in ("tuple", "copy"):
        found = known.get(_operands(found)[0])
    return int(found.rest.split(")")[0]) if found and found.opcode == "constant" else 0


def _bound(computations, loop: _Instruction) -> int:
    """What a loop's counter stays below."""
    condition = computations[re.search(r"condition=%([^\s,})]+)", loop.rest)[1]]
    reached = condition + [i for c in condition for name in _called(c) for i in computations[name]]
    numbers = {
        i.name: int(i.rest.split(")")[0])
        for i in reached
        if i.opcode == "constant" and i.shapes in ([("s32", ())], [("u32", ())])
    }
    compared = [i for i in reached if i.opcode == "compare" and "direction=LT" in i.rest]
    bounds = [numbers[name] for i in compared for name in _operands(i) if name in numbers]
    # Inside a fusion the bound may be a parameter; then it stands in the condition itself.
    return max(bounds or [numbers[i.name] for i in condition if i.name in numbers], default=1)


def _operands(instruction: _Instruction) -> list[str]:
    return re.findall(r"%([^\s,)]+)", instruction.rest.split(")")[0])


def _result_bytes(instruction: _Instruction) -> float:
    sizes = [_bytes(dtype) * math.prod(shape) for dtype, shape in instruction.shapes]
    # What an asynchronous one gives holds its operand too.
    return max(sizes) if instruction.opcode.endswith("-start") else sum(sizes)


def _bytes(dtype: str) -> float:
    return BYTES.get(dtype) or int(re.search(r"\d+", dtype)[0]) / 8


def _product_flops(instruction: _Instruction, known) -> float:
    """Two for each product of numbers. The TPU compiler writes every matrix product as one
    convolution, batch axes as spatial axes that are spread so far that no two of them meet."""
    left, right = (known[name][0][1] for name in _operands(instruction)[:2])
    result = instruction.shapes[0][1]
    if instruction.opcode == "dot":
        summed = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", instruction.rest)[1]
        return 2 * math.prod(result) * math.prod(left[int(n)] for n in summed.split(",") if n)
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", instruction.rest)
    window = re.search(r"window=\{([^}]*)\}", instruction.rest)
    meetings = 1
    for axis, (size, stride, low, spread, apart) in enumerate(_window(window and window[1])):
        here = left[labels[1].index(str(axis))]
        meetings *= sum(
            0 <= place <= (here - 1) * spread and place % spread == 0
            for out in range(result[labels[3].index(str(axis))])
            for k in range(size)
            for place in [out * stride + k * apart - low]
        )
    batch, features = (result[labels[3].index(label)] for label in "bf")
    return 2 * batch * features * right[labels[2].index("i")] * meetings


def _window(text: str | None) -> list[tuple[int, int, int, int, int]]:
    """Size, stride, padding before, and how far input and kernel are spread, of each axis."""
    if not text:
        return []
    fields = dict(part.split("=") for part in text.split())
    sizes = [int(n) for n in fields["size"].split("x")]
    each = lambda key, default: fields.get(key, "x".join([default] * len(sizes))).split("x")
    lows = [int(pad.split("_")[0]) for pad in each("pad", "0_0")]
    numbers = ([int(n) for n in each(key, "1")] for key in ("stride", "lhs_dilate", "rhs_dilate"))
    strides, spreads, aparts = numbers
    return list(zip(sizes, strides, lows, spreads, aparts, strict=True))
