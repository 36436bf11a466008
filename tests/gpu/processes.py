"""Checks of a script in processes of their own: a fault of one cannot spoil another, and kernels compile side by side.

The script is run again with `--device DEVICE --child NAME ...`, and then calls `run_here`.
"""

import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import torch

MARK = "RESULT "


def run_here(checks, names, device):
    """In the child process: checks in turn, with every uninitialised tensor full of NaN.

    A failure ends them: it may spoil what follows.
    """
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    for name in names:
        check, start = checks[name], time.perf_counter()
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


def jobs(device):
    """Processes at a time."""
    return min(14, os.cpu_count()) if device == "cuda" else 1


def run_in_process(script, checks, names, device, limit_s, report):
    """Hands each result, as it comes, to `report(name, result)`: of all of `names` up to the first that fails."""
    command = [sys.executable, script, "--device", device, "--child", *names]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TORCHINDUCTOR_COMPILE_THREADS": "1"}
    environment["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"  # the eager references repeat their bits
    if device == "cpu":
        environment["TRITON_INTERPRET"] = "1"
    waiting, said, result = list(names), [], None
    with tempfile.TemporaryDirectory() as empty:
        if checks[names[0]].cold:
            environment["TRITON_CACHE_DIR"] = empty
        pipe = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        with subprocess.Popen(command, **pipe, env=environment, start_new_session=True) as process:
            _running.add(process)
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
            _running.discard(process)
    if waiting and (result is None or result["passed"]):
        error = f"exit status {status}, {limit_s} s allowed: {''.join(said)[-2000:]}"
        report(waiting[0], {"passed": False, "error": error})


_running = set()


def _stop(*_):
    """They must not go on alone, in the way of what is measured next."""
    for process in tuple(_running):
        os.killpg(process.pid, signal.SIGKILL)
    os._exit(128 + signal.SIGTERM)


def tell(results):
    """How many passed, and which did not; whether none failed."""
    failed = [name for name, result in results.items() if not result["passed"]]
    skipped = [name for name, result in results.items() if "skipped" in result]
    passed = len(results) - len(failed) - len(skipped)
    print(f"\n{passed} passed, {len(skipped)} skipped, {len(failed)} failed {'; '.join(failed)}")
    return not failed


def run_checks(script, checks, device, jobs, limit_s, write=lambda results: None):
    """The results of all checks, by name; one line each as it finishes, and what is there handed to `write`."""
    results, groups, one_at_a_time = {}, {}, threading.Lock()
    for name in checks:
        if checks[name].gpu_only and device != "cuda":
            results[name] = {"passed": True, "skipped": "needs a GPU"}
        else:
            groups.setdefault(checks[name].group or name, []).append(name)

    def report(name, result):
        state = "FAILED" if not result["passed"] else "skipped" if "skipped" in result else "ok"
        with one_at_a_time:
            results[name] = result
            print(f"{state:8}{name}: {result}", flush=True)
            write(dict(results))

    def run_group(group):
        while group:
            run_in_process(script, checks, group, device, limit_s, report)
            group = [name for name in group if name not in results]

    signal.signal(signal.SIGTERM, _stop)
    with ThreadPoolExecutor(jobs) as pool:
        list(pool.map(run_group, groups.values()))
    return {name: results[name] for name in checks}
