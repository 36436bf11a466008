"""Checks and times the CUDA kernels of `memory_forget` on a GPU. Run by hand, with the extension built in place:

    python setup.py build_ext --inplace && PYTHONPATH=. python tests/gpu/check_memory_forget.py --out DIRECTORY

Every check compares with float64, or bit for bit with another call. All of them run; the exit status is 1 if one
failed. `DIRECTORY/memory_forget.json` holds the figures.
"""

import argparse
import json
import math
import statistics
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
import torch._functorch.config

from memformer_kernels import _extension
from memformer_kernels.ops.memory_forget import cuda

DEVICE = "cuda"
EPS = 1e-12
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
UNIT_ROUNDOFF = {torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}
SMALLEST = {torch.float32: 2.0**-149, torch.float16: 2.0**-24, torch.bfloat16: 2.0**-133}

# Roundings of the float32 arithmetic on the way to an element: a third of those on the longest path (16 terms in a
# thread, 5 levels in a warp, 15 further warps, a dozen around the sum), because their errors have both signs.
ROUNDINGS = 16 * UNIT_ROUNDOFF[torch.float32]


def inputs(B, M, C, dtype, seed=0, amplitude=1.0):
    generator = torch.Generator(DEVICE).manual_seed(seed)

    def draw(*shape):
        return (torch.randn(shape, generator=generator, device=DEVICE) * amplitude).to(dtype)

    return draw(B, M, C), draw(M, C), draw(B, M, C)


def oracle(slots, bias, grad, eps=EPS):
    """What the kernels should give, in float64, and how far from it they may be: {name: (answer, bound)}."""
    roundoff, smallest = UNIT_ROUNDOFF[slots.dtype], SMALLEST[slots.dtype]
    g, z = grad.double(), slots.double() + bias.double()
    norm = torch.linalg.vector_norm(z, dim=-1, keepdim=True)
    inv_norm = 1 / norm.clamp_min(eps)
    unit = z * inv_norm
    along = torch.where(norm > eps, unit * (unit * g).sum(-1, keepdim=True), 0)
    dz = inv_norm * (g - along)
    terms = inv_norm * (g.abs() + torch.where(norm > eps, unit.abs() * (unit * g).abs().sum(-1, keepdim=True), 0))
    grad_bias = dz.sum(0)

    def stored(answer, bound):
        return answer, bound + roundoff * answer.abs() + smallest

    return {
        "output": stored(unit, ROUNDINGS * unit.abs()),
        "inv_norm": (inv_norm.squeeze(-1), ROUNDINGS * inv_norm.squeeze(-1) + SMALLEST[torch.float32]),
        "grad_slots": stored(dz, ROUNDINGS * terms),
        "grad_bias": stored(grad_bias, (ROUNDINGS + len(g) * 2.0**-24) * terms.sum(0)),
    }


def run(slots, bias, grad, eps=EPS):
    output, inv_norm = cuda.forward(slots, bias, eps)
    grad_slots, grad_bias = cuda.backward(grad, slots, bias, inv_norm, eps)
    return {"output": output, "inv_norm": inv_norm, "grad_slots": grad_slots, "grad_bias": grad_bias}


def worst(got, expected):
    """The largest error in units of its bound; Inf where a NaN or Inf is not the answer's too."""
    ratio = 0.0
    for name, (answer, bound) in expected.items():
        if answer.numel() == 0:
            continue
        error = (got[name].double() - answer).abs() / bound
        error = error.masked_fill(got[name] == answer.to(got[name].dtype), 0)  # grad / eps of a zero row overflows fp16
        ratio = max(ratio, error.nan_to_num(nan=math.inf).max().item())
    return ratio


def same_bits(a, b):
    return all(torch.equal(bits(a[name]), bits(b[name])) for name in a)


def bits(tensor):
    return tensor.contiguous().view({2: torch.int16, 4: torch.int32}[tensor.element_size()])


# Checks. Each returns figures for the report, or raises AssertionError.


