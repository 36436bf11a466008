"""Models of the package `memformer` on the operations of this one: the same results, undone without a trace."""

import copy
import functools
import importlib.metadata
import io
import pickle

import pytest
import torch
from torch import nn
from torch.nn.functional import scaled_dot_product_attention
from torch.nn.utils import parametrize

import memformer_kernels
from memformer_kernels import accelerate, restore
from memformer_kernels.integrations.memformer import memory_replay_backprop, segment_cell
from memformer_kernels.integrations.report import Accelerated
from memformer_kernels.replay import CapturedCell

memformer = pytest.importorskip("memformer")
theirs = pytest.importorskip("memformer.memformer")
SIZES = dict(dim=24, num_memory_slots=5, mem_update_attn_heads=3, enc_num_tokens=40, enc_depth=2, enc_heads=4)
SIZES |= dict(enc_max_seq_len=8, dec_num_tokens=40, dec_depth=2, dec_heads=2, dec_max_seq_len=16)
ALL_FIXES = ("generate", "relative_position", "target_mask")


def make(kind=theirs.Memformer, dropout=0.0, **options):
    torch.manual_seed(0)
    model = kind(**{**SIZES, **options}).double()
    if dropout:  # the package has none; people put it in
        for module in model.modules():
            if isinstance(module, theirs.FeedForward):
                module.net.append(nn.Dropout(dropout))
    return model


@pytest.fixture
def calls(monkeypatch):
    """How often each op is called by an accelerated model."""
    counts = {}
    for name, place in (("memory_write", "memformer.modules"), ("memory_read", "attention")):
        place = importlib.import_module(f"memformer_kernels.integrations.{place}")
        monkeypatch.setattr(place, name, counting(getattr(place, name), counts))
    return counts


def counting(function, counts):
    @functools.wraps(function)
    def call(*arguments, **options):
        counts[function.__name__] = counts.get(function.__name__, 0) + 1
        return function(*arguments, **options)

    return call


def inputs(masks, batch=3, tokens=8, targets=7):
    torch.manual_seed(1)
    given = dict(src=torch.randint(40, (batch, tokens)), tgt=torch.randint(40, (batch, targets)))
    if masks:
        given["src_mask"] = torch.rand(batch, tokens) > 0.4
        given["tgt_mask"] = torch.rand(batch, targets) > 0.3
        given["src_mask"][1] = masks != "blind row"
    return given


def outputs_and_grads(model, **given):
    """Every tensor that a loss of everything the model returns gives, two segments long."""
    model.zero_grad()
    torch.manual_seed(2)
    mems = torch.randn(len(given["src"]), SIZES["num_memory_slots"], SIZES["dim"], dtype=torch.float64)
    mems.requires_grad_()
    first = model(**given, mems=mems)
    second = model(given["src"], mems=first.mem, src_mask=given.get("src_mask"))
    made = [*first, *second]
    sum((one * torch.randn_like(one)).sum() for one in made).backward()
    return {
        **{f"output {i}": one.detach() for i, one in enumerate(made)},
        **{name: parameter.grad for name, parameter in model.named_parameters()},
        "mems": mems.grad,
    }


def assert_close(found, expected, tolerance=1e-10):
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert (found[name] is None) == (tensor is None), name
        if tensor is not None:
            scale = max(1.0, tensor.abs().max().item())
            assert found[name].shape == tensor.shape and found[name].dtype == tensor.dtype, name
            assert (found[name] - tensor).abs().max() <= tolerance * scale, name


@pytest.mark.parametrize("updates", [1, 3])
@pytest.mark.parametrize("encoder_only", [False, True])
@pytest.mark.parametrize("masks", [None, "masks", "blind row"])
def test_outputs_and_gradients_are_the_models_own(masks, encoder_only, updates, calls):
    model, given = make(encoder_only=encoder_only, num_mem_updates=updates), inputs(masks)
    expected = outputs_and_grads(model, **given)
    accelerate(model)
    assert_close(outputs_and_grads(model, **given), expected)
    # two segments; the decoder of two layers ran in one
    assert calls == {"memory_read": 2 * 2 + (0 if encoder_only else 2), "memory_write": 2 * updates}


def test_more_slots_than_memory_read_is_good_for(calls):
    model, given = make(num_memory_slots=5 * 30), inputs("masks")
    expected = [t.detach() for t in model(**given)]
    accelerate(model)
    assert_close(dict(enumerate(t.detach() for t in model(**given))), dict(enumerate(expected)))
    assert calls == {"memory_read": 2, "memory_write": 1}  # the decoder's reads have 8 keys


