"""What the README shows runs: its Python, and its commands, with fewer steps of training."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch

README = (Path(__file__).parent.parent / "README.md").read_text()
PYTHON = re.search(r"```python\n(import torch.*?)```", README, re.DOTALL)[1]
WITHOUT_END = re.search(r"```python\n(from memformer_kernels import stream.*?)```", README, re.DOTALL)[1]
MANY_CLIENTS = re.search(r"```python\n(from memformer_kernels import StreamPool.*?)```", README, re.DOTALL)[1]
COMMANDS = re.findall(r"^memformer-kernels ([^#\n]*)", README, re.MULTILINE)


def test_the_ten_lines_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = {}
    exec(PYTHON, names)
    assert names["more"].shape == (8, 50)
    assert all(p.grad is not None for p in names["model"].parameters())
    exec(WITHOUT_END, names)
    assert names["nats"].shape == names["text"].shape and names["more"].shape == (8, 50)
    exec(MANY_CLIENTS, names)
    assert names["pool"].tokens_read(names["a"]) == names["text"].shape[1] and len(names["nats_b"]) == 7


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("readme")
    (folder / "my_texts").mkdir()
    (folder / "my_texts" / "notes.txt").write_text("to be or not to be, that is the question\n" * 100)
    return folder


def test_the_readme_names_every_command():
    commands = {"doctor", "check", "train", "generate", "stream", "bench", "tune"}
    assert {command.split()[0] for command in COMMANDS} == commands


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_of_the_readme_runs(command, folder):
    if torch.cuda.is_available() and command.startswith(("bench", "tune")):
        pytest.skip("takes minutes on a GPU")
    arguments = [sys.executable, "-m", "memformer_kernels.cli", *shlex.split(command)]
    if arguments[3] == "train":
        arguments += ["--steps", "10"]
    if arguments[3:] == ["train", "--compare", "--steps", "10"]:
        arguments.insert(4, "my_texts")  # in place of the standard library, whose validation takes a minute
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(arguments, cwd=folder, env=environment, capture_output=True, timeout=300)
    if arguments[3] == "tune":
        assert done.returncode == 1 and b"tune: needs a CUDA device" in done.stderr
    else:
        assert done.returncode == 0, done.stderr.decode()
        assert done.stdout
