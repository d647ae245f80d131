# Written by tests/package/stub.py, which tests compare it with.

from typing import Any

from attn_ops import integration as integration
from attn_ops import jax as jax
from attn_ops import layers as layers
from attn_ops import masks as masks
from attn_ops import models as models
from attn_ops import reference as reference
from attn_ops import visualize as visualize
from attn_ops.call.explanation import Explanation as Explanation
from attn_ops.call.explanation import Support as Support
from attn_ops.call.position_bias import T5RelativeBias as T5RelativeBias
from attn_ops.call.position_bias import alibi_slopes as alibi_slopes
from attn_ops.call.precision import allow_tf32 as allow_tf32
from attn_ops.call.precision import set_allow_tf32 as set_allow_tf32
from attn_ops.generation.cache import KVCache as KVCache
from attn_ops.generation.page_pool import PagedKVCache as PagedKVCache
from attn_ops.models.convert import convert as convert
from attn_ops.models.convert import revert as revert
from attn_ops.models.patched import patch as patch
from attn_ops.models.patched import patched as patched
from attn_ops.models.patched import unpatch as unpatch
from attn_ops.tensorflow.export import export as export
from attn_ops.tensorflow.load import load_library as load_library
from attn_ops.tensorflow.merge import merge_attention as merge_attention
from attn_ops.tensorflow.rotary import rotary_embedding as rotary_embedding

__version__: str
__all__: list[str]

