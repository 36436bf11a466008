"""What a text was read into, as a state file: for the model that read it and for no other."""

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor

from memformer_kernels.state import files
from memformer_kernels.state.files import StateFileError

if TYPE_CHECKING:
    from memformer_kernels.models.recurrent import Recurrent

KIND = "stream"
HOW_IT_RUNS = ("dropout", "recompute", "backend")  # fields of a configuration that do not change what a state means


def save_state(
    path: str | Path, model: "Recurrent", state: Mapping[str, Tensor], *, stream_id: str | None, step: int | None
) -> None:
    """Writes `Stream.state()`; raises `ValueError` for one with NaN or infinities, which would not load."""
    for name, tensor in state.items():
        if not files.all_finite(tensor):
            raise ValueError(f"stream: state {name!r} must be finite to be saved, got NaN or infinity")
    metadata = {"kind": KIND, **_description(model), "stream_id": stream_id, "step": step}
    files.save_tensors(path, state, metadata)


def load_state(path: str | Path, model: "Recurrent", like: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict]:
    """`(state, metadata)` on the CPU, of the names, shapes and dtypes of `like`.

    Raises `StateFileError` for a missing, damaged or foreign file, and for one of another model, configuration or
    weights.
    """
    state, metadata = files.load_tensors(path, kind=KIND, expected=like, finite=True)
    for field, want in _description(model).items():
        got = metadata.get(field)
        if got == want:
            continue
        if field == "config" and isinstance(got, dict):
            name = next(name for name in sorted(want.keys() | got.keys()) if want.get(name) != got.get(name))
            field, want, got = f"config.{name}", want.get(name), got.get(name)
        raise StateFileError(f"{path}: is of another model: {field} must be {want!r}, got {got!r}")
    for name, most in (("tokens", model.config.vocabulary - 1), ("filled", model.config.segment_length - 1)):
        if ((state[name] < 0) | (state[name] > most)).any():
            raise StateFileError(f"{path}: tensor {name!r} must be from 0 to {most}, got {state[name].tolist()}")
    step, stream_id = metadata.get("step"), metadata.get("stream_id")
    if step is not None and (type(step) is not int or step < 0):
        raise StateFileError(f"{path}: field 'step' must be a count, got {step!r}")
    if stream_id is not None and not isinstance(stream_id, str):
        raise StateFileError(f"{path}: field 'stream_id' must be a string, got {stream_id!r}")
    return state, metadata


def _description(model: "Recurrent") -> dict:
    config = {n: v for n, v in dataclasses.asdict(model.config).items() if n not in HOW_IT_RUNS}
    weights = {name: files.digest(name, tensor) for name, tensor in model.state_dict().items()}
    fingerprint = hashlib.sha256(json.dumps(weights, sort_keys=True).encode()).hexdigest()
    return {"model": type(model).__name__, "config": config, "weights": fingerprint}
