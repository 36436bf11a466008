"""What the checks of the Triton backend share: calls of the registered ops, the float64 answer, bits, layouts."""

import importlib
import sys
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from memformer_kernels import backend as backends
from memformer_kernels import launch, testing
from memformer_kernels.testing import Case, Result, cotangent

sys.path.append(str(Path(__file__).parents[1]))  # what the tests on the CPU share
from layouts import LAYOUTS, contiguous, odd_offset  # noqa: E402, F401

OPS = ("memory_read", "memory_write", "memory_forget")
MASKS = {"memory_read": "slot_mask", "memory_write": "token_mask"}
UNIT_ROUNDOFF = {torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}


@dataclass(frozen=True)
class Check:
    """`function(device, *arguments)` returns figures for the report, or raises AssertionError."""

    name: str
    function: object
    arguments: tuple = ()
    gpu_only: bool = False
    cold: bool = False  # starts with an empty cache of compiled kernels
    group: str = ""  # checks of one group share a process, and with it their compiled kernels


def name_of(dtype):
    return str(dtype).removeprefix("torch.")


def dtypes(device):
    """The interpreter computes in float32 and float16 only."""
    return tuple(UNIT_ROUNDOFF) if device == "cuda" else (torch.float32, torch.float16)


def most_resident(dtype):
    """More slots than fit one tile, so that the kernels that go over several tiles run; of at most 128 channels."""
    return 40 if dtype == torch.float32 else 130


def registered(op):
    """The op as the Triton backend runs it, on any device."""
    backend = backends.implementation(op, "triton")
    if backend is None or isinstance(backend, str):
        raise RuntimeError(f"{op} has no Triton backend: {backend}")
    api, autograd = (importlib.import_module(f"memformer_kernels.ops.{op}.{room}") for room in ("api", "autograd"))
    return lambda **arguments: autograd.apply(*api.prepare(**arguments), "triton")


def run(case, grad=None):
    return testing.run(case, grad_output=grad, function=registered(case.op))


@contextmanager
def launches():
    """A list of the Triton kernels that are launched inside, by name."""
    names, run_one = [], launch.Launcher.__call__

    def named(self, *tensors):
        names.append(self.kernel.__name__)
        run_one(self, *tensors)

    launch.Launcher.__call__ = named
    try:
        yield names
    finally:
        launch.Launcher.__call__ = run_one


def infer(case):
    with torch.no_grad():
        return registered(case.op)(**case.tensors, **case.options)


def wide(tensor):
    return tensor.detach().double() if tensor.is_floating_point() else tensor


def answer(case, grad=None):
    """The definition in float64: on the CPU where that is quick, else on the device of the case."""
    grad = cotangent(case) if grad is None else grad
    work = case.tensors["slots" if case.op == "memory_forget" else "query"].numel()
    if case.op != "memory_forget":
        work *= case.tensors["key"].shape[2]
    if work <= 2**20:
        result = testing.oracle(case, grad)
        return Result(result.output.to(grad.device), {name: g.to(grad.device) for name, g in result.grads.items()})
    return testing.run(case.map(wide), "eager", grad.double())


def same_bits(a, b):
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(_bytes(a), _bytes(b))


def _bytes(tensor):
    return tensor.detach().contiguous().flatten().view(torch.uint8)


def differing(a, b, names=None):
    """Names of the tensors of two results that are not the same bit for bit; 0 is not -0, and a NaN is itself."""
    a, b = a.tensors(), b.tensors()
    return [name for name in names or a if not same_bits(a[name], b[name])]


def differing_in_layout(op, a, b):
    """The same where the two had their inputs laid out differently.

    A layout decides which lanes hold what, and so the order in which `memory_write` adds up the channels of a head and
    of a slot: its results may then differ by roundings. The other ops give the same bits.
    """
    names = differing(a, b)
    if op != "memory_write":
        return names
    a, b = a.tensors(), b.tensors()
    limit = {torch.float32: 1e-5, torch.float16: 2.0**-10, torch.bfloat16: 2.0**-7}  # of the largest value
    return [name for name in names if not testing.relative_error(a[name], b[name]) <= limit[a[name].dtype]]


def rows(case, part):
    """The rows `part` of the batch; what all rows share stays."""
    return Case(case.op, {n: t if n == "bias" else t[part] for n, t in case.tensors.items()}, case.options)
