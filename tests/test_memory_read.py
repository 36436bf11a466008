import importlib
import math

import layouts
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.autograd import gradcheck, gradgradcheck
from torch.library import opcheck

from memformer_kernels import memory_read
from memformer_kernels.ops.memory_read import api
from memformer_kernels.testing import Result, cotangent, make_case, oracle, run

OP = "memory_read"
TINY = dict(batch=2, heads=2, slots=3, tokens=2, width=2, dtype=torch.float64)
SIZES = dict(
    batch=st.integers(0, 3),
    heads=st.integers(0, 3),
    slots=st.integers(0, 6),
    tokens=st.integers(0, 6),
    width=st.integers(0, 9),
    masked=st.sampled_from([0, 0.3, 0.7, 1]),
    seed=st.integers(0, 9),
)


# Is it right?


@pytest.mark.guarantee("G1")
@pytest.mark.parametrize("masked", [0, 0.4])
def test_output_and_gradients_are_right(path, dtype, masked, agree, within_bound):
    case = make_case(OP, tokens=33, slots=17, dtype=dtype, masked=masked)
    result = path(case)
    agree(result, oracle(case), roundings=path.roundings)
    if dtype != torch.float64:
        within_bound(result, case)


@pytest.mark.guarantee("G1")
@settings(max_examples=60, deadline=None, derandomize=True)
@given(**SIZES)
def test_explicit_gradients_are_those_of_the_definition(eager, explicit, agree, **sizes):
    case = make_case(OP, dtype=torch.float64, **sizes)
    agree(explicit(case), eager(case), tolerance=1e-12)


@pytest.mark.guarantee("G10")
@pytest.mark.parametrize("size", ["batch", "heads", "slots", "tokens", "width"])
def test_any_size_may_be_zero(path, size):
    case = make_case(OP, masked=0.3, **{size: 0})
    result = path(case)
    assert result.output.shape == case.tensors["query"].shape
    assert all(not tensor.any() for tensor in result.tensors().values())


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
    "part of a tile": dict(slots=3, tokens=17),
    "whole tiles": dict(slots=16, tokens=16, width=16),
    "hidden slots": dict(slots=5, tokens=3, masked=0.4),
    "a whole tile of hidden slots": dict(slots=16, tokens=3, masked=0.4, heads=1),
    "wide heads": dict(slots=3, tokens=3, width=40, heads=1),
    "chunks of tokens": dict(slots=3, tokens=70, batch=1),
    "tiles of slots": dict(slots=33, tokens=17, batch=1),
    "whole tiles of slots": dict(slots=32, tokens=17, batch=1, width=16),
    "tiles of hidden slots": dict(slots=33, tokens=3, heads=1, masked=0.4),
    "whole tiles of hidden slots": dict(slots=32, tokens=3, batch=1, heads=1, masked=0.4),
    "tiles of slots, chunks of tokens": dict(slots=17, tokens=35, batch=1, width=20),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS.keys())
def test_every_way_through_the_kernels_is_right(triton, small_tiles, way, dtype, agree):
    case = make_case(OP, **{"heads": 2, "dtype": dtype, **way})
    agree(triton(case), oracle(case), roundings=triton.roundings)


@pytest.mark.parametrize("visible", [[], [1, 3], [38, 40]], ids=["no slot", "first tile", "last tile"])
def test_tiles_without_a_visible_slot(triton, small_tiles, visible, agree):
    case = make_case(OP, batch=1, heads=1, slots=41, tokens=2)
    mask = torch.zeros(1, 41, dtype=torch.bool)
    mask[:, visible] = True
    case, grad = case.replace(slot_mask=mask), cotangent(case)
    if visible:
        agree(triton(case, grad), oracle(case, grad), tolerance=1e-5)
    else:
        grad[0, 0, 1] = float("nan")
        assert all(not tensor.any() for tensor in triton(case, grad).tensors().values())


