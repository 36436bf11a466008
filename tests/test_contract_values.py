"""What the contract says of values, for every op and way to run it: families that no tolerance replaces."""

import math

import pytest
import torch

from memformer_kernels.testing import Case, cotangent, make_case

ATTENTION = ("memory_read", "memory_write")
OPS = (*ATTENTION, "memory_forget")
MASK = {"memory_read": "slot_mask", "memory_write": "token_mask"}
KEYS = {"memory_read": "slots", "memory_write": "tokens"}
ROWS = {"memory_read": "tokens", "memory_write": "slots"}
each_op = pytest.mark.parametrize("op", OPS)
each_attention = pytest.mark.parametrize("op", ATTENTION)
# of tiles and chunks, in 32 and in 16 bits: 16, 32, 64 and 128 keys, 512 tokens
NEEDLES = {33: (0, 15, 16, 31, 32), 131: (63, 64, 127, 128, 130), 1100: (511, 512, 1023, 1024, 1099)}


def attention_case(op, keys, rows, **options):
    return make_case(op, **{"batch": 1, "heads": 2, KEYS[op]: keys, ROWS[op]: rows, "bias": False, **options})


def in_rows(op, of_heads):
    """What rows [B, H, rows, D] are in the layout of the output."""
    return of_heads if op == "memory_read" else of_heads.transpose(1, 2).flatten(-2)


def per_head(op, output, width):
    return output if op == "memory_read" else output.unflatten(-1, (-1, width)).transpose(1, 2)


# G3, G5: exact answers


@pytest.mark.guarantee("G3")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("keys", NEEDLES)
@each_attention
def test_one_key_carries_the_answer(path, op, keys, dtype, same_bits):
    """A needle at each border of a tile: its value bit for bit, and the whole gradient goes to it, alone."""
    places = torch.tensor(NEEDLES[keys])
    case = attention_case(op, keys, len(places), heads=1, width=16, dtype=dtype, temperature=1.0)
    key = torch.zeros_like(case.tensors["key"])
    key[:, :, places, torch.arange(5)] = 1
    query = 800 * torch.eye(5, 16, dtype=dtype).expand(1, 1, 5, 16)  # ahead by 200
    case = case.replace(key=key, query=query)
    if op == "memory_write":
        case = case.replace(own_key=torch.zeros_like(case.tensors["own_key"]))
    result = path(case)
    assert same_bits(result.output, in_rows(op, case.tensors["value"][:, :, places]))
    elsewhere = torch.ones(keys, dtype=torch.bool)
    elsewhere[places] = False
    assert same_bits(result.grads["value"][:, :, places], per_head(op, cotangent(case), 16))
    assert not result.grads["value"][:, :, elsewhere].any()
    assert not result.grads["key"][:, :, elsewhere].any()


@pytest.mark.guarantee("G3", "G5")
@pytest.mark.parametrize("step", [130.0, -130.0, 1e20, -1e20])
@pytest.mark.parametrize("keys", [33, 131])
@each_attention
def test_logits_that_rise_or_fall_from_key_to_key(path, op, keys, step, same_bits):
    """Every tile has a new maximum, of which nothing before it is left; or none has."""
    case = attention_case(op, keys, 3, heads=1, width=16, temperature=1.0)
    key = torch.zeros_like(case.tensors["key"])
    key[..., 0] = torch.arange(keys) * step
    query = torch.zeros_like(case.tensors["query"])
    query[..., 0] = 4.0  # over sqrt(16)
    case = case.replace(key=key, query=query)
    if op == "memory_write":
        case = case.replace(own_key=torch.full_like(case.tensors["own_key"], -1e25))
    result, winner = path(case), keys - 1 if step > 0 else 0
    want = case.tensors["value"][:, :, winner : winner + 1].expand(-1, -1, 3, -1)
    assert same_bits(result.output, in_rows(op, want))
    assert all(grad.isfinite().all() for grad in result.grads.values())


