"""The compiled module `memformer_kernels._C`: loaded once, and the reason when there is none.

Nothing is loaded when the package is imported, and nothing here raises: a machine without the module runs on the
other backends. `setup.py` builds it and writes `_build_info.json`. The public functions are constants to
`torch.compile`, and keep their caches in private ones, because it looks through a cache.
"""

import contextlib
import functools
import importlib
import json
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor

from memformer_kernels.compiling import constant

NAME = "memformer_kernels._C"
BUILD_INFO = Path(__file__).with_name("_build_info.json")


@constant
def load() -> ModuleType | None:
    """The compiled module, or None: then `why_not()` says why. Safe to call from any thread."""
    return _load()[0]


@constant
def why_not() -> str | None:
    """Why there is no compiled module, in one line; None when there is one."""
    return _load()[1]


@constant
def why_not_on(device_index: int) -> str | None:
    """Why the loaded module cannot run on this GPU; None when it can."""
    return _why_not_on(device_index)


def on_device(device: torch.device) -> contextlib.AbstractContextManager:
    """Makes `device` the current one where it is not."""
    return contextlib.nullcontext() if device.index == torch.cuda.current_device() else torch.cuda.device(device)


def dtype(of: torch.dtype) -> int:
    """Its number in the module."""
    return getattr(load(), {torch.float32: "float32", torch.float16: "float16", torch.bfloat16: "bfloat16"}[of])


def address(tensor: Tensor | None) -> int:
    """Of a contiguous tensor, or 0 for none, as the module takes it."""
    return 0 if tensor is None else tensor.data_ptr()


def strided(tensor: Tensor | None) -> tuple[int, tuple[int, ...]]:
    """Address and strides of a tensor, or of no mask, as the module takes them."""
    return (0, (0, 0)) if tensor is None else (tensor.data_ptr(), tensor.stride())


def report() -> dict[str, str | bool | None]:
    """What is loaded, from where and for which GPUs, or why nothing is."""
    module, reason = _load()
    return {
        "loaded": module is not None,
        "path": getattr(module, "__file__", None),
        "architectures": getattr(module, "architectures", None),
        "cuda_version": getattr(module, "cuda_version", None),
        "reason": reason,
    }


@functools.cache
def _load() -> tuple[ModuleType | None, str | None]:
    try:
        return importlib.import_module(NAME), None
    except ModuleNotFoundError as error:
        if error.name == NAME:
            return None, f"the CUDA kernels are not compiled: {_why_not_compiled()}"
        return None, _cannot_import(error)
    except Exception as error:  # whatever a broken file raises, the other backends still run
        return None, _cannot_import(error)


def _cannot_import(error: Exception) -> str:
    return f"the compiled CUDA kernels cannot be imported: {' '.join(str(error).split())}"


def _why_not_compiled() -> str:
    try:
        info = json.loads(BUILD_INFO.read_text())
        if info["built"]:
            return f"{info['extension']} was built, for another Python or since removed; install the package again"
        return info["reason"]
    except (OSError, ValueError, KeyError):
        return "setup.py has not run in this tree"


@functools.cache
def _why_not_on(device_index: int) -> str | None:
    major, minor = torch.cuda.get_device_capability(device_index)
    compiled_for = load().architectures
    if any(_runs_on(architecture, major, minor) for architecture in compiled_for.split(";")):
        return None
    return (
        f"the CUDA kernels are compiled for {compiled_for}, and GPU {device_index} has compute capability "
        f"{major}.{minor}; set MEMFORMER_KERNELS_ARCHS and build again"
    )


def _runs_on(architecture: str, major: int, minor: int) -> bool:
    """Code for 80 runs on every 8.x from there on; code for 90a on 9.0 alone."""
    number = architecture.rstrip("af")
    compiled_major, compiled_minor = divmod(int(number), 10)
    if architecture != number:
        return (major, minor) == (compiled_major, compiled_minor)
    return major == compiled_major and minor >= compiled_minor
