"""The pool of streams: whatever is done to it, each text is read as if it were alone."""

import dataclasses
import random
import runpy
import sys
import threading
from pathlib import Path

import pytest
import torch
from taped import TapedRecording

from memformer_kernels import Memformer, MemformerConfig, MemformerLM, MemformerLMConfig, StreamPool, stream
from memformer_kernels.models import streaming
from memformer_kernels.models.recurrent import Recurrent
from memformer_kernels.serving import Lease
from memformer_kernels.state import StateFileError

pytestmark = pytest.mark.guarantee("G18")

SIZES = dict(width=8, heads=2, hidden=8, slots=2, segment_length=3)
L, V, T = SIZES["segment_length"], 7, 29


def make_lm(**options):
    torch.manual_seed(1)
    return MemformerLM(MemformerLMConfig(vocabulary=V, layers=1, **SIZES, **options)).eval()


def make_memformer(**options):
    torch.manual_seed(1)
    config = MemformerConfig(vocabulary=V, encoder_layers=1, decoder_layers=1, dropout=0.0, **SIZES, **options)
    return Memformer(config).eval()


class Plain(Recurrent):
    """The least that a pool serves: a sum of what was read. Many machines run it in little time."""

    def __init__(self):
        super().__init__()
        self.config = MemformerLMConfig(vocabulary=V, **SIZES)
        self.embedding, self.head = torch.nn.Embedding(V, 8), torch.nn.Linear(8, V)
        self.write = torch.nn.Module()
        self.write.bias = torch.nn.Parameter(torch.randn(2, 8))

    def initial_state(self, batch):
        return {"memory": self.write.bias.expand(batch, 2, 8)}

    def read_segment(self, tokens, state):
        seen = self.embedding(tokens).cumsum(1) + state["memory"].sum(1, keepdim=True)
        return self.head(seen), {"memory": (state["memory"] + seen[:, -1:]) / 2}


MODELS = [make_lm, make_memformer]


@pytest.fixture(params=MODELS, ids=["MemformerLM", "Memformer"])
def model(request):
    return request.param()


@pytest.fixture
def texts():
    return torch.randint(V, (5, T))


class Alone:
    """Texts that were each read alone, in streams of `width` rows: results, and the state after every token."""

    def __init__(self, model, texts, width):
        self.nats, self.logits, self.states = [], [], []
        for text in texts:
            rows = text.expand(width, -1).clone()
            rows[1:] = 0
            mine = stream(model, width)
            self.states.append([mine.state([0])])
            for token in rows.split(1, 1):
                mine.read(token)
                self.states[-1].append(mine.state([0]))
            self.nats.append(stream(model, width).read(rows)[0])
            self.logits.append(stream(model, width).read(rows, logits=True)[0])


def wild(state, value):
    """What a text must never notice of another one."""
    return {name: torch.full_like(t, value) if t.is_floating_point() else t for name, t in state.items()}


# Streams never mix.


@dataclasses.dataclass
class Tenant:
    lease: Lease
    text: int | None  # None: not a text but NaN, infinities, or huge numbers
    read: int = 0


