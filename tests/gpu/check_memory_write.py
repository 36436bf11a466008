"""Checks the CUDA kernels of `memory_write` on a Hopper GPU. Run by hand:

    PYTHONPATH=. python tests/gpu/check_memory_write.py --out DIRECTORY

Each check compares with float64 or bit for bit with another call; every part of a tile, blocks of one, two and three
groups of slots, several chunks of tokens, hidden tiles, NaN in hidden places. The exit status is 1 if one failed.
`DIRECTORY/memory_write_checks.json` holds the figures.
"""

import cuda_checks
import torch
from triton_calls import LAYOUTS, answer, contiguous, differing, differing_in_layout, rows

from memformer_kernels import memory_write, testing
from memformer_kernels.ops.memory_write.cuda import LEAST_SLOTS, LEAST_TOKENS
from memformer_kernels.testing import Case, cotangent, error_bound, make_case, shares_of_bound

WIDTHS = (8, 20, 64, 80, 96, 128)
# Of few slots, which need many tokens, the backward is Triton's; from 129 on it is the read's, of many tokens Triton's.
SLOTS = (1, 40, 64, 65, 96, 100, 128, 129, 330)
TOKENS = (1, 63, 64, 65, 128, 200, 513, 1000, 3000)
HIDDEN = (0, 0.3, 0, 0.9, "a tile", "one row", 1.0)


def write(**arguments):
    return memory_write(**arguments, backend="cuda")


def run(case, grad=None):
    return testing.run(case, grad_output=grad, function=write)


def case_of(dtype, **sizes):
    return make_case("memory_write", dtype=dtype, device="cuda", **{"batch": 2, "heads": 3, **sizes})


def hidden_as(case, value):
    hidden = ~case.tensors["token_mask"][:, None, :, None]
    return case.replace(**{name: case.tensors[name].masked_fill(hidden, value) for name in ("key", "value")})


def rows_of(result, part):
    return testing.Result(result.output[part], {name: grad[part] for name, grad in result.grads.items()})


def masked_case(dtype, hidden, **sizes):
    """With that share of the tokens hidden, or a whole tile, or all of the first row."""
    if hidden == 0:
        return case_of(dtype, **sizes)
    case = case_of(dtype, masked=0.3 if isinstance(hidden, str) else hidden, **sizes)
    mask = case.tensors["token_mask"]
    if hidden == "a tile":
        mask[:, 64:128] = False
    elif hidden == "one row":
        mask[0] = False
    return case


def check_bound(dtype):
    """G1, G3: every element of output and gradients within 2 `error_bound`; NaN in hidden tokens changes no bit."""
    worst, count = {}, 0
    shapes = [(w, m, t) for w in WIDTHS for m in SLOTS for t in TOKENS if m >= LEAST_SLOTS or t >= LEAST_TOKENS]
    shapes = [s for i, s in enumerate(shapes) if i % 3 == 0 or s[2] == 3000]
    for i, (width, slots, tokens) in enumerate(shapes):
        amplitude, hidden = (0.1, 1.0, 3.0, 1.0)[i % 4], HIDDEN[i % 7]
        sizes = dict(slots=slots, tokens=tokens, width=width, amplitude=amplitude, bias=width != 20)
        sizes |= dict(heads=50 if tokens == 64 else 3, temperature=(0.25, 1.0)[i % 2])  # more than run at a time
        sizes |= dict(carried_dtype=torch.float32 if width == 80 else dtype)
        case = masked_case(dtype, hidden, **sizes)
        result = run(case)
        shares = shares_of_bound(result, answer(case), error_bound(case, device="cuda"))
        worst.update({name: max(share, worst.get(name, 0.0)) for name, share in shares.items()})
        assert all(share <= 1 for share in shares.values()), f"D {width} M {slots} L {tokens} {hidden}: {shares}"
        if hidden:
            unread, zeros = (run(hidden_as(case, value)) for value in (float("nan"), 0.0))
            assert not differing(unread, zeros), f"D {width} M {slots} L {tokens} {hidden}: hidden NaN"
        count += 1
    return {"cases": count, "shares of 2 error_bound": worst}


def check_layouts(dtype):
    """G11: in every layout the same, but for the order of sums over the channels of a slot, which is Triton's."""
    for width, slots, tokens in ((64, 100, 150), (80, 128, 150), (128, 96, 150), (64, 200, 150), (64, 40, 520)):
        case = case_of(dtype, slots=slots, tokens=tokens, width=width)
        grad = cotangent(case)
        for layout in LAYOUTS:
            moved = {name: layout(case.tensors[name]) for name in ("query", "own_key", "slots", "key", "value")}
            same = {name: contiguous(tensor) for name, tensor in moved.items()}
            found = run(case.replace(**same), grad), run(case.replace(**moved), grad)
            assert not differing_in_layout("memory_write", *found), f"{layout.__name__}, D {width}"
    return {"layouts": len(LAYOUTS)}