def test_more_hidden_tokens_than_memory_read_is_good_for(calls, monkeypatch):
    def strict(*tensors, attn_mask, **options):
        """Some kernels make NaN of a query that sees no key."""
        assert attn_mask.any(-1).all()
        return scaled_dot_product_attention(*tensors, attn_mask=attn_mask, **options)

    monkeypatch.setattr("memformer_kernels.integrations.attention.scaled_dot_product_attention", strict)
    model, given = make(), inputs("blind row", tokens=130)
    expected = outputs_and_grads(model, **given)
    accelerate(model)
    assert_close(outputs_and_grads(model, **given), expected)
    assert calls == {"memory_read": 4, "memory_write": 2}  # the encoder's


def test_the_model_begins_with_its_own_memory():
    model, given = make(), inputs(None)
    expected = [t.detach() for t in model(**given)]
    accelerate(model)
    assert_close(dict(enumerate(t.detach() for t in model(**given))), dict(enumerate(expected)))


@pytest.mark.parametrize(
    "call",
    [
        dict(context=None),
        dict(context=None, query_mask=torch.arange(4) < 3),
        dict(pos_emb=lambda n, m: torch.arange(n * m, dtype=torch.float64).view(1, n, m)),
        dict(mask=torch.ones(4, 5, dtype=torch.bool).tril()),
        dict(attend_self=True),
        dict(kv_mask=torch.arange(5) > 1),
    ],
    ids=" ".join,
)
def test_attention_in_a_model_of_ones_own(call):
    """Whatever the package's attention can be called with, the accelerated one can."""
    attention = theirs.Attention(24, heads=3).double()
    x, context = (torch.randn(2, n, 24, dtype=torch.float64) for n in (4, 5))
    call = {"context": context} | {n: t.expand(2, *t.shape) if n.endswith("mask") else t for n, t in call.items()}
    expected = attention(x, **call)
    assert len(accelerate(attention).replaced) == 1
    torch.testing.assert_close(attention(x, **call), expected, rtol=1e-12, atol=1e-12)


def test_a_segment_without_a_target_has_a_loss_of_zero():
    """On which people call backward, as the package's replay does."""
    model, src = make(), inputs(None)["src"]
    for _ in range(2):
        loss = model(src).dec_out
        assert loss == 0 and loss.requires_grad and loss.is_leaf and loss.dtype == torch.float32
        accelerate(model)


def test_autocast():
    model, given = make().float(), inputs("masks")

    def results():
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return {str(i): t.detach().double() for i, t in enumerate(model(**given))}

    expected = results()
    accelerate(model)
    assert_close(results(), expected, 0.05)


