"""`cross_attention` is `scaled_dot_product_attention`, on `memory_read` where that can run."""

import importlib

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from memformer_kernels import cross_attention

room = importlib.import_module("memformer_kernels.integrations.attention")
B, H, L, M, D = 2, 4, 6, 5, 8


@pytest.fixture
def reads(monkeypatch):
    """The calls of `memory_read`."""
    calls, read = [], room.memory_read

    def reading(*tensors, **options):
        calls.append((tensors, options))
        return read(*tensors, **options)

    monkeypatch.setattr(room, "memory_read", reading)
    return calls


def normal(*shape, dtype=torch.float64):
    return torch.randn(shape, dtype=torch.float64).to(dtype).requires_grad_()


def visible(*shape):
    return torch.rand(shape, generator=torch.Generator().manual_seed(7)) > 0.4


def tensors(heads=H, keys=M, width=D, dtype=torch.float64):
    return normal(B, H, L, width, dtype=dtype), *(normal(B, heads, keys, width, dtype=dtype) for _ in range(2))


def assert_same(given, tolerance=1e-12, **options):
    """Outputs and gradients of the two."""
    results = []
    for function in (cross_attention, scaled_dot_product_attention):
        output = function(*given, **options)
        cotangent = torch.randn(output.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
        results.append((output, *torch.autograd.grad(output, given, cotangent.to(output))))
    for ours, theirs in zip(*results, strict=True):
        assert ours.shape == theirs.shape and ours.dtype == theirs.dtype
        torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)


ALIKE = {
    "none": None,
    "of slots": visible(B, 1, 1, M),
    "of one row of slots": visible(1, 1, 1, M),
    "two dimensions": visible(1, M),
    "three dimensions": visible(1, 1, M),
    "expanded": visible(B, 1, 1, M).expand(B, H, L, M),
    "nothing visible": torch.stack([torch.zeros(1, 1, M), torch.ones(1, 1, M)]).bool(),
    "one for all": torch.ones(1, 1, 1, 1, dtype=torch.bool),
}


@pytest.mark.parametrize("mask", ALIKE)
def test_masks_that_are_alike_for_every_query(mask, reads):
    assert_same(tensors(), attn_mask=ALIKE[mask])
    ((_, options),) = reads
    assert (options["slot_mask"] is None) == (mask == "none")


@pytest.mark.parametrize("options", [dict(scale=0.3), dict(attn_mask=visible(B, 1, 1, M), scale=2)])
def test_scale(options, reads):
    assert_same(tensors(), **options)
    assert len(reads) == 1


@pytest.mark.parametrize("mask", [None, visible(B, 1, 1, M)])
@pytest.mark.parametrize("heads", [1, 2])
def test_groups_of_heads(heads, mask, reads):
    assert_same(tensors(heads), attn_mask=mask, enable_gqa=True)
    assert len(reads) == 1


def test_projections_as_layers_make_them(reads):
    given = [normal(B, n, H * D) for n in (L, M, M)]
    split = [t.unflatten(-1, (H, D)).transpose(1, 2) for t in given]
    torch.testing.assert_close(cross_attention(*split), scaled_dot_product_attention(*split), rtol=1e-12, atol=1e-12)
    assert len(reads) == 1


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 4e-2)])
def test_other_dtypes(dtype, tolerance, reads):
    assert_same(tensors(dtype=dtype), tolerance, attn_mask=visible(B, 1, 1, M))
    assert len(reads) == 1


