"""Wall time of each op of the suite, for pytest-benchmark to save and compare. On a GPU only:

    pytest benchmarks/test_regressions.py --benchmark-autosave
    pytest benchmarks/test_regressions.py --benchmark-compare --benchmark-compare-fail=median:10%

A round is one call and the wait for the device, so small shapes show the launch: `memformer-kernels bench` has the
device times. The default run of pytest collects tests/ alone.
"""

import functools

import pytest
import torch

pytest.importorskip("pytest_benchmark", reason="needs pytest-benchmark: pip install 'memformer-kernels[bench]'")

from memformer_kernels.benchmarking import inputs, suite
from memformer_kernels.benchmarking.peers import compile_afresh, ours
from memformer_kernels.benchmarking.suite import BACKWARD, FORWARD, NO_BIAS

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU: a time on a CPU says nothing of a kernel"),
]
SUITE = suite.load()
ROWS = [(shape, which) for shape, passes in SUITE.select() for which in passes]


@pytest.mark.parametrize(
    ("shape", "which"), ROWS, ids=[f"{s.op}-{which}-{s.name}".replace(" ", "_") for s, which in ROWS]
)
def test_regression(benchmark, shape, which):
    device = torch.device("cuda")
    case, grad = inputs.make_input(
        shape, torch.bfloat16, device, layout="contiguous", temperature=SUITE.temperature, seed=0
    )
    if which == NO_BIAS:
        case = inputs.without_bias(case)
    if which not in (FORWARD, NO_BIAS):
        case = case.map(lambda t: t.detach().requires_grad_())
    function = ours(shape.op, device).make(shape, device, compile_afresh)
    call = functools.partial(function, **case.tensors, **case.options)
    if which == BACKWARD:
        leaves = tuple(case.tensors.values())
        call = functools.partial(torch.autograd.grad, call(), leaves, grad, retain_graph=True)

    def call_and_wait():
        call()
        torch.cuda.synchronize()

    benchmark.group = f"{shape.op} {which}"
    benchmark.pedantic(call_and_wait, rounds=50, warmup_rounds=5)
