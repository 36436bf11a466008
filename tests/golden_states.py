"""What the files in `tests/golden` hold, in numbers that every machine has alike. Run as a script, it writes them.

They pin version 1 of the format: where it must change, `VERSION` changes and these files stay beside new ones.
"""

from pathlib import Path

import torch

from memformer_kernels import Memformer, MemformerConfig, MemformerLM, MemformerLMConfig, stream
from memformer_kernels.state import files

GOLDEN = Path(__file__).parent / "golden"
SIZES = dict(vocabulary=5, width=4, heads=2, hidden=4, slots=2, segment_length=3, dropout=0.0)
TENSORS = GOLDEN / "tensors_v1.safetensors"
METADATA = {"kind": "golden", "step": 7, "stream_id": "ünï", "nested": {"list": [1, 2.5, None, True]}}


def numbers(*shape, dtype=torch.float32):
    """Multiples of 1/64 below 1/2, exact in each dtype that holds them; small integers otherwise."""
    count = torch.arange(torch.Size(shape).numel()) * 37 % 64 - 32
    return (count / 64 if dtype.is_floating_point else count.abs() % 3).to(dtype).reshape(shape)


def tensors():
    """Every dtype, and the shapes at the edge."""
    made = {code: numbers(2, 3, dtype=dtype) for code, dtype in files.DTYPES.items()}
    special = torch.tensor([float("nan"), float("inf"), -0.0, 1e-40])
    return made | {"scalar": torch.tensor(1.5), "empty": torch.empty(0, 3), "special": special}


def model(kind):
    if kind is MemformerLM:
        made = MemformerLM(MemformerLMConfig(layers=1, **SIZES))
    else:
        made = Memformer(MemformerConfig(encoder_layers=1, decoder_layers=1, **SIZES))
    made.load_state_dict({name: numbers(*t.shape) for name, t in made.state_dict().items()})
    return made.eval()


def texts(kind):
    """Two texts, with a state that no model made, so that no rounding is in it."""
    made = stream(model(kind), 2)
    state = {name: numbers(*t.shape, dtype=t.dtype) for name, t in made.state().items()}
    made.load_state(state | {"filled": torch.tensor([0, 2])})
    return made


def path_of(kind):
    return GOLDEN / f"{kind.__name__.lower()}_stream_v1.safetensors"


if __name__ == "__main__":
    GOLDEN.mkdir(exist_ok=True)
    files.save_tensors(TENSORS, tensors(), METADATA)
    for kind in (MemformerLM, Memformer):
        texts(kind).save(path_of(kind), stream_id="golden", step=11)
