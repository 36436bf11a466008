"""Whole rollouts on a GPU, forward and backward: full back-propagation, checkpoints and replay, in plain PyTorch,
compiled, and ours, with the budgets between replay and full back-propagation.

    python benchmarks/rollout.py --out benchmarks/results/rollout_h200.json --plot docs/images/rollout.png
    python benchmarks/rollout.py --shapes small --skip compiled,budget

A time is the median of wall times from the first call to the end of the last kernel, gradients set to None before;
"queued" is that of rollouts that follow one another without a wait, as in training, where the host prepares the next
one meanwhile, and sets gradients to None. "busy" is the sum of the kernels' times, some of which may run side by side,
profiled at the end. Peak memory is what a rollout adds to the model and its segments, gradients and cuBLAS workspaces
included: what the allocator hands out at most, and what recorded graphs hold beside it all the time.
"""

import argparse
import dataclasses
import gc
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

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
PROFILED = ("plain bptt", "ours replay")


def rollouts(shape: Shape, skip: list[str]) -> Iterator[tuple[str, Make]]:
    """Names, and what builds the model and its rollout: one stands at a time."""
    segments = shape.segments()

    def of_plain(method: str, compiled: bool) -> Make:
        def make() -> tuple[torch.nn.Module, Callable[[], None]]:
            torch.manual_seed(0)
            model = shape.plain().to(CUDA, torch.bfloat16)
            cell = torch.compile(model, dynamic=False) if compiled else model

            def run() -> None:
                plain.METHODS[method](cell, segments, model.initial_memory(shape.batch))

            return model, run

        return make

    def of_ours(wrap: Callable, shape: Shape = shape, **options) -> Make:
        def make() -> tuple[torch.nn.Module, Callable[[], None]]:
            torch.manual_seed(0)
            model = shape.ours().to(CUDA, torch.bfloat16)
            cell = wrap(model.cell)

            def run() -> None:
                start = model.initial_memory(shape.batch)
                memory_replay(cell, segments, start, reduction="mean", **options)[0].backward()

            return model, run

        return make

    for method in plain.METHODS:
        yield f"plain {method}", of_plain(method, False)
    for method in ("bptt", "replay"):
        yield f"compiled {method}", of_plain(method, True)
    yield "ours bptt, no graphs", of_ours(lambda cell: cell, method="bptt")
    yield "ours replay, no graphs", of_ours(lambda cell: cell)
    yield "ours replay", of_ours(CapturedCell)
    for recompute in ("none", "all"):
        other = dataclasses.replace(shape, recompute=recompute)
        yield f"ours replay, recompute {recompute}", of_ours(CapturedCell, other)
    whole = 0 if "budget" in skip else graphs_of_a_rollout(shape)
    for fraction in FRACTIONS if whole else ():
        yield (
            f"ours, budget {whole * fraction / MIB:.0f} MiB",
            of_ours(CapturedCell, activation_budget=int(whole * fraction)),
        )


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


def build(make: Make) -> tuple[torch.nn.Module, Callable[[], None], Callable[[], None]]:
    """The model, a rollout, and a rollout whose gradients are none from before."""
    gc.collect()
    torch.cuda.empty_cache()
    if hasattr(torch._C, "_cuda_clearCublasWorkspaces"):  # of the run before
        torch._C._cuda_clearCublasWorkspaces()
    model, run = make()

    def step() -> None:
        model.zero_grad(set_to_none=True)
        run()

    return model, run, step


def measure(make: Make, repeats: int) -> dict:
    model, run, step = build(make)
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
    return {
        "ms": round(statistics.median(walls) * 1e3, 2),
        "queued_ms": round(queued * 1e3, 2),
        "host_ms": round(statistics.median(hosts) * 1e3, 2),
        "first_call_s": round(first, 2),
        "peak_MiB": round(peak / MIB),
        "held_MiB": round(sum(s["total_size"] for s in pools) / MIB),
    }


def profiled(make: Make) -> dict:
    """The sum of the kernels' times. After all that is timed, as the profiler stays in the process."""
    _, _, step = build(make)
    step()
    step()
    with profile(activities=[ProfilerActivity.CUDA]) as recorded:
        step()
        torch.cuda.synchronize()
    found = [e for e in recorded.profiler.kineto_results.events() if e.device_type() == torch.autograd.DeviceType.CUDA]
    return {"busy_ms": round(sum(e.duration_ns() for e in found) / 1e6, 2), "kernels": len(found)}


def over_horizons(shape: Shape, repeats: int) -> list[dict]:
    """Time and peak memory as the horizon grows."""
    rows = []
    for horizon in HORIZONS:
        longer = dataclasses.replace(shape, horizon=horizon)
        for name, make in rollouts(longer, ["budget"]):
            if name == "ours replay" or name in ("plain bptt", "plain checkpoint", "plain replay") and horizon <= 64:
                rows.append({"horizon": horizon, "run": name} | measure(make, repeats))
                print(json.dumps(rows[-1]), flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", default=",".join(SHAPES), help=f"some of {','.join(SHAPES)}")
    parser.add_argument("--skip", default="", help="leave out runs whose name contains one of these: compiled,budget")
    parser.add_argument("--only", default="", help="only runs whose name contains this")
    parser.add_argument("--repeats", type=int, default=5, help="rollouts timed at least, for half a second; default 5")
    parser.add_argument("--horizons", action="store_true", help="also time and memory over 1 to 256 segments")
    parser.add_argument("--out", type=Path, help="write the figures here, in the place of those of the same shapes")
    parser.add_argument("--plot", type=Path, help="draw them here (needs matplotlib)")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("rollout: needs a GPU; a CPU measures nothing here")
    torch.set_float32_matmul_precision("high")
    skip = options.skip.split(",") if options.skip else []
    machine = {"gpu": torch.cuda.get_device_name(), "torch": torch.__version__, "dtype": "bfloat16"}
    report = json.loads(options.out.read_text()) if options.out and options.out.exists() else {"shapes": {}}
    report |= machine
    asked = f"--shapes {options.shapes} --skip {options.skip!r} --only {options.only!r} --repeats {options.repeats}"
    command = {"command": f"python benchmarks/rollout.py {asked}" + " --horizons" * options.horizons}
    to_profile: list[tuple[dict, Make]] = []
    for name in options.shapes.split(",") if options.shapes else ():
        shape, rows = SHAPES[name], []
        print(f"{name}: {dataclasses.asdict(shape)}", flush=True)
        for run, make in rollouts(shape, skip):
            if any(part in run for part in skip) or options.only not in run:
                continue
            try:
                row = {"run": run} | measure(make, options.repeats)
                to_profile += [(row, make)] * (run in PROFILED)
            except (RuntimeError, torch.OutOfMemoryError) as error:  # one that fails does not take the others along
                row = {"run": run, "failed": str(error).splitlines()[0]}
            torch._dynamo.reset()
            rows.append(row)
            print(json.dumps(row), flush=True)
        report["shapes"][name] = {"shape": dataclasses.asdict(shape), **command, "rows": rows}
        _write(options, report)
    if options.horizons:
        rows = over_horizons(SHAPES["long"], 1)
        report["horizons"] = {"shape": dataclasses.asdict(SHAPES["long"]), **command, "rows": rows}
        _write(options, report)
    for row, make in to_profile:
        row |= profiled(make)
        print(json.dumps(row), flush=True)
        _write(options, report)


def _write(options: argparse.Namespace, report: dict) -> None:
    if options.out:
        options.out.write_text(json.dumps(report, indent=1) + "\n")
    if options.plot:
        plots.draw_rollouts(report, options.plot)


if __name__ == "__main__":
    main()
