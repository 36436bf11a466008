"""The contract as it stands in README.md and docs/contract.md, and what `pytest --contract` writes."""

import json
from pathlib import Path

import contract_tables
import pytest
from contract import PROMISES

pytest_plugins = ["pytester"]

ROOT = Path(__file__).parents[1]
SOME_TESTS = """
import pytest

@pytest.mark.guarantee("G1", "G4")
@pytest.mark.parametrize("share", [0.2, 0.5, 0.3])
def test_right(share, record_figure):
    record_figure("G1", "share", share)

@pytest.mark.guarantee("G2")
def test_wrong():
    assert False

def test_unmarked(record_figure):
    record_figure("G1", "share", 9)
"""


@pytest.mark.parametrize("file", contract_tables.FILES)
def test_tables_say_what_is_promised(file):
    """Ids and promises; figures are as old as their reports."""
    stale = contract_tables.promises_of((ROOT / file).read_text()) != PROMISES
    assert not stale, "run: python tests/contract_tables.py"


def test_a_table_that_says_something_else_is_seen():
    text = f"{contract_tables.BEGIN}\n{contract_tables.table({}, True)}{contract_tables.END}"
    assert contract_tables.promises_of(text) == PROMISES
    assert contract_tables.promises_of(text.replace("winner's", "loser's")) != PROMISES
    assert contract_tables.promises_of(text.replace("| G18 |", "| G19 |")) != PROMISES


@pytest.fixture
def some_tests(pytester):
    pytester.makeconftest("from contract import pytest_addoption, pytest_configure, record_figure")
    pytester.makeini("[pytest]\nmarkers = guarantee(id, ...): proves it")
    return pytester


def test_the_report_counts_tests_and_keeps_the_largest_figures(some_tests):
    some_tests.makepyfile(SOME_TESTS)
    done = some_tests.runpytest_inprocess("--contract", "report.json")
    done.assert_outcomes(passed=3, failed=2)
    done.stdout.fnmatch_lines(["*test_unmarked is not marked as proof of G1*"])
    report = json.loads((some_tests.path / "report.json").read_text())["guarantees"]
    assert report["G1"] == {"passed": 3, "failed": 0, "skipped": 0, "figures": {"share": 0.5}}
    assert report["G4"]["passed"] == 3 and report["G2"]["failed"] == 1 and report["G3"]["passed"] == 0
    assert list(report) == list(PROMISES)
    table = contract_tables.table({"CPU": report}, True)
    assert "3 passed<br>share: 0.5" in table and "0 passed, **1 failed**" in table


def test_an_unknown_guarantee_is_refused(some_tests):
    some_tests.makepyfile(SOME_TESTS.replace('"G2"', '"G99"'))
    done = some_tests.runpytest_inprocess()
    assert done.ret == pytest.ExitCode.USAGE_ERROR
    done.stderr.fnmatch_lines(["*no such guarantee: G99*"])
