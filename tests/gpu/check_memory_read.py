"""Checks the CUDA kernel of `memory_read` on a Hopper GPU. Run by hand:

    PYTHONPATH=. python tests/gpu/check_memory_read.py --out DIRECTORY

Each check compares with float64 or bit for bit with another call; every part of a tile, both ways in which tiles are
copied, masks, NaN in hidden places. The exit status is 1 if one failed. `DIRECTORY/memory_read_checks.json` holds the
figures.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import traceback
from pathlib import Path

import torch
from triton_calls import LAYOUTS, answer, contiguous, differing, rows, same_bits

from memformer_kernels import explain, memory_read, testing
from memformer_kernels.testing import Case, cotangent, error_bound, make_case, shares_of_bound

DTYPES = (torch.bfloat16, torch.float16)
WIDTHS = (8, 20, 64, 80, 96, 128)
SLOTS = (129, 321, 330, 384, 640, 900, 1024, 2100)  # clusters of every size; three groups of slots
TOKENS = (1, 63, 64, 129, 200, 1000)


def read(**arguments):
    return memory_read(**arguments, backend="cuda")


def run(case, grad=None):
    return testing.run(case, grad_output=grad, function=read)


def infer(case):
    with torch.no_grad():
        return read(**case.tensors, **case.options)


def case_of(dtype, **sizes):
    return make_case("memory_read", dtype=dtype, device="cuda", **{"batch": 2, "heads": 3, **sizes})


def hidden_as(case, value):
    hidden = ~case.tensors["slot_mask"][:, None, :, None]
    return case.replace(**{name: case.tensors[name].masked_fill(hidden, value) for name in ("key", "value")})


def check_bound(dtype):
    """G1: every element of output and gradients within 2 `error_bound`."""
    worst, count = {}, 0
    shapes = [(w, m, TOKENS[i % 6]) for i, (w, m) in enumerate((w, m) for w in WIDTHS for m in SLOTS)]
    shapes += [(64, 2100, 64), (128, 2100, 64)]  # one tile of tokens, which groups of slots hand on at once
    shapes += [(64, 300, 9000), (96, 300, 9000)]  # more than one chunk of tokens
    for i, (width, slots, tokens) in enumerate(shapes):
        amplitude, masked = (0.1, 1.0, 3.0)[i % 3], (0, 0, 0.3, 0.9)[i % 4]
        heads = 40 if tokens == 64 else 3  # more than run at a time
        case = case_of(dtype, heads=heads, slots=slots, tokens=tokens, width=width, amplitude=amplitude, masked=masked)
        shares = shares_of_bound(run(case), answer(case), error_bound(case, device="cuda"))
        worst.update({name: max(share, worst.get(name, 0.0)) for name, share in shares.items()})
        assert all(share <= 1 for share in shares.values()), f"D {width} M {slots} L {tokens}: {shares}"
        count += 1
    return {"cases": count, "shares of 2 error_bound": worst}


def check_layouts(dtype):
    """G11, and the two ways of copying: the bits of contiguous tensors in every layout, saved or not."""
    for width in (64, 96):
        case = case_of(dtype, slots=330, tokens=150, width=width)
        grad = cotangent(case)
        assert same_bits(run(case, grad).output, infer(case)), "what is saved changes the output"
        for layout in LAYOUTS:
            moved = {name: layout(case.tensors[name]) for name in ("query", "key", "value")}
            same = {name: contiguous(tensor) for name, tensor in moved.items()}
            found = differing(run(case.replace(**same), grad), run(case.replace(**moved), grad))
            assert not found, f"{layout.__name__}, D {width}: {found}"
    return {"layouts": len(LAYOUTS)}


def check_hidden(dtype):
    """G3, G4: NaN in hidden slots changes no bit; all hidden is exactly 0; all shown is what no mask is."""
    for width, slots in ((64, 330), (128, 513)):
        case = case_of(dtype, slots=slots, tokens=130, width=width, masked=0.4)
        grad = cotangent(case)
        assert not differing(run(hidden_as(case, 0.0), grad), run(hidden_as(case, float("nan")), grad))
        mask = case.tensors["slot_mask"]
        nothing = hidden_as(case.replace(slot_mask=torch.zeros_like(mask)), float("nan"))
        assert all(not t.any() for t in run(nothing, grad).tensors().values()), "nothing visible is not 0"
        shown = case.replace(slot_mask=torch.ones_like(mask))
        plain = Case(case.op, {n: t for n, t in case.tensors.items() if n != "slot_mask"}, case.options)
        assert not differing(run(shown, grad), run(plain, grad)), "a mask that hides nothing"
    return {}


def check_values(dtype):
    """G3, G5: a winner's value bit for bit however large its logit; NaN stays in the rows that see it."""
    case = case_of(dtype, slots=400, tokens=200, width=64)
    query, key = torch.zeros_like(case.tensors["query"]), torch.zeros_like(case.tensors["key"])
    largest = 15.0 if dtype == torch.bfloat16 else 4.8  # logits up to 1e30, or as large as float16 has them
    for size in torch.logspace(1.2, largest, 40).tolist():
        query[..., 0], key[..., 0] = size, -size
        key[:, :, 37, 0] = size
        output = infer(case.replace(query=query, key=key))
        assert same_bits(output, case.tensors["value"][:, :, 37:38].expand_as(output)), f"logits of {size} squared"
    poisoned = case.tensors["query"].clone()
    poisoned[1, 2, 77] = float("nan")
    found = infer(case.replace(query=poisoned)).isnan().any(-1)
    assert found.sum() == 1 and found[1, 2, 77], "NaN of one token"
    value = case.tensors["value"].clone()
    value[0, 1, 399] = float("inf")
    found = ~infer(case.replace(value=value)).isfinite().all(-1)
    assert found[0, 1].all() and found.sum() == 200, "infinity of one slot"
    return {}


