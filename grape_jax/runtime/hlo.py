"""Costs of a compiled TPU program on one chip: FLOPs, transfers and estimated cycles.

XLA's own `cost_analysis` counts the body of a loop once, but a policy is a loop over layers inside
a loop over tokens. Here the optimised HLO text is walked from its entry, and the body of a loop
counts once for each iteration. A loop that may end early counts up to its bound.
"""

import collections
import dataclasses
import math
import re
from typing import NamedTuple

COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
# A ring all-reduce sends every byte twice: to sum, and to distribute the sum.
PASSES = collections.defaultdict(lambda: 1, {"all-reduce": 2})
Shape = tuple[str, tuple[int, ...]]  # dtype and sizes
BYTES = {"pred": 1, "s4": 0.5, "u4": 0.5, "bf16": 2, "f16": 2, "c64": 8, "c128": 16}

_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%(\S+) = (\(.*?\)|\S+) ([\w-]+)\((.*)$")
_COMPUTATION = re.compile(r"^(ENTRY )?%(\S+) \(")
_SHAPE = re.compile(r"(\w+)\[([\d,]*)\]")
_CALLED = re.compile(r"(?:calls|to_apply|body)=%([^\s,})]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")


@dataclasses.dataclass(frozen=True)
class Work:
    """Costs on one chip in one run of the program."""

    flops: float  # of matrix products
    cycles: float  # estimated by the compiler, without transfers between chips
    collectives: dict[str, tuple[int, float]]  # kind to number of runs and bytes of results

    @property
    def link_bytes(self) -> float:
        """Bytes sent over a chip's links by ring collectives."""
        return sum(PASSES[kind] * size for kind, (_, size) in self.collectives.items())


@dataclasses.dataclass(frozen=True)
class _Instruction:
    name: str
    shapes: list[Shape]  # several for a tuple
    opcode: str
    rest: str  # operands and attributes


def work(text: str, inside: str = "") -> Work:
    """Costs of a TPU program.

    Args:
      text: `compiled.as_text()`.
      inside: counts only operations traced under this name, such as "target_ranks"; "" counts all.
    """
    entry, computations = _parse(text)
    flops = cycles = 0.0
    runs: dict[str, int] = collections.Counter()
    sizes: dict[str, float] = collections.defaultdict(float)
    channels: set[str] = set()

    def walk(name: str, times: int) -> None:
        nonlocal flops, cycles
        shapes = {i.name: i.shapes for i in computations[name]}
        for i in computations[name]:
            loop = times * _length(computations, name, i) if i.opcode == "while" else times
            # The scalar function of a reduction is not counted.
            if i.opcode in ("fusion", "while", "call", "conditional") or "async" in i.opcode:
                for called in _called(i):
                    walk(called, loop)
            if inside not in i.rest:
                continue
            if i.opcode in ("convolution", "dot"):
                flops += times * _product_flops(i, shapes)
            if found := re.search(r'"estimated_cycles":"(\d+)"', i.rest):
                cycles += times * int(found[1])
            kind = i.opcode.removesuffix("-start")
            channel = re.search(r"channel_id=(\d+)", i.rest)
            # A collective that is split into steps appears in each of them, with one channel.
            if kind in COLLECTIVES and (channel is None or channel[1] not in channels):
                if channel is not None:
                    channels.add(channel[1])
                if "all-reduce-scatter" in name:
                    kind = "reduce-scatter"
                runs[kind] += times
                sizes[kind] += times * _result_bytes(i)

    walk(entry, 1)
    return Work(flops, cycles, {kind: (runs[kind], sizes[kind]) for kind in sorted(runs)})


Computations = dict[str, list[_Instruction]]


def _parse(text: str) -> tuple[str, Computations]:
    """The name of the entry, and the instructions of every computation."""
    computations: Computations = {}
    entry = ""
    for line in text.splitlines():
        if head := _COMPUTATION.match(line):
            current = computations.setdefault(head[2], [])
            entry = head[2] if head[1] else entry
        elif found := _INSTRUCTION.match(line):
            name, result, opcode, rest = found.groups()
            current.append(_Instruction(name, _shapes(result), opcode, rest))
    return entry, computations


def _shapes(text: str) -> list[Shape]:
    return [(d, tuple(int(n) for n in sizes.split(",") if n)) for d, sizes in _SHAPE.findall(text)]


def _called(instruction: _Instruction) -> list[str]:
    branches = _BRANCHES.search(instruction.rest)
    listed = re.findall(r"%([^\s,]+)", branches[1]) if branches else []
    return _CALLED.findall(instruction.rest) + listed


def _length(computations: Computations, name: str, loop: _Instruction) -> int:
    """The largest number of iterations of a loop in the computation `name`."""
    return _bound(computations, loop) - _start(computations[name], loop)


def _start(around: list[_Instruction], loop: _Instruction) -> int:
    """The initial value of a loop's counter, its first carried value; 0 if it is not a constant."""
    by_name = {i.name: i for i in around}
    found = by_name.get(_operands(loop)[0])
    while found and found.opcode in ("tuple", "copy"):
        found = by_name.get(_operands(found)[0])
    return int(found.rest.split(")")[0]) if found and found.opcode == "constant" else 0


def _bound(computations: Computations, loop: _Instruction) -> int:
    """The exclusive upper bound of a loop's counter."""
    condition = computations[_group(r"condition=%([^\s,})]+)", loop.rest)]
    reached = condition + [i for c in condition for name in _called(c) for i in computations[name]]
    numbers = {
        i.name: int(i.rest.split(")")[0])
        for i in reached
        if i.opcode == "constant" and i.shapes in ([("s32", ())], [("u32", ())])
    }
    compared = [i for i in reached if i.opcode == "compare" and "direction=LT" in i.rest]
    bounds = [numbers[name] for i in compared for name in _operands(i) if name in numbers]
    # In a fusion the bound may be a parameter, and the constant is in the condition itself.
    return max(bounds or [numbers[i.name] for i in condition if i.name in numbers], default=1)


def _operands(instruction: _Instruction) -> list[str]:
    return re.findall(r"%([^\s,)]+)", instruction.rest.split(")")[0])


def _result_bytes(instruction: _Instruction) -> float:
    sizes = [_bytes(dtype) * math.prod(shape) for dtype, shape in instruction.shapes]
    # The result of an asynchronous start includes its operand.
    return max(sizes) if instruction.opcode.endswith("-start") else sum(sizes)


def _bytes(dtype: str) -> float:
    return BYTES.get(dtype) or int(_group(r"(\d+)", dtype)) / 8


def _product_flops(instruction: _Instruction, shapes: dict[str, list[Shape]]) -> float:
    """FLOPs of a matrix product: two for each multiplication of numbers.

    The TPU compiler writes matrix products as convolutions. Batch axes become spatial axes, dilated
    so far that different batch entries never overlap.
    """
    left, right = (shapes[name][0][1] for name in _operands(instruction)[:2])
    result = instruction.shapes[0][1]
    if instruction.opcode == "dot":
        summed = _group(r"lhs_contracting_dims=\{([\d,]*)\}", instruction.rest)
        return 2 * math.prod(result) * math.prod(left[int(n)] for n in summed.split(",") if n)
    labels = _group(r"dim_labels=(\w+_\w+->\w+)", instruction.rest)
    left_labels, right_labels, result_labels = re.split("_|->", labels)
    window = re.search(r"window=\{([^}]*)\}", instruction.rest)
    overlaps = 1  # pairs of an output position and a kernel position that meet an input
    for axis, one in enumerate(_window(window[1] if window else None)):
        length = left[left_labels.index(str(axis))]
        overlaps *= sum(
            0 <= position <= (length - 1) * one.input_dilation
            and position % one.input_dilation == 0
            for output in range(result[result_labels.index(str(axis))])
            for k in range(one.size)
            for position in [output * one.stride + k * one.kernel_dilation - one.padding]
        )
    batch, features = (result[result_labels.index(label)] for label in "bf")
    return 2 * batch * features * right[right_labels.index("i")] * overlaps


class _Window(NamedTuple):
    """One spatial axis of a convolution."""

    size: int
    stride: int
    padding: int  # before the input
    input_dilation: int
    kernel_dilation: int


def _window(text: str | None) -> list[_Window]:
    """The spatial axes of a convolution's `window` attribute."""
    if not text:
        return []
    fields = dict(part.split("=") for part in text.split())
    count = len(fields["size"].split("x"))
    each = lambda key, default: [
        int(value.split("_")[0])
        for value in fields.get(key, "x".join([default] * count)).split("x")
    ]
    columns = each("size", ""), each("stride", "1"), each("pad", "0_0")
    dilations = each("lhs_dilate", "1"), each("rhs_dilate", "1")
    return [_Window(*axis) for axis in zip(*columns, *dilations, strict=True)]


def _group(pattern: str, text: str) -> str:
    """The first group of a pattern that must occur in the text."""
    found = re.search(pattern, text)
    if found is None:
        raise ValueError(f"{pattern} does not occur in {text}")
    return found[1]
