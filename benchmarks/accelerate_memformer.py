"""The PyPI package memformer before and after `accelerate`: time, peak memory and equality of results.

    python benchmarks/accelerate_memformer.py --out accelerate_h200.json
    python benchmarks/accelerate_memformer.py --shapes readme --dtypes bfloat16

A segment: forward and backward of the model with a target, from a given memory; the package's code, that by
`torch.compile`, accelerated, and that compiled. A document: memory replay of segments with a target after the last one,
by the package's function and by ours, of its model and of the accelerated one, in Python and as CUDA graphs; and full
back-propagation. bfloat16 is autocast, float32 is IEEE float32. Times are medians of wall times from the first call to
the end of the last kernel; peak memory is what a run adds to the model, its input and what stands before the run,
gradients included. Equality: results and gradients against the package's code in float64, as a part of their norm, of
the package's code and of the accelerated model.

A CPU measures nothing here: it checks equality, at a tiny shape, and exits with 1 where that fails.
"""

import argparse
import dataclasses
import gc
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import torch
from memformer import Memformer
from memformer import memory_replay_backprop as their_replay

from memformer_kernels import accelerate
from memformer_kernels.integrations.memformer import memory_replay_backprop, segment_cell
from memformer_kernels.replay import CapturedCell
from memformer_kernels.training.peak_memory import peak_bytes

GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if GPU else "cpu")
ROUNDINGS = 2.0  # how much further from float64 the accelerated model may be than the package's code


@dataclasses.dataclass(frozen=True)
class Shape:
    batch: int
    length: int
    width: int
    heads: int
    encoder_layers: int
    decoder_layers: int
    slots: int
    segments: int
    updates: int = 1

    def model(self) -> Memformer:
        torch.manual_seed(0)
        encoder = dict(enc_depth=self.encoder_layers, enc_heads=self.heads, enc_max_seq_len=self.length)
        decoder = dict(dec_depth=self.decoder_layers, dec_heads=self.heads, dec_max_seq_len=self.length)
        sizes = dict(dim=self.width, num_memory_slots=self.slots, mem_update_attn_heads=self.heads)
        sizes |= dict(enc_num_tokens=256, dec_num_tokens=256, num_mem_updates=self.updates)
        return Memformer(**sizes, **encoder, **decoder).to(DEVICE)

    def document(self, segments: int) -> dict[str, torch.Tensor]:
        generator = torch.Generator().manual_seed(1)
        sizes = dict(src=segments * self.length, tgt=self.length)
        given = {name: torch.randint(256, (self.batch, n), generator=generator) for name, n in sizes.items()}
        given["src_mask"] = torch.rand(given["src"].shape, generator=generator) > 0.1
        return {name: tensor.to(DEVICE) for name, tensor in given.items()}

    def memory(self) -> torch.Tensor:
        generator = torch.Generator().manual_seed(2)
        return torch.randn(self.batch, self.slots, self.width, generator=generator).to(DEVICE)


# The configuration of the package's README, of one text and of eight, and those of Wu et al., arXiv 2010.06891v2,
# table 2 and section 5, with bytes for a vocabulary
SHAPES = {
    "readme": Shape(1, 1024, 512, 8, 2, 2, 128, 8),
    "readme-batch": Shape(8, 1024, 512, 8, 2, 2, 128, 8),
    "paper-wikitext": Shape(16, 128, 512, 8, 4, 16, 512, 16),
    "paper-mnist": Shape(64, 28, 256, 4, 4, 8, 64, 28),
    "tiny": Shape(2, 12, 32, 4, 2, 2, 6, 3, updates=2),
}
Run = Callable[[], object]


def main() -> None:
    options = _parser().parse_args()
    names = options.shapes.split(",") if options.shapes else [n for n in SHAPES if (n == "tiny") != GPU]
    machine = torch.cuda.get_device_name() if GPU else platform.processor() or "CPU"
    if not GPU:
        print("a CPU: nothing is measured, equality is checked")
    report = json.loads(options.out.read_text()) if options.out and options.out.exists() else {"shapes": {}}
    report |= {"machine": machine, "torch": torch.__version__, "memformer": "0.3.1"}
    asked = f"--shapes {','.join(names)} --dtypes {options.dtypes} --repeats {options.repeats}"
    asked += f" --skip {options.skip}" if options.skip else ""
    command = {"command": f"python benchmarks/accelerate_memformer.py {asked}"}
    equal = True
    for name in names:
        shape = SHAPES[name]
        print(f"\n{name}: {dataclasses.asdict(shape)}", flush=True)
        report["shapes"][name] = about = {"shape": dataclasses.asdict(shape), **command, "equality": {}, "rows": []}
        for dtype in options.dtypes.split(",") if GPU else ("float64", "float32"):
            about["equality"][dtype] = errors = equality(shape, dtype)
            equal &= errors["equal"]
            print(f"{dtype}: {errors}", flush=True)
        for dtype in options.dtypes.split(",") if GPU else ():
            for row in measure(shape, dtype, options):
                about["rows"].append(row)
                print(json.dumps(row), flush=True)
                _write(report, options.out)
        _write(report, options.out)
    sys.exit(not equal)


