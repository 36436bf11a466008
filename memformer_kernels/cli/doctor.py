"""`doctor`: what is installed, what was built, and what therefore runs. Needs nothing but torch."""

import importlib.metadata
import platform

import torch

from memformer_kernels import _extension
from memformer_kernels.backend import OPS, explain
from memformer_kernels.testing import make_case

PACKAGES = ("triton", "safetensors", "numpy", "typer", "rich", "matplotlib")


def report() -> str:
    """The environment report, as text to paste into a bug report."""
    lines = [
        f"memformer-kernels {_version('memformer-kernels')}, Python {platform.python_version()}, {platform.platform()}",
        f"torch {torch.__version__}, CUDA {torch.version.cuda or 'none'}, {torch.get_num_threads()} CPU threads",
        "packages: " + ", ".join(f"{name} {_version(name)}" for name in PACKAGES),
        *_gpus(),
        *_compiled_module(),
        "backends:",
        *_backends(),
    ]
    return "\n".join(lines)


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _gpus() -> list[str]:
    if not torch.cuda.is_available():
        return ["GPU: none that torch can use"]
    lines = []
    for index in range(torch.cuda.device_count()):
        p = torch.cuda.get_device_properties(index)
        size = f"{p.multi_processor_count} SMs, {p.total_memory / 2**30:.0f} GiB"
        lines.append(f"GPU {index}: {p.name}, sm_{p.major}{p.minor}, {size}")
    return lines


def _compiled_module() -> list[str]:
    return ["compiled module: " + ", ".join(f"{name} {value}" for name, value in _extension.report().items())]


def _backends() -> list[str]:
    """For each op and backend, that it runs on this machine, or why not."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    lines = []
    for op in OPS:
        case = make_case(op, device=device)
        for backend, reason in explain(op, **case.tensors, **case.options).reasons.items():
            lines.append(f"  {op:14} {backend:7} {'runs' if reason is None else 'no: ' + reason}")
    return lines
