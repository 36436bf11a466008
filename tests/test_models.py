import copy
import dataclasses
import json
import math

import pytest
import torch
from torch.nn.functional import cross_entropy

from memformer_kernels import PRESETS, Memformer, MemformerConfig, MemformerLM, MemformerLMConfig, generate
from memformer_kernels.state import StateFileError, files

SIZES = dict(vocabulary=11, width=16, heads=2, hidden=24, slots=3, segment_length=5)
B, L = 2, SIZES["segment_length"]


def make_lm(**options):
    return MemformerLM(MemformerLMConfig(**{**SIZES, "layers": 2, **options})).double().eval()


def make_memformer(**options):
    options = {**SIZES, "encoder_layers": 2, "decoder_layers": 2, **options}
    return Memformer(MemformerConfig(**options)).double().eval()


@pytest.fixture
def lm():
    return make_lm()


@pytest.fixture
def memformer():
    return make_memformer()


@pytest.fixture(params=[make_lm, make_memformer], ids=["MemformerLM", "Memformer"])
def model(request):
    return request.param()


@pytest.fixture
def text():
    return torch.randint(11, (B, 3 * L + 2))


def close(a, b):
    torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-13)


def segments(text):
    return [text[:, start : start + L] for start in range(0, text.shape[1], L)]


# MemformerLM


def test_lm_logits_never_look_ahead_and_do_look_at_the_memory(lm, text, same_bits):
    tokens = text[:, :L]
    logits, memory = lm(tokens)
    changed = torch.cat([tokens[:, :3], (tokens[:, 3:] + 1) % 11], 1)
    assert same_bits(lm(changed)[0][:, :3], logits[:, :3])
    assert not torch.allclose(lm(tokens, memory)[0], logits)
    assert not torch.allclose(lm(changed)[1], memory)


def test_lm_starts_from_the_initial_memory_and_keeps_unit_norm(lm, text):
    tokens = text[:, :L]
    close(lm(tokens)[0], lm(tokens, lm.initial_memory(B))[0])
    memory = lm.initial_memory(B)
    for segment in segments(text):
        close(memory.norm(dim=-1), torch.ones(B, 3, dtype=torch.float64))
        memory = lm(segment, memory)[1]


@torch.no_grad()
@pytest.mark.parametrize("step", [1, 2, 5])
def test_lm_decoded_in_steps_equals_lm_at_once(lm, text, step):
    memory, at_once = lm.initial_memory(B), []
    for segment in segments(text):
        logits, after = lm(segment, memory)
        at_once.append(logits)
        memory = after if segment.shape[1] == L else memory  # an open segment is not written yet
    decoding, in_steps = lm.start(B), []
    for segment in segments(text):
        in_steps += [lm.extend(tokens, decoding) for tokens in segment.split(step, 1)]
    close(torch.cat(in_steps, 1), torch.cat(at_once, 1))
    close(decoding.memory, memory)


def test_lm_padded_on_the_right_equals_lm_unpadded(lm, text):
    mask = torch.zeros(B, L, dtype=torch.bool)
    mask[:, :3] = True
    logits, memory = lm(text[:, :L].masked_fill(~mask, 0), token_mask=mask)
    want_logits, want_memory = lm(text[:, :3])
    close(logits[:, :3], want_logits)
    close(memory, want_memory)


def test_lm_padded_on_the_left_equals_lm_unpadded(lm, text):
    mask = torch.zeros(B, L, dtype=torch.bool)
    mask[:, 2:] = True
    logits, memory = lm(text[:, :L].masked_fill(~mask, 0), token_mask=mask)
    want_logits, want_memory = lm(text[:, 2:L])
    close(logits[:, 2:], want_logits)
    close(memory, want_memory)


def test_rows_of_one_batch_may_have_different_lengths(lm, text):
    mask = torch.tensor([[True] * 2 + [False] * 3, [True] * 5])
    logits, memory = lm(text[:, :L], token_mask=mask)
    for row, length in enumerate((2, 5)):
        want_logits, want_memory = lm(text[row : row + 1, :length])
        close(logits[row : row + 1, :length], want_logits)
        close(memory[row : row + 1], want_memory)


def test_empty_segment_only_forgets(lm, text):
    logits, memory = lm(text[:, :0])
    assert logits.shape == (B, 0, 11)
    close(memory, lm.write(lm.initial_memory(B), torch.zeros(B, 0, 16, dtype=torch.float64)))
    hidden, padded = lm(text[:, :L], token_mask=torch.zeros(B, L, dtype=torch.bool))
    assert hidden.isfinite().all()
    close(padded, memory)


