"""How much memory a rollout needs at its peak, by each method of `memory_replay`."""

import multiprocessing
import os
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from itertools import accumulate

import torch
from torch.autograd.profiler import profile

from memformer_kernels.models import MemformerLM, MemformerLMConfig
from memformer_kernels.replay.api import memory_replay


def measure(
    method: str, horizon: int, config: MemformerLMConfig, *, batch: int = 1, device: str | torch.device = "cpu"
) -> int:
    """Peak bytes of a forward and backward pass of a `MemformerLM` over `horizon` full segments, in float32.

    Counted are the tensors made on the way, gradients included; not counted are the model and the tokens. The model
    and the tokens are random, from a fixed seed.
    """
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = MemformerLM(config).to(device)
        tokens = torch.randint(config.vocabulary, (horizon, batch, config.segment_length + 1)).to(device)
    segments = [(t[:, :-1], t[:, 1:]) for t in tokens]

    def rollout(segments: list) -> None:
        losses, _ = memory_replay(model.loss, segments, model.initial_memory(batch), method=method)
        torch.stack(losses).mean().backward()

    rollout(segments[:1])  # what libraries set aside at their first call is not the rollout's
    model.zero_grad(set_to_none=True)
    return peak_bytes(lambda: rollout(segments), torch.device(device))


def measure_in_fresh_process(
    method: str, horizon: int, config: MemformerLMConfig, *, batch: int = 1, device: str | torch.device = "cpu"
) -> int:
    """`measure` in a process of its own, so that no measurement sees what another left in the allocator.

    A script that calls it needs the guard `if __name__ == "__main__":`, as all that start processes do.
    """
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(measure, method, horizon, config, batch=batch, device=device).result()


def stored_bytes(horizon: int, config: MemformerLMConfig, *, batch: int = 1) -> int:
    """Bytes of the memories m_0 .. m_S, the part of a replayed rollout that grows: (S + 1) B M C 4."""
    return (horizon + 1) * batch * config.slots * config.width * 4


def peak_bytes(run: Callable[[], object], device: torch.device) -> int:
    """The most bytes that tensors made in `run` take up at one time on the device.

    On a GPU the caching allocator counts them. On a CPU the profiler records every allocation and release of PyTorch's
    allocator, and this adds them up in order: the same number each time. Workspaces of libraries are in neither.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler tells stderr when it starts and stops
    with profile(profile_memory=True) as recorded:
        run()
    events = [e for e in recorded.kineto_results.events() if e.name() == "[memory]"]
    events.sort(key=lambda e: e.start_ns())
    return max(accumulate((e.nbytes() for e in events), initial=0))
