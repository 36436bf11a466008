"""Streams: their results depend on the text alone, and nothing in them grows or moves."""

import gc
import json
import math
import sys
from pathlib import Path

import pytest
import torch
from taped import TapedRecording

from memformer_kernels import Memformer, MemformerConfig, MemformerLM, MemformerLMConfig, generate, stream
from memformer_kernels.cli import byte_models, main
from memformer_kernels.cli import stream as cli_stream
from memformer_kernels.models import streaming
from memformer_kernels.recording import dependencies_of

SIZES = dict(width=16, heads=2, hidden=24, slots=3, segment_length=5)
B, L, V = 3, SIZES["segment_length"], 11


def make_lm(vocabulary=V, **options):
    return MemformerLM(MemformerLMConfig(vocabulary=vocabulary, layers=2, **SIZES, **options))


def make_memformer(vocabulary=V, **options):
    options = {"dropout": 0.0, **options}
    config = MemformerConfig(vocabulary=vocabulary, encoder_layers=2, decoder_layers=2, **SIZES, **options)
    return Memformer(config)


@pytest.fixture(params=[make_lm, make_memformer], ids=["MemformerLM", "Memformer"])
def model(request):
    return request.param().eval()


@pytest.fixture(params=[False, True], ids=["called", "recorded"])
def recorded(request, monkeypatch):
    if request.param:
        monkeypatch.setattr(streaming, "Recording", TapedRecording)
    return request.param


@pytest.fixture
def text():
    return torch.randint(V, (B, 6 * L + 2))


def close(a, b, **options):
    torch.testing.assert_close(a, b, **{"rtol": 1e-12, "atol": 1e-13, **options})


def pieces(tokens, seed):
    """Cut at random places, empty pieces too."""
    generator = torch.Generator().manual_seed(seed)
    cuts = torch.randint(tokens.shape[1] + 1, (6,), generator=generator).sort().values
    return tokens.tensor_split(cuts.tolist(), 1)


@torch.no_grad()
def at_once(model, tokens):
    """Logits of the token after each, and all memories, from the model's own forward over whole segments."""
    memory, states, logits, memories = model.initial_memory(len(tokens)), None, [], []
    for segment in tokens.split(L, 1):
        memories.append(memory)
        if isinstance(model, MemformerLM):
            made, memory = model(segment, memory)
        else:
            states = model.initial_memory(len(tokens)).new_zeros(len(tokens), 0, 16) if states is None else states
            made = model.decode(segment, states)
            states, memory = model.encode(segment, memory)
        logits.append(made)
    return torch.cat(logits, 1), memories


# Reading


def test_stream_equals_the_model_segment_by_segment(model, text, recorded):
    model = model.double()
    logits, memories = at_once(model, text)
    texts, again = stream(model, B), stream(model, B)
    close(texts.read(text, logits=True), logits)
    close(texts.memory, memories[-1])
    nats = again.read(text)
    close(nats[:, 0], torch.full((B,), math.log(V), dtype=torch.float64))
    close(nats[:, 1:], -logits[:, :-1].log_softmax(-1).gather(2, text[:, 1:, None])[..., 0])


@pytest.mark.parametrize("logits", [False, True], ids=["nats", "logits"])
def test_pieces_do_not_matter(model, text, logits, recorded, same_bits):
    whole = stream(model, B)
    want = whole.read(text, logits=logits)
    texts = stream(model, B)
    for seed in range(6):
        texts.reset()
        got = torch.cat([texts.read(piece, logits=logits) for piece in pieces(text, seed)], 1)
        assert same_bits(got, want)
        assert same_bits(texts.memory, whole.memory)


@pytest.mark.guarantee("G18")
def test_rows_do_not_see_one_another(model, text, recorded, same_bits):
    want = stream(model, B).read(text)
    other = (text + 1) % V
    other[1] = text[1]
    assert same_bits(stream(model, B).read(other)[1], want[1])


