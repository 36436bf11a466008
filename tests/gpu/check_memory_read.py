"""Checks the CUDA kernel of `memory_read` on a Hopper GPU. Run by hand:

    PYTHONPATH=. python tests/gpu/check_memory_read.py --out DIRECTORY

Each check compares with float64 or bit for bit with another call; every part of a tile, both ways in which tiles are
copied, masks, NaN in hidden places. The exit status is 1 if one failed. `DIRECTORY/memory_read_checks.json` holds the
figures.
"""

import functools
import threading

import cuda_checks
import torch
from triton_calls import LAYOUTS, answer, contiguous, differing, same_bits

from memformer_kernels import backend as backends
from memformer_kernels import memory_read, testing
from memformer_kernels.testing import Case, cotangent, error_bound, make_case, shares_of_bound

WIDTHS = (8, 20, 64, 80, 96, 128)
SLOTS = (65, 128, 129, 256, 321, 330, 384, 640, 900, 1024, 2100)  # clusters of every size; three groups of slots
TOKENS = (1, 63, 64, 129, 200, 1000)
CROWD = 60  # times the batch


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


def with_nan(tensor):
    """In one token's row."""
    tensor = tensor.clone()
    tensor[0, 0, 3] = float("nan")
    return tensor


def check_bound(dtype):
    """G1: every element of output and gradients within 2 `error_bound`. G7: so in a batch that larger blocks take."""
    worst, count = {}, 0
    shapes = [(w, m, TOKENS[i % 6]) for i, (w, m) in enumerate((w, m) for w in WIDTHS for m in SLOTS)]
    shapes += [(64, 2100, 64), (128, 2100, 64)]  # one tile of tokens, which groups of slots hand on at once
    shapes += [(64, 300, 9000), (96, 300, 9000), (64, 128, 9000), (96, 100, 9000)]  # more than one chunk of tokens
    shapes += [(64, 100, 2500), (20, 128, 2500), (128, 128, 1100), (8, 65, 1100)]
    shapes += [(80, 96, 200), (96, 80, 1000), (72, 150, 129), (96, 192, 700), (80, 280, 200), (96, 200, 1000)]
    shapes += [(128, 192, 200), (128, 90, 129), (112, 280, 1000), (64, 96, 960), (40, 80, 960)]
    for i, (width, slots, tokens) in enumerate(shapes):
        amplitude, masked = (0.1, 1.0, 3.0)[i % 3], 0.3 if tokens in (1100, 2500) else (0, 0, 0.3, 0.9)[i % 4]
        heads = 40 if tokens == 64 else 3  # more than run at a time
        case = case_of(dtype, heads=heads, slots=slots, tokens=tokens, width=width, amplitude=amplitude, masked=masked)
        shares = shares_of_bound(run(case), answer(case), error_bound(case, device="cuda"))
        worst.update({name: max(share, worst.get(name, 0.0)) for name, share in shares.items()})
        assert all(share <= 1 for share in shares.values()), f"D {width} M {slots} L {tokens}: {shares}"
        crowd = infer(case.map(lambda t: t.repeat(CROWD, *[1] * (t.ndim - 1)))).unflatten(0, (CROWD, 2))
        alone = infer(case)
        assert all(same_bits(part, alone) for part in crowd), f"D {width} M {slots} L {tokens}: in a larger batch"
        count += 1
    return {"cases": count, "shares of 2 error_bound": worst}


def check_layouts(dtype):
    """G11, and the two ways of copying: the bits of contiguous tensors in every layout, saved or not."""
    for width, slots in ((64, 330), (96, 330), (64, 100), (96, 128), (80, 170)):
        case = case_of(dtype, slots=slots, tokens=150, width=width)
        grad = cotangent(case)
        assert same_bits(run(case, grad).output, infer(case)), "what is saved changes the output"
        for layout in LAYOUTS:
            moved = {name: layout(case.tensors[name]) for name in ("query", "key", "value")}
            same = {name: contiguous(tensor) for name, tensor in moved.items()}
            found = differing(run(case.replace(**same), grad), run(case.replace(**moved), grad))
            assert not found, f"{layout.__name__}, D {width}: {found}"
    return {"layouts": len(LAYOUTS)}