@pytest.mark.parametrize("slots", [3, 17], ids=["one tile", "tiles"])
def test_hidden_slots_stay_out_where_all_others_are_unlikely(triton, small_tiles, slots, agree):
    """A hidden slot's logit, taken for 0, would be e^400 times as likely as those that are visible."""
    case = make_case(OP, batch=1, heads=1, slots=slots, tokens=2, amplitude=0.1)
    query, key = case.tensors["query"] - 10, case.tensors["key"] + 15
    mask = torch.arange(slots)[None] != 1
    case = case.replace(query=query, key=key, slot_mask=mask)
    agree(triton(case), oracle(case), tolerance=1e-3)  # of logits near 400 the last bit is 3e-5


@pytest.mark.parametrize("slots", [3, 17], ids=["one tile", "tiles"])
def test_hidden_slots_never_win(path, small_tiles, slots, same_bits):
    """However low the logits that are visible, the largest first and the hidden one last: no finite sentinel."""
    case = make_case(OP, batch=1, heads=1, slots=slots, tokens=2, width=1)
    query, key = torch.full((1, 1, 2, 1), -1e30), torch.linspace(1, 2, slots).view(1, 1, slots, 1)
    mask = torch.arange(slots)[None] < slots - 1
    case = case.replace(query=query, key=key, slot_mask=mask)
    assert same_bits(path(case).output, case.tensors["value"][:, :, :1].expand(-1, -1, 2, -1))


def test_an_empty_memory_reads_as_zero_whatever_lay_there(triton, nothing_left_over):
    assert not triton(make_case(OP, slots=0)).output.any()


def test_chunks_of_tokens_are_added_up_in_float32(triton, small_tiles, agree):
    case = make_case(OP, batch=1, heads=1, slots=2, tokens=64, dtype=torch.float16)
    case, grad = case.replace(query=torch.zeros_like(case.tensors["query"])), cotangent(case)
    grad[:, :, 32:] = -0.99 * grad[:, :, :32]  # the chunks all but cancel
    agree(triton(case, grad), oracle(case, grad), roundings=triton.roundings)


def test_delta_is_not_rounded_to_16_bits(triton, small_tiles, agree):
    case = make_case(OP, batch=1, heads=1, slots=17, tokens=3, dtype=torch.float16)
    case = case.replace(value=case.tensors["value"] / 4 + 32)  # each output is rounded to a 64th
    agree(triton(case), oracle(case), tolerance=1e-2)


@pytest.mark.parametrize("layout", [layouts.contiguous, layouts.gaps])
def test_saved_tensors_come_back_in_another_layout(triton, small_tiles, same_bits, layout):
    case = make_case(OP, batch=1, heads=3, slots=17, tokens=5, dtype=torch.float16)
    expected = triton(case).grads
    with torch.autograd.graph.saved_tensors_hooks(layout, lambda tensor: tensor):
        grads = triton(case).grads
    assert same_bits(grads, expected)


@pytest.mark.parametrize("slots", [15, 16, 17])
def test_what_the_forward_saves_is_what_it_says(registered, small_tiles, slots):
    module = importlib.import_module("memformer_kernels.ops.memory_read.triton")
    query, key, value = make_case(OP, batch=1, heads=1, slots=slots, tokens=2).tensors.values()
    _, log_sum_exp, _ = module.forward(query, key, value, None, 0.3, False, True)
    assert module.saves(query, key) == (log_sum_exp is not None,) * 2 == (slots > 16,) * 2
    if log_sum_exp is not None:
        assert torch.allclose(0.3 * log_sum_exp, (0.3 * query @ key.mT).logsumexp(-1), atol=1e-5)
        hidden = torch.zeros(1, slots, dtype=torch.bool)
        assert not module.forward(query, key, value, hidden, 0.3, False, True)[1].any()


# Is the reference right?