@pytest.mark.guarantee("G18")
@pytest.mark.parametrize("at", [0, 3, L, 2 * L + 1])
def test_reset_rows_begin_anew_and_the_others_go_on(model, text, at, recorded, same_bits):
    want = stream(model, B).read(text)
    texts = stream(model, B)
    first = texts.read(torch.cat([(text[:1, :at] + 1) % V, text[1:, :at]]))
    texts.reset([0])
    moved = torch.cat([text[:1, : text.shape[1] - at], text[1:, at:]])  # row 0 begins its text here
    second = torch.cat([texts.read(piece) for piece in pieces(moved, at)], 1)
    assert same_bits(second[0], want[0, : text.shape[1] - at])
    assert same_bits(torch.cat([first, second], 1)[1:], want[1:])


@pytest.mark.guarantee("G18")
def test_reset_leaves_nothing_of_a_text_that_went_wrong(model, text, recorded, same_bits):
    texts, fresh = model.start(B), model.start(B)
    for t in texts.state().values():
        assert not t.is_floating_point() or t.isfinite().all()
    for name, t in (state := texts.state()).items():
        if t.is_floating_point():
            state[name][1] = float("nan")
    texts.load_state(state)
    for token in text[:, : L - 2].split(1, 1):
        assert texts.extend(token)[1].isnan().all()
    texts.reset(torch.tensor([False, True, False]))
    assert same_bits(texts.read(text)[1], fresh.read(text)[1])
    texts.load_state(state)
    texts.extend(text[:, :1])
    texts.reset()
    fresh.reset()
    assert same_bits(texts.extend(text[:, :1]), fresh.extend(text[:, :1]))


@pytest.mark.guarantee("G17")
def test_state_comes_out_and_goes_in(model, text, recorded, same_bits):
    texts = stream(model, B)
    texts.read(text[:, :8])
    state = texts.state()
    want = texts.read(text[:, 8:])
    texts.load_state(state)
    assert same_bits(texts.read(text[:, 8:]), want)
    other = stream(model, B)
    other.read(text[:, :2])
    other.load_state(state)
    assert same_bits(other.read(text[:, 8:]), want)
    other.reset()
    other.load_state({name: t[[2, 0]] for name, t in state.items()}, rows=[0, 2])
    moved = torch.stack([text[2, 8:], text[1, : text.shape[1] - 8], text[0, 8:]])
    got = other.read(moved)
    assert same_bits(got[[0, 2]], want[[2, 0]])
    assert same_bits(got[1], stream(model, B).read(text)[1, : text.shape[1] - 8])


def test_state_is_a_copy_and_may_be_of_some_rows(model, text, same_bits):
    texts = stream(model, B)
    texts.read(text[:, :8])
    state, kept = texts.state(), texts.state()
    texts.read(text)
    assert same_bits(state, kept)
    texts.load_state(state)
    assert same_bits(texts.state([2, 1]), {name: t[[2, 1]] for name, t in state.items()})


def test_stream_begins_with_a_given_memory(model, text, same_bits):
    memory = torch.randn(B, 3, 16)
    texts = stream(model, B, memory=memory)
    assert same_bits(texts.memory, memory)
    assert not torch.allclose(texts.read(text), stream(model, B).read(text))
    assert not torch.equal(texts.memory, memory)


# Constant


def addresses_of(texts):
    cached = [t for cache in texts._caches for t in (cache.key, cache.value)]
    contexts = [t for pair in texts._contexts for t in pair]
    return [t.data_ptr() for t in (*texts._all().values(), texts._token, texts._place, *cached, *contexts)]


def live_bytes():
    gc.collect()
    tensors = [t for t in gc.get_objects() if type(t) in (torch.Tensor, torch.nn.Parameter)]
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


@pytest.mark.parametrize("kind", ["read", "decode"])
def test_nothing_moves_and_nothing_grows(model, text, kind, recorded):
    texts = model.start(B)

    def go_on():
        texts.read(text) if kind == "read" else [texts.decode(token) for token in text.split(1, 1)]
        texts.reset([1])
        texts.load_state(texts.state())

    go_on()
    go_on()
    addresses, size = addresses_of(texts), live_bytes()
    for _ in range(4):
        go_on()
    assert addresses_of(texts) == addresses
    assert live_bytes() == size


