import math

import pytest
import torch
from torch.nn import functional as F

from memformer_kernels.layers import (
    CrossAttention,
    DecoderLayer,
    MemoryLayer,
    MemoryProjection,
    MemoryRead,
    MemoryWrite,
    SelfAttention,
)
from memformer_kernels.layers.transformer import KeyValueCache, look_from

B, L, M, H, D = 2, 5, 3, 2, 4
C = H * D


@pytest.fixture(autouse=True)
def float64():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.fixture
def x():
    return torch.randn(B, L, C)


@pytest.fixture
def memory():
    return F.normalize(torch.randn(B, M, C), dim=-1)


def heads(x):
    return x.view(*x.shape[:2], H, D).transpose(1, 2)


def merged(x):
    return x.transpose(1, 2).reshape(x.shape[0], -1, C)


def close(a, b):
    torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-13)


# Memory projection


def test_one_projection_for_all_layers_equals_one_for_each(memory):
    together = MemoryProjection(C, H, layers=3)
    torch.nn.init.normal_(together.norm.weight)
    torch.nn.init.normal_(together.norm.bias)
    pairs = together(memory)
    assert len({tensor.untyped_storage().data_ptr() for pair in pairs for tensor in pair}) == 1  # views of one product
    for i, pair in enumerate(pairs):
        alone = MemoryProjection(C, H)
        alone.norm.load_state_dict(together.norm.state_dict())
        alone.key_value.weight.data = together.key_value.weight.data[2 * i * C : 2 * (i + 1) * C]
        for got, want in zip(pair, alone(memory)[0], strict=True):
            assert got.shape == (B, H, M, D)
            close(got, want)


def test_memory_passes_a_norm_before_it_is_projected(memory):
    projection = MemoryProjection(C, H)
    key, value = projection(memory)[0]
    normed = F.layer_norm(memory, (C,))
    close(key, heads(normed @ projection.key_value.weight[:C].T))
    close(value, heads(normed @ projection.key_value.weight[C:].T))
    stretched, _ = projection(1e6 * memory + 1e3)[0]
    torch.testing.assert_close(stretched, projection(1e3 * memory)[0][0], rtol=1e-6, atol=1e-6)


# Reading


def test_read_is_attention_over_the_normed_memory(x, memory):
    layer = MemoryRead(C, H)
    mask = torch.tensor([[True, False, True], [True, True, False]])
    key, value = layer.projection(memory)[0]
    query = heads(x @ layer.query.weight.T)
    attended = F.scaled_dot_product_attention(query, key, value, attn_mask=mask[:, None, None])
    close(layer(x, memory, slot_mask=mask), merged(attended) @ layer.output.weight.T)


def test_read_takes_keys_and_values_made_elsewhere(x, memory):
    layer = MemoryRead(C, H)
    close(layer(x, layer.projection(memory)[0]), layer(x, memory))
    bare = MemoryRead(C, H, projection=False)
    assert {name for name, _ in bare.named_parameters()} == {"query.weight", "output.weight"}
    with pytest.raises(TypeError, match=r"memory must be \(key, value\) when projection=False, got a tensor"):
        bare(x, memory)


# Writing


@pytest.mark.parametrize("own_value", ["slots", "projected"])
@pytest.mark.parametrize("forgetting", [True, False])
def test_write_is_attention_of_each_slot_to_itself_and_the_tokens(x, memory, own_value, forgetting):
    layer = MemoryWrite(C, H, M, temperature=0.5, own_value=own_value, forgetting=forgetting)
    mask = torch.rand(B, L) < 0.6
    query, own_key, key, value = (
        heads(t @ w.weight.T) for t, w in [(memory, layer.query), (memory, layer.key), (x, layer.key), (x, layer.value)]
    )
    own = heads(memory if own_value == "slots" else memory @ layer.value.weight.T)
    written = torch.empty_like(own)
    for i in range(M):
        pick = slice(i, i + 1)
        visible = torch.cat([torch.ones(B, 1, dtype=torch.bool), mask], 1)[:, None, None]
        written[:, :, pick] = F.scaled_dot_product_attention(
            query[:, :, pick],
            torch.cat([own_key[:, :, pick], key], 2),
            torch.cat([own[:, :, pick], value], 2),
            attn_mask=visible,
            scale=1 / (0.5 * math.sqrt(D)),
        )
    want = merged(written)
    if forgetting:
        want = F.normalize(want + layer.bias, dim=-1)
    close(layer(memory, x, token_mask=mask), want)