def test_it_compiles():
    model, given = make(enc_depth=1, dec_depth=1), inputs("masks")
    accelerate(model)
    expected = model(**given)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)(**given)
    for ours, theirs in zip(compiled, expected, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_restored_there_is_no_trace():
    model = make()
    before = trace(model)
    report = accelerate(model, fix=ALL_FIXES)
    assert trace(model) != before
    report.restore()
    assert trace(model) == before
    accelerate(model)
    restore(model)
    restore(model)
    assert trace(model) == before


def trace(model):
    """Everything that a module is: its class and what it holds, by identity."""

    def held(module):
        things = {**module.__dict__, **module._parameters, **module._modules}
        return {n: id(t) if isinstance(t, nn.Module | torch.Tensor) else repr(t) for n, t in things.items()}

    return {path: (type(module), held(module)) for path, module in model.named_modules()}


def test_twice_is_once():
    model = make()
    accelerate(model)
    once = trace(model)
    again = accelerate(model)
    assert trace(model) == once and len(again.replaced) == 6
    assert len(accelerate(model, fix=ALL_FIXES).replaced) == 10
    assert len(accelerate(model).replaced) == 6 and trace(model) == once  # and without the fixes again
    again.restore()
    assert not any(isinstance(m, Accelerated) for m in model.modules())


def test_the_state_dict_stays_and_loads_both_ways():
    model, other = make(), make()
    before = model.state_dict(keep_vars=True)
    accelerate(model, fix=ALL_FIXES)
    after = model.state_dict(keep_vars=True)
    assert list(after) == list(before) and all(after[name] is before[name] for name in before)
    model.load_state_dict(other.state_dict(), strict=True)
    other.load_state_dict(model.state_dict(), strict=True)


def test_no_other_instance_and_no_class_is_touched():
    forwards = {c: dict(vars(c)) for c in (theirs.Attention, theirs.Memformer, theirs.RelativePositionBias)}
    model, other = make(), make()
    before = trace(other)
    accelerate(model, fix=ALL_FIXES)
    assert trace(other) == before
    assert all(dict(vars(c)) == held for c, held in forwards.items())


def by_deepcopy(model):
    return copy.deepcopy(model)


def by_pickle(model):
    return pickle.loads(pickle.dumps(model))


def by_torch_save(model):
    file = io.BytesIO()
    torch.save(model, file)
    return torch.load(io.BytesIO(file.getvalue()), weights_only=False)


@pytest.mark.parametrize("copied", [by_deepcopy, by_pickle, by_torch_save])
def test_a_copy_is_accelerated_and_can_be_restored(copied, calls):
    model, given = make(), inputs("masks")
    expected = outputs_and_grads(model, **given)
    accelerate(model)
    twin = copied(model)
    assert_close(outputs_and_grads(twin, **given), expected)
    assert calls["memory_write"] == 2
    restore(twin)
    assert type(twin) is theirs.Memformer and isinstance(model, Accelerated)
    assert_close(outputs_and_grads(twin, **given), expected)
    assert calls["memory_write"] == 2


def test_modes_and_dtypes():
    model = make(dropout=0.5)
    accelerate(model)
    given = inputs(None)
    assert not model.eval().mem_updater.training
    assert torch.equal(model(**given).mem, model(**given).mem)
    assert not torch.equal(model.train()(**given).mem, model(**given).mem)
    assert model.to(torch.float32)(**given).mem.dtype == torch.float32


def test_hooks_run():
    model, seen = make(), []
    for module in (model, model.mem_updater, model.encoder.layer_blocks.layers[0][1].fn.fn, model.mem_updater.to_out):
        module.register_forward_hook(lambda module, given, made: seen.append(module))
    accelerate(model)
    model(**inputs(None))
    assert len(seen) == 4 and model.mem_updater in seen


class Own(theirs.Memformer):
    pass


class OwnAttention(theirs.Attention):
    pass


def as_subclass(module, kind):
    module.__class__ = kind


def with_own_forward(module, kind):
    module.forward = functools.partial(type(module).forward, module)


@pytest.mark.parametrize("changed", [as_subclass, with_own_forward])
@pytest.mark.parametrize(("path", "kind"), [("", Own), ("mem_updater", OwnAttention)])
def test_a_model_with_code_of_its_own_keeps_its_forward(path, kind, changed):
    """The model and what updates its memory: both or neither."""
    model = make()
    changed(model.get_submodule(path), kind)
    read = model.encoder.layer_blocks.layers[0][1].fn.fn
    changed(read, OwnAttention)
    expected = outputs_and_grads(model, **inputs("masks"))
    report = accelerate(model)
    assert not isinstance(model, Accelerated) and not isinstance(model.mem_updater, Accelerated)
    assert not isinstance(read, Accelerated)
    own = {entry.path for entry in report.left if "code of its own" in entry.reason}
    assert own == {"", "mem_updater", "encoder.layer_blocks.layers.0.1.fn.fn"}
    assert len(report.replaced) == 3  # the other reads
    assert_close(outputs_and_grads(model, **inputs("masks")), expected)


def test_what_changed_the_class_again_has_to_go_first():
    model = make()
    accelerate(model)
    before = trace(model.encoder)
    parametrize.register_parametrization(model, "memory_slots", nn.Identity())
    for undo in (restore, accelerate):
        with pytest.raises(RuntimeError, match="restore: model must have the classes of accelerate, got Parametrized"):
            undo(model)
    assert trace(model.encoder) == before
    parametrize.remove_parametrizations(model, "memory_slots")
    restore(model)
    assert type(model) is theirs.Memformer


def test_a_model_with_only_a_cell_of_the_same_kind():
    assert str(accelerate(nn.Sequential(nn.GRUCell(2, 2)))).endswith("nothing in it is of a package that is known")


def test_another_version_is_left(monkeypatch):
    monkeypatch.setattr(importlib.metadata, "version", lambda package: "0.4.0")
    model = make()
    report = accelerate(model)
    assert not report.replaced and "memformer 0.4.0: only 0.3.1 is known" in str(report)
    assert type(model) is theirs.Memformer


def test_it_is_found_inside_another_model():
    whole = nn.ModuleDict({"reader": make(), "head": nn.Linear(24, 2)})
    assert "reader.mem_updater" in {e.path for e in accelerate(whole).replaced}


def test_a_model_of_no_known_package():
    model = nn.Linear(2, 3)
    report = accelerate(model)
    assert str(report) == (
        "accelerate: of Linear, 0 modules replaced, 0 left\nnothing in it is of a package that is known"
    )


def test_the_report_says_what_and_why():
    text = str(accelerate(make()))
    assert text.startswith("accelerate: of Memformer, 6 modules replaced, 14 left\n")
    for line in (
        "replaced: attention to another sequence runs cross_attention: memory_read up to 128 keys, else PyTorch's own",
        "    2 Attention  encoder.layer_blocks.layers.*.1.fn.fn",
        "    1 Attention  mem_updater",
        "left: self-attention with a bias for every query and key, which no operation here takes",
        "    2 Attention  decoder.net.layer_blocks.layers.*.0.fn.fn",
    ):
        assert line in text.splitlines()
    assert all(f'fix=("{name}",)' in text for name in ALL_FIXES)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: accelerate(3), TypeError, r"accelerate: model must be a torch\.nn\.Module, got int"),
        (lambda: accelerate(make(), fix="generate"), TypeError, "accelerate: fix must be several names"),
        (lambda: accelerate(make(), fix=("spelling",)), ValueError, "hold some of generate, .*, got spelling"),
    ],
)
def test_what_is_refused(call, error, message):
    with pytest.raises(error, match=message):
        call()


