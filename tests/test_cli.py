"""The command line as a user meets it: real processes, exit codes, one line for every mistake."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import typer
from doc_pages import check_command

from memformer_kernels.cli import build as build_command
from memformer_kernels.cli import main
from memformer_kernels.cli.app import app
from memformer_kernels.cli.train import DEFAULTS

ROOT = Path(__file__).parent.parent
COMMAND = [sys.executable, "-m", "memformer_kernels.cli"]
SMALL = [
    "--steps",
    "6",
    "--batch",
    "4",
    "--horizons",
    "2",
    "--segment-length",
    "8",
    "--slots",
    "4",
    "--width",
    "16",
    "--heads",
    "2",
    "--layers",
    "1",
]


def start(*arguments, **options):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "120", "NO_COLOR": "1"} | options.pop("env", {})
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, stdin=subprocess.PIPE)
    return subprocess.Popen([*COMMAND, *map(str, arguments)], env=environment, **pipes, **options)


def call(*arguments, stdin=b"", **options):
    process = start(*arguments, **options)
    out, err = process.communicate(stdin, timeout=120)
    return process.returncode, out.decode(errors="replace"), err.decode()


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    folder = tmp_path_factory.mktemp("text")
    for i in range(40):
        (folder / f"{i}.txt").write_text(f"{i} and the quick brown fox jumps over {i} lazy dogs\n" * 8)
    return folder


@pytest.fixture(scope="module")
def run(tmp_path_factory, text):
    out = tmp_path_factory.mktemp("runs") / "run"
    code, printed, err = call("train", text, "--out", out, "--compare", *SMALL)
    assert code == 0, err
    return out, printed


GROUP = typer.main.get_command(app)


def test_help_lists_the_commands():
    code, out, _ = call("--help")
    assert code == 0 and all(name in out for name in GROUP.commands)
    assert set(GROUP.commands) == {
        "doctor", "check", "build", "bench", "report", "tune", "train", "generate", "stream", "demo",
    }  # fmt: skip


@pytest.mark.parametrize("name", GROUP.commands)
def test_help_teaches(name, monkeypatch):
    """What a command does in one sentence, what comes of it, and examples that would be taken."""
    monkeypatch.setenv("COLUMNS", "160")
    help_text = GROUP.commands[name].help
    first, *rest = help_text.split("\n\n")
    assert first.endswith(".") and len(first) < 120 and "\n" not in first
    assert len(rest) >= 3, "what it prints, the word Examples, the examples"
    examples = [line.strip() for line in rest[-1].splitlines()]
    assert rest[-2] == "[bold]Examples[/]" and any(f"memformer-kernels {name}" in line for line in examples)
    for line in examples:
        check_command(line)
    assert all(option.help for option in GROUP.commands[name].params), "an option that nothing is said about"


def test_help_of_train_tells_what_runs_unless_told():
    helps = {option.name: option.help for option in GROUP.commands["train"].params}
    for task, (config, settings) in DEFAULTS.items():
        for name, value in (vars(config) | vars(settings)).items():
            if name in helps and type(value) in (int, float, tuple) and value != ():
                shown = ",".join(f"{v:g}" for v in (value if type(value) is tuple else (value,)))
                assert re.search(rf"(?i)({task}:|;) {re.escape(shown)}\b", helps[name]), (task, name, shown)


def test_doctor_says_what_runs_and_why_the_rest_does_not():
    code, out, _ = call("doctor")
    assert code == 0
    assert "memory_write   eager   runs" in out
    assert "compiled module:" in out and "torch " in out
    code, out, err = call("doctor", "--json", "-")
    assert code == 0 and err == ""
    found = json.loads(out)
    assert found["backends"]["memory_read"]["eager"] is None and "cuda" in found["backends"]["memory_read"]


def test_doctor_needs_nothing_but_torch(tmp_path):
    for package in ("typer", "rich", "matplotlib", "safetensors", "numpy", "triton"):
        (tmp_path / f"{package}.py").write_text("raise ModuleNotFoundError('not installed')")
    code, out, err = call("doctor", env={"PYTHONPATH": f"{tmp_path}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"})
    assert code == 0, err
    assert "memory_read    eager   runs" in out
    code, _, err = call("train", env={"PYTHONPATH": f"{tmp_path}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"})
    assert code == 2 and "pip install 'memformer-kernels[cli]'" in err


def test_check_passes_and_writes_its_figures(tmp_path):
    code, out, err = call("check", "--device", "cpu", "--json", tmp_path / "check.json")
    assert code == 0, err
    rows = json.loads((tmp_path / "check.json").read_text())["rows"]
    assert {r["op"] for r in rows} == {"memory_read", "memory_write", "memory_forget"} and all(r["ok"] for r in rows)


def test_check_takes_shapes_of_ones_own():
    sizes = ("B=1 H=2 M=5 L=7 D=16", "B=3 H=1 M=1 L=2 D=8")
    code, out, err = call("check", "--device", "cpu", "--shape", sizes[0], "--shape", sizes[1], "--json", "-")
    assert code == 0, err
    rows = json.loads(out)["rows"]
    assert {r["sizes"] for r in rows} == set(sizes) and len(rows) == 18
    assert all(f"{text} on cpu" in err for text in sizes)


def test_check_fails_above_the_limit(monkeypatch, tmp_path):
    monkeypatch.setattr("memformer_kernels.cli.check.limit", lambda dtype: 1e-9)
    monkeypatch.setattr(sys, "argv", ["memformer-kernels", "check", "--device", "cpu"])
    with pytest.raises(SystemExit) as exit:
        main()
    assert exit.value.code == 1


def test_compare_fails_as_scripts_need_it(tmp_path):
    before = ROOT / "benchmarks" / "results" / "memory_forget_bench_h200.json"
    after = tmp_path / "after.json"
    content = json.loads(before.read_text())
    content["rows"][0]["results"]["ours"]["ms"] *= 1.1
    after.write_text(json.dumps(content))
    assert call("bench", "--compare", before, after)[0] == 0
    assert call("bench", "--compare", before, after, "--fail-above", 1.2)[0] == 0
    code, out, _ = call("bench", "--compare", before, after, "--fail-above", 1.05, "--plot", tmp_path / "c.png")
    assert code == 1 and "worst 1.100" in out and (tmp_path / "c.png").stat().st_size > 1000


@pytest.mark.parametrize(
    ("script", "says"),
    [
        ("import sys; sys.exit('setup.py: MEMFORMER_KERNELS_CUDA is 1, but no nvcc on PATH')", "build: MEMFORMER_K"),
        (None, "holds no sources of the kernels"),
    ],
)
def test_build_says_what_is_missing(script, says, tmp_path, monkeypatch, capsys):
    if script is not None:
        (tmp_path / "setup.py").write_text(script)
        (tmp_path / "csrc").mkdir()
    monkeypatch.setattr(build_command, "TREE", tmp_path)
    monkeypatch.setattr(sys, "argv", ["memformer-kernels", "build"])
    with pytest.raises(SystemExit) as exit:
        main()
    assert exit.value.code == 1 and says in capsys.readouterr().err


def test_train_compares_with_the_twin_and_draws(run):
    out, printed = run
    assert "twin trained without memory" in printed and "with memory" in printed
    for name in (
        "metrics.jsonl",
        "loss.png",
        "checkpoint.safetensors",
        "model.safetensors",
        "config.json",
        "twin/metrics.jsonl",
    ):
        assert (out / name).stat().st_size > 0


def test_generate_continues_a_prompt_of_any_length(run):
    out, _ = run
    code, made, err = call("generate", out, "--prompt", "the quick", "--length", 50, "--seed", 3)
    assert code == 0, err
    assert made.startswith("the quick") and len(made.encode(errors="replace")) >= 50
    again = call("generate", out, "--prompt", "-", "--length", 50, "--seed", 3, stdin=b"the quick")
    assert again[1] == made
    code, _, err = call("generate", out, "--prompt", "")
    assert code == 1 and "at least one byte" in err


def test_a_resumed_run_takes_its_settings_from_its_folder(run, text):
    out, _ = run
    code, _, err = call("train", text, "--out", out, *SMALL)
    assert code == 1 and "holds a run already; --resume goes on" in err
    code, _, err = call("train", "--out", out, "--resume", "--steps", "9")
    assert code == 2 and "leave it out" in err
    code, said, _ = call("train", "--out", out, "--resume", "--json", "-")
    assert code == 0 and set(json.loads(said)) == {"run", "unit", "memory", "reset"}


@pytest.mark.guarantee("G17")
def test_ctrl_c_saves_and_resume_ends_where_the_whole_run_does(tmp_path, text):
    settings = [*SMALL[2:], "--steps", "120"]
    assert call("train", text, "--out", tmp_path / "whole", *settings)[0] == 0
    out = tmp_path / "stopped"
    process = start("train", text, "--out", out, *settings)
    while process.poll() is None and not (out / "metrics.jsonl").exists():
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert "saved after step" in err.decode() and "--resume" in err.decode()
    assert call("train", "--out", out, "--resume")[0] == 0
    assert (out / "model.safetensors").read_bytes() == (tmp_path / "whole" / "model.safetensors").read_bytes()


@pytest.mark.parametrize(
    "arguments, code, says",
    [
        (["train", "{absent}"], 1, "no such file or folder"),
        (["train", "{binary}"], 1, "is a binary file"),
        (["train", "{empty}"], 1, "no text found"),
        (["train", "--horizons", "two"], 2, "takes numbers with commas"),
        (["train", "--task", "chess"], 1, "task must be one of text, recall"),
        (["train", "--steps", "0"], 1, "steps must be above 0"),
        (["train", "--compare", "--minutes", "1"], 1, "--compare takes --steps"),
        (["train", "--width", "10", "--heads", "4"], 1, "width must be a multiple of heads"),
        (["train", "--method", "magic"], 1, "method must be one of"),
        (["train", "--device", "tpu"], 2, "no such device"),
        (["train", "--device", "cuda:7"], 2, "GPUs here"),
        (["train", "--device", "meta"], 2, "device must be cpu or a GPU, such as cuda:1, got meta"),
        (["train", "--save-every", "0"], 1, "save-every must be at least 1, got 0"),
        (["train", "--validate-every", "0"], 1, "validate-every must be at least 1, got 0"),
        (["generate", "{run}", "--temperature", "nan"], 1, "temperature must be at least 0, got nan"),
        (["train", "--resume", "--out", "{absent}"], 1, "holds no run to resume"),
        (["train", "--out", "{binary}/run"], 1, "Not a directory"),
        (["train", "--colour"], 2, "No such option"),
        (["generate", "{absent}"], 1, "cannot be read as a configuration"),
        (["generate", "{damaged}"], 1, "damaged"),
        (["generate", "{foreign}"], 1, "must name a model"),
        (["dance"], 2, "No such command"),
        (["check", "--shape", "M=5"], 1, "check: --shape must name B, H, M, L and D"),
        (["bench", "--fail-above", "1.05"], 2, "belongs to --compare"),
        (["bench", "--compare", "{absent}", "{absent}"], 1, "No such file"),
        (["report", "{absent}"], 1, "is not a folder"),
        (["report", "{empty}"], 1, "holds no JSON file of figures"),
    ],
)
def test_a_mistake_is_one_line_that_says_what_to_do(arguments, code, says, tmp_path, run, monkeypatch, capsys):
    places = {name: tmp_path / name for name in ("absent", "binary", "empty", "damaged", "foreign")} | {"run": run[0]}
    places["binary"].write_bytes(b"\0\1\2")
    places["empty"].mkdir()
    places["damaged"].mkdir()
    places["foreign"].mkdir()
    weights = bytearray((run[0] / "model.safetensors").read_bytes())
    weights[-5] ^= 1
    (places["damaged"] / "model.safetensors").write_bytes(weights)
    (places["damaged"] / "config.json").write_bytes((run[0] / "config.json").read_bytes())
    (places["foreign"] / "config.json").write_text("[1, 2]")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["memformer-kernels", *(a.format(**places) for a in arguments)])
    monkeypatch.setenv("COLUMNS", "200")
    with pytest.raises(SystemExit) as exit:  # anything else would be a traceback
        main()
    err = capsys.readouterr().err
    assert exit.value.code == code, err
    assert says in err, err
    assert not (tmp_path / "runs").exists() or not list((tmp_path / "runs").rglob("*.safetensors"))


BUFFERED = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
@pytest.mark.parametrize("command", ["generate", "doctor"], ids=["as it is written", "at the end"])
def test_a_full_disk_is_one_line(run, command):
    arguments = [command, str(run[0]), "--length", "5"] if command == "generate" else [command]
    with open("/dev/full", "wb") as full:
        process = subprocess.run([*COMMAND, *arguments], stdout=full, stderr=subprocess.PIPE, env=BUFFERED, timeout=60)
    assert process.returncode == 1
    assert process.stderr.splitlines() == [b"error: [Errno 28] No space left on device"]


def test_a_reader_that_has_seen_enough_gets_no_error():
    reader, writer = os.pipe()
    os.close(reader)
    process = subprocess.run([*COMMAND, "doctor"], stdout=writer, stderr=subprocess.PIPE, env=BUFFERED, timeout=60)
    os.close(writer)
    assert (process.returncode, process.stderr) == (1, b"")
