"""Measures launch parameters of the Triton kernels on the GPU at hand: what `memformer-kernels tune` runs.

For each kernel, head width and tile of slots, every candidate of `SPACES` runs on one shape, the fastest is kept, and a
table comes out that `tiles.load_table` takes. The package's own tables, `tile_tables/sm_<architecture>.json`, are
written by it. The products' operands are bfloat16; the rows hold for float16 too.
"""

import itertools
import json
import multiprocessing
import os
import statistics
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
import triton

from memformer_kernels import tiles
from memformer_kernels.ops.memory_read import triton as read
from memformer_kernels.ops.memory_write import triton as write

HOPPER = "memory_read_forward_hopper"  # runs only where it has a row
SPACES = {
    "memory_read_forward_resident": dict(
        BLOCK_L=(64, 128), chunk=(256, 512, 1024), num_warps=(4, 8), num_stages=(1, 2, 3)
    ),
    "memory_read_forward": dict(BLOCK_L=(64, 128), BLOCK_M=(32, 64, 128), num_warps=(4, 8), num_stages=(2, 3, 4)),
    HOPPER: dict(BLOCK_L=(64, 128), BLOCK_M=(64, 128), chunk=(512, 1024, 2048), num_warps=(4, 8)),
    "memory_read_backward_resident": dict(BLOCK_L=(32, 64, 128), num_warps=(4, 8), num_stages=(1, 2, 3)),
    "memory_write_forward_attend": dict(
        BLOCK_L=(32, 64, 128), num_warps=(4, 8), num_stages=(2, 3, 4), maxnreg=(None, 128)
    ),
    "memory_write_backward_resident": dict(BLOCK_L=(32, 64, 128), num_warps=(4, 8), num_stages=(1, 2, 3)),
    "attention_backward_rows": dict(
        BLOCK_ROWS=(64, 128), BLOCK_KEYS=(32, 64, 128), num_warps=(4, 8), num_stages=(2, 3)
    ),
    "attention_backward_keys": dict(
        BLOCK_ROWS=(32, 64, 128), BLOCK_KEYS=(64, 128), num_warps=(4, 8), num_stages=(2, 3)
    ),
}
RESIDENT = ("memory_read_forward_resident", "memory_read_backward_resident")
RESIDENT += ("memory_write_forward_attend", "memory_write_backward_resident")


@dataclass(frozen=True)
class Problem:
    """One row of the table: a kernel for a head width and, of kernels that depend on it, a number of slots."""

    kernel: str
    width: int
    slots: int

    @property
    def row(self) -> str:
        block_d = tiles.head_block(self.width)
        block_m = tiles.slot_tile(self.slots, 2, block_d, torch.device("cuda", 0)) if self.kernel in RESIDENT else 0
        return tiles.row_name(2, block_d, self.slots if self.kernel == HOPPER else block_m)

    def sizes(self) -> dict[str, int]:
        many = self.slots > 256
        if self.width <= 64:
            return dict(batch=32, heads=16, tokens=1024) if many else dict(batch=64, heads=8, tokens=512)
        return dict(batch=8, heads=16, tokens=4096)

    def candidates(self) -> Iterator[dict[str, int]]:
        space = SPACES[self.kernel]
        for values in itertools.product(*space.values()):
            yield dict(zip(space, values, strict=True))
        if self.kernel == HOPPER:
            yield {}  # the kernel that would run without it

    def use(self, candidate: dict[str, int]) -> None:
        """From now on the kernel runs with `candidate`, and no other in its place."""
        tiles.use_rows({HOPPER: {self.row: {}}, self.kernel: {self.row: candidate}})


def problems(widths: tuple[int, ...] = (64, 128)) -> list[Problem]:
    resident = [Problem(kernel, d, m) for kernel in RESIDENT for d in widths for m in (16, 32, 64, 128)]
    others = [Problem(kernel, d, 1024) for kernel in SPACES if kernel not in (*RESIDENT, HOPPER) for d in widths]
    if tiles.architecture(torch.device("cuda", 0)) == 90:
        others += [Problem(HOPPER, d, m) for d in widths for m in (128, 256)]
    return resident + others