def check_hidden(dtype):
    """G3, G4: NaN in hidden slots changes no bit, and NaN of tokens does not reach their gradients; all hidden is
    exactly 0; all shown is what no mask is."""
    for width, slots, tokens in (
        (64, 330, 130),
        (64, 330, 200),
        (128, 513, 130),
        (64, 100, 130),
        (128, 128, 130),
        (64, 100, 1100),
        (80, 100, 1100),
        (96, 90, 700),
        (80, 170, 130),
        (96, 330, 130),
        (128, 200, 700),
    ):
        case = case_of(dtype, slots=slots, tokens=tokens, width=width, masked=0.4)
        grad = cotangent(case)
        mask, query = case.tensors["slot_mask"], case.tensors["query"]
        nothing = hidden_as(case.replace(slot_mask=torch.zeros_like(mask)), float("nan"))
        for poisoned, arriving in (
            (case, with_nan(grad)),
            (case.replace(query=with_nan(query)), grad),
            (nothing, with_nan(grad)),
            (nothing.replace(query=with_nan(query)), grad),
        ):
            grads, hidden = run(poisoned, arriving).grads, ~poisoned.tensors["slot_mask"][:, None, :, None]
            assert not any(grads[name].masked_select(hidden).any() for name in ("key", "value")), "hidden slots"
        assert not differing(run(hidden_as(case, 0.0), grad), run(hidden_as(case, float("nan")), grad))
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
    key = torch.where(torch.arange(64, device="cuda") == 0, float("-inf"), case.tensors["key"])
    lost = case.replace(query=case.tensors["query"].abs() + 0.1, key=key)
    for seen in (lost, lost.replace(slot_mask=torch.rand(2, 400, device="cuda") < 0.7)):
        assert infer(seen).isnan().all(), "logits of minus infinity alone"
    for tokens in (1, 64):  # past the end of a tile nothing may become of infinity
        case = case_of(dtype, batch=1, heads=1, slots=65, tokens=tokens, width=8)
        key = case.tensors["key"].clone()
        key[0, 0, 7, 0] = float("-inf")
        found = run(case.replace(query=case.tensors["query"].abs() + 0.1, key=key)).grads
        assert found["value"].isfinite().all() and found["key"].isfinite().all(), f"an infinite key, L {tokens}"
    return {}


def check_batch(dtype):
    """G7, G8: a row has the same bits alone, and a hundred times over."""
    shapes = (64, 520, 333), (64, 520, 1000), (128, 520, 333), (64, 128, 2500), (128, 96, 333)
    shapes += (64, 500, 1000), (64, 300, 600), (96, 100, 1100), (128, 256, 1100)  # held for several tiles of tokens
    shapes += (96, 256, 1100), (96, 150, 600)
    for i, (width, slots, tokens) in enumerate(shapes):
        sizes = dict(slots=slots, tokens=tokens, width=width, masked=(0, 0.3)[i % 2])
        cuda_checks.batches(run, case_of(dtype, batch=40, heads=8, **sizes))
    return {"repeats": 100}


def check_host(dtype):
    for width, slots in ((64, 330), (20, 330), (64, 100), (96, 128)):
        cuda_checks.saved_on_the_host(run, case_of(dtype, slots=slots, tokens=150, width=width))
    return {}


def check_graph(dtype):
    """G12: a CUDA graph, with changed inputs."""
    for slots in (100, 330):
        cases = [case_of(dtype, slots=slots, tokens=500, width=64, seed=seed) for seed in range(4)]
        cuda_checks.graph_of(run, cases[0], cases[1:])
    return {}


def check_compiled(dtype):
    """G15: `torch.compile`."""
    for slots in (100, 330):
        cuda_checks.compiled(run, memory_read, case_of(dtype, slots=slots, tokens=100, width=64))
    return {}


def check_large(dtype):
    """G10: offsets past 2^31 elements, and more heads than a grid has rows."""
    base = torch.empty(2**31 + 2**20, dtype=dtype, device="cuda")
    for step in (2**31 // 329 // 8 * 8 + 8, 2**31 // 329 // 8 * 8 + 9):
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


def check_thread(dtype):
    """The first call of a thread, which has no context of the device yet: a tile map is not made without one."""
    cuda = backends.implementation("memory_read", "cuda")
    for slots in (100, 330):
        case = case_of(dtype, slots=slots, tokens=70, width=64)
        query, key, value = case.tensors.values()
        grad, options, made = cotangent(case), (0.125, False), []
        output, *saved = cuda.forward(query, key, value, None, *options, True)
        saved = (output, *saved) if slots > cuda.ALONE else (None, saved[0], None)
        calls = (
            functools.partial(cuda.forward, query, key, value, None, *options, False),
            functools.partial(cuda.backward, grad, query, key, value, None, *saved, *options),
        )
        for call in calls:
            thread = threading.Thread(target=lambda call=call, made=made: made.append(call()))
            thread.start()
            thread.join()
        assert len(made) == 2, f"M {slots}: a call raised"
        assert same_bits(made[0][0], output) and all(map(same_bits, made[1], calls[1]())), f"M {slots}"
    return {}


def check_sanitizer(dtype):
    return cuda_checks.sanitize(__file__, dtype)


def small_calls(dtype):
    for width, masked in ((64, 0), (20, 0), (128, 0), (80, 0.3)):
        for slots in (100, 325):
            run(case_of(dtype, batch=1, heads=2, slots=slots, tokens=330, width=width, masked=masked))
    for masked in (0, 0.3):  # more tiles than multiprocessors: slots held for several, but for the last
        for width, slots in ((128, 180), (128, 100), (96, 200), (80, 170), (64, 90), (64, 128)):
            infer(case_of(dtype, batch=1, heads=70, slots=slots, tokens=330, width=width, masked=masked))
    for slots, tokens in ((250, 256), (128, 384), (90, 384)):
        infer(case_of(dtype, batch=1, heads=132, slots=slots, tokens=tokens, width=64, masked=0.3))


CHECKS = (
    check_bound,
    check_layouts,
    check_hidden,
    check_values,
    check_batch,
    check_host,
    check_graph,
    check_compiled,
    check_large,
    check_thread,
    check_sanitizer,
)


if __name__ == "__main__":
    cuda_checks.main(__doc__, "memory_read_checks.json", CHECKS, small_calls)