def check_accuracy():
    ratio = 0.0
    for dtype in DTYPES:
        for C in (1, 7, 64, 96, 512, 1000, 1024, 4096, 8192):
            for B in (1, 2, 3, 64):
                for M in (1, 5, 128):
                    arguments = inputs(B, M, C, dtype, seed=B + M + C)
                    here = worst(run(*arguments), oracle(*arguments))
                    assert here <= 1, f"{dtype} B {B} M {M} C {C}: error of {here:.3g} bounds"
                    ratio = max(ratio, here)
    return {"largest error in bounds": ratio}


def check_bound_is_tight():
    """Inverse test of the bounds: an answer that is off by a little more than they allow must not pass."""
    for dtype in DTYPES:
        arguments = inputs(3, 5, 1000, dtype)
        expected = oracle(*arguments)
        off = 1 + 4 * (UNIT_ROUNDOFF[dtype] + ROUNDINGS)
        for name, result in run(*arguments).items():
            assert worst({name: result.double() * off}, {name: expected[name]}) > 1, f"{name} times {off} passes"


def transposed(x):
    return x.mT.contiguous().mT


def strided(x):
    wide = x.new_full((*x.shape[:-1], 2 * x.shape[-1]), math.nan)
    wide[..., ::2] = x
    return wide[..., ::2]


def padded(x):
    wide = x.new_full((*(size + 2 for size in x.shape[:-1]), x.shape[-1] + 8), math.nan)
    view = wide[(*(slice(1, -1) for _ in x.shape[:-1]), slice(3, -5))]
    view.copy_(x)
    return view


def padded_by_vectors(x):
    wide = x.new_full((*(size + 2 for size in x.shape[:-1]), x.shape[-1] + 16), math.nan)
    view = wide[(*(slice(1, -1) for _ in x.shape[:-1]), slice(8, -8))]
    view.copy_(x)
    return view


def odd_offset(x):
    flat = x.new_full((x.numel() + 3,), math.nan)
    view = flat[1 : 1 + x.numel()].view(x.shape)
    view.copy_(x)
    return view


def batch_inside(x):
    return x.movedim(0, -2).contiguous().movedim(-2, 0) if x.dim() == 3 else x


def check_layouts():
    """Any layout gives the bits that contiguous tensors give."""
    layouts = (transposed, strided, padded, padded_by_vectors, odd_offset, batch_inside)
    for dtype in DTYPES:
        for C in (7, 64, 1000, 1024, 5000):
            slots, bias, grad = inputs(3, 5, C, dtype)
            expected = run(slots, bias, grad)
            for layout in layouts:
                got = run(layout(slots), layout(bias), layout(grad))
                assert same_bits(got, expected), f"{layout.__name__} {dtype} C {C}"
                for i in range(3):
                    mixed = [slots, bias, grad]
                    mixed[i] = layout(mixed[i])
                    assert same_bits(run(*mixed), expected), f"{layout.__name__} of argument {i}, {dtype} C {C}"


def check_expanded():
    """Stride 0: the gradient of a sum, one row for every batch, one bias for every slot."""
    for dtype in DTYPES:
        for C in (7, 64, 1000):
            slots, bias, grad = inputs(3, 5, C, dtype)
            for arguments in (
                (slots, bias, grad[:1, :1, :1].expand_as(grad)),
                (slots, bias, grad[:1].expand_as(grad)),
                (slots[:1].expand_as(slots), bias[:1].expand_as(bias), grad[:, :, :1].expand_as(grad)),
            ):
                assert same_bits(run(*arguments), run(*(x.contiguous() for x in arguments))), f"{dtype} C {C}"