def test_segment_without_tokens_leaves_the_slots_unless_they_forget(x, memory, same_bits):
    nothing = torch.zeros(B, L, dtype=torch.bool)
    assert same_bits(MemoryWrite(C, H, M, forgetting=False)(memory, x, token_mask=nothing), memory)
    forgetting = MemoryWrite(C, H, M)
    close(forgetting(memory, x, token_mask=nothing), F.normalize(memory + forgetting.bias, dim=-1))
    close(forgetting(memory, x[:, :0]), F.normalize(memory + forgetting.bias, dim=-1))


@pytest.mark.parametrize("retention", [0.02, 0.1, 1.15])
def test_retention_is_the_norm_of_the_bias_and_sets_the_half_life(retention):
    layer = MemoryWrite(C, H, M, retention=retention)
    close(layer.bias.norm(dim=-1), torch.full((M,), retention))
    close(layer.half_life(), torch.full((M,), math.log(2) / math.log(1 + retention)))
    assert not layer.half_life().requires_grad


def test_initial_memory_is_the_direction_of_the_bias():
    layer = MemoryWrite(C, H, M)
    initial = layer.initial_memory(4)
    close(initial, (layer.bias / layer.bias.norm(dim=-1, keepdim=True)).expand(4, M, C))
    assert torch.autograd.grad((initial * torch.randn(4, M, C)).sum(), layer.bias)[0].abs().sum() > 0


def test_memory_stays_float32_under_autocast():
    layer = MemoryWrite(C, H, M).float()
    reader = MemoryRead(C, H).float()
    x = torch.randn(B, L, C, dtype=torch.float32)
    memory = layer.initial_memory(B)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert layer(memory, x).dtype == torch.float32
        assert reader(x, memory).dtype == torch.bfloat16


@pytest.mark.parametrize("own_value", ["slots", "projected"])
def test_every_parameter_learns(x, own_value):
    reader, writer = MemoryRead(C, H), MemoryWrite(C, H, M, own_value=own_value)
    reader(x, writer(writer.initial_memory(B), x)).square().sum().backward()
    for layer in (reader, writer):
        assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in layer.parameters())


def test_wrong_layers_are_refused(x, memory):
    for make, message in [
        (lambda: MemoryRead(8, 3), "MemoryRead: width must be a multiple of heads, got 8 and 3"),
        (lambda: MemoryWrite(8, 3, 2), "MemoryWrite: width must be a multiple of heads, got 8 and 3"),
        (lambda: MemoryWrite(8, 2, 2, own_value="both"), "own_value must be 'slots' or 'projected', got 'both'"),
        (lambda: MemoryWrite(8, 2, 2, retention=0), "must be above 0, got 0; forgetting=False switches it off"),
        (lambda: MemoryWrite(8, 2, 2, retention=math.nan), "retention must be above 0, got nan"),
        (lambda: MemoryRead(C, H, backend="fast")(x, memory), "memory_read: backend must be one of .* got 'fast'"),
        (lambda: MemoryWrite(C, H, M, backend="fast")(memory, x), "memory_write: backend must be one of .* got 'fast'"),
    ]:
        with pytest.raises(ValueError, match=message):
            make()


# Attention over tokens


