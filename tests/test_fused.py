"""The fused pieces of a layer, in the Triton interpreter, and where their gradients go."""

import layouts
import pytest
import torch
from torch import nn

from memformer_kernels import launch
from memformer_kernels.gradient_sink import open_sink
from memformer_kernels.layers import fused

pytest.importorskip("triton")
functions = fused.functions

SHAPES = [(1, 1), (3, 5), (17, 24), (70, 64), (5, 1100)]
F32, F16 = torch.float32, torch.float16
TOLERANCE = {F32: 4e-6, F16: 4e-3}


@pytest.fixture(params=[F32, F16], ids=["float32", "float16"])
def dtype(request):
    return request.param


def _pieces(width, dtype, bias=True):
    norm, f = nn.LayerNorm(width), nn.Linear(width, 12, bias=bias)
    nn.init.normal_(norm.weight, 1.0, 0.3)
    nn.init.normal_(norm.bias)
    return norm.to(dtype), f.to(dtype)


def _gradients(outputs, inputs):
    grads = [torch.randn(o.shape, generator=torch.Generator().manual_seed(i)).to(o) for i, o in enumerate(outputs)]
    return torch.autograd.grad(outputs, inputs, grads)


def _assert_close(found, expected, dtype):
    for a, b in zip(found, expected, strict=True):
        assert a.shape == b.shape
        assert (a.double() - b).abs().max() <= TOLERANCE[dtype] * max(b.abs().max().item(), 1e-3)


def _double(*tensors):
    return [None if t is None else t.detach().double().requires_grad_() for t in tensors]


