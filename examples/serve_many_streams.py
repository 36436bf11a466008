"""Twelve clients, each with a text of its own length and pace, served by a pool that holds four texts at a time.

In every round the texts that have something to read are read together, whatever each of them has. Where a client
waits, another one's text is set aside in a file and taken up later, bit for bit. Run it without arguments.
"""

import math
import random
import tempfile
from collections import deque
from pathlib import Path

import torch

from memformer_kernels import MemformerLM, MemformerLMConfig, StreamPool, stream

torch.manual_seed(0)
pace = random.Random(0)
model = MemformerLM(MemformerLMConfig(width=32, heads=2, hidden=64, layers=2, slots=4, segment_length=16)).eval()
texts = [torch.randint(256, (pace.randint(50, 200),)) for _ in range(12)]
nats: list[list[torch.Tensor]] = [[] for _ in texts]
pool = StreamPool(model, streams=4, width=3)

with tempfile.TemporaryDirectory() as folder:
    files = [Path(folder) / f"{client}.safetensors" for client in range(len(texts))]
    waiting, served = deque(range(len(texts))), {}
    while waiting or served:
        while waiting and len(pool) < pool.streams:
            client = waiting.popleft()
            served[client] = pool.load(files[client]) if files[client].exists() else pool.open()
        for _ in range(3):  # rounds in a row
            starts = {client: pool.tokens_read(lease) for client, lease in served.items()}
            pieces = [texts[client][start : start + pace.randint(1, 30)] for client, start in starts.items()]
            for client, result in zip(served, pool.read(list(served.values()), pieces), strict=True):
                nats[client].append(result)
        for client, lease in list(served.items()):
            unfinished = pool.tokens_read(lease) < len(texts[client])
            if unfinished and not waiting:
                continue
            if unfinished:
                pool.save(lease, files[client], stream_id=str(client))
                waiting.append(client)
            pool.close(served.pop(client))

for client, text in enumerate(texts):
    print(f"client {client:2}: {len(text):3} bytes, {torch.cat(nats[client]).mean() / math.log(2):.4f} bits per byte")
alone = stream(model, 3).read(texts[0].expand(3, -1))[0]  # three wide, as the pool reads
print("client 0 got", "the same bits as alone" if torch.equal(torch.cat(nats[0]), alone) else "OTHER bits than alone")
