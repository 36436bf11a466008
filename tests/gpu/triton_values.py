"""Which bits the Triton backend must give: layouts, hidden and visible NaN, exact answers, neighbours in the batch."""

import math

import torch
from triton_calls import (
    LAYOUTS,
    MASKS,
    UNIT_ROUNDOFF,
    Check,
    answer,
    contiguous,
    differing,
    differing_in_layout,
    infer,
    most_resident,
    name_of,
    odd_offset,
    rows,
    run,
    same_bits,
)

from memformer_kernels.testing import Case, cotangent, make_case, relative_error

NO_BIAS_GRADIENT = ["output", "grad_query", "grad_own_key", "grad_slots", "grad_key", "grad_value"]


def small(op, dtype, device, **options):
    options = {"batch": 3, "heads": 2, "slots": 17, "tokens": 37, "width": 16, "masked": 0.4, **options}
    return make_case(op, dtype=dtype, device=device, **options)


def slot_counts(op, dtype):
    """Slots that fit one tile, and slots that do not."""
    return (17,) if op == "memory_forget" else (17, most_resident(dtype))


def check_layouts(device, op, dtype):
    """Every tensor in every layout, the incoming gradient too, gives what contiguous tensors give.

    Not one byte of the memory that they are views of changes.
    """
    for slots in slot_counts(op, dtype):
        case = small(op, dtype, device, slots=slots)
        for turn in range(len(LAYOUTS)):
            tensors = {**case.tensors, "grad": cotangent(case)}
            layouts = {name: LAYOUTS[(turn + i) % len(LAYOUTS)] for i, name in enumerate(tensors)}
            where = f"M {slots}, { {name: layout.__name__ for name, layout in layouts.items()} }"
            placed = {name: layouts[name](tensor) for name, tensor in tensors.items()}
            before = {name: storage(tensor) for name, tensor in placed.items()}
            got, expected = (
                run(Case(op, {name: t for name, t in call.items() if name != "grad"}, case.options), call["grad"])
                for call in (placed, {name: contiguous(tensor) for name, tensor in placed.items()})
            )
            wrong = differing_in_layout(op, got, expected)
            assert not wrong, f"{where}: {wrong}"
            changed = [name for name, tensor in placed.items() if not torch.equal(storage(tensor), before[name])]
            assert not changed, f"{where}: {changed} have changed"


def storage(tensor):
    """A copy of all bytes of the storage that `tensor` is a view of."""
    return torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(tensor.untyped_storage()).clone()


def check_hidden_never_matters(device, op, dtype):
    """NaN and Inf in hidden slots or tokens change no bit, and the gradient there is exactly 0."""
    for slots in slot_counts(op, dtype):
        case = small(op, dtype, device, slots=slots)
        mask = case.tensors[MASKS[op]]
        mask[1] = False
        hidden = ~mask[:, None, :, None].expand_as(case.tensors["key"])
        clean = run(case)
        for junk in (math.nan, math.inf, -math.inf):
            dirty = {name: case.tensors[name].masked_fill(hidden, junk) for name in ("key", "value")}
            got = run(case.replace(**dirty))
            where = f"{junk} M {slots}"
            assert not differing(got, clean), f"{where}: {differing(got, clean)}"
            assert not got.grads["key"][hidden].any() and not got.grads["value"][hidden].any(), where


def seen_in_output(op, name, output, place, bias):
    """Which elements of the output see a NaN in channel 3 of `place` = (batch, head, row)."""
    sees = torch.zeros_like(output, dtype=torch.bool)
    batch, head, row = place
    if op == "memory_forget":
        sees[batch, row] = True
    elif op == "memory_read":
        tokens = row if name == "query" else slice(None)
        sees[batch, head, tokens, 3 if name == "value" else slice(None)] = True
    else:
        slot = slice(None) if name in ("key", "value") else row
        channel = 16 * head + 3 if name in ("value", "slots") else slice(16 * head, 16 * head + 16)
        sees[batch, slot, slice(None) if bias else channel] = True  # the norm sees every channel
    return sees


def check_visible_nan(device, op, dtype):
    """A visible NaN reaches what sees it, and of all else not one bit."""
    for slots in slot_counts(op, dtype):
        for bias in (True, False) if op == "memory_write" else (True,):
            case = small(op, dtype, device, slots=slots, bias=bias)
            if op != "memory_forget":
                case.tensors[MASKS[op]][1] = torch.arange(case.tensors[MASKS[op]].shape[1], device=device) != 2
            clean = run(case)
            per_row = [name for name in clean.grads if name != "bias"]
            for name in per_row:
                dirty = case.tensors[name].clone()
                place = (1, 1, dirty.shape[-2] - 1)  # the last row: in a tile that is not full
                dirty[(1, place[2], 16 + 3) if name == "slots" else (*place, 3)] = math.nan
                got = run(case.replace(**{name: dirty}))
                sees = seen_in_output(op, name, got.output, place, bias)
                where = f"{name} M {slots} bias {bias}"
                assert got.output[sees].isnan().all(), f"{where}: not in every row that sees it"
                assert same_bits(got.output[~sees], clean.output[~sees]), f"{where}: in a row that does not see it"
                for other in (0, 2):
                    wrong = [n for n in per_row if not same_bits(got.grads[n][other], clean.grads[n][other])]
                    assert not wrong, f"{where}: gradients {wrong} of another batch row"
                assert any(got.grads[n][1].isnan().any() for n in per_row), f"{where}: in no gradient"


