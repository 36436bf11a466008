"""Whole rollouts on a GPU, forward and backward: full back-propagation, checkpoints and replay, in plain PyTorch,
compiled, and ours, with the budgets between replay and full back-propagation.

    python benchmarks/rollout.py --out benchmarks/results/rollout_h200.json --plot docs/images/rollout.png
    python benchmarks/rollout.py --shapes small --skip compiled,budget

Each runs in a process of its own. A time is the median of wall times from the first call to the end of the last
kernel, gradients set to None before; "queued" is that of rollouts that follow one another without a wait, as in
training, where the host prepares the next one meanwhile, and sets gradients to None. "busy" is the sum of the kernels'
times, some of which may run side by side, profiled at the end. Peak memory is what a rollout adds to the model and its
segments, gradients and cuBLAS workspaces included: what the allocator hands out at most, and what recorded graphs hold
beside it all the time.
"""

import argparse
import dataclasses
import functools
import gc
import json
import multiprocessing
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import plain_memformer as plain
import torch
from torch.profiler import ProfilerActivity, profile

from memformer_kernels import Memformer, MemformerConfig, MemformerLM, MemformerLMConfig
from memformer_kernels.benchmarking import plots
from memformer_kernels.replay import CapturedCell, memory_replay

Make = Callable[[], tuple[torch.nn.Module, Callable[[], None]]]  # a model, and a rollout of it
CUDA = torch.device("cuda")
MIB = 2**20
LEAST_SECONDS = 0.5  # that rollouts are timed, as a GPU that stood idle begins at a low clock


@dataclasses.dataclass(frozen=True)
class Shape:
    horizon: int
    batch: int
    length: int
    width: int
    heads: int
    layers: int
    slots: int
    decoder_layers: int = 0
    recompute: str = "cheap"

    @property
    def tensors(self) -> int:
        """Of a segment: tokens, of an encoder-decoder also the decoder's, and labels."""
        return 3 if self.decoder_layers else 2

    def plain(self) -> torch.nn.Module:
        sizes = dict(vocabulary=256, width=self.width, heads=self.heads, slots=self.slots)
        if self.decoder_layers:
            return plain.PlainMemformer(**sizes, encoder=self.layers, decoder=self.decoder_layers)
        return plain.PlainMemformerLM(**sizes, layers=self.layers)

    def ours(self) -> torch.nn.Module:
        sizes = dict(width=self.width, heads=self.heads, hidden=4 * self.width, slots=self.slots, dropout=0.0)
        sizes |= dict(vocabulary=256, segment_length=self.length, recompute=self.recompute)
        if self.decoder_layers:
            layers = dict(encoder_layers=self.layers, decoder_layers=self.decoder_layers)
            return Memformer(MemformerConfig(**sizes, **layers))
        return MemformerLM(MemformerLMConfig(**sizes, layers=self.layers))

    def segments(self, horizon: int | None = None) -> list[tuple[torch.Tensor, ...]]:
        size = (horizon or self.horizon, self.tensors, self.batch, self.length)
        return [tuple(segment) for segment in torch.randint(256, size, device=CUDA)]


SHAPES = {
    "small": Shape(16, 8, 128, 512, 8, 4, 128),
    "large": Shape(16, 32, 512, 1024, 16, 8, 128),
    "long": Shape(64, 4, 64, 512, 8, 4, 32),
    "encoder-decoder": Shape(16, 8, 128, 512, 8, 4, 128, decoder_layers=16),
    "paper-4": Shape(4, 16, 128, 512, 8, 12, 32),  # the paper's table of replay; its batch is not stated
    "paper-16": Shape(16, 16, 128, 512, 8, 12, 32),
}
FRACTIONS = (0.0, 0.25, 0.5, 1.0)  # of the graphs of a rollout: budgets
HORIZONS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
MOST_PLAIN = 64  # of them that plain rollouts are timed at
PROFILED = ("plain bptt", "ours replay")


def of_plain(shape: Shape, method: str, *, compiled: bool = False) -> tuple[torch.nn.Module, Callable[[], None]]:
    segments = shape.segments()
    model = shape.plain().to(CUDA, torch.bfloat16)
    cell = torch.compile(model, dynamic=False) if compiled else model

    def run() -> None:
        plain.METHODS[method](cell, segments, model.initial_memory(shape.batch))

    return model, run


