"""What the checks of the attention kernels in CUDA C++ share: checks of any op, their command, their report."""

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
import traceback
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from triton_calls import differing, rows, same_bits

from memformer_kernels import explain, testing
from memformer_kernels.testing import cotangent

DTYPES = (torch.bfloat16, torch.float16)


def sanitize(program, dtype):
    """compute-sanitizer: memcheck, synccheck and racecheck of the program's small calls."""
    tool = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    if not Path(tool).is_file():
        return {"skipped": "no compute-sanitizer"}

    def run(check):
        command = [tool, "--tool", check, "--error-exitcode", "9", sys.executable, program, "--small", str(dtype)[6:]]
        environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
        result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200)
        assert result.returncode == 0, f"{check}: {result.stdout[-1500:]}{result.stderr[-500:]}"
        return check, result.stdout.strip().splitlines()[-1]

    with ThreadPoolExecutor() as pool:
        return dict(pool.map(run, ("memcheck", "synccheck", "racecheck")))


def batches(run, case):
    """A row has the same bits alone, and a hundred times over."""
    grad = cotangent(case)
    whole = run(case, grad).tensors()
    for part in (slice(0, 1), slice(17, 20), slice(39, 40)):
        alone = run(rows(case, part), grad[part]).tensors()
        assert all(same_bits(alone[name], whole[name][part]) for name in whole), f"rows {part}"
    for _ in range(100):
        again = run(case, grad).tensors()
        assert all(same_bits(again[name], whole[name]) for name in whole), "repeats"


def saved_on_the_host(run, case):
    """Saved tensors come back in another layout from the host, and change no bit."""
    grad = cotangent(case)
    with torch.autograd.graph.save_on_cpu(pin_memory=True):
        through_host = run(case, grad)
    assert not differing(through_host, run(case, grad)), f"saved on the host: {tuple(case.tensors['query'].shape)}"


def graph_of(run, case, others):
    """A CUDA graph of forward and backward of the case, replayed on the values of others."""
    static, grad = case.map(torch.clone), cotangent(case)
    run(static, grad)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run(static, grad)
    for other in others:
        for name, tensor in other.tensors.items():
            static.tensors[name].copy_(tensor)
        graph.replay()
        assert not differing(captured, run(other, grad)), "a replay differs"


def compiled(run, function, case):
    """`torch.compile` of a public function, one graph, on the backend in CUDA C++."""
    explanation = explain(case.op, **case.tensors, **case.options)
    assert explanation.backend == "cuda", str(explanation)
    one_graph = torch.compile(lambda **arguments: function(**arguments), fullgraph=True)
    grad = cotangent(case)
    assert not differing(run(case, grad), testing.run(case, grad_output=grad, function=one_graph))


def main(description, report_name, checks, small_calls):
    """Runs each check in each dtype; the exit status is 1 if one failed."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="directory of the JSON report")
    parser.add_argument("--only", nargs="+", default=[""], metavar="NAME", help="checks whose name contains a NAME")
    parser.add_argument("--small", choices=[str(d)[6:] for d in DTYPES], help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.small:
        return small_calls(getattr(torch, options.small))
    if options.out is None:
        parser.error("--out is required")
    options.out.mkdir(parents=True, exist_ok=True)
    results = {}
    report = {"gpu": torch.cuda.get_device_name(), "torch": torch.__version__, "checks": results}
    for check in checks:
        for dtype in DTYPES:
            name = f"{check.__name__.removeprefix('check_')} {str(dtype)[6:]}"
            if not any(part in name for part in options.only):
                continue
            start = time.perf_counter()
            try:
                results[name] = {"passed": True} | check(dtype)
            except Exception as error:
                results[name] = {"passed": False, "error": f"{type(error).__name__}: {error}"}
                traceback.print_exc(limit=3)
            results[name]["seconds"] = round(time.perf_counter() - start, 1)
            print("passed" if results[name]["passed"] else "FAILED", name, results[name], flush=True)
            (options.out / report_name).write_text(json.dumps(report, indent=2) + "\n")
    sys.exit(not all(result["passed"] for result in results.values()))