def check_nothing_visible(device, op, dtype):
    """The write keeps its slots, the read gives 0, bit for bit; gradients follow."""
    for slots in slot_counts(op, dtype):
        for masked, tokens in ((1, 37), (1, 2500 if device == "cuda" else 70), (0, 0)):
            for carried in {dtype, torch.float32} if op == "memory_write" else {dtype}:
                sizes = {"slots": slots, "tokens": tokens, "masked": masked, "bias": False}
                if op == "memory_read" and tokens == 0:
                    sizes.update(slots=0, tokens=37)
                case = small(op, dtype, device, carried_dtype=carried, **sizes)
                where = f"{name_of(dtype)} {sizes}"
                if op == "memory_write":
                    case.tensors["slots"][0, 0, :3] = torch.tensor([-0.0, 6e4, -(2.0**-20)], device=device)
                got, grad = run(case), cotangent(case)
                if op == "memory_write":
                    assert same_bits(got.output, case.tensors["slots"]), f"{where}: slots are not kept"
                    assert same_bits(got.grads.pop("slots"), grad), f"{where}: gradient of slots"
                else:
                    assert not got.output.any(), f"{where}: output is not 0"
                wrong = [name for name, g in got.grads.items() if g.any()]  # NaN is any
                assert not wrong, f"{where}: gradients {wrong} are not 0"
        if op == "memory_read":
            case = small(op, dtype, device, slots=slots)
            case.tensors["slot_mask"][1] = False
            grad = cotangent(case)
            grad[1, :, 2] = math.nan
            got = run(case, grad).tensors()
            wrong = [name for name, tensor in got.items() if tensor[1].any() or not tensor[0].any()]
            assert not wrong, f"M {slots}, one row sees nothing: {wrong}"


def check_saturated(device, op, dtype):
    """A logit ahead by more than 120: the winner's value bit for bit, and gradients that are finite."""
    for slots in slot_counts(op, dtype):
        sizes = dict(batch=2, heads=2, slots=slots, tokens=70, width=64, masked=0, bias=False, temperature=1.0)
        case = small(op, dtype, device, **sizes)
        keys = torch.where(case.tensors["key"] < 0, -1.0, 1.0).to(dtype)
        choices = torch.cat([keys, keys.new_ones(2, 2, 1, 64)], 2) if op == "memory_write" else keys
        generator = torch.Generator().manual_seed(5)
        winners = torch.randint(choices.shape[2], case.tensors["query"].shape[:3], generator=generator).to(device)
        pick = winners[..., None].expand(-1, -1, -1, 64)
        case = case.replace(key=keys, query=800 * choices.gather(2, pick))
        value = case.tensors["value"]
        if op == "memory_write":
            own_wins = winners == keys.shape[2]
            case = case.replace(own_key=torch.ones_like(case.tensors["own_key"]))
            own = case.tensors["slots"].unflatten(-1, (2, 64)).transpose(1, 2)
            token = value.gather(2, pick.clamp(max=keys.shape[2] - 1))
            expected = torch.where(own_wins[..., None], own, token).transpose(1, 2).flatten(-2)
        else:
            expected = value.gather(2, pick)
        got = run(case)
        where = f"M {slots}"
        assert same_bits(got.output, expected), f"{where}: not the winner's value"
        assert all(g.isfinite().all() for g in got.grads.values()), f"{where}: gradient is not finite"


def check_huge_logits(device, op, dtype):
    """Logits of 1e30 (of 6e4 in float16): the largest visible one wins, a hidden one never does."""
    size = 6e4 if dtype == torch.float16 else 1e30
    for slots in slot_counts(op, dtype):
        case = small(op, dtype, device, slots=slots, tokens=37, bias=False, temperature=1.0, masked=1)
        query = torch.zeros_like(case.tensors["query"])
        query[..., 0] = size
        key = torch.zeros_like(case.tensors["key"])
        key[..., 0] = -2.0
        key[:, :, 15, 0], key[:, :, 16, 0] = -1.0, 1.0
        case = case.replace(query=query, key=key)
        case.tensors[MASKS[op]][:, :16] = True
        case.tensors[MASKS[op]][0, 16] = True
        if op == "memory_write":
            own_key = torch.zeros_like(case.tensors["own_key"])
            own_key[..., 0] = -1.5
            case = case.replace(own_key=own_key)
        got, value = run(case), case.tensors["value"]
        where = f"M {slots}"
        for batch, winner in enumerate((16, 15, 15)):
            expected = value[batch, :, winner : winner + 1].expand(-1, query.shape[2], -1)
            if op == "memory_write":
                expected = expected.transpose(0, 1).flatten(-2)
            assert same_bits(got.output[batch], expected), f"{where}: not the winner's value"
        assert all(g.isfinite().all() for g in got.grads.values()), f"{where}: gradient is not finite"


