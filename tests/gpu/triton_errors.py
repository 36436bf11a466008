"""What is refused on a GPU, in which words, and that nothing has run by then (G14)."""

import math
import re
import warnings
from contextlib import contextmanager

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from triton_calls import MASKS, OPS, Check, differing, launches, registered

import memformer_kernels
from memformer_kernels import backend as backends
from memformer_kernels import testing
from memformer_kernels.testing import make_case


class _Operations(TorchDispatchMode):
    def __init__(self, seen):
        super().__init__()
        self.seen = seen

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.seen.append(str(function))
        return function(*args, **(kwargs or {}))


@contextmanager
def watched():
    """A list of what runs inside: PyTorch's operations, ours among them, and launches of Triton kernels."""
    with launches() as seen, _Operations(seen):
        yield seen


def refused(call, kind, form, where):
    """`call()` raises `kind` in the form of the contract, and nothing runs before."""
    with watched() as seen:
        try:
            call()
        except kind as error:
            assert re.match(form, str(error)), f"{where}: {error}"
        else:
            raise AssertionError(f"{where} is taken")
    assert not seen, f"{where}: before its error ran {seen}"


NUMBERS = {
    "memory_read": ("scale",),
    "memory_write": ("scale", "temperature", "eps"),
    "memory_forget": ("eps",),
}


def wrong_arguments(op, tensors):
    """`(error, what is wrong, changed arguments)`; of every tensor its rank, its sizes, its dtype."""
    for name, tensor in tensors.items():
        longer = torch.cat([tensor, tensor[..., -1:]], -1)
        if name in MASKS.values():
            yield TypeError, f"{name} of numbers", {name: tensor.float()}
        else:
            yield TypeError, f"{name} of integers", {name: tensor.long()}
            if (op, name) != ("memory_forget", "slots"):  # with it goes a bias in float32
                yield TypeError, f"{name} of another dtype", {name: tensor.double()}
        yield ValueError, f"{name} without a dimension", {name: tensor[0]}
        yield ValueError, f"{name} with an entry more", {name: longer}
        yield TypeError, f"{name} as a list", {name: tensor.tolist()}
    for name in NUMBERS[op]:
        yield ValueError, f"{name} of 0", {name: 0}
        yield ValueError, f"{name} of nan", {name: math.nan}
        yield TypeError, f"{name} as text", {name: "1"}
    yield ValueError, "a backend that is not", {"backend": "fast"}


def check_errors(device, op):
    """Wrong arguments, a backend that cannot run, a second derivative: each raises, and nothing ran."""
    function = getattr(memformer_kernels, op)
    case = make_case(op, device=device, masked=0.3, batch=2, heads=2, tokens=5, slots=3, width=16)
    with watched() as seen:
        first = testing.run(case)
    assert seen, "a call that runs is not seen"
    count = 0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for kind, what, change in wrong_arguments(op, case.tensors):
            arguments = {**case.tensors, **change}
            refused(lambda: function(**arguments), kind, rf"{op}: \w+ must .+, got .+", what)  # noqa: B023
            count += 1

    wide = make_case(op, device=device, batch=1, dtype=torch.float64)
    form = rf"{op}: backend '(triton|cuda)' cannot run this call: .+"
    for backend in backends.FUSED:
        refused(lambda: function(**wide.tensors, backend=backend), NotImplementedError, form, f"{backend} in float64")  # noqa: B023
        count += 1

    leaves = case.map(lambda t: t.clone().requires_grad_(t.is_floating_point()))
    output = registered(op)(**leaves.tensors).sum()
    name = next(iter(leaves.tensors))
    kernels = []
    try:
        with watched() as kernels:
            torch.autograd.grad(output, leaves.tensors[name], create_graph=True)
    except NotImplementedError as error:
        assert "the fused backward has no derivative of its own" in str(error), error
    else:
        raise AssertionError("a second derivative is taken")
    wrong = [kernel for kernel in kernels if op in kernel]
    assert not wrong, f"before a second derivative was refused ran {wrong}"

    again = testing.run(case)
    assert not differing(again, first), f"after all errors: {differing(again, first)}"
    return {"figures": {f"calls of {op} refused before anything ran": count + 1}}


def check_auto_tells(device):
    """Where no kernel can run a call, "auto" takes the reference, says so once, and `explain` says why."""
    for op in OPS:
        case = make_case(op, device=device, batch=1, dtype=torch.float64)
        for repeat in range(2):
            with warnings.catch_warnings(record=True) as told:
                warnings.simplefilter("always")
                got = testing.run(case)
            said = [str(warning.message) for warning in told if warning.category is RuntimeWarning]
            assert len(said) == (1 if repeat == 0 else 0), f"{op}: {said}"
        explanation = memformer_kernels.explain(op, **case.tensors)
        assert explanation.backend == "eager" and all(explanation.reasons[name] for name in backends.FUSED), explanation
        assert not differing(got, testing.run(case, "eager")), op


CHECKS = [
    *(Check(f"errors {op}", check_errors, (op,), group="errors") for op in OPS),
    Check("auto tells", check_auto_tells, gpu_only=True, group="errors"),
]