def test_lm_compiles_as_one_graph(lm, text):
    compiled = torch.compile(lm, fullgraph=True, backend="aot_eager")
    for got, want in zip(compiled(text[:, :L]), lm(text[:, :L]), strict=True):
        close(got, want)


# Memformer


def test_memformer_is_encode_then_decode(memformer, text):
    source, target = segments(text)[:2]
    mask = torch.tensor([[True] * 4 + [False], [True] * 5])
    start = memformer.initial_memory(B)
    states, memory = memformer.encode(source, start, token_mask=mask)
    got = memformer(source, target, source_mask=mask)
    close(got[0], memformer.decode(target, states, states_mask=mask))
    close(got[1], memory)
    close(memory, memformer.write(start, states, token_mask=mask))  # written once, from the last layer


def test_encoder_reads_the_memory_and_sees_the_whole_segment(memformer, text):
    source = text[:, :L]
    states, memory = memformer.encode(source, memformer.initial_memory(B))
    assert not torch.allclose(memformer.encode(source, memory)[0], states)
    changed = torch.cat([source[:, :4], (source[:, 4:] + 1) % 11], 1)
    assert not torch.allclose(memformer.encode(changed, memformer.initial_memory(B))[0][:, 0], states[:, 0])


def test_decoder_never_looks_ahead(memformer, text, same_bits):
    source, target = segments(text)[:2]
    logits = memformer(source, target)[0]
    changed = torch.cat([target[:, :3], (target[:, 3:] + 1) % 11], 1)
    assert same_bits(memformer(source, changed)[0][:, :3], logits[:, :3])


@torch.no_grad()
@pytest.mark.parametrize("step", [1, 2, 5])
def test_memformer_decoded_in_steps_equals_memformer_at_once(memformer, text, step):
    memory, states = memformer.initial_memory(B), torch.zeros(B, 0, 16, dtype=torch.float64)
    decoding = memformer.start(B)
    for segment in segments(text):
        in_steps = torch.cat([memformer.extend(tokens, decoding) for tokens in segment.split(step, 1)], 1)
        close(in_steps, memformer.decode(segment, states))
        if segment.shape[1] == L:
            states, memory = memformer.encode(segment, memory)
        close(decoding.memory, memory)


def test_padded_source_equals_unpadded_source(memformer, text):
    source, target = segments(text)[:2]
    mask = torch.zeros(B, L, dtype=torch.bool)
    mask[:, :3] = True
    for got, want in zip(memformer(source, target, source_mask=mask), memformer(source[:, :3], target), strict=True):
        close(got, want)


def test_source_of_padding_alone_stays_finite_with_its_gradients(memformer, text):
    source, target = segments(text)[:2]
    mask = torch.tensor([[True] * L, [False] * L])
    logits, memory = memformer(source, target, source_mask=mask)
    (logits.square().sum() + memory.sum()).backward()
    assert logits.isfinite().all() and memory.isfinite().all()
    assert all(p.grad.isfinite().all() for p in memformer.parameters() if p.grad is not None)
    close(memory[1:], memformer.encode(source[1:, :0], memformer.initial_memory(1))[1])


# Both


def test_loss_is_the_mean_over_the_labels_that_count(model, text):
    inputs, labels = segments(text)[:2]
    labels = labels.clone()
    labels[0, 1:] = -100
    segment = (inputs, labels) if isinstance(model, MemformerLM) else (inputs, segments(text)[2], labels)
    loss, memory = model.loss(segment, model.initial_memory(B))
    logits, want_memory = model(*segment[:-1])
    close(loss, cross_entropy(logits[labels != -100], labels[labels != -100]))
    close(memory, want_memory)


def test_segment_without_labels_has_loss_zero_and_no_gradient(model, text):
    inputs, labels = text[:, :L], torch.full((B, L), -100)
    segment = (inputs, labels) if isinstance(model, MemformerLM) else (inputs, inputs, labels)
    loss, _ = model.loss(segment, model.initial_memory(B))
    loss.backward()
    assert loss.item() == 0
    assert all(not p.grad.any() for p in model.parameters() if p.grad is not None)


def test_first_loss_is_that_of_a_guess(model, text):
    inputs = text[:, :L]
    segment = (inputs, inputs) if isinstance(model, MemformerLM) else (inputs, inputs, inputs)
    assert model.loss(segment, model.initial_memory(B))[0].item() == pytest.approx(math.log(11), rel=0.1)


