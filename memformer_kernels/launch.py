"""How Triton kernels are launched, and which calls they can take."""

import functools
import operator
from collections.abc import Callable, Iterator

import torch
import triton
from torch import Tensor

from memformer_kernels.compiling import constant

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
LEAST_CAPABILITY = (8, 0)
OVERLAPPING_CAPABILITY = (9, 0)  # of programmatic dependent launches
MOST_CHANNELS = 256  # of a head
SCALE_RANGE = (2.0**-100, 2.0**100)  # so that a logit over it is finite


def unsupported_reason(**tensors: Tensor) -> str | None:
    """Why Triton kernels cannot run on these tensors; None when they can."""
    for name, tensor in tensors.items():
        if not tensor.is_cuda:
            return f"{name} must be on a CUDA device, got {tensor.device}"
        if tensor.dtype not in DTYPES:
            return f"{name} must be float32, float16 or bfloat16, got {tensor.dtype}"
    return _unsupported_device(tensor.device.index)


@constant  # to `torch.compile`, which cannot trace Triton's knobs, and looks through a cache
def _unsupported_device(index: int) -> str | None:
    return _unsupported(index)


@functools.cache
def _unsupported(index: int) -> str | None:
    if triton.knobs.runtime.interpret:
        return "TRITON_INTERPRET is set: the interpreter is for tests, slow and wrong in bfloat16"
    capability = torch.cuda.get_device_capability(index)
    if capability >= LEAST_CAPABILITY:
        return None
    least, got = (".".join(map(str, numbers)) for numbers in (LEAST_CAPABILITY, capability))
    return f"the GPU must have compute capability {least} or above, got {got}"


def unsupported_width(name: str, width: int) -> str | None:
    return None if width <= MOST_CHANNELS else f"{name} must have at most {MOST_CHANNELS} channels a head, got {width}"


def unsupported_scale(scale: float) -> str | None:
    low, high = SCALE_RANGE
    return None if low <= scale <= high else f"the scale must be from 2**-100 to 2**100, got {scale}"


def strides(tensor: Tensor | None) -> tuple[int, ...] | None:
    return None if tensor is None else tensor.stride()


def planned(function: Callable) -> Callable:
    """Caches the plan of a call: a function of shapes, strides, dtype, device and options that returns launchers.

    Its arguments are all that decides which variant of a kernel runs, also what it does not look at itself.
    """
    cached = functools.lru_cache(maxsize=4096)(function)
    _plans.append(cached)
    return cached


_plans: list[Callable] = []


def forget_plans() -> None:
    """After a change of what plans are made from."""
    for cached in _plans:
        cached.cache_clear()


@functools.cache
def _overlapping(index: int) -> dict[str, bool]:
    """How a kernel that begins with `wait_for_kernels_before` is compiled and launched on this device."""
    if index < 0 or torch.cuda.get_device_capability(index) < OVERLAPPING_CAPABILITY:
        return {"OVERLAPS": False}
    return {"OVERLAPS": True, "launch_pdl": True}


class Launcher:
    """A kernel with everything but its tensors fixed. Calling it with them, or tuples of them, launches it, on their
    device and its current stream.

    Triton's own call looks at every argument each time, to find the variant to run. Here the variant is known but for
    one thing, whether the tensors are aligned to 16 bytes: for those that are, it is looked up once.

    Where the GPU can, a kernel is launched while the one before it ends and waits for it at its start, so that the time
    between them is shorter, also in a CUDA graph: programmatic dependent launch.
    """

    def __init__(self, kernel: Callable, programs: int, arguments: tuple, **constants: object):
        """`arguments` follow the tensors; `constants` are the kernel's constexpr parameters and launch options."""
        self.kernel, self.programs, self.arguments, self.constants = kernel, programs, arguments, constants
        self._aligned = None
        self._all_arguments = ()

    def __call__(self, *tensors: Tensor | tuple[Tensor, ...] | None) -> None:
        first = tensors[0]
        index = (first[0] if type(first) is tuple else first).get_device()
        if index < 0 or index == torch._C._cuda_getDevice():
            self._launch(tensors, index)
        else:
            with torch.cuda.device(index):
                self._launch(tensors, index)

    def _launch(self, tensors: tuple, index: int) -> None:
        if self._aligned is not None:
            bits, pointers = 0, []
            for tensor in tensors:
                if type(tensor) is tuple:
                    pointer = tuple(t.data_ptr() for t in tensor)
                    bits |= functools.reduce(operator.or_, pointer)
                else:
                    pointer = None if tensor is None else tensor.data_ptr()
                    bits |= pointer or 0
                pointers.append(pointer)
            if bits % 16 == 0:
                self._aligned(*pointers, *self._all_arguments, stream=torch._C._cuda_getCurrentRawStream(index))
                return
        names = getattr(self.kernel, "arg_names", ())
        constants = self.constants | (_overlapping(index) if "OVERLAPS" in names else {})
        compiled = self.kernel[(self.programs,)](*tensors, *self.arguments, **constants)
        if index >= 0 and all(t.data_ptr() % 16 == 0 for t in _flat(tensors)):
            self._all_arguments = (*self.arguments, *(constants[name] for name in names if name in constants))
            self._aligned = compiled[(self.programs, 1, 1)]


def _flat(tensors: tuple) -> Iterator[Tensor]:
    for tensor in tensors:
        if isinstance(tensor, tuple):
            yield from tensor
        elif tensor is not None:
            yield tensor
