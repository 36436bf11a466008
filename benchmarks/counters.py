"""Hardware counters of every kernel of ours, by Nsight Compute: which part of the GPU a call keeps busy.

    python benchmarks/counters.py --out benchmarks/results/counters_h200.json
    python benchmarks/counters.py --shapes "memory_write B=1 H=16 M=128 L=4096 D=64" --passes forward

Each kernel is run many times over, once for each group of counters, from a cold cache and at whatever clock the GPU
has. Needs `ncu` and the right to read counters, which many containers do not have.
"""

import argparse
import csv
import io
import json
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
import triton

from memformer_kernels.benchmarking import inputs, measure, suite
from memformer_kernels.benchmarking.peers import ours

# What misses its target.
SHAPES = (
    "memory_read B=64 L=512 M=128 H=8 D=64",
    "memory_read B=64 L=512 M=512 H=8 D=64",
    "memory_read B=32 L=1024 M=1024 H=16 D=64",
    "memory_read B=8 L=4096 M=128 H=16 D=128",
    "memory_read B=8 L=4096 M=1024 H=16 D=128",
    "memory_read B=64 L=1000 M=96 H=12 D=80",
    "memory_write B=64 L=512 M=128 H=8 D=64",
    "memory_write B=1 L=4096 M=128 H=16 D=64",
    "memory_write B=8 L=4096 M=128 H=16 D=128",
)
PASSES = (suite.FORWARD, suite.BACKWARD)
SECTIONS = ("SpeedOfLight", "ComputeWorkloadAnalysis", "MemoryWorkloadAnalysis", "MemoryWorkloadAnalysis_Tables")
SECTIONS += ("Occupancy", "LaunchStats", "SchedulerStats", "WarpStateStats")
# Names differ between architectures and versions: of the first pattern that is found, the largest value.
OF_PEAK = r"\.avg\.pct_of_peak_sustained_(active|elapsed)"
COUNTERS = {
    "us": (r"gpu__time_duration\.sum",),
    "dram": (rf"(gpu__)?dram__throughput{OF_PEAK}", rf"gpu__dram_throughput{OF_PEAK}"),
    "l2": (rf"lts__throughput{OF_PEAK}", rf"lts__t_sectors{OF_PEAK}", rf"lts__t_bytes{OF_PEAK}"),
    "tensor": (rf"sm__pipe_tensor\w*_cycles_active{OF_PEAK}", rf"sm__inst_executed_pipe_tensor\w*{OF_PEAK}"),
    "xu": (rf"sm__inst_executed_pipe_xu{OF_PEAK}", rf"sm__pipe_xu\w*{OF_PEAK}"),
    "fma": (rf"sm__pipe_fma\w*_cycles_active{OF_PEAK}", rf"sm__inst_executed_pipe_fma\w*{OF_PEAK}"),
    "alu": (rf"sm__pipe_alu_cycles_active{OF_PEAK}", rf"sm__inst_executed_pipe_alu{OF_PEAK}"),
    "issue": (rf"sm__inst_issued{OF_PEAK}", rf"smsp__issue_active{OF_PEAK}", rf"sm__inst_executed{OF_PEAK}"),
    "occupancy": (rf"sm__warps_active{OF_PEAK}",),
    "registers": (r"launch__registers_per_thread",),
}
MICROSECONDS = {"ns": 1e-3, "us": 1.0, "ms": 1e3, "s": 1e6}
MICROSECONDS |= {"nsecond": 1e-3, "usecond": 1.0, "msecond": 1e3, "second": 1e6}
LOCAL = re.compile(r"l1tex__t_sectors_pipe_lsu_mem_local_op_(ld|st)\.sum")  # of 32 bytes
STALL = re.compile(r"smsp__average_warps_issue_stalled_(?!selected)(\w+?)(?<!_not_issued)_per_issue_active\.ratio")
MOST_STALLS = 3
MARK = "spin_kernel"  # of torch.cuda._sleep


def parse(text: str) -> list[dict]:
    """The kernels of what `ncu --csv --page raw` prints, in order: their names and counters; None where there is none.

    Percentages are of the peak; `spilled` counts bytes to and from local memory; `stalls` the warps that wait for each
    reason when one instruction is issued.
    """
    lines = text.splitlines()
    start = next((i for i, line in enumerate(lines) if line.startswith('"ID"')), None)
    if start is None:
        return []
    header, units, *rows = csv.reader(io.StringIO("\n".join(lines[start:])))
    kernels = []
    for row in rows:
        if len(row) != len(header):  # ncu's own messages
            continue
        cells = dict(zip(header, row, strict=True))
        values = {name: value for name, cell in cells.items() if (value := _number(cell)) is not None}
        kernel = {"kernel": re.search(r"\w+(?=[<(]|$)", cells["Kernel Name"])[0]}  # no namespaces, no arguments
        for name, patterns in COUNTERS.items():
            kernel[name] = next((v for p in patterns if (v := _largest(values, p)) is not None), None)
        if kernel["us"] is not None:
            unit = dict(zip(header, units, strict=True))["gpu__time_duration.sum"]
            kernel["us"] = round(kernel["us"] * MICROSECONDS[unit], 3)
        local = [value for name, value in values.items() if LOCAL.fullmatch(name)]
        kernel["spilled"] = 32 * sum(local) if local else None
        stalls = {m[1]: value for name, value in values.items() if (m := STALL.fullmatch(name))}
        kernel["stalls"] = dict(sorted(stalls.items(), key=lambda item: -item[1])[:MOST_STALLS])
        kernels.append(kernel)
    return kernels