def test_wrong_segments_are_refused(model, text):
    def call(tokens):
        return model(tokens) if isinstance(model, MemformerLM) else model(tokens, text[:, :L])

    name = type(model).__name__
    with pytest.raises(ValueError, match=f"{name}: tokens must hold at most segment_length = 5 a segment, got 6"):
        call(text[:, :6])
    rule = rf"{name}: tokens must be int64 or int32 \[B, L\]"
    with pytest.raises(ValueError, match=rf"{rule}, got torch.int64 \[17\]"):
        call(text[0])
    for dtype in (torch.float32, torch.uint8, torch.bool):
        with pytest.raises(ValueError, match=rf"{rule}, got {dtype} \[2, 5\]"):
            call(text[:, :L].to(dtype))


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_can_be_built(preset):
    config = PRESETS[preset]
    with torch.device("meta"):
        model = (MemformerLM if isinstance(config, MemformerLMConfig) else Memformer)(config)
    assert model.config is config and config.width % config.heads == 0


def test_backend_reaches_the_ops(text):
    tokens = text[:, :L]
    with pytest.raises(NotImplementedError, match="memory_read: backend 'cuda' cannot run this call"):
        make_lm(backend="cuda")(tokens)
    model = make_memformer(backend="cuda")
    with pytest.raises(NotImplementedError, match="memory_read: backend 'cuda' cannot run this call"):
        model(tokens, tokens)
    with pytest.raises(NotImplementedError, match="memory_write: backend 'cuda' cannot run this call"):
        model.write(model.initial_memory(B), torch.zeros(B, L, 16, dtype=torch.float64))


# Generation


@torch.no_grad()
def test_most_likely_tokens_are_those_of_the_model_at_once(lm, text):
    made, _ = generate(lm, text[:, :7], 10, temperature=0)
    whole = torch.cat([text[:, :7], made], 1)
    memory = lm.initial_memory(B)
    for start, segment in zip(range(0, whole.shape[1], L), segments(whole), strict=True):
        logits, memory = lm(segment, memory)
        for i in range(segment.shape[1]):
            if 7 <= start + i + 1 < whole.shape[1]:
                assert torch.equal(whole[:, start + i + 1], logits[:, i].argmax(-1))


@pytest.mark.parametrize("first", [1, 4, 9])
def test_generation_goes_on_across_calls(model, text, first):
    prompt = text[:, :8]
    at_once, _ = generate(model, prompt, 12, generator=torch.Generator().manual_seed(3))
    generator = torch.Generator().manual_seed(3)
    begun, decoding = generate(model, prompt, first, generator=generator)
    rest, _ = generate(model, begun[:, -1:], 12 - first, decoding=decoding, generator=generator)
    assert torch.equal(torch.cat([begun, rest], 1), at_once)


def test_prompt_may_be_read_before_anything_is_made(model, text):
    nothing, decoding = generate(model, text[:, :6], 0)
    assert nothing.shape == (B, 0)
    rest, _ = generate(model, text[:, 6:8], 4, decoding=decoding, temperature=0)
    assert torch.equal(rest, generate(model, text[:, :8], 4, temperature=0)[0])


def test_decoding_keeps_its_size(model, text):
    def size(kept):
        """Bytes of the tensors in `kept`, however deep."""
        if isinstance(kept, torch.Tensor):
            return kept.untyped_storage().nbytes()
        children = kept if isinstance(kept, (list, tuple)) else getattr(kept, "__dict__", {}).values()
        return sum(size(child) for child in children)

    _, decoding = generate(model, text[:, :L], 3)  # into the second segment
    early = size(decoding)
    assert early > 0
    _, decoding = generate(model, text[:, :1], 40, decoding=decoding)
    assert size(decoding) == early


def test_sampling_follows_temperature_and_top_k(lm, text):
    likely = generate(lm, text, 6, temperature=0)[0]
    assert torch.equal(generate(lm, text, 6, top_k=1)[0], likely)
    assert torch.equal(generate(lm, text, 6, temperature=1e-6)[0], likely)
    prompt = text[:1, :3].expand(400, -1)
    with torch.no_grad():
        probabilities = lm(prompt[:1])[0][0, -1].softmax(-1)
    drawn = generate(lm, prompt, 1, top_k=3, temperature=5.0)[0].flatten()
    assert set(drawn.tolist()) == set(probabilities.topk(3).indices.tolist())
    generators = [torch.Generator().manual_seed(seed) for seed in (1, 1, 2)]
    made = [generate(lm, text, 8, temperature=3.0, generator=generator)[0] for generator in generators]
    assert torch.equal(made[0], made[1]) and not torch.equal(made[0], made[2])


