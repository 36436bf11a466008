"""Training over ranks, real processes over gloo: the run of one process to rounding, stopped and taken up by any."""

import json
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import time
from dataclasses import replace
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from memformer_kernels import MemformerLM, MemformerLMConfig, memory_replay
from memformer_kernels.data import Text
from memformer_kernels.training import Settings, Trainer
from memformer_kernels.training import ranks as ranks_module
from memformer_kernels.training.ranks import Ranks, joined
from memformer_kernels.training.run import Interrupted, RunFolder, run
from memformer_kernels.training.tasks import RecallTraining, TextTask

CPU = torch.device("cpu")
RANKS = 2
CONFIG = MemformerLMConfig(width=16, heads=2, layers=2, hidden=32, slots=3, segment_length=6)
# Every step is clipped. A rollout of one segment leaves the memory's writer without a gradient
SETTINGS = Settings(steps=6, batch=4, horizons=(1, 2), warmup=2, clip=0.1, weight_decay=0.1)
DROPOUT = replace(CONFIG, dropout=0.2)


def text():
    generator = torch.Generator().manual_seed(0)
    train = torch.randint(97, 123, (3000,), generator=generator, dtype=torch.uint8)
    return Text(train, train[:400], files=1, skipped=0)


def trainer(ranks=None, config=CONFIG, settings=SETTINGS, task="text"):
    if task == "recall":
        made = RecallTraining(settings.batch, config.segment_length, settings.horizons[-1], CPU, settings.seed)
    else:
        made = TextTask(text(), settings.batch, config.segment_length, CPU)
    return Trainer(config, settings, made, CPU, ranks)


def steps(some, count):
    return [some.step() for _ in range(count)]


def assert_same_run(some, losses, whole, expected_losses, tolerance):
    """The trainer of a rank and that of a process alone; tolerance 0 is bit for bit."""
    close = dict(rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(losses, expected_losses, **close)
    torch.testing.assert_close(some.memory, whole.memory[some.lanes], **close)
    for name, weight in whole.weights().items():
        ours = some.model.state_dict()[name]
        ours = ours.full_tensor() if isinstance(ours, DTensor) else ours
        torch.testing.assert_close(ours, weight, **close, msg=lambda m, name=name: f"{name}: {m}")
    assert len(some.optimizer.state) == len(whole.optimizer.state)


# Processes: started from one that has imported everything, in no time.


@pytest.fixture(scope="module", autouse=True)
def forkserver():
    multiprocessing.set_forkserver_preload(["pytest", "memformer_kernels.training.run"])


def together(check, *arguments):
    """Runs `check(ranks, *arguments)` on every rank, and raises what one of them raises."""
    options = dict(nprocs=RANKS, start_method="forkserver")
    torch.multiprocessing.start_processes(_rank, args=(check, _free_port(), arguments), **options)


def _rank(rank, check, port, arguments):
    torch.set_num_threads(1)
    ranks_module.PATIENCE = timedelta(seconds=20)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(RANKS)}
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    with joined(CPU) as ranks:
        check(ranks, *arguments)


def _free_port():
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return probe.getsockname()[1]


SHARD = pytest.mark.parametrize("shard", [False, True], ids=["ddp", "fsdp"])


@SHARD
def test_two_ranks_train_as_one(shard):
    together(_train_as_one, shard)


def _train_as_one(ranks, shard):
    ranks = replace(ranks, shard=shard)
    recall = dict(config=replace(CONFIG, vocabulary=33), settings=replace(SETTINGS, horizons=(2,)), task="recall")
    twin = dict(settings=replace(SETTINGS, twin=True))
    for dtype, tolerance, options in (
        (torch.float32, 1e-4, {}),
        *((torch.float64, 1e-10, o) for o in ({}, recall, twin)),
    ):
        torch.set_default_dtype(dtype)
        whole, some = trainer(**options), trainer(ranks, **options)
        assert_same_run(some, steps(some, 4), whole, steps(whole, 4), tolerance)
        assert some.validate() == pytest.approx(whole.validate(), rel=tolerance)
    sharded = [p for p in some.model.parameters() if isinstance(p, DTensor)]
    assert len(sharded) == (len(list(some.model.parameters())) if shard else 0)
    assert all(p.to_local().numel() < p.numel() for p in sharded if p.shape[0] > 1)


def test_ranks_drop_other_activations():
    together(_drop_other)


def _drop_other(ranks):
    trainer(ranks, DROPOUT)
    ours, other = ranks.gather(torch.rand(4))
    assert not torch.equal(ours, other)


@pytest.mark.guarantee("G17")
@SHARD
def test_a_run_is_resumed_bit_for_bit_by_as_many_ranks(tmp_path, shard):
    together(_resume_bit_for_bit, tmp_path, shard)


def _resume_bit_for_bit(ranks, folder, shard):
    ranks = replace(ranks, shard=shard)
    whole = trainer(ranks, DROPOUT)
    losses = steps(whole, 3)
    whole.save(folder / "checkpoint")
    losses += steps(whole, 3)
    ranks.wait()
    torch.manual_seed(12345)
    second = trainer(ranks, DROPOUT)
    second.load(folder / "checkpoint")
    second.save(folder / "again")  # what was loaded, in the order it was loaded
    assert steps(second, 3) == losses[3:]
    assert torch.equal(second.memory, whole.memory)
    ours, theirs = second.weights(), whole.weights()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    ranks.wait()
    assert (folder / "checkpoint").read_bytes() == (folder / "again").read_bytes()


@SHARD
def test_a_run_is_resumed_by_another_number_of_ranks(tmp_path, shard):
    together(_resume_by_another_number, tmp_path, shard)


