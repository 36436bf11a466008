"""The examples run, as their users run them, and the benchmark beside one checks what it can on a CPU."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent


def run(path, *arguments):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, ROOT / path, *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_accelerate_memformer():
    pytest.importorskip("memformer")
    said = run("examples/accelerate_memformer.py")
    report, results = said.split("\n\n")
    assert report in (ROOT / "docs" / "accelerate.md").read_text(), "docs/accelerate.md shows another report"
    errors = [float(number) for number in re.findall(r"by (?:at most )?(\d+e-\d+)", results)]
    assert len(errors) == 2 and max(errors) < 1e-4
    assert results.endswith("restored: memformer.memformer.Memformer\n")


def test_train_on_your_text(tmp_path):
    (tmp_path / "a.txt").write_text("to be or not to be, that is the question\n" * 100)
    said = run("examples/train_on_your_text.py", tmp_path / "a.txt", "--steps", "30")
    (loss,) = map(float, re.findall(r"step 30: (\d+\.\d+) nats a byte", said))
    assert loss < 3.5, said  # of 5.5 to begin with
    assert said.splitlines()[1].startswith("to be or not to be") or "question" in said


def test_two_ranks_end_with_the_same_weights():
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*command, ROOT / "examples/two_gpus.py"], env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert re.fullmatch(r"2 ranks on cpu, loss \d\.\d+; weights equal\n", done.stdout), done.stdout


@pytest.mark.parametrize("example", sorted(path.name for path in (ROOT / "examples").glob("*.py")))
def test_an_example_is_short_and_tested(example):
    source = (ROOT / "examples" / example).read_text()
    code = source.split('"""', 2)[2]
    assert len([line for line in code.splitlines() if line.strip()]) <= 42
    assert any(example in path.read_text() for path in (ROOT / "tests").glob("test_*.py"))


def test_the_benchmark_checks_equality_on_a_cpu(tmp_path):
    pytest.importorskip("memformer")
    if torch.cuda.is_available():
        pytest.skip("takes minutes on a GPU")
    said = run("benchmarks/accelerate_memformer.py", "--out", tmp_path / "figures.json")
    assert said.startswith("a CPU: nothing is measured, equality is checked\n")
    (tiny,) = json.loads((tmp_path / "figures.json").read_text())["shapes"].values()
    assert tiny["rows"] == [] and all(errors["equal"] for errors in tiny["equality"].values())
    assert max(tiny["equality"]["float64"]["accelerated"].values()) < 1e-12
