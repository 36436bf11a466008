"""The mutation gate: faults planted one by one in a copy of the package, each to be found by tests that CI runs.

A mutant is an edit of one file: `anchor`, which must stand there exactly once, becomes `replacement`. It is killed when
one of its `tests` fails, and survives when all of them pass. The `*.toml` files beside this one are the catalogue.
"""

import itertools
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10
    import tomli as tomllib

FOLDER = Path(__file__).parent
TESTS = FOLDER.parent
PACKAGE = TESTS.parent / "memformer_kernels"
KERNELS = {"memory_read", "memory_write", "memory_forget", "attention", "fused"}  # parts of the catalogue
SECONDS = 60  # that the tests of one mutant may take; they take one or two


class GateError(Exception):
    """The gate cannot say whether a mutant is killed: a dead anchor, a test that is not there, a broken import."""


@dataclass(frozen=True)
class Mutant:
    name: str
    file: str  # in the package
    anchor: str
    replacement: str
    why: str  # what the fault would do to a user
    tests: tuple[str, ...] = ()  # node ids in the folder of tests, the likeliest to fail first
    equivalent: str | None = None  # a proof that no test can see it; then it has no tests
    part: str = ""  # the catalogue file that it stands in

    def apply(self, source: str) -> str:
        """The source with the fault. Raises `GateError` unless the anchor stands there once."""
        found = source.count(self.anchor)
        if found != 1:
            raise GateError(f"{self.name}: the anchor must stand once in {self.file}, found {found} times")
        return source.replace(self.anchor, self.replacement)


def catalogue() -> list[Mutant]:
    """All mutants, by file of the catalogue and in its order."""
    mutants = []
    for path in sorted(FOLDER.glob("*.toml")):
        for entry in tomllib.loads(path.read_text())["mutant"]:
            entry["tests"] = tuple(entry.get("tests", ()))
            mutants.append(Mutant(part=path.stem, **entry))
    return mutants


def is_of_a_kernel(mutant: Mutant) -> bool:
    return mutant.part in KERNELS


class Gate:
    """A copy of the package to plant faults in, and a process that runs tests on it; a context manager."""

    def __enter__(self) -> "Gate":
        self._folder = Path(tempfile.mkdtemp(prefix="mutants-"))
        skip = shutil.ignore_patterns("__pycache__", "*.so")
        shutil.copytree(PACKAGE, self._folder / PACKAGE.name, ignore=skip)
        environment = {
            **os.environ,
            "TRITON_INTERPRET": "1",
            "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",
            "PYTHONDONTWRITEBYTECODE": "",  # written once, by the first of the children
            "KERNELS_ON_CPU": str(self._folder),  # compiled once too: no fault is planted in C++
        }
        command = [sys.executable, FOLDER / "warm.py", self._folder, TESTS]
        pipe = subprocess.PIPE
        self._warm = subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, env=environment)
        return self

    def __exit__(self, *error: object) -> None:
        self._warm.communicate()
        shutil.rmtree(self._folder)

    def kills(self, mutant: Mutant) -> bool:
        """Whether one of the mutant's tests fails on it."""
        path = self._folder / PACKAGE.name / mutant.file
        original = path.read_text()
        try:
            _write(path, mutant.apply(original))
            code, output = self._run(mutant.tests)
        finally:
            _write(path, original)
        if code in (0, 1) or code < 0:  # passed, failed, or brought the process down
            return code != 0
        raise GateError(f"{mutant.name}: its tests did not run:\n{output}")

    def check_unmutated(self, mutants: Iterable[Mutant]) -> None:
        """Raises `GateError` unless all tests of the mutants pass without a fault: else their failures tell nothing."""
        tests = sorted({test for mutant in mutants for test in mutant.tests})
        code, output = self._run(tests, at_once=len(tests))
        if code:
            raise GateError(f"tests of mutants fail without a mutant:\n{output}")

    def _run(self, tests: Sequence[str], at_once: int = 1) -> tuple[int, str]:
        """pytest's exit code, or a signal's number below 0, and the end of what it printed."""
        log = self._folder / "log"
        self._warm.stdin.write(json.dumps([list(tests), str(log), SECONDS * at_once]) + "\n")
        self._warm.stdin.flush()
        answer = self._warm.stdout.readline()
        if not answer:
            raise GateError("the process that runs the tests is gone")
        return int(answer), log.read_text(errors="replace")[-3000:]


_ticks = itertools.count(1)


def _write(path: Path, text: str) -> None:
    """At a time of its own: bytecode is taken for that of a text by its second and length."""
    path.write_text(text)
    os.utime(path, times=(tick := next(_ticks), tick))