# Bugs of the package, each shown, and corrected on request.


def test_fix_relative_position():
    model = make()
    encoder, decoder = model.encoder.layer_blocks.rel_pos_emb, model.decoder.net.layer_blocks.rel_pos_emb

    def past_and_future(bias):
        bias = bias(200, 200)[0, 0]
        return len(bias[-1].unique()), len(bias[0].unique())

    assert past_and_future(encoder) == (32, 1)  # all that stands ahead is one, where attention looks ahead
    assert past_and_future(decoder) == (16, 16)  # half of the table for what a causal mask hides
    accelerate(model, fix=("relative_position",))
    assert past_and_future(encoder) == (16, 16)
    assert past_and_future(decoder) == (32, 1)


def test_fix_target_mask():
    model, given = make(), inputs("masks")
    mask = given.pop("tgt_mask")

    def loss(mask):
        return model(**given, tgt_mask=mask).dec_out.item()

    with_mask, without = loss(mask), loss(None)
    assert with_mask != without and loss(mask[:, :-1]) == without  # dropped without a word
    accelerate(model, fix=("target_mask",))
    assert loss(mask[:, :-1]) == pytest.approx(with_mask, rel=1e-12)
    assert loss(mask) == pytest.approx(with_mask, rel=1e-12)
    assert loss(None) == pytest.approx(without, rel=1e-12)


def test_fix_generate():
    model = make()
    start, context = torch.zeros(2, 1, dtype=torch.long), torch.randn(2, 8, 24, dtype=torch.float64)
    with pytest.raises(TypeError, match="input_mask"):
        model.decoder.generate(start, 5, context=context)
    accelerate(model, fix=("generate",))
    assert model.decoder.generate(start, 5, context=context).shape == (2, 5)


# Memory replay.


def document(segments=4, last=5, batch=3):
    torch.manual_seed(3)
    tokens = (segments - 1) * SIZES["enc_max_seq_len"] + last
    given = dict(src=torch.randint(40, (batch, tokens)), tgt=torch.randint(40, (batch, 7)))
    return {**given, "src_mask": torch.rand(batch, tokens) > 0.3, "tgt_mask": torch.rand(batch, 7) > 0.3}


def bptt(model, src, tgt, src_mask, tgt_mask, loss=None):
    """Gradients of back-propagation through all segments; `tgt` of the last one, or a list of all."""
    model.zero_grad()
    sources, masks = (t.split(SIZES["enc_max_seq_len"], 1) for t in (src, src_mask))
    if not isinstance(tgt, list):
        tgt, tgt_mask = [None] * (len(sources) - 1) + [tgt], [None] * (len(sources) - 1) + [tgt_mask]
    mems, losses = None, []
    for one, mask, target, target_mask in zip(sources, masks, tgt, tgt_mask, strict=True):
        results = model(one, target, mems=mems, src_mask=mask, tgt_mask=target_mask)
        mems = results.mem
        if target is not None:
            losses.append(results.dec_out if loss is None else loss(results, target))
    sum(losses).backward()
    return gradients(model, loss=sum(losses).detach(), mems=mems.detach())


