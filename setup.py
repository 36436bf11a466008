"""Builds `memformer_kernels._C` with nvcc, or installs the package without it and records why.

Environment:
    MEMFORMER_KERNELS_CUDA   auto (default): build if nvcc is here; if it is not, or the build fails, go on without
                             1: build or fail
                             0: do not build
    MEMFORMER_KERNELS_ARCHS  GPU architectures, "80;90a" by default
    MAX_JOBS                 compilers run at a time; ninja's choice by default
    CUDA_HOME, CUDA_PATH     where nvcc is, if it is not on PATH
    CXX                      host compiler for nvcc

Needs neither torch nor a GPU. Objects are kept in build/, so a second build compiles what has changed. The outcome is
written to `memformer_kernels/_build_info.json`, beside the compiled module; `memformer_kernels/_extension.py` reads it.
"""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
MODULE = "memformer_kernels._C"
BINDINGS = "csrc/bindings.cpp"
KERNELS = (
    "csrc/memory_forget_forward.cu",
    "csrc/memory_forget_backward.cu",
    "csrc/memory_read_forward.cu",
    "csrc/memory_read_backward.cu",
    "csrc/memory_write_forward.cu",
    "csrc/memory_write_backward.cu",
)
BUILD_INFO = "_build_info.json"


class BuildError(Exception):
    """Why the module cannot be built, in one line."""


def cuda_mode() -> str:
    mode = os.environ.get("MEMFORMER_KERNELS_CUDA", "auto").lower()
    if mode not in ("auto", "1", "0"):
        raise SystemExit(f"setup.py: MEMFORMER_KERNELS_CUDA must be auto, 1 or 0, got {mode!r}")
    return mode


def architectures() -> list[str]:
    value = os.environ.get("MEMFORMER_KERNELS_ARCHS", "80;90a")
    names = re.split("[;, ]+", value.strip())
    if not all(re.fullmatch(r"\d{2,3}[af]?", name) for name in names):
        raise SystemExit(f'setup.py: MEMFORMER_KERNELS_ARCHS must look like "80;90a", got {value!r}')
    return names


def find_nvcc() -> str:
    for variable in ("CUDA_HOME", "CUDA_PATH"):
        nvcc = Path(os.environ.get(variable, "/nonexistent"), "bin", "nvcc")
        if nvcc.is_file():
            return str(nvcc)
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        raise BuildError("no nvcc on PATH or in CUDA_HOME")
    return nvcc


def nvcc_version(nvcc: str) -> str:
    output = subprocess.run([nvcc, "--version"], capture_output=True, text=True).stdout
    release = re.search(r"release (\d+\.\d+)", output)
    if release is None:
        raise BuildError(f"{nvcc} --version names no release")
    return release[1]


def ninja_file(nvcc: str, module: str, directory: Path) -> str:
    """The build as ninja reads it in `directory`. nvcc also compiles the bindings and links: it knows its own files.

    Paths are relative, so that a copied tree is not built again.
    """
    import pybind11

    root = os.path.relpath(ROOT, directory)
    compiler = [nvcc, *(["-ccbin", os.environ["CXX"]] if "CXX" in os.environ else [])]
    common = ["-std=c++20", "-Xcompiler", "-fPIC,-fvisibility=hidden", f"-I{root}/csrc/include"]
    bindings = ["-O1", f"-I{pybind11.get_include()}", f"-I{sysconfig.get_paths()['include']}"]
    bindings += [f'-DMEMFORMER_KERNELS_ARCHITECTURES="{";".join(architectures())}"']
    kernels = ["-O3", *(f"-gencode=arch=compute_{name},code=sm_{name}" for name in architectures())]

    lines = [
        "ninja_required_version = 1.5",
        "rule compile",
        f"  command = {shell([*compiler, *common])} $flags -MD -MF $out.d -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "rule link",
        f"  command = {shell([*compiler, '-shared', '-cudart', 'static'])} $in -o $out",
    ]
    objects = []
    for source, flags in [(BINDINGS, bindings), *((kernel, kernels) for kernel in KERNELS)]:
        objects.append(f"{Path(source).name}.o")
        lines += [f"build {objects[-1]}: compile {root}/{source}", f"  flags = {shell(flags)}"]
    lines += [f"build {module}: link {' '.join(objects)}", ""]
    return "\n".join(lines)


def shell(arguments: list[str]) -> str:
    return shlex.join(arguments).replace("$", "$$")


def run_ninja(directory: Path) -> None:
    import ninja

    command = [str(Path(ninja.BIN_DIR, "ninja")), "-C", str(directory)]
    if os.environ.get("MAX_JOBS"):
        command += ["-j", os.environ["MAX_JOBS"]]
    result = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    print(result.stdout, file=sys.stderr)
    if result.returncode != 0:
        errors = [line.strip() for line in result.stdout.splitlines() if re.search(r"\berror\b", line)]
        raise BuildError(f"the compiler failed: {errors[0] if errors else f'ninja exited with {result.returncode}'}")


class BuildCuda(build_ext):
    """setuptools says where the module goes, ninja and nvcc make it, and it may be missing."""

    @property
    def module(self) -> Path:
        return Path(self.build_lib, self.get_ext_filename(MODULE)).resolve()

    def build_extension(self, extension: Extension) -> None:
        info = {"built": False, "reason": None, "architectures": ";".join(architectures()), "nvcc": None}
        info["extension"] = self.module.name
        self.module.parent.mkdir(parents=True, exist_ok=True)
        self.module.unlink(missing_ok=True)  # what an earlier build left
        try:
            if cuda_mode() == "0":
                raise BuildError("MEMFORMER_KERNELS_CUDA=0 at installation")
            nvcc = find_nvcc()
            info["nvcc"] = nvcc_version(nvcc)
            self.compile(nvcc)
            info["built"] = True
        except (BuildError, ImportError, OSError) as error:
            if cuda_mode() == "1":
                raise SystemExit(f"setup.py: MEMFORMER_KERNELS_CUDA is 1, but {error}") from error
            info["reason"] = str(error)
            print(f"warning: memformer_kernels: CUDA kernels not built: {error}", file=sys.stderr)
        self.module.with_name(BUILD_INFO).write_text(json.dumps(info, indent=2) + "\n")

    def compile(self, nvcc: str) -> None:
        directory = ROOT / "build" / f"cuda-{sys.implementation.cache_tag}"
        directory.mkdir(parents=True, exist_ok=True)
        directory.joinpath("build.ninja").write_text(ninja_file(nvcc, self.module.name, directory))
        run_ninja(directory)
        shutil.copyfile(directory / self.module.name, self.module)

    def get_outputs(self) -> list[str]:
        return [str(file) for file in (self.module, self.module.with_name(BUILD_INFO)) if file.exists()]

    def get_output_mapping(self) -> dict[str, str]:
        """Where an editable installation finds each output: in the source tree."""
        package = Path(self.get_finalized_command("build_py").get_package_dir(MODULE.rpartition(".")[0]))
        return {output: str(package / Path(output).name) for output in self.get_outputs()} if self.inplace else {}

    def copy_extensions_to_source(self) -> None:
        package = self.get_finalized_command("build_py").get_package_dir(MODULE.rpartition(".")[0])
        Path(package, self.module.name).unlink(missing_ok=True)  # what an earlier build left
        for output, in_source in self.get_output_mapping().items():
            shutil.copyfile(output, in_source)


setup(ext_modules=[Extension(MODULE, [BINDINGS, *KERNELS])], cmdclass={"build_ext": BuildCuda})
