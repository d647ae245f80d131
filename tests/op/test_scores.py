"""What is computed of scores beside products: the helpers, identities between options, and input that is refused."""

import math

import jax
import keras
import numpy as np
import pytest
import tensorflow as tf

import attn_ops
import attn_ops.jax
from attn_ops import masks
from attn_ops.call.attention_call import beyond_cuda
from attn_ops.call.normalize import normalize
from attn_ops.tensorflow import xp
from position_buckets import mesh_tensorflow_bucket

BATCH, SEQLEN_Q, SEQLEN_K, HEADS, KV_HEADS, DIM = 2, 5, 7, 4, 2, 8
FRAMEWORKS = {"tensorflow": attn_ops, "jax": attn_ops.jax, "reference": attn_ops.reference}


def normal(*shape, seed=0):
    return np.random.default_rng([seed, *shape]).standard_normal(shape).astype("float32")


def inputs():
    key = normal(BATCH, SEQLEN_K, KV_HEADS, DIM, seed=1)
    return {"query": normal(BATCH, SEQLEN_Q, HEADS, DIM), "key": key, "value": normal(*key.shape, seed=2)}


def attend(**options):
    return attn_ops.scaled_dot_product_attention(**inputs(), **options)


# The helpers.


def test_slopes_of_powers_of_two():
    # Press et al. 2021: for 8 heads the geometric sequence that starts at 1/2 with ratio 1/2; for 16, 2^-0.5.
    np.testing.assert_array_equal(attn_ops.alibi_slopes(8), [2.0**-i for i in range(1, 9)])
    np.testing.assert_allclose(attn_ops.alibi_slopes(16), [2.0 ** (-i / 2) for i in range(1, 17)], rtol=1e-7)
    np.testing.assert_array_equal(attn_ops.alibi_slopes(1), [2.0**-8])
    assert attn_ops.alibi_slopes(8).dtype == np.float32


@pytest.mark.parametrize("num_heads", [3, 6, 12, 20, 71])
def test_slopes_of_other_numbers_of_heads(num_heads):
    """As the code of the paper makes them, by its recursion."""

    def get_slopes(n):
        if math.log2(n).is_integer():
            start = 2 ** (-(2 ** -(math.log2(n) - 3)))
            return [start * start**i for i in range(n)]
        closest = 2 ** math.floor(math.log2(n))
        return get_slopes(closest) + get_slopes(2 * closest)[0::2][: n - closest]

    np.testing.assert_allclose(attn_ops.alibi_slopes(num_heads), get_slopes(num_heads), rtol=1e-6)


@pytest.mark.parametrize("num_heads, error", [(0, ValueError), (-3, ValueError), (2.0, TypeError), (True, TypeError)])
def test_slopes_of_no_number_of_heads(num_heads, error):
    with pytest.raises(error, match="alibi_slopes: num_heads must be"):
        attn_ops.alibi_slopes(num_heads)


@pytest.mark.parametrize("bidirectional", [True, False])
@pytest.mark.parametrize("num_buckets, max_distance", [(32, 128), (32, 20), (8, 5), (33, 100), (4, 3)])
def test_buckets_are_those_of_mesh_tensorflow(bidirectional, num_buckets, max_distance):
    """At every distance, also beyond the table by distance that they become."""
    bias = attn_ops.T5RelativeBias(None, bidirectional, max_distance)
    buckets = bias.buckets("test", num_buckets)
    assert buckets.shape == (2 * max_distance + 1,)
    for distance in range(-3 * max_distance, 3 * max_distance + 1):
        found = buckets[max_distance + max(-max_distance, min(distance, max_distance))]
        assert found == mesh_tensorflow_bucket(distance, bidirectional, num_buckets, max_distance), distance