@pytest.mark.guarantee("G5")
@pytest.mark.parametrize("junk", [math.nan, math.inf])
@each_op
def test_nan_in_the_incoming_gradient_stays_in_its_batch_row(path, op, junk, same_bits):
    case = make_case(op, batch=3, heads=1, slots=3, tokens=4, masked=0.4)
    grad = cotangent(case)
    before = path(case, grad)
    grad[1].flatten()[5] = junk
    after = path(case, grad)
    assert same_bits(after.output, before.output)
    for name in before.grads:
        if name != "bias":
            assert same_bits(after.grads[name][::2], before.grads[name][::2]), name
    reached = "query" if op != "memory_forget" else "slots"
    assert not after.grads[reached][1].isfinite().all()


# G2: accumulation


@pytest.mark.guarantee("G2")
@each_attention
def test_16_bit_products_are_summed_in_float32(path, op, within_bound):
    """Terms of 40,000 that cancel pass through sums above float16's largest number, and ones are added to 4,096."""
    case = attention_case(op, 17, 5, width=64, dtype=torch.float16, temperature=1.0)
    size = torch.cat([torch.full((32,), 200.0), torch.full((32,), -200.0)]).half()
    query = torch.full_like(case.tensors["query"], 200.0)
    key = size.expand_as(case.tensors["key"]) + torch.randn(17, 64).half() / 64
    case = case.replace(query=query, key=key, value=torch.full_like(case.tensors["value"], 1000.0))
    within_bound(path(case), case)
    many = attention_case(op, 2, 5, width=16, dtype=torch.float16, temperature=1.0)
    assert path(many).output.isfinite().all()


@pytest.mark.guarantee("G2")
def test_long_sums_of_a_gradient_do_not_stop_growing(path):
    """4,096 gradients of 1 for one value: in float16 the sum would stop at 2,048."""
    case = attention_case("memory_read", 1, 4096, width=8, heads=1, dtype=torch.float16)
    result = path(case, torch.ones_like(case.tensors["query"]))
    assert (result.grads["value"] == 4096).all()


# G6: the norm


@pytest.mark.guarantee("G6")
@pytest.mark.parametrize("size", [2e38, 1e-30])
@pytest.mark.parametrize("op", ["memory_write", "memory_forget"])
def test_slots_of_any_size_are_normalised(path, op, size, within_bound):
    """Squares of 1e76 and of 1e-60."""
    case = make_case(op, tokens=0)
    case.options["eps"] = 1.2e-38
    slots = size * case.tensors["slots"].clamp(-1, 1)
    case = case.replace(slots=slots, bias=0 * case.tensors["bias"])
    result = path(case)
    assert (result.output.norm(dim=-1) - 1).abs().max() < 1e-6
    assert all(grad.isfinite().all() for grad in result.grads.values())
    within_bound(result, case)


# G8: the batch


@pytest.mark.guarantee("G8")
@pytest.mark.parametrize(
    "slots, tokens, dtype", [(5, 17, torch.float32), (5, 17, torch.float16), (33, 3, torch.float32)]
)
@each_op
def test_a_row_has_the_same_bits_in_any_batch(path, op, dtype, slots, tokens, same_bits):
    case = make_case(op, batch=3, heads=1, slots=slots, tokens=tokens, width=16, dtype=dtype, masked=0.3)
    grad = cotangent(case)
    whole = path(case, grad).tensors()
    names = [name for name in whole if name != "grad_bias"]
    for part in ([2], [2, 0]):  # alone, and at another place with other neighbours
        rows = {name: t if name == "bias" else t[part] for name, t in case.tensors.items()}
        got = path(Case(op, rows, case.options), grad[part]).tensors()
        wrong = [name for name in names if not same_bits(got[name], whole[name][part])]
        assert not wrong, f"{part}: {wrong}"


@pytest.mark.guarantee("G8")
def test_a_row_of_many_slots_has_the_same_bits_in_any_batch(triton, same_bits):
    case = make_case("memory_write", batch=2, heads=1, slots=33, tokens=3, width=8)
    grad = cotangent(case)
    whole = triton(case, grad)
    alone = {name: t if name == "bias" else t[1:] for name, t in case.tensors.items()}
    got = triton(Case(case.op, alone, case.options), grad[1:])
    assert same_bits(got.output, whole.output[1:])
    assert all(same_bits(got.grads[name], whole.grads[name][1:]) for name in got.grads if name != "bias")