class Machine:
    """Random calls of a pool, each compared with a dictionary of texts that were read alone."""

    def __init__(self, seed, model, texts, alone, same_bits, file):
        self.random, self.model, self.texts, self.same_bits = random.Random(seed), model, texts, same_bits
        self.width = self.random.choice([1, 2, 3])
        self.alone, self.file = alone[self.width], file
        self.pool = StreamPool(model, streams=self.random.randint(self.width, 5), width=self.width)
        self.tenants, self.stale, self.kept = [], [], []

    def step(self):
        actions = dict(read=8, open=3, open_wild=2, close=2, reset=1, set_aside=1, take_up=2, abort=2, refuse=2)
        actions |= dict(save_and_load=0.3, grow=0.1)
        getattr(self, self.random.choices(list(actions), list(actions.values()))[0])()
        assert len(self.pool) == len(self.tenants)

    def check_all(self):
        for tenant in self.tenants:
            if tenant.text is not None:
                assert self.pool.tokens_read(tenant.lease) == tenant.read
                assert self.same_bits(self.pool.state(tenant.lease), self.alone.states[tenant.text][tenant.read])

    def some(self, most=None):
        return self.random.sample(self.tenants, self.random.randint(0, min(most or 4, len(self.tenants))))

    def requests(self, tenants):
        pieces = []
        for tenant in tenants:
            text = self.texts[tenant.text or 0]
            if tenant.read + 4 > T:
                self.pool.reset(tenant.lease)
                tenant.read, tenant.text = 0, tenant.text or 0
            pieces.append(text[tenant.read : tenant.read + self.random.randint(0, 4)])
        return [tenant.lease for tenant in tenants], pieces

    def read(self):
        tenants, logits = self.some(), self.random.random() < 0.3
        leases, pieces = self.requests(tenants)
        results = self.pool.read(leases, pieces, logits=logits)
        for tenant, piece, result in zip(tenants, pieces, results, strict=True):
            places = slice(tenant.read, tenant.read + len(piece))
            tenant.read += len(piece)
            if tenant.text is not None:
                want = (self.alone.logits if logits else self.alone.nats)[tenant.text][places]
                assert self.same_bits(result, want)

    def open(self, text=None, state=None, read=0):
        if len(self.pool) == self.pool.streams:
            with pytest.raises(RuntimeError, match=f"StreamPool: all {self.pool.streams} streams are open"):
                self.pool.open(state)
            return False
        text = self.random.randrange(len(self.texts)) if text is None else text
        self.tenants.append(Tenant(self.pool.open(state, tokens_read=read), text, read))
        return True

    def open_wild(self):
        value = self.random.choice([float("nan"), float("inf"), 1e30, 12345.0])
        if self.open(state=wild(self.alone.states[0][0], value)):
            self.tenants[-1].text = None

    def close(self):
        for tenant in self.some(1):
            self.pool.close(tenant.lease)
            self.tenants.remove(tenant)
            self.stale.append(tenant.lease)
            return tenant

    def reset(self):
        for tenant in self.some(1):
            self.pool.reset(tenant.lease)
            tenant.read, tenant.text = 0, self.random.randrange(len(self.texts))

    def set_aside(self):
        for tenant in self.some(1):
            if tenant.text is not None:
                self.kept.append((tenant.text, self.pool.state(tenant.lease), tenant.read))
                self.pool.close(tenant.lease)
                self.tenants.remove(tenant)
                self.stale.append(tenant.lease)

    def take_up(self):
        if self.kept and self.open(*self.kept[-1]):
            self.kept.pop()

    def save_and_load(self):
        for tenant in self.some(1):
            if tenant.text is None:
                continue
            self.pool.save(tenant.lease, self.file)
            if len(self.pool) < self.pool.streams:
                self.tenants.append(Tenant(self.pool.load(self.file), tenant.text, tenant.read))

    def abort(self):
        """The step fails, before or after it computed, and nobody has read anything."""
        rows, play, left = self.pool._rows, self.pool._rows._play, [self.random.randint(0, 2)]
        before = self.random.random() < 0.5

        def fail(body):
            left[0] -= 1
            if left[0] < 0 and before:
                raise KeyboardInterrupt
            result = play(body)
            if left[0] < 0:
                raise KeyboardInterrupt
            return result

        rows._play = fail
        try:
            tenants = self.some()
            leases, pieces = self.requests(tenants)
            results = self.pool.read(leases, pieces)
            for tenant, result in zip(tenants, results, strict=True):
                tenant.read += len(result)
        except KeyboardInterrupt:
            pass
        finally:
            del rows._play

    def refuse(self):
        """Before anything is read."""
        wrong = [*self.random.sample(self.stale, min(1, len(self.stale))), *[t.lease for t in self.some(1)] * 2]
        leases, pieces = self.requests(self.some())
        leases, pieces = [*leases, *wrong], [*pieces, *[self.texts[0][:1]] * len(wrong)]
        if wrong:
            with pytest.raises(ValueError, match="StreamPool: lease.* must be"):
                self.pool.read(leases, pieces)

    def grow(self):
        self.pool.grow(self.pool.streams + self.random.randint(0, 2))


@pytest.mark.parametrize("make, machines", [(Plain, 260), (make_lm, 20), (make_memformer, 20)])
def test_texts_are_read_as_if_alone(make, machines, texts, tmp_path, same_bits):
    model = make()
    alone = {width: Alone(model, texts, width) for width in (1, 2, 3)}
    for seed in range(machines):
        machine = Machine(seed, model, texts, alone, same_bits, tmp_path / "text.safetensors")
        for _ in range(50):
            machine.step()
        machine.check_all()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e30])
def test_nothing_of_a_former_tenant_stays(model, texts, value, same_bits):
    pool, alone = StreamPool(model, 1), Alone(model, texts[:1], 1)
    lease = pool.open(wild(alone.states[0][0], value))
    pool.read([lease], [texts[0, : L + 1]])
    pool.close(lease)
    lease = pool.open()
    assert same_bits(pool.state(lease), alone.states[0][0])
    assert same_bits(pool.read([lease], [texts[0]])[0], alone.nats[0])
    pool.reset(lease)
    assert same_bits(pool.state(lease), alone.states[0][0])


