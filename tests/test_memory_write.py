import math

import layouts
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.autograd import gradcheck, gradgradcheck
from torch.library import opcheck
from torch.nn.functional import one_hot

from memformer_kernels import memory_forget, memory_write
from memformer_kernels.ops.memory_write import api
from memformer_kernels.testing import Result, cotangent, make_case, oracle, run

OP = "memory_write"
TOKENS = ("key", "value")
PER_SLOT = {"query": 2, "own_key": 2, "slots": 1, "bias": 0}  # the dimension that counts slots
TINY = dict(batch=2, heads=2, slots=2, tokens=3, width=2, dtype=torch.float64)
SIZES = dict(
    batch=st.integers(0, 3),
    heads=st.integers(1, 3),
    slots=st.integers(0, 6),
    tokens=st.integers(0, 6),
    width=st.sampled_from([0, 2, 3, 5, 8, 9]),  # not 1: the gradient of a unit vector of one channel is only rounding
    masked=st.sampled_from([0, 0.3, 0.7, 1]),
    bias=st.booleans(),
    amplitude=st.sampled_from([0.1, 0.5]),  # at 1, a nearly saturated softmax leaves gradients that are only rounding
    temperature=st.sampled_from([1, 0.5]),
    seed=st.integers(0, 9),
)


# Is it right?


@pytest.mark.guarantee("G1")
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("masked", [0, 0.4])
def test_output_and_gradients_are_right(path, dtype, masked, bias, agree, within_bound):
    case = make_case(OP, tokens=33, slots=17, dtype=dtype, masked=masked, bias=bias)
    result = path(case)
    agree(result, oracle(case), roundings=path.roundings)
    if dtype != torch.float64:
        within_bound(result, case)


@pytest.mark.guarantee("G1")
@pytest.mark.parametrize("bias", [True, False])
def test_slots_may_be_carried_in_float32(path, bias, agree):
    case = make_case(OP, dtype=torch.bfloat16, carried_dtype=torch.float32, masked=0.4, bias=bias)
    result = path(case)
    assert result.output.dtype == result.grads["slots"].dtype == torch.float32
    assert result.grads["query"].dtype == torch.bfloat16
    agree(result, oracle(case))


@pytest.mark.guarantee("G1")
@settings(max_examples=80, deadline=None, derandomize=True)
@given(**SIZES)
def test_explicit_gradients_are_those_of_the_definition(eager, explicit, agree, **sizes):
    case = make_case(OP, dtype=torch.float64, **sizes)
    agree(explicit(case), eager(case), tolerance=1e-12)


@pytest.mark.guarantee("G10")
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("size", ["batch", "heads", "slots", "tokens", "width"])
def test_any_size_may_be_zero(path, size, bias):
    case = make_case(OP, masked=0.3, bias=bias, **{size: 0})
    result = path(case)
    assert result.output.shape == case.tensors["slots"].shape
    assert all(tensor.isfinite().all() for tensor in result.tensors().values())
    assert size == "tokens" or not result.output.numel()


