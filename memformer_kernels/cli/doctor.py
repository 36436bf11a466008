"""`doctor`: what is installed, what was built, and what therefore runs. Needs nothing but torch."""

import importlib.metadata
import platform
from importlib import resources

import torch

from memformer_kernels import _extension
from memformer_kernels.backend import OPS, explain
from memformer_kernels.testing import make_case

PACKAGES = ("triton", "safetensors", "numpy", "typer", "rich", "matplotlib")


def facts() -> dict:
    """The environment as JSON takes it. Under `backends`, for each op, a backend that runs is null, else says why."""
    return {
        "memformer-kernels": _version("memformer-kernels"),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "cpu_threads": torch.get_num_threads(),
        "packages": {name: _version(name) for name in PACKAGES},
        "gpus": _gpus(),
        "compiled_module": _extension.report(),
        "backends": _backends(),
    }


def report(found: dict) -> str:
    """The same as text, to paste into a bug report."""
    packages = ", ".join(f"{name} {version or 'not installed'}" for name, version in found["packages"].items())
    own = found["memformer-kernels"] or "from a source tree"
    lines = [
        f"memformer-kernels {own}, Python {found['python']}, {found['platform']}",
        f"torch {found['torch']}, CUDA {found['cuda'] or 'none'}, {found['cpu_threads']} CPU threads",
        f"packages: {packages}",
    ]
    for index, gpu in enumerate(found["gpus"]):
        size = f"{gpu['multiprocessors']} SMs, {gpu['bytes'] / 2**30:.0f} GiB"
        tiles = "measured" if gpu["tiles_measured"] else "not measured: `memformer-kernels tune` does"
        lines.append(f"GPU {index}: {gpu['name']}, sm_{gpu['architecture']}, {size}; tiles {tiles}")
    if not found["gpus"]:
        lines.append("GPU: none that torch can use")
    lines += [f"compiled module: {module_line(found['compiled_module'])}", "backends:"]
    for op, reasons in found["backends"].items():
        for backend, reason in reasons.items():
            lines.append(f"  {op:14} {backend:7} {'runs' if reason is None else 'no: ' + reason}")
    return "\n".join(lines)


def module_line(module: dict) -> str:
    if not module["loaded"]:
        return f"none: {module['reason']}"
    return f"{module['path']}, for {module['architectures']}, CUDA {module['cuda_version']}"


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _gpus() -> list[dict]:
    tables = resources.files("memformer_kernels") / "tile_tables"
    gpus = []
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        p = torch.cuda.get_device_properties(index)
        gpu = {"name": p.name, "architecture": f"{p.major}{p.minor}", "multiprocessors": p.multi_processor_count}
        gpu |= {"bytes": p.total_memory, "tiles_measured": (tables / f"sm_{p.major}{p.minor}.json").is_file()}
        gpus.append(gpu)
    return gpus


def _backends() -> dict[str, dict[str, str | None]]:
    """For each op and backend, None where it runs on this machine, else why not."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    cases = {op: make_case(op, device=device) for op in OPS}
    return {op: explain(op, **case.tensors, **case.options).reasons for op, case in cases.items()}