def test_a_read_that_fails_midway_leaves_every_text_as_it_was(model, texts, monkeypatch, same_bits):
    pool = StreamPool(model, 2, width=1)
    leases = [pool.open(), pool.open()]
    before, read, calls = [pool.state(lease) for lease in leases], pool._rows.read_packed, []

    def fail_at_the_second(*arguments, **options):
        calls.append(1)
        if len(calls) == 2:
            raise RuntimeError("planted")
        return read(*arguments, **options)

    monkeypatch.setattr(pool._rows, "read_packed", fail_at_the_second)
    with pytest.raises(RuntimeError, match="planted"):
        pool.read(leases, [texts[0, :4], texts[1, :4]])
    assert all(same_bits(pool.state(lease), state) for lease, state in zip(leases, before, strict=True))
    assert [pool.tokens_read(lease) for lease in leases] == [0, 0]


def test_idle_rows_read_a_null_slot_that_nobody_writes(model, texts):
    pool = StreamPool(model, 3)
    leases = [pool.open(wild(pool.state(pool.open()), float("nan"))), pool.open()]
    for _ in range(3):
        pool.read(leases, [texts[0, :5], texts[1, :4]])
        pool.read(leases[1:], [texts[0, :2]])
        tokens = pool._rows.state([1, 2])
        assert not tokens["filled"].any() and all(t.isfinite().all() for t in tokens.values())
    null = {name: t[0] for name, t in pool._slots.items()}
    fresh = stream(model, 1).state()
    assert all(torch.equal(t, fresh[name][0]) for name, t in null.items())


def test_pool_equals_streams_of_one_row(model, texts):
    model = model.double()
    pool = StreamPool(model, 5, width=3)
    leases = [pool.open() for _ in texts]
    cuts = torch.randint(T, (len(texts), 3)).sort(-1).values
    pieces = [text.tensor_split(cut.tolist()) for text, cut in zip(texts, cuts, strict=True)]
    got = [pool.read(leases, [p[i] for p in pieces]) for i in range(4)]
    for row, text in enumerate(texts):
        want = stream(model, 1).read(text[None])[0]
        torch.testing.assert_close(torch.cat([g[row] for g in got]), want, rtol=1e-12, atol=1e-13)
        assert pool.tokens_read(leases[row]) == T


def test_step_is_recorded_once_and_stays_where_it_is(model, texts, monkeypatch, tmp_path, same_bits):
    texts = texts[:3, :17]
    alone = Alone(model, texts, 2)
    monkeypatch.setattr(streaming, "Recording", TapedRecording)
    monkeypatch.setattr(TapedRecording, "made", 0)
    pool = StreamPool(model, 3, width=2)
    addresses = [t.data_ptr() for t in pool._rows._all().values()]
    leases = [pool.open() for _ in range(3)]
    first = pool.read(leases, [texts[i, :7] for i in range(3)])
    pool.save(leases[1], tmp_path / "text")
    pool.close(leases[1])
    pool.grow(6)
    leases[1] = pool.load(tmp_path / "text")
    second = pool.read(leases, [texts[i, 7:] for i in range(3)])
    for i in range(3):
        assert same_bits(torch.cat([first[i], second[i]]), alone.nats[i])
    assert TapedRecording.made == 1
    assert [t.data_ptr() for t in pool._rows._all().values()] == addresses


def test_training_in_place_is_seen(model, texts, same_bits):
    pool = StreamPool(model, 2)
    before = pool.read([lease := pool.open()], [texts[0]])[0]
    model.load_state_dict({name: t * 1.5 for name, t in model.state_dict().items()})
    pool.reset(lease)
    after = pool.read([lease, pool.open()], [texts[0], texts[0]])
    assert not torch.allclose(before, after[0])
    assert same_bits(after[0], Alone(model, texts[:1], 2).nats[0]) and same_bits(after[1], after[0])


# Threads


