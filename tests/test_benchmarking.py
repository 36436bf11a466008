"""The benchmark: its suite and floors, that every peer computes the op, and the run with a clock that is made up."""

import contextlib
import csv
import itertools
import json
import math
import os
import re
import subprocess
import sys
import warnings
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("rich")

from memformer_kernels import testing
from memformer_kernels.benchmarking import inputs, measure, peers, plots, report, runner, suite, targets, timing
from memformer_kernels.benchmarking.peers import OURS, PEERS
from memformer_kernels.benchmarking.suite import BACKWARD, FORWARD, NO_BIAS, SAVING, Shape, Work, work
from memformer_kernels.cli import bench as bench_command
from memformer_kernels.cli.app import app

CPU = torch.device("cpu")
READ = Shape("memory_read", "small", B=3, L=17, M=5, H=2, D=8)
WRITE = Shape("memory_write", "small", B=3, L=17, M=5, H=2, D=8)
FORGET = Shape("memory_forget", "small", B=3, M=5, D=16)
SMALL = {shape.op: shape for shape in (READ, WRITE, FORGET)}

# The floors that performance targets were set with, in milliseconds: 4.25 TB/s and 700 TFLOP/s.
TABLE = {
    "memory_read": {
        "B64 L512 M16 H8 D64": (0.016, 0.033),
        "B64 L512 M64 H8 D64": (0.018, 0.036),
        "B64 L512 M128 H8 D64": (0.020, 0.040),
        "B64 L512 M512 H8 D64": (0.049, 0.123),
        "B32 L1024 M1024 H16 D64": (0.196, 0.490),
        "B8 L4096 M128 H16 D128": (0.065, 0.130),
        "B8 L4096 M1024 H16 D128": (0.392, 0.980),
    },
    "memory_write": {
        "B64 L512 M64 H8 D64": (0.020, 0.040),
        "B64 L512 M128 H8 D64": (0.024, 0.047),
        "B32 L1024 M1024 H16 D64": (0.196, 0.490),
        "B8 L4096 M128 H16 D128": (0.067, 0.134),
        "B1 L65536 M128 H16 D64": (0.063, 0.127),
        "B1 L8192 M32 H16 D64": (0.008, 0.016),
    },
    "memory_forget": {"B64 M1024 C1024": (0.063, 0.095)},
}


def small_input(op, layout="contiguous", dtype=torch.float32):
    return inputs.make_input(SMALL[op], dtype, CPU, layout=layout, temperature=0.5, seed=0)


# The suite.


def test_the_suite_has_the_shapes_and_passes():
    chosen = suite.load().select()
    for op, rows in TABLE.items():
        assert [s.name for s, _ in chosen if (s.op, s.group) == (op, "table")] == list(rows)
    odd = {s.name for s, _ in chosen if s.group == "odd" and s.op == "memory_write"}
    assert odd == {
        "B64 L1000 M96 H12 D80",
        "B64 L1000 M96 H12 D96",
        "B8 L2048 M2048 H16 D64",
        "B1 L4096 M128 H16 D64",
    }
    assert all(passes == suite.PASSES[s.op] for s, passes in chosen)


def test_a_choice_is_made_by_name():
    loaded = suite.load()
    assert [s.name for s, _ in loaded.select("read", "backward", "M1024")] == [
        "B32 L1024 M1024 H16 D64",
        "B8 L4096 M1024 H16 D128",
    ]
    assert {p for _, passes in loaded.select("write", "without") for p in passes} == {NO_BIAS}
    with pytest.raises(ValueError, match="nothing in the suite has op 'read', pass 'without'"):
        loaded.select("read", "without")


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ("B = 64, L = 512, M = 16,", "B = 64, L = 0, M = 16,", "a whole number above 0"),
        ("B = 64, L = 512, M = 16,", "B = 64, M = 16,", "must have B, L, M, H, D"),
        ("temperature = 0.5", "", "lacks 'temperature'"),
        ("temperature = 0.5", "temperature =", "cannot be read as TOML"),
        ("[memory_read]", "[memory_read", "cannot be read as TOML"),
        ("copy = 4.25e12", "copy = 'fast'", "could not convert"),
    ],
)
def test_a_broken_suite_is_one_line(old, new, says, tmp_path):
    path = tmp_path / "suite.toml"
    path.write_text(suite.DEFAULT.read_text().replace(old, new, 1))
    with pytest.raises(ValueError, match=says) as caught:
        suite.load(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value).strip()


