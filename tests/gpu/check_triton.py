"""Checks the Triton backend of every op on a GPU. Run by hand:

    PYTHONPATH=. python tests/gpu/check_triton.py --out DIRECTORY

Every check compares with float64, or bit for bit with another call. They run in processes of their own, several at a
time: a fault of one cannot spoil another, and kernels are compiled side by side. All of them run; the exit status is 1
if one failed. `DIRECTORY/triton_checks.json` holds the figures.

Without a GPU, `--device cpu` runs what the interpreter can, in float32 and float16.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
import triton
import triton_accuracy
import triton_machine
import triton_sanitizer
import triton_values

CHECKS = {
    check.name: check
    for module in (triton_sanitizer, triton_accuracy, triton_machine, triton_values)
    for check in module.CHECKS
}
MARK = "RESULT "


def run_here(names, device):
    """Checks in turn, with every uninitialised tensor full of NaN. A failure ends them: it may spoil what follows."""
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    for name in names:
        check, start = CHECKS[name], time.perf_counter()
        try:
            result = {"passed": True, **(check.function(device, *check.arguments) or {})}
            if device == "cuda":
                torch.cuda.synchronize()
        except Exception as error:
            result = {"passed": False, "error": f"{type(error).__name__}: {error}"[:4000]}
        result["seconds"] = round(time.perf_counter() - start, 1)
        print(MARK + json.dumps(result), flush=True)
        if not result["passed"]:
            sys.exit(1)


def run_in_process(names, device, limit_s, report):
    """Hands each result, as it comes, to `report(name, result)`: of all of `names` up to the first that fails."""
    command = [sys.executable, __file__, "--device", device, "--child", *names]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TORCHINDUCTOR_COMPILE_THREADS": "1"}
    environment["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"  # the eager references repeat their bits
    if device == "cpu":
        environment["TRITON_INTERPRET"] = "1"
    waiting, said, result = list(names), [], None
    with tempfile.TemporaryDirectory() as empty:
        if CHECKS[names[0]].cold:
            environment["TRITON_CACHE_DIR"] = empty
        pipe = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        with subprocess.Popen(command, **pipe, env=environment, start_new_session=True) as process:
            clock = threading.Timer(limit_s, os.killpg, (process.pid, signal.SIGKILL))  # with what it has started
            clock.start()
            for line in process.stdout:
                if not line.startswith(MARK):
                    said.append(line)
                    continue
                result = json.loads(line.removeprefix(MARK))
                report(waiting.pop(0), result)
                if not waiting or not result["passed"]:
                    break
            status = process.wait()
            clock.cancel()
    if waiting and (result is None or result["passed"]):
        error = f"exit status {status}, {limit_s} s allowed: {''.join(said)[-2000:]}"
        report(waiting[0], {"passed": False, "error": error})


def run_checks(names, device, jobs, limit_s):
    """The results of all of `names`, by name; one line each as it finishes."""
    results, groups = {}, {}
    for name in names:
        if CHECKS[name].gpu_only and device != "cuda":
            results[name] = {"passed": True, "skipped": "needs a GPU"}
        else:
            groups.setdefault(CHECKS[name].group or name, []).append(name)

    def report(name, result):
        results[name] = result
        state = "FAILED" if not result["passed"] else "skipped" if "skipped" in result else "ok"
        print(f"{state:8}{name}: {result}", flush=True)

    def run_group(group):
        while group:
            run_in_process(group, device, limit_s, report)
            group = [name for name in group if name not in results]

    with ThreadPoolExecutor(jobs) as pool:
        list(pool.map(run_group, groups.values()))
    return {name: results[name] for name in names}


def largest_errors(results):
    """`{op: {dtype: {benign or hostile: {tensor: error over its largest element}}}}` of the accuracy checks."""
    errors = {}
    for check, result in results.items():
        if check.startswith("accuracy "):
            op, dtype = check.split(",")[0].split()[1:]
            for kind, tensors in result.get("largest relative error", {}).items():
                so_far = errors.setdefault(op, {}).setdefault(dtype, {}).setdefault(kind, {})
                so_far.update({name: max(error, so_far.get(name, 0.0)) for name, error in tensors.items()})
    return errors


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="directory of the JSON report")
    parser.add_argument("--only", nargs="+", default=[""], metavar="NAME", help="checks whose name contains a NAME")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--no-sanitizer", action="store_true")
    parser.add_argument("--jobs", type=int, help="processes at a time")
    parser.add_argument("--limit", type=float, default=300, help="seconds that one process may take")
    parser.add_argument("--child", nargs="+", choices=CHECKS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        return run_here(options.child, options.device)
    if options.out is None:
        parser.error("--out is required")
    names = [name for name in CHECKS if any(part in name for part in options.only)]
    if options.no_sanitizer:
        names = [name for name in names if "sanitizer" not in name]
    if not names:
        parser.error(f"no such check; there are: {', '.join(CHECKS)}")
    on_gpu = options.device == "cuda"
    start = time.perf_counter()
    results = run_checks(
        names, options.device, options.jobs or (min(14, os.cpu_count()) if on_gpu else 1), options.limit
    )
    report = {
        "gpu": torch.cuda.get_device_name() if on_gpu else None,
        "torch": torch.__version__,
        "triton": triton.__version__,
        "seconds": round(time.perf_counter() - start, 1),
        "largest relative errors": largest_errors(results),
        "checks": results,
    }
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "triton_checks.json").write_text(json.dumps(report, indent=2) + "\n")
    failed = [name for name, result in results.items() if not result["passed"]]
    skipped = [name for name, result in results.items() if "skipped" in result]
    passed = len(results) - len(failed) - len(skipped)
    print(f"\n{passed} passed, {len(skipped)} skipped, {len(failed)} failed {'; '.join(failed)}")
    print(f"{report['seconds']} s on {report['gpu']}, torch {report['torch']}, triton {report['triton']}")
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
