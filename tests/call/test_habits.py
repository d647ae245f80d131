"""What people type by habit from PyTorch, Keras, JAX, flash-attn or MLX is refused with words that say what to do here.

Each case is one mistake, in the op and in its twin for JAX; the words are what a reader needs to go on.
"""

import re

import jax.numpy as jnp
import numpy as np
import pytest
import tensorflow as tf

import attn_ops
import attn_ops.jax
from attn_ops import masks

FRAMEWORKS = {
    "tensorflow": (attn_ops.scaled_dot_product_attention, attn_ops.attention_weights),
    "jax": (attn_ops.jax.scaled_dot_product_attention, attn_ops.jax.attention_weights),
}
BATCH, SEQLEN_Q, SEQLEN_K, HEADS, KV_HEADS, DIM = 2, 5, 7, 4, 2, 8


def zeros(*shape):
    return np.zeros(shape, "float32")


def true(*shape):
    return np.ones(shape, bool)


def arguments(**change):
    key = zeros(BATCH, SEQLEN_K, KV_HEADS, DIM)
    return {"query": zeros(BATCH, SEQLEN_Q, HEADS, DIM), "key": key, "value": key, **change}


def all_three(x):
    return {"query": x, "key": x, "value": x}


CASES = {
    # Keywords of other libraries.
    "torch attn_mask": (dict(attn_mask=true(5, 7)), TypeError, "'attn_mask'; .*mask= where .*boolean.*bias= where"),
    "torch key_padding_mask": (dict(key_padding_mask=true(2, 7)), TypeError, "masks.key_padding.*~key_padding_mask"),
    "torch dropout_p": (dict(dropout_p=0.1), TypeError, "dropout_rate="),
    "torch enable_gqa": (dict(enable_gqa=True), TypeError, "fewer heads"),
    "torch need_weights": (dict(need_weights=True), TypeError, "attention_weights"),
    "keras attention_mask": (dict(attention_mask=true(5, 7)), TypeError, "mask=, boolean"),
    "keras value_mask": (dict(value_mask=true(2, 7)), TypeError, "masks.key_padding"),
    "keras query_mask": (dict(query_mask=true(2, 5)), TypeError, "masks.query_padding"),
    "keras use_causal_mask": (dict(use_causal_mask=True), TypeError, "is_causal="),
    "keras return_attention_scores": (dict(return_attention_scores=True), TypeError, "attention_weights"),
    "keras sliding_window": (dict(sliding_window=3), TypeError, r"window=\(sliding_window - 1"),
    "keras flash_attention": (dict(flash_attention=True), TypeError, "implementation="),
    "keras soft cap": (dict(attn_logits_soft_cap=3.0), TypeError, "'attn_logits_soft_cap'; here it is logits_soft_cap="),
    "flash-attn causal": (dict(causal=True), TypeError, "is_causal="),
    "flash-attn softmax_scale": (dict(softmax_scale=1.0), TypeError, "scale="),
    "flash-attn window_size": (dict(window_size=(3, 0)), TypeError, r"window=\(left, right\)"),
    "flash-attn cu_seqlens": (dict(cu_seqlens_q=[0, 5, 10]), TypeError, "attn_ops.varlen_attention"),
    "flash-attn softcap": (dict(softcap=30.0), TypeError, "logits_soft_cap="),
    "gpt-oss s_aux": (dict(s_aux=zeros(4)), TypeError, "sinks="),
    "tokamax q_offset": (dict(q_offset=3), TypeError, "query_offset="),
    "segment_ids": (dict(segment_ids=[0, 1]), TypeError, "masks.segments.*query_seq_lengths"),
    "transformers position_bias": (dict(position_bias=zeros(4)), TypeError, "relative_bias=.*T5RelativeBias"),
    "flex block_mask": (dict(block_mask=None), TypeError, "masks.block_sparse.*masks.from_function"),
    "flex score_mod": (dict(score_mod=None), TypeError, "logits_soft_cap=.*alibi_slopes=.*relative_bias="),
    "jax local_window_size": (dict(local_window_size=3), TypeError, r"window=\(left, right\)"),
    "q": (dict(q=zeros(2, 5, 4, 8)), TypeError, "'q'; it is query="),
    "misspelt": (dict(is_casual=True), TypeError, "'is_casual'; there are bias, mask, scale, is_causal"),
    # Masks.
    "torch float mask": (dict(mask=zeros(5, 7)), TypeError, "must be boolean .*got float32; pass .*bias=.*mask > -1"),
    "0 and 1": (dict(mask=np.ones((5, 7), "int32")), TypeError, "must be boolean .*got int32; cast it .*mask != 0"),
    "lists of 0 and 1": (dict(mask=[[1] * 7] * 5), TypeError, "must be boolean .*mask != 0"),
    "mlx mask": (dict(mask="causal"), TypeError, "is_causal=True"),
    "keys": (dict(mask=true(2, 7)), ValueError, r"\(2, 7\) does not broadcast.*masks.key_padding\(mask\).*value_mask="),
    "keys of rank 4": (dict(mask=true(1, 1, 2, 7)), ValueError, "masks.key_padding"),
    "queries": (dict(mask=true(2, 5)), ValueError, "masks.query_padding"),
    "one row of keys": (dict(mask=true(7)), ValueError, r"got shape \(7,\); .*mask\[None\]"),
    "bias of keys": (dict(bias=zeros(2, 7)), ValueError, r"bias\[:, None, None\]"),
    "torch heads in the batch": (dict(mask=true(8, 5, 7)), ValueError, "reshape .batch . num_heads"),
    "bias of heads": (dict(bias=zeros(4, 5, 7)), ValueError, r"bias\[None\]"),
    "mask of the other layout": (
        {**all_three(zeros(2, 4, 9, 8)), "mask": true(2, 1, 9, 9)},
        ValueError,
        "positions of query, key and value swapped: .*'BHSD' is",
    ),
    "boolean bias": (dict(bias=true(5, 7)), TypeError, "a boolean mask goes to mask="),
    "integer bias": (dict(bias=np.zeros((5, 7), int)), TypeError, "bias must be floating.*cast it: "),
    # Query, key and value.
    "integers": (dict(query=np.zeros((2, 5, 4, 8), "int32")), TypeError, "query must be float16.*got int32; cast it: "),
    "lists of integers": (dict(value=[[[[1] * 8] * 2] * 7] * 2), TypeError, "value must be float16.*cast it: "),
    "booleans": (dict(key=true(2, 7, 2, 8)), TypeError, "key must be float16.*got bool; cast it: "),
    "objects": (dict(key=np.array([None, 1], object)), TypeError, "key must be .*ndarray"),
    "ragged lists": (dict(key=[[1.0], [1.0, 2.0]]), TypeError, "key must be .*list"),
    "heads first": (
        {"query": zeros(2, 8, 6, 4), "key": zeros(2, 8, 9, 4), "value": zeros(2, 8, 9, 4)},
        ValueError,
        r"num_heads \(6\) must be a multiple of num_kv_heads \(9\).*fit as layout=.BHSD.",
    ),
    "heads last": (
        {"query": zeros(2, 6, 8, 4), "key": zeros(2, 9, 8, 4), "value": zeros(2, 9, 8, 4), "layout": "BHSD"},
        ValueError,
        "fit as layout=.BSHD.",
    ),
    "decoding, heads first": (
        {"query": zeros(2, 8, 1, 4), "key": zeros(2, 8, 9, 4), "value": zeros(2, 8, 9, 4)},
        ValueError,
        "fit as layout=.BHSD.",
    ),
    "jax without a batch": (
        {"query": zeros(5, 2, 8), "key": zeros(7, 2, 8), "value": zeros(7, 2, 8)},
        ValueError,
        r"same batch size, got 5, 7, 7 \(query \(5, 2, 8\).*\[seqlen, num_heads, head_dim\].*x\[None\]",
    ),
    "flash-attn layout": (dict(layout="NHD"), ValueError, r"layout must be 'BSHD' or 'BHSD', got 'NHD'; 'BSHD' is \[batch"),
    "no heads": (
        {"query": zeros(2, 5, 0, 8), "key": zeros(2, 7, 0, 8), "value": zeros(2, 7, 0, 8)},
        ValueError,
        r"num_heads \(0\) must be a multiple of num_kv_heads \(0\)",
    ),
    # Options.
    "window of one number": (dict(window=3), TypeError, r"pair .*got 3: Keras's sliding_window=3 is \(2, 2\), JAX's"),
    "window negative": (dict(window=(-3, 0)), ValueError, r"from 0, or None or -1 for unbounded, got \(-3, 0\)"),
    "causal tensor": (dict(is_causal=np.array([True])), TypeError, "is_causal must be True or False, fixed when"),
    "causal word": (dict(is_causal="lower_right"), TypeError, "is_causal must be True or False"),
    "alignment of torch": (
        dict(is_causal=True, causal_alignment="lower_right"), ValueError, "'top_left' or 'bottom_right', got 'lower_right'",
    ),
    "dropout array": (dict(dropout_rate=zeros()), TypeError, "dropout_rate must be a Python number, fixed when"),
    "dropout in percent": (dict(dropout_rate=10), ValueError, r"dropout_rate must be in \[0, 1\), got 10"),
    "dropout True": (dict(dropout_rate=True), TypeError, "dropout_rate must be a Python number.*bool"),
    "dropout None": (dict(dropout_rate=None), TypeError, "dropout_rate must be a Python number.*NoneType"),
    "float seed": (dict(dropout_rate=0.1, dropout_seed=3.0), TypeError, r"dropout_seed must hold integers.*int\(seed\)"),
    "negative lengths": (dict(query_seq_lengths=[-1, 3]), ValueError, "query_seq_lengths must be between 0 and 5, got -1"),
    "float lengths": (dict(query_seq_lengths=[1.0, 2.0]), TypeError, "must hold integers, got float32; round and cast"),
    "mask as lengths": (
        dict(key_value_seq_lengths=true(2, 7)), TypeError, "must hold integers, got bool; .*mask=attn_ops.masks.key_padding",
    ),
    "cumulative lengths": (
        dict(key_value_seq_lengths=[0, 3, 7]), ValueError, r"shape \[batch=2\], got \(3,\); of cumulative lengths",
    ),
    "one length": (dict(query_seq_lengths=3), ValueError, r"query_seq_lengths must have shape \[batch=2\], got \(\)"),
    "a device": (dict(implementation="cuda"), ValueError, "got 'cuda'; the device is that of the tensors"),
    "another name of it": (dict(implementation="flash"), ValueError, "got 'flash'; .*'fused'"),
    "xla": (dict(implementation="xla"), ValueError, "got 'xla'; .*'composite'"),
}  # fmt: skip


