"""What `pytest --contract` writes."""

import json

import pytest
from contract import PROMISES
from generated_tables import proof

pytest_plugins = ["pytester"]

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
    assert proof(report["G1"], True) == "3 passed<br>share: 0.5" and proof(report["G3"], True) == ""
    assert proof(report["G2"], False) == "0 passed, **1 failed**"


def test_an_unknown_guarantee_is_refused(some_tests):
    some_tests.makepyfile(SOME_TESTS.replace('"G2"', '"G99"'))
    done = some_tests.runpytest_inprocess()
    assert done.ret == pytest.ExitCode.USAGE_ERROR
    done.stderr.fnmatch_lines(["*no such guarantee: G99*"])
