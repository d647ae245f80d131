"""What the plots draw: weights as arrays, or as they were recorded of a layer."""

from __future__ import annotations

import typing

import numpy as np

from attn_ops.visualize import checks
from attn_ops.visualize.recorded import LayerAttention


class Matrices(typing.NamedTuple):
    """The weights of some heads of one example.

    Attributes:
        panels: a list of (name, `[seqlen_q, seqlen_k]`), NaN where hidden.
        query_labels, key_labels: lists of str, or None.
        block: how many rows and keys a cell stands for.
    """

    panels: list
    query_labels: list | None
    key_labels: list | None
    block: int = 1


def matrices(name: str, weights, example: int, heads) -> Matrices:
    """Of an array of rank 2 to 4 or a `LayerAttention`, with the errors of the function of this name."""
    if isinstance(weights, LayerAttention):
        return _of_layer(name, weights, example, heads)
    return Matrices(_panels(name, checks.real_array(name, weights), example, heads), None, None)


def _of_layer(name, layer, example, heads):
    if layer.weights is None:
        hidden, values, block = layer.blocks.seen == 0, layer.blocks.means, layer.blocks.size
    else:
        hidden, values, block = layer.hidden, layer.weights, 1
    panels = _panels(name, np.where(hidden, np.nan, values), example, heads)
    labels = [None if x is None or block > 1 else x[example] for x in (layer.query_tokens, layer.key_tokens)]
    return Matrices(panels, *labels, block)


def _panels(name, weights, example, heads):
    if weights.ndim not in (2, 3, 4):
        raise ValueError(
            f"{name}: weights must be [seqlen_q, seqlen_k], [batch, seqlen_q, seqlen_k] or "
            f"[batch, num_heads, seqlen_q, seqlen_k], got shape {weights.shape}"
        )
    if weights.size == 0:
        raise ValueError(f"{name}: weights must not be empty, got shape {weights.shape}")
    if heads is not None and weights.ndim != 4:
        raise ValueError(f"{name}: heads needs weights of rank 4, got shape {weights.shape}")
    if weights.ndim == 2:
        return [("", weights)]
    batch = weights.shape[0]
    if not -batch <= example < batch:
        raise ValueError(f"{name}: example {example} is not in a batch of {batch}")
    if weights.ndim == 3:
        return [("", weights[example])]
    num_heads = weights.shape[1]
    chosen = range(num_heads) if heads is None else list(heads)
    wrong = [head for head in chosen if not 0 <= head < num_heads]
    if wrong or len(chosen) == 0:
        raise ValueError(f"{name}: heads must be in 0..{num_heads - 1} and at least one, got {heads}")
    return [(f"head {head}", weights[example, head]) for head in chosen]


def labels(name: str, argument: str, tokens, extent: int, block: int = 1) -> list[str]:
    """Labels as text, or positions."""
    if tokens is None:
        return [str(position * block) for position in range(extent)]
    found = [checks.label(token) for token in tokens]
    if len(found) != extent:
        raise ValueError(f"{name}: {argument} has {len(found)} labels for {extent} positions")
    return found


def real_range(weights, texts, axis: int) -> slice:
    """The rows (axis 0) or keys (axis 1) of matrices from the first real one to the last: those with a label that is not
    empty, without labels those that weigh or are weighed at all."""
    if texts is not None:
        real = np.array([bool(text.strip()) for text in texts])
    else:
        real = np.any([(np.nan_to_num(x) != 0).any(1 - axis) for x in weights], axis=0)
    there = np.flatnonzero(real)
    return slice(there[0], there[-1] + 1) if len(there) else slice(None)