def equality(shape: Shape, dtype: str) -> dict:
    """Distances from the package's code in float64, of one segment and of replay: the package's code, and ours."""
    segments = min(shape.segments, 3)
    small = dataclasses.replace(shape, batch=min(shape.batch, 2))

    def results(dtype: str, accelerated: bool) -> dict[str, torch.Tensor]:
        model, given = small.model(), small.document(segments)
        memory = small.memory()
        if dtype == "float64":
            model, memory = model.double(), memory.double()
        if accelerated:
            accelerate(model)
        first = {name: tensor[:, : small.length] for name, tensor in given.items()}
        with _autocast(dtype):
            made = model(**first, mems=memory)
            _loss(made).backward()
        found = dict(outputs=_flat(made), segment=_gradients(model))
        model.zero_grad()
        with _autocast(dtype):
            (memory_replay_backprop if accelerated else their_replay)(model, **given)
        return {**found, "replay": _gradients(model)}

    exact = results("float64", False)
    distances = {}
    for name, accelerated in (("package", False), ("accelerated", True)):
        found = results(dtype, accelerated)
        distances[name] = {k: ((found[k] - v).norm() / v.norm()).item() for k, v in exact.items()}
    limits = {k: max(ROUNDINGS * distance, 1e-12) for k, distance in distances["package"].items()}
    return {**distances, "equal": all(distances["accelerated"][k] <= limit for k, limit in limits.items())}


def measure(shape: Shape, dtype: str, options: argparse.Namespace) -> Iterator[dict]:
    """A row for each run, each with a model of its own: one stands at a time."""
    given = shape.document(1)
    memory = shape.memory()
    document = shape.document(shape.segments)

    def segment(model: torch.nn.Module) -> Run:
        def run() -> None:
            with _autocast(dtype):
                made = model(**given, mems=memory)
            _loss(made).backward()

        return run

    def compiled_segment(model: torch.nn.Module) -> Run:
        return segment(torch.compile(model, dynamic=False))

    def replay(function: Callable, **arguments: object) -> Callable[[torch.nn.Module], Run]:
        def of(model: torch.nn.Module) -> Run:
            made = {name: make(model) for name, make in arguments.items()}

            def run() -> None:
                with _autocast(dtype):
                    function(model, **document, **made)

            return run

        return of

    by_graphs = replay(memory_replay_backprop, cell=lambda model: CapturedCell(segment_cell(model)))
    all_segments = replay(memory_replay_backprop, method=lambda model: "bptt")
    for name, accelerated, make in (
        ("segment, package", False, segment),
        ("segment, package compiled", False, compiled_segment),
        ("segment, accelerated", True, segment),
        ("segment, accelerated and compiled", True, compiled_segment),
        ("document, package's replay", False, replay(their_replay)),
        ("document, our replay of the package's model", False, replay(memory_replay_backprop)),
        ("document, our replay, accelerated", True, replay(memory_replay_backprop)),
        ("document, our replay, accelerated, CUDA graphs", True, by_graphs),
        ("document, full back-propagation of the package's model", False, all_segments),
        ("document, full back-propagation, accelerated", True, all_segments),
    ):
        if options.skip and options.skip in name:
            continue
        model = shape.model()
        if accelerated:
            accelerate(model)
        try:
            figures = timed(model, make(model), options.repeats)
        except (RuntimeError, torch.OutOfMemoryError) as error:  # one that fails does not take the others along
            figures = {"failed": str(error).splitlines()[0]}
        del model
        torch._dynamo.reset()
        gc.collect()
        torch.cuda.empty_cache()
        yield {"run": name, "dtype": dtype, **figures}


def timed(model: torch.nn.Module, run: Run, repeats: int) -> dict:
    def fresh() -> None:
        model.zero_grad(set_to_none=True)
        run()

    for _ in range(3):  # compilation, graphs, libraries
        fresh()
    model.zero_grad(set_to_none=True)
    peak, walls = peak_bytes(run, DEVICE), []
    for _ in range(repeats):
        torch.cuda.synchronize()
        started = time.perf_counter()
        fresh()
        torch.cuda.synchronize()
        walls.append(time.perf_counter() - started)
    return {"ms": round(statistics.median(walls) * 1e3, 3), "peak_MiB": round(peak / 2**20, 1)}


def _loss(made: tuple) -> torch.Tensor:
    """Of all that a model returns: the decoder's loss, and that the memory is used afterwards."""
    return made.dec_out + made.mem.square().mean()


def _autocast(dtype: str) -> torch.autocast:
    return torch.autocast(DEVICE.type, torch.bfloat16, enabled=dtype == "bfloat16")


def _gradients(model: torch.nn.Module) -> torch.Tensor:
    return _flat([torch.zeros_like(p) if p.grad is None else p.grad for p in model.parameters()])


def _flat(tensors: Iterable[torch.Tensor]) -> torch.Tensor:
    return torch.cat([t.detach().double().flatten() for t in tensors])


def _write(report: dict, path: Path | None) -> None:
    if path:
        path.write_text(json.dumps(report, indent=1) + "\n")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", help=f"some of {','.join(SHAPES)}; all but tiny by default")
    parser.add_argument("--dtypes", default="float32,bfloat16", help="of what is measured")
    parser.add_argument("--skip", help="leave out runs whose name contains this, such as compiled")
    parser.add_argument("--repeats", type=int, default=10, help="runs timed, default 10")
    parser.add_argument("--out", type=Path, help="write the figures here, in the place of those of the same shapes")
    return parser


if __name__ == "__main__":
    main()