def check_hidden(dtype):
    """G4: a mask that hides nothing is no mask; hidden tokens have gradients of exactly 0."""
    for width, slots, tokens in ((64, 128, 700), (80, 100, 700), (128, 128, 1500), (64, 300, 200), (64, 40, 700)):
        case = masked_case(dtype, "a tile", slots=slots, tokens=tokens, width=width)
        grad, mask = cotangent(case), case.tensors["token_mask"]
        grads = run(hidden_as(case, float("nan")), grad).grads
        hidden = ~mask[:, None, :, None]
        assert not any(grads[name].masked_select(hidden).any() for name in ("key", "value")), "hidden tokens' gradients"
        shown = case.replace(token_mask=torch.ones_like(mask))
        plain = Case(case.op, {n: t for n, t in case.tensors.items() if n != "token_mask"}, case.options)
        assert not differing(run(shown, grad), run(plain, grad)), "a mask that hides nothing"
    return {}


def check_values(dtype):
    """G5: NaN stays in the head and row that sees it."""
    case = case_of(dtype, slots=100, tokens=200, width=64)
    key = case.tensors["key"].clone()
    key[1, 2, 77] = float("nan")
    found = run(case.replace(key=key)).grads
    for name in ("key", "value"):
        assert not found[name][0].isnan().any(), name  # the norm mixes a row's heads
        assert found[name][1, 2].isnan().all(), name
    return {}


def check_saving(dtype):
    """Whether gradients are asked for changes no bit, in either order of two calls of one shape."""
    for slots, grad_first in ((40, False), (41, True), (100, False), (101, True), (200, False), (201, True)):
        case = case_of(dtype, slots=slots, tokens=1500, width=64)
        for with_grad in (grad_first, not grad_first, grad_first):
            if not with_grad:
                with torch.no_grad():
                    plain = write(**case.tensors, **case.options)
                continue
            result = run(case)
            shares = shares_of_bound(result, answer(case), error_bound(case, device="cuda"))
            assert all(share <= 1 for share in shares.values()), f"M {slots}: {shares}"
        assert torch.equal(plain, result.output), f"M {slots}"
    return {}


def check_batch(dtype):
    """G7, G8: a row has the same bits alone, by blocks of one group of slots, and in a batch, by blocks of two or, of
    180 slots, three; and a hundred times over."""
    shapes = (64, 128, 2500), (128, 96, 2500), (96, 100, 333), (64, 100, 65), (64, 180, 300), (64, 40, 1200)
    for width, slots, tokens in shapes:
        sizes = dict(batch=40, heads=6, slots=slots, tokens=tokens, width=width)
        cuda_checks.batches(run, case_of(dtype, bias=False, **sizes))
    return {"repeats": 100}


def check_host(dtype):
    for width, slots in ((64, 100), (20, 100), (128, 96), (64, 200)):
        cuda_checks.saved_on_the_host(run, case_of(dtype, slots=slots, tokens=150, width=width))
    return {}


def check_graph(dtype):
    """G12: a CUDA graph, with changed inputs."""
    cases = [case_of(dtype, slots=128, tokens=900, width=64, seed=seed) for seed in range(4)]
    cuda_checks.graph_of(run, cases[0], cases[1:])
    return {}


def check_compiled(dtype):
    """G15: `torch.compile`."""
    cuda_checks.compiled(run, memory_write, case_of(dtype, slots=128, tokens=100, width=64))
    return {}


def check_large(dtype):
    """G10: offsets past 2^31 elements, and more heads than a grid has rows."""
    base = torch.empty(2**31 + 2**20, dtype=dtype, device="cuda")
    step = 2**31 // 199 // 8 * 8 + 8
    case = case_of(dtype, batch=1, heads=1, slots=100, tokens=200, width=64)
    key = base.as_strided((1, 1, 200, 64), (0, 0, step, 1)).copy_(case.tensors["key"])
    assert not differing(run(case.replace(key=key)), run(case)), "rows far apart"
    del base, key
    many = case_of(dtype, batch=70000, heads=1, slots=65, tokens=3, width=8, bias=False)
    grad = cotangent(many)
    last = slice(69999, 70000)
    assert not differing(rows_of(run(many, grad), last), run(rows(many, last), grad[last])), "the last of many"
    return {}


def check_sanitizer(dtype):
    return cuda_checks.sanitize(__file__, dtype)


def small_calls(dtype):
    """By blocks of one group of slots, with more heads of two, and in the third call of three."""
    calls = (
        (64, 100, 67, 0),
        (64, 100, 2, 0.3),
        (64, 180, 89, 0),
        (20, 100, 2, 0.3),
        (80, 100, 67, 0.3),
        (128, 100, 2, 0),
    )
    for width, slots, heads, masked in calls:
        run(case_of(dtype, batch=1, heads=heads, slots=slots, tokens=200, width=width, masked=masked))
    run(case_of(dtype, batch=1, heads=2, slots=40, tokens=LEAST_TOKENS, width=64, masked=0.3))


CHECKS = (
    check_bound,
    check_layouts,
    check_hidden,
    check_values,
    check_saving,
    check_batch,
    check_host,
    check_graph,
    check_compiled,
    check_large,
    check_sanitizer,
)


if __name__ == "__main__":
    cuda_checks.main(__doc__, "memory_write_checks.json", CHECKS, small_calls)