def test_steps_are_recorded_once(model, text, monkeypatch):
    monkeypatch.setattr(streaming, "Recording", TapedRecording)
    monkeypatch.setattr(TapedRecording, "made", 0)
    texts = model.start(B)
    for piece in pieces(text, 1):
        texts.read(piece)
    assert TapedRecording.made == 1
    for token in text.split(1, 1):
        texts.decode(token)
    assert TapedRecording.made == 4  # a segment; what its tokens attend to besides; caches of an open one; a token


# The model changes


def test_training_in_place_is_seen(model, text, recorded, same_bits):
    texts = stream(model, B)
    before = texts.read(text)
    trained = {name: t * 1.1 for name, t in model.state_dict().items()}
    model.load_state_dict(trained)
    texts.reset()
    after = texts.read(text)
    assert not torch.allclose(after[:, 1:], before[:, 1:])
    assert same_bits(after, stream(model, B).read(text))


@pytest.mark.parametrize("how", ["parameter", "data", "module"])
def test_replaced_parameters_are_seen(model, text, how, recorded, same_bits):
    texts = model.start(B)
    texts.read(text)
    texts.extend(text[:, :1])
    with torch.no_grad():
        if how == "parameter":
            model.head.weight = torch.nn.Parameter(model.head.weight * 2)
        elif how == "data":
            model.head.weight.data = model.head.weight * 2
        else:
            model.head = torch.nn.Linear(16, V)
    texts.reset()
    want = model.start(B)
    assert same_bits(texts.read(text), want.read(text))
    assert same_bits(texts.extend(text[:, :1]), want.extend(text[:, :1]))


def test_a_model_of_another_dtype_is_refused_until_the_state_moves(model, text):
    texts = stream(model, B)
    texts.read(text[:, :8])
    model.double()
    with pytest.raises(ValueError, match="stream: model must stay torch.float32 on cpu, got torch.float64 on cpu"):
        texts.read(text[:, 8:])
    other = stream(model, B)
    other.load_state(texts.state())
    got = other.read(text[:, 8:])
    want = stream(model, B).read(text)[:, 8:]
    assert got.dtype == torch.float64
    close(got, want, rtol=1e-4, atol=1e-5)


def test_what_a_recording_depends_on(model):
    before = dependencies_of(model)
    model.load_state_dict(model.state_dict())
    assert dependencies_of(model) == before
    with torch.autocast("cpu", torch.bfloat16):
        assert dependencies_of(model) != before
    model.train()
    assert dependencies_of(model) != before
    model.eval()
    model.head.bias = torch.nn.Parameter(model.head.bias.detach().clone())
    assert dependencies_of(model) != before


def test_autocast_may_change_between_calls(model, text, recorded, same_bits):
    texts, want = model.start(B), model.start(B)
    texts.read(text)
    texts.decode(text[:, :1])
    texts.reset()
    with torch.autocast("cpu", torch.bfloat16):
        assert same_bits(texts.read(text), want.read(text))
        assert same_bits(texts.extend(text[:, :1]), want.extend(text[:, :1]))
        model.load_state_dict({name: t * 1.5 for name, t in model.state_dict().items()})
        texts.reset()
        trained = texts.read(text)
    with torch.autocast("cpu", torch.bfloat16):  # casts of before the training are not kept
        assert same_bits(trained, model.start(B).read(text))