# Tokens and slots of several tiles, and of several chunks, of the kernels in 32 and in 16 bits
@pytest.mark.guarantee("G1")
@pytest.mark.parametrize("slots, tokens, width", [(40, 70, 20), (131, 33, 8), (3, 1100, 16), (1, 1, 64)])
@pytest.mark.parametrize("masked", [0, 0.4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=lambda d: str(d)[6:])
def test_triton_kernels_are_right_over_many_tiles(triton, dtype, masked, slots, tokens, width, agree):
    case = make_case(OP, slots=slots, tokens=tokens, width=width, dtype=dtype, masked=masked, heads=2, amplitude=0.5)
    agree(triton(case), oracle(case), roundings=triton.roundings)


# Each way through the Triton kernels by a case of its own, small enough for the mutation gate
WAYS = {
    "part of a tile": dict(slots=3, tokens=7),
    "no bias": dict(slots=3, tokens=7, bias=False),
    "whole tiles": dict(slots=3, tokens=32, width=16, heads=1),
    "hidden tokens": dict(slots=3, tokens=7, masked=0.4),
    "whole tiles of hidden tokens": dict(slots=2, tokens=16, masked=0.4, heads=1),
    "wide heads": dict(slots=2, tokens=3, width=40, heads=1),
    "groups of the batch": dict(slots=1, tokens=3, batch=3, heads=1),
    "chunks of tokens": dict(slots=2, tokens=70, batch=1),
    "chunks of hidden tokens": dict(slots=2, tokens=70, batch=1, masked=0.4),
    "tiles of slots": dict(slots=17, tokens=17, batch=1, heads=1),
    "tiles of slots, chunks of tokens": dict(slots=17, tokens=33, batch=1, masked=0.4, bias=False),
    "tiles of slots, whole tiles of hidden tokens": dict(slots=17, tokens=16, batch=1, heads=1, masked=0.4),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS.keys())
def test_every_way_through_the_kernels_is_right(triton, small_tiles, way, dtype, agree):
    case = make_case(OP, **{"heads": 2, "dtype": dtype, "amplitude": 0.5, **way})
    agree(triton(case), oracle(case), roundings=triton.roundings)


@pytest.mark.parametrize("masked", [True, False], ids=["hidden", "past the end"])
@pytest.mark.parametrize("slots", [2, 17], ids=["one tile", "tiles"])
def test_what_is_not_seen_stays_out_where_all_else_is_unlikely(triton, small_tiles, slots, masked, agree):
    """A logit that is not there, taken for 0, would be e^400 times as likely as what is visible."""
    case = make_case(OP, batch=1, heads=1, slots=slots, tokens=3, amplitude=0.1, temperature=1.0)
    moved = {name: case.tensors[name] + 15 for name in ("own_key", "key")}
    if masked:
        moved["token_mask"] = torch.tensor([[True, False, True]])
    case = case.replace(query=case.tensors["query"] - 10, **moved)
    agree(triton(case), oracle(case), tolerance=1e-2)  # logits near 400 are rounded by 3e-5, and keys near 15 cancel


@pytest.mark.parametrize("slots", [2, 17], ids=["one tile", "tiles"])
def test_gradients_of_hidden_tokens_are_zero_whatever_arrives(triton, small_tiles, slots):
    case = make_case(OP, batch=1, heads=1, slots=slots, tokens=3)
    mask = torch.tensor([[True, False, True]])
    grads = triton(case.replace(token_mask=mask), torch.full_like(cotangent(case), float("nan"))).grads
    for name in TOKENS:
        assert not grads[name][:, :, 1].any() and grads[name][:, :, 0].isnan().all()


def test_chunks_that_see_no_token_change_no_bit(triton, small_tiles, same_bits):
    case = make_case(OP, batch=1, heads=1, slots=2, tokens=70, bias=False, masked=1)
    case.tensors["slots"][0, 0, :3] = torch.tensor([-0.0, 6e4, -(2.0**-20)])
    assert same_bits(triton(case).output, case.tensors["slots"])


def test_an_infinite_slot_stays_infinite_over_chunks(triton, small_tiles):
    case = make_case(OP, batch=1, heads=1, slots=1, tokens=70, amplitude=0.1, bias=False)
    case.tensors["slots"][0, 0, 0] = float("inf")
    assert triton(case).output[0, 0, 0] == float("inf")


def test_chunks_may_grow_without_bound(triton, small_tiles, same_bits):
    case = make_case(OP, batch=1, heads=1, slots=2, tokens=70, width=1, bias=False, temperature=1.0)
    key = torch.linspace(1, 2, 70).view(1, 1, 70, 1)
    case = case.replace(query=torch.full((1, 1, 2, 1), 1e30), own_key=torch.ones(1, 1, 2, 1), key=key)
    assert same_bits(triton(case).output, case.tensors["value"][0, :, -1:].expand(-1, 2, -1))


def test_an_empty_batch_gives_zero_gradients_whatever_lay_there(triton, nothing_left_over):
    assert all(not grad.any() for grad in triton(make_case(OP, batch=0)).grads.values())


def test_groups_of_the_batch_are_added_up_in_float32(triton, small_tiles, agree):
    case = make_case(OP, batch=4, heads=1, slots=1, tokens=1, dtype=torch.float16, masked=1)
    case, grad = case.map(lambda t: t if t.dim() == 2 else t[:1].expand(t.shape)), cotangent(case)
    grad[2:] = -grad[:2]  # the groups all but cancel
    grad[0] += 2**-6
    agree(triton(case, grad), oracle(case, grad), roundings=triton.roundings)


# Is the reference right?


@pytest.mark.parametrize("bias", [True, False])
def test_definition_equals_the_formulas_in_plain_loops(eager, bias):
    case = make_case(OP, **TINY, masked=0.4, bias=bias)
    names = ("query", "own_key", "slots", "key", "value", "token_mask")
    query, own_key, slots, key, value, visible = (case.tensors[name].tolist() for name in names)
    assert {True, False} <= set(sum(visible, [])) and all(any(row) for row in visible)
    B, H, M, L, D, temperature = 2, 2, 2, 3, 2, 0.25
    output = eager(case).output

    def weight(a, b):
        return math.exp(sum(x * y for x, y in zip(a, b, strict=True)) / (math.sqrt(D) * temperature))

    for b in range(B):
        for i in range(M):
            attended = []
            for h in range(H):
                own = weight(query[b][h][i], own_key[b][h][i])
                others = [weight(query[b][h][i], key[b][h][j]) * visible[b][j] for j in range(L)]
                for d in range(D):
                    total = own * slots[b][i][h * D + d] + sum(others[j] * value[b][h][j][d] for j in range(L))
                    attended.append(total / (own + sum(others)))
            if bias:
                biased = [u + x for u, x in zip(attended, case.tensors["bias"][i].tolist(), strict=True)]
                attended = [z / math.sqrt(sum(x * x for x in biased)) for z in biased]
            assert output[b, i].tolist() == pytest.approx(attended, rel=1e-13)


def test_bias_fuses_memory_forget(dtype):
    case = make_case(OP, dtype=dtype, carried_dtype=torch.promote_types(dtype, torch.float32), masked=0.4)
    bias = case.tensors.pop("bias")
    written = memory_write(**case.tensors, temperature=0.5, backend="eager")
    fused = memory_write(**case.tensors, temperature=0.5, bias=bias, eps=0.1, backend="eager")
    torch.testing.assert_close(fused, memory_forget(written, bias, eps=0.1, backend="eager"))


def test_temperature_divides_and_scale_multiplies_the_logits():
    case = make_case(OP, dtype=torch.float64)
    stretched = case.replace(query=case.tensors["query"] * 0.3 * 8**0.5 / 0.7)
    torch.testing.assert_close(
        memory_write(**case.tensors, scale=0.3, temperature=0.7, backend="eager"),
        memory_write(**stretched.tensors, backend="eager"),
    )


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("masked", [0, 0.4, 1])
def test_definition_is_differentiable_twice(masked, bias):
    case = make_case(OP, **TINY, masked=masked, bias=bias, requires_grad=True)
    mask = case.tensors.pop("token_mask", None)

    def function(*tensors):
        arguments = dict(zip(case.tensors, tensors, strict=True))
        return memory_write(**arguments, token_mask=mask, temperature=0.25, backend="eager")

    inputs = tuple(case.tensors.values())
    assert gradcheck(function, inputs)
    assert gradgradcheck(function, inputs)


@pytest.mark.guarantee("G8")
def test_slots_never_see_one_another(path, same_bits):
    case = make_case(OP, masked=0.4)
    before = path(case)
    changed = {name: case.tensors[name].clone() for name in PER_SLOT}
    for name, dim in PER_SLOT.items():
        changed[name].select(dim, 3).fill_(9)
    after = path(case.replace(**changed))
    others = torch.tensor([0, 1, 2, 4])
    assert not same_bits(after.output[:, 3], before.output[:, 3])
    assert same_bits(after.output[:, others], before.output[:, others])
    for name, dim in PER_SLOT.items():
        got, want = (result.grads[name].index_select(dim, others) for result in (after, before))
        assert same_bits(got, want), name


@pytest.mark.guarantee("G8")
def test_rows_of_the_batch_never_see_one_another(path, same_bits):
    case = make_case(OP, masked=0.4)
    before = path(case)
    bias = case.tensors["bias"]
    after = path(case.map(lambda t: torch.cat([t[:1], t[1:].flip(1)]) if t.is_floating_point() and t.dim() > 2 else t))
    for name in ("output", "grad_query", "grad_own_key", "grad_slots", "grad_key", "grad_value"):
        assert same_bits(after.tensors()[name][0], before.tensors()[name][0]), name
        assert not same_bits(after.tensors()[name][1], before.tensors()[name][1]), name
    assert after.grads["bias"].shape == bias.shape


def test_slots_keep_their_order_and_that_of_tokens_does_not_matter(path, agree):
    case = make_case(OP, dtype=torch.float64, masked=0.4)
    slots, tokens = torch.randperm(5), torch.randperm(7)

    def move(tensors):
        moved = {name: tensors[name].index_select(dim, slots) for name, dim in PER_SLOT.items()}
        return {**moved, **{name: tensors[name][:, :, tokens] for name in TOKENS}}

    before = path(case)
    moved = case.replace(**move(case.tensors), token_mask=case.tensors["token_mask"][:, tokens])
    agree(path(moved, cotangent(case)[:, slots]), Result(before.output[:, slots], move(before.grads)))


@pytest.mark.guarantee("G3")
@pytest.mark.parametrize("tokens", [0, 7])
def test_slot_that_sees_no_token_is_kept_bit_for_bit(path, dtype, tokens, same_bits):
    case = make_case(OP, dtype=dtype, tokens=tokens, bias=False, masked=1)
    slots = case.tensors["slots"]
    slots[0, 0, :3] = torch.tensor([-0.0, 6e4, -(2.0**-20)])
    result = path(case)
    assert same_bits(result.output, slots)
    assert same_bits(result.grads["slots"], cotangent(case))
    assert all(not grad.any() for name, grad in result.grads.items() if name != "slots")


@pytest.mark.guarantee("G9")
def test_output_never_shares_memory_with_the_slots(path):
    case = make_case(OP, tokens=0, bias=False)
    assert path(case).output.untyped_storage().data_ptr() != case.tensors["slots"].untyped_storage().data_ptr()


@pytest.mark.guarantee("G3")
def test_saturated_softmax_gives_the_winner_bit_for_bit(path, dtype, same_bits):
    case = make_case(OP, dtype=dtype, width=16, bias=False, temperature=1.0)
    winners = torch.randint(8, (2, 3, 5))  # 7: the slot itself
    keys = torch.eye(8, 16, dtype=dtype)
    own_key = keys[7].expand(2, 3, 5, 16)
    query = one_hot(winners, 16).to(dtype) * 800  # a gap of 800 / sqrt(16) in the logits
    output = path(case.replace(query=query, own_key=own_key, key=keys[:7].expand(2, 3, 7, 16))).output
    own = case.tensors["slots"].unflatten(-1, (3, 16)).transpose(1, 2)
    token = case.tensors["value"].gather(2, winners.clamp(max=6)[..., None].expand(-1, -1, -1, 16))
    want = torch.where((winners == 7)[..., None], own, token)
    assert same_bits(output, want.transpose(1, 2).flatten(-2))


@pytest.mark.guarantee("G3")
def test_values_of_one_give_one(path, dtype):
    case = make_case(OP, dtype=dtype, tokens=16, bias=False)
    ones = {name: torch.ones_like(case.tensors[name]) for name in ("slots", "value")}
    output = path(case.replace(**ones)).output
    # 2 roundoffs in 16 bits; in the precision of the sums, one more for every one of the 17 weights
    roundoffs = 2 if dtype.itemsize == 2 else 2 + 17
    assert (output.double() - 1).abs().max() <= roundoffs * torch.finfo(dtype).eps / 2


@pytest.mark.guarantee("G5")
@pytest.mark.parametrize("size", [1e15, 1e30])
def test_huge_logits_stay_right(path, dtype, size, same_bits):
    if dtype == torch.float16:
        size = 6e4
    case = make_case(OP, dtype=dtype, width=1, heads=1, tokens=2, masked=0.5, bias=False, temperature=1.0)
    query = torch.full_like(case.tensors["query"], -size)
    own_key = torch.full_like(query, 1.0)
    key = torch.tensor([[0.5], [-1.0]], dtype=dtype).expand(2, 1, 2, 1)
    mask = torch.tensor([[True, True], [True, False]])
    output = path(case.replace(query=query, own_key=own_key, key=key, token_mask=mask)).output
    value = case.tensors["value"][:, 0]
    assert same_bits(output[0], value[0, 1:].expand(5, -1))
    assert same_bits(output[1], value[1, :1].expand(5, -1))  # a finite sentinel would let a hidden token win


def test_written_slots_have_unit_norm(path, dtype):
    norms = path(make_case(OP, dtype=dtype, masked=0.4)).output.double().norm(dim=-1)
    assert (norms - 1).abs().max() <= 2 * torch.finfo(dtype).eps


@pytest.mark.guarantee("G6")
def test_zero_vector_stays_zero_with_gradient_over_eps(path, dtype):
    eps = 0.125
    case = make_case(OP, dtype=dtype, tokens=0)
    case = case.replace(slots=-case.tensors["bias"].expand(2, -1, -1))
    case.options["eps"] = eps
    result = path(case)
    assert not result.output.any()
    assert torch.equal(result.grads["slots"], cotangent(case) / eps)


@pytest.mark.guarantee("G4")
@pytest.mark.parametrize("junk", [float("nan"), float("inf"), float("-inf")])
def test_hidden_tokens_never_matter(path, dtype, junk, same_bits):
    case = make_case(OP, dtype=dtype, masked=0.4)
    case.tensors["token_mask"][1] = False
    hidden = ~case.tensors["token_mask"][:, None, :, None].expand_as(case.tensors["key"])
    dirty = path(case.replace(**{name: case.tensors[name].masked_fill(hidden, junk) for name in TOKENS}))
    assert same_bits(dirty, path(case))
    assert not dirty.grads["key"][hidden].any() and not dirty.grads["value"][hidden].any()


@pytest.mark.guarantee("G5")
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("name", ["query", "own_key", "slots", "key", "value"])
def test_visible_nan_reaches_the_slots_that_see_it_and_no_other(path, name, bias, same_bits):
    case = make_case(OP, bias=bias)
    before = path(case)
    dirty = case.tensors[name].clone()
    dirty[(1, 3, 2 * 8) if name == "slots" else (1, 2, 3, 0)] = float("nan")
    after = path(case.replace(**{name: dirty}))
    slot = slice(None) if name in TOKENS else 3
    channels = 2 * 8 if name in ("slots", "value") else slice(2 * 8, 3 * 8)
    sees = torch.zeros_like(before.output, dtype=torch.bool)
    sees[1, slot, slice(None) if bias else channels] = True  # the norm sees every channel
    assert after.output[sees].isnan().all()
    assert same_bits(after.output[~sees], before.output[~sees])
    assert all(same_bits(after.grads[n][0], before.grads[n][0]) for n in before.grads if n != "bias")


# Does layout matter?


@pytest.mark.guarantee("G4", "G9", "G11")
def test_layout_of_inputs_does_not_matter(path, layout, agree, contiguous, storage):
    case = make_case(OP, masked=0.4).map(layout)
    before = {name: storage(tensor) for name, tensor in case.tensors.items()}
    agree(path(case), path(case.map(contiguous)))
    assert all(torch.equal(storage(tensor), before[name]) for name, tensor in case.tensors.items())


@pytest.mark.guarantee("G9", "G11")
@pytest.mark.parametrize("bias", [True, False])
def test_layout_of_the_incoming_gradient_does_not_matter(path, layout, bias, agree, contiguous, storage):
    case = make_case(OP, masked=0.4, bias=bias)
    grad = layout(cotangent(case))
    before = storage(grad)
    agree(path(case, grad), path(case, contiguous(grad)))
    assert torch.equal(storage(grad), before)


@pytest.mark.parametrize("slots", [2, 17], ids=["one tile", "tiles"])
def test_saved_tensors_come_back_in_another_layout(triton, small_tiles, same_bits, slots):
    case = make_case(OP, batch=1, heads=3, slots=slots, tokens=5, dtype=torch.float16)
    expected = triton(case).grads
    with torch.autograd.graph.saved_tensors_hooks(layouts.gaps, lambda tensor: tensor):
        grads = triton(case).grads
    assert same_bits(grads, expected)


@pytest.mark.parametrize("slots", [2, 17], ids=["one tile", "tiles"])
def test_nothing_beside_the_inputs_is_read(triton, small_tiles, beside_no_memory, slots, same_bits):
    case = make_case(OP, batch=1, heads=1, slots=slots, tokens=5, masked=0.4)
    grad = cotangent(case)
    assert same_bits(triton(case.map(beside_no_memory), beside_no_memory(grad)), triton(case, grad))


@pytest.mark.parametrize("slots", [2, 17], ids=["one tile", "tiles"])
def test_a_row_has_the_same_bits_in_any_batch(triton, small_tiles, slots, same_bits):
    case = make_case(OP, batch=2, heads=1, slots=slots, tokens=33, masked=0.4)
    grad = cotangent(case)
    whole = triton(case, grad).tensors()
    part = triton(case.map(lambda t: t if t.dim() == 2 and t.is_floating_point() else t[1:]), grad[1:]).tensors()
    assert all(same_bits(part[name], whole[name][1:]) for name in whole if name != "grad_bias")


@pytest.mark.guarantee("G8")
@pytest.mark.parametrize("way", ["values", "short chunk", "hidden", "nothing visible", "NaN", "infinite"])
@pytest.mark.parametrize("slots", [2, 17], ids=["one tile", "tiles"])
def test_chunks_by_the_group_give_the_bits_of_chunks_by_themselves(
    triton, small_tiles, monkeypatch, slots, way, same_bits
):
    """Five chunks, of which a group has two; or six, the last of them less than a tile."""
    from memformer_kernels import launch, tiles

    masked = {"hidden": 0.6, "nothing visible": 1}.get(way, 0)
    # a wrong order of the same sums shows in their rounding alone: in few elements of a short chunk, so in many heads
    tokens, heads = (166, 12) if way == "short chunk" else (150, 2)
    case = make_case(OP, batch=1, heads=heads, slots=slots, tokens=tokens, masked=masked, bias=not masked)
    if way in ("NaN", "infinite"):
        case.tensors["value"][0, 0, 40] = float("nan" if way == "NaN" else "inf")
        case.tensors["key"][0, 1, 100] = float("nan" if way == "NaN" else "inf")
    case.tensors["slots"][0, 0, :3] = torch.tensor([-0.0, 6e4, -(2.0**-20)])
    results = []
    for multiprocessors in (1, 10**6):
        monkeypatch.setattr(tiles, "multiprocessors", lambda device, number=multiprocessors: number)
        launch.forget_plans()
        results.append(triton(case).tensors())
    together, apart = results
    assert all(same_bits(together[name], apart[name]) for name in apart)


# Does it refuse well?


@pytest.mark.guarantee("G12", "G14")
def test_wrong_arguments_are_refused():
    tensors = make_case(OP, batch=2, heads=3, slots=5, tokens=7, width=8, masked=0.4).tensors
    query, own_key, slots, key, value, mask, bias = tensors.values()
    for error, message, change in [
        (TypeError, "memory_write: slots must be a tensor, got NoneType", dict(slots=None)),
        (TypeError, "memory_write: bias must be a tensor, got float", dict(bias=0.1)),
        (TypeError, "memory_write: token_mask must be a tensor, got list", dict(token_mask=[True])),
        (ValueError, r"memory_write: query must have shape \[B, H, M, D\], got \[2, 3, 5\]", dict(query=query[..., 0])),
        (
            ValueError,
            r"memory_write: own_key must have shape \[B, H, M, D\] = \[2, 3, 5, 8\], got \[2, 3, 4, 8\]",
            dict(own_key=own_key[:, :, 1:]),
        ),
        (
            ValueError,
            r"memory_write: slots must have shape \[B, M, H \* D\] = \[2, 5, 24\], got \[2, 5, 8\]",
            dict(slots=slots[..., :8]),
        ),
        (
            ValueError,
            r"memory_write: key must have shape \[B, H, L, D\] = \[2, 3, any, 8\], got \[2, 3, 7, 4\]",
            dict(key=key[..., :4]),
        ),
        (
            ValueError,
            r"memory_write: value must have shape \[B, H, L, D\] = \[2, 3, 7, 8\], got \[2, 3, 6, 8\]",
            dict(value=value[:, :, 1:]),
        ),
        (
            ValueError,
            r"memory_write: token_mask must have shape \[B, L\] = \[2, 7\], got \[1, 7\]",
            dict(token_mask=mask[:1]),
        ),
        (ValueError, r"memory_write: bias must have shape \[M, C\] = \[5, 24\], got \[1, 24\]", dict(bias=bias[:1])),
        (
            TypeError,
            "memory_write: token_mask must be a bool tensor, True where visible, got torch.int64",
            dict(token_mask=mask.long()),
        ),
        (
            TypeError,
            "memory_write: key must be float16, bfloat16, float32 or float64, got torch.int32",
            dict(key=key.int()),
        ),
        (TypeError, "memory_write: bias must be float16, .*, got torch.int32", dict(bias=bias.int())),
        (
            TypeError,
            r"memory_write: value must have the dtype of query \(torch.float32\), got torch.float16",
            dict(value=value.half()),
        ),
        (
            TypeError,
            "memory_write: slots must be torch.float32 or torch.float32, got torch.float64",
            dict(slots=slots.double()),
        ),
        (
            TypeError,
            "memory_write: bias must be torch.float32 or torch.float32, got torch.bfloat16",
            dict(bias=bias.bfloat16()),
        ),
        (
            ValueError,
            r"memory_write: value must be on the device of query \(cpu\), got meta",
            dict(value=value.to("meta")),
        ),
        (
            ValueError,
            r"memory_write: bias must be on the device of query \(cpu\), got meta",
            dict(bias=bias.to("meta")),
        ),
        (TypeError, "memory_write: temperature must be a number, got Tensor", dict(temperature=torch.ones(1))),
        (ValueError, "memory_write: temperature must be finite and above 0, got 0", dict(temperature=0)),
        (ValueError, "memory_write: scale must be finite and above 0, got inf", dict(scale=math.inf)),
        (ValueError, "memory_write: eps must be finite and at least 1.2e-38, got 0", dict(eps=0)),
        (ValueError, "memory_write: backend must be one of auto, cuda, triton, eager, got 'gpu'", dict(backend="gpu")),
        (NotImplementedError, "memory_write: backend 'cuda' cannot run this call: ", dict(backend="cuda")),
    ]:
        with pytest.raises(error, match=message):
            memory_write(**{**tensors, **change})


# Does it compose?


@pytest.mark.guarantee("G15")
@pytest.mark.parametrize("backend", ["auto", "eager"])
def test_public_function_compiles_as_one_graph(backend, agree, eager):
    def function(**arguments):
        return memory_write(**arguments, backend=backend)

    case = make_case(OP, masked=0.4)
    agree(run(case, function=torch.compile(function, fullgraph=True, backend="aot_eager")), eager(case))


@pytest.mark.guarantee("G15")
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
def test_registered_op_compiles_as_one_graph(compiler, bias, agree, registered, eager, transposed):
    case = make_case(OP, masked=0.4, bias=bias).map(transposed)
    agree(run(case, function=torch.compile(registered(OP), fullgraph=True, backend=compiler)), eager(case))


@pytest.mark.guarantee("G15")
@pytest.mark.parametrize(
    "size",
    [
        {},
        {"bias": False},
        {"bias": False, "tokens": 0, "masked": 0},
        {"slots": 0},
        {"heads": 1, "masked": 1, "bias": False},
        {"dtype": torch.float16, "carried_dtype": torch.float32},
    ],
)
@pytest.mark.parametrize("place", ["contiguous", "transposed"])
@pytest.mark.parametrize("backend", ["eager", "triton"])
def test_registered_op_passes_opcheck(size, backend, place, request):
    if backend == "triton":
        pytest.importorskip("triton")
    place = request.getfixturevalue(place)
    case = make_case(OP, **{"masked": 0.4, **size}).map(place)
    call = api.prepare(**case.tensors)
    forward = torch.ops.memformer_kernels.memory_write_forward.default
    for save in (True, False):
        opcheck(forward, (*call, save, backend))
    *tensors, scale, eps, allow_tf32 = call
    grad, saved = place(cotangent(case)), forward(*call, True, backend)[1:]
    backward = torch.ops.memformer_kernels.memory_write_backward.default
    opcheck(backward, (grad, *tensors, *saved, scale, eps, allow_tf32, backend))


def test_autocast_computes_what_cast_projections_compute(path, same_bits):
    case = make_case(OP, masked=0.4)
    cast = case.replace(**{name: case.tensors[name].bfloat16() for name in ("query", "own_key", "key", "value")})
    got, want = path(case, autocast=torch.bfloat16), path(cast)
    assert got.output.dtype == torch.float32
    assert same_bits(got.output, want.output)
    assert all(same_bits(got.grads[name], grad.float()) for name, grad in want.grads.items())


def test_definition_works_under_vmap_and_grad(eager):
    case = make_case(OP, dtype=torch.float64, masked=0.4)
    bias = case.tensors.pop("bias")
    mask = case.tensors.pop("token_mask")
    rows = [t.unsqueeze(1) for t in (*case.tensors.values(), mask, cotangent(case))]  # one batch row a call

    def loss(query, own_key, slots, key, value, mask, grad):
        written = memory_write(query, own_key, slots, key, value, bias=bias, token_mask=mask, temperature=0.25)
        return (written * grad).sum()

    grads = torch.func.vmap(torch.func.grad(loss, (0, 1, 2, 3, 4)))(*rows)
    want = eager(case.replace(bias=bias, token_mask=mask)).grads
    for name, got in zip(case.tensors, grads, strict=True):
        torch.testing.assert_close(got.squeeze(1), want[name])


@pytest.mark.guarantee("G14")
def test_second_derivative_is_refused_where_there_is_none(registered):
    case = make_case(OP, requires_grad=True)
    output = registered(OP)(**case.tensors)
    with pytest.raises(NotImplementedError, match="memory_write: the fused backward has no derivative of its own"):
        torch.autograd.grad(output.sum(), case.tensors["query"], create_graph=True)