def test_buckets_of_hugging_face():
    # T5Attention._relative_position_bucket of transformers, with its defaults (32 buckets, up to 128).
    distances = [-200, -128, -64, -20, -8, -7, -1, 0, 1, 7, 8, 16, 32, 64, 127, 500]
    of_encoder = [15, 15, 14, 10, 8, 7, 1, 0, 17, 23, 24, 26, 28, 30, 31, 31]
    of_decoder = [31, 31, 26, 17, 8, 7, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0]
    for bidirectional, expected in ((True, of_encoder), (False, of_decoder)):
        buckets = attn_ops.T5RelativeBias(None, bidirectional).buckets("test", 32)
        assert [int(buckets[128 + max(-128, min(d, 128))]) for d in distances] == expected


# Identities: what one option says, another says too.

OWN = np.arange(SEQLEN_Q)[:, None]
DISTANCES = np.arange(SEQLEN_K) - OWN
SLOPES = attn_ops.alibi_slopes(HEADS)
TABLE = normal(5, HEADS, seed=3)
SINKS = normal(HEADS, seed=4)


def with_sink_key():
    """The inputs with one more key, whose value is 0 and whose scores the sinks are; and the bias that makes them so."""
    x = {name: np.pad(a, [[0, 0], [0, int(name != "query")], [0, 0], [0, 0]]) for name, a in inputs().items()}
    bias = np.zeros((1, HEADS, 1, SEQLEN_K + 1), "float32")
    bias[0, :, 0, -1] = SINKS
    return x, bias


@pytest.mark.parametrize("chosen", ["fused", "composite"])
def test_identities(chosen):
    def check(left, right, x=None):
        x = inputs() if x is None else x
        found, expected = (
            attn_ops.scaled_dot_product_attention(**a, **b, return_lse=True, implementation=chosen)
            for a, b in ((inputs(), left), (x, right))
        )
        for y, z in zip(found, expected):
            np.testing.assert_allclose(y, z, atol=3e-6)

    bias = SLOPES[:, None, None] * DISTANCES
    check({"alibi_slopes": SLOPES}, {"bias": bias[None].astype("float32")})
    check({"alibi_slopes": SLOPES, "query_offset": 2}, {"bias": (bias - 2 * SLOPES[:, None, None])[None].astype("float32")})
    check({"relative_bias": TABLE}, {"bias": np.moveaxis(TABLE[np.clip(DISTANCES, -2, 2) + 2], 2, 0)[None]})
    check({"relative_bias": np.ones((1, HEADS), "float32")}, {"bias": np.ones((1, 1, 1, 1), "float32")})
    x, sink_bias = with_sink_key()
    check({"sinks": SINKS}, {"bias": sink_bias}, x)
    check({"is_causal": True, "query_offset": 2}, {"is_causal": True, "causal_alignment": "bottom_right"})
    check({"logits_soft_cap": 1e6}, {})
    check({"logits_soft_cap": 1e300}, {})  # beyond float32


HIDE_NOTHING = {
    "array": np.ones((BATCH, 1, 1, SEQLEN_K), bool),
    "arrays": [np.ones((BATCH, 1, 1, SEQLEN_K), bool)] * 2,
    "padding": masks.key_padding(np.ones((BATCH, SEQLEN_K), bool)),
    "intervals": masks.intervals(np.zeros(SEQLEN_Q, int)),
    "segments": masks.segments(np.zeros((1, SEQLEN_Q), int), np.zeros((1, SEQLEN_K), int)),
    "blocks": masks.block_sparse(np.ones((1, 1), bool), 8, 8),
    "a function": masks.from_function(lambda b, h, q, k: k >= 0),
    "several": [masks.prefix(SEQLEN_K, "bottom_right"), masks.block_sparse(np.ones((1, 1), bool), 8, 8)],
    "said in it": masks.Mask(causal_alignment="bottom_right"),
}


