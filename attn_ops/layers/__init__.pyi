# Written by tests/package/stub.py, which tests compare it with.

import keras
from typing import Any

__all__ = ['Attention', 'AttentionLayer', 'AttentionLayerWithWeights', 'GroupQueryAttention', 'GroupedQueryAttention', 'HierarchicalAttention', 'MultiHeadAttention', 'RotaryEmbedding', 'SelfAttention']

class Attention(keras.layers.Attention):
    def __init__(
        self,
        use_scale: bool = False,
        score_mode: Any = 'dot',
        dropout: Any = 0.0,
        seed: Any = None,
        *,
        flash_attention: Any = None,
        as_in_keras: bool = False,
        **kwargs: Any,
    ) -> None: ...
    def call(
        self,
        inputs: Any,
        mask: Any = None,
        training: bool = False,
        return_attention_scores: bool = False,
        use_causal_mask: bool = False,
        attention_bias: Any = None,
    ) -> Any: ...
class AttentionLayer(keras.layers.Layer):
    def __init__(
        self,
        scale: Any = None,
        dropout: Any = 0.0,
        seed: Any = None,
        *,
        flash_attention: Any = None,
        **kwargs: Any,
    ) -> None: ...
    def call(
        self,
        inputs: Any,
        mask: Any = None,
        training: bool = False,
        use_causal_mask: bool = False,
        attention_bias: Any = None,
    ) -> Any: ...
class AttentionLayerWithWeights(keras.layers.Layer):
    def __init__(
        self,
        scale: Any = None,
        dropout: Any = 0.0,
        seed: Any = None,
        *,
        flash_attention: Any = None,
        **kwargs: Any,
    ) -> None: ...
    def call(
        self,
        inputs: Any,
        mask: Any = None,
        training: bool = False,
        use_causal_mask: bool = False,
        attention_bias: Any = None,
    ) -> Any: ...
class GroupedQueryAttention(keras.layers.GroupQueryAttention):
    def __init__(
        self,
        head_dim: Any,
        num_query_heads: Any,
        num_key_value_heads: Any,
        dropout: Any = 0.0,
        use_bias: bool = True,
        sliding_window: Any = None,
        flash_attention: Any = None,
        kernel_initializer: Any = 'glorot_uniform',
        bias_initializer: Any = 'zeros',
        kernel_regularizer: Any = None,
        bias_regularizer: Any = None,
        activity_regularizer: Any = None,
        kernel_constraint: Any = None,
        bias_constraint: Any = None,
        use_gate: bool = False,
        seed: Any = None,
        *,
        as_in_keras: bool = False,
        logits_soft_cap: float | None = None,
        sinks: Any = False,
        position_bias: Any = None,
        num_buckets: Any = 32,
        max_distance: Any = 128,
        bidirectional: Any = None,
        mask: Any = None,
        rotary: bool | dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None: ...
    def call(
        self,
        query: Any,
        value: Any,
        key: Any = None,
        query_mask: Any = None,
        value_mask: Any = None,
        key_mask: Any = None,
        attention_mask: Any = None,
        return_attention_scores: bool = False,
        training: Any = None,
        use_causal_mask: bool = False,
        attention_bias: Any = None,
        query_offset: Any = None,
        cache: Any = None,
        cache_update_index: Any = None,
    ) -> Any: ...
class HierarchicalAttention(keras.layers.Layer):
    def __init__(
        self,
        units: Any = None,
        sentence_encoder: Any = None,
        dropout: Any = 0.0,
        kernel_initializer: Any = 'glorot_uniform',
        kernel_regularizer: Any = None,
        kernel_constraint: Any = None,
        seed: Any = None,
        *,
        flash_attention: Any = None,
        **kwargs: Any,
    ) -> None: ...
    def call(
        self,
        inputs: Any,
        mask: Any = None,
        training: bool = False,
        return_attention_scores: bool = False,
    ) -> Any: ...
class MultiHeadAttention(keras.layers.MultiHeadAttention):
    def __init__(
        self,
        num_heads: Any,
        key_dim: Any,
        value_dim: Any = None,
        dropout: Any = 0.0,
        use_bias: bool = True,
        output_shape: Any = None,
        attention_axes: Any = None,
        sliding_window: Any = None,
        flash_attention: Any = None,
        kernel_initializer: Any = 'glorot_uniform',
        bias_initializer: Any = 'zeros',
        kernel_regularizer: Any = None,
        bias_regularizer: Any = None,
        activity_regularizer: Any = None,
        kernel_constraint: Any = None,
        bias_constraint: Any = None,
        use_gate: bool = False,
        seed: Any = None,
        *,
        as_in_keras: bool = False,
        logits_soft_cap: float | None = None,
        sinks: Any = False,
        position_bias: Any = None,
        num_buckets: Any = 32,
        max_distance: Any = 128,
        bidirectional: Any = None,
        mask: Any = None,
        rotary: bool | dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None: ...
    def call(
        self,
        query: Any,
        value: Any,
        key: Any = None,
        query_mask: Any = None,
        value_mask: Any = None,
        key_mask: Any = None,
        attention_mask: Any = None,
        return_attention_scores: bool = False,
        training: Any = None,
        use_causal_mask: bool = False,
        attention_bias: Any = None,
        query_offset: Any = None,
        cache: Any = None,
        cache_update_index: Any = None,
    ) -> Any: ...
class RotaryEmbedding(keras.layers.Layer):
    def __init__(
        self,
        max_wavelength: Any = 10000,
        scaling_factor: Any = 1.0,
        sequence_axis: Any = 1,
        feature_axis: Any = -1,
        rotary_dim: Any = None,
        interleaved: bool = False,
        scaling: Any = None,
        **kwargs: Any,
    ) -> None: ...
    def call(self, inputs: Any, start_index: Any = 0, positions: Any = None) -> Any: ...
class SelfAttention(keras.layers.Layer):
    def __init__(
        self,
        units: Any = None,
        scale: Any = None,
        dropout: Any = 0.0,
        kernel_initializer: Any = 'glorot_uniform',
        kernel_regularizer: Any = None,
        kernel_constraint: Any = None,
        seed: Any = None,
        *,
        flash_attention: Any = None,
        **kwargs: Any,
    ) -> None: ...
    def call(
        self,
        inputs: Any,
        mask: Any = None,
        training: bool = False,
        use_causal_mask: bool = False,
        return_attention_scores: bool = False,
        attention_bias: Any = None,
    ) -> Any: ...
GroupQueryAttention = GroupedQueryAttention