def test_shapes_of_ones_own():
    text = "L=9, B=2 H = 3 M=4 D=8"
    chosen = suite.load().of_shapes([text, "B=1 H=1 M=1 L=1 D=16"]).select("memory", "backward")
    assert [(s.op, s.name) for s, _ in chosen] == [
        ("memory_read", "B2 L9 M4 H3 D8"),
        ("memory_read", "B1 L1 M1 H1 D16"),
        ("memory_write", "B2 L9 M4 H3 D8"),
        ("memory_write", "B1 L1 M1 H1 D16"),
        ("memory_forget", "B2 M4 C24"),
        ("memory_forget", "B1 M1 C16"),
    ]
    assert {s.group for s, _ in chosen} == {text, "B=1 H=1 M=1 L=1 D=16"}


@pytest.mark.parametrize(
    "text", ["", "B=2 H=3 M=4 L=9", "B=2 H=3 M=4 L=9 D=0", "B=2 H=3 M=4 L=9 D=8 B=2", "B=2 H=3 M=4 L=9 D=8 X", "B=-2"]
)
def test_a_wrong_shape_is_one_line(text):
    with pytest.raises(ValueError, match="^bench: --shape must name B, H, M, L and D") as caught:
        suite.load().of_shapes([text])
    assert repr(text) in str(caught.value) and "\n" not in str(caught.value)


def test_work_by_hand():
    # B 3, L 17, M 5, H 2, D 8: a [B, H, L, D] has 816 elements, a [B, H, M, D] 240, a [M, C] 80; a product 8160 FLOP
    assert work(READ, FORWARD, 2) == Work((816 + 816 + 240 + 240) * 2, (816 + 816 + 240 + 240) * 2, 2 * 8160)
    assert work(READ, SAVING, 2) == work(READ, FORWARD, 2)
    # query, output, grad, grad_query; key, value and their gradients
    assert work(READ, BACKWARD, 2) == Work((4 * 816 + 4 * 240) * 2, (3 * 816 + 4 * 240) * 2, 5 * 8160)
    # key, value; query, own_key, slots, output; bias
    assert work(WRITE, FORWARD, 4) == Work((2 * 816 + 4 * 240 + 80) * 4, (2 * 816 + 4 * 240 + 80) * 4, 2 * 8160)
    assert work(WRITE, NO_BIAS, 4).bytes == (2 * 816 + 4 * 240) * 4
    assert work(WRITE, BACKWARD, 2) == Work(
        (4 * 816 + 8 * 240 + 2 * 80) * 2, (4 * 816 + 7 * 240 + 2 * 80) * 2, 5 * 8160
    )
    assert work(FORGET, FORWARD, 2) == Work((2 * 240 + 80) * 2, (2 * 240 + 80) * 2, 0)
    assert work(FORGET, BACKWARD, 2).bytes == (3 * 240 + 2 * 80) * 2


@pytest.mark.parametrize("op", TABLE)
def test_floors_are_those_of_the_targets(op):
    loaded = suite.load()
    rates = suite.Rates(loaded.rates.copy, {"bfloat16": 700e12})
    for shape in (s for s in loaded.shapes if s.op == op and s.group == "table"):
        for which, expected in zip((FORWARD, BACKWARD), TABLE[op][shape.name], strict=True):
            needed = work(shape, which, 2)
            floor = rates.floor(needed, torch.bfloat16)
            assert floor["floor_ms"] == pytest.approx(expected, rel=0.05), (shape, which)
            if floor["bound"] == "memory":  # the suite's own rate is 790 TFLOP/s, and these do not depend on it
                assert loaded.rates.floor(needed, torch.bfloat16)["floor_ms"] == pytest.approx(expected, rel=0.05)