def calls(problem: Problem, batch: int | None = None) -> Callable[[], object]:
    """A closure that runs the pass which the kernel belongs to."""
    sizes = problem.sizes()
    sizes["batch"] = batch or sizes["batch"]
    generator = torch.Generator("cuda").manual_seed(0)
    B, H, L, M, D = sizes["batch"], sizes["heads"], sizes["tokens"], problem.slots, problem.width

    def normal(*shape):
        return torch.randn(shape, generator=generator, device="cuda").to(torch.bfloat16)

    per_token, per_slot = (B, H, L, D), (B, H, M, D)
    scale = D**-0.5
    if not problem.kernel.startswith("memory_write"):
        call = normal(*per_token), normal(*per_slot), normal(*per_slot), None
        if "forward" in problem.kernel:
            return lambda: read.forward(*call, scale, False, False)
        saved = read.forward(*call, scale, False, True)
        saved = saved if saved[1] is not None else (None, None, None)
        grad = normal(*per_token)
        return lambda: read.backward(grad, *call, *saved, scale, False)
    call = (
        *(normal(*per_slot), normal(*per_slot), normal(B, M, H * D)),
        *(normal(*per_token), normal(*per_token), normal(M, H * D), None),
    )
    if "forward" in problem.kernel:
        return lambda: write.forward(*call, 2 * scale, 1e-12, False, False)
    saved = write.forward(*call, 2 * scale, 1e-12, False, True)[1:]
    grad = normal(B, M, H * D)
    return lambda: write.backward(grad, *call, *saved, 2 * scale, 1e-12, False)


def try_one(problem: Problem, candidate: dict[str, int]) -> str | None:
    """Compiles a candidate into Triton's cache on disk and runs it once; the error where it cannot run."""
    problem.use(candidate)
    try:
        calls(problem, batch=1)()
        torch.cuda.synchronize()
    except Exception as error:  # too much shared memory, a tile that a product cannot have, a compiler's fault
        return f"{type(error).__name__}: {error}".split("\n")[0][:200]
    return None


def microseconds(call: Callable[[], object], repeats: int = 4, replays: int = 5) -> float:
    """Median device time of a call, from replays of a CUDA graph."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        call()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            for _ in range(repeats):
                call()
        times = []
        for _ in range(replays + 1):
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            graph.replay()
            end.record()
            end.synchronize()
            times.append(start.elapsed_time(end) / repeats * 1e3)
    return statistics.median(times[1:])


def tune(rows: list[Problem], jobs: int, report: Callable[[str], None], progress: Callable[[float], None]) -> dict:
    """The table: per kernel and row its fastest candidate, and under "measured" the microseconds of every one.

    `report` gets a line for each row, `progress` the part that is done, 0 to 1.
    """
    table: dict[str, dict[str, dict]] = {}
    measured: dict[str, list] = {}
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    # a process for each candidate: after a fault on the GPU a process can do nothing more there
    with ProcessPoolExecutor(jobs, mp_context=context, max_tasks_per_child=1) as pool:
        pending = [(p, [(c, pool.submit(try_one, p, c)) for c in _without_chunks(p)]) for p in rows]
        for index, (problem, tried) in enumerate(pending):
            progress(index / len(pending))
            usable = []
            for candidate, done in tried:
                if (error := done.result()) is None:
                    usable.append(_without_chunk(candidate))
                elif "out of resource" not in error:
                    report(f"{problem.kernel:32} {problem.row:24} cannot run {candidate}: {error}")
            times = []
            call = calls(problem)
            for candidate in problem.candidates():
                if _without_chunk(candidate) in usable:
                    problem.use(candidate)
                    times.append((microseconds(call), candidate))
            times.sort(key=lambda pair: pair[0])
            if times and times[0][1]:
                table.setdefault(problem.kernel, {})[problem.row] = times[0][1]
                report(f"{problem.kernel:32} {problem.row:24} {times[0][0]:8.1f} us of {len(times)}: {times[0][1]}")
            measured[f"{problem.kernel} {problem.row}"] = times
    tiles.use_rows({})
    return {"kernels": table, "measured": measured}


def _without_chunk(candidate: dict[str, int]) -> dict[str, int]:
    """What is compiled: the size of a chunk is known at run time only."""
    return {name: value for name, value in candidate.items() if name != "chunk"}


def _without_chunks(problem: Problem) -> list[dict[str, int]]:
    """One candidate for each that is compiled."""
    return list({tuple(_without_chunk(c).items()): c for c in problem.candidates()}.values())


def run(out: Path, only: str, jobs: int | None, progress: Callable[[float], None]) -> list[Path]:
    """Measures every kernel whose name holds `only`, and prints as it goes; writes the table, and the times of all
    candidates."""
    if not torch.cuda.is_available():
        raise ValueError("tune: needs a CUDA device, and none is available; the package's own tables are used")
    rows = [problem for problem in problems() if only in problem.kernel]
    if not rows:
        raise ValueError(f"tune: --kernel must be part of one of {', '.join(SPACES)}, got {only!r}")
    started = time.perf_counter()
    result = tune(rows, jobs or os.cpu_count() or 1, lambda line: print(line, flush=True), progress)
    header = {
        "gpu": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "command": "memformer-kernels tune",
        "seconds": round(time.perf_counter() - started),
    }
    out.mkdir(parents=True, exist_ok=True)
    files = out / f"sm_{tiles.architecture(torch.device('cuda', 0))}.json", out / "measured.json"
    files[0].write_text(json.dumps(header | {"kernels": result["kernels"]}, indent=1) + "\n")
    files[1].write_text(json.dumps(header | {"measured": result["measured"]}) + "\n")
    return list(files)
