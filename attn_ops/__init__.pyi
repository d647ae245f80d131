# Written by tests/package/stub.py, which tests compare it with.

from contextlib import AbstractContextManager
from typing import Any, NamedTuple, TypeVar

from attn_ops import integration as integration
from attn_ops import jax as jax
from attn_ops import layers as layers
from attn_ops import masks as masks
from attn_ops import models as models
from attn_ops import reference as reference
from attn_ops import visualize as visualize

_Model = TypeVar("_Model")
__all__ = ['__version__', 'integration', 'jax', 'layers', 'masks', 'models', 'reference', 'visualize', 'scaled_dot_product_attention', 'attention_weights', 'varlen_attention', 'ragged_attention', 'merge_attention', 'rotary_embedding', 'KVCache', 'decode_attention', 'PagedKVCache', 'paged_attention', 'alibi_slopes', 'T5RelativeBias', 'explain', 'can_use_fused', 'Explanation', 'Support', 'allow_tf32', 'set_allow_tf32', 'patch', 'unpatch', 'patched', 'convert', 'revert', 'export', 'all_gather_kv', 'load_library']

__version__: str
def alibi_slopes(num_heads: Any) -> Any: ...
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
def allow_tf32() -> bool: ...
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
def convert(model: _Model) -> _Model: ...
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
    rotary: bool | dict[str, Any] | None = None,
    implementation: str | None = None,
) -> Any: ...
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
def export(model: Any, path: Any, *, ops: Any = 'composite', **kwargs: Any) -> Any: ...
def load_library() -> str: ...
def merge_attention(outs: Any, lses: Any, *, layout: Any = 'BSHD') -> Any: ...
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
    rotary: bool | dict[str, Any] | None = None,
    in_place: bool = False,
    implementation: str | None = None,
) -> Any: ...
def patch() -> Any: ...
def patched(model: Any = None) -> AbstractContextManager[None]: ...
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
def revert(model: _Model) -> _Model: ...
def rotary_embedding(
    x: Any,
    positions: Any = None,
    *,
    base: Any = 10000.0,
    rotary_dim: Any = None,
    interleaved: bool = False,
    scaling: Any = None,
    layout: Any = 'BSHD',
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
def set_allow_tf32(allowed: bool) -> None: ...
def unpatch() -> Any: ...
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
    causal: bool = False,
    window_size: Any = (-1, -1),
    dropout_p: Any = 0.0,
    softcap: Any = 0.0,
) -> Any: ...
class Explanation:
    implementation: str
    reasons: tuple[str, ...]
    form: str | None
    device: str | None
    notes: tuple[str, ...]
    def __init__(
        self,
        implementation: str,
        reasons: tuple[str, ...] = (),
        form: str | None = None,
        device: str | None = None,
        notes: tuple[str, ...] = (),
    ) -> None: ...
class KVCache(NamedTuple):
    key: Any
    value: Any
    lengths: Any
    written: Any = ...
    @property
    def key_scale(self) -> Any: ...
    @property
    def value_scale(self) -> Any: ...
    @property
    def layout(self) -> Any: ...
    @property
    def window(self) -> Any: ...
    @classmethod
    def create(
        cls,
        batch: Any,
        max_length: Any,
        num_kv_heads: Any,
        head_dim: Any,
        dtype: Any = 'float32',
        *,
        layout: Any = 'BSHD',
        window: Any = None,
        value_dim: Any = None,
        framework: Any = None,
    ) -> KVCache: ...
    @property
    def memory(self) -> Any: ...
    def with_memory(self, memory: Any, **fields: Any) -> KVCache: ...
    @property
    def max_length(self) -> Any: ...
    @property
    def rows(self) -> Any: ...
    @property
    def rolls(self) -> Any: ...
    def update(self, k: Any, v: Any, lengths: Any = None) -> KVCache: ...
    def rewind(self, lengths: Any) -> KVCache: ...
    def copy(self) -> KVCache: ...
class PagedKVCache:
    pages: Any
    layout: Any
    num_pages: Any
    page_size: Any
    def __init__(self, layer_pages: Any, layout: Any, framework: Any) -> None: ...
    class OutOfPages(ValueError): ...
    @classmethod
    def create(
        cls,
        num_pages: Any,
        page_size: Any,
        num_kv_heads: Any,
        head_dim: Any,
        dtype: Any = 'float32',
        *,
        num_layers: Any = 1,
        value_dim: Any = None,
        layout: Any = 'BSHD',
        framework: Any = None,
    ) -> PagedKVCache: ...
    @property
    def num_free_pages(self) -> Any: ...
    @property
    def sequences(self) -> Any: ...
    def allocate(self) -> Any: ...
    def fork(self, sequence: Any) -> Any: ...
    def free(self, sequence: Any) -> Any: ...
    def truncate(self, sequence: Any, length: Any) -> Any: ...
    def reserve(self, sequences: Any, rows: Any) -> Any: ...
    def append(self, sequences: Any, k: Any, v: Any, lengths: Any = None) -> Any: ...
    def block_table(self, sequences: Any, pages: Any = None) -> Any: ...
    def lengths(self, sequences: Any) -> Any: ...
class Support:
    ok: bool
    reasons: tuple[str, ...]
    def __init__(self, ok: bool, reasons: tuple[str, ...] = ()) -> None: ...
    def __bool__(self) -> bool: ...
class T5RelativeBias:
    table: Any
    bidirectional: Any
    max_distance: Any
    def __init__(self, table: Any, bidirectional: bool = True, max_distance: Any = 128) -> None: ...
    def buckets(self, name: Any, num_buckets: Any) -> Any: ...