# The peers.


ALL = [(op, peer) for op, some in PEERS.items() for peer in some]
NAMES = [f"{op}-{peer.name}" for op, peer in ALL]


@pytest.mark.parametrize("layout", inputs.LAYOUTS)
@pytest.mark.parametrize(("op", "peer"), ALL, ids=NAMES)
def test_a_peer_computes_the_op(op, peer, layout):
    forward, gradients = peer.cpu
    if not forward:
        pytest.skip(f"{peer.name} needs a GPU")
    case, grad = small_input(op, layout)
    expected = testing.oracle(case, grad)
    function = peer.make(SMALL[op], CPU, peers.not_compiled)
    cases = [case] if op != "memory_write" or NO_BIAS not in peer.passes else [case, inputs.without_bias(case)]
    with peer.context(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # FlexAttention's, that it is not compiled
        for some in cases:
            expected = testing.oracle(some, grad)
            with torch.no_grad():
                output = function(**some.tensors, **some.options)
            assert testing.relative_error(output, expected.output) < 3e-6
            if gradients:
                found = testing.errors(testing.run(some, grad_output=grad, function=function), expected)
                assert max(found.values()) < 3e-6, found


@pytest.mark.parametrize(("op", "peer"), [x for x in ALL if x[1].compiled and x[1].cpu[1]])
def test_a_compiled_peer_is_one_graph_and_its_backward_runs_twice(op, peer):
    torch._dynamo.reset()
    case, grad = small_input(op)
    expected = testing.oracle(case, grad)
    with runner._configured():
        function = peer.make(
            SMALL[op], CPU, lambda f: torch.compile(f, fullgraph=True, dynamic=False, backend="aot_eager")
        )
        leaves = case.map(lambda t: t.detach().requires_grad_())
        output = function(**leaves.tensors, **leaves.options)
        for _ in range(2):
            grads = torch.autograd.grad(output, tuple(leaves.tensors.values()), grad, retain_graph=True)
            found = testing.Result(output.detach(), dict(zip(leaves.tensors, grads, strict=True)))
            assert max(testing.errors(found, expected).values()) < 3e-6


def test_flash_lse_takes_its_gradients_from_the_merged_softmax():
    """Handed the token softmax's own log-sum-exp and output instead, it must be far off."""
    from memformer_kernels.benchmarking import flash_lse

    case, grad = small_input("memory_write")
    expected = testing.oracle(case, grad)
    right = flash_lse._attention_backward

    def wrong(grad, query, key, value, output, lse, rest, scale):
        output, lse, rest = flash_lse._attention(query, key, value, scale)
        return right(grad, query, key, value, output, lse, rest, scale)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(flash_lse, "_attention_backward", wrong)
        function = flash_lse.make(peers.not_compiled)
        found = testing.errors(testing.run(case, grad_output=grad, function=function), expected)
    assert found["grad_key"] > 1e-2 and found["grad_value"] > 1e-2


# The inputs and their answers.


@pytest.mark.parametrize("op", SMALL)
def test_the_reference_in_chunks_is_the_oracle(op, monkeypatch):
    monkeypatch.setattr(inputs, "CHUNK_BYTES", 1)  # a batch row at a time
    case, grad = small_input(op)
    found = testing.errors(inputs.reference(case, grad, SMALL[op]), testing.oracle(case, grad))
    assert max(found.values()) < 1e-13


def test_layouts():
    contiguous, transposed = (small_input("memory_write", layout)[0].tensors for layout in inputs.LAYOUTS)
    for name in ("query", "own_key", "key", "value"):
        assert contiguous[name].is_contiguous()
        assert transposed[name].shape == contiguous[name].shape and transposed[name].transpose(1, 2).is_contiguous()


def test_a_nan_is_an_error():
    a, b = torch.ones(3), torch.ones(3, dtype=torch.float64)
    assert inputs.relative_error(a, b) == 0
    a[1] = math.nan
    assert math.isnan(inputs.relative_error(a, b))


# The run, on a CPU that passes for a GPU. Every call is made, and takes a millisecond.


def one_ms(calls, replays):
    assert len(calls) >= 4 and all(call() is not None for call in calls)
    return timing.Timing(1.0, "graph", len(calls))


@pytest.fixture
def pretend_gpu(monkeypatch):
    properties = SimpleNamespace(name="Pretend GPU", L2_cache_size=1000)
    nothing = {
        "stream": lambda stream: contextlib.nullcontext(),
        "Stream": lambda: None,
        "synchronize": lambda: None,
        "empty_cache": lambda: None,
        "memory_allocated": lambda: 0,
        "get_device_properties": lambda device: properties,
        "current_device": lambda: 0,
    }
    for name, value in nothing.items():
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(runner, "_device", lambda: CPU)
    monkeypatch.setattr(measure, "compile_afresh", peers.not_compiled)
    monkeypatch.setattr(timing, "copy_rate", lambda: 4.25e12)
    monkeypatch.setattr(timing, "device_time", one_ms)
    monkeypatch.setattr(timing, "eager_time", lambda calls, repeats: {"host_us": 10.0, "wall_us": 20.0})
    monkeypatch.setattr(timing, "host_us", lambda call: 12.5 if call() is not None else None)


SETTINGS = measure.Settings(dtype=torch.float32, skip="Flex")


@pytest.fixture
def small_suite():
    return suite.Suite(tuple(SMALL.values()), suite.load().rates, 0.5, dict(B=1, L=4, M=3, H=2, D=8))


def run(small_suite, settings=SETTINGS, **select):
    lines, saved = [], []
    measured = runner.run(
        small_suite, small_suite.select(**select), settings, lines.append, lambda r: saved.append(json.dumps(r))
    )
    return measured, lines, saved


def test_a_run_measures_everything_and_says_so_as_it_goes(pretend_gpu, small_suite):
    measured, lines, saved = run(small_suite)
    assert [(r["op"], r["pass"]) for r in measured["rows"]] == [(op, p) for op in SMALL for p in suite.PASSES[op]]
    assert len(saved) == 4 and measured["stopped"] is None
    for row in measured["rows"]:
        names = [p.name for p in PEERS[row["op"]] if row["pass"] in p.passes and p.name != "FlexAttention"]
        assert list(row["results"]) == [OURS, *names]
        for name, figures in row["results"].items():
            on_cpu = name == OURS or next(p for p in PEERS[row["op"]] if p.name == name).cpu[1]
            assert (figures["ms"] == 1.0) == on_cpu, figures
            assert on_cpu or "Error" in figures["problem"]
        assert row["ratio"] == 1.0 and row["share_of_floor"] == row["floor_ms"] and row["backend"] == "eager"
    results = sum(len(row["results"]) for row in measured["rows"])
    overhead = [(r["op"], r["implementation"], r["forward_us"]) for r in measured["overhead"] if not r["problem"]]
    assert ("memory_write", OURS, 12.5) in overhead and ("memory_write", "eager", 12.5) in overhead
    assert len(lines) == 1 + results + len(measured["overhead"])
    assert "Pretend GPU, copy 4.25 TB/s" in lines[0]


@pytest.mark.parametrize(
    ("op", "mask", "length"), [("memory_read", "slot_mask", "M"), ("memory_write", "token_mask", "L")]
)
def test_hidden_slots_or_tokens_are_hidden_by_a_mask(op, mask, length, pretend_gpu, small_suite):
    case, grad = inputs.make_input(
        SMALL[op], torch.float64, CPU, layout="contiguous", temperature=0.5, seed=0, hidden=0.4
    )
    shown = case.tensors[mask]
    assert shown.shape == (SMALL[op].B, getattr(SMALL[op], length)) and 0 < shown.sum() < shown.numel()
    expected = testing.run(case, "eager", grad).tensors()
    found = inputs.reference(case, grad, SMALL[op]).tensors()
    assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in expected)
    measured, _, _ = run(small_suite, measure.Settings(dtype=torch.float32, hidden=0.4), op=op)
    assert all(list(row["results"]) == [OURS] and row["results"][OURS]["ms"] == 1.0 for row in measured["rows"])
    assert measured["overhead"] and not any(row["problem"] for row in measured["overhead"])
    with pytest.raises(ValueError, match="must be of the same hidden"):
        report.joined(run(small_suite, op=op)[0] | {"command": ""}, measured | {"command": ""})


