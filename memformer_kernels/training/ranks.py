"""Processes that train one model together: who each is, what is whose, and what they tell each other.

Every rank makes the same rollouts and takes its own lanes of them, so that where a run stands in its data does not
depend on the number of ranks. What is carried along a lane stays on the lane's rank.
"""

import contextlib
import gc
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

PATIENCE = timedelta(minutes=10)  # for the others, the first rank's writing of a checkpoint included


@dataclass(frozen=True)
class Ranks:
    """One of the ranks; `Ranks(device)` is a process that trains alone.

    Attributes:
        device: of this rank.
        rank, world: number of this rank, and of all.
        shard: each rank holds a part of the parameters, gradients and optimiser (FSDP2), not a copy of all (DDP).
    """

    device: torch.device
    rank: int = 0
    world: int = 1
    shard: bool = False

    @property
    def first(self) -> bool:
        """The rank that prints and writes."""
        return self.rank == 0

    def lanes(self, batch: int) -> slice:
        """This rank's part of the lanes; raises `ValueError` where they cannot be dealt out evenly."""
        if batch % self.world:
            raise ValueError(f"train: batch must be a multiple of the {self.world} ranks, got {batch}")
        each = batch // self.world
        return slice(self.rank * each, (self.rank + 1) * each)

    def wrap(self, rollout: nn.Module) -> nn.Module:
        """A module whose forward is a whole rollout, with gradients that are the mean over the ranks after backward.

        The root alone is sharded. A layer that is sharded by itself gives its parameters back after each segment, and
        the gradients of a replayed rollout with them.
        """
        if self.world == 1:
            return rollout
        if self.shard:
            mesh = dist.init_device_mesh(self.device.type, (self.world,))
            return fully_shard(rollout, mesh=mesh, reshard_after_forward=False)
        # Gradients come all at once, from one node: one bucket is best. DDP cuts buckets again after the first step, so
        # that a resumed run would add up in another order; but not where it looks for unused parameters, as those of
        # the memory's writer are in a rollout of one segment. One that always is keeps it from warning that none is
        rollout.register_parameter("unused", nn.Parameter(torch.empty(0, device=self.device)))
        return nn.parallel.DistributedDataParallel(rollout, find_unused_parameters=True, bucket_cap_mb=2**20)

    @contextlib.contextmanager
    def whole(self, rollout: nn.Module) -> Iterator[None]:
        """Inside, all parameters of a wrapped rollout are there, for its model to run outside it."""
        sharded = self.world > 1 and self.shard
        if sharded:
            rollout.unshard()
        try:
            yield
        finally:
            if sharded:
                rollout.reshard()

    def mean(self, value: Tensor) -> float:
        """The mean over the ranks."""
        if self.world == 1:
            return value.item()
        total = value.detach().clone()
        dist.all_reduce(total)
        return total.item() / self.world

    def any(self, *flags: bool) -> list[bool]:
        """Of each flag, whether it is up on any rank: the same answer on all."""
        if self.world == 1:
            return list(flags)
        raised = torch.tensor(flags, dtype=torch.int32, device=self.device)
        dist.all_reduce(raised, dist.ReduceOp.MAX)
        return raised.bool().tolist()

    def wait(self) -> None:
        """Until all ranks are here."""
        if self.world > 1:
            dist.barrier()

    def gather_shards(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """All of each sharded tensor, any other as it is, on the CPU of the first rank; nothing on the others."""
        whole = {}
        for name, tensor in sorted(tensors.items()):  # in one order on all ranks, as each waits for the others
            full = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
            if self.first:
                whole[name] = full.cpu()
        return whole

    def gather(self, tensor: Tensor) -> list[Tensor]:
        """Every rank's tensor, all of one shape, on the CPU."""
        if self.world == 1:
            return [tensor.cpu()]
        mine = tensor.to(self.device).contiguous()
        every = [torch.empty_like(mine) for _ in range(self.world)]
        dist.all_gather(every, mine)
        return [each.cpu() for each in every]

    def gather_random(self) -> dict[str, Tensor]:
        """The random state of every rank, by name; those of the first rank have the names of a process alone."""
        states = {"cpu": torch.get_rng_state()}
        if self.device.type == "cuda":
            states["cuda"] = torch.cuda.get_rng_state(self.device)
        gathered = {kind: self.gather(state) for kind, state in states.items()}
        return {_name(kind, rank): state for kind, states in gathered.items() for rank, state in enumerate(states)}

    def set_random(self, states: dict[str, Tensor], seed: int, step: int) -> None:
        """This rank's random state; where there is none, of a run by fewer ranks, a fresh one."""
        torch.manual_seed(hash((seed, step, self.rank)))
        if (state := states.get(_name("cpu", self.rank))) is not None:
            torch.set_rng_state(state)
        if self.device.type == "cuda" and (state := states.get(_name("cuda", self.rank))) is not None:
            torch.cuda.set_rng_state(state, self.device)


def _name(kind: str, rank: int) -> str:
    return kind if rank == 0 else f"{kind}.{rank}"


def dealt(tensor: Tensor, like: Tensor) -> Tensor:
    """A tensor that every rank has, sharded as `like` is; one of another shape as it is."""
    if not isinstance(like, DTensor) or tensor.shape != like.shape:
        return tensor
    return distribute_tensor(tensor.to(like.device), like.device_mesh, like.placements, src_data_rank=None)


@contextlib.contextmanager
def joined(device: torch.device, *, shard: bool = False) -> Iterator[Ranks]:
    """The ranks that torchrun started, for the time of the block; this process alone if it did not.

    Raises `ValueError` where a rank has no GPU of its own. An error inside the block leaves the group as it is: to take
    it down may wait for the others, who learn of the error when this process ends. No trainer may outlive the block.
    """
    world = int(os.environ.get("WORLD_SIZE", 1))
    if world == 1:
        yield Ranks(device)
        return
    device = _own_device(device)
    backend = "nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, timeout=PATIENCE, device_id=device if device.type == "cuda" else None)
    yield Ranks(device, dist.get_rank(), world, shard)
    gc.collect()  # DDP's reducer, the last to hold the group, takes it down with the lock that its threads may need
    dist.destroy_process_group()


def _own_device(device: torch.device) -> torch.device:
    """The GPU of this rank's number on its machine."""
    if device.type != "cuda":
        return device
    if device.index is not None:
        raise ValueError(f"train: device must be given without a number where each rank has its own, got {device}")
    local, there = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
    if local >= there:
        raise ValueError(f"train: each rank must have a GPU of its own, got rank {local} of a machine with {there}")
    own = torch.device("cuda", local)
    torch.cuda.set_device(own)
    return own
