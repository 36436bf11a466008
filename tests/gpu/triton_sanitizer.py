"""A handful of calls of the Triton backend under compute-sanitizer. As a program, it is what the sanitizer runs."""

import os
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import torch
import triton
import triton.language as tl
from triton_calls import OPS, Check, infer, run

from memformer_kernels import tiles
from memformer_kernels.testing import cotangent, make_case

LIMIT_S = 60
RUNS = {  # by name: the tool, and what it watches
    "memcheck, read past the end": ("memcheck", "past_the_end"),
    "initcheck, read of nothing": ("initcheck", "uninitialised"),
    "memcheck": ("memcheck", "calls"),
    "racecheck": ("racecheck", "calls"),
    "initcheck": ("initcheck", "calls"),
    "synccheck": ("synccheck", "calls"),
}


@triton.jit
def _copy_kernel(source, target, BLOCK: tl.constexpr):
    places = tl.arange(0, BLOCK)
    tl.store(target + places, tl.load(source + places))


def past_the_end():
    source, target = torch.ones(1023).cuda(), torch.ones(1024).cuda()
    _copy_kernel[(1,)](source, target, BLOCK=1024)


def uninitialised():
    source, target = torch.empty(1024, device="cuda"), torch.ones(1024).cuda()
    _copy_kernel[(1,)](source, target, BLOCK=1024)


def calls():
    """One tile of slots and several, partial tiles everywhere; few kernels, because each is compiled once."""
    for op in OPS:
        for dtype in (torch.bfloat16, torch.float32):
            for slots in (17,) if op == "memory_forget" else (17, 130 if dtype == torch.bfloat16 else 40):
                case = make_case(op, batch=2, heads=2, slots=slots, tokens=70, width=24, dtype=dtype, masked=0.3)
                grad = cotangent(case).cuda()
                case = case.map(lambda t: t.cuda())
                run(case, grad)
                infer(case)
    if tiles.architecture(torch.device("cuda", 0)) == 90:  # the kernel in Gluon takes no narrower heads
        case = make_case("memory_read", batch=1, heads=1, slots=200, tokens=150, width=64, dtype=torch.bfloat16)
        infer(case.map(lambda t: t.cuda()))


def find_sanitizer():
    return shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path="/usr/local/cuda/bin")


def under_sanitizer(sanitizer, tool, what):
    """`(errors found, the end of what it said)`; errors is None where it came to no verdict."""
    command = [sanitizer, "--tool", tool, "--print-limit", "3"]
    if tool == "memcheck":  # or the next allocation begins where one ends, and reading past it is no error
        command += ["--padding", "512"]
    try:
        done = subprocess.run(
            [*command, sys.executable, __file__, what],
            capture_output=True,
            text=True,
            env=environment(),
            timeout=LIMIT_S,
        )
    except subprocess.TimeoutExpired:
        return None, f"took more than {LIMIT_S} s"
    summary = re.findall(r"SUMMARY: (\d+) (?:error|hazard)", done.stdout + done.stderr)
    failed_unfound = done.returncode and summary == ["0"]
    return (None if failed_unfound or not summary else int(summary[-1])), (done.stdout + done.stderr)[-1500:]


def environment():
    return {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}


def check_sanitizer(device):
    """memcheck and initcheck find what is planted; then these, racecheck and synccheck find nothing in the calls."""
    sanitizer = find_sanitizer()
    if sanitizer is None:
        return {"skipped": "not found"}
    for what in ("calls", "uninitialised"):  # fills the cache of compiled kernels: compiling is no part of the limit
        done = subprocess.run([sys.executable, __file__, what], capture_output=True, text=True, env=environment())
        assert not done.returncode, f"{what} without the sanitizer: {done.returncode} {done.stderr[-1500:]}"
    figures = {}
    for planted in (True, False):  # tools that miss what is planted prove nothing by finding nothing
        runs = {name: run for name, run in RUNS.items() if (run[1] != "calls") == planted}
        with ThreadPoolExecutor(len(runs)) as pool:
            verdicts = dict(
                zip(runs, pool.map(lambda run: under_sanitizer(sanitizer, *run), runs.values()), strict=True)
            )
        figures |= {f"errors of {name}": errors for name, (errors, _) in verdicts.items()}
        for name, (errors, said) in verdicts.items():
            assert errors is not None, f"{name}: no verdict, {figures}; {said}"
            assert (errors > 0) == planted, f"{name}: {errors} errors, {figures}; {said}"
    return figures


CHECKS = [Check("sanitizer", check_sanitizer, gpu_only=True)]


if __name__ == "__main__":
    {"past_the_end": past_the_end, "uninitialised": uninitialised, "calls": calls}[sys.argv[1]]()
    torch.cuda.synchronize()
