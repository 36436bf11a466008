"""A run: learns, stops and goes on bit for bit, and loses nothing to a full disk or a Ctrl-C."""

import json
import os
import signal
from dataclasses import replace

import pytest
import torch

from memformer_kernels import MemformerLM, MemformerLMConfig
from memformer_kernels.data import DataError, Text
from memformer_kernels.state import StateFileError
from memformer_kernels.training import Settings, Trainer
from memformer_kernels.training.run import Interrupted, RunFolder, run
from memformer_kernels.training.tasks import RecallTraining, TextTask

CPU = torch.device("cpu")
CONFIG = MemformerLMConfig(width=32, heads=2, layers=1, hidden=64, slots=4, segment_length=8, dropout=0.1)
SETTINGS = Settings(steps=12, batch=4, horizons=(2, 3), warmup=2)


@pytest.fixture
def text(tmp_path):
    folder = tmp_path / "text"
    folder.mkdir()
    for i in range(40):
        (folder / f"{i}.txt").write_text(f"{i} and the quick brown fox jumps over {i} lazy dogs\n" * 8)
    return Text.read([folder])


def trainer(text, settings=SETTINGS, config=CONFIG):
    return Trainer(config, settings, TextTask(text, settings.batch, config.segment_length, CPU), CPU)


def weights(some):
    return [t.clone() for t in some.model.state_dict().values()]


@pytest.mark.guarantee("G17")
@pytest.mark.parametrize("more", [{}, dict(restart=0.4, lengths=(4, 8, 8))], ids=["plain", "restarts and lengths"])
def test_a_resumed_run_is_the_same_run_bit_for_bit(tmp_path, text, more):
    settings = replace(SETTINGS, **more)
    whole = trainer(text, settings)
    losses = [whole.step() for _ in range(12)]
    first = trainer(text, settings)
    for _ in range(5):
        first.step()
    first.save(tmp_path / "checkpoint")
    torch.manual_seed(12345)
    second = trainer(text, settings)
    second.load(tmp_path / "checkpoint")
    assert [second.step() for _ in range(7)] == losses[5:]
    assert all(map(torch.equal, weights(whole), weights(second)))
    assert torch.equal(whole.memory, second.memory)


def test_lengths_follow_one_another(text):
    some = trainer(text, replace(SETTINGS, lengths=(4, 8, 8), horizons=(2,)))
    seen = []
    take = some.task.rollout
    some.task.rollout = lambda *size: seen.append(size) or take(*size)
    for _ in range(12):
        some.step()
    assert seen == [(2, 4)] * 4 + [(2, 8)] * 8 and some.task.lanes.position == 2 * (4 * 4 + 8 * 8)
    with pytest.raises(ValueError, match="lengths must be at most the model's segment_length, 8, got"):
        trainer(text, replace(SETTINGS, lengths=(4, 16)))
    with pytest.raises(ValueError, match="lengths must be numbers from 1 up"):
        replace(SETTINGS, lengths=(0,))


def test_restarted_lanes_begin_with_the_initial_memory_and_teach_it(text):
    for restart in (0.0, 0.5, 1.0):
        some, given = trainer(text, replace(SETTINGS, batch=16, restart=restart)), []
        carried = some.memory = torch.nn.functional.normalize(torch.randn_like(some.memory), dim=-1)
        initial = some.model.initial_memory(16).detach()
        some.rollout.cell = lambda segment, memory: given.append(memory) or some.model.cell(segment, memory)  # noqa: B023
        some.step()
        assert given[0].requires_grad == (restart > 0)
        fresh, kept = ((given[0] == memory).flatten(1).all(1) for memory in (initial, carried))
        assert bool((fresh ^ kept).all())
        low, high = {0.0: (0, 0), 0.5: (1, 15), 1.0: (16, 16)}[restart]
        assert low <= int(fresh.sum()) <= high
    with pytest.raises(ValueError, match="restart must be from 0 to 1"):
        replace(SETTINGS, restart=1.5)


def test_recall_resumes_with_its_data(tmp_path):
    config, settings = replace(CONFIG, vocabulary=33), replace(SETTINGS, horizons=(2,))
    make = lambda: Trainer(config, settings, RecallTraining(4, 8, 2, CPU, seed=0), CPU)  # noqa: E731
    whole = make()
    losses = [whole.step() for _ in range(4)]
    first = make()  # seeds the random state, as a new process does
    first.step(), first.step()
    first.save(tmp_path / "checkpoint")
    second = make()
    second.load(tmp_path / "checkpoint")
    assert [second.step(), second.step()] == losses[2:]


def test_the_twin_has_the_same_parameters_and_never_reads_what_was_written(text):
    twin = trainer(text, replace(SETTINGS, twin=True))
    assert all(map(torch.equal, weights(twin), weights(trainer(text))))
    before = twin.model.write.value.weight.clone()
    twin.step()
    assert torch.equal(twin.model.write.value.weight, before), "the writer got a gradient"
    assert twin.validate().keys() == {"reset"}


def test_replay_and_bptt_train_the_same_model(text):
    # Adam turns rounding of a tiny gradient into a whole step, so: one step, at a small learning rate
    small = replace(SETTINGS, learning_rate=1e-4)
    replayed = trainer(text, small)
    loss = replayed.step()
    plain = trainer(text, replace(small, method="bptt"))
    assert plain.step() == loss
    for a, b in zip(weights(replayed), weights(plain), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=2e-5)