@pytest.mark.parametrize("chosen", ["fused", "composite", "reference", "jax"])
@pytest.mark.parametrize("mask", HIDE_NOTHING)
def test_rows_stand_where_the_call_says_whatever_the_mask(mask, chosen):
    attention = attn_ops.jax if chosen == "jax" else attn_ops
    chosen = {} if chosen == "jax" else {"implementation": chosen}
    said = {} if mask == "said in it" else {"causal_alignment": "bottom_right"}
    terms = {"alibi_slopes": SLOPES, "relative_bias": TABLE}
    found, expected = (
        attention.scaled_dot_product_attention(**inputs(), **terms, **chosen, **options)
        for options in ({**said, "mask": HIDE_NOTHING[mask]}, {"query_offset": SEQLEN_K - SEQLEN_Q})
    )
    np.testing.assert_allclose(found, expected, atol=3e-6)


@pytest.mark.parametrize("chosen", ["fused", "composite"])
def test_tiny_caps_make_all_scores_equal(chosen):
    for cap in (1e-30, 1e-300, 5e-324):
        out = attend(logits_soft_cap=cap, implementation=chosen)
        mean = np.repeat(inputs()["value"].mean(1), HEADS // KV_HEADS, 1)
        np.testing.assert_allclose(out, np.broadcast_to(mean[:, None], out.shape), atol=1e-6)


@pytest.mark.parametrize("chosen", ["fused", "composite", "reference"])
def test_rows_without_keys_have_their_sink(chosen):
    """out 0, lse the sink, and the gradient of lse goes there, whatever comes in from out."""
    sinks = tf.constant(SINKS)
    d_out = np.zeros((BATCH, SEQLEN_Q, HEADS, DIM), "float32")
    d_out[:, 3:] = np.nan
    with tf.GradientTape() as tape:
        tape.watch(sinks)
        out, lse = attend(
            sinks=sinks,
            query_seq_lengths=np.array([3, 3]),
            return_lse=True,
            implementation=chosen,
        )
    assert (out[:, 3:].numpy() == 0).all()
    np.testing.assert_array_equal(lse[:, :, 3:], np.broadcast_to(SINKS[:, None], (BATCH, HEADS, 2)))
    d_lse = np.zeros(lse.shape, "float32")
    d_lse[0, :, 4] = 0.5
    d_sinks = tape.gradient([out, lse], sinks, output_gradients=[tf.constant(d_out), tf.constant(d_lse)])
    np.testing.assert_allclose(d_sinks, [0.5] * HEADS, atol=1e-6)


def test_slopes_are_constants():
    slopes, table = tf.Variable(SLOPES), tf.Variable(TABLE)
    for implementation in ("fused", "composite"):
        with tf.GradientTape() as tape:
            out = attend(alibi_slopes=slopes, relative_bias=table, implementation=implementation)
        d_slopes, d_table = tape.gradient(out, [slopes, table])
        assert d_slopes is None and d_table.shape == table.shape


def test_tables_keep_their_dtype():
    """16-bit inputs, a float32 table, and the other way round; gradients come in the dtype of the table."""
    for of_inputs, of_table in (("float16", "float32"), ("float32", "bfloat16"), ("float64", "float32")):
        table = tf.cast(normal(32, HEADS), of_table)
        x = [tf.cast(a, of_inputs) for a in inputs().values()]
        with tf.GradientTape() as tape:
            tape.watch(table)
            out = attn_ops.scaled_dot_product_attention(*x, relative_bias=attn_ops.T5RelativeBias(table))
        d_table = tape.gradient(out, table)
        assert out.dtype == of_inputs and d_table.dtype == table.dtype and d_table.shape == table.shape


def test_reasons_on_gpus():
    plain = normalize(xp, "test", **inputs(), is_causal=True)
    offset = normalize(xp, "test", **inputs(), mask=masks.prefix(3), query_offset=2)
    scored = normalize(xp, "test", **inputs(), logits_soft_cap=3, alibi_slopes=SLOPES, sinks=SINKS)
    scattered = normalize(xp, "test", **inputs(), mask=masks.segments([[0, 1, 0, 1, 0]], [[1, 0, 1, 0, 1, 0, 1]]))
    blocks = normalize(xp, "test", **inputs(), mask=masks.block_sparse(np.ones((1, 1), bool), 8, 8))
    assert all(beyond_cuda(call) is None for call in (plain, offset, scored, scattered, blocks))
    tabled = normalize(xp, "test", **inputs(), sinks=SINKS, relative_bias=TABLE)
    assert beyond_cuda(tabled) is None


# Input that is refused, in each framework.

BAD = {
    "cap of 0": ({"logits_soft_cap": 0}, ValueError, "logits_soft_cap must be positive and finite, got 0"),
    "negative cap": ({"logits_soft_cap": -2.5}, ValueError, "must be positive and finite, got -2.5"),
    "infinite cap": ({"logits_soft_cap": math.inf}, ValueError, "positive and finite, got inf"),
    "cap of NaN": ({"logits_soft_cap": math.nan}, ValueError, "positive and finite, got nan"),
    "huge cap": ({"logits_soft_cap": 10**400}, ValueError, "positive and finite"),
    "cap of an array": ({"logits_soft_cap": np.ones(3)}, TypeError, "logits_soft_cap must be a Python number.*ndarray"),
    "cap of a word": ({"logits_soft_cap": "30"}, TypeError, "logits_soft_cap must be a Python number.*str"),
    "cap of True": ({"logits_soft_cap": True}, TypeError, "logits_soft_cap must be a Python number.*bool"),
    "negative offset": ({"query_offset": -1}, ValueError, "query_offset must be between 0 and 2.30, got -1"),
    "large offset": ({"query_offset": 2**30 + 1}, ValueError, "between 0 and 2.30, got 1073741825"),
    "huge offset": ({"query_offset": 2**70}, ValueError, "between 0 and 2.30, got"),
    "one large offset": ({"query_offset": np.array([0, 2**40])}, ValueError, "between 0 and 2.30, got"),
    "one negative offset": ({"query_offset": np.array([3, -7])}, ValueError, "between 0 and 2.30, got -7"),
    "offsets of others": ({"query_offset": np.array([0, 1, 2])}, ValueError, r"\[batch=2\], got \(3,\)"),
    "offsets of rank 2": ({"query_offset": np.array([[0, 1]])}, ValueError, r"\[batch=2\], got \(1, 2\)"),
    "floating offset": ({"query_offset": 1.5}, TypeError, "query_offset must hold integers, got float"),
    "boolean offset": ({"query_offset": np.array([True, False])}, TypeError, "query_offset must hold integers, got bool"),
    "two alignments": (
        {"query_offset": 1, "is_causal": True, "causal_alignment": "bottom_right"},
        ValueError,
        "query_offset .*bottom_right",
    ),
    "alignment of a mask": ({"query_offset": 1, "mask": masks.causal("bottom_right")}, ValueError, "query_offset .*bottom_right"),
    "two places of a row": (
        {"alibi_slopes": SLOPES, "mask": masks.causal(), "causal_alignment": "bottom_right"},
        ValueError,
        "alibi_slopes and relative_bias count from where rows stand, .*'bottom_right', but 'top_left' in the mask",
    ),
    "two places of a row, of a table": (
        {"relative_bias": TABLE, "mask": masks.prefix(2, "bottom_right"), "causal_alignment": "top_left"},
        ValueError,
        "alibi_slopes and relative_bias count from where rows stand, .*'top_left', but 'bottom_right' in the mask",
    ),
    "slopes too few": ({"alibi_slopes": SLOPES[:3]}, ValueError, r"alibi_slopes must have shape \[num_heads=4\].*\(3,\)"),
    "slopes of other entries": ({"alibi_slopes": np.ones((3, 4), "f")}, ValueError, r"\[batch=2, num_heads=4\], got \(3, 4\)"),
    "slopes of no rank": ({"alibi_slopes": np.float32(0.5)}, ValueError, r"alibi_slopes must have shape .*got \(\)"),
    "integer slopes": ({"alibi_slopes": [1, 1, 1, 1]}, TypeError, "alibi_slopes must be floating, got int"),
    "large slopes": ({"alibi_slopes": [0.5, 0.1, -1e20, 0.1]}, ValueError, r"from -2\^64 to 2\^64, got .*-1\S*e\+20"),
    "infinite slopes": ({"alibi_slopes": [0.5, math.inf, 0.1, 0.1]}, ValueError, "alibi_slopes must be finite numbers .*got .*inf"),
    "an even table": ({"relative_bias": np.ones((4, 4), "f")}, ValueError, r"2 R \+ 1 rows.*\(4, 4\).*T5RelativeBias"),
    "an empty table": ({"relative_bias": np.ones((0, 4), "f")}, ValueError, r"2 R \+ 1 rows.*\(0, 4\)"),
    "table of other heads": ({"relative_bias": np.ones((5, 2), "f")}, ValueError, r"num_heads=4\], got \(5, 2\)"),
    "table of rank 1": ({"relative_bias": np.ones(5, "f")}, ValueError, r"\[2 R \+ 1, num_heads=4\], got \(5,\)"),
    "integer table": ({"relative_bias": np.ones((5, 4), int)}, TypeError, "relative_bias must be floating, got int"),
    "too few buckets": (
        {"relative_bias": attn_ops.T5RelativeBias(np.ones((3, 4), "f"))},
        ValueError,
        "at least 4 buckets.*got 3 buckets",
    ),
    "one bucket": (
        {"relative_bias": attn_ops.T5RelativeBias(np.ones((1, 4), "f"), bidirectional=False)},
        ValueError,
        "at least 2 buckets.*got 1 buckets",
    ),
    "buckets beyond the distance": (
        {"relative_bias": attn_ops.T5RelativeBias(np.ones((32, 4), "f"), max_distance=8)},
        ValueError,
        "max_distance beyond the 8 .*max_distance=8",
    ),
    "buckets of other heads": (
        {"relative_bias": attn_ops.T5RelativeBias(np.ones((32, 2), "f"))},
        ValueError,
        r"\[num_buckets, num_heads=4\], got \(32, 2\)",
    ),
    "sinks too many": ({"sinks": np.ones(5, "f")}, ValueError, r"sinks must have shape \[num_heads=4\], got \(5,\)"),
    "sinks of rank 2": ({"sinks": np.ones((1, 4), "f")}, ValueError, r"sinks must have shape .*got \(1, 4\)"),
    "integer sinks": ({"sinks": np.ones(4, int)}, TypeError, "sinks must be floating, got int"),
    "intervals of other rows": ({"mask": masks.intervals([0] * 4)}, ValueError, "seqlen_q"),
    "intervals of other entries": ({"mask": masks.intervals([[0] * 5] * 3)}, ValueError, "batch=2 or 1.*got"),
    "prefixes of other entries": ({"mask": masks.prefix([1, 2, 3])}, ValueError, r"batch=2 or 1.*the mask is prefix\[3\]"),
    "a function as it is": (
        {"mask": lambda b, h, q, k: q >= k},
        TypeError,
        r"mask must be boolean .*got the function <lambda>; .*masks.from_function\(mask\)",
    ),
    "a mask that was not called": ({"mask": masks.causal}, TypeError, "mask must be boolean .*got the function causal"),
    "ids of other keys": ({"mask": masks.segments([[0] * 5], [[0] * 6])}, ValueError, "seqlen_k"),
    "sequences past the rows": ({"mask": masks.packed([0, 3, 6], [0, 2, 7])}, ValueError, "cu_seqlens_q must end within the 5"),
    "sequences past the keys": ({"mask": masks.packed([0, 3, 5], [0, 2, 8])}, ValueError, "cu_seqlens_k must end within the 7"),
    "sequences past both": ({"mask": masks.packed([0, 3, 8])}, ValueError, "cu_seqlens_q must end within the 7 tokens.*got 8"),
    "a function of another shape": (
        {"mask": masks.from_function(lambda b, h, q, k: np.ones(3, bool))},
        ValueError,
        r"must be one boolean for each q and k, got shape \(3,\)",
    ),
    "a function that fails": (
        {"mask": masks.from_function(lambda b, h, q, k: {}[1])},
        ValueError,
        "cannot be evaluated on integers: KeyError: 1",
    ),
    "blocks too few": ({"mask": masks.block_sparse(np.ones((2, 2), bool), 2, 4)}, ValueError, "block_sparse|blocks of"),
    "blocks of other heads": (
        {"mask": masks.block_sparse(np.ones((1, 3, 1, 1), bool), 8, 8)},
        ValueError,
        "num_heads=4 or 1",
    ),
}


@pytest.mark.parametrize("framework", ["tensorflow", "jax"])
@pytest.mark.parametrize("case", BAD)
def test_bad_input(framework, case):
    options, error, words = BAD[case]
    with pytest.raises(error, match=words) as raised:
        FRAMEWORKS[framework].scaled_dot_product_attention(**inputs(), **options)
    assert "scaled_dot_product_attention: " in str(raised.value)


@pytest.mark.parametrize("case", [case for case in BAD if "mask" not in BAD[case][0]])
def test_bad_input_of_the_reference(case):
    options, error, words = BAD[case]
    with pytest.raises(error, match=words):
        attn_ops.reference.attention(**inputs(), **options)


@pytest.mark.parametrize(
    "arguments, error, words",
    [
        ((None, 1), TypeError, "bidirectional must be True or False, got int"),
        ((None, True, 12.5), TypeError, "max_distance must be an integer, got float"),
        ((None, True, 0), ValueError, "max_distance must be at least 1, got 0"),
    ],
)
def test_bad_buckets(arguments, error, words):
    with pytest.raises(error, match=f"T5RelativeBias: {words}"):
        attn_ops.T5RelativeBias(*arguments)


RUNNING = {
    "negative offset": ("query_offset", [0, -1], lambda x: {"query_offset": x}),
    "large offset": ("query_offset", [2**30 + 1, 0], lambda x: {"query_offset": x}),
    "rows whose ids go back": (
        "contiguous=True q_ids must never go back",
        [0, 1, 0, 2, 2],
        lambda x: {"mask": masks.segments(x, np.arange(SEQLEN_K), contiguous=True)},
    ),
    "keys whose ids go back": (
        "contiguous=True kv_ids must never go back",
        [0, 1, 0, 2, 2, 2, 2],
        lambda x: {"mask": masks.segments(np.arange(SEQLEN_Q), x, contiguous=True)},
    ),
    "lengths that go back": (
        "packed: cu_seqlens_q must never go back",
        [0, 3, 2, 5],
        lambda x: {"mask": masks.packed(x, [0, 2, 4, 7])},
    ),
    "lengths that do not start": (
        "packed: cu_seqlens_k must start at 0|never go back",
        [3, 0, 5],
        lambda x: {"mask": masks.packed([0, 2, 5], x)},
    ),
    "sequences past the rows": (
        "packed: cu_seqlens_q must end within the .*tokens of the call",
        [0, 3, SEQLEN_Q + 1],
        lambda x: {"mask": masks.packed(x, [0, 2, 7])},
    ),
    "sequences past the keys": (
        f"packed: cu_seqlens_k must end within the {SEQLEN_K} tokens of the call",
        [0, 3, SEQLEN_K + 1],
        lambda x: {"mask": masks.packed([0, 2, 5], x)},
    ),
    "sequences past both": (
        f"packed: cu_seqlens_q must end within the {SEQLEN_K} tokens of the call",
        [0, 3, SEQLEN_K + 1],
        lambda x: {"mask": masks.packed(x)},
    ),
    "a negative prefix": ("prefix: length must not be negative", [2, -1], lambda x: {"mask": masks.prefix(x)}),
    "blocks of other numbers": (
        "block_sparse: blocks must be boolean, or hold 0 and 1",
        [0, 1, 5, 0, 1],
        lambda x: {"mask": masks.block_sparse(tf.cast(x // 5 * 4 + x % 2, tf.uint8)[:, None], 1, 8)},
    ),
    "large slopes": (
        r"slopes.* must be (a number|finite numbers) from -2\^64 to 2\^64",
        [0, -(2**30), 0, 1],
        lambda x: {"alibi_slopes": tf.cast(x, tf.float32) * 2.0**40},
    ),
    "ends that move back": ("never move back|must not be less than that of the row before", [0, 1, 2, 1, 3], lambda x: {"mask": masks.intervals(x)}),
}


@pytest.mark.parametrize("chosen", ["fused", "composite"])
@pytest.mark.parametrize("case", RUNNING)
def test_what_only_the_running_op_can_refuse(chosen, case):
    words, values, options = RUNNING[case]
    function = tf.function(
        lambda x: attend(**options(x), implementation=chosen), input_signature=[tf.TensorSpec([None], tf.int32)]
    )
    with pytest.raises(tf.errors.InvalidArgumentError, match=words):
        function(tf.constant(values, tf.int32))
    right = [0, 1, 0, 0, 1] if case == "blocks of other numbers" else sorted(min(max(v, 0), 5) for v in values)
    function(tf.constant(right, tf.int32))


@pytest.mark.parametrize("chosen", ["fused", "composite"])
def test_rows_of_nan_without_keys_do_not_count_in_the_gradient_of_a_scale(chosen):
    given, lengths = inputs(), [SEQLEN_Q - 2, SEQLEN_Q]
    query = np.asarray(given.pop("query")).copy()
    query[0, SEQLEN_Q - 2 :] = np.nan
    found = []
    for q in (query, np.nan_to_num(query)):
        with tf.GradientTape() as tape:
            tape.watch(scale := tf.constant(0.4))
            out = attn_ops.scaled_dot_product_attention(
                q, **given, scale=scale, query_seq_lengths=lengths, implementation=chosen
            )
        found.append(tape.gradient(out, scale).numpy())
    assert found[0] == pytest.approx(found[1], rel=1e-5)


@pytest.mark.parametrize("explain", [attn_ops.explain, attn_ops.jax.explain], ids=["tensorflow", "jax"])
def test_explain_tells_what_a_function_is(explain):
    same = {"query": normal(1, 8, 2, 4), "key": normal(1, 8, 2, 4), "value": normal(1, 8, 2, 4)}
    found = explain(**same, mask=masks.from_function(lambda b, h, q, k: q >= k))
    assert any("causal" in note for note in found.notes) and "note: mask: from_function" in str(found)
    assert not any("mask" in note for note in explain(**same, is_causal=True).notes)


def test_functional_models_have_all_options(tmp_path):
    options = {
        "query_offset": 1,
        "is_causal": True,
        "logits_soft_cap": 2.0,
        "alibi_slopes": SLOPES,
        "relative_bias": attn_ops.T5RelativeBias(normal(8, HEADS), max_distance=6),
        "sinks": SINKS,
    }
    x = inputs()
    query, key = keras.Input(x["query"].shape[1:]), keras.Input(x["key"].shape[1:])
    out, lse = attn_ops.scaled_dot_product_attention(query, key, key, **options, return_lse=True)
    assert out.shape == (None, SEQLEN_Q, HEADS, DIM) and lse.shape == (None, HEADS, SEQLEN_Q)
    model = keras.Model([query, key], [out, lse])
    model.save(tmp_path / "model.keras")
    expected = attn_ops.reference.attention(x["query"], x["key"], x["key"], **options)
    for one in (model, keras.saving.load_model(tmp_path / "model.keras")):
        for y, z in zip(one([x["query"], x["key"]]), expected):
            np.testing.assert_allclose(y, z, atol=3e-6)


def test_a_table_is_a_tree_of_jax():
    bias = attn_ops.T5RelativeBias(jax.numpy.asarray(normal(32, HEADS)), bidirectional=False)
    leaves, structure = jax.tree.flatten(bias)
    assert len(leaves) == 1 and not jax.tree.unflatten(structure, leaves).bidirectional