@pytest.mark.parametrize("autocast", [False, True])
def test_the_initial_memory_is_rounded_once_to_the_models_dtype(model, autocast):
    """Under autocast a norm may be in float32, and what begins there must be what begins elsewhere."""
    unit = torch.nn.functional.normalize(model.write.bias.detach().bfloat16().float(), dim=-1).bfloat16()
    model.to(torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        memory = model.start(B).memory
    assert memory.dtype == torch.bfloat16 and torch.equal(memory, unit.expand(B, -1, -1))


def test_streams_in_inference_mode_go_on_outside(model, text, same_bits):
    with torch.inference_mode():
        texts = model.start(B)
        texts.read(text[:, :7])
        texts.extend(text[:, 7:8])
    nats = texts.read(text[:, 8:])
    assert same_bits(nats, stream(model, B).read(text)[:, 8:])
    assert not nats.requires_grad and not texts.memory.requires_grad


# Decoding


@torch.no_grad()
def sample_without_caches(model, prompt, length, temperature, top_k, generator):
    """As `generate`, with the model's own forward over the whole text for every token."""
    text = prompt
    for _ in range(length):
        logits = at_once(model, text)[0][:, -1]
        if temperature == 0:
            token = logits.argmax(-1)
        else:
            logits = logits.float() / temperature
            if top_k is not None:
                logits[logits < logits.topk(top_k, -1).values[..., -1:]] = float("-inf")
            token = torch.multinomial(logits.softmax(-1), 1, generator=generator)[:, 0]
        text = torch.cat([text, token[:, None]], 1)
    return text[:, prompt.shape[1] :]


@pytest.mark.parametrize("length", [1, L, 2 * L + 3])
@pytest.mark.parametrize("temperature, top_k", [(0, None), (1.0, None), (0.7, 4)])
def test_generated_tokens_are_those_of_the_model_without_caches(model, text, length, temperature, top_k, recorded):
    options = dict(temperature=temperature, top_k=top_k)
    want = sample_without_caches(model, text[:, :length], 17, generator=torch.Generator().manual_seed(5), **options)
    got, _ = generate(model, text[:, :length], 17, generator=torch.Generator().manual_seed(5), **options)
    assert torch.equal(got, want)


def test_reading_and_decoding_mix(model, text, recorded):
    model = model.double()
    want = at_once(model, text)[0]
    texts = model.start(B)
    for seed in range(4):
        texts.reset()
        made = []
        for i, piece in enumerate(pieces(text, seed)):
            if i % 2:
                made.append(texts.extend(piece))
            else:
                made += [texts.extend(token) for token in piece.split(1, 1) if token.numel()]
        close(torch.cat(made, 1), want)


@pytest.mark.guarantee("G18")
def test_rows_at_different_places_decode_as_they_do_alone(model, text, recorded):
    model = model.double()
    want = at_once(model, text)[0]
    texts = model.start(B)
    texts.extend(text[:, :3])
    texts.reset([1])
    tokens = torch.stack([text[0, 3:], text[1, :-3], text[2, 3:]])
    made = torch.cat([texts.extend(token) for token in tokens.split(1, 1)], 1)
    close(made[[0, 2]], want[[0, 2], 3:])
    close(made[1], want[1, :-3])
    close(texts.read(tokens[:, :1])[1], -want[1, -4].log_softmax(-1)[tokens[1, :1]])


def test_what_decode_returns_is_overwritten_and_what_extend_returns_is_not(model, text, recorded, same_bits):
    texts = model.start(B)
    first = texts.extend(text[:, :1])
    kept = first.clone()
    texts.extend(text[:, 1:2])
    assert same_bits(first, kept)


def test_after_an_interrupted_read_decoding_goes_on_from_what_was_read(model, text, monkeypatch, same_bits):
    def interrupted(tokens, state, read=model.read_segment):
        steps.append(tokens)
        if len(steps) == 2:
            raise KeyboardInterrupt
        return read(tokens, state)

    texts, other, steps = model.start(B), model.start(B), []
    texts.extend(text[:, :1])
    monkeypatch.setattr(model, "read_segment", interrupted)
    with pytest.raises(KeyboardInterrupt):
        texts.read(text[:, 1 : 2 * L])
    other.load_state(texts.state())
    assert same_bits(texts.extend(text[:, L : L + 1]), other.extend(text[:, L : L + 1]))
    assert same_bits(texts.memory, other.memory)


# Refusals


def test_wrong_streams_and_tokens_are_refused(model, text):
    with pytest.raises(ValueError, match="stream: batch must be at least 1, got 0"):
        stream(model, 0)
    with pytest.raises(ValueError, match=r"stream: memory must be \[3, 3, 16\], got \[1, 3, 16\]"):
        stream(model, B, memory=torch.zeros(1, 3, 16))
    texts = stream(model, B)
    with pytest.raises(ValueError, match=r"tokens must be integer \[B, L\], got torch.float32 \[3, 32\]"):
        texts.read(text.float())
    with pytest.raises(ValueError, match="stream: tokens must have 3 rows, got 2"):
        texts.read(text[:2])
    for wrong in (-1, V):
        with pytest.raises(ValueError, match=f"stream: tokens must be from 0 to 10, got {wrong}"):
            texts.read(torch.where(text == 3, wrong, text))
    assert torch.equal(texts.read(text), stream(model, B).read(text))  # nothing was half read


def test_wrong_rows_and_states_are_refused(model, text):
    texts = stream(model, B)
    for rows in ([3], [-1], [1, 1]):
        with pytest.raises(ValueError, match="stream: rows must be different numbers from 0 to 2, got"):
            texts.reset(rows)
    with pytest.raises(ValueError, match=r"stream: rows must be \[3\], got \[2\]"):
        texts.reset(torch.tensor([True, False]))
    state = texts.state()
    with pytest.raises(ValueError, match="stream: state must hold memory, .*filled, got memory"):
        texts.load_state({"memory": state["memory"]})
    with pytest.raises(ValueError, match=r"stream: state 'logits' must be \[3, 11\], got \[2, 11\]"):
        texts.load_state({**state, "logits": state["logits"][:2]})
    with pytest.raises(ValueError, match="stream: state 'tokens' must be from 0 to 10"):
        texts.load_state({**state, "tokens": torch.full_like(state["tokens"], 999)})
    with pytest.raises(ValueError, match="stream: state 'filled' must be from 0 to 4, got"):
        texts.load_state({**state, "filled": state["filled"] + L})


@pytest.mark.parametrize("make", [make_lm, make_memformer])
def test_a_model_that_drops_out_is_refused(make, text):
    model = make(dropout=0.1)
    with pytest.raises(ValueError, match="stream: model must be in evaluation mode, or it drops out: call model.eval"):
        stream(model, B)
    texts = stream(model.eval(), B)
    model.train()
    with pytest.raises(ValueError, match="stream: model must be in evaluation mode"):
        texts.read(text)


# The command line


@pytest.fixture
def call(monkeypatch, capsys, tmp_path):
    """`call(*arguments, stdin=b"")` to the exit code and what was printed."""

    def function(*arguments, stdin=b""):
        (tmp_path / "stdin").write_bytes(stdin)
        monkeypatch.setattr(sys, "argv", ["memformer-kernels", "stream", *map(str, arguments), "--device", "cpu"])
        with open(tmp_path / "stdin") as file, monkeypatch.context() as patch, pytest.raises(SystemExit) as exit:
            patch.setattr(sys, "stdin", file)
            main()
        return exit.value.code, *capsys.readouterr()

    return function


@pytest.fixture(scope="module", params=[make_lm, make_memformer], ids=["MemformerLM", "Memformer"])
def folder(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    request.param(vocabulary=256).save_pretrained(folder)
    return folder


def test_command_tells_the_bits_of_a_file_and_of_standard_input(folder, tmp_path, monkeypatch, call):
    monkeypatch.setattr(cli_stream, "CHUNK", 100)
    content = bytes(range(256)) + b"the end"  # many segments, and an open one
    (tmp_path / "text").write_bytes(content)
    code, out, err = call(folder, tmp_path / "text", "--json", tmp_path / "figures.json")
    assert code == 0, err
    figures = json.loads((tmp_path / "figures.json").read_text())
    tokens = torch.tensor([list(content)])
    logits = at_once(byte_models.load(folder, torch.device("cpu")).double(), tokens)[0].log_softmax(-1)
    nats = math.log(256) - logits[:, :-1].gather(2, tokens[:, 1:, None]).sum().item()
    assert figures["bytes"] == len(content)
    assert figures["bits_per_byte"] == pytest.approx(nats / math.log(2) / len(content), rel=1e-5)
    assert f"{len(content):,} bytes read: {figures['bits_per_byte']:.4f} bits per byte" in out
    for file in ([], ["-"]):
        code, again, err = call(folder, *file, stdin=content)
        assert code == 0, err
        assert again.split(" bits per byte")[0] == out.split(" bits per byte")[0]


def test_command_reads_pieces_and_never_a_whole_file(folder, tmp_path, monkeypatch):
    (tmp_path / "text").write_bytes(bytes(range(256)) * 2)
    monkeypatch.setattr(cli_stream, "CHUNK", 100)
    sizes, read = [], streaming.Stream.read
    monkeypatch.setattr(streaming.Stream, "read", lambda self, t: sizes.append(t.numel()) or read(self, t))
    figures = cli_stream.stream(folder, str(tmp_path / "text"), None, torch.device("cpu"))
    assert sizes == [100] * 5 + [12] and figures["bytes"] == 512


def test_command_that_is_interrupted_tells_what_it_read(folder, tmp_path, monkeypatch, call):
    def press_ctrl_c(self, tokens):
        if self._filled.any():
            raise KeyboardInterrupt
        return read(self, tokens)

    (tmp_path / "text").write_bytes(bytes(range(256)))
    monkeypatch.setattr(cli_stream, "CHUNK", 13)
    read = streaming.Stream.read
    monkeypatch.setattr(streaming.Stream, "read", press_ctrl_c)
    code, out, err = call(folder, tmp_path / "text", "--json", tmp_path / "figures.json")
    assert code == 130 and "13 bytes read" in out, err
    assert json.loads((tmp_path / "figures.json").read_text())["bytes"] == 13


def test_command_of_nothing_has_nothing_to_tell(folder, tmp_path, call):
    code, out, err = call(folder, "--json", tmp_path / "figures.json")
    assert code == 0 and "0 bytes read: nothing to tell" in out, err
    assert json.loads((tmp_path / "figures.json").read_text())["bits_per_byte"] is None
    code, out, err = call(folder, tmp_path / "absent")
    assert code == 1 and "No such file" in err and not out
    code, out, err = call(tmp_path, tmp_path / "absent")
    assert code == 1 and "cannot be read as a configuration" in err


def test_command_refuses_a_model_of_other_tokens(tmp_path, call):
    make_lm(vocabulary=11).save_pretrained(tmp_path)
    code, _, err = call(tmp_path)
    assert code == 1 and "is a model of 11 tokens, not of bytes (256)" in err


# Does its benchmark keep what it does not measure?


def test_benchmark_of_one_series_keeps_the_others_of_its_machine(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parent.parent / "benchmarks"))
    import streaming as benchmark

    def report(batch, figure, machine="one"):
        series = [{"preset": "small", "batch": batch, "figure": figure}]
        return {"machine": machine, "torch": "2", "reading": series, "decoding": list(series)}

    monkeypatch.setattr(benchmark, "SERIES", [("small", 1), ("small", 2)])
    before, now = report(1, "first"), report(2, "first")
    benchmark.join(now, before)
    again = report(1, "second")
    benchmark.join(again, now)
    for kind in ("reading", "decoding"):
        assert [(row["batch"], row["figure"]) for row in again[kind]] == [(1, "second"), (2, "first")]
    with pytest.raises(SystemExit, match="of another machine or version"):
        benchmark.join(report(1, "third", machine="another"), before)
    monkeypatch.setattr(sys, "argv", ["streaming.py", "--only", "large", "--out", str(tmp_path)])
    with pytest.raises(SystemExit):
        benchmark.main()
    assert not list(tmp_path.iterdir())
