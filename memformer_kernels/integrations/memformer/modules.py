"""The modules of `memformer` 0.3.1 on the operations of this package; imported when a model of it is there.

The package implements version 1 of the paper: the own value of a slot is projected, and a GRU and a feed-forward
layer, which stay its own, follow the slot attention in the place of forgetting.
"""

import torch
from memformer.autoregressive_wrapper import AutoregressiveWrapper
from memformer.memformer import (
    Attention,
    Decoder,
    Encoder,
    EncOnlyResults,
    FeedForward,
    Memformer,
    RelativePositionBias,
    Results,
    TransformerWrapper,
)
from torch import Tensor, nn
from torch.nn.functional import pad

from memformer_kernels.integrations.attention import cross_attention
from memformer_kernels.integrations.report import Accelerated, Entry
from memformer_kernels.layers.memory import KeyValue, merge_heads, split_heads
from memformer_kernels.ops.memory_write import memory_write


class CrossAttention(Accelerated, Attention):
    """Attention to another sequence: the encoder's to the memory, the decoder's to the encoder's states."""

    original = Attention

    def forward(self, x, context=None, pos_emb=None, mask=None, query_mask=None, kv_mask=None, attend_self=False):
        if context is None or pos_emb is not None or mask is not None or attend_self or self.causal:
            options = dict(context=context, pos_emb=pos_emb, mask=mask, query_mask=query_mask, kv_mask=kv_mask)
            return super().forward(x, **options, attend_self=attend_self)
        query = split_heads(self.to_q(x), self.heads)
        key, value = (split_heads(t, self.heads) for t in self.to_kv(context).chunk(2, -1))
        visible = None
        if kv_mask is not None:
            sees_a_key = kv_mask.any(-1, keepdim=True)
            visible = (kv_mask | ~sees_a_key)[:, None, None]  # NaN in some kernels where none is
            query_mask = sees_a_key if query_mask is None else query_mask & sees_a_key
        read = cross_attention(query, key, value, attn_mask=visible, scale=self.scale)
        if query_mask is not None:
            # hidden logits are the lowest number and not -inf: a query that sees nothing takes the mean of all values
            read = read.where(query_mask[:, None, :, None], value.mean(2, keepdim=True))
        return self.to_out(merge_heads(read))


class SlotAttention(Accelerated, Attention):
    """The memory's attention to itself and the tokens, without the M x (M + L) logits and their mask.

    Called with a mask, as the package's own model does, it is the package's own.
    """

    original = Attention

    def project(self, tokens: Tensor) -> KeyValue:
        """Keys and values of tokens [B, L, C], once for all updates of the memory."""
        key, value = self.to_kv(tokens).chunk(2, -1)
        return split_heads(key, self.heads), split_heads(value, self.heads)

    def forward(self, x, context=None, *, tokens: KeyValue | None = None, token_mask: Tensor | None = None, **options):
        if tokens is None:
            return super().forward(x, context, **options)
        query, (own_key, own_value) = self.to_q(x), self.to_kv(x).chunk(2, -1)
        query, own_key = split_heads(query, self.heads), split_heads(own_key, self.heads)
        options = dict(token_mask=token_mask, scale=self.scale)
        return self.to_out(memory_write(query, own_key, own_value, *tokens, **options))


class AcceleratedMemformer(Accelerated, Memformer):
    """The model: the memory is written by `SlotAttention`, whose keys and values of the tokens serve all updates."""

    original = Memformer

    def forward(self, src, tgt=None, mems=None, src_mask=None, tgt_mask=None):
        if mems is None:
            mems = self.get_initial_mem(len(src))
        enc = self.encoder(src, context=mems, src_mask=src_mask)
        if self.decoder is None:
            loss = None
        elif tgt is None:
            # made on the device, so that this can be recorded as a CUDA graph
            loss = torch.zeros((), requires_grad=True, device=src.device)
        else:
            loss = self.decoder(tgt, context=enc, src_mask=tgt_mask, tgt_mask=src_mask, return_loss=True)
        tokens = self.mem_updater.project(enc) if self.num_mem_updates else None
        for _ in range(self.num_mem_updates):
            attended = self.mem_updater(mems, tokens=tokens, token_mask=src_mask)
            written = self.gru(attended.flatten(0, 1), mems.flatten(0, 1))
            mems = self.mem_ff(written.view(mems.shape))
        return EncOnlyResults(enc, mems) if self.decoder is None else Results(enc, mems, loss)


