"""`memory_replay` inside DistributedDataParallel: two processes equal one that has the whole batch."""

import gc

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing
from replay_cells import assert_close, of_module
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from memformer_kernels import MemformerLM, MemformerLMConfig, memory_replay

pytestmark = pytest.mark.guarantee("G16")

RANKS, ROWS, HORIZON = 2, 4, 4
CONFIG = MemformerLMConfig(vocabulary=17, width=8, heads=2, layers=2, hidden=16, slots=3, segment_length=5)


class Rollout(nn.Module):
    """What DistributedDataParallel must wrap: its forward is the whole rollout."""

    def __init__(self, method="replay"):
        super().__init__()
        torch.manual_seed(0)
        self.model, self.method = MemformerLM(CONFIG), method

    def forward(self, tokens):
        segments = [(t[:, :-1], t[:, 1:]) for t in tokens.unbind(1)]
        start = self.model.initial_memory(len(tokens))
        losses, memory = memory_replay(self.model.loss, segments, start, method=self.method)
        return torch.stack(losses).mean() + memory.square().mean()


def batch(seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(CONFIG.vocabulary, (ROWS, HORIZON, CONFIG.segment_length + 1), generator=generator)


def share(tokens):
    return tokens.chunk(RANKS)[dist.get_rank()]


def step(wrapped, tokens):
    wrapped(share(tokens)).backward()


def grads_of(model):
    return {name: p.grad for name, p in of_module(model).items()}


def grads_of_one_process(*batches):
    """Of the whole batch, by full back-propagation."""
    model = Rollout("bptt")
    for tokens in batches:
        model(tokens).backward()
    return grads_of(model)


def assert_synchronised(model, expected):
    assert_close(grads_of(model), expected, 5e-6)
    for p in model.parameters():
        if p.grad is not None:
            others = [torch.empty_like(p.grad) for _ in range(RANKS)]
            dist.all_gather(others, p.grad)
            assert all(torch.equal(p.grad, other) for other in others)


def test_two_processes_equal_one_with_the_whole_batch(tmp_path):
    torch.multiprocessing.spawn(_worker, args=(str(tmp_path / "meeting"),), nprocs=RANKS)


def _worker(rank, meeting):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=RANKS)
    try:
        _one_step()
        _one_step(gradient_as_bucket_view=True, bucket_cap_mb=0.001)  # many small buckets, ready one after the other
        _one_step(static_graph=True)
        _unused_parameters()
        _accumulation()
        _one_reduction()
    finally:
        gc.collect()  # a reducer that outlives the group may bring the process down at its end
        dist.destroy_process_group()


def _one_step(**options):
    tokens, model = batch(1), Rollout()
    expected = grads_of_one_process(tokens)
    step(DistributedDataParallel(model, **options), tokens)
    assert_synchronised(model, expected)
    # the halves of the batch are not alike: a gradient that was not exchanged would show
    alone = grads_of_one_process(share(tokens))["model.head.weight"]
    assert (alone - expected["model.head.weight"]).abs().max() > 0.01 * alone.abs().max()


def _unused_parameters():
    """They are not among the inputs of the rollout's node, so DistributedDataParallel finds them."""
    tokens, model = batch(1), Rollout()
    model.model.unused = nn.Linear(2, 2)
    wrapped = DistributedDataParallel(model, find_unused_parameters=True)
    for _ in range(2):  # a parameter that was waited for would stop the second step
        model.zero_grad()
        step(wrapped, tokens)
    unused = {"model.unused.weight": None, "model.unused.bias": None}
    assert_synchronised(model, {**grads_of_one_process(tokens), **unused})


def _accumulation():
    batches, model = [batch(2), batch(3), batch(4)], Rollout()
    wrapped = DistributedDataParallel(model)
    with wrapped.no_sync():
        step(wrapped, batches[0])
        step(wrapped, batches[1])
    step(wrapped, batches[2])
    assert_synchronised(model, grads_of_one_process(*batches))


def _one_reduction():
    """One bucket, reduced once a step and not once a segment."""
    calls, tokens, model = [], batch(1), Rollout()

    def reduce(state, bucket):
        calls.append(bucket.index())
        return dist.all_reduce(bucket.buffer() / RANKS, async_op=True).get_future().then(lambda f: f.value()[0])

    wrapped = DistributedDataParallel(model)
    wrapped.register_comm_hook(None, reduce)
    step(wrapped, tokens)
    assert calls == [0]
    assert_synchronised(model, grads_of_one_process(tokens))
