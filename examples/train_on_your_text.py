"""Trains a byte model on your own text by exact memory replay, and lets it continue.

python examples/train_on_your_text.py my_texts/ --steps 500
"""

import argparse

import torch

from memformer_kernels import MemformerLM, MemformerLMConfig, generate, memory_replay
from memformer_kernels.data import Lanes, Text

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("paths", nargs="*", help="files and folders; by default Python's standard library")
parser.add_argument("--steps", type=int, default=500)
options = parser.parse_args()

device = "cuda" if torch.cuda.is_available() else "cpu"
torch.manual_seed(0)
text = Text.read(options.paths)
model = MemformerLM(MemformerLMConfig(width=64, heads=2, hidden=256, layers=2, slots=16, segment_length=32)).to(device)
optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
lanes = Lanes(text.train.to(device), 16)  # 16 places of the text, read side by side
memory = model.initial_memory(16)

for step in range(1, options.steps + 1):
    segments = lanes.rollout(
        8, model.config.segment_length
    )  # the next 8 of each lane; gradients go through all of them
    loss, memory = memory_replay(model.cell, segments, memory, reduction="mean")
    optimizer.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    memory = memory.detach()  # what was read stays in memory; gradients stop here
    if step % 50 == 0 or step == options.steps:
        print(f"step {step}: {loss.item():.3f} nats a byte")

model.eval()
prompt = text.validation[None, :100].to(device)
more, _ = generate(model, prompt, 200, temperature=0.7)
print(bytes(prompt[0].tolist() + more[0].tolist()).decode(errors="replace"))
