"""The tables of the README and docs/ that are made from the package and from result files.

    python tests/generated_tables.py     writes them anew, between `<!-- table: NAME -->` and `<!-- /table -->`

`tests/test_docs.py` fails when one is stale.
"""

import json
import re
from pathlib import Path

from contract import PROMISES
from doc_pages import PAGES, ROOT

RESULTS = ROOT / "benchmarks" / "results"
MIB = 2**20


def support() -> str:
    """Which backend takes what: the limits that the backends themselves check."""
    from memformer_kernels import backend, checks, launch
    from memformer_kernels.ops.memory_forget import cuda as forget_cuda
    from memformer_kernels.ops.memory_forget import triton as forget
    from memformer_kernels.ops.memory_read import cuda as read
    from memformer_kernels.ops.memory_write import cuda as write_cuda
    from memformer_kernels.ops.memory_write import triton as write

    header = (ROOT / "csrc/include/memformer_kernels/memory_forget.h").read_text()
    widest = re.search(r"kMemoryForgetMaxC = (\d+)", header)[1]
    header = (ROOT / "csrc/include/memformer_kernels/memory_read.h").read_text()
    widest_read = re.search(r"kMemoryReadMaxD = (\d+)", header)[1]
    built_for = re.search(r'"MEMFORMER_KERNELS_ARCHS", "([^"]+)"', (ROOT / "setup.py").read_text())[1]
    sm = ", ".join(f"sm_{name}" for name in built_for.split(";"))
    limits = {
        ("memory_read", "triton"): f"D up to {launch.MOST_CHANNELS}, any number of slots",
        ("memory_write", "triton"): f"D up to {launch.MOST_CHANNELS}, C up to {write.MOST_CHANNELS}",
        ("memory_forget", "triton"): f"C up to {forget.MOST_CHANNELS}",
        ("memory_read", "cuda"): f"sm_90a, D up to {widest_read}, M from {read.LEAST_SLOTS}",
        ("memory_write", "cuda"): (
            f"sm_90a, D up to {widest_read}, M from {write_cuda.LEAST_SLOTS} or L from {write_cuda.LEAST_TOKENS}"
        ),
        ("memory_forget", "cuda"): f"C up to {widest}",
    }
    cuda = {"memory_read": read.DTYPES, "memory_write": write_cuda.DTYPES, "memory_forget": forget_cuda.DTYPES}
    capability = ".".join(map(str, launch.LEAST_CAPABILITY))
    titles = ("op", "eager", f"Triton: compute capability {capability} and above", f"CUDA C++: {sm}")
    rows = []
    for op in backend.OPS:
        cells = [f"`{op}`", f"{_dtypes(checks.FLOATING)}; any device, any size"]
        for name, dtypes in (("triton", launch.DTYPES), ("cuda", cuda.get(op, ()))):
            there = backend.implementation(op, name) is not None
            assert there == ((op, name) in limits), f"{op} {name}: say here what it takes"
            cells.append(f"{_dtypes(dtypes)}; {limits[op, name]}" if there else "-")
        rows.append(cells)
    return _table(titles, rows)


def rollouts() -> str:
    """Milliseconds and peak memory of a rollout, by ways that all shapes were measured in."""
    shapes = _result("rollout_h200")["shapes"]
    wanted = {
        "plain bptt": "plain PyTorch, all kept",
        "plain checkpoint": "checkpoints",
        "plain replay": "a loop that replays",
        "ours replay": "**ours: replay, as graphs**",
    }
    rows = []
    for name, part in shapes.items():
        shape, runs = part["shape"], {row["run"]: row for row in part["rows"]}
        cells = [name, f"{shape['horizon']} x {shape['batch']} x {shape['length']}"]
        rows.append([*cells, *(f"{_ms(runs[run]['ms'])} ms, {_size(runs[run]['peak_MiB'])}" for run in wanted)])
    return _table(("shape", "segments x batch x tokens", *wanted.values()), rows)


def rollout_runs() -> str:
    rows = []
    for name, part in _result("rollout_h200")["shapes"].items():
        for row in part["rows"]:
            times = (_ms(row[key]) if key in row else "" for key in ("ms", "queued_ms", "busy_ms"))
            run = row["run"].replace("ours, budget", "ours replay, budget") + ", earlier" * row.get("earlier", False)
            rows.append((name, run, *times, row["peak_MiB"]))
    return _table(("shape", "run", "ms", "queued ms", "busy ms", "peak MiB"), rows)