def test_generation_refuses_what_it_cannot_do(lm, text):
    for prompt in (text[:, :0], text[0]):
        with pytest.raises(ValueError, match=r"generate: prompt must be \[B, P\] with P >= 1, got \["):
            generate(lm, prompt, 3)
    for name, value, least in (
        ("length", -1, 0),
        ("temperature", -0.5, 0),
        ("temperature", math.nan, 0),
        ("top_k", 0, 1),
    ):
        with pytest.raises(ValueError, match=f"generate: {name} must be at least {least}, got {value}"):
            generate(lm, text, **{"length": 1, name: value})
    _, decoding = generate(lm, text, 1)
    with pytest.raises(ValueError, match="generate: decoding must be of this model"):
        generate(copy.deepcopy(lm), text, 1, decoding=decoding)
    with pytest.raises(ValueError, match="tokens must be integer"):
        generate(lm, text == 1, 1)
    made, _ = generate(lm, text, 4, temperature=0)
    assert torch.equal(generate(lm, text.to(torch.uint8), 4, temperature=0)[0], made) and made.dtype == torch.int64


# Saving and loading


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_saved_model_comes_back_bit_for_bit(model, tmp_path, dtype, same_bits):
    model = type(model)(dataclasses.replace(model.config, temperature=0.3, forgetting=False)).to(dtype)
    model.save_pretrained(tmp_path / "new" / "folder")
    loaded = type(model).from_pretrained(tmp_path / "new" / "folder")
    assert loaded.config == model.config
    assert same_bits(loaded.state_dict(), model.state_dict())


def test_a_model_of_several_dtypes_comes_back_bit_for_bit(model, tmp_path, same_bits):
    mixed = copy.deepcopy(model).bfloat16()
    next(mixed.children()).float()
    mixed.save_pretrained(tmp_path)
    assert len({p.dtype for p in mixed.parameters()}) == 2
    assert same_bits(type(model).from_pretrained(tmp_path).state_dict(), mixed.state_dict())


@pytest.fixture
def saved(tmp_path):
    MemformerLM(MemformerLMConfig(**SIZES, layers=1)).save_pretrained(tmp_path)
    return tmp_path


def test_missing_files_are_named(saved):
    (saved / "model.safetensors").unlink()
    with pytest.raises(StateFileError, match="model.safetensors: cannot be read: No such file"):
        MemformerLM.from_pretrained(saved)
    (saved / "config.json").unlink()
    with pytest.raises(StateFileError, match="config.json: cannot be read as a configuration: .*No such file"):
        MemformerLM.from_pretrained(saved)


def test_damaged_weights_are_not_loaded(saved):
    raw = bytearray((saved / "model.safetensors").read_bytes())
    raw[-1] ^= 1
    (saved / "model.safetensors").write_bytes(raw)
    with pytest.raises(StateFileError, match=r"model.safetensors: damaged: tensor '.*' does not match its SHA-256"):
        MemformerLM.from_pretrained(saved)


def test_foreign_weights_are_not_loaded(saved, tmp_path):
    files.save_tensors(saved / "model.safetensors", {"a": torch.ones(1)}, {"kind": "Memformer"})
    with pytest.raises(StateFileError, match="field 'kind' must be 'MemformerLM', got 'Memformer'"):
        MemformerLM.from_pretrained(saved)
    other = MemformerLM(MemformerLMConfig(**{**SIZES, "slots": 4}, layers=1))
    other.save_pretrained(tmp_path / "other")
    (tmp_path / "other" / "model.safetensors").rename(saved / "model.safetensors")
    with pytest.raises(StateFileError, match="tensor 'write.bias' must be|must be the configuration that the weights"):
        MemformerLM.from_pretrained(saved)


def test_foreign_configuration_is_refused(saved):
    path = saved / "config.json"
    fields = json.loads(path.read_text())
    for content, message in [
        ("{", "cannot be read as a configuration"),
        (b"\xff\xfe", "cannot be read as a configuration"),
        ("[1]", "field 'model' must"),
        (json.dumps({}), "field 'model' must"),
        (json.dumps({**fields, "model": "Memformer"}), "field 'model' must be 'MemformerLM', got 'Memformer'"),
        (json.dumps({**fields, "depth": 3}), "unknown field 'depth'; known are .*vocabulary"),
    ]:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        with pytest.raises(StateFileError, match=rf"config.json: .*{message}"):
            MemformerLM.from_pretrained(saved)


def test_no_flipped_bit_of_a_configuration_is_loaded(saved):
    path = saved / "config.json"
    good, unnoticed = path.read_bytes(), []
    for bit in range(8 * len(good)):
        bad = bytearray(good)
        bad[bit // 8] ^= 1 << bit % 8
        if json_value(bad) == json_value(good):
            continue  # only the white space differs
        path.write_bytes(bad)
        try:
            MemformerLM.from_pretrained(saved)
            unnoticed.append(bad[max(0, bit // 8 - 20) : bit // 8 + 10])
        except StateFileError:
            pass
    assert not unnoticed


def json_value(raw):
    try:
        return json.loads(raw)
    except ValueError:
        return None