def test_autocast(reads):
    given = tensors(dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert_same(given, 4e-2)
    assert len(reads) == 1


def everywhere(mask=None):
    return tensors(), dict(attn_mask=mask)


LEFT = {
    "dropout of the weights": (tensors(), dict(dropout_p=0.5)),
    "a causal mask": (tensors(), dict(is_causal=True)),
    "a mask with a row for every head or query": everywhere(visible(B, 1, L, M)),
    "a mask with a row for every head or query ": everywhere(visible(B, H, 1, M)),
    "a mask that is added to the logits": everywhere(torch.randn(1, 1, 1, M, dtype=torch.float64)),
    "129 keys are not 1 to 128": (tensors(keys=129), {}),
    "query is not [B, H, L, D] with something in it": ([normal(B, n, D) for n in (L, M, M)], {}),
    "key and value are not both [B, H, M, D] with the B and D of query": (
        [normal(B, H, L, D), normal(1, H, M, D), normal(1, H, M, D)],
        {},
    ),
    "key and value are not both [B, H, M, D] with the B and D of query ": (
        [normal(B, H, L, D), normal(B, H, M, D), normal(B, H, M, D + 1)],
        {},
    ),
    "scale is not finite and above 0": (tensors(), dict(scale=-1.0)),
}


@pytest.mark.parametrize("reason", LEFT)
def test_what_memory_read_does_not_run(reason, reads):
    given, options = LEFT[reason]
    assert room.unsupported_reason(*given, **options) == reason.strip()
    torch.manual_seed(4)
    ours = cross_attention(*given, **options)
    torch.manual_seed(4)
    assert torch.equal(ours, scaled_dot_product_attention(*given, **options))
    assert not reads


def test_128_keys_are_few(reads):
    assert_same(tensors(keys=128))
    assert len(reads) == 1 and room.unsupported_reason(*tensors(keys=128)) is None


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (dict(key=normal(B, 3, M, D), value=normal(B, 3, M, D)), "4 heads of query on 3 of key"),
        (dict(key=normal(B, 3, M, D), value=normal(B, 3, M, D), enable_gqa=True), "4 heads of query on 3 of key"),
        (dict(key=normal(B, H, M, D, dtype=torch.float32)), "not of one floating-point dtype"),
        (dict(attn_mask=visible(B, 1, 1, M + 1)), "a mask that is not broadcast"),
        (dict(attn_mask=visible(M)), "a mask that is not broadcast"),
        (dict(attn_mask=torch.ones(B, 1, 1, M, dtype=torch.int64)), "a mask that is not bool"),
    ],
)
def test_broken_rules_are_pytorchs_to_name(change, reason):
    query, key, value = tensors()
    call = {**dict(query=query, key=key, value=value), **change}
    assert reason in room.unsupported_reason(**call)
    with pytest.raises((RuntimeError, IndexError)) as theirs:
        scaled_dot_product_attention(**call)
    with pytest.raises((RuntimeError, IndexError)) as ours:
        cross_attention(**call)
    assert str(ours.value) == str(theirs.value)


def test_what_is_hidden_does_not_matter():
    query, key, value = (t.detach() for t in tensors())
    mask = visible(B, 1, 1, M)
    expected = cross_attention(query, key, value, attn_mask=mask)
    for tensor in (key, value):
        tensor.masked_fill_(~mask.mT, float("nan"))
    assert torch.equal(cross_attention(query, key, value, attn_mask=mask), expected)


def test_it_compiles():
    given, mask = [t.detach() for t in tensors()], visible(B, 1, 1, M)
    compiled = torch.compile(cross_attention, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*given, mask), cross_attention(*given, mask))


def test_an_encoder_decoder_of_transformers(reads):
    """BART from a configuration: its decoder's attention to a short source, by the package's own registry."""
    transformers = pytest.importorskip("transformers")
    from memformer_kernels.integrations.transformers import register

    name = register()
    sizes = dict(d_model=32, vocab_size=50, max_position_embeddings=32, dropout=0.0, attention_dropout=0.0)
    sizes |= dict(encoder_layers=1, decoder_layers=2, encoder_attention_heads=4, decoder_attention_heads=4)
    sizes |= dict(encoder_ffn_dim=64, decoder_ffn_dim=64)
    model = transformers.BartModel(transformers.BartConfig(**sizes)).double()
    source, target = torch.randint(4, 50, (B, M)), torch.randint(4, 50, (B, L))
    source_mask = (visible(B, M) | (torch.arange(M) == 0)).long()

    def results(implementation, mask):
        model.set_attn_implementation(implementation)
        model.zero_grad()
        output = model(input_ids=source, decoder_input_ids=target, attention_mask=mask).last_hidden_state
        output.pow(3).sum().backward()
        return output.detach(), *(p.grad for p in model.parameters())

    for given in (None, source_mask):
        for ours, theirs in zip(results(name, given), results("sdpa", given), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)
    # in the encoder's layer and in both of the decoder's, without a mask and with one
    assert [options["slot_mask"] is not None for _, options in reads] == [False] * 3 + [True] * 3