def check_batch(dtype):
    """G7, G8: a row has the same bits alone, and a hundred times over."""
    for width in (64, 128):
        case = case_of(dtype, batch=40, heads=8, slots=520, tokens=333, width=width)
        grad = cotangent(case)
        whole = run(case, grad).tensors()
        for row in (slice(0, 1), slice(17, 20), slice(39, 40)):
            alone = run(rows(case, row), grad[row]).tensors()
            assert all(same_bits(alone[name], whole[name][row]) for name in whole), f"rows {row}"
        for _ in range(100):
            again = run(case, grad).tensors()
            assert all(same_bits(again[name], whole[name]) for name in whole), "repeats"
    return {"repeats": 100}


def check_graph(dtype):
    """G12: a CUDA graph, with changed inputs."""
    case = case_of(dtype, slots=330, tokens=500, width=64)
    static = case.map(torch.clone)
    infer(static)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = infer(static)
    for seed in range(3):
        other = case_of(dtype, slots=330, tokens=500, width=64, seed=seed + 5)
        for name, tensor in other.tensors.items():
            static.tensors[name].copy_(tensor)
        graph.replay()
        assert same_bits(output, infer(other)), "a replay differs"
    return {}


def check_compiled(dtype):
    """G15: `torch.compile`, one graph."""
    case = case_of(dtype, slots=330, tokens=100, width=64)
    explanation = explain("memory_read", **case.tensors)
    assert explanation.backend == "cuda", str(explanation)
    compiled = torch.compile(lambda **tensors: memory_read(**tensors), fullgraph=True)
    grad = cotangent(case)
    assert not differing(run(case, grad), testing.run(case, grad_output=grad, function=compiled))
    return {}


def check_large(dtype):
    """G10: offsets past 2^31 elements, and more heads than a grid has rows."""
    base = torch.empty(2**31 + 2**20, dtype=dtype, device="cuda")
    for step in (2**31 // 329 // 8 * 8, 2**31 // 329 // 8 * 8 + 1):
        key = base.as_strided((1, 1, 330, 64), (0, 0, step, 1)).copy_(torch.randn(1, 1, 330, 64, device="cuda"))
        query = torch.randn(1, 1, 64, 64, dtype=dtype, device="cuda")
        far, near = (read(query=query, key=k, value=k) for k in (key, key.contiguous()))
        assert same_bits(far, near), f"rows {step} apart"
    del base, key
    many = [torch.randn(70000, 1, n, 8, dtype=dtype, device="cuda") for n in (2, 321, 321)]
    output = read(query=many[0], key=many[1], value=many[2])
    last = read(**{n: t[-1:].contiguous() for n, t in zip(("query", "key", "value"), many, strict=True)})
    assert same_bits(output[-1:], last)
    del output
    grads = [
        torch.autograd.grad(read(**dict(zip(("query", "key", "value"), ts, strict=True))).sum(), ts)
        for ts in ([t.requires_grad_() for t in many], [t[-1:].detach().requires_grad_() for t in many])
    ]
    assert all(same_bits(a[-1:], b) for a, b in zip(*grads, strict=True)), "the last of many heads"
    return {}


def check_sanitizer(dtype):
    """compute-sanitizer: memcheck, synccheck and racecheck of small calls."""
    tool = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    if not Path(tool).is_file():
        return {"skipped": "no compute-sanitizer"}
    found = {}
    for check in ("memcheck", "synccheck", "racecheck"):
        command = [tool, "--tool", check, "--error-exitcode", "9", sys.executable, __file__, "--small", str(dtype)[6:]]
        environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
        result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200)
        assert result.returncode == 0, f"{check}: {result.stdout[-1500:]}{result.stderr[-500:]}"
        found[check] = result.stdout.strip().splitlines()[-1]
    return found


def small_calls(dtype):
    for width, masked in ((64, 0), (20, 0), (128, 0), (80, 0.3)):
        run(case_of(dtype, batch=1, heads=2, slots=325, tokens=70, width=width, masked=masked))


CHECKS = (
    check_bound,
    check_layouts,
    check_hidden,
    check_values,
    check_batch,
    check_graph,
    check_compiled,
    check_large,
    check_sanitizer,
)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="directory of the JSON report")
    parser.add_argument("--only", nargs="+", default=[""], metavar="NAME", help="checks whose name contains a NAME")
    parser.add_argument("--small", choices=[str(d)[6:] for d in DTYPES], help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.small:
        return small_calls(getattr(torch, options.small))
    if options.out is None:
        parser.error("--out is required")
    options.out.mkdir(parents=True, exist_ok=True)
    results = {}
    report = {"gpu": torch.cuda.get_device_name(), "torch": torch.__version__, "checks": results}
    for check in CHECKS:
        for dtype in DTYPES:
            name = f"{check.__name__.removeprefix('check_')} {str(dtype)[6:]}"
            if not any(part in name for part in options.only):
                continue
            try:
                results[name] = {"passed": True} | check(dtype)
            except Exception as error:
                results[name] = {"passed": False, "error": f"{type(error).__name__}: {error}"}
                traceback.print_exc(limit=3)
            print("passed" if results[name]["passed"] else "FAILED", name, results[name], flush=True)
            (options.out / "memory_read_checks.json").write_text(json.dumps(report, indent=2) + "\n")
    sys.exit(not all(result["passed"] for result in results.values()))


if __name__ == "__main__":
    main()