def test_the_backward_and_the_gradients_are_checked(pretend_gpu, small_suite):
    measured, _, _ = run(small_suite, which="backward", op="write")
    (row,) = measured["rows"]
    assert set(row["results"][OURS]["errors"]) == {
        "output", "grad_query", "grad_own_key", "grad_slots", "grad_key", "grad_value", "grad_bias",
    }  # fmt: skip


def test_ours_runs_on_the_backend_that_is_asked_for(monkeypatch):
    asked = []
    monkeypatch.setattr(peers.memformer_kernels, "memory_read", lambda **arguments: asked.append(arguments["backend"]))
    for device, options in (("cuda", {}), ("cuda", {"backend": "triton"}), ("cpu", {"backend": "triton"})):
        peers.ours("memory_read", torch.device(device), **options).make(None, None, None)(query=None)
    assert asked == ["auto", "triton", "eager"]
    settings = measure.Settings(backend="triton", peers=False)
    monkeypatch.setattr(runner, "_device", lambda: torch.device("cuda"))
    (ours,) = runner._implementations("memory_read", settings)
    ours.make(None, None, None)(query=None)
    assert asked[-1] == "triton" == peers.backend_of_ours(None, "triton")


def test_a_peer_that_is_wrong_or_fails_is_named_and_not_timed(pretend_gpu, small_suite, monkeypatch):
    def fails(slots, bias):
        raise RuntimeError("no kernel\nfor this")

    def does_not_build(*_):
        raise ValueError("not today")

    some = (
        peers._plain("wrong", lambda slots, bias: slots * bias),
        peers._plain("fails", fails),
        peers.Implementation("does not build", does_not_build),
        peers._plain("nan", lambda slots, bias: peers.plain_forget(slots, bias) / 0 * 0),
    )
    monkeypatch.setitem(PEERS, "memory_forget", some)
    measured, lines, _ = run(small_suite, op="forget", which="backward")
    results = measured["rows"][0]["results"]
    assert results["wrong"]["problem"].startswith("wrong: error of") and results["wrong"]["ms"] is None
    assert results["fails"]["problem"] == "RuntimeError: no kernel for this"
    assert results["does not build"]["problem"] == "ValueError: not today"
    assert results["nan"]["problem"].startswith("wrong: error of nan")
    assert results[OURS]["ms"] == 1.0
    assert measured["rows"][0]["best_peer"] is None and measured["rows"][0]["ratio"] is None


