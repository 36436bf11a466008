import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.autograd import gradcheck, gradgradcheck
from torch.library import opcheck

from memformer_kernels import memory_forget
from memformer_kernels.ops.memory_forget import api
from memformer_kernels.testing import Case, Result, cotangent, make_case, oracle, run

OP = "memory_forget"
TINY = dict(batch=2, heads=1, slots=2, width=3, dtype=torch.float64)
SIZES = dict(
    batch=st.integers(0, 3),
    slots=st.integers(0, 6),
    width=st.sampled_from([0, 2, 3, 5, 8, 9]),  # not 1: the gradient of a unit vector of one channel is only rounding
    amplitude=st.sampled_from([1e-3, 1.0, 1e3]),
    seed=st.integers(0, 9),
)


# Is it right?


@pytest.mark.guarantee("G1")
def test_output_and_gradients_are_right(path, dtype, agree, within_bound):
    case = make_case(OP, slots=17, width=21, dtype=dtype)
    result = path(case)
    agree(result, oracle(case))
    if dtype != torch.float64:
        within_bound(result, case)


@pytest.mark.guarantee("G6")
@pytest.mark.parametrize("wide", [torch.float64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize("eps", [1e-12, 0.3, 0.7])
def test_gradients_are_right_on_both_sides_of_eps(path, eps, wide, agree):
    case = make_case(OP, batch=8, amplitude=0.15 * eps, dtype=wide)
    norms = sum(case.tensors.values()).norm(dim=-1)
    assert 8 < (norms < eps).sum() < 32  # of 40
    case.options["eps"] = eps
    agree(path(case), oracle(case))


@pytest.mark.guarantee("G1")
def test_bias_may_be_float32(path, agree):
    case = make_case(OP, dtype=torch.bfloat16)
    case = case.replace(bias=case.tensors["bias"].float() * 1.001)
    result = path(case)
    assert result.output.dtype == torch.bfloat16 and result.grads["bias"].dtype == torch.float32
    agree(result, oracle(case))


@pytest.mark.guarantee("G1")
@settings(max_examples=60, deadline=None, derandomize=True)
@given(**SIZES)
def test_explicit_gradients_are_those_of_the_definition(eager, explicit, agree, **sizes):
    case = make_case(OP, heads=1, dtype=torch.float64, **sizes)
    agree(explicit(case), eager(case), tolerance=1e-12)


@pytest.mark.guarantee("G10")
@pytest.mark.parametrize("size", ["batch", "slots", "width"])
def test_any_size_may_be_zero(path, size):
    case = make_case(OP, **{size: 0})
    result = path(case)
    assert result.output.shape == case.tensors["slots"].shape
    assert not result.grads["bias"].any()


def test_the_batch_comes_in_groups(triton, small_tiles, agree):
    case = make_case(OP, batch=3, heads=1, slots=2, width=21)
    agree(triton(case), oracle(case))


def test_an_empty_batch_gives_zero_gradients_whatever_lay_there(triton, nothing_left_over):
    assert not triton(make_case(OP, batch=0)).grads["bias"].any()


def test_groups_of_the_batch_are_added_up_in_float32(triton, small_tiles, agree):
    case = make_case(OP, batch=4, heads=1, slots=1, dtype=torch.float16)
    case, grad = case.map(lambda t: t if t.dim() == 2 else t[:1].expand(t.shape)), cotangent(case)
    grad[2:] = -grad[:2]  # the groups all but cancel
    grad[0] += 2**-6
    agree(triton(case, grad), oracle(case, grad))


# Is the reference right?


def test_definition_equals_the_formula_in_plain_loops(eager):
    case = make_case(OP, **TINY)
    output = eager(case).output
    for b in range(2):
        for i in range(2):
            z = (case.tensors["slots"][b, i] + case.tensors["bias"][i]).tolist()
            norm = math.sqrt(sum(x * x for x in z))
            assert output[b, i].tolist() == pytest.approx([x / norm for x in z], rel=1e-13)


@pytest.mark.parametrize("eps", [1e-12, 10.0])
def test_definition_is_differentiable_twice(eps):
    inputs = tuple(make_case(OP, **TINY, requires_grad=True).tensors.values())

    def function(slots, bias):
        return memory_forget(slots, bias, eps=eps, backend="eager")

    assert gradcheck(function, inputs)
    assert gradgradcheck(function, inputs)


@pytest.mark.guarantee("G8")
def test_slots_never_see_one_another(path, same_bits):
    case = make_case(OP)
    before = path(case)
    slots, bias = (t.clone() for t in case.tensors.values())
    slots[:, 3], bias[3] = 9, 9
    after = path(case.replace(slots=slots, bias=bias))
    others = torch.tensor([0, 1, 2, 4])
    assert not same_bits(after.output[:, 3], before.output[:, 3])
    assert same_bits(after.output[:, others], before.output[:, others])
    assert same_bits(after.grads["slots"][:, others], before.grads["slots"][:, others])
    assert same_bits(after.grads["bias"][others], before.grads["bias"][others])


def test_slots_keep_their_order(path, agree):
    case = make_case(OP, dtype=torch.float64)
    order = torch.randperm(5)
    before = path(case)
    after = path(
        case.replace(slots=case.tensors["slots"][:, order], bias=case.tensors["bias"][order]), cotangent(case)[:, order]
    )
    grads = {"slots": before.grads["slots"][:, order], "bias": before.grads["bias"][order]}
    agree(after, Result(before.output[:, order], grads))


def test_output_has_unit_norm(path, dtype):
    norms = path(make_case(OP, dtype=dtype)).output.double().norm(dim=-1)
    assert (norms - 1).abs().max() <= 2 * torch.finfo(dtype).eps


@pytest.mark.parametrize("retention, half_life", [(1.15, 0.9), (0.3, 2.6), (0.1, 7.3), (0.02, 35.0)])
def test_half_life_follows_the_norm_of_the_bias(retention, half_life):
    direction, across = torch.eye(2, 8, dtype=torch.float64)
    bias = retention * direction.unsqueeze(0)
    slot, calls, start = (direction + 1e-4 * across).view(1, 1, 8), 50, 1e-4
    for _ in range(calls):
        slot = memory_forget(slot, bias, backend="eager")
    angle = torch.atan2(slot[0, 0, 1], slot[0, 0, 0]).item()
    measured = calls * math.log(2) / math.log(start / angle)
    assert measured == pytest.approx(math.log(2) / math.log(1 + retention), rel=1e-6)
    assert round(measured, 1) == half_life


@pytest.mark.guarantee("G6")
@pytest.mark.parametrize("size", [3e38, 1e-30])
def test_norm_neither_overflows_nor_vanishes(path, size, agree):
    case = make_case(OP, batch=3)
    slots = torch.randn(3, 5, 24).sign() * size * torch.linspace(0.1, 1, 24)
    case = Case(OP, {"slots": slots, "bias": torch.zeros(5, 24)}, {"eps": 1.2e-38})
    result = path(case)
    assert (result.output.norm(dim=-1) - 1).abs().max() < 1e-6
    assert all(grad.isfinite().all() for grad in result.grads.values())
    if size < 1:  # at 3e38 the gradients are subnormal numbers
        agree(result, oracle(case))


@pytest.mark.guarantee("G6")
@pytest.mark.parametrize("eps", [0.125, 1e-12])
def test_zero_vector_stays_zero_with_gradient_over_eps(path, dtype, eps):
    if dtype == torch.float16:
        eps = max(eps, 0.125)  # 1 / eps is not a finite float16 otherwise
    case = make_case(OP, dtype=dtype)
    case = Case(OP, case.replace(slots=-case.tensors["bias"].expand(2, -1, -1)).tensors, {"eps": eps})
    result = path(case)
    assert not result.output.any()
    torch.testing.assert_close(result.grads["slots"], (cotangent(case).double() / eps).to(dtype))


@pytest.mark.guarantee("G5")
def test_visible_nan_reaches_its_slot_and_no_other(path, same_bits):
    case = make_case(OP)
    before = path(case)
    for junk in (float("nan"), float("inf")):
        slots = case.tensors["slots"].clone()
        slots[1, 3, 0] = junk
        after = path(case.replace(slots=slots))
        others = torch.ones(2, 5, dtype=torch.bool)
        others[1, 3] = False
        reached = after.output[1, 3] if junk != junk else after.output[1, 3, 0]
        assert reached.isnan().all() and after.grads["slots"][1, 3].isnan().all()
        assert same_bits(after.output[others], before.output[others])
        assert same_bits(after.grads["slots"][others], before.grads["slots"][others])


# Does layout matter?


@pytest.mark.guarantee("G4", "G9", "G11")
def test_layout_of_inputs_does_not_matter(path, layout, agree, contiguous, storage):
    case = make_case(OP).map(layout)
    before = {name: storage(tensor) for name, tensor in case.tensors.items()}
    agree(path(case), path(case.map(contiguous)))
    assert all(torch.equal(storage(tensor), before[name]) for name, tensor in case.tensors.items())


@pytest.mark.guarantee("G9", "G11")
def test_layout_of_the_incoming_gradient_does_not_matter(path, layout, agree, contiguous, storage):
    case = make_case(OP)
    grad = layout(cotangent(case))
    before = storage(grad)
    agree(path(case, grad), path(case, contiguous(grad)))
    assert torch.equal(storage(grad), before)


def test_nothing_beside_the_inputs_is_read(triton, beside_no_memory, same_bits):
    case = make_case(OP, batch=1, heads=1, slots=3, width=21)
    grad = cotangent(case)
    assert same_bits(triton(case.map(beside_no_memory), beside_no_memory(grad)), triton(case, grad))


# Does it refuse well?


@pytest.mark.guarantee("G12", "G14")
def test_wrong_arguments_are_refused():
    tensors = make_case(OP, batch=2, heads=3, slots=5, width=8).tensors
    slots, bias = tensors.values()
    for error, message, change in [
        (TypeError, "memory_forget: bias must be a tensor, got NoneType", dict(bias=None)),
        (ValueError, r"memory_forget: slots must have shape \[B, M, C\], got \[5, 24\]", dict(slots=slots[0])),
        (ValueError, r"memory_forget: bias must have shape \[M, C\] = \[5, 24\], got \[24\]", dict(bias=bias[0])),
        (
            TypeError,
            "memory_forget: slots must be float16, bfloat16, float32 or float64, got torch.int64",
            dict(slots=slots.long()),
        ),
        (
            TypeError,
            "memory_forget: bias must be torch.float32 or torch.float32, got torch.float16",
            dict(bias=bias.half()),
        ),
        (
            ValueError,
            r"memory_forget: bias must be on the device of slots \(cpu\), got meta",
            dict(bias=bias.to("meta")),
        ),
        (TypeError, "memory_forget: eps must be a number, got bool", dict(eps=True)),
        (ValueError, "memory_forget: eps must be finite and at least 1.2e-38, got 1e-45", dict(eps=1e-45)),
        (ValueError, "memory_forget: eps must be finite and at least 1.2e-38, got inf", dict(eps=math.inf)),
        (ValueError, "memory_forget: backend must be one of auto, cuda, triton, eager, got None", dict(backend=None)),
        (NotImplementedError, "memory_forget: backend 'cuda' cannot run this call: ", dict(backend="cuda")),
    ]:
        with pytest.raises(error, match=message):
            memory_forget(**{**tensors, **change})


# Does it compose?


@pytest.mark.guarantee("G15")
@pytest.mark.parametrize("backend", ["auto", "eager"])
def test_public_function_compiles_as_one_graph(backend, agree, eager):
    def function(**arguments):
        return memory_forget(**arguments, backend=backend)

    case = make_case(OP)
    agree(run(case, function=torch.compile(function, fullgraph=True, backend="aot_eager")), eager(case))


@pytest.mark.guarantee("G15")
@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
def test_registered_op_compiles_as_one_graph(compiler, agree, registered, eager, transposed):
    case = make_case(OP).map(transposed)
    agree(run(case, function=torch.compile(registered(OP), fullgraph=True, backend=compiler)), eager(case))


@pytest.mark.guarantee("G15")
@pytest.mark.parametrize("size", [{}, {"batch": 1}, {"slots": 0}, {"dtype": torch.bfloat16}])
def test_registered_op_passes_opcheck(size, transposed):
    case = make_case(OP, **size)
    slots, bias, eps = api.prepare(**case.map(transposed).tensors)
    grad = transposed(cotangent(case))
    forward = torch.ops.memformer_kernels.memory_forget_forward.default
    opcheck(forward, (slots, bias, eps, "eager"))
    inv_norm = forward(slots, bias, eps, "eager")[1]
    backward = torch.ops.memformer_kernels.memory_forget_backward.default
    opcheck(backward, (grad, slots, bias, inv_norm, eps, "eager"))


def test_autocast_leaves_it_alone(path, same_bits):
    case = make_case(OP)
    assert same_bits(path(case, autocast=torch.bfloat16), path(case))


def test_definition_works_under_vmap_and_grad(eager):
    case = make_case(OP, dtype=torch.float64)
    slots, bias = case.tensors.values()

    def loss(slots, grad):
        return (memory_forget(slots, bias) * grad).sum()

    grads = torch.func.vmap(torch.func.grad(loss))(slots.unsqueeze(1), cotangent(case).unsqueeze(1))
    torch.testing.assert_close(grads.squeeze(1), eager(case).grads["slots"])


@pytest.mark.guarantee("G14")
def test_second_derivative_is_refused_where_there_is_none(registered):
    case = make_case(OP, requires_grad=True)
    output = registered(OP)(**case.tensors)
    with pytest.raises(NotImplementedError, match="memory_forget: the fused backward has no derivative of its own"):
        torch.autograd.grad(output.sum(), case.tensors["slots"], create_graph=True)