def gradients(model, **more):
    """Zeros and None are the same: the package makes zeros where nothing arrives."""
    grads = {n: torch.zeros_like(p) if p.grad is None else p.grad.clone() for n, p in model.named_parameters()}
    return {**grads, **more}


def replay(model, *arguments, **options):
    model.zero_grad()
    loss, mems = memory_replay_backprop(model, *arguments, **options)
    return gradients(model, loss=loss, mems=mems)


def norm_error(found, expected, names):
    a, b = (torch.cat([tensors[n].flatten() for n in names]) for tensors in (found, expected))
    return (a - b).norm() / b.norm()


@pytest.mark.parametrize("accelerated", [False, True])
@pytest.mark.parametrize("segments", [1, 4])
def test_replay_is_back_propagation_through_all_segments(segments, accelerated):
    model, given = make(num_mem_updates=2), document(segments)
    expected = bptt(model, **given)
    model.zero_grad()
    memformer.memory_replay_backprop(model, **given)
    assert_close({**expected, **gradients(model)}, expected)
    if accelerated:
        accelerate(model)
    assert_close(replay(model, **given), expected)


def test_with_dropout_theirs_is_wrong_and_ours_is_not():
    model, given = make(dropout=0.2), document()
    torch.manual_seed(5)
    expected = bptt(model, **given)
    torch.manual_seed(5)
    model.zero_grad()
    memformer.memory_replay_backprop(model, **given)
    found = gradients(model)
    assert norm_error(found, expected, found) > 0.02
    assert norm_error(found, expected, [n for n in found if n.startswith("mem_")]) > 0.3  # what writes the memory
    for _ in range(2):
        torch.manual_seed(5)
        assert_close(replay(model, **given), expected)
        accelerate(model)


def test_encoder_only_theirs_raises_and_ours_does_not():
    model, given = make(encoder_only=True), document()
    with pytest.raises(ValueError, match="not enough values to unpack"):
        memformer.memory_replay_backprop(model, **given)

    def loss(results, tgt):
        return (results.enc_out.mean(1) + results.mem.mean(1)).pow(2).sum() * tgt.sum()

    expected = bptt(model, **given, loss=loss)
    accelerate(model)
    assert_close(replay(model, **given, loss=loss), expected)


def test_a_loss_in_every_segment():
    model, given = make(), document()
    tgt, mask = given.pop("tgt"), given.pop("tgt_mask")
    targets = dict(tgt=[tgt, None, tgt + 0, tgt.flip(1)], tgt_mask=[mask, None, None, mask])
    expected = bptt(model, **given, **targets)
    accelerate(model)
    assert_close(replay(model, **given, **targets, every_segment=True), expected)
    targets["tgt_mask"] = None
    replay(model, **given, **targets, every_segment=True)


def test_a_memory_to_begin_with_gets_its_gradient():
    model, given = make(), document()
    mems = torch.randn(3, 5, 24, dtype=torch.float64, requires_grad=True)
    replay(model, **given, mems=mems)
    assert mems.grad.abs().sum() > 0 and model.memory_slots.grad is None


def test_replay_of_a_captured_cell():
    model, given = make(), document(last=8)
    expected = bptt(model, **given)
    accelerate(model)
    counts = {}
    cell = counting(segment_cell(model), counts)
    cell = CapturedCell(cell, always=True)  # the recorded passes, on a CPU without a graph
    for _ in range(2):
        assert_close(replay(model, **given, cell=cell), expected)
    assert counts["cell"] > 8


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(tgt=None), "tgt must hold a target for a segment"),
        (dict(every_segment=True, tgt=[0, 0]), "tgt must have 4 segments, as src, got 2"),
        (dict(src_mask=torch.ones(3, 8, dtype=torch.bool)), "src_mask must have 4 segments, as src, got 1"),
    ],
)
def test_what_replay_refuses(change, message):
    with pytest.raises(ValueError, match=message):
        memory_replay_backprop(make(), **{**document(), **change})


def test_replay_of_an_encoder_alone_needs_a_loss():
    with pytest.raises(ValueError, match="loss must be given for a model without a decoder"):
        memory_replay_backprop(make(encoder_only=True), **document())


def test_names_are_public():
    assert {"accelerate", "cross_attention", "restore"} <= set(memformer_kernels.__all__)
