"""What `benchmarks/rollout.py` compares with: plain rollouts whose methods agree."""

import dataclasses
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


@pytest.fixture(autouse=True)
def _importable(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))


@pytest.mark.parametrize("decoder", [0, 2], ids=["decoder only", "encoder-decoder"])
def test_plain_methods_have_the_same_gradients(decoder):
    import plain_memformer as plain

    torch.manual_seed(0)
    sizes = dict(vocabulary=16, width=16, heads=2, slots=4)
    model = plain.PlainMemformer(**sizes, encoder=1, decoder=decoder) if decoder else None
    model = (model or plain.PlainMemformerLM(**sizes, layers=2)).double()
    segments = [tuple(torch.randint(16, (2, 8)) for _ in range(3 if decoder else 2)) for _ in range(4)]
    found = {}
    for name, method in plain.METHODS.items():
        model.zero_grad()
        method(model, segments, model.initial_memory(2))
        found[name] = [p.grad.clone() for p in model.parameters()]
    for name in ("checkpoint", "replay"):
        for grad, want in zip(found[name], found["bptt"], strict=True):
            torch.testing.assert_close(grad, want, rtol=1e-12, atol=1e-15)


def test_what_is_measured_runs_in_a_process_of_its_own():
    import rollout

    assert len({os.getpid(), rollout.apart(os.getpid), rollout.apart(os.getpid)}) == 3
    with pytest.raises(RuntimeError, match="process"):
        rollout.apart(os.abort)


def test_rollouts_can_be_handed_to_a_process():
    import rollout

    shape = rollout.SHAPES["small"]
    for make in rollout.rollouts(shape).values():
        assert pickle.loads(pickle.dumps(make)).args[0] in (shape, *recomputing(shape))


def recomputing(shape):
    return (dataclasses.replace(shape, recompute=level) for level in ("none", "all"))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there it would measure")
def test_without_a_gpu_it_measures_nothing():
    environment = {**os.environ, "PYTHONPATH": str(BENCHMARKS.parent)}
    command = [sys.executable, BENCHMARKS / "rollout.py"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 1 and "needs a GPU" in done.stderr