def check_extremes():
    """Finite for every finite input; rows of every magnitude side by side."""
    ratio = 0.0
    magnitudes = {
        torch.float32: (3e38, 1e38, 1e30, 1e19, 1.0, 1e-10, 1e-18, 1e-30, 1e-38, 1e-44, 0.0),
        torch.bfloat16: (3e38, 1e38, 1e30, 1e19, 1.0, 1e-10, 1e-18, 1e-30, 1e-38, 0.0),
        torch.float16: (6e4, 1.0, 1e-4, 6e-8, 0.0),
    }
    for dtype in DTYPES:
        rows = torch.tensor(magnitudes[dtype], device=DEVICE, dtype=torch.float64)
        for C in (7, 1000, 1024, 8192):
            for eps in (1e-12, 1e-30, 1e-37, 1e-3, 1e4):
                _, _, grad = inputs(6, len(rows), C, dtype, seed=C)
                generator = torch.Generator(DEVICE).manual_seed(C)
                # magnitudes from 1/16 to 1, some of them 0: the largest z stays below the largest float
                shape = torch.rand((6, len(rows), C), generator=generator, device=DEVICE, dtype=torch.float64)
                sign = (torch.rand(shape.shape, generator=generator, device=DEVICE) < 0.5) * 2 - 1
                slots = (shape.clamp_min(1 / 16) * sign * rows[:, None] * (shape > 0.1)).to(dtype)
                bias = torch.zeros_like(slots[0])
                slots[1] = slots[1].roll(1, 0)  # another magnitude of the same slot, in flight with it
                slots[2] = rows.to(dtype)[:, None]
                expected, got = oracle(slots, bias, grad, eps), run(slots, bias, grad, eps)
                assert got["output"].isfinite().all() and got["inv_norm"].isfinite().all(), f"{dtype} C {C} eps {eps}"
                for name in ("output", "inv_norm", "grad_slots"):
                    # a gradient may be above the largest float by itself: g / eps
                    in_range = expected[name][0].abs() < torch.finfo(got[name].dtype).max
                    pair = tuple(torch.where(in_range, x, y) for x, y in zip(expected[name], (0.0, 1.0), strict=True))
                    here = worst({name: torch.where(in_range, got[name], 0)}, {name: pair})
                    assert here <= 1, f"{name} {dtype} C {C} eps {eps}: error of {here:.3g} bounds"
                    ratio = max(ratio, here)
    return {"largest error in bounds": ratio}


def check_zero_rows():
    """z = 0 gives exactly 0, with gradient g / eps."""
    for dtype in DTYPES:
        eps = 1e-3
        slots, bias, grad = inputs(3, 5, 96, dtype)
        slots[1, 2] = -bias[2]
        got = run(slots, bias, grad, eps)
        assert (got["output"][1, 2] == 0).all()
        expected = grad[1, 2].double() / eps
        error = (got["grad_slots"][1, 2].double() - expected).abs()
        assert (error <= (UNIT_ROUNDOFF[dtype] + 2 * 2.0**-24) * expected.abs() + SMALLEST[dtype]).all(), dtype


