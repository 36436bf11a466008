"""A model of the PyPI package memformer on the kernels of this one, and its document back-propagated by exact replay.

pip install memformer==0.3.1 && python examples/accelerate_memformer.py
"""

import torch
from memformer import Memformer
from memformer import memory_replay_backprop as their_replay

from memformer_kernels import accelerate
from memformer_kernels.integrations.memformer import memory_replay_backprop

device = "cuda" if torch.cuda.is_available() else "cpu"
torch.manual_seed(0)
encoder = dict(enc_num_tokens=256, enc_depth=2, enc_heads=4, enc_max_seq_len=64)
decoder = dict(dec_num_tokens=256, dec_depth=2, dec_heads=4, dec_max_seq_len=64)
model = Memformer(dim=128, num_memory_slots=16, mem_update_attn_heads=4, **encoder, **decoder).to(device)
document = torch.randint(256, (4, 8 * 64), device=device)  # 8 segments
tgt = torch.randint(256, (4, 64), device=device)  # what the decoder is to say after the last one
mask = torch.rand(document.shape, device=device) > 0.1


def gradients() -> torch.Tensor:
    """Of all parameters, in one vector; the next ones start from zero."""
    found = torch.cat([p.grad.flatten() for p in model.parameters()])
    model.zero_grad()
    return found


results = model(document[:, :64], tgt, src_mask=mask[:, :64])
their_replay(model, document, tgt, mask)
expected = gradients()

report = accelerate(model)
print(report, end="\n\n")

accelerated = model(document[:, :64], tgt, src_mask=mask[:, :64])
error = max((a - b).abs().max() for a, b in zip(accelerated, results, strict=True))
print(f"outputs differ by at most {error:.0e}")

loss, memory = memory_replay_backprop(model, document, tgt, mask)
error = (gradients() - expected).norm() / expected.norm()
print(f"loss {loss:.3f} after 8 segments; gradients differ by {error:.0e} of their norm from the package's own replay")

report.restore()
print(f"restored: {type(model).__module__}.{type(model).__name__}")
