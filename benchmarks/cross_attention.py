"""`cross_attention` in the place of `scaled_dot_product_attention`: alone, and in BART of the `transformers` package.

    python benchmarks/cross_attention.py --out cross_attention.json

Alone: forward, and forward with backward, of 12 heads of width 64, 1,024 queries to 32, 64 and 128 keys. In BART: the
base size with random weights, a source of as many tokens and a target of 1,024, forward and backward of the whole model
with each implementation of attention; 12 of its 18 attend to the source, and run memory_read. bfloat16, batch 16. Times
are device milliseconds, by a CUDA graph where one can be recorded; wall_ms is what a loop in Python sees. Results are
compared before anything is timed.

A CPU measures nothing here: it checks equality, at a small size.
"""

import argparse
import contextlib
import json
import sys
from collections.abc import Callable
from pathlib import Path

import torch
import transformers
from torch.nn.functional import scaled_dot_product_attention

from memformer_kernels import cross_attention
from memformer_kernels.benchmarking import timing
from memformer_kernels.integrations.transformers import register

GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if GPU else "cpu")
DTYPE = torch.bfloat16 if GPU else torch.float64
BATCH, TARGET, KEYS = (16, 1024, (32, 64, 128)) if GPU else (2, 24, (8, 16))
HEADS, WIDTH, LAYERS = (12, 64, 6) if GPU else (2, 8, 1)
LIMIT = 2e-2 if GPU else 1e-10  # of the norm: two bfloat16 runs of a model differ by about that
FUNCTIONS = {"sdpa": scaled_dot_product_attention, "cross_attention": cross_attention}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="write the figures here")
    options = parser.parse_args()
    machine = torch.cuda.get_device_name() if GPU else "a CPU, which measures nothing"
    print(f"on {machine}; torch {torch.__version__}, transformers {transformers.__version__}")
    report = {"machine": machine, "torch": torch.__version__, "transformers": transformers.__version__}
    report |= {"command": "python benchmarks/cross_attention.py", "batch": BATCH, "queries": TARGET, "heads": HEADS}
    report |= {"width": WIDTH, "dtype": str(DTYPE)[6:], "attention": [], "bart": []}
    with torch.cuda.stream(torch.cuda.Stream()) if GPU else contextlib.nullcontext():
        for keys in KEYS:
            for name, rows in (("attention", alone(keys)), ("bart", bart(keys))):
                report[name] += rows
                for row in rows:
                    print(name, json.dumps(row), flush=True)
                if options.out:
                    options.out.write_text(json.dumps(report, indent=1) + "\n")
    sys.exit(not all(row["equal"] for name in ("attention", "bart") for row in report[name]))


def alone(keys: int) -> list[dict]:
    torch.manual_seed(0)

    def tensor(length: int) -> torch.Tensor:  # as a layer makes it: heads side by side in the projection
        projected = torch.randn(BATCH, length, HEADS, WIDTH, device=DEVICE, dtype=DTYPE)
        return projected.transpose(1, 2).requires_grad_()

    given = [tensor(TARGET), tensor(keys), tensor(keys)]
    grad = torch.randn_like(given[0])

    def both(function: Callable) -> list[torch.Tensor]:
        output = function(*given)
        return [output, *torch.autograd.grad(output, given, grad)]

    @torch.no_grad()
    def forward(function: Callable) -> torch.Tensor:
        return function(*given)

    rows = []
    results = {name: both(function) for name, function in FUNCTIONS.items()}
    far = max(map(_difference, *results.values()))
    for way, run in (("forward", forward), ("forward and backward", both)):
        row = {"keys": keys, "pass": way, "difference": far, "equal": far <= LIMIT}
        rows.append(row | {name: _timed(lambda run=run, f=f: run(f)) for name, f in FUNCTIONS.items()})
    return rows


def bart(keys: int) -> list[dict]:
    sizes = dict(d_model=HEADS * WIDTH, vocab_size=512, dropout=0.0, attention_dropout=0.0, use_cache=False)
    for part in ("encoder", "decoder"):
        sizes |= {f"{part}_layers": LAYERS, f"{part}_attention_heads": HEADS, f"{part}_ffn_dim": 4 * HEADS * WIDTH}
    torch.manual_seed(0)
    model = transformers.BartModel(transformers.BartConfig(**sizes)).to(DEVICE, DTYPE)
    texts = {"input_ids": keys, "decoder_input_ids": TARGET}
    texts = {name: torch.randint(4, 512, (BATCH, n), device=DEVICE) for name, n in texts.items()}

    def step() -> None:
        model.zero_grad(set_to_none=False)
        model(**texts).last_hidden_state.float().pow(2).mean().backward()

    results, row = [], {"keys": keys, "pass": "forward and backward of the model"}
    for name, implementation in (("sdpa", "sdpa"), ("cross_attention", register())):
        model.set_attn_implementation(implementation)
        step()
        results.append(torch.cat([p.grad.double().flatten() for p in model.parameters()]))
        row[name] = _timed(step)
    far = _difference(*results)
    return [row | {"difference": far, "equal": far <= LIMIT}]


def _timed(call: Callable[[], object]) -> dict:
    if not GPU:
        return {}
    for _ in range(3):
        call()
    found = timing.device_time([call])
    return {
        "ms": round(found.ms, 4),
        "method": found.method,
        "wall_ms": round(timing.eager_time([call])["wall_us"] / 1e3, 4),
    }


def _difference(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return ((ours.double() - theirs.double()).norm() / theirs.double().norm()).item()


if __name__ == "__main__":
    main()