def test_definition_equals_the_formula_in_plain_loops(eager):
    case = make_case(OP, **TINY, masked=0.4)
    query, key, value = (case.tensors[name].tolist() for name in ("query", "key", "value"))
    visible = case.tensors["slot_mask"].tolist()
    assert {True, False} <= set(sum(visible, [])) and all(any(row) for row in visible)
    output = eager(case).output
    for b, h, i in torch.cartesian_prod(torch.arange(2), torch.arange(2), torch.arange(2)).tolist():
        q = query[b][h][i]
        weights = [
            math.exp(sum(x * y for x, y in zip(q, key[b][h][j], strict=True)) / math.sqrt(2)) * visible[b][j]
            for j in range(3)
        ]
        for d in range(2):
            want = sum(weights[j] * value[b][h][j][d] for j in range(3)) / sum(weights)
            assert output[b, h, i, d].item() == pytest.approx(want, rel=1e-13)


def test_scale_multiplies_the_logits():
    case = make_case(OP, dtype=torch.float64)
    query, key, value = case.tensors.values()
    torch.testing.assert_close(
        memory_read(query, key, value, scale=0.3, backend="eager"),
        memory_read(query * 0.3 * 8**0.5, key, value, backend="eager"),
    )


@pytest.mark.parametrize("masked", [0, 0.4, 1])
def test_definition_is_differentiable_twice(masked):
    case = make_case(OP, **TINY, masked=masked, requires_grad=True)
    mask = case.tensors.pop("slot_mask", None)

    def function(*tensors):
        return memory_read(*tensors, slot_mask=mask, backend="eager")

    inputs = tuple(case.tensors.values())
    assert gradcheck(function, inputs)
    assert gradgradcheck(function, inputs)


def test_order_of_slots_does_not_matter_and_tokens_keep_theirs(path, agree):
    case = make_case(OP, dtype=torch.float64, masked=0.4)
    slots, tokens = torch.randperm(5), torch.randperm(7)
    tensors = case.tensors
    moved = case.replace(
        query=tensors["query"][:, :, tokens],
        key=tensors["key"][:, :, slots],
        value=tensors["value"][:, :, slots],
        slot_mask=tensors["slot_mask"][:, slots],
    )
    want = path(case)
    order = {"query": tokens, "key": slots, "value": slots}
    grads = {name: want.grads[name][:, :, order[name]] for name in order}
    agree(path(moved, cotangent(case)[:, :, tokens]), Result(want.output[:, :, tokens], grads))


@pytest.mark.guarantee("G8")
def test_rows_heads_and_tokens_never_see_one_another(path, same_bits):
    case = make_case(OP)
    before = path(case)
    changed = path(case.map(lambda t: t.index_put((torch.tensor(1), torch.tensor(2)), torch.tensor(9.0))))
    others = torch.ones(2, 3, dtype=torch.bool)
    others[1, 2] = False
    for name, tensor in before.tensors().items():
        assert same_bits(changed.tensors()[name][others], tensor[others]), name
        assert not same_bits(changed.tensors()[name][1, 2], tensor[1, 2]), name
    query = case.tensors["query"].clone()
    query[:, :, 4] = 9
    changed = path(case.replace(query=query))
    other_tokens = [0, 1, 2, 3, 5, 6]
    assert same_bits(changed.output[:, :, other_tokens], before.output[:, :, other_tokens])
    assert same_bits(changed.grads["query"][:, :, other_tokens], before.grads["query"][:, :, other_tokens])


@pytest.mark.guarantee("G3")
def test_no_visible_slot_gives_exactly_zero(path, dtype):
    case = make_case(OP, dtype=dtype)
    case = case.replace(slot_mask=torch.tensor([[False] * 5, [True] * 5]))
    grad = cotangent(case)
    grad[0, :, 2] = float("nan")
    for name, tensor in path(case, grad).tensors().items():
        assert not tensor[0].any() and tensor[1].any(), name


@pytest.mark.guarantee("G3")
def test_saturated_softmax_gives_the_winner_bit_for_bit(path, dtype, same_bits):
    case = make_case(OP, dtype=dtype, width=16)
    winners = torch.randint(5, (2, 3, 7))
    key = torch.eye(5, 16, dtype=dtype).expand(2, 3, 5, 16)
    query = torch.nn.functional.one_hot(winners, 16).to(dtype) * 800  # a gap of 800 / sqrt(16) in the logits
    value = case.tensors["value"]
    output = path(case.replace(query=query, key=key)).output
    assert same_bits(output, value.gather(2, winners[..., None].expand(-1, -1, -1, 16)))