def test_a_peer_that_gives_other_bits_each_time_is_marked(pretend_gpu, small_suite, monkeypatch, capsys):
    from rich.console import Console

    turns = itertools.count()

    def other_output(query, key, value):
        return peers.plain_read(query, key, value) + 1e-4 * (next(turns) % 2)

    def other_gradient(query, key, value):
        return peers.plain_read(query, key, value) + (query - query.detach()) * 1e-4 * (next(turns) % 2)

    chosen = (peers._plain("other output", other_output), peers._plain("other gradient", other_gradient))
    monkeypatch.setitem(PEERS, "memory_read", chosen)
    measured, lines, _ = run(small_suite, op="read")
    found = {
        (row["pass"], name): figures["same_bits"]
        for row in measured["rows"]
        for name, figures in row["results"].items()
    }
    for which in suite.PASSES["memory_read"]:  # each held to what it is for
        assert found[which, OURS] is True
        assert found[which, "other output"] is (which == BACKWARD)
        assert found[which, "other gradient"] is (which != BACKWARD)
    assert sum("not the same bits each time" in line for line in lines) == sum(not same for same in found.values())
    report.print_report(measured, [], Console(width=150))
    out = capsys.readouterr().out
    assert "~: memory_read backward B3 L17 M5 H2 D8, other gradient: not the same bits each time" in out
    assert re.search(r"\bforward .* other output~ ", out)


