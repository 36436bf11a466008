"""The mutation gate: every planted fault is found by the tests named for it. `python tests/mutants` runs it by hand."""

import dataclasses
import os
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
if not hasattr(os, "fork"):
    pytest.skip("the gate forks", allow_module_level=True)

sys.path.insert(0, str(Path(__file__).with_name("mutants")))
from gate import PACKAGE, Gate, GateError, Mutant, catalogue, is_of_a_kernel

MUTANTS = catalogue()
PLANTED = [mutant for mutant in MUTANTS if not mutant.equivalent]
KILLED = set()
CHECKS = "def positive(op: str, **arguments: object) -> None:\n"
NO_FAULT = Mutant(
    name="no-fault",
    file="checks.py",
    anchor=CHECKS,
    replacement=CHECKS + "    # a comment changes nothing\n",
    why="the gate must say that it survives",
    tests=("test_memory_read.py::test_wrong_arguments_are_refused",),
)


@pytest.fixture(scope="module")
def gate(request):
    with Gate() as gate:
        gate.check_unmutated(PLANTED)
        yield gate
    told = request.config.pluginmanager.get_plugin("terminalreporter")
    told.write_line(f"\nmutants: {len(KILLED)} killed of {len(PLANTED)}, {len(MUTANTS) - len(PLANTED)} equivalent")


def test_the_catalogue_is_whole():
    assert len({mutant.name for mutant in MUTANTS}) == len(MUTANTS)
    kernels = sum(map(is_of_a_kernel, PLANTED))
    assert kernels >= 60 and len(PLANTED) - kernels >= 20
    for mutant in MUTANTS:
        assert mutant.equivalent if not mutant.tests else mutant.why, mutant.name


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_anchor_is_alive(mutant):
    """Equivalent ones too: a proof is of the code as it stands."""
    source = (PACKAGE / mutant.file).read_text()
    compile(mutant.apply(source), mutant.file, "exec")
    assert mutant.anchor != mutant.replacement


@pytest.mark.parametrize("mutant", PLANTED, ids=lambda mutant: mutant.name)
def test_mutant_is_killed(gate, mutant):
    assert gate.kills(mutant), f"{mutant.name} survives ({mutant.why}): python tests/mutants {mutant.name}"
    KILLED.add(mutant.name)


# Is the gate itself right?


def test_what_changes_nothing_survives(gate):
    assert not gate.kills(NO_FAULT)


@pytest.mark.parametrize("anchor, count", [("no such line", 0), ("def ", "[0-9]{2}")], ids=["none", "many"])
def test_a_dead_anchor_is_an_error(gate, anchor, count):
    with pytest.raises(GateError, match=f"the anchor must stand once in checks.py, found {count} times"):
        gate.kills(dataclasses.replace(NO_FAULT, anchor=anchor))


@pytest.mark.parametrize(
    "change, words",
    [
        ({"tests": ("test_memory_read.py::test_that_is_not_there",)}, "not found"),
        ({"tests": ("test_memory_read.py::test_values_of_one_give_one[triton-float64]",)}, "skipped"),
        ({"replacement": "import no_such_module\n" + CHECKS}, "no_such_module"),
    ],
    ids=["no such test", "skipped test", "broken import"],
)
def test_what_does_not_run_kills_nothing(gate, change, words):
    with pytest.raises(GateError, match=f"(?s)no-fault: its tests did not run:.*{words}"):
        gate.kills(dataclasses.replace(NO_FAULT, **change))


def test_a_mutant_leaves_nothing_behind(gate):
    """The next one starts from the package as it is, whatever bytecode the last one left."""
    broken = dataclasses.replace(NO_FAULT, replacement=CHECKS.replace("positive", "negative"))
    assert gate.kills(broken) and not gate.kills(NO_FAULT)


def test_tests_that_fail_without_a_mutant_are_an_error(gate, monkeypatch):
    monkeypatch.setattr(Gate, "_run", lambda *_, **options: (1, "1 failed"))
    with pytest.raises(GateError, match="tests of mutants fail without a mutant:\n1 failed"):
        gate.check_unmutated([NO_FAULT])
