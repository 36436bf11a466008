"""Which tests prove which guarantee of the numerics contract, and the figures that they record.

A test says `@pytest.mark.guarantee("G4")`, and `record_figure("G1", "worst share of the bound", 0.31)` keeps the
largest figure of that name. `pytest --contract FILE` writes both; `generated_tables.py` makes tables of it.
"""

import json
import platform
import sys
from pathlib import Path

import pytest
import torch

PROMISES = {
    "G1": "Accuracy: every element of every output and gradient is within 2 `error_bound` of the float64 answer; fp16 "
    "and bf16 on benign inputs also within twice eager's error plus u max abs(y)",
    "G2": "float32 is IEEE float32, no TF32 unless asked for; accumulation in float32 or wider",
    "G3": "Exact answers: nothing visible keeps the slot, or reads 0; a saturated softmax gives the winner's value; "
    "values of 1 give 1 to 2u",
    "G4": "Masked, padded and between-stride data never matter, NaN included: no bit changes, gradient exactly 0",
    "G5": "Visible NaN and Inf reach the rows that see them and no other; right for logits up to 1e30",
    "G6": "Forgetting is finite for every finite input; a zero vector gives 0, with gradient g / eps",
    "G7": "The same bits from run to run, forward and backward, without float atomics",
    "G8": "A row has the same bits at any batch size, place and with any neighbours",
    "G9": "No access outside the tensors given; inputs and incoming gradients are never modified",
    "G10": "Any dimension from 0; offsets past 2^31 elements; B H past 65,535; D up to 256, more raises",
    "G11": "Any strides, offsets, and strides of the incoming gradient",
    "G12": "The tensors' device and current stream, no synchronisation, capturable as a graph; mixed devices raise",
    "G13": "Calls from many threads are safe, with cold caches too",
    "G14": "Errors before launch in one form; double backward raises; a named backend runs or raises",
    "G15": "`torch.compile` in one graph, equal to eager; `opcheck` passes",
    "G16": "Memory replay gives the gradients of full back-propagation, as one autograd node, all or nothing",
    "G17": "A damaged state file never loads; resuming is bit-exact",
    "G18": "One stream's memory never reaches another",
}


class Contract:
    """The pytest plugin: outcomes and figures by guarantee."""

    def __init__(self, file: str | None):
        self.file = file
        self.outcomes = {name: {"passed": 0, "failed": 0, "skipped": 0, "figures": {}} for name in PROMISES}

    def pytest_collection_modifyitems(self, items):
        for item in items:
            names = [name for marker in item.iter_markers("guarantee") for name in marker.args]
            unknown = set(names) - set(PROMISES)
            if unknown:
                raise pytest.UsageError(f"{item.nodeid}: no such guarantee: {', '.join(sorted(unknown))}")
            item.user_properties += [("guarantee", name) for name in dict.fromkeys(names)]

    def pytest_runtest_logreport(self, report):
        """Of tests in other processes too: their reports bring the properties along."""
        if report.when == "call" or not report.passed:
            for name in (value for kind, value in report.user_properties if kind == "guarantee"):
                self.outcomes[name][report.outcome] += 1
        for guarantee, figure, value in (v for kind, v in report.user_properties if kind == "figure"):
            figures = self.outcomes[guarantee]["figures"]  # NaN is larger than any number
            figures[figure] = value if value != value else max(value, figures.get(figure, value))

    def pytest_sessionfinish(self, session):
        if self.file and not hasattr(session.config, "workerinput"):
            versions = {"torch": torch.__version__, "python": platform.python_version()}
            report = {"command": " ".join(["pytest", *sys.argv[1:]]), **versions, "guarantees": self.outcomes}
            Path(self.file).write_text(json.dumps(report, indent=2) + "\n")


def pytest_addoption(parser):
    parser.addoption("--contract", metavar="FILE", help="write which guarantees were proven, with their figures")


def pytest_configure(config):
    config.pluginmanager.register(Contract(config.getoption("--contract")), "contract")


@pytest.fixture
def record_figure(request):
    """`record_figure(guarantee, name, value)`: for the contract's report, which keeps the largest value."""
    test = request.node

    def record(guarantee: str, figure: str, value: float) -> None:
        assert ("guarantee", guarantee) in test.user_properties, f"{test.nodeid} is not marked as proof of {guarantee}"
        test.user_properties.append(("figure", (guarantee, figure, float(value))))

    return record
