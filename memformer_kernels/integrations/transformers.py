"""`cross_attention` as an attention implementation of the `transformers` package.

from memformer_kernels.integrations.transformers import register

model.set_attn_implementation(register())
"""

from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import bidirectional_mask_function, sdpa_mask

from memformer_kernels.integrations.attention import cross_attention

NAME = "memformer_kernels"


def register() -> str:
    """Makes `model.set_attn_implementation("memformer_kernels")` known; returns that name.

    Attention of many tokens to up to 128 keys is `memory_read` then, in encoder-decoder models and those of Perceiver's
    kind; causal self-attention, and all that `cross_attention` does not run, stays PyTorch's.
    """
    AttentionInterface.register(NAME, _attention)
    AttentionMaskInterface.register(NAME, _mask)
    return NAME


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **options: object,
) -> tuple[Tensor, None]:
    causal = options.get("is_causal")
    causal = getattr(module, "is_causal", True) if causal is None else causal
    if causal or any(options.get(name) is not None for name in ("position_bias", "softcap")):
        return sdpa_attention_forward(module, query, key, value, attention_mask, dropout, scaling, **options)
    grouped = query.shape[1] != key.shape[1]
    output = cross_attention(query, key, value, attention_mask, dropout, scale=scaling, enable_gqa=grouped)
    return output.transpose(1, 2), None


def _mask(*, q_length: int, mask_function, **options: object) -> Tensor | None:
    """Of one row where all queries see the same keys, which the package would write out for every query."""
    rows = 1 if mask_function is bidirectional_mask_function else q_length
    return sdpa_mask(q_length=rows, mask_function=mask_function, **options)
