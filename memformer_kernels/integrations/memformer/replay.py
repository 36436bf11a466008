"""Memory replay of models of the package `memformer`, in the place of its own `memory_replay_backprop`."""

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn

from memformer_kernels import checks
from memformer_kernels.replay import memory_replay

OP = "memory_replay_backprop"


def segment_cell(model: nn.Module, loss: Callable[[Any, Any], Tensor] | None = None) -> Callable:
    """A model of the package as a cell of `memory_replay`: a segment is `(src, src_mask, tgt, tgt_mask)`.

    Its output is a scalar, or None where `tgt` is None: the decoder's loss, or `loss(results, tgt)`, where results are
    what the model returns.
    """

    def cell(segment: tuple, mems: Tensor) -> tuple[Tensor | None, Tensor]:
        src, src_mask, tgt, tgt_mask = segment
        results = model(src, tgt, mems=mems, src_mask=src_mask, tgt_mask=tgt_mask)
        if tgt is None:
            return None, results.mem
        return results.dec_out if loss is None else loss(results, tgt), results.mem

    return cell


def memory_replay_backprop(
    model: nn.Module,
    src: Tensor,
    tgt: Any,
    src_mask: Tensor | None = None,
    tgt_mask: Any = None,
    *,
    mems: Tensor | None = None,
    every_segment: bool = False,
    loss: Callable[[Any, Any], Tensor] | None = None,
    cell: Callable | None = None,
    **options: Any,
) -> tuple[Tensor, Tensor]:
    """Adds to `.grad` the gradients of a document's loss, keeping the activations of one segment at a time.

    The gradients are those of back-propagation through all segments, dropout and autocast included, of which the
    package's function of the same name replays neither; unlike it, this returns something, takes losses in every
    segment, works with `encoder_only`, and walks every graph once. The model need not be accelerated.

    Args:
        model: a `memformer.Memformer`, or what has its `forward`, `get_initial_mem` and `encoder.max_seq_len`.
        src, src_mask: the document, [B, T] integers, and bool [B, T], True where there is a token. It is cut into S
            segments of `model.encoder.max_seq_len`; the last one may be shorter.
        tgt, tgt_mask: what the last segment's decoder is to predict, and its mask.
        mems: [B, M, C], the memory to begin with; by default the learned initial one, which then gets its gradient.
        every_segment: `tgt`, and `tgt_mask` unless it is None, are sequences of S entries, one for each segment, None
            in a segment without a loss. The losses are added up.
        loss: `loss(results, tgt)`, a scalar, in the place of the decoder's loss; `results` is what the model returns.
            `encoder_only` models need it; their `tgt` is whatever it takes.
        cell: `CapturedCell(segment_cell(model, loss))`, kept between calls, runs an accelerated model as CUDA graphs.
        options: of `memory_replay`, such as `activation_budget` or `method`.

    Returns:
        `(loss, mems)`: the sum of the losses and the memory after the last segment, both detached.

    Raises:
        ValueError: the targets are not one a segment, there is none, or `loss` is missing.
    """
    if cell is None:
        if getattr(model, "decoder", None) is None and loss is None:
            checks.fail(OP, "loss", "be given for a model without a decoder", "None")
        cell = segment_cell(model, loss)
    length = model.encoder.max_seq_len
    sources = src.split(length, dim=1)
    count = len(sources)
    source_masks = (None,) * count if src_mask is None else src_mask.split(length, dim=1)
    targets, target_masks = (_of_segments(t, count, every_segment) for t in (tgt, tgt_mask))
    if all(t is None for t in targets):
        checks.fail(OP, "tgt", "hold a target for a segment", "None")
    for name, given in (("tgt", targets), ("tgt_mask", target_masks), ("src_mask", source_masks)):
        if len(given) != count:
            checks.fail(OP, name, f"have {count} segments, as src", len(given))
    segments = list(zip(sources, source_masks, targets, target_masks, strict=True))
    losses, mems = memory_replay(cell, segments, model.get_initial_mem(len(src)) if mems is None else mems, **options)
    total = sum(one for one in losses if one is not None)
    total.backward()
    return total.detach(), mems.detach()


def _of_segments(given: Any, count: int, every_segment: bool) -> Sequence:
    if every_segment and given is not None:
        return given
    return [None] * (count - 1) + [given]
