"""rotary_embedding for TensorFlow."""

from __future__ import annotations

import functools


from attn_ops.call import rotary
from attn_ops.models.rotary import embedding
from attn_ops.tensorflow import xp
from attn_ops.tensorflow.as_written import as_written

rotate = functools.partial(rotary.rotate, xp)


@as_written
def rotary_embedding(
    x, positions=None, *, base=10000.0, rotary_dim=None, interleaved=False, scaling=None, layout="BSHD"
):
    """Rotary position embedding (Su et al. 2021, arXiv:2104.09864): each pair of features turns by an angle that grows
    with its position, so that products of queries and keys depend on their distance.

    Pair i of position p turns by p * base^(-2 i / rotary_dim): as complex numbers, it is multiplied by exp(i angle). For
    inputs up to float32 angles are right to 2^-32 of a turn at every position below 2^31 (2^-64 times the position beyond
    that), and the turn is computed in float32; float64 stays so. Differentiable: the gradient turns back. Works eagerly,
    in `tf.function`, with unknown lengths, in XLA, and on `KerasTensor`s.

    Args:
        x: floating [batch, seqlen, num_heads, head_dim], queries or keys; or [batch, seqlen, features], or
            [seqlen, features].
        positions: integers [seqlen] or [batch, seqlen], which may be traced; None: 0, 1, ….
        base: the longest wavelength over 2 pi: 10000 (RoFormer, Llama 2), 500000 (Llama 3), 1000000 (Qwen).
        rotary_dim: how many features turn, the first ones; the others stay (GPT-J, GPT-NeoX, Phi). None: all.
        interleaved: which features make a pair: False, i and i + rotary_dim / 2 (GPT-NeoX, Llama, KerasHub); True, 2 i
            and 2 i + 1 (RoFormer, GPT-J, Llama's first release).
        scaling: None; ("linear", f), positions divided by f; ("ntk", f), the base multiplied by f^(d / (d - 2)) with d
            the rotary_dim; ("yarn", {...}) with factor, original_max_position_embeddings, and if they are others
            beta_fast (32), beta_slow (1), attention_factor (0.1 ln(factor) + 1, by which cosine and sine are
            multiplied) and truncate (True); ("llama3", {...}) with factor, original_max_position_embeddings,
            low_freq_factor (1) and high_freq_factor (4). Or one dict, "rope_scaling" of a model's config.json, with the
            kind as "rope_type".
        layout: of x, "BSHD" as above or "BHSD", [batch, num_heads, seqlen, head_dim].

    Returns:
        The shape and dtype of x.

    Raises:
        TypeError: x is not floating, positions are not integers, or another argument is no number.
        ValueError: an odd number of features, a rotary_dim beyond them, shapes that do not fit, a scaling that is not
            known or lacks a number, or numbers out of their range.
    """
    settings = rotary.Rotary.of("rotary_embedding", base, rotary_dim, interleaved, scaling)
    return embedding(xp, x, positions, settings, layout)