def of_ours(shape: Shape, *, graphs: bool = True, **options) -> tuple[torch.nn.Module, Callable[[], None]]:
    segments = shape.segments()
    model = shape.ours().to(CUDA, torch.bfloat16)
    cell = CapturedCell(model.cell) if graphs else model.cell

    def run() -> None:
        start = model.initial_memory(shape.batch)
        memory_replay(cell, segments, start, reduction="mean", **options)[0].backward()

    return model, run


def rollouts(shape: Shape) -> dict[str, Make]:
    """By name."""
    runs = {f"plain {method}": functools.partial(of_plain, shape, method) for method in plain.METHODS}
    for method in ("bptt", "replay"):
        runs[f"compiled {method}"] = functools.partial(of_plain, shape, method, compiled=True)
    runs["ours bptt, no graphs"] = functools.partial(of_ours, shape, graphs=False, method="bptt")
    runs["ours replay, no graphs"] = functools.partial(of_ours, shape, graphs=False)
    runs["ours replay"] = functools.partial(of_ours, shape)
    for recompute in ("none", "all"):
        other = dataclasses.replace(shape, recompute=recompute)
        runs[f"ours replay, recompute {recompute}"] = functools.partial(of_ours, other)
    return runs


def budgets(shape: Shape) -> dict[str, Make]:
    """Rollouts by budget, to all graphs of one."""
    whole = apart(graphs_of_a_rollout, shape)
    found = {}
    for budget in (int(whole * fraction) for fraction in FRACTIONS):
        found[f"ours, budget {budget / MIB:.0f} MiB"] = functools.partial(of_ours, shape, activation_budget=budget)
    return found


def apart(function: Callable, *arguments: Any) -> Any:
    """What the function returns, from a process of its own: a rollout of ours takes 5 % longer in a process that has
    run a plain one. Processes are forked from one that has imported what they need, and has not seen the GPU."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "memformer_kernels"])
    with ProcessPoolExecutor(1, mp_context=context) as process:
        return process.submit(function, *arguments).result()


def graphs_of_a_rollout(shape: Shape) -> int:
    """Bytes that full back-propagation keeps, by the difference of two horizons."""
    model = shape.ours().to(CUDA, torch.bfloat16)

    def kept(horizon: int) -> int:
        segments = shape.segments(horizon)
        before = torch.cuda.memory_allocated()
        result = memory_replay(model.cell, segments, model.initial_memory(shape.batch), method="bptt")
        bytes_kept = torch.cuda.memory_allocated() - before
        del result
        return bytes_kept

    return (kept(3) - kept(2)) * shape.horizon


def measure(make: Make, repeats: int, *, profiles: bool = False) -> dict:
    """Figures of a rollout, in a process that has run no other."""
    torch.set_float32_matmul_precision("high")
    torch.manual_seed(0)
    model, run = make()

    def step() -> None:
        model.zero_grad(set_to_none=True)
        run()

    torch.cuda.synchronize()
    idle = torch.cuda.memory_allocated()
    started = time.perf_counter()
    step()
    torch.cuda.synchronize()
    first = time.perf_counter() - started
    step()
    model.zero_grad(set_to_none=True)
    gc.collect()
    torch.cuda.empty_cache()
    pools = [s for s in torch.cuda.memory_snapshot() if tuple(s["segment_pool_id"]) != (0, 0)]
    torch.cuda.reset_peak_memory_stats()
    run()
    free_in_pools = sum(s["total_size"] - s["allocated_size"] for s in pools)
    peak = torch.cuda.max_memory_allocated() - idle + free_in_pools
    walls, hosts = [], []
    while len(walls) < repeats or sum(walls) < LEAST_SECONDS:
        model.zero_grad(set_to_none=True)
        torch.cuda.synchronize()
        started = time.perf_counter()
        run()
        hosts.append(time.perf_counter() - started)
        torch.cuda.synchronize()
        walls.append(time.perf_counter() - started)
    started = time.perf_counter()
    for _ in walls:
        step()
    torch.cuda.synchronize()
    queued = (time.perf_counter() - started) / len(walls)
    figures = {
        "ms": round(statistics.median(walls) * 1e3, 2),
        "queued_ms": round(queued * 1e3, 2),
        "host_ms": round(statistics.median(hosts) * 1e3, 2),
        "first_call_s": round(first, 2),
        "peak_MiB": round(peak / MIB),
        "held_MiB": round(sum(s["total_size"] for s in pools) / MIB),
    }
    return figures | profiled(step) if profiles else figures


def profiled(step: Callable[[], None]) -> dict:
    """The sum of the kernels' times."""
    with profile(activities=[ProfilerActivity.CUDA]) as recorded:
        step()
        torch.cuda.synchronize()
    found = [e for e in recorded.profiler.kineto_results.events() if e.device_type() == torch.autograd.DeviceType.CUDA]
    return {"busy_ms": round(sum(e.duration_ns() for e in found) / 1e6, 2), "kernels": len(found)}


