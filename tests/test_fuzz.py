"""The contract over random calls: past failures first, then always the same ones, and a tenth more of the day."""

import datetime
import json
from pathlib import Path

import fuzz
import pytest
from conftest import PATHS

pytestmark = pytest.mark.guarantee("G1", "G4", "G9", "G10", "G11")

OPS = ("memory_read", "memory_write", "memory_forget")
CORPUS = json.loads((Path(__file__).parent / "corpus.json").read_text())  # calls that have failed
CALLS = {"eager": 40, "explicit": 40, "triton": 4}  # of every op and dtype
TODAY = datetime.date.today().toordinal()


def hold(spec, name, record_figure):
    if name == "triton":
        pytest.importorskip("triton")
    try:
        share, of_rule = fuzz.check(spec, PATHS[name])
    except Exception as error:
        command = f"PYTHONPATH=. python tests/fuzz.py {name} '{json.dumps(spec)}'"
        pytest.fail(f"{type(error).__name__}: {error}\n{command}", pytrace=False)
    record_figure("G1", f"largest share of 2 error_bound, {name}, {spec['dtype']}", share)
    if of_rule is not None:
        record_figure("G1", f"largest share of twice eager, {name}, {spec['dtype']}", of_rule)


@pytest.mark.parametrize("failed", CORPUS, ids=lambda failed: f"{failed['path']}-{failed['spec']['op']}")
def test_what_has_failed_once(failed, record_figure):
    hold(failed["spec"], failed["path"], record_figure)


@pytest.mark.parametrize("name", PATHS)
@pytest.mark.parametrize("dtype", fuzz.DTYPES)
@pytest.mark.parametrize("op", OPS)
def test_random_calls(op, dtype, name, record_figure):
    if name == "triton" and dtype == "bfloat16":
        pytest.skip("the Triton interpreter computes in float32 and float16 only")
    fixed = range(CALLS[name])
    rotating = range(10**6 + 10 * TODAY, 10**6 + 10 * TODAY + -(-CALLS[name] // 10))
    for seed in (*fixed, *rotating):
        hold(fuzz.draw(op, dtype, seed), name, record_figure)