def test_many_threads_read_many_texts(texts, same_bits):
    model = make_lm()
    pool, alone, wrong = StreamPool(model, 6, width=2), Alone(model, texts, 2), []
    switch = sys.getswitchinterval()

    def serve(seed):
        try:
            numbers = random.Random(seed)
            for _ in range(3):
                i, lease, got, read = numbers.randrange(len(texts)), pool.open(), [], 0
                while read < T:
                    piece = texts[i, read : read + numbers.randint(1, 9)]
                    got += pool.read([lease], [piece])
                    read += len(piece)
                if not same_bits(torch.cat(got), alone.nats[i]) or pool.tokens_read(lease) != T:
                    wrong.append(i)
                pool.close(lease)
        except BaseException as error:
            wrong.append(error)

    threads = [threading.Thread(target=serve, args=(seed,)) for seed in range(6)]
    sys.setswitchinterval(1e-6)
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(switch)
    assert not wrong and len(pool) == 0


# Files


@pytest.mark.parametrize("make", MODELS)
def test_a_text_goes_on_in_another_pool_or_stream(make, texts, tmp_path, same_bits):
    pool, alone, path = StreamPool(make(), 3, width=2), Alone(make(), texts, 2), tmp_path / "text"
    leases = [pool.open(), pool.open()]
    pool.read(leases, [texts[0, :8], texts[1, :5]])
    pool.save(leases[1], path, stream_id="a client's")
    other = StreamPool(make(backend="eager"), 4, width=2)
    other.open()
    lease = other.load(path)
    assert other.tokens_read(lease) == 5
    assert same_bits(other.read([lease], [texts[1, 5:]])[0], alone.nats[1][5:])
    rows = stream(make(), 2)
    metadata = rows.load(path, rows=[1])
    assert (metadata["stream_id"], metadata["step"]) == ("a client's", 5)
    assert same_bits(rows.read(texts[:2, 5:])[1], alone.nats[1][5:])
    rows.reset()
    rows.read(texts[:2, :4])
    rows.save(path, rows=[0])
    lease = pool.load(path)
    assert pool.tokens_read(lease) == 0  # the stream did not say
    assert same_bits(pool.read([lease], [texts[0, 4:]])[0], alone.nats[0][4:])


def test_a_file_of_another_model_is_refused(model, texts, tmp_path):
    pool, path = StreamPool(model, 2), tmp_path / "text"
    lease = pool.open()
    pool.read([lease], [texts[0]])
    pool.save(lease, path)
    other_weights = type(model)(model.config).eval()
    other_config = type(model)(dataclasses.replace(model.config, temperature=0.5)).eval()
    other_sizes = type(model)(dataclasses.replace(model.config, slots=4)).eval()
    other_model = (make_memformer if isinstance(model, MemformerLM) else make_lm)()
    for other, message in [
        (other_weights, r"is of another model: weights must be '\w{64}', got '\w{64}'"),
        (other_config, "is of another model: config.temperature must be 0.5, got 0.25"),
        (other_sizes, r"tensor 'memory' must be torch.float32 \[1, 4, 8\], got torch.float32 \[1, 2, 8\]"),
        (other_model, "tensor 'states': expected"),
        (type(model)(model.config).eval().double(), "must be torch.float64"),
    ]:
        others = StreamPool(other, 2)
        with pytest.raises(StateFileError, match=message):
            others.load(path)
        with pytest.raises(StateFileError, match=message):
            stream(other, 1).load(path)
        assert len(others) == 0
    with pytest.raises(StateFileError, match=r"tensor 'filled' must be torch.int64 \[2\], got torch.int64 \[1\]"):
        stream(model, 2).load(path)


def test_a_damaged_file_changes_nothing(model, texts, tmp_path, same_bits):
    pool, rows, path = StreamPool(model, 2), stream(model, 1), tmp_path / "text"
    lease = pool.open()
    pool.read([lease], [texts[0]])
    pool.save(lease, path)
    raw = bytearray(path.read_bytes())
    raw[-1] ^= 1
    path.write_bytes(raw)
    before = [pool.state(lease), rows.state()]
    with pytest.raises(StateFileError, match="damaged: tensor '.*' does not match its SHA-256"):
        pool.load(path)
    with pytest.raises(StateFileError, match="damaged: tensor '.*' does not match its SHA-256"):
        rows.load(path)
    assert len(pool) == 1
    assert same_bits(pool.state(lease), before[0]) and same_bits(rows.state(), before[1])


def test_what_would_not_load_is_not_saved(model, tmp_path):
    pool = StreamPool(model, 2)
    lease = pool.open(wild(pool.state(pool.open()), float("nan")))
    with pytest.raises(ValueError, match="stream: state 'memory' must be finite to be saved, got NaN or infinity"):
        pool.save(lease, tmp_path / "text")
    assert not list(tmp_path.iterdir())


# Refusals