class CorrectedPositionBias(Accelerated, RelativePositionBias):
    """Buckets of distances both ways where attention goes both ways, and of the past where it is causal."""

    original = RelativePositionBias

    @staticmethod
    def _relative_position_bucket(relative_position, causal=True, **options):
        return RelativePositionBias._relative_position_bucket(relative_position, causal=not causal, **options)


class MaskedLoss(Accelerated, AutoregressiveWrapper):
    """The decoder's loss with a mask of the length of its input, which the package drops."""

    original = AutoregressiveWrapper

    def forward(self, x, return_loss=False, src_mask=None, **options):
        if src_mask is not None:
            if return_loss and isinstance(x, Tensor) and src_mask.shape[1] == x.shape[1] - 1:
                src_mask = pad(src_mask, (0, 1), value=True)  # the last one is taken off again
            options["src_mask"] = src_mask
        return super().forward(x, return_loss, **options)


class GeneratingDecoder(Accelerated, TransformerWrapper):
    """The decoder with the argument that `generate` calls it with."""

    original = TransformerWrapper

    def forward(self, x, input_mask=None, **options):
        if input_mask is not None:
            options.setdefault("src_mask", input_mask)
        return super().forward(x, **options)


READS = "attention to another sequence runs cross_attention: memory_read up to 128 keys, else PyTorch's own"
WRITES = "slot attention runs memory_write, without M x (M + L) logits; the tokens are projected once for all updates"
FIXES = {
    RelativePositionBias: (
        CorrectedPositionBias,
        "relative_position",
        "encoder and decoder have each other's distance buckets, which trained weights need; for new models",
    ),
    AutoregressiveWrapper: (
        MaskedLoss,
        "target_mask",
        "it drops a target mask that has the length of the decoder's input, unless",
    ),
    TransformerWrapper: (
        GeneratingDecoder,
        "generate",
        "generate calls it with an argument that it does not take, unless",
    ),
}
KNOWN = (Attention, Memformer, *FIXES)
SELF_ATTENTION = "self-attention with a bias for every query and key, which no operation here takes"
OWN_CODE = "code of its own: not the package's class, but one made of it, or a forward of this instance"


def entries(model: nn.Module, fix: frozenset[str]) -> list[Entry]:
    """What of the model's modules to replace, and what to leave; changes nothing."""
    modules = list(model.named_modules())
    at_self, owners, decoders = set(), {}, set()
    for _, module in modules:
        if isinstance(module, Encoder | Decoder):
            at_self.update(child for layer in module.layers for child in layer[0].modules())
        elif isinstance(module, Memformer):
            owners |= {module.mem_updater: module, module.gru: module}
        elif isinstance(module, AutoregressiveWrapper):
            decoders.add(module.net)

    def decide(module: nn.Module) -> tuple[type[Accelerated] | None, str] | None:
        if isinstance(module, FeedForward):
            return None, "two linear layers and GELU, which PyTorch runs"
        if isinstance(module, nn.GRUCell) and module in owners:
            return None, "after the slot attention; PyTorch has a kernel for it"
        if not isinstance(module, KNOWN):
            return None
        if _has_own_code(module):
            return None, OWN_CODE
        kind = type(module)
        if kind in FIXES:
            fixed, name, bug = FIXES[kind]
            if kind is TransformerWrapper and module not in decoders:
                return None
            return (fixed, f"corrected: {name}") if name in fix else (None, f'{bug} fix=("{name}",)')
        if kind is Attention and module not in owners:
            return (None, SELF_ATTENTION) if module in at_self else (CrossAttention, READS)
        # the model and its updater are replaced together
        owner = module if kind is Memformer else owners[module]
        if _has_own_code(owner) or _has_own_code(owner.mem_updater):
            return None, f"its {'mem_updater' if owner is module else 'model'} has {OWN_CODE}"
        return AcceleratedMemformer if owner is module else SlotAttention, WRITES

    decided = ((path, module, decide(module)) for path, module in modules)
    return [Entry(path, module, type(module).__name__, *decision) for path, module, decision in decided if decision]


def _has_own_code(module: nn.Module) -> bool:
    return type(module) not in KNOWN or "forward" in vars(module)