@pytest.mark.guarantee("G3")
def test_values_of_one_give_one(path, dtype):
    case = make_case(OP, dtype=dtype, slots=17)
    output = path(case.replace(value=torch.ones_like(case.tensors["value"]))).output
    # 2 roundoffs in 16 bits; in the precision of the sums, one more for every one of the 17 weights
    roundoffs = 2 if dtype.itemsize == 2 else 2 + 17
    assert (output.double() - 1).abs().max() <= roundoffs * torch.finfo(dtype).eps / 2


@pytest.mark.guarantee("G5")
@pytest.mark.parametrize("size", [1e15, 1e30])
def test_huge_logits_stay_right(path, dtype, size):
    if dtype == torch.float16:
        size = 6e4
    case = make_case(OP, dtype=dtype, width=1, slots=2, masked=0.5)
    query = torch.full_like(case.tensors["query"], size)
    key = torch.tensor([[-1.0], [1.0]], dtype=dtype).expand(2, 3, 2, 1)
    case = case.replace(query=query, key=key, slot_mask=torch.tensor([[True, True], [True, False]]))
    value, output = case.tensors["value"], path(case).output
    assert torch.equal(output[0], value[0, :, 1:].expand(-1, 7, -1))
    assert torch.equal(output[1], value[1, :, :1].expand(-1, 7, -1))  # a finite sentinel would let the hidden slot win


@pytest.mark.guarantee("G4")
@pytest.mark.parametrize("junk", [float("nan"), float("inf"), float("-inf")])
def test_hidden_slots_never_matter(path, dtype, junk, same_bits):
    case = make_case(OP, dtype=dtype, masked=0.4)
    case = case.replace(slot_mask=case.tensors["slot_mask"].clone())
    case.tensors["slot_mask"][1] = False
    hidden = ~case.tensors["slot_mask"][:, None, :, None].expand_as(case.tensors["key"])
    dirty = path(case.replace(**{name: case.tensors[name].masked_fill(hidden, junk) for name in ("key", "value")}))
    assert same_bits(dirty, path(case))
    assert not dirty.grads["key"][hidden].any() and not dirty.grads["value"][hidden].any()


@pytest.mark.guarantee("G5")
@pytest.mark.parametrize("junk", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["query", "key", "value"])
def test_visible_nan_reaches_the_rows_that_see_it_and_no_other(path, name, junk, same_bits):
    case = make_case(OP)
    before = path(case)
    dirty = case.tensors[name].clone()
    dirty[1, 2, 3, 0] = junk
    after = path(case.replace(**{name: dirty}))
    sees = torch.zeros_like(before.output, dtype=torch.bool)
    if name == "query":
        sees[1, 2, 3] = True
    elif name == "key":
        sees[1, 2] = True
    else:
        sees[1, 2, :, 0] = True
    if junk != junk or name == "value":
        assert not after.output[sees].isfinite().any()
    assert same_bits(after.output[~sees], before.output[~sees])
    elsewhere = torch.ones(2, 3, dtype=torch.bool)
    elsewhere[1, 2] = False
    assert all(same_bits(after.grads[n][elsewhere], before.grads[n][elsewhere]) for n in before.grads)


# Does layout matter?


@pytest.mark.guarantee("G4", "G9", "G11")
def test_layout_of_inputs_does_not_matter(path, layout, agree, contiguous, storage):
    case = make_case(OP, masked=0.4).map(layout)
    before = {name: storage(tensor) for name, tensor in case.tensors.items()}
    agree(path(case), path(case.map(contiguous)))
    assert all(torch.equal(storage(tensor), before[name]) for name, tensor in case.tensors.items())


@pytest.mark.guarantee("G9", "G11")
def test_layout_of_the_incoming_gradient_does_not_matter(path, layout, agree, contiguous, storage):
    case = make_case(OP, masked=0.4)
    grad = layout(cotangent(case))
    before = storage(grad)
    agree(path(case, grad), path(case, contiguous(grad)))
    assert torch.equal(storage(grad), before)