def over_horizons(shape: Shape, run: str, horizons: Sequence[int], repeats: int) -> list[dict]:
    """Time and peak memory as the horizon grows."""
    rows = []
    for horizon in horizons:
        gc.collect()
        torch.cuda.empty_cache()
        if hasattr(torch._C, "_cuda_clearCublasWorkspaces"):  # of the rollout before
            torch._C._cuda_clearCublasWorkspaces()
        longer = dataclasses.replace(shape, horizon=horizon)
        rows.append({"horizon": horizon, "run": run} | measure(rollouts(longer)[run], repeats))
        print(json.dumps(rows[-1]), flush=True)
    return rows


def machine() -> dict:
    return {"gpu": torch.cuda.get_device_name(), "torch": torch.__version__, "dtype": "bfloat16"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", default=",".join(SHAPES), help=f"some of {','.join(SHAPES)}")
    parser.add_argument("--skip", default="", help="leave out runs whose name contains one of these: compiled,budget")
    parser.add_argument("--only", default="", help="only runs whose name contains this")
    parser.add_argument("--repeats", type=int, default=5, help="rollouts timed at least, for half a second; default 5")
    parser.add_argument(
        "--horizons", action="store_true", help="also time and memory over 1 to 256, a process a method"
    )
    parser.add_argument("--out", type=Path, help="write the figures here, in the place of those of the same shapes")
    parser.add_argument("--plot", type=Path, help="draw them here (needs matplotlib)")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("rollout: needs a GPU; a CPU measures nothing here")
    skip = options.skip.split(",") if options.skip else []
    report = json.loads(options.out.read_text()) if options.out and options.out.exists() else {"shapes": {}}
    report |= apart(machine)
    asked = f"--shapes {options.shapes} --skip {options.skip!r} --only {options.only!r} --repeats {options.repeats}"
    command = {"command": f"python benchmarks/rollout.py {asked}" + " --horizons" * options.horizons}
    for name in options.shapes.split(",") if options.shapes else ():
        shape, rows = SHAPES[name], []
        print(f"{name}: {dataclasses.asdict(shape)}", flush=True)
        runs = rollouts(shape)
        if "budget" not in skip and (options.only in "ours, budget" or "budget" in options.only):
            runs |= budgets(shape)
        for run, make in runs.items():
            if any(part in run for part in skip) or options.only not in run:
                continue
            try:
                row = {"run": run} | apart(functools.partial(measure, profiles=run in PROFILED), make, options.repeats)
            except RuntimeError as error:  # one that fails does not take the others along
                row = {"run": run, "failed": str(error).splitlines()[0]}
            rows.append(row)
            print(json.dumps(row), flush=True)
        report["shapes"][name] = {"shape": dataclasses.asdict(shape), **command, "rows": rows}
        _write(options, report)
    if options.horizons:
        shape, rows = SHAPES["long"], []
        report["horizons"] = {"shape": dataclasses.asdict(shape), **command, "rows": rows}
        for run in ("ours replay", "plain bptt", "plain checkpoint", "plain replay"):
            horizons = [h for h in HORIZONS if h <= MOST_PLAIN or run == "ours replay"]
            rows += apart(over_horizons, shape, run, horizons, 1)
            _write(options, report)


def _write(options: argparse.Namespace, report: dict) -> None:
    if options.out:
        options.out.write_text(json.dumps(report, indent=1) + "\n")
    if options.plot:
        plots.draw_rollouts(report, options.plot)


if __name__ == "__main__":
    main()