def paper_replay() -> str:
    """The paper's table of replay, and ours at its sizes."""
    published = {"bptt": (16177, "1.00"), "checkpoint": (9885, "0.48"), "replay": (7229, "0.90")}  # MB, speed
    shapes = _result("rollout_h200")["shapes"]
    runs = [{row["run"]: row for row in shapes[name]["rows"]} for name in ("paper-4", "paper-16")]
    rows = []
    for run in ("plain bptt", "plain checkpoint", "plain replay", "ours replay"):
        of_paper = published.get(run.removeprefix("plain "), ("", ""))
        ours = [(r[run]["peak_MiB"], f"{r['plain bptt']['ms'] / r[run]['ms']:.2f}", _ms(r[run]["ms"])) for r in runs]
        rows.append((run, *of_paper, *ours[0], *ours[1]))
    titles = "paper, horizon 4: MB", "speed", "horizon 4: MiB", "speed", "ms", "horizon 16: MiB", "speed", "ms"
    return _table(("", *titles), rows)


def replay_memory() -> str:
    rows = []
    for row in _result("replay_memory_cpu")["rows"]:
        figures = *(row["peak_bytes"][m] for m in ("replay", "checkpoint", "bptt")), row["stored_bytes"]
        rows.append((row["horizon"], *(f"{n / MIB:.1f}" for n in figures)))
    return _table(("segments", "replay", "checkpoint", "bptt", "of replay's, the stored memories"), rows)


def operations() -> str:
    """A few shapes, microseconds of ours and of the best peer."""
    times = {
        (row["op"], row["shape"], row["pass"]): f"{_us(row['results']['ours']['ms'])} / {_us(_best(row)['ms'])}"
        for row in _result("ops_h200")["rows"]
        if row["ratio"]
    }
    calls = [(op, which) for op in ("memory_read", "memory_write") for which in ("forward", "backward")]
    shapes = [shape for op, shape, which in times if (op, which) == calls[0]]
    shapes = [shape for shape in shapes if all((op, shape, which) in times for op, which in calls)]
    shapes = [shape for shape in shapes if "D96" not in shape and "M2048" not in shape]  # like D80 and M1024
    rows = [(shape, *(times[op, shape, which] for op, which in calls)) for shape in shapes]
    titles = [f"{op.removeprefix('memory_')} {which}" for op, which in calls]
    return _table(("ours / best peer", *titles), rows)


def streaming() -> str:
    """Of each series its first and last length, and whether memory stayed."""
    content, rows = _result("streaming_h200"), []
    for read, made in zip(content["reading"], content["decoding"], strict=True):
        first, *_, last = read["rows"]
        times = [f"{row['seconds_a_token'] * 1e6:.2f} ({row['tokens']:,} tokens)" for row in (first, last)]
        memory = f"{last['peak'] / MIB:.0f} MiB{', always' if read['same_bytes'] else ''}"
        decoded = (f"{made['tokens_a_second_of_a_text'][way]:,.0f}" for way in ("graphs", "calls"))
        rows.append((read["preset"], read["batch"], *times, memory, *decoded))
    titles = ("model", "texts side by side", "first", "last", "peak memory", "decoded tokens/s", "without graphs")
    return _table(titles, rows)


def accelerated() -> str:
    """Of each shape and dtype, the ways to run a segment and a document."""
    rows = []
    for name, part in _result("accelerate_h200")["shapes"].items():
        for dtype in dict.fromkeys(row["dtype"] for row in part["rows"]):
            runs = [row for row in part["rows"] if row["dtype"] == dtype]
            rows += [(name, dtype, run["run"], _ms(run["ms"]), f"{run['peak_MiB']:.0f}") for run in runs if "ms" in run]
    return _table(("shape", "dtype", "run", "ms", "peak MiB"), rows)


def cross_attention() -> str:
    content, rows = _result("cross_attention_h200"), []
    for row in content["attention"] + content["bart"]:
        figures = [f"{row[name][ms]:.3f}" for ms in ("ms", "wall_ms") for name in ("sdpa", "cross_attention")]
        what = "BART" if "model" in row["pass"] else "alone"
        rows.append((what, row["keys"], row["pass"].removesuffix(" of the model"), *figures))
    titles = "", "keys", "pass", "SDPA: device ms", "cross_attention", "SDPA: ms as Python sees it", "cross_attention"
    return _table(titles, rows)