def attention_weights(
    query: Any,
    key: Any,
    *,
    bias: Any = None,
    mask: Any = None,
    scale: Any = None,
    is_causal: bool = False,
    causal_alignment: str = 'top_left',
    window: tuple[int | None, int | None] | None = None,
    query_seq_lengths: Any = None,
    key_value_seq_lengths: Any = None,
    layout: str = 'BSHD',
    query_offset: Any = None,
    logits_soft_cap: float | None = None,
    alibi_slopes: Any = None,
    relative_bias: Any = None,
    sinks: Any = None,
    lse: Any = None,
    implementation: str | None = None,
) -> Any: ...
def scaled_dot_product_attention(
    query: Any,
    key: Any,
    value: Any,
    *,
    bias: Any = None,
    mask: Any = None,
    scale: Any = None,
    is_causal: bool = False,
    causal_alignment: str = 'top_left',
    window: tuple[int | None, int | None] | None = None,
    query_seq_lengths: Any = None,
    key_value_seq_lengths: Any = None,
    dropout_rate: float = 0.0,
    dropout_seed: Any = None,
    layout: str = 'BSHD',
    return_lse: bool = False,
    query_offset: Any = None,
    logits_soft_cap: float | None = None,
    alibi_slopes: Any = None,
    relative_bias: Any = None,
    sinks: Any = None,
    implementation: str | None = None,
) -> Any: ...
def decode_attention(
    q: Any,
    cache: Any,
    k_new: Any = None,
    v_new: Any = None,
    *,
    bias: Any = None,
    mask: Any = None,
    scale: Any = None,
    window: tuple[int | None, int | None] | None = None,
    query_seq_lengths: Any = None,
    return_lse: bool = False,
    logits_soft_cap: float | None = None,
    alibi_slopes: Any = None,
    relative_bias: Any = None,
    sinks: Any = None,
    is_causal: bool = True,
    rotary: bool | dict | None = None,
    implementation: str | None = None,
) -> Any: ...
def can_use_fused(
    query: Any,
    key: Any,
    value: Any,
    *,
    bias: Any = None,
    mask: Any = None,
    scale: Any = None,
    is_causal: bool = False,
    causal_alignment: str = 'top_left',
    window: tuple[int | None, int | None] | None = None,
    query_seq_lengths: Any = None,
    key_value_seq_lengths: Any = None,
    dropout_rate: float = 0.0,
    dropout_seed: Any = None,
    layout: str = 'BSHD',
    return_lse: bool = False,
    query_offset: Any = None,
    logits_soft_cap: float | None = None,
    alibi_slopes: Any = None,
    relative_bias: Any = None,
    sinks: Any = None,
) -> Support: ...
def explain(
    query: Any,
    key: Any = None,
    value: Any = None,
    *,
    bias: Any = None,
    mask: Any = None,
    scale: Any = None,
    is_causal: bool = False,
    causal_alignment: str = 'top_left',
    window: tuple[int | None, int | None] | None = None,
    query_seq_lengths: Any = None,
    key_value_seq_lengths: Any = None,
    dropout_rate: float = 0.0,
    dropout_seed: Any = None,
    layout: str = 'BSHD',
    return_lse: bool = False,
    query_offset: Any = None,
    logits_soft_cap: float | None = None,
    alibi_slopes: Any = None,
    relative_bias: Any = None,
    sinks: Any = None,
    implementation: str | None = None,
) -> Any: ...
def paged_attention(
    q: Any,
    k_pages: Any,
    v_pages: Any,
    block_table: Any,
    lengths: Any,
    k_new: Any = None,
    v_new: Any = None,
    *,
    bias: Any = None,
    mask: Any = None,
    scale: Any = None,
    window: tuple[int | None, int | None] | None = None,
    query_seq_lengths: Any = None,
    layout: str = 'BSHD',
    return_lse: bool = False,
    logits_soft_cap: float | None = None,
    alibi_slopes: Any = None,
    relative_bias: Any = None,
    sinks: Any = None,
    is_causal: bool = True,
    rotary: bool | dict | None = None,
    in_place: Any = False,
    implementation: str | None = None,
) -> Any: ...
def all_gather_kv(
    query: Any,
    key: Any,
    value: Any,
    *,
    bias: Any = None,
    mask: Any = None,
    scale: Any = None,
    is_causal: bool = False,
    causal_alignment: str = 'top_left',
    window: tuple[int | None, int | None] | None = None,
    query_seq_lengths: Any = None,
    key_value_seq_lengths: Any = None,
    layout: str = 'BSHD',
    return_lse: bool = False,
    logits_soft_cap: float | None = None,
    alibi_slopes: Any = None,
    relative_bias: Any = None,
    sinks: Any = None,
    implementation: str | None = None,
) -> Any: ...
def ragged_attention(
    query: Any,
    key: Any,
    value: Any,
    *,
    scale: Any = None,
    is_causal: bool = False,
    causal_alignment: str = 'bottom_right',
    window: tuple[int | None, int | None] | None = None,
    dropout_rate: float = 0.0,
    dropout_seed: Any = None,
    return_lse: bool = False,
    logits_soft_cap: float | None = None,
    alibi_slopes: Any = None,
    relative_bias: Any = None,
    sinks: Any = None,
    bias: Any = None,
    mask: Any = None,
    query_offset: Any = None,
    implementation: str | None = None,
) -> Any: ...
def varlen_attention(
    q: Any,
    k: Any,
    v: Any,
    cu_seqlens_q: Any,
    cu_seqlens_k: Any = None,
    max_seqlen_q: Any = None,
    max_seqlen_k: Any = None,
    *,
    scale: Any = None,
    is_causal: bool = False,
    causal_alignment: str = 'bottom_right',
    window: tuple[int | None, int | None] | None = None,
    dropout_rate: float = 0.0,
    dropout_seed: Any = None,
    return_lse: bool = False,
    logits_soft_cap: float | None = None,
    alibi_slopes: Any = None,
    relative_bias: Any = None,
    sinks: Any = None,
    bias: Any = None,
    mask: Any = None,
    query_offset: Any = None,
    implementation: str | None = None,
    softmax_scale: Any = None,
    causal: Any = False,
    window_size: Any = (-1, -1),
    dropout_p: Any = 0.0,
    softcap: Any = 0.0,
) -> Any: ...