def test_the_deterministic_mode_is_on_for_the_run_alone(pretend_gpu, small_suite, monkeypatch):
    seen = set()

    def looks(query, key, value):
        seen.add((torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory))
        return peers.plain_read(query, key, value)

    monkeypatch.setitem(PEERS, "memory_read", (peers._plain("looks", looks),))
    for deterministic in (False, True):
        settings = measure.Settings(dtype=torch.float32, deterministic=deterministic)
        measured, _, _ = run(small_suite, settings, op="read")
        assert seen == {(deterministic, False)} and measured["deterministic"] is deterministic
        assert not torch.are_deterministic_algorithms_enabled()
        assert torch.utils.deterministic.fill_uninitialized_memory
        seen.clear()
    with pytest.raises(ValueError, match=r"must be of the same deterministic \(True\)"):
        report.joined(measured | {"command": ""}, run(small_suite, op="read")[0] | {"command": ""})


def test_a_lost_device_ends_the_run_with_what_there_is(pretend_gpu, small_suite, monkeypatch):
    def breaks(slots, bias):
        def lost():
            raise RuntimeError("illegal address")

        monkeypatch.setattr(torch.cuda, "synchronize", lost)
        raise RuntimeError("illegal address")

    monkeypatch.setitem(PEERS, "memory_forget", (peers._plain("breaks", breaks),))
    measured, _, saved = run(small_suite, op="forget")
    assert "illegal address" in measured["stopped"]
    assert measured["rows"][0]["results"][OURS]["ms"] == 1.0 and json.loads(saved[-1])["stopped"]


def test_few_sets_where_calls_keep_much(monkeypatch):
    held = iter(range(0, 1000, 7))
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: next(held) * 1e9)
    case, grad = small_input("memory_forget")
    assert len(measure._calls(peers.plain_forget, BACKWARD, [(case, grad)] * 4)) == 2
    assert len(measure._calls(peers.plain_forget, FORWARD, [(case, grad)] * 4)) == 4


