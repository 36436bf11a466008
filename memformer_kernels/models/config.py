"""Configurations of the models, and presets with the paper's sizes."""

from dataclasses import dataclass


@dataclass(frozen=True)
class MemformerLMConfig:
    """Decoder-only model: causal self-attention, memory read, feed-forward in every layer.

    `segment_length` is the most tokens a segment may hold. `temperature`, `retention`, `forgetting` and `own_value`
    are those of `layers.MemoryWrite`, `recompute` is that of `layers.transformer.Layer`.
    """

    vocabulary: int = 256
    width: int = 128
    heads: int = 4
    layers: int = 3
    hidden: int = 512
    slots: int = 16
    segment_length: int = 64
    temperature: float = 0.25
    retention: float = 0.1
    forgetting: bool = True
    own_value: str = "slots"
    dropout: float = 0.0
    recompute: str = "cheap"
    backend: str = "auto"


@dataclass(frozen=True)
class MemformerConfig:
    """Encoder-decoder model: the encoder of segment t reads and writes the memory, the decoder predicts segment t+1."""

    vocabulary: int = 256
    width: int = 512
    heads: int = 8
    encoder_layers: int = 4
    decoder_layers: int = 16
    hidden: int = 2048
    slots: int = 512
    segment_length: int = 128
    temperature: float = 0.25
    retention: float = 0.1
    forgetting: bool = True
    own_value: str = "slots"
    dropout: float = 0.1
    recompute: str = "cheap"
    backend: str = "auto"


# Sizes: Wu et al., arXiv 2010.06891v2, tables 2 and 4 and section 5. The vocabulary is ours: bytes.
PRESETS: dict[str, MemformerLMConfig | MemformerConfig] = {
    "recall": MemformerLMConfig(vocabulary=64, width=64, heads=4, layers=2, hidden=256, slots=8, segment_length=8),
    "small": MemformerLMConfig(),
    "paper-wikitext": MemformerConfig(),
    "paper-mnist": MemformerConfig(width=256, heads=4, decoder_layers=8, hidden=1024, slots=64, segment_length=28),
    "paper-replay": MemformerLMConfig(width=512, heads=8, layers=12, hidden=2048, slots=32, segment_length=128),
}