def test_wrong_leases_are_refused(model, texts):
    pool, other = StreamPool(model, 2), StreamPool(model, 2)
    lease, piece = pool.open(), texts[0, :4]
    with pytest.raises(TypeError, match="StreamPool: lease must be a Lease, got int"):
        pool.read([1], [piece])
    with pytest.raises(ValueError, match=r"StreamPool: lease must be of this pool, got Lease\(slot=1, generation=0\)"):
        other.read([lease], [piece])
    for slot in (-1, 0, 3):
        with pytest.raises(ValueError, match=f"StreamPool: slot must be from 1 to 2, got .*slot={slot}"):
            pool.read([dataclasses.replace(lease, slot=slot)], [piece])
    with pytest.raises(ValueError, match=r"StreamPool: leases must be different, got slots \[1, 1\]"):
        pool.read([lease, lease], [piece, piece])
    pool.close(lease)
    again = pool.open()  # the same slot
    for call in (pool.close, pool.reset, pool.state, pool.tokens_read, lambda x: pool.read([x], [piece])):
        with pytest.raises(ValueError, match=r"StreamPool: lease must be open, got .*generation=0\), which was closed"):
            call(lease)
    with pytest.raises(ValueError, match="StreamPool: lease must be open"):
        pool.save(lease, "nowhere")
    pool.close(again)
    with pytest.raises(ValueError, match="StreamPool: lease must be open"):
        pool.close(again)


def test_wrong_tokens_are_refused_and_nobody_has_read(model, texts, same_bits):
    pool, alone = StreamPool(model, 2, width=1), Alone(model, texts, 1)
    leases = [pool.open(), pool.open()]
    good = texts[0, :4]
    for wrong, message in [
        ([good], "tokens must be one tensor a lease, got 1 for 2 leases"),
        ([good, good.float()], r"tokens\[1\] must be integer \[n\], got torch.float32 \[4\]"),
        ([good, good == 1], r"tokens\[1\] must be integer \[n\], got torch.bool \[4\]"),
        ([good, good[None]], r"tokens\[1\] must be integer \[n\], got torch.int64 \[1, 4\]"),
        ([good, good + V], r"tokens\[1\] must be from 0 to 6, got"),
        ([good, good - V], r"tokens\[1\] must be from 0 to 6, got -"),
    ]:
        with pytest.raises(ValueError, match=f"StreamPool: {message}"):
            pool.read(leases, wrong)
    assert pool.read([], []) == []
    assert [len(nats) for nats in pool.read(leases, [good[:0], good[:0]])] == [0, 0]
    for i, nats in enumerate(pool.read(leases, [texts[0].int(), texts[1].to(torch.uint8)])):
        assert same_bits(nats, alone.nats[i])


def test_wrong_sizes_and_states_are_refused(model):
    for streams in (0, -1):
        with pytest.raises(ValueError, match=f"StreamPool: streams must be at least 1, got {streams}"):
            StreamPool(model, streams)
    for width in (0, 4):
        with pytest.raises(ValueError, match=f"StreamPool: width must be from 1 to 3, the streams, got {width}"):
            StreamPool(model, 3, width=width)
    pool = StreamPool(model, 3)
    with pytest.raises(ValueError, match="StreamPool: streams must be at least 3, as many as there are, got 2"):
        pool.grow(2)
    state = pool.state(pool.open())
    for wrong, message in [
        ({"memory": state["memory"]}, "state must hold memory, .*filled, got memory"),
        ({**state, "logits": state["logits"][:, 1:]}, r"state 'logits' must be \[1, 7\], got \[1, 6\]"),
        ({**state, "filled": state["filled"] + L}, "state 'filled' must be from 0 to 2, got"),
    ]:
        with pytest.raises(ValueError, match=f"stream: {message}"):
            pool.open(wrong)
    pool.open(state)
    pool.open()
    with pytest.raises(RuntimeError, match="StreamPool: all 3 streams are open: close one of them, or grow the pool"):
        pool.open()
    assert len(pool) == pool.streams == 3


def test_a_model_that_drops_out_is_refused(texts):
    model = make_lm(dropout=0.1)
    pool = StreamPool(model, 1)
    lease = pool.open()
    model.train()
    for call in (lambda: StreamPool(model, 1), lambda: pool.read([lease], [texts[0]])):
        with pytest.raises(ValueError, match="stream: model must be in evaluation mode, or it drops out"):
            call()


def test_example_runs(capsys):
    runpy.run_path(str(Path(__file__).parent.parent / "examples" / "serve_many_streams.py"), run_name="__main__")
    out = capsys.readouterr().out
    assert out.count("bits per byte") == 12 and "the same bits as alone" in out