@pytest.mark.parametrize("keep", [False, True], ids=["recomputed", "kept"])
@pytest.mark.parametrize("branched", [False, True], ids=["no branch", "branch"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_residual_norm_linear(shape, branched, keep, dtype):
    norm, f = _pieces(shape[1], dtype)
    x = torch.randn(shape, dtype=dtype).requires_grad_()
    branch = torch.randn(shape, dtype=dtype).requires_grad_() if branched else None
    parameters = (norm.weight, norm.bias, f.weight, f.bias)
    inputs = [t for t in (x, branch, *parameters) if t is not None]
    apply = functions.ResidualNormLinear.apply
    outputs = apply(x, branch, norm.weight, norm.bias, norm.eps, f.weight, f.bias, dtype, keep)

    x64, branch64, *p64 = _double(x, branch, *parameters)
    total = x64 if branch is None else x64 + branch64
    _assert_close(outputs[:1], [total], dtype)
    if branched and dtype == F16:  # the sum is rounded where it is stored
        total = total + (outputs[0].double() - total).detach()
    normalised = nn.functional.layer_norm(total, (shape[1],), p64[0], p64[1], norm.eps)
    expected = total, nn.functional.linear(normalised, p64[2], p64[3])
    _assert_close(outputs, expected, dtype)
    inputs64 = [t for t in (x64, branch64, *p64) if t is not None]
    _assert_close(_gradients(outputs, inputs), _gradients(expected, inputs64), dtype)


def test_many_rows_share_a_program(monkeypatch):
    monkeypatch.setattr(functions.kernels, "MOST_PARTS", 8)
    launch.forget_plans()
    test_residual_norm((70, 24), F32)
    launch.forget_plans()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_residual_norm(shape, dtype):
    norm, _ = _pieces(shape[1], dtype)
    x, branch = (torch.randn(shape, dtype=dtype).requires_grad_() for _ in range(2))
    outputs = functions.ResidualNorm.apply(x, branch, norm.weight, norm.bias, norm.eps, dtype)
    x64, branch64, *p64 = _double(x, branch, norm.weight, norm.bias)
    total = x64 + branch64
    _assert_close(outputs[:1], [total], dtype)
    total = total + (outputs[0].double() - total).detach()
    expected = total, nn.functional.layer_norm(total, (shape[1],), *p64, norm.eps)
    _assert_close(outputs, expected, dtype)
    found = _gradients(outputs, (x, branch, norm.weight, norm.bias))
    _assert_close(found, _gradients(expected, (x64, branch64, *p64)), dtype)


def test_rows_of_small_variance_are_right():
    """Where eps decides, it stands beside the variance and not beside its root."""
    norm, _ = _pieces(24, F32)
    x = torch.randn(3, 24).mul(1e-3).requires_grad_()
    outputs = functions.ResidualNorm.apply(x, None, norm.weight, norm.bias, norm.eps, F32)
    x64, *p64 = _double(x, norm.weight, norm.bias)
    _assert_close(outputs[1:], [nn.functional.layer_norm(x64, (24,), *p64, norm.eps)], F32)


def test_what_is_normalised_is_what_is_stored():
    norm, _ = _pieces(24, F16)
    x, branch = torch.randn(2, 3, 24, dtype=F16).mul(1e-3)
    x += 8  # a sum is rounded to a 128th: most of what the rows differ by
    total, normalised = functions.ResidualNorm.apply(x, branch, norm.weight, norm.bias, norm.eps, F16)
    _, again = functions.ResidualNorm.apply(total, None, norm.weight, norm.bias, norm.eps, F16)
    assert torch.equal(normalised, again)


def test_gelu_of_float32_is_exact_far_below_zero():
    hidden = torch.linspace(-5, 0, 50)
    expected = nn.functional.gelu(hidden.double())
    # to the error function's absolute accuracy, which times h is what is left far below 0
    assert ((functions.kernels.gelu_forward(hidden) - expected).abs() <= 6e-8 * hidden.abs() + 1e-30).all()


def test_products_are_added_to_their_totals():
    grad, x = torch.randn(3, 5), torch.randn(3, 4)
    for dtype in (F32, torch.float64):
        total = torch.ones(5, 4, dtype=dtype)
        assert functions._product(grad, x, total) is None
        torch.testing.assert_close(total, 1 + (grad.t() @ x).to(dtype))


def test_a_loss_may_be_made_of_either_result():
    norm, f = _pieces(24, F32)
    x, branch = (torch.randn(6, 24).requires_grad_() for _ in range(2))
    given = x, branch, norm.weight, norm.bias, norm.eps
    for outputs, parameters in (
        (lambda: functions.ResidualNorm.apply(*given, F32), (x, branch, norm.weight)),
        (lambda: functions.ResidualNormLinear.apply(*given, f.weight, f.bias, F32, False), (x, branch, f.weight)),
    ):
        for one in (0, 1):
            used = parameters[: 2 + one]
            rest = outputs()[1 - one].detach()
            loss = outputs()[one].square().sum() + rest.sum()
            total = x + branch
            reference = total if one == 0 else nn.functional.layer_norm(total, (24,), norm.weight, norm.bias, norm.eps)
            reference = f(reference) if one == 1 and parameters[2] is f.weight else reference
            _assert_close(
                torch.autograd.grad(loss, used), _double(*torch.autograd.grad(reference.square().sum(), used)), F32
            )


@pytest.mark.parametrize("keep", [False, True], ids=["recomputed", "kept"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_gelu_linear(shape, keep, dtype):
    _, f = _pieces(shape[1], dtype)
    hidden = torch.randn(shape).mul(2).to(dtype).requires_grad_()
    outputs = [functions.GeluLinear.apply(hidden, f.weight, f.bias, keep)]
    hidden64, *p64 = _double(hidden, f.weight, f.bias)
    expected = [nn.functional.linear(nn.functional.gelu(hidden64), *p64)]
    _assert_close(outputs, expected, dtype)
    found = _gradients(outputs, (hidden, f.weight, f.bias))
    _assert_close(found, _gradients(expected, (hidden64, *p64)), dtype)


@pytest.mark.parametrize("causal", [True, False], ids=["causal", "whole"])
@pytest.mark.parametrize("length, heads, width", [(1, 1, 4), (5, 3, 24), (16, 2, 16), (33, 2, 64), (128, 1, 40)])
def test_self_attention_of_a_segment(length, heads, width, causal):
    torch.manual_seed(length)
    projected = torch.randn(2 * length, 3 * heads * width).mul(2).to(F16).requires_grad_()
    assert fused.segment_attention.fits(length, width, F16)
    outputs = [functions.SegmentAttention.apply(projected, length, heads, causal)]
    (projected64,) = _double(projected)
    query, key, value = projected64.view(2, length, 3, heads, width).permute(2, 0, 3, 1, 4)
    logits = query @ key.transpose(-1, -2) * width**-0.5
    if causal:
        logits = logits.masked_fill(torch.ones(length, length, dtype=torch.bool).triu(1), float("-inf"))
    expected = [(logits.softmax(-1) @ value).transpose(1, 2).reshape(2 * length, heads * width)]
    _assert_close(outputs, expected, F16)
    _assert_close(_gradients(outputs, [projected]), _gradients(expected, [projected64]), F16)


def test_which_segments_fit_one_tile():
    fits = fused.segment_attention.fits
    assert fits(128, 64, torch.bfloat16) and not fits(129, 64, F16) and not fits(64, 72, F16)
    assert not fits(0, 64, F16) and not fits(64, 64, F32)


@pytest.mark.parametrize("batch, length, vocabulary, width", [(1, 1, 1, 8), (3, 5, 24, 24), (2, 33, 257, 16)])
def test_embed(batch, length, vocabulary, width):
    torch.manual_seed(length)
    tokens = torch.randint(vocabulary, (length, batch)).t()
    tables = [torch.randn(n, width, dtype=F16).requires_grad_() for n in (vocabulary, length + 2)]
    embedded = functions.Embed.apply(tokens, *tables)
    assert torch.equal(embedded, (tables[0][tokens] + tables[1][:length]).flatten(0, 1))  # the bits of eager
    tables64 = _double(*tables)
    expected = (tables64[0][tokens] + tables64[1][:length]).flatten(0, 1)
    _assert_close(_gradients([embedded], tables), _gradients([expected], tables64), F16)


def test_embedded_gradients_are_added_to_their_totals():
    tokens = torch.tensor([[1, 3, 3], [0, 1, 3]])
    tables = [torch.randn(n, 8, dtype=F16).requires_grad_() for n in (8, 4)]

    class Sink:
        totals = {t: torch.ones(t.shape) for t in tables}

        def takes(self, parameter):
            return True

        def add(self, parameters, make):
            return make([self.totals[p] for p in parameters])

    with open_sink(Sink()):
        embedded = functions.Embed.apply(tokens, *tables)
        assert torch.autograd.grad(embedded.float().sum(), tables, allow_unused=True) == (None, None)
    words, places = Sink.totals.values()
    assert (words[:, 0] - 1).tolist() == [1, 2, 0, 3, 0, 0, 0, 0] and (places[:, 0] - 1).tolist() == [2, 2, 2, 0]


def test_an_embedding_alone_may_be_frozen():
    tokens = torch.tensor([[1, 0]])
    for frozen in (0, 1):
        tables = [torch.randn(4, 8, dtype=F16).requires_grad_(i != frozen) for i in range(2)]
        functions.Embed.apply(tokens, *tables).float().sum().backward()
        assert [t.grad is None for t in tables] == [i == frozen for i in range(2)]


@pytest.mark.parametrize("token", [-1, 8])
def test_nothing_outside_the_vocabulary_is_read(token):
    """A GPU stops at an assertion, which the interpreter does not look at."""
    tables = [torch.randn(8, 8, dtype=F16) for _ in range(2)]
    embedded = functions.Embed.apply(torch.tensor([[1, token]]), *tables)
    assert embedded[1].isnan().all() and torch.equal(embedded[0], tables[0][1] + tables[1][0])


def test_which_embeddings_are_fused(monkeypatch):
    monkeypatch.setattr(fused, "_fuses", lambda x: True)
    calls = []
    monkeypatch.setattr(
        functions.Embed, "apply", lambda tokens, words, _: calls.append(1) or words.new_zeros(6, words.shape[1])
    )
    tokens, positions = torch.zeros(2, 3, dtype=torch.int64), torch.zeros(2, 3, dtype=torch.int64)

    def embed(dtype=F16, words=8, positions=None, width=8):
        tables = (nn.Embedding(n, width, dtype=dtype) for n in (words, 4))
        assert fused.embed(tokens, *tables, positions).shape == (2, 3, width)
        return bool(calls) and bool(calls.pop())

    assert embed() and embed(words=1024, width=256)
    assert not (embed(words=1025, width=512) or embed(words=33) or embed(dtype=F32) or embed(positions=positions))
    tokens = tokens.to("meta")  # on another device than the tables
    assert not embed()


def test_an_embedding_of_nothing(monkeypatch):
    monkeypatch.setattr(fused, "_fuses", lambda x: True)
    tables = [nn.Embedding(n, 8, dtype=F16) for n in (8, 4)]
    for shape in ((0, 3), (2, 0)):
        embedded = fused.embed(torch.zeros(shape, dtype=torch.int64), *tables, None)
        assert embedded.shape == (*shape, 8)
        embedded.float().sum().backward()
        assert not any(table.weight.grad.any() for table in tables)


def test_linears(dtype):
    f, g = (_pieces(24, dtype, bias=False)[1] for _ in range(2))
    x = torch.randn(7, 24, dtype=dtype).requires_grad_()
    inputs = [x, f.weight, g.weight]
    outputs = functions.Linears.apply(*inputs, dtype)
    inputs64 = _double(*inputs)
    expected = [nn.functional.linear(inputs64[0], w) for w in inputs64[1:]]
    _assert_close(outputs, expected, dtype)
    _assert_close(_gradients(outputs, inputs), _gradients(expected, inputs64), dtype)


def test_linears_under_autocast_in_the_backward():
    f, g = (_pieces(24, F32, bias=False)[1] for _ in range(2))
    x = torch.randn(7, 24).requires_grad_()
    outputs = functions.Linears.apply(x, f.weight, g.weight, F32)
    with torch.autocast("cpu", torch.bfloat16):
        grads = torch.autograd.grad(outputs, (x, f.weight), [torch.ones(7, 12)] * 2)
    assert [grad.dtype for grad in grads] == [F32, F32]


def test_linears_share_a_weight_in_their_order():
    """A gradient of one product is added to a total, and then that of the other."""
    _, f = _pieces(24, F16, bias=False)
    x = torch.randn(7, 24, dtype=F16)
    outputs = functions.Linears.apply(x, f.weight, f.weight, F16)
    (found,) = _gradients(outputs, [f.weight])
    (expected,) = _gradients([nn.functional.linear(x, f.weight)] * 2, [f.weight])
    _assert_close([found], [expected.double()], F16)


@pytest.mark.parametrize("bias", [True, False])
def test_linear(bias, dtype):
    _, f = _pieces(24, dtype, bias=bias)
    x = torch.randn(7, 24, dtype=dtype).requires_grad_()
    inputs = [t for t in (x, f.weight, f.bias) if t is not None]
    outputs = [functions.Linear.apply(x, f.weight, f.bias, dtype)]
    inputs64 = _double(*inputs)
    expected = [nn.functional.linear(*inputs64)]
    _assert_close(outputs, expected, dtype)
    _assert_close(_gradients(outputs, inputs), _gradients(expected, inputs64), dtype)


def test_a_row_has_the_same_bits_in_any_batch():
    norm, _ = _pieces(64, F32)
    x, branch, grad = (torch.randn(9, 64) for _ in range(3))

    def run(rows):
        leaf = x[rows].clone().requires_grad_()
        total, y = functions.ResidualNorm.apply(leaf, branch[rows], norm.weight, norm.bias, norm.eps, F32)
        return total, y, *torch.autograd.grad(y, leaf, grad[rows])

    whole = run(slice(None))
    for part in (slice(0, 1), slice(3, 7), slice(8, 9)):
        assert all(torch.equal(w[part], p) for w, p in zip(whole, run(part), strict=True))


def test_strided_inputs_and_gradients():
    norm, f = _pieces(24, F32)
    base = torch.randn(24, 6)
    x = base.t().requires_grad_()
    given = norm.weight, norm.bias, norm.eps, f.weight, f.bias, F32, False
    total, y = functions.ResidualNormLinear.apply(x, None, *given)
    grads = torch.autograd.grad((total, y), x, (torch.ones(24, 6).t(), torch.ones(()).expand(6, 12)))
    contiguous = x.detach().contiguous().requires_grad_()
    outputs = functions.ResidualNormLinear.apply(contiguous, None, *given)
    expected = torch.autograd.grad(outputs, contiguous, (torch.ones(6, 24), torch.ones(6, 12)))
    assert torch.equal(grads[0], expected[0])


@pytest.mark.parametrize("piece", ["embed", "gelu_linear", "residual_norm", "self_attention"])
def test_saved_tensors_come_back_in_another_layout(piece):
    norm, f = _pieces(24, F32)
    x, words, places = (torch.randn(n, 24).requires_grad_() for n in (6, 8, 3))
    tokens = torch.randint(8, (2, 3))
    apply = {
        "embed": lambda: functions.Embed.apply(tokens, words, places),
        "gelu_linear": lambda: functions.GeluLinear.apply(x, f.weight, f.bias, False),
        "residual_norm": lambda: functions.ResidualNorm.apply(x, None, norm.weight, norm.bias, norm.eps, F32)[1],
        "self_attention": lambda: functions.SegmentAttention.apply(x, 3, 2, True),
    }[piece]
    leaves = (words, places) if piece == "embed" else (x,)
    expected = _gradients([apply()], leaves)
    with torch.autograd.graph.saved_tensors_hooks(layouts.gaps, lambda tensor: tensor):
        found = _gradients([apply()], leaves)
    torch.testing.assert_close(found, expected)


def test_second_derivatives_are_refused():
    _, f = _pieces(5, F32)
    x = torch.randn(2, 5).requires_grad_()
    with pytest.raises(NotImplementedError, match="linear: the fused backward has no derivative"):
        torch.autograd.grad(functions.Linear.apply(x, f.weight, f.bias, F32).sum(), x, create_graph=True)


def test_an_open_sink_takes_the_gradients_of_its_parameters_and_no_others():
    norm, f = _pieces(8, F16)
    x = torch.randn(6, 8, dtype=F16).requires_grad_()
    parameters = norm.weight, norm.bias, f.weight, f.bias

    def outputs():
        given = norm.weight, norm.bias, norm.eps, f.weight, f.bias, F16, False
        return functions.ResidualNormLinear.apply(x, None, *given)[1].float().sum()

    expected = dict(zip(parameters, torch.autograd.grad(outputs(), parameters), strict=True))

    class Sink:
        totals = {p: torch.zeros_like(p, dtype=F32) for p in parameters[:3]}

        def takes(self, parameter):
            return parameter in self.totals

        def add(self, parameters, make):
            return make([self.totals.get(p) for p in parameters])

    sink = Sink()
    for _ in range(2):
        with open_sink(sink):
            found = torch.autograd.grad(outputs(), (x, *parameters), allow_unused=True)
        assert [g is None for g in found] == [False, True, True, True, False]
        assert torch.equal(found[4], expected[f.bias])
    for parameter, total in sink.totals.items():
        assert torch.equal((total / 2).to(F16), expected[parameter])  # added up before it is rounded
    assert torch.autograd.grad(outputs(), f.weight)[0] is not None  # the sink is closed


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("rows", [0, 3, 300, 5000])
def test_column_sums(rows, count):
    x = torch.randn(rows, count, 20)
    new = functions.kernels.column_sums(x, *[None] * count)
    totals = [torch.full((20,), 2.0) for _ in range(count)]
    assert functions.kernels.column_sums(x, *totals) == (None,) * count
    strided = functions.kernels.column_sums(torch.cat((x, x), -1)[..., :20], *[None] * count)
    for i in range(count):
        expected = x[:, i].double().sum(0)
        for found in (new[i], totals[i] - 2, strided[i]):
            assert (found - expected).abs().max() <= 1e-4


def test_gelu_over_all_of_float16():
    """Within a rounding of the exact function, and what the backward makes again has the forward's bits."""
    hidden = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(F16)
    hidden = hidden[hidden.isfinite()]
    activated = functions.kernels.gelu_forward(hidden)
    grad, again = functions.kernels.gelu_backward(torch.ones_like(hidden), hidden, True)
    assert torch.equal(activated, again)
    x = hidden.double()
    below = 0.5 * torch.erfc(-x * 0.5**0.5)
    derivative = below + x * torch.exp(-0.5 * x * x) / (2 * torch.pi) ** 0.5
    for found, expected in ((activated, x * below), (grad, derivative)):
        assert ((found.double() - expected).abs() <= 2**-11 * expected.abs() * 1.01 + 6e-7).all()