def test_key_and_value_may_be_laid_out_differently(path, same_bits, transposed):
    case = make_case(OP, batch=1)
    assert same_bits(path(case.replace(value=transposed(case.tensors["value"]))).output, path(case).output)


@pytest.mark.parametrize("slots", [3, 17], ids=["one tile", "tiles"])
def test_nothing_beside_the_inputs_is_read(triton, small_tiles, beside_no_memory, slots, same_bits):
    case = make_case(OP, batch=1, heads=1, slots=slots, tokens=5, masked=0.4)
    grad = cotangent(case)
    assert same_bits(triton(case.map(beside_no_memory), beside_no_memory(grad)), triton(case, grad))


@pytest.mark.parametrize("dim", [0, 1, 2], ids=["batch", "heads", "rows"])
def test_offsets_may_pass_2_to_the_31(triton, far_apart, dim, same_bits):
    sizes = [1, 1, 1]
    sizes[dim] = 4
    batch, heads, rows = sizes
    case = make_case(OP, batch=batch, heads=heads, slots=rows, tokens=rows, dtype=torch.float16)
    grad = cotangent(case)
    assert same_bits(triton(case.map(lambda t: far_apart(t, dim)), far_apart(grad, dim)), triton(case, grad))


@pytest.mark.parametrize("slots", [3, 17], ids=["one tile", "tiles"])
def test_a_row_has_the_same_bits_in_any_batch(triton, small_tiles, slots, same_bits):
    case = make_case(OP, batch=3, heads=1, slots=slots, tokens=35, masked=0.4)
    grad = cotangent(case)
    whole = triton(case, grad)
    for rows in ([1], [2, 0]):
        part = triton(case.map(lambda t: t[rows]), grad[rows])  # noqa: B023
        assert all(same_bits(part.tensors()[name], tensor[rows]) for name, tensor in whole.tensors().items())


# Does it refuse well?


@pytest.mark.guarantee("G12", "G14")
def test_wrong_arguments_are_refused():
    tensors = make_case(OP, batch=2, heads=3, slots=5, tokens=7, width=8, masked=0.4).tensors
    query, key, value, mask = tensors.values()
    no_width = query[..., 0]
    for error, message, change in [
        (TypeError, "memory_read: key must be a tensor, got list", dict(key=[1.0])),
        (TypeError, "memory_read: slot_mask must be a tensor, got list", dict(slot_mask=[True])),
        (ValueError, r"memory_read: query must have shape \[B, H, L, D\], got \[2, 3, 7\]", dict(query=no_width)),
        (
            ValueError,
            r"memory_read: key must have shape \[B, H, M, D\] = \[2, 3, any, 8\], got \[1, 3, 5, 8\]",
            dict(key=key[:1]),
        ),
        (
            ValueError,
            r"memory_read: value must have shape \[B, H, M, D\] = \[2, 3, 5, 8\], got \[2, 3, 4, 8\]",
            dict(value=value[:, :, 1:]),
        ),
        (
            ValueError,
            r"memory_read: slot_mask must have shape \[B, M\] = \[2, 5\], got \[2, 4\]",
            dict(slot_mask=mask[:, 1:]),
        ),
        (
            TypeError,
            "memory_read: slot_mask must be a bool tensor, True where visible, got torch.float32",
            dict(slot_mask=mask.float()),
        ),
        (
            TypeError,
            "memory_read: query must be float16, bfloat16, float32 or float64, got torch.int64",
            dict(query=query.long()),
        ),
        (
            TypeError,
            r"memory_read: value must have the dtype of query \(torch.float32\), got torch.float64",
            dict(value=value.double()),
        ),
        (ValueError, r"memory_read: key must be on the device of query \(cpu\), got meta", dict(key=key.to("meta"))),
        (TypeError, "memory_read: scale must be a number, got str", dict(scale="1")),
        (ValueError, "memory_read: scale must be finite and above 0, got 0", dict(scale=0)),
        (ValueError, "memory_read: scale must be finite and above 0, got nan", dict(scale=math.nan)),
        (ValueError, "memory_read: backend must be one of auto, cuda, triton, eager, got 'fast'", dict(backend="fast")),
        (NotImplementedError, "memory_read: backend 'cuda' cannot run this call: ", dict(backend="cuda")),
    ]:
        with pytest.raises(error, match=message):
            memory_read(**{**tensors, **change})