def test_causal_attention_never_looks_ahead(x, same_bits):
    layer = SelfAttention(C, H, causal=True)
    changed = torch.cat([x[:, :3], torch.randn(B, 2, C)], 1)
    for mask in (None, torch.ones(B, L, dtype=torch.bool)):
        before, after = layer(x, token_mask=mask), layer(changed, token_mask=mask)
        assert same_bits(after[:, :3], before[:, :3])
        assert not same_bits(after[:, 3:], before[:, 3:])


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("visible", [slice(0, 3), slice(2, 5)], ids=["right", "left"])
def test_padding_on_either_side_does_not_matter(x, causal, visible):
    layer = SelfAttention(C, H, causal=causal)
    mask = torch.zeros(B, L, dtype=torch.bool)
    mask[:, visible] = True
    junk = x.masked_fill(~mask[..., None], 1e9)
    output = layer(junk, token_mask=mask)
    close(output[:, visible], layer(x[:, visible]))
    assert output.isfinite().all()


def test_row_of_padding_alone_stays_finite_with_its_gradient(x):
    layer = SelfAttention(C, H, causal=True)
    mask = torch.tensor([[True] * L, [False] * L])
    layer(x.requires_grad_(), token_mask=mask)[0].sum().backward()
    assert x.grad.isfinite().all()
    assert layer(x, token_mask=mask).isfinite().all()


@pytest.mark.parametrize("steps", [(1, 1, 1, 1, 1), (3, 1, 1), (1, 4), (2, 3), (5,)])
def test_cached_attention_equals_attention_at_once(x, steps):
    layer = SelfAttention(C, H, causal=True)
    with torch.no_grad():
        want = layer(x)
        cache, position, made = KeyValueCache(B, H, L, D, x), 0, []
        for step in steps:
            look_from([cache], torch.arange(position, position + step).expand(B, -1))
            made.append(layer(x[:, position : position + step], cache=cache))
            position += step
    close(torch.cat(made, 1), want)


def test_cross_attention_never_sees_hidden_context(x):
    layer = CrossAttention(C, H)
    mask = torch.tensor([[True, True, True, False, False]] * B)
    key, value = layer.project(x)
    junk = (key.masked_fill(~mask[:, None, :, None], 1e9), value.masked_fill(~mask[:, None, :, None], 1e9))
    query = torch.randn(B, 2, C)
    close(layer(query, junk, context_mask=mask), layer(query, layer.project(x[:, :3])))


# Whole layers


def test_memory_layer_attends_reads_and_feeds_forward_in_this_order(x, memory):
    layer = MemoryLayer(C, H, 16, causal=True)
    pair = MemoryProjection(C, H)(memory)[0]
    want = x + layer.self_attention(layer.norms[0](x))
    want = want + layer.memory_read(layer.norms[1](want), pair)
    want = want + layer.feed_forward(layer.norms[2](want))
    close(layer(x, pair), want)


def test_decoder_layer_attends_crosses_and_feeds_forward_in_this_order(x):
    layer = DecoderLayer(C, H, 16)
    context = layer.cross_attention.project(torch.randn(B, 3, C))
    want = x + layer.self_attention(layer.norms[0](x))
    want = want + layer.cross_attention(layer.norms[1](want), context)
    want = want + layer.feed_forward(layer.norms[2](want))
    close(layer(x, context), want)


def test_decoder_layer_without_context_equals_one_whose_context_is_all_hidden(x):
    layer = DecoderLayer(C, H, 16)
    empty = layer.cross_attention.project(x[:, :0])
    hidden = layer(x, layer.cross_attention.project(x), context_mask=torch.zeros(B, L, dtype=torch.bool))
    close(layer(x, empty), hidden)


@pytest.mark.parametrize("make", [MemoryLayer, DecoderLayer])
def test_dropout_acts_in_training_only(x, make):
    layer = make(C, H, 16, dropout=0.5)
    pair = (torch.randn(B, H, M, D), torch.randn(B, H, M, D))
    assert not torch.equal(layer(x, pair), layer(x, pair))
    layer.eval()
    assert torch.equal(layer(x, pair), layer(x, pair))