def check_isolation():
    """NaN and Inf reach their own row, and of the bias gradient their own slot."""
    for dtype in DTYPES:
        for C in (7, 512, 1000, 5000):
            arguments = inputs(6, 5, C, dtype)
            clean = run(*arguments)
            for value in (math.nan, math.inf):
                for i, name in ((0, "slots"), (2, "grad_output")):
                    dirty = [x.clone() for x in arguments]
                    dirty[i][2, 3, C // 2] = value
                    got = run(*dirty)
                    where = f"{value} in {name}, {dtype} C {C}"
                    assert got["grad_slots"][2, 3].isnan().any() and got["grad_bias"][3].isnan().any(), where
                    assert i == 2 or got["output"][2, 3].isnan().any(), where
                    for result in ("output", "inv_norm", "grad_slots"):
                        got[result][2, 3] = clean[result][2, 3]
                    got["grad_bias"][3] = clean["grad_bias"][3]
                    assert same_bits(got, clean), where


def check_batch_invariance():
    """A row has the same bits alone, in any batch, at any place."""
    for dtype in DTYPES:
        for C in (7, 512, 1000, 1024, 5000):
            slots, bias, grad = inputs(64, 5, C, dtype)
            slots[7] *= 0  # a neighbour that takes the rare path
            whole = run(slots, bias, grad)
            for part in (slice(0, 1), slice(5, 8), slice(62, 64), slice(3, 36)):
                got = run(slots[part], bias, grad[part])
                for name in ("output", "inv_norm", "grad_slots"):
                    assert torch.equal(bits(got[name]), bits(whole[name][part])), f"{name} {dtype} C {C} {part}"


def check_repeats(repeats=100):
    for dtype in DTYPES:
        for B, M, C in ((64, 128, 512), (7, 3, 1000)):
            arguments = inputs(B, M, C, dtype)
            first = run(*arguments)
            assert all(same_bits(run(*arguments), first) for _ in range(repeats)), f"{dtype} C {C}"
    return {"repeats": repeats}


def check_inputs_are_read_only():
    arguments = inputs(5, 3, 1000, torch.bfloat16)
    before = [x.clone() for x in arguments]
    run(*arguments)
    assert all(torch.equal(x, y) for x, y in zip(arguments, before, strict=True))


def check_many_rows():
    ratio = 0.0
    for B, M in ((70_000, 1), (1, 70_000), (300, 300)):
        for C in (7, 8):
            arguments = inputs(B, M, C, torch.float32)
            ratio = max(ratio, worst(run(*arguments), oracle(*arguments)))
    assert ratio <= 1, f"error of {ratio:.3g} bounds"
    return {"largest error in bounds": ratio}


def check_empty():
    for B, M, C in ((0, 3, 8), (2, 0, 8), (2, 3, 0), (0, 0, 0)):
        slots, bias, grad = inputs(B, M, C, torch.bfloat16)
        got = run(slots, bias, grad)
        assert got["output"].shape == got["grad_slots"].shape == slots.shape and got["inv_norm"].shape == (B, M)
        assert got["grad_bias"].shape == bias.shape and (got["grad_bias"] == 0).all()
        assert C > 0 or (got["inv_norm"] == torch.tensor(1 / EPS)).all()


def check_limits():
    """What cannot run is refused with its reason, and what can is not."""
    slots, bias, _ = inputs(2, 3, 8, torch.float32)
    assert cuda.unsupported_reason(slots, bias) is None
    wide = torch.empty(1, 1, 8193, device=DEVICE)
    for arguments, words in (
        ((slots.cpu(), bias), "slots must be on a CUDA device, got cpu"),
        ((slots, bias.cpu()), "bias must be on a CUDA device, got cpu"),
        ((slots.double(), bias.double()), "slots must be float32, float16 or bfloat16"),
        ((slots, bias.half()), "bias must have the dtype of slots"),
        ((wide, wide[0]), "slots must have at most 8192 channels, got 8193"),
        ((slots, bias, 1e-40), "eps must be from"),
    ):
        assert words in (cuda.unsupported_reason(*arguments) or ""), words


def check_large_offsets():
    """More than 2^31 elements: the last rows are right."""
    B, M, C = 4200, 1024, 512
    slots = torch.zeros((B, M, C), device=DEVICE, dtype=torch.bfloat16)
    assert slots.numel() > 2**31
    last, bias, grad_last = inputs(3, M, C, torch.bfloat16)
    slots[-3:] = last
    output, inv_norm = cuda.forward(slots, bias, EPS)
    expected = oracle(last, bias, grad_last)
    ratio = worst({"output": output[-3:], "inv_norm": inv_norm[-3:]}, {k: expected[k] for k in ("output", "inv_norm")})
    del output
    grad = torch.zeros_like(slots)
    grad[-3:] = grad_last
    grad_slots, grad_bias = cuda.backward(grad, slots, bias, inv_norm, EPS)
    got = {"grad_slots": grad_slots[-3:], "grad_bias": grad_bias}
    ratio = max(ratio, worst(got, {name: expected[name] for name in got}))
    assert (grad_slots[:-3] == 0).all() and ratio <= 1, f"error of {ratio:.3g} bounds"
    return {"elements": slots.numel(), "largest error in bounds": ratio}


def check_graph_capture():
    """A captured call follows its inputs, and nothing in it waits for the host."""
    static = inputs(8, 64, 1000, torch.bfloat16)
    run(*static)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run(*static)
    for seed in (1, 2):
        fresh = inputs(8, 64, 1000, torch.bfloat16, seed=seed)
        for x, y in zip(static, fresh, strict=True):
            x.copy_(y)
        graph.replay()
        assert same_bits(captured, run(*fresh)), f"seed {seed}"


def check_streams():
    """Runs on the current stream: work queued before it there is seen."""
    arguments = inputs(64, 128, 512, torch.bfloat16)
    expected = run(*arguments)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    late = torch.zeros_like(arguments[0])
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(20_000_000)
        late.copy_(arguments[0])
        got = run(late, *arguments[1:])
    stream.synchronize()
    assert same_bits(got, expected)


def check_threads():
    arguments = inputs(16, 33, 1000, torch.float16)
    expected = run(*arguments)
    with ThreadPoolExecutor(8) as pool:
        results = list(pool.map(lambda _: run(*arguments), range(64)))
    assert all(same_bits(result, expected) for result in results)


def check_second_device():
    """The current device is 0 and the data is on 1."""
    if torch.cuda.device_count() < 2:
        return {"skipped": "one GPU"}
    arguments = inputs(4, 33, 1000, torch.float16)
    got = run(*(x.to("cuda:1") for x in arguments))
    assert same_bits({name: x.to(DEVICE) for name, x in got.items()}, run(*arguments))
    return None


CHECKS = [value for name, value in list(globals().items()) if name.startswith("check_")]


SHAPE = (64, 1024, 1024)
SETS = 3  # input sets in turn; each is larger than the L2 cache


def expression(slots, bias):
    """The op as one would write it in PyTorch; compiled, it is the peer."""
    z = slots.float() + bias.float()
    return (z / torch.linalg.vector_norm(z, dim=-1, keepdim=True).clamp_min(EPS)).to(slots.dtype)


def device_ms(calls, rounds=5, replays=20):
    """Median milliseconds of a call, from replays of a graph that holds each of `calls` in turn, `rounds` times."""
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for call in calls * 3:
            call()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            for call in calls * rounds:
                call()
        times = []
        for _ in range(replays):
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            graph.replay()
            end.record()
            end.synchronize()
            times.append(start.elapsed_time(end) / (len(calls) * rounds))
    return statistics.median(times)


def copy_rate():
    """Bytes read and written a second by a kernel that only moves memory, 2 GiB of it: what any other can reach."""
    source = torch.randn(2**30, dtype=torch.bfloat16, device=DEVICE)
    target = torch.empty_like(source)  # neg, not copy_: a graph would give a copy to the slower copy engine
    return 2 * source.nbytes / device_ms([lambda: torch.neg(source, out=target)]) * 1e3


def backward_calls(forward, sets):
    """One closure a set, that runs the backward of `forward` alone; its graph is kept."""
    calls = []
    for slots, bias, grad in sets:
        leaves = slots.detach().requires_grad_(), bias.detach().requires_grad_()
        state = {}

        def call(leaves=leaves, grad=grad, state=state):
            if not state:  # on the stream of the timing: autograd runs a backward on the stream of its forward
                state["output"] = forward(*leaves)
            return torch.autograd.grad(state["output"], leaves, grad, retain_graph=True)

        calls.append(call)
    return calls


def host_us(call, repeats=1000):
    for _ in range(20):
        call()
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(repeats):
        call()
    elapsed = time.perf_counter() - start
    torch.cuda.synchronize()
    return elapsed / repeats * 1e6


def timings():
    torch._functorch.config.donated_buffer = False  # the compiled backward is run more than once
    B, M, C = SHAPE
    sets = [inputs(B, M, C, torch.bfloat16, seed=seed) for seed in range(SETS)]
    rate = copy_rate()
    bulk, once = 2 * B * M * C, 2 * M * C + 4 * B * M  # bytes of a [B, M, C]; of bias and inv_norm
    floors = {"forward": (2 * bulk + once) / rate * 1e3, "backward": (3 * bulk + once + 2 * M * C) / rate * 1e3}
    inverse = [cuda.forward(slots, bias, EPS)[1] for slots, bias, _ in sets]
    compiled = torch.compile(expression)
    forwards = {
        "cuda": [lambda s=s: cuda.forward(s[0], s[1], EPS) for s in sets],
        "compiled": [lambda s=s: compiled(s[0], s[1]) for s in sets],
        "eager": [lambda s=s: expression(s[0], s[1]) for s in sets],
    }
    backwards = {
        "cuda": [lambda s=s, i=i: cuda.backward(s[2], s[0], s[1], i, EPS) for s, i in zip(sets, inverse, strict=True)],
        "compiled": backward_calls(compiled, sets),
        "eager": backward_calls(expression, sets),
    }
    results = {"shape": SHAPE, "dtype": "bfloat16", "copy_TB_per_s": rate / 1e12, "floor_ms": floors, "ms": {}}
    for direction, peers in (("forward", forwards), ("backward", backwards)):
        results["ms"][direction] = {}
        for name in list(peers):
            results["ms"][direction][name] = device_ms(peers.pop(name))
            torch.cuda.empty_cache()

    small = inputs(1, 8, 64, torch.bfloat16)
    small_inverse = cuda.forward(*small[:2], EPS)[1]
    results["host_us"] = {
        "unsupported_reason": host_us(lambda: cuda.unsupported_reason(*small[:2], EPS)),
        "forward": host_us(lambda: cuda.forward(*small[:2], EPS)),
        "backward": host_us(lambda: cuda.backward(small[2], *small[:2], small_inverse, EPS)),
    }
    return results


def print_timings(results):
    print(f"\nB, M, C = {results['shape']}, {results['dtype']}; copy {results['copy_TB_per_s']:.2f} TB/s")
    print(f"{'':10}{'floor ms':>10}{'cuda ms':>10}{'of floor':>10}{'compiled':>10}{'eager':>10}")
    for direction, times in results["ms"].items():
        floor = results["floor_ms"][direction]
        ours, share = times["cuda"], f"{floor / times['cuda']:.0%}"
        print(f"{direction:10}{floor:10.4f}{ours:10.4f}{share:>10}{times['compiled']:10.4f}{times['eager']:10.4f}")
    print("host microseconds a call: " + ", ".join(f"{name} {us:.1f}" for name, us in results["host_us"].items()))


def run_checks():
    """All checks, with every uninitialised tensor full of NaN."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    results = {}
    for check in CHECKS:
        name = check.__name__.removeprefix("check_")
        start = time.perf_counter()
        try:
            results[name] = {"passed": True, **(check() or {})}
        except Exception as error:  # the other checks still run
            results[name] = {"passed": False, "error": f"{type(error).__name__}: {error}"}
        results[name]["seconds"] = round(time.perf_counter() - start, 2)
        print(f"{'ok' if results[name]['passed'] else 'FAILED':8}{name}: {results[name]}", flush=True)
    torch.use_deterministic_algorithms(False)
    return results


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="directory of the JSON report")
    parser.add_argument("--no-timing", action="store_true")
    options = parser.parse_args()

    extension = _extension.report()
    print(extension)
    if not extension["loaded"]:
        sys.exit(f"check_memory_forget: {extension['reason']}")
    built = {name: extension[name] for name in ("architectures", "cuda_version")}
    report = {"gpu": torch.cuda.get_device_name(), "torch": torch.__version__, **built}
    report["checks"] = run_checks()
    if not options.no_timing:
        report["timings"] = timings()
        print_timings(report["timings"])
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "memory_forget.json").write_text(json.dumps(report, indent=2) + "\n")
    failed = [name for name, result in report["checks"].items() if not result["passed"]]
    print(f"\n{len(report['checks']) - len(failed)} passed, {len(failed)} failed {' '.join(failed)}")
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
