"""One rollout a step on every GPU, gradients averaged once: DDP round a module whose forward is the whole rollout.

torchrun --nproc-per-node 2 examples/two_gpus.py    (without GPUs it runs on CPUs, over gloo)
"""

import gc
import os

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from memformer_kernels import MemformerLM, MemformerLMConfig, memory_replay


class Rollout(torch.nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, segments):
        start = self.model.initial_memory(segments[0][0].shape[0])
        return memory_replay(self.model.cell, segments, start, reduction="mean")[0]


cuda = torch.cuda.is_available()
rank = int(os.environ["RANK"])
device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if cuda else torch.device("cpu")
dist.init_process_group("nccl" if cuda else "gloo", device_id=device if cuda else None)
torch.manual_seed(0)  # the same weights on every rank
config = MemformerLMConfig(width=32, heads=2, hidden=64, layers=2, slots=4, segment_length=16)
rollout = DistributedDataParallel(Rollout(MemformerLM(config).to(device)))
optimizer = torch.optim.AdamW(rollout.parameters(), lr=1e-3)

for step in range(5):
    text = torch.randint(256, (4, 4 * 16 + 1), generator=torch.Generator().manual_seed(100 * step + rank)).to(device)
    loss = rollout([(text[:, i : i + 16], text[:, i + 1 : i + 17]) for i in range(0, 64, 16)])
    optimizer.zero_grad()
    loss.backward()  # the one reduction of the step
    optimizer.step()

total = sum(p.detach().double().sum() for p in rollout.parameters())
totals = [torch.zeros_like(total) for _ in range(dist.get_world_size())]
dist.all_gather(totals, total)
if rank == 0:
    same = all(torch.equal(other, total) for other in totals)
    print(f"{len(totals)} ranks on {device.type}, loss {loss.item():.3f}; weights {'equal' if same else 'DIFFER'}")
del rollout, optimizer, loss
gc.collect()  # DDP, which must not outlive the group
dist.destroy_process_group()
