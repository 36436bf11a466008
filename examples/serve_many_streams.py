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

CLIENTS, STREAMS, WIDTH, ROUNDS_IN_A_ROW = 12, 4, 3, 3


def main() -> None:
    torch.manual_seed(0)
    pace = random.Random(0)
    model = MemformerLM(MemformerLMConfig(width=32, heads=2, hidden=64, layers=2, slots=4, segment_length=16)).eval()
    texts = [torch.randint(256, (pace.randint(50, 200),)) for _ in range(CLIENTS)]
    nats: list[list[torch.Tensor]] = [[] for _ in texts]
    pool = StreamPool(model, STREAMS, width=WIDTH)

    with tempfile.TemporaryDirectory() as folder:
        waiting, served = deque(range(CLIENTS)), {}
        while waiting or served:
            while waiting and len(pool) < pool.streams:
                client = waiting.popleft()
                file = Path(folder) / f"{client}.safetensors"
                served[client] = pool.load(file) if file.exists() else pool.open()
            for _ in range(ROUNDS_IN_A_ROW):
                pieces = {}
                for client, lease in served.items():
                    start = pool.tokens_read(lease)
                    pieces[client] = texts[client][start : start + pace.randint(1, 30)]
                results = pool.read(list(served.values()), list(pieces.values()))
                for client, result in zip(pieces, results, strict=True):
                    nats[client].append(result)
            for client, lease in list(served.items()):
                unfinished = pool.tokens_read(lease) < len(texts[client])
                if unfinished and not waiting:
                    continue
                if unfinished:
                    pool.save(lease, Path(folder) / f"{client}.safetensors", stream_id=str(client))
                    waiting.append(client)
                pool.close(served.pop(client))

    for client, text in enumerate(texts):
        bits = torch.cat(nats[client]).mean() / math.log(2)
        print(f"client {client:2}: {len(text):3} bytes, {bits:.4f} bits per byte")
    alone = stream(model, WIDTH).read(texts[0].expand(WIDTH, -1))[0]
    same = torch.equal(torch.cat(nats[0]), alone)
    print("client 0 got the same bits as alone" if same else "client 0 got other bits than alone")


if __name__ == "__main__":
    main()
