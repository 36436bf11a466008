"""A module that is sharded by itself cannot be called in a replayed rollout: it is refused.

FSDP gathers a module's parameters before its forward and gives them back after it. The rollout's one gradient would go
to the gathered ones, which are no longer those of the module, and be lost without a word.
"""

import contextlib
import sys
from collections.abc import Iterable, Iterator

from torch import nn


@contextlib.contextmanager
def refused(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Inside, no sharded module among these may be called. Raises `NotImplementedError`.

    One that is in its forward already, the whole rollout in it, has its parameters for as long as they are needed.
    """
    fsdp = sys.modules.get(
        "torch.distributed.fsdp"
    )  # nothing is sharded by what was never imported: that takes a second
    kinds = (fsdp.FSDPModule, fsdp.FullyShardedDataParallel) if fsdp else ()
    sharded = [module for module in modules if isinstance(module, kinds)]
    for module in reversed(sharded):  # an inner one is the one to name
        if any(hasattr(p, "placements") for p in module.parameters()):  # a DTensor
            _refuse(module)
    with contextlib.ExitStack() as stack:
        for module in sharded:
            stack.callback(module.register_forward_pre_hook(lambda module, _: _refuse(module), prepend=True).remove)
        yield


def _refuse(module: nn.Module) -> None:
    raise NotImplementedError(
        f"memory_replay: cell must have no module that is sharded by itself, got {type(module).__name__}, whose "
        f"parameters FSDP gives back after each forward, and their gradients with them; fully_shard one root module "
        f'instead, whose forward is the whole rollout, or take method="checkpoint"'
    )