def memory_read() -> str:
    return _of_op("memory_read", "ops_h200")


def memory_write() -> str:
    return _of_op("memory_write", "ops_h200")


def memory_forget() -> str:
    return _of_op("memory_forget", "memory_forget_bench_h200")


def targets() -> str:
    """Of each operation what it is held to, and what it reaches: least or most, what is missed in bold."""
    rows = []
    for line in _result("ops_h200")["summary"]:
        if not line["targets"] or "odd" in line["what"]:
            continue
        for name, asked in line["targets"].items():
            found, least = line["figures"][name], "ratio" in name or "share" in name
            digits = 0 if "host time" in line["what"] else 2
            reached = f"{found:.{digits}f}"
            reached = reached if (found >= asked) == least else f"**{reached}**"
            what = line["what"].removesuffix(", table shapes")
            rows.append((what, name.replace("_", " "), f"{asked:.{digits}f}", reached))
    return _table(("", "figure", "target", "reached"), rows)


def same_bits() -> str:
    """Backwards beside the best peer of PyTorch's deterministic mode, and beside the best of all."""
    ratios = {(row["op"], row["pass"], row["shape"]): row["ratio"] for row in _result("ops_h200")["rows"]}
    rows = []
    for row in _result("ops_deterministic_h200")["rows"]:
        call = row["op"], row["pass"], row["shape"]
        times = _us(row["results"]["ours"]["ms"]), f"{_us(_best(row)['ms'])}, {row['best_peer']}"
        rows.append((row["op"], row["shape"], *times, f"{row['ratio']:.2f}", f"{ratios[call]:.2f}"))
    return _table(("op", "shape", "ours", "best of deterministic peers", "ratio", "to the best of all"), rows)


def counters() -> str:
    """Of each kernel that takes a fifth of a pass or more, which part of the GPU it keeps busy."""
    found = sorted(_result("counters_h200")["counters"], key=lambda row: row["op"])
    passes, rows = {}, []
    for row in found:
        call = row["op"], row["shape"], row["pass"]
        passes[call] = passes.get(call, 0) + row["us"]
    for row in found:
        call = row["op"], row["shape"], row["pass"]
        if row["us"] >= passes[call] / 5:
            kernel = row["kernel"].removeprefix("_").removesuffix("_kernel").removeprefix(f"{row['op']}_")
            shares = (f"{row[name]:.0f}" for name in ("dram", "l2", "tensor", "xu", "issue"))
            reason, warps = max(row["stalls"].items(), key=lambda item: item[1])
            stall = f"{reason.replace('_', ' ')} {warps:.1f}"
            occupied = f"{row['us']:.1f}", f"{row['registers']:.0f}", f"{row['occupancy']:.1f}"
            rows.append((*call, kernel.replace("_", " "), *occupied, *shares, f"{row['spilled'] / 1e6:.0f}", stall))
    shares = ("occupancy", "DRAM", "L2", "tensor", "XU", "issue")
    return _table(("op", "shape", "pass", "kernel", "us", "registers", *shares, "spilled MB", "largest stall"), rows)


def memory_gain() -> str:
    rows = []
    for length in (32, 64, 128):
        content = _result(f"memory_gain_L{length}")
        bits = content["bits_per_byte"]
        cells = [f"{bits[k]['mean']:.3f} \u00b1 {bits[k]['stdev']:.3f}" for k in ("memory", "reset", "twin", "gain")]
        where = content["device"].removeprefix("NVIDIA ")
        minutes = sorted(run["minutes"] for run in content["runs"])
        rows.append((f"{length} bytes", where, f"{minutes[0]:.0f} to {minutes[-1]:.0f}", *cells))
    titles = ("segments of", "where", "minutes a run", "with memory", "memory reset", "twin", "gain over the twin")
    return _table(titles, rows)