def test_timing_with_a_made_up_device(monkeypatch):
    """A graph of calls over every set, its replays divided by them; events where no graph can be captured."""
    now = [0.0]
    calls_made = []

    class Event:
        def __init__(self, enable_timing):
            pass

        def record(self):
            self.at = now[0]

        def elapsed_time(self, other):
            return other.at - self.at

    class Graph:
        def replay(self):
            now[0] += 0.1 * captured[0]

    captured = [0]

    @contextlib.contextmanager
    def graph(graph, stream):
        before, start = now[0], len(calls_made)
        yield
        captured[0] = len(calls_made) - start
        now[0] = before

    def call():
        calls_made.append(1)
        now[0] += 0.1
        return object()

    for name, value in {
        "Event": Event,
        "CUDAGraph": Graph,
        "graph": graph,
        "current_stream": lambda: None,
        "synchronize": lambda: None,
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    timed = timing.device_time([call] * 5, replays=20)
    assert timed.method == "graph" and timed.ms == pytest.approx(0.1) and timed.calls == captured[0] == 40

    def refuses(graph, stream):
        raise RuntimeError("capture not permitted")

    monkeypatch.setattr(torch.cuda, "graph", refuses)
    timed = timing.device_time([call] * 5, replays=20)
    assert timed.method == "events" and timed.ms == pytest.approx(0.1) and "not permitted" in timed.note
    assert timing.eager_time([call] * 5, repeats=1).keys() == {"host_us", "wall_us"}
    assert timing.host_us(call, count=2, repeats=1) >= 0


# What is left behind.


@pytest.fixture
def measured(pretend_gpu, small_suite):
    return run(small_suite)[0]


def test_table_summary_and_files(measured, tmp_path, capsys):
    from rich.console import Console

    summary = targets.summarise(measured)
    report.print_report(measured, summary, Console(width=150))
    out = capsys.readouterr().out
    assert "memory_read: device milliseconds a call" in out and "B3 L17 M5 H2 D8" in out
    assert "not timed: memory_read forward B3 L17 M5 H2 D8, cuDNN: " in out
    assert "mean ratio to flash + lse 1 (target 2.5)" in out and "MISSED" in out
    assert "most over without 1 (target 1.05)" in out

    report.write_json({**measured, "summary": summary}, tmp_path)
    assert json.loads((tmp_path / "bench.json").read_text())["rows"] == measured["rows"]
    report.write_csv(measured, tmp_path)
    with open(tmp_path / "bench.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == sum(len(row["results"]) for row in measured["rows"])
    assert rows[0]["implementation"] == OURS and float(rows[0]["ms"]) == 1.0 and rows[0]["note"] == ""

    pytest.importorskip("matplotlib")
    drawn = plots.draw(measured, tmp_path)
    assert [path.name for path in drawn] == ["memory_read.png", "memory_write.png", "memory_forget.png"]
    assert all(path.stat().st_size > 10_000 for path in drawn)


def test_a_target_is_met_missed_or_open():
    def rows(*pairs):
        made = []
        for mine, best in pairs:
            results = {OURS: {"ms": mine}, "cuDNN": {"ms": best}}
            row = {"op": "memory_read", "pass": BACKWARD, "group": "table", "floor_ms": 0.6, "results": results}
            runner.compare(row)
            made.append(row)
        return targets.summarise({"rows": made, "overhead": []})[0]

    assert rows((1.0, 2.0), (1.0, 2.0))["met"] is True
    assert rows((1.0, 1.2), (1.0, 9.0))["met"] is False  # one ratio under 1.3
    assert rows((1.0, 1.5), (1.0, 1.5))["met"] is False  # geometric mean under 2
    assert rows((2.0, 9.0), (1.0, 9.0))["met"] is False  # 0.3 of the floor
    assert rows((1.0, 2.0), (None, 2.0))["met"] is None
    assert rows((1.0, 2.0), (1.0, None))["met"] is None
    line = rows((1.0, 4.0), (1.0, 1.0))
    assert line["figures"]["mean_ratio"] == pytest.approx(2.0) and line["figures"]["least_ratio"] == 1.0
    host = {"op": "memory_read", "implementation": OURS, "forward_us": 9.0, "forward_and_backward_us": None}
    (line,) = targets.summarise({"rows": [], "overhead": [host]})
    assert line["figures"] == {"forward_us": 9.0} and line["met"] is None


def test_bench_on_a_gpu_writes_its_folder(pretend_gpu, small_suite, monkeypatch, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(suite, "load", lambda path: small_suite)
    bench_command.bench(**{**OPTIONS, "dtype": "float32", "skip": "Flex", "op": "forget", "out": tmp_path / "b"})
    assert {p.name for p in (tmp_path / "b").iterdir()} == {"bench.json", "bench.csv", "memory_forget.png"}
    content = json.loads((tmp_path / "b" / "bench.json").read_text())
    assert content["machine"]["gpu"] == "Pretend GPU" and content["summary"] and "command" in content


def test_the_deterministic_mode_goes_from_the_command_line_to_the_file(pretend_gpu, small_suite, monkeypatch, tmp_path):
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(suite, "load", lambda path: small_suite)
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", "")  # so that what is set here goes with the test
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG")
    options = ["--op", "forget", "--dtype", "float32", "--skip", "Flex", "--out", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["memformer-kernels", "bench", *options, "--deterministic"])
    app(sys.argv[1:], standalone_mode=False)
    assert json.loads((tmp_path / "bench.json").read_text())["deterministic"] is True
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"  # which PyTorch asks for


def test_rows_of_several_runs_come_together(pretend_gpu, small_suite, monkeypatch, tmp_path):
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(suite, "load", lambda path: small_suite)

    def bench(**options):
        bench_command.bench(**{**OPTIONS, "dtype": "float32", "skip": "Flex", "out": tmp_path, **options})
        return json.loads((tmp_path / "bench.json").read_text())

    first = bench(op="forget")
    both = bench(op="read")
    assert both["rows"][: len(first["rows"])] == first["rows"] and len(both["rows"]) > len(first["rows"])
    assert {row["op"] for row in both["overhead"]} == {"memory_forget", "memory_read"}
    assert {line["what"].split()[0] for line in first["summary"]} < {
        line["what"].split()[0] for line in both["summary"]
    }
    again = bench(op="read")
    assert len(again["rows"]) == len(both["rows"])  # in their place, not beside them
    with pytest.raises(ValueError, match=r"must be of the same dtype \(float32\) to take these rows, got float16"):
        bench(op="read", dtype="float16")
    report.write_json({**again, "machine": {**again["machine"], "torch": "0"}}, tmp_path)
    with pytest.raises(ValueError, match=r"must be of the same torch \(0\) to take these rows"):
        bench(op="read")


OPTIONS = dict(
    op="",
    which="",
    only="",
    shapes=[],
    dtype="bfloat16",
    layout="contiguous",
    hidden=0.0,
    quick=True,
    peers=True,
    skip="",
    backend="auto",
    deterministic=False,
    suite_file=None,
)


@pytest.mark.skipif(torch.cuda.is_available(), reason="what is said where there is no GPU")
def test_without_a_gpu_it_says_what_can_be_told_and_no_time(tmp_path):
    command = [sys.executable, "-m", "memformer_kernels.cli", "bench", "--out", str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "Not measured here: device times" in done.stdout and "B1 L65536 M128 H16 D64" in done.stdout
    assert re.search(r"memory_write +flash \+ lse +largest error \d\.\de-0[67]", done.stdout)
    assert re.search(r"memory_read +cuDNN +needs a GPU", done.stdout)
    assert not re.search(r"\d\s*(ms|us|µs|s|seconds|TB/s|TFLOP/s)\b", done.stdout)
    assert not (tmp_path / "out").exists()


def test_the_command_line_hands_its_backend_on():
    command = [sys.executable, "-m", "memformer_kernels.cli", "bench", "--backend", "gpu"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1 and "--backend must be one of auto, cuda, triton, eager, got 'gpu'" in done.stderr


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"dtype": "int8"}, "--dtype must be one of bfloat16, float16, float32"),
        ({"layout": "padded"}, "--layout must be one of contiguous, transposed"),
        ({"hidden": 1.0}, "--hidden must be from 0 to below 1, got 1"),
        ({"backend": "gpu"}, "--backend must be one of auto, cuda, triton, eager, got 'gpu'"),
        ({"only": "M7"}, "nothing in the suite has"),
        ({"shapes": ["B=2 H=2"]}, "--shape must name B, H, M, L and D"),
    ],
)
def test_a_mistake_is_one_line(options, says, tmp_path):
    with pytest.raises(ValueError, match=says) as caught:
        bench_command.bench(**{**OPTIONS, "out": tmp_path, **options})
    assert "\n" not in str(caught.value)
