"""What is measured: shapes from a TOML file, the passes of each op, and the work that each cannot do without."""

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from memformer_kernels.backend import OPS

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10
    import tomli as tomllib

DEFAULT = Path(__file__).with_name("ops.toml")

FORWARD = "forward"  # in inference: nothing requires a gradient
SAVING = "forward (saving)"  # in training: with what the backward needs
NO_BIAS = "forward without bias"  # in inference, no forgetting
BACKWARD = "backward"
PASSES = {
    "memory_read": (FORWARD, SAVING, BACKWARD),
    "memory_write": (FORWARD, NO_BIAS, SAVING, BACKWARD),
    "memory_forget": (FORWARD, SAVING, BACKWARD),
}


@dataclass(frozen=True)
class Shape:
    """Sizes of one call. `memory_forget` has no tokens, and counts as one head of width D = C."""

    op: str
    group: str
    B: int
    M: int
    D: int
    H: int = 1
    L: int = 0

    @property
    def name(self) -> str:
        if self.op == "memory_forget":
            return f"B{self.B} M{self.M} C{self.D}"
        return f"B{self.B} L{self.L} M{self.M} H{self.H} D{self.D}"


@dataclass(frozen=True)
class Work:
    """What a pass cannot do without.

    bytes: every input read once and every output written once. The output of the forward counts as an input of the
        backward of an attention, whose softmax gradient is usually taken from it.
    least_bytes: without that output, which a kernel can do without by computing the attention again.
    flop: of the matrix products: two forward (scores, values), five backward.
    """

    bytes: int
    least_bytes: int
    flop: int


def work(shape: Shape, which: str, element: int) -> Work:
    """The work of pass `which`, with elements of `element` bytes; what a training forward saves is not counted."""
    B, L, M, H, D = shape.B, shape.L, shape.M, shape.H, shape.D
    tokens, slots, bias, product = B * H * L * D, B * H * M * D, M * H * D, 2 * B * H * L * M * D
    backward = which == BACKWARD
    output = 0
    if shape.op == "memory_read":
        output = tokens if backward else 0
        elements = 3 * tokens + 4 * slots if backward else 2 * tokens + 2 * slots
    elif shape.op == "memory_write":
        output = slots if backward else 0
        elements = 4 * tokens + 7 * slots + 2 * bias if backward else 2 * tokens + 4 * slots + bias
        if which == NO_BIAS:
            elements -= bias
    else:
        elements = 3 * slots + 2 * bias if backward else 2 * slots + bias
    flop = product * (5 if backward else 2)
    return Work((elements + output) * element, elements * element, flop)


@dataclass(frozen=True)
class Rates:
    """Ceilings of a machine: bytes a second that a copy moves, and FLOP a second of a matrix product by dtype."""

    copy: float
    matmul: dict[str, float]

    def floor(self, work: Work, dtype: torch.dtype) -> dict[str, float | str]:
        """Least milliseconds, which ceiling sets them, and the same without the output that a backward may skip."""
        compute = 1e3 * work.flop / self.matmul[str(dtype).removeprefix("torch.")]
        memory, least_memory = (1e3 * n / self.copy for n in (work.bytes, work.least_bytes))
        return {
            "floor_ms": max(memory, compute),
            "bound": "memory" if memory >= compute else "compute",
            "floor_without_output_ms": max(least_memory, compute),
        }


@dataclass(frozen=True)
class Suite:
    shapes: tuple[Shape, ...]
    rates: Rates
    temperature: float
    overhead: dict[str, int]

    def overhead_shape(self, op: str) -> Shape:
        sizes = dict(self.overhead)
        if op == "memory_forget":
            sizes = {"B": sizes["B"], "M": sizes["M"], "D": sizes["H"] * sizes["D"]}
        return Shape(op, "overhead", **sizes)

    def of_shapes(self, texts: Iterable[str]) -> "Suite":
        """This suite with shapes of the caller's in the place of its own."""
        return replace(self, shapes=own_shapes("bench", OPS, texts))

    def select(self, op: str = "", which: str = "", only: str = "") -> list[tuple[Shape, tuple[str, ...]]]:
        """Shapes and their passes whose names contain these texts; in the order of the file."""
        found = []
        for s in self.shapes:
            passes = tuple(p for p in PASSES[s.op] if which in p)
            if op in s.op and only in s.name and passes:
                found.append((s, passes))
        if not found:
            raise ValueError(
                f"bench: nothing in the suite has op {op!r}, pass {which!r} and shape {only!r} in its names; "
                f"ops: {', '.join(OPS)}; passes: {', '.join(PASSES['memory_write'])}; "
                f"a shape is named like {self.shapes[0].name}"
            )
        return found


def load(path: Path | None = None) -> Suite:
    """Reads a suite; a ValueError that names the file and the place says what is wrong with it."""
    path = path or DEFAULT
    try:
        content = tomllib.loads(path.read_text())
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"bench: {path} cannot be read as TOML: {error}") from None
    try:
        rates = Rates(float(content["rates"]["copy"]), {k: float(v) for k, v in content["rates"]["matmul"].items()})
        shapes = tuple(
            _shape(op, group, sizes) for op in OPS for group, some in content.get(op, {}).items() for sizes in some
        )
        suite = Suite(shapes, rates, float(content["temperature"]), content["overhead"])
        for op in OPS:
            suite.overhead_shape(op)
    except KeyError as error:
        raise ValueError(f"bench: {path} lacks {error}") from None
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"bench: {path}: {error}") from None
    if not shapes:
        raise ValueError(f"bench: {path} names no shape of {', '.join(OPS)}")
    return suite


def _shape(op: str, group: str, sizes: dict[str, int]) -> Shape:
    expected = "BMC" if op == "memory_forget" else "BLMHD"
    valid = set(sizes) == set(expected) and all(type(n) is int and n > 0 for n in sizes.values())
    if not valid:
        raise ValueError(f"a shape of {op} must have {', '.join(expected)}, each a whole number above 0, got {sizes}")
    sizes = {("D" if k == "C" else k): n for k, n in sizes.items()}
    return Shape(op, group, **sizes)


def own_shapes(command: str, ops: Iterable[str], texts: Iterable[str]) -> tuple[Shape, ...]:
    """For each op and text, such as "B=8 H=8 M=128 L=4096 D=64", in any order, a shape; the text is its group.

    `memory_forget` takes C = H * D channels and no tokens.
    """
    sizes = {}
    for text in texts:
        named = re.findall(r"([A-Z])\s*=\s*(\d+)", text)
        left = re.sub(r"[A-Z]\s*=\s*\d+|[\s,]", "", text)
        if left or sorted(name for name, _ in named) != sorted("BLMHD") or "0" in {str(int(n)) for _, n in named}:
            raise ValueError(
                f'{command}: --shape must name B, H, M, L and D, each a whole number above 0, as "B=8 H=8 M=128 L=4096 '
                f'D=64" does, got {text!r}'
            )
        sizes[text] = {name: int(n) for name, n in named}
    return tuple(_own_shape(op, text, some) for op in ops for text, some in sizes.items())


def _own_shape(op: str, group: str, sizes: dict[str, int]) -> Shape:
    if op == "memory_forget":
        return Shape(op, group, B=sizes["B"], M=sizes["M"], D=sizes["H"] * sizes["D"])
    return Shape(op, group, **sizes)


def geometric_mean(values: list[float]) -> float:
    return math.exp(sum(map(math.log, values)) / len(values))