def contract(with_figures: bool = False) -> str:
    """One line for each guarantee: its promise, and what each report has of it."""
    files = {"CPU": "contract_cpu", "H200": "contract_h200"}
    reports = {where: _result(name)["guarantees"] for where, name in files.items()}
    streams = _result("stream_checks_h200")["checks"]
    for guarantee, checks in {
        "G16": _result("replay_h200")["checks"],
        "G17": [row for row in streams if row.get("guarantee") == "G17"],
        "G18": [row for row in streams if row.get("guarantee") != "G17"],
    }.items():
        passed = [row["ok"] for row in checks]
        reports["H200"][guarantee] = {"passed": sum(passed), "failed": passed.count(False), "figures": {}}
    rows = []
    for name, promise in PROMISES.items():
        rows.append((name, promise, *(proof(reports.get(where, {}).get(name), with_figures) for where in files)))
    return _table(("", "we guarantee", *files), rows)


def mutants() -> str:
    found = _result("mutants")
    rows = [*found["by_part"].items(), ("together", found["planted"]), ("found by the tests", found["killed"])]
    return _table(("faults planted in", ""), rows)


def contract_figures() -> str:
    return contract(with_figures=True)


SHARE = re.compile(r"largest share of (.+), (\w+), (\w+)")  # a figure of G1: of what, whose, which dtype


def accuracy() -> str:
    """The figures of G1 that are the largest share of a bound, by dtype."""
    rows = {}
    for where, name in (("CPU", "contract_cpu"), ("H200", "contract_h200")):
        for figure, value in _result(name)["guarantees"]["G1"]["figures"].items():
            if found := SHARE.fullmatch(figure):
                rows.setdefault((found[1], where, found[2]), {})[found[3]] = f"{value:.3f}"
    dtypes = "float32", "float16", "bfloat16"
    titles = "largest share of", "where", "of", *dtypes
    return _table(
        titles, [(*row, *(values.get(dtype, "") for dtype in dtypes)) for row, values in sorted(rows.items())]
    )


def proof(found: dict | None, with_figures: bool) -> str:
    """How many tests passed, and the largest figure of each name."""
    if not found or not found["passed"] + found["failed"]:
        return ""
    words = f"{found['passed']} passed" + (f", **{found['failed']} failed**" if found["failed"] else "")
    if with_figures:
        figures = [item for item in sorted(found["figures"].items()) if not SHARE.fullmatch(item[0])]
        words = "<br>".join([words, *(f"{name}: {value:.3g}" for name, value in figures)])
    return words


TABLES = {
    f.__name__: f
    for f in (
        *(support, rollouts, rollout_runs, paper_replay, replay_memory, streaming, operations),
        *(accelerated, cross_attention, counters, same_bits, targets, accuracy),
        *(memory_read, memory_write, memory_forget, memory_gain, contract, contract_figures, mutants),
    )
}
MARKED = re.compile(r"(<!-- table: (\w+) -->\n).*?(<!-- /table -->)", re.DOTALL)


def renewed(text: str) -> str:
    """A page with its tables made anew."""
    return MARKED.sub(lambda m: f"{m[1]}\n{TABLES[m[2]]()}\n{m[3]}", text)


def _of_op(op: str, file: str) -> str:
    rows = []
    for row in _result(file)["rows"]:
        if row["op"] == op and row["pass"] in ("forward", "forward (saving)", "backward"):
            figures = _us(row["results"]["ours"]["ms"]), _us(row["floor_ms"]), f"{row['share_of_floor']:.2f}"
            peer = f"{_us(_best(row)['ms'])}, {row['best_peer']}"
            rows.append((row["shape"], row["pass"], *figures, peer, f"{row['ratio']:.2f}"))
    return _table(("shape", "pass", "ours", "floor", "share", "best peer", "ratio"), rows)


def _best(row: dict) -> dict:
    return row["results"][row["best_peer"]]


def _result(name: str) -> dict:
    return json.loads((RESULTS / f"{name}.json").read_text())


def _ms(ms: float) -> str:
    return f"{ms:.0f}" if ms >= 100 else f"{ms:.1f}"


def _us(ms: float) -> str:
    return f"{ms * 1e3:.1f}"


def _size(mib: int) -> str:
    return f"{mib} MiB" if mib < 1000 else f"{mib / 1024:.1f} GiB"


def _dtypes(dtypes) -> str:
    return ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)


def _table(titles: tuple, rows: list) -> str:
    lines = (titles, ("---",) * len(titles), *rows)
    return "".join("| " + " | ".join(map(str, line)) + " |\n" for line in lines)


def main() -> None:
    for name, path in PAGES.items():
        before = path.read_text()
        after = renewed(before)
        if after != before:
            Path(path).write_text(after)
            print(f"written anew: {name}")


if __name__ == "__main__":
    main()