@pytest.mark.parametrize("framework", FRAMEWORKS)
@pytest.mark.parametrize("case", CASES)
def test_the_message_says_what_to_do(framework, case):
    change, exception, words = CASES[case]
    with pytest.raises(exception, match=f"^scaled_dot_product_attention: .*{words}") as error:
        FRAMEWORKS[framework][0](**arguments(**change))
    assert type(error.value) is exception
    assert "array([[" not in str(error.value) and len(str(error.value)) < 700


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_options_by_position(framework):
    attend, weigh = FRAMEWORKS[framework]
    q, k, v = arguments().values()
    with pytest.raises(TypeError, match=r"takes 3 arguments by position \(query, key, value\), got 4; .*mask="):
        attend(q, k, v, true(5, 7))
    with pytest.raises(TypeError, match=r"attention_weights: takes 2 arguments by position \(query, key\), got 3"):
        weigh(q, k, v)
    with pytest.raises(TypeError, match="attention_weights: .*'attn_mask'; "):
        weigh(q, k, attn_mask=true(5, 7))


def test_the_hint_of_a_cast_works():
    """Each framework's own."""
    for framework, x in ("tensorflow", tf.ones([2, 5, 1, 4], tf.int32)), ("jax", jnp.ones((2, 5, 1, 4), "int32")):
        attend = FRAMEWORKS[framework][0]
        with pytest.raises(TypeError) as error:
            attend(x, x, x)
        hint = re.search(r"cast it: (.*)$", str(error.value)).group(1)
        cast = eval(hint, {"tf": tf, "query": x})
        assert attend(cast, cast, cast).shape == (2, 5, 1, 4)