def _number(cell: str) -> float | None:
    try:
        return float(cell.replace(",", ""))
    except ValueError:
        return None


def _largest(values: dict[str, float], pattern: str) -> float | None:
    return max((value for name, value in values.items() if re.fullmatch(pattern, name)), default=None)


def chosen(shapes: list[str], passes: list[str]) -> Iterator[tuple[suite.Shape, str]]:
    for text in shapes:
        op, sizes = text.split(maxsplit=1)
        (shape,) = suite.own_shapes("counters", [op], [sizes])
        yield from ((shape, which) for which in passes)


def child(options: argparse.Namespace) -> None:
    """Makes each call once under the profiler, each after a kernel that marks where it begins."""
    device, calls = torch.device("cuda", 0), []
    for shape, which in chosen(options.shapes, options.passes):
        first = inputs.make_input(shape, torch.bfloat16, device, layout="contiguous", temperature=0.5, seed=0)
        (call,) = measure._calls(ours(shape.op, device).make(shape, device, None), which, [first])
        call()
        call()  # compiled, and known to the launcher
        torch.cuda.synchronize()
        torch.cuda.profiler.start()
        torch.cuda._sleep(1)  # launches MARK
        call()
        torch.cuda.synchronize()
        torch.cuda.profiler.stop()
        calls.append({"op": shape.op, "shape": shape.name, "pass": which})
        del call, first
        torch.cuda.empty_cache()
    options.child.write_text(json.dumps({"gpu": torch.cuda.get_device_name(), "calls": calls}))


def by_call(calls: list[dict], kernels: list[dict]) -> list[dict]:
    """The kernels between marks, each with the call that it belongs to; a ValueError where the marks are others."""
    rows, begun = [], 0
    for kernel in kernels:
        if kernel["kernel"] == MARK:
            begun += 1
        elif 0 < begun <= len(calls):
            rows.append(calls[begun - 1] | kernel)
    if begun != len(calls):
        raise ValueError(f"ncu saw {begun} of {len(calls)} calls begin")
    return rows


def profile(ncu: str, options: argparse.Namespace) -> tuple[str, list[dict]]:
    """`(GPU, counters of every launch)`."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "calls.json"
        command = [ncu, "--clock-control", "none", "--csv", "--page", "raw", "--profile-from-start", "off"]
        command += ["--kernel-name", f"regex:memory_|attention_(for|back)ward|sum_partials|{MARK}"]
        command += [word for section in SECTIONS for word in ("--section", section)]
        command += [sys.executable, __file__, "--child", str(file), "--shapes", *options.shapes]
        done = subprocess.run([*command, "--passes", *options.passes], capture_output=True, text=True)
        kernels = parse(done.stdout)
        if done.returncode or not kernels or not file.exists():
            said = [line for line in (done.stdout + done.stderr).splitlines() if line.strip()]
            sys.exit("counters: ncu read none; it said:\n" + "\n".join(said[-12:]))
        ran = json.loads(file.read_text())
    try:
        return ran["gpu"], by_call(ran["calls"], kernels)
    except ValueError as error:
        sys.exit(f"counters: {error}")


def joined(before: dict, report: dict) -> dict:
    """`report`, with what `before` has of other calls; a ValueError where they are not of one machine and version."""
    for name in ("gpu", "torch", "triton", "ncu", "dtype"):
        if before[name] != report[name]:
            raise ValueError(f"the figures there are of {name} {before[name]}, these of {report[name]}")
    again = {_call(row) for row in report["counters"]}
    return {
        **report,
        "command": "; ".join(dict.fromkeys([*before["command"].split("; "), report["command"]])),
        "counters": [row for row in before["counters"] if _call(row) not in again] + report["counters"],
    }


def _call(row: dict) -> tuple[str, str, str]:
    return row["op"], row["shape"], row["pass"]


def asked(shapes: list[str], passes: list[str]) -> str:
    """The command that measures them, without where it writes."""
    words = ["python", "benchmarks/counters.py"]
    words += ["--shapes", *shapes] if shapes != list(SHAPES) else []
    words += ["--passes", *passes] if passes != list(PASSES) else []
    return shlex.join(words)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES), metavar="SHAPE", help="an op and its sizes")
    parser.add_argument("--passes", nargs="+", default=list(PASSES), choices=PASSES)
    parser.add_argument("--ncu", default="ncu", help="the program, where it is not on the path")
    parser.add_argument("--out", type=Path, help="write the figures here, in the place of those of the same calls")
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("counters: needs a GPU; a CPU has no such counters")
    if options.child:
        return child(options)
    ncu = shutil.which(options.ncu)
    if ncu is None:
        sys.exit(f"counters: {options.ncu} is not here; it comes with CUDA, as Nsight Compute")
    gpu, rows = profile(ncu, options)
    version = subprocess.run([ncu, "--version"], capture_output=True, text=True).stdout.split("Version")[-1].strip()
    report = {
        "command": asked(options.shapes, options.passes),
        "gpu": gpu,
        "torch": torch.__version__,
        "triton": triton.__version__,
        "ncu": version,
        "dtype": "bfloat16",
        "counters": rows,
    }
    for row in rows:
        print(json.dumps(row), flush=True)
    if options.out:
        if options.out.exists():
            try:
                report = joined(json.loads(options.out.read_text()), report)
            except ValueError as error:
                sys.exit(f"counters: {options.out} is left as it is: {error}")
        options.out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