def check_zero_rows(device, op, dtype):
    """z = 0 gives exactly 0, with gradient grad / eps."""
    case = small(op, dtype, device, tokens=0, masked=0)
    case.options["eps"] = 0.125
    case = case.replace(slots=-case.tensors["bias"].expand(3, -1, -1))
    got = run(case)
    assert not got.output.any(), "the output is not 0"
    assert same_bits(got.grads["slots"], cotangent(case) * 8), "the gradient is not grad / eps"


def check_batch_invariance(device, op, dtype):
    """A row has the same bits alone, in any batch, at any place."""
    for slots in slot_counts(op, dtype):
        for tokens in (37, 2500) if device == "cuda" and op != "memory_forget" else (37,):
            batch, heads = (64, 2) if device == "cuda" else (16, 1)
            case = small(op, dtype, device, batch=batch, heads=heads, slots=slots, tokens=tokens)
            grad = cotangent(case)
            whole = run(case, grad)
            names = [name for name in NO_BIAS_GRADIENT if name in whole.tensors()]
            for part in ([0], [7], [batch - 1], [batch - 4, 5, 7], list(range(batch - 1, -1, -1))):
                got, want = run(rows(case, part), grad[part]).tensors(), whole.tensors()
                wrong = [name for name in names if not same_bits(got[name], want[name][part])]
                assert not wrong, f"M {slots} L {tokens} rows {part[:3]}: {wrong}"


def check_inference(device, op, dtype):
    """Without gradients the output has the same bits."""
    for slots in slot_counts(op, dtype):
        for masked in (0.4, 0):
            case = small(op, dtype, device, slots=slots, masked=masked, tokens=2500 if device == "cuda" else 37)
            assert same_bits(infer(case), run(case).output), f"M {slots} {masked}"


def check_calls_alike(device, op, dtype):
    """What is kept from one call to the next never reaches a call that differs in dtype, option, mask or alignment."""
    case = small(op, dtype, device)
    calls = {"first": case}
    for name, tensor in case.tensors.items():
        calls[f"{name} at an odd offset"] = case.replace(**{name: odd_offset(tensor)})
    if op != "memory_forget":
        calls["no mask"] = Case(op, {n: t for n, t in case.tensors.items() if n != MASKS[op]}, case.options)
        calls["scale"] = Case(op, case.tensors, {**case.options, "scale": 0.7})
    if op != "memory_read":
        calls["eps"] = Case(op, case.tensors, {**case.options, "eps": 16.0})
        calls["wide bias"] = case.replace(bias=case.tensors["bias"].float())
    if op == "memory_write":
        calls["no bias"] = Case(op, {n: t for n, t in case.tensors.items() if n != "bias"}, case.options)
        calls["wide slots"] = case.replace(slots=case.tensors["slots"].float())
        calls["temperature"] = Case(op, case.tensors, {**case.options, "temperature": 0.9})
    first = {}
    for order in (list(calls), list(calls)[::-1]):
        for name in order:
            got, expected = run(calls[name]), answer(calls[name])
            assert not differing(first.setdefault(name, got), got), f"{name}: not the same twice"
            for tensor, value in got.tensors().items():
                error = relative_error(value, expected.tensors()[tensor])
                assert error <= max(16 * UNIT_ROUNDOFF[dtype], 2e-5), f"{name}: {tensor} is off by {error:.2g}"
            if "offset" in name:
                assert not differing(got, first["first"]), f"{name}: {differing(got, first['first'])}"


EVERY_OP = (check_calls_alike, check_visible_nan, check_batch_invariance, check_inference)
ATTENTION = (check_hidden_never_matters, check_nothing_visible, check_saturated, check_huge_logits)
CHECKS_OF = {
    "memory_write": (*ATTENTION, check_zero_rows, *EVERY_OP),
    "memory_read": (*ATTENTION, *EVERY_OP),
    "memory_forget": (check_zero_rows, *EVERY_OP),
}


def in_words(check):
    return check.__name__.removeprefix("check_").replace("_", " ")


def checks():
    for op in CHECKS_OF:
        for dtype in UNIT_ROUNDOFF:
            what, arguments = f"{op} {name_of(dtype)}", (op, dtype)
            gpu_only = dtype == torch.bfloat16
            yield Check(f"layouts {what}", check_layouts, arguments, gpu_only)
            for check in CHECKS_OF[op]:  # one group: they share kernels
                yield Check(f"{in_words(check)} {what}", check, arguments, gpu_only, group=f"values {what}")


CHECKS = list(checks())
