"""Models that find and cut out objects: the decoder of SAM, D-FINE."""

from __future__ import annotations

from keras import ops

from attn_ops.models.adapters import heads


def downsampled(layer, stock, query, value, key):
    """`call` of SAM's: `[batch, seqlen, features]` with heads of fewer features."""
    query, key, value = (
        heads.split(project(x), layer.num_heads)
        for project, x in ((layer.query_proj, query), (layer.key_proj, key), (layer.value_proj, value))
    )
    return layer.out_proj(heads.join(heads.attention(query, key, value, scale=query.shape[-1] ** -0.5)[0]))


def d_fine(
    layer, stock, hidden_states, position_embeddings=None, attention_mask=None, output_attentions=False, training=None
):
    """`call`; the mask is added to the scores, the positions to what is compared alone."""
    placed = hidden_states if position_embeddings is None else hidden_states + position_embeddings
    query, key, value = layer.q_proj(placed), layer.k_proj(placed), layer.v_proj(hidden_states)
    bias = None
    if attention_mask is not None:
        bias = attention_mask[None] if len(attention_mask.shape) == 2 else attention_mask
        bias = ops.cast(bias[:, None], query.dtype)
    out, weights = heads.attention(
        query,
        key,
        value,
        scale=layer.scaling,
        bias=bias,
        dropout=layer.dropout,
        training=training,
        scores="undropped" if output_attentions else None,
    )
    out = layer.out_proj(heads.join(out))
    return (out, weights) if output_attentions else out