SPARSE = {
    "ragged": (tf.ragged.constant([[1.0, 2.0], [3.0]]), "query is a RaggedTensor; .*to_tensor.*query_seq_lengths"),
    "sparse": (tf.sparse.eye(3), "query must be a dense tensor .*SparseTensor; tf.sparse.to_dense"),
}


@pytest.mark.parametrize("kind", SPARSE)
def test_ragged_and_sparse_tensors(kind):
    x, words = SPARSE[kind]
    with pytest.raises(TypeError, match=words):
        attn_ops.scaled_dot_product_attention(x, x, x)
    with pytest.raises(TypeError, match="must be an array, got .*Tensor; make it dense"):
        attn_ops.jax.scaled_dot_product_attention(x, x, x)
    with pytest.raises(TypeError, match=f"key_padding: {kind} tensors are not supported; make it dense"):
        masks.key_padding(x)


def test_layers_that_do_not_take_ragged_tensors():
    x = tf.ragged.constant([[[1.0, 2.0], [3.0, 4.0]], [[5.0, 6.0]]], ragged_rank=1)
    with pytest.raises(TypeError, match="is a RaggedTensor.*to_tensor.*mask"):
        attn_ops.layers.RotaryEmbedding()(x)


def test_a_mask_of_two_axes_is_never_of_the_keys_even_where_the_batch_is_as_large_as_seqlen_q():
    """As documented: `masks.key_padding` tells."""
    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal((5, n, 2, 4)).astype("float32") for n in (5, 7, 7))
    mask = rng.random((5, 7)) < 0.7
    mask[:, 0] = True
    for attend, _ in FRAMEWORKS.values():
        by_rows = attn_ops.reference.attention(q, k, v, mask=np.broadcast_to(mask, (5, 1, 5, 7)))[0]
        by_keys = attn_ops.reference.attention(q, k, v, mask=np.broadcast_to(mask[:, None, None], (5, 1, 5, 7)))[0]
        np.testing.assert_allclose(attend(q, k, v, mask=mask), by_rows, rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(attend(q, k, v, mask=masks.key_padding(mask)), by_keys, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("heads, kv_heads", [(0, 0), (2, 0)])
def test_no_key_heads_are_refused_by_all(heads, kv_heads):
    q, k = zeros(2, 5, heads, 8), zeros(2, 7, kv_heads, 8)
    calls = [
        *(lambda i=i: attn_ops.scaled_dot_product_attention(q, k, k, implementation=i) for i in ("composite", "fused")),
        tf.function(lambda: attn_ops.scaled_dot_product_attention(q, k, k), jit_compile=True, autograph=False),
        lambda: attn_ops.attention_weights(q, k),
        *(lambda i=i: attn_ops.jax.scaled_dot_product_attention(q, k, k, implementation=i) for i in ("composite", "fused")),
        lambda: attn_ops._core.forward(q, k, k),
        lambda: attn_ops.reference.attention(q, k, k),
    ]
    for call in calls:
        with pytest.raises(ValueError, match=rf"num_heads \({heads}\) must be a multiple of num_kv_heads \(0\)"):
            call()


def test_no_query_heads_give_an_empty_result():
    q, k = zeros(2, 5, 0, 8), zeros(2, 7, 2, 8)
    for attend, _ in FRAMEWORKS.values():
        assert attend(q, k, k).shape == (2, 5, 0, 8)
