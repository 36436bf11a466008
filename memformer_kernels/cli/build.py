"""`build`: compiles the CUDA kernels beside the package, from the source tree that it runs from."""

import os
import subprocess
import sys
from pathlib import Path

from rich.console import Console

import memformer_kernels

TREE = Path(memformer_kernels.__file__).resolve().parents[1]


def build(architectures: str | None) -> None:
    """Builds or raises: a ValueError whose line says what was missing, the compiler's output before it on stderr."""
    if not (TREE / "setup.py").is_file() or not (TREE / "csrc").is_dir():
        raise ValueError(
            f"build: {TREE} holds no sources of the kernels; in a checkout, where nvcc is: "
            "pip install --no-cache-dir --force-reinstall --no-deps ."
        )
    environment = {**os.environ, "MEMFORMER_KERNELS_CUDA": "1"}
    if architectures is not None:
        environment["MEMFORMER_KERNELS_ARCHS"] = architectures
    command = [sys.executable, "setup.py", "build_ext", "--inplace"]
    with Console(stderr=True).status("compiling"):
        done = subprocess.run(command, cwd=TREE, env=environment, capture_output=True, text=True)
    if done.returncode != 0:
        *output, reason = done.stderr.strip().splitlines() or ["the build said nothing"]
        print("\n".join(output), file=sys.stderr)
        raise ValueError(f"build: {reason.removeprefix('setup.py: ')}")
    # in a process of its own: this one has looked for the module already, and may have loaded an older one
    says = "from memformer_kernels import _extension; from memformer_kernels.cli.doctor import module_line; "
    says += "print(module_line(_extension.report()))"
    subprocess.run([sys.executable, "-c", says], cwd=TREE, check=True)