def test_another_runs_checkpoint_is_refused_with_the_difference(tmp_path, text):
    trainer(text).save(tmp_path / "checkpoint")
    with pytest.raises(StateFileError, match="of another run: settings .* got batch = 4 instead of 2"):
        trainer(text, replace(SETTINGS, batch=2)).load(tmp_path / "checkpoint")
    with pytest.raises(StateFileError, match="of another run: config .* got width = 32 instead of 16"):
        trainer(text, config=replace(CONFIG, width=16)).load(tmp_path / "checkpoint")


def test_a_run_writes_metrics_checkpoint_model_and_figures(tmp_path, text):
    folder = RunFolder(tmp_path / "run")
    figures = run(trainer(text), folder, report_every=3, validate_every=6)
    rows = [json.loads(line) for line in folder.metrics.read_text().splitlines()]
    assert [r["step"] for r in rows] == [3, 6, 9, 12, 12]
    assert {"memory", "reset"} <= rows[1].keys() and rows[-1]["final"]
    assert figures == {k: rows[-1][k] for k in ("memory", "reset")}
    loaded = MemformerLM.from_pretrained(folder.path)
    assert loaded.config == CONFIG


def test_ctrl_c_saves_and_the_run_goes_on_as_if_never_stopped(tmp_path, text):
    whole = RunFolder(tmp_path / "whole")
    run(trainer(text), whole, report_every=1)

    def press_at_5(row):
        if row["step"] == 5:
            os.kill(os.getpid(), signal.SIGINT)

    stopped = RunFolder(tmp_path / "stopped")
    with pytest.raises(Interrupted, match="saved after step [56] of 12"):
        run(trainer(text), stopped, report=press_at_5, report_every=1)
    run(trainer(text), stopped, resume=True, report_every=1)
    ours, theirs = ([(r["step"], r.get("loss"), r.get("memory")) for r in f.rows()] for f in (whole, stopped))
    assert ours == theirs
    assert (whole.path / "model.safetensors").read_bytes() == (stopped.path / "model.safetensors").read_bytes()


def test_a_run_that_the_clock_stopped_goes_on_to_the_same_end(tmp_path, text):
    whole, stopped = RunFolder(tmp_path / "whole"), RunFolder(tmp_path / "stopped")
    run(trainer(text), whole)
    run(trainer(text), stopped, time_limit=0)
    assert stopped.rows()[-1]["step"] == 1
    run(trainer(text), stopped, resume=True)
    assert (whole.path / "model.safetensors").read_bytes() == (stopped.path / "model.safetensors").read_bytes()


def test_a_line_of_metrics_that_was_cut_short_is_left_out(tmp_path, text):
    folder = RunFolder(tmp_path / "run")
    run(trainer(text), folder, report_every=3, time_limit=0)
    with open(folder.metrics, "a") as file:
        file.write('{"step": 2, "lo')
    run(trainer(text), folder, resume=True, report_every=3)
    assert [row["step"] for row in folder.rows()] == [1, 3, 6, 9, 12, 12]
    folder.metrics.write_text("{\n" + folder.metrics.read_text())
    with pytest.raises(ValueError, match=r"metrics\.jsonl: line 1 is no JSON"):
        folder.rows()


def test_other_text_is_refused_and_nothing_is_half_loaded(tmp_path, text):
    some = trainer(text)
    some.step()
    some.save(tmp_path / "checkpoint")
    other = trainer(replace(text, train=text.train.flip(0)))
    before = weights(other)
    with pytest.raises(DataError, match="not the one this run was trained on"):
        other.load(tmp_path / "checkpoint")
    assert other.step_count == 0 and all(map(torch.equal, weights(other), before))


def test_bfloat16_autocasts_and_the_memory_stays_float32(text):
    some = trainer(text, replace(SETTINGS, precision="bfloat16"))
    exact = trainer(text)
    loss, exact_loss = some.step(), exact.step()
    assert loss != exact_loss and abs(loss - exact_loss) < 0.2
    assert some.memory.dtype == torch.float32


def test_a_run_is_never_overwritten_unasked(tmp_path, text):
    folder = RunFolder(tmp_path)
    run(trainer(text), folder)
    with pytest.raises(FileExistsError, match="holds a run already; --resume goes on"):
        run(trainer(text), folder)


def test_a_full_disk_leaves_the_last_checkpoint(tmp_path, text, monkeypatch):
    folder = RunFolder(tmp_path)
    some = trainer(text)
    some.step()
    folder.save(some)
    before = folder.checkpoint.read_bytes()
    some.step()

    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        folder.save(some)
    assert folder.checkpoint.read_bytes() == before
    assert not [p for p in tmp_path.iterdir() if p.name.startswith(".")]


@pytest.mark.slow
def test_recall_is_learned_with_memory_and_not_without():
    from memformer_kernels.cli.train import Job

    job = Job.make("recall", [], {}, {})
    some = job.trainer(CPU)
    while not some.done:
        some.step()
    figures = some.validate(everything=True)
    assert figures["memory"] == 1.0
    assert figures["reset"] < 0.12  # chance is 0.0625; 1024 rollouts spread it by 0.0076
    assert some.task.validate(some.model, reset=False, horizon=8) > 0.9, "it holds on for longer than it was trained"