def _resume_by_another_number(ranks, folder, shard):
    ranks = replace(ranks, shard=shard)
    torch.set_default_dtype(torch.float64)
    whole = trainer()
    losses = steps(whole, 3)
    if ranks.first:
        whole.save(folder / "by one")
    several = trainer(ranks)
    steps(several, 3)
    several.save(folder / "by two")
    losses += steps(whole, 3)
    ranks.wait()

    more = trainer(ranks)
    more.load(folder / "by one")
    assert_same_run(more, steps(more, 3), whole, losses[3:], 1e-10)
    fewer = trainer()
    fewer.load(folder / "by two")
    assert_same_run(fewer, steps(fewer, 3), whole, losses[3:], 1e-10)


def test_all_ranks_stop_at_one_step_and_the_first_one_writes(tmp_path):
    together(_stop_together, tmp_path)


def _stop_together(ranks, folder):
    second = ranks.rank == 1
    late = RunFolder(folder / "late")
    some, rows = trainer(replace(ranks, shard=True)), []
    run(some, late, report=rows.append, report_every=1, time_limit=0 if second else None)
    assert some.step_count == 1 and bool(rows) == ranks.first
    assert [row["step"] for row in late.rows()] == [1, 1]
    assert MemformerLM.from_pretrained(late.path).config == CONFIG

    interrupted, some = RunFolder(folder / "interrupted"), trainer(ranks)
    make_rollout = some.task.rollout

    def rollout(horizon, length):
        if second and some.step_count == 2:
            os.kill(os.getpid(), signal.SIGINT)
        return make_rollout(horizon, length)

    some.task.rollout = rollout
    with pytest.raises(Interrupted, match="saved after step 3 of 6"):
        run(some, interrupted)
    resumed = trainer(ranks)
    run(resumed, interrupted, resume=True, report_every=1)
    assert [row["step"] for row in interrupted.rows()] == [4, 5, 6, 6]


def test_an_error_on_one_rank_ends_all():
    """Without anybody who ends the others, as torchrun does."""
    context, port, started = multiprocessing.get_context("forkserver"), _free_port(), time.monotonic()
    processes = [context.Process(target=_rank, args=(rank, _fail, port, ())) for rank in range(RANKS)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(30)
    codes = [process.exitcode for process in processes]
    for process in processes:
        process.kill()
    assert codes == [1, 1], f"after {time.monotonic() - started:.0f} s"


def _fail(ranks):
    sys.stderr = open(os.devnull, "w")  # noqa: SIM115
    some = trainer(ranks)
    some.step()
    if not ranks.first:
        raise OSError("planted")
    some.step()


class Layered(nn.Module):
    """A cell that calls layers, and the rollout around it."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(2))

    def cell(self, x, state):
        for layer in self.layers:
            state = torch.tanh(layer(state)) + x
        return state.sum(), state

    def forward(self, segments):
        losses, _ = memory_replay(self.cell, segments, torch.ones(2, 4))
        return torch.stack(losses).sum()


def test_layers_that_are_sharded_by_themselves_are_refused():
    together(_refuse_sharded_layers)


def _refuse_sharded_layers(ranks):
    mesh = dist.init_device_mesh("cpu", (RANKS,))
    segments = list(torch.ones(3, 2, 4))
    expected, root = Layered(), fully_shard(Layered(), mesh=mesh)
    expected(segments).backward()
    root(segments).backward()
    for ours, theirs in zip(root.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(ours.grad.full_tensor(), theirs.grad)

    def sharded(**options):
        some = Layered()
        for layer in some.layers:
            fully_shard(layer, mesh=mesh, **options)
        return fully_shard(some, mesh=mesh)

    refused = pytest.raises(NotImplementedError, match="no module that is sharded by itself, got FSDPLinear")
    with refused:
        sharded()(segments)
    unsharded = sharded(reshard_after_forward=False)
    with torch.no_grad():
        unsharded(segments)  # without gradients none is lost; the parameters now stay gathered
    with refused:
        unsharded(segments)
    with pytest.raises(NotImplementedError, match="got FSDPLayered"):
        root.forward(segments)  # outside its forward, which gathers


def test_lanes_that_cannot_be_dealt_out_are_refused():
    with pytest.raises(ValueError, match="train: batch must be a multiple of the 2 ranks, got 5"):
        trainer(Ranks(CPU, 0, 2), settings=replace(SETTINGS, batch=5))


def test_each_rank_has_a_gpu_of_its_own(monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(ValueError, match="must be given without a number where each rank has its own, got cuda:1"):
        ranks_module._own_device(torch.device("cuda:1"))
    with pytest.raises(ValueError, match="must have a GPU of its own, got rank 1 of a machine with 1"):
        ranks_module._own_device(torch.device("cuda"))


def test_the_command_runs_under_torchrun(tmp_path):
    small = {
        "device": "cpu",
        "steps": 4,
        "batch": 4,
        "segment-length": 8,
        "slots": 4,
        "width": 16,
        "heads": 2,
        "layers": 1,
    }
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(RANKS)]
    command = ["-m", "memformer_kernels.cli", "train", "--task", "recall", "--shard", "--out", str(tmp_path)]
    command += [word for name, value in small.items() for word in (f"--{name}", str(value))]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "120", "NO_COLOR": "1"}
    done = subprocess.run([*launch, *command], env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("on 2 ranks, cpu, 4 steps") == done.stdout.count("written to") == 1
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [4, 4] and (tmp_path / "loss.png").exists()
    MemformerLM.from_pretrained(tmp_path)
