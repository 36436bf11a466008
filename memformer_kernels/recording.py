"""A function recorded once as a CUDA graph, then replayed without its Python and its launches."""

import contextlib
import functools
import gc
from collections.abc import Callable, Iterator, Sequence
from typing import Generic, TypeVar

import torch
from torch import nn

Result = TypeVar("Result")


class Recording(Generic[Result]):
    """`replay()` does what `body()` did when it was recorded, on the same tensors.

    On a GPU `body` is captured: it reads its inputs from tensors that stay, and what it returns stays too and is
    overwritten by the next replay. It must not wait for the GPU, nor decide anything by values. On a CPU `replay` calls
    `body`, so that what is built on recordings is the same code everywhere.

    Args:
        body: a function without arguments. It runs `warm_ups` times before it is recorded (kernels are compiled,
            libraries set up their workspaces), so that running it once more must do no harm.
        device: where its tensors lie.
        pool: memory that recordings share, from `torch.cuda.graph_pool_handle()`. What one of them leaves in it,
            another may overwrite, but for tensors that are still referred to while the other is recorded.
        generators: states that `body` draws from besides the default generator's.
    """

    def __init__(
        self,
        body: Callable[[], Result],
        device: torch.device,
        *,
        pool: tuple | None = None,
        warm_ups: int = 2,
        generators: Sequence[torch.Generator] = (),
    ):
        self._body, self._graph = body, None
        if device.type != "cuda":
            return
        with torch.cuda.device(device):
            with aside(device):
                for _ in range(warm_ups):
                    body()
            graph = torch.cuda.CUDAGraph()
            for generator in generators:
                graph.register_generator_state(generator)
            recording = torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local")
            with _put_right_if_it_fails(), _no_garbage_collection(), recording:
                self._result = body()
            _free_workspaces()
        self._body, self._graph = None, graph  # the graph holds what it needs, but not what the closure holds

    def replay(self) -> Result:
        if self._graph is None:
            return self._body()
        self._graph.replay()
        return self._result


@contextlib.contextmanager
def _no_garbage_collection() -> Iterator[None]:
    """A graph that is destroyed meanwhile ends the capture with an error."""
    gc.collect()
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


@contextlib.contextmanager
def _put_right_if_it_fails() -> Iterator[None]:
    """A capture that fails leaves PyTorch on its stream, and the generator as if it went on. The pool is lost."""
    stream, generator = torch.cuda.current_stream(), torch.cuda.default_generators[torch.cuda.current_device()]
    spare = generator.clone_state()
    try:
        yield
    except BaseException:
        torch.cuda.set_stream(stream)
        generator.graphsafe_set_state(spare)
        raise


@contextlib.contextmanager
def aside(device: torch.device) -> Iterator[None]:
    """A stream of its own, as what is to be captured must be warmed up on; a CPU has none."""
    if device.type != "cuda":
        yield
        return
    with torch.cuda.device(device):
        stream = _side_stream(torch.cuda.current_device())
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            yield
        torch.cuda.current_stream().wait_stream(stream)
        _free_workspaces()


@functools.cache
def _side_stream(index: int) -> torch.cuda.Stream:
    return torch.cuda.Stream(index)


def _free_workspaces() -> None:
    """cuBLAS keeps 32 MiB for every pair of thread and stream that it was called from. What a graph needs of them stays
    in its pool all the same, where the pool's next graph, which never runs at the same time, uses it too."""
    if hasattr(torch._C, "_cuda_clearCublasWorkspaces"):
        torch._C._cuda_clearCublasWorkspaces()


@contextlib.contextmanager
def cast_anew() -> Iterator[None]:
    """Autocast casts a weight at every use. What it keeps until its end, no recording may read."""
    kept = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)
    try:
        yield
    finally:
        torch.set_autocast_cache_enabled(kept)


def dependencies_of(module: nn.Module) -> tuple:
    """What a recording of a module is made for besides its arguments: when this changed, it must be made anew.

    The addresses of parameters and buffers, not what stands there; whether it is training; and autocast.
    """
    tensors = [*module.parameters(), *module.buffers()]
    kinds = sorted({t.device.type for t in tensors if torch.amp.is_autocast_available(t.device.type)})
    autocast = [(torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)) for kind in kinds]
    return [(t.data_ptr(), t.dtype, t.device) for t in tensors], module.training, autocast