# Does it compose?


@pytest.mark.guarantee("G15")
@pytest.mark.parametrize("backend", ["auto", "eager"])
def test_public_function_compiles_as_one_graph(backend, agree, eager):
    def function(**arguments):
        return memory_read(**arguments, backend=backend)

    case = make_case(OP, masked=0.4)
    agree(run(case, function=torch.compile(function, fullgraph=True, backend="aot_eager")), eager(case))


@pytest.mark.guarantee("G15")
@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
def test_registered_op_compiles_as_one_graph(compiler, agree, registered, eager, transposed):
    case = make_case(OP, masked=0.4).map(transposed)
    agree(run(case, function=torch.compile(registered(OP), fullgraph=True, backend=compiler)), eager(case))


@pytest.mark.guarantee("G15")
@pytest.mark.parametrize("backend", ["eager", "triton"])
@pytest.mark.parametrize(
    "size", [{}, {"tokens": 0}, {"slots": 0}, {"slots": 33}, {"heads": 1, "masked": 1}, {"dtype": torch.float16}]
)
def test_registered_op_passes_opcheck(size, backend, transposed):
    if backend == "triton":
        pytest.importorskip("triton")
    case = make_case(OP, **{"masked": 0.4, **size})
    call = api.prepare(**case.map(transposed).tensors)
    grad = transposed(cotangent(case))
    *tensors, scale, allow_tf32 = call
    for save in (True, False):
        opcheck(torch.ops.memformer_kernels.memory_read_forward.default, (*call, save, backend))
    saved = torch.ops.memformer_kernels.memory_read_forward.default(*call, True, backend)
    saved = saved if saved[1].dim() == 3 else (None, None, None)
    backward = torch.ops.memformer_kernels.memory_read_backward.default
    opcheck(backward, (grad, *tensors, *saved, scale, allow_tf32, backend))


def test_autocast_computes_what_cast_inputs_compute(path, same_bits):
    case = make_case(OP, masked=0.4)
    grad = cotangent(case).bfloat16()
    got = path(case, grad, autocast=torch.bfloat16)
    want = path(case.map(lambda t: t.bfloat16() if t.is_floating_point() else t), grad)
    assert got.grads["key"].dtype == torch.float32
    assert same_bits(got.output, want.output)
    assert all(same_bits(got.grads[name], grad.float()) for name, grad in want.grads.items())
    float64 = case.map(lambda t: t.double() if t.is_floating_point() else t)
    assert same_bits(path(float64, autocast=torch.bfloat16), path(float64))


def test_definition_works_under_vmap_and_grad(eager):
    case = make_case(OP, dtype=torch.float64, masked=0.4)
    query, key, value, mask = (t.unsqueeze(1) for t in case.tensors.values())  # one batch row a call

    def loss(query, key, value, mask, grad):
        return (memory_read(query, key, value, slot_mask=mask) * grad).sum()

    grads = torch.func.vmap(torch.func.grad(loss, (0, 1, 2)))(query, key, value, mask, cotangent(case).unsqueeze(1))
    for got, want in zip(grads, eager(case).grads.values(), strict=True):
        torch.testing.assert_close(got.squeeze(1), want)


@pytest.mark.guarantee("G14")
def test_second_derivative_is_refused_where_there_is_none(registered):
    case = make_case(OP, requires_grad=True)
    output = registered(OP)(**case.tensors)
    with pytest.raises(NotImplementedError, match="memory_read: the fused backward has no derivative of its own"):
        torch.autograd.grad(output.sum(), case.tensors["query"], create_graph=True)
