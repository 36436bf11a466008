"""What `benchmarks/counters.py` reads of Nsight Compute's report; the counters themselves need a GPU."""

import json
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("rich")
pytest.importorskip("triton")
pytest.importorskip("matplotlib")

from memformer_kernels.benchmarking import page, results, suite

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
STALLED = "smsp__average_warps_issue_stalled"
COLUMNS = {
    "ID": ("", "0", "1"),
    "Kernel Name": ("", "_memory_read_forward_kernel", "sum_partials_kernel(float*, int)"),
    "gpu__time_duration.sum": ("nsecond", "105,664", "2,016"),
    "gpu__dram_throughput.avg.pct_of_peak_sustained_elapsed": ("%", "41.5", "80"),
    "lts__t_sectors.avg.pct_of_peak_sustained_elapsed": ("%", "22.25", "33"),
    "sm__inst_executed_pipe_tensor_op_hmma.avg.pct_of_peak_sustained_active": ("%", "1", "0"),
    "sm__pipe_tensor_op_hmma_cycles_active.avg.pct_of_peak_sustained_active": ("%", "48", "0"),
    "sm__pipe_tensor_op_imma_cycles_active.avg.pct_of_peak_sustained_active": ("%", "0", "0"),
    "sm__inst_executed_pipe_xu.avg.pct_of_peak_sustained_active": ("%", "61.7", "n/a"),
    "sm__warps_active.avg.pct_of_peak_sustained_active": ("%", "18.5", "90"),
    "launch__registers_per_thread": ("register/thread", "255", "32"),
    "l1tex__t_sectors_pipe_lsu_mem_local_op_ld.sum": ("sector", "1,000,000", "0"),
    "l1tex__t_sectors_pipe_lsu_mem_local_op_st.sum": ("sector", "24,000", "0"),
    f"{STALLED}_wait_per_issue_active.ratio": ("inst", "1.25", "0.5"),
    f"{STALLED}_math_pipe_throttle_per_issue_active.ratio": ("inst", "2.5", "0"),
    f"{STALLED}_long_scoreboard_per_issue_active.ratio": ("inst", "0.75", "9"),
    f"{STALLED}_barrier_per_issue_active.ratio": ("inst", "0.1", "0"),
    f"{STALLED}_selected_per_issue_active.ratio": ("inst", "4", "4"),
    f"{STALLED}_wait_not_issued_per_issue_active.ratio": ("inst", "5", "5"),
}
REPORT = "\n".join(
    ["==PROF== Connected to process 1 (python)", "compiled"]
    + [",".join(f'"{cell}"' for cell in line) for line in (COLUMNS, *zip(*COLUMNS.values(), strict=True))]
    + ["==PROF== Disconnected"]
)


@pytest.fixture
def counters(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import counters

    return counters


def test_the_report_of_ncu_is_read(counters):
    read, added = counters.parse(REPORT)
    assert read == {
        "kernel": "_memory_read_forward_kernel",
        "us": pytest.approx(105.664),
        "dram": 41.5,
        "l2": 22.25,
        "tensor": 48,
        "xu": 61.7,
        "fma": None,
        "alu": None,
        "issue": None,
        "occupancy": 18.5,
        "registers": 255,
        "spilled": 1_024_000 * 32,
        "stalls": {"math_pipe_throttle": 2.5, "wait": 1.25, "long_scoreboard": 0.75},
    }
    assert added["kernel"] == "sum_partials_kernel" and added["xu"] is None and added["spilled"] == 0


@pytest.mark.parametrize(
    ("name", "short"),
    [
        ("void memformer_kernels::memory_forget_kernel<(bool)1, float>(Params<float>, int)", "memory_forget_kernel"),
        ("void memory_read_kernel<ReadTraits<__nv_bfloat16, 64, 8>>(Params)", "memory_read_kernel"),
        ("at::cuda::(anonymous namespace)::spin_kernel(long)", "spin_kernel"),
    ],
)
def test_kernels_of_cuda_are_named_as_those_of_triton(counters, name, short):
    read, _ = counters.parse(REPORT.replace("_memory_read_forward_kernel", name))
    assert read["kernel"] == short


def test_kernels_belong_to_the_call_whose_mark_they_follow(counters):
    calls = [{"op": "memory_read"}, {"op": "memory_write"}]
    mark, read, attend, combine = ({"kernel": name} for name in (counters.MARK, "read", "attend", "combine"))
    rows = counters.by_call(calls, [mark, read, mark, attend, combine])
    assert rows == [calls[0] | read, calls[1] | attend, calls[1] | combine]
    with pytest.raises(ValueError, match="1 of 2 calls"):
        counters.by_call(calls, [mark, read])


def test_a_report_without_kernels_has_none(counters):
    assert counters.parse("==ERROR== ERR_NVGPUCTRPERM\n") == []


def test_shapes_are_of_the_suite_and_every_pass(counters):
    known = {(s.op, s.name) for s in suite.load().shapes}
    calls = list(counters.chosen(list(counters.SHAPES), list(counters.PASSES)))
    assert {(shape.op, shape.name) for shape, _ in calls} <= known and len(calls) == 2 * len(counters.SHAPES)


def test_the_figures_are_a_page(counters, tmp_path):
    call = {"op": "memory_read", "shape": "B64 L512 M512 H8 D64", "pass": "forward"}
    content = {"gpu": "Pretend GPU", "ncu": "1", "counters": [call | kernel for kernel in counters.parse(REPORT)]}
    assert results.kind(content) == "counters"
    (tmp_path / "counters.json").write_text(json.dumps(content))
    written, skipped = page.write(tmp_path, tmp_path / "page")
    assert not skipped
    line = "| memory_read | B64 L512 M512 H8 D64 | forward | _memory_read_forward_kernel "
    line += "| 105.7 | 42 | 22 | 48 | 62 | - | - | - | 18 | 255 | 32.8 | math pipe throttle 2.5, wait 1.2, long"
    assert line in written[0].read_text()


def test_figures_of_other_calls_are_kept_and_those_of_the_same_replaced(counters):
    of = dict.fromkeys(("gpu", "torch", "triton", "ncu", "dtype"), "1")
    forward, backward = ({"op": "memory_read", "shape": "B1", "pass": which, "us": 1.0} for which in counters.PASSES)
    before = of | {"command": "first; second", "counters": [forward, backward]}
    after = of | {"command": "second", "counters": [forward | {"us": 2.0}]}
    assert counters.joined(before, after) == before | {"counters": [backward, forward | {"us": 2.0}]}
    assert counters.joined(before, after | {"command": "third"})["command"] == "first; second; third"
    with pytest.raises(ValueError, match="are of triton 1, these of 2"):
        counters.joined(before, after | {"triton": "2"})


def test_the_command_says_what_was_asked_for(counters):
    every = list(counters.SHAPES), list(counters.PASSES)
    assert counters.asked(*every) == "python benchmarks/counters.py"
    said = counters.asked(["memory_read B=1 L=8"], ["forward"])
    assert said == "python benchmarks/counters.py --shapes 'memory_read B=1 L=8' --passes forward"


def test_without_a_gpu_or_ncu_it_says_so(counters, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["counters.py", "--ncu", "no-such-program"])
    with pytest.raises(SystemExit, match="no-such-program is not here" if torch.cuda.is_available() else "needs a GPU"):
        counters.main()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(SystemExit, match="no-such-program is not here"):
        counters.main()
