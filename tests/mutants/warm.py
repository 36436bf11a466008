"""A process that has imported what takes long, but not the package, and runs tests in children of its own.

    warm.py <folder with a copy of the package> <folder of tests>

A line on standard input is a JSON list: node ids, a file for what pytest prints, and the seconds that it may take.
The answer is a line with pytest's exit code, or the number of the signal that ended the child, below 0.
"""

import gc
import json
import os
import signal
import sys
from pathlib import Path

import hypothesis  # noqa: F401
import pytest
import torch._dynamo  # noqa: F401
import torch._functorch.aot_autograd  # noqa: F401
import torch.distributed.fsdp  # noqa: F401
import triton.language  # noqa: F401

QUICKLY = ["--quiet", "--exitfirst", "--tb=short", "--no-header", "--assert=plain"]
QUICKLY += ["-p", "no:cacheprovider", "-p", "no:unraisableexception", "-p", "no:threadexception"]
SKIPPED = 97
TOO_LATE = 98
OTHER_PACKAGE = 99


def main(folder: str, tests: str) -> None:
    sys.path.insert(0, folder)
    os.chdir(tests)
    gc.freeze()  # what is here already need not be looked through again
    for line in sys.stdin:
        nodes, log, seconds = json.loads(line)
        child = os.fork()
        if child == 0:
            os._exit(_run(folder, nodes, log, seconds))
        _, status = os.waitpid(child, 0)
        code = os.waitstatus_to_exitcode(status)
        print(TOO_LATE if code == -signal.SIGALRM else code, flush=True)


class Skips:
    """A plugin that collects what is skipped: it finds no fault, and must not pass for having found none."""

    def __init__(self):
        self.found = []

    def pytest_runtest_logreport(self, report):
        if report.skipped:
            self.found.append(report.nodeid)

    pytest_collectreport = pytest_runtest_logreport


def _run(folder: str, nodes: list[str], log: str, seconds: int) -> int:
    signal.alarm(seconds)
    with open(log, "wb") as file:
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)
    skips = Skips()
    code = pytest.main([*QUICKLY, *nodes], plugins=[skips])
    package = sys.modules.get("memformer_kernels")
    if package is not None and not Path(package.__file__).is_relative_to(folder):
        print(f"the tests took {package.__file__}", flush=True)
        return OTHER_PACKAGE
    if code == 0 and skips.found:
        print(f"skipped: {skips.found}", flush=True)
        return SKIPPED
    return int(code)


if __name__ == "__main__":
    main(*sys.argv[1:])
    os._exit(0)  # Triton's bindings tell of leaks at an ordinary exit
