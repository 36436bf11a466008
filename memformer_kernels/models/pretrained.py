"""Saving and loading: weights as `model.safetensors`, the configuration as `config.json`."""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor, nn

from memformer_kernels.state import files

INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
Model = TypeVar("Model", bound="Pretrained")


class Pretrained(nn.Module):
    """A model with a configuration dataclass, `config_class`, and `save_pretrained` / `from_pretrained`."""

    config_class: type

    def save_pretrained(self, path: str | Path, *, state_dict: Mapping[str, Tensor] | None = None) -> None:
        """Writes `config.json` and `model.safetensors` into the folder `path`, each atomically.

        `state_dict` is written in place of the model's own, where that is sharded.
        """
        path = Path(path)
        path.mkdir(parents=True, exist_ok=True)
        fields = dataclasses.asdict(self.config)
        config = {"model": type(self).__name__, **fields}
        metadata = {"kind": type(self).__name__, "config": fields}
        weights = self.state_dict() if state_dict is None else state_dict
        files.save_tensors(path / "model.safetensors", weights, metadata)
        files.write_atomically(path / "config.json", (json.dumps(config, indent=2) + "\n").encode())

    @classmethod
    def from_pretrained(cls: type[Model], path: str | Path, **changes: object) -> Model:
        """The model that `save_pretrained` wrote; raises `StateFileError` for a damaged or foreign one.

        `changes` go into the configuration of the loaded model: `backend="eager"`, `dropout=0.0`, say.
        """
        path = Path(path)
        config = cls.load_config(path / "config.json")
        weights, metadata = files.load_tensors(path / "model.safetensors", kind=cls.__name__)
        if metadata.get("config") != dataclasses.asdict(config):
            raise files.StateFileError(
                f"{path / 'config.json'}: must be the configuration that the weights were saved with"
            )
        model = cls(dataclasses.replace(config, **changes))
        for name, own in (*model.named_parameters(), *model.named_buffers()):
            if name in weights and weights[name].is_floating_point():
                own.data = own.data.to(weights[name].dtype)
        files.check_expected(path / "model.safetensors", weights, model.state_dict())
        model.load_state_dict(weights)
        return model

    @classmethod
    def load_config(cls, path: Path):
        fields = _read_config(path)
        name = fields.pop("model")
        if name != cls.__name__:
            raise files.StateFileError(f"{path}: field 'model' must be {cls.__name__!r}, got {name!r}")
        known = {field.name for field in dataclasses.fields(cls.config_class)}
        if unknown := sorted(set(fields) - known):
            raise files.StateFileError(f"{path}: unknown field {unknown[0]!r}; known are {', '.join(sorted(known))}")
        return cls.config_class(**fields)

    def check_segment(self, tokens: Tensor) -> None:
        """Tokens of one segment, which an embedding takes."""
        self._check_tokens(tokens, (torch.int64, torch.int32), "int64 or int32")
        if tokens.shape[1] > self.config.segment_length:
            raise ValueError(
                f"{type(self).__name__}: tokens must hold at most segment_length = {self.config.segment_length} "
                f"a segment, got {tokens.shape[1]}"
            )

    def check_tokens(self, tokens: Tensor) -> None:
        self._check_tokens(tokens, INTEGERS, "integer")

    def _check_tokens(self, tokens: Tensor, dtypes: tuple[torch.dtype, ...], named: str) -> None:
        if tokens.dim() != 2 or tokens.dtype not in dtypes:
            got = f"{tokens.dtype} {list(tokens.shape)}"
            raise ValueError(f"{type(self).__name__}: tokens must be {named} [B, L], got {got}")


def model_name(folder: str | Path) -> str:
    """The class of the model that lies in a folder, by name."""
    return _read_config(Path(folder) / "config.json")["model"]


def _read_config(path: Path) -> dict:
    try:
        fields = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise files.StateFileError(f"{path}: cannot be read as a configuration: {error}") from None
    if not isinstance(fields, dict) or not isinstance(fields.get("model"), str):
        raise files.StateFileError(f"{path}: field 'model' must name a model, got none")
    return fields
