"""Attention of packed and of ragged sequences, against one plain attention per sequence in float64."""

import numpy as np
import pytest

import attn_ops
from attn_ops import masks

tf = pytest.importorskip("tensorflow")
jax = pytest.importorskip("jax")
import attn_ops.jax  # noqa: E402

HEADS, KV_HEADS, DIM = 4, 2, 8
LENGTHS_Q = [3, 0, 5, 1, 7]
LENGTHS_K = [4, 2, 5, 0, 3]
SLOPES = np.array([0.5, 0.25, 0.125, 0.0625], np.float32)
SINKS = np.array([0.3, -1.0, 2.0, 0.0], np.float32)


def cumulative(lengths):
    return np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)


def tokens(lengths_q, lengths_k, dtype="float32", seed=0):
    """q, k, v and d_out of packed sequences."""
    rng = np.random.default_rng(seed)
    shapes = [(sum(lengths_q), HEADS), (sum(lengths_k), KV_HEADS), (sum(lengths_k), KV_HEADS), (sum(lengths_q), HEADS)]
    return [rng.standard_normal((*shape, DIM)).astype(dtype) for shape in shapes]


def one_sequence(q, k, v, d_out, bias, seen, offset, causal, left, right, bottom_right, scale, cap, slopes, sinks):
    """out, lse, dq, dk, dv, d_bias of `[heads, seqlen, dim]`, float64, keys repeated for each head."""
    rows, keys = np.arange(q.shape[1])[:, None], np.arange(k.shape[1])
    distance = keys - rows - (offset if offset is not None else k.shape[1] - q.shape[1] if bottom_right else 0)
    if causal:
        seen &= distance <= 0
    if left is not None:
        seen &= distance >= -left
    if right is not None:
        seen &= distance <= right
    s = scale * (q @ k.swapaxes(1, 2))
    derivative = 1.0
    if cap:
        t = np.tanh(s / cap)
        s, derivative = cap * t, 1 - t**2
    if slopes is not None:
        s = s + slopes[:, None, None] * distance
    s = s + bias
    e = np.where(seen, np.exp(s), 0.0)
    total = e.sum(-1, keepdims=True) + (0 if sinks is None else np.exp(sinks)[:, None, None])
    p = e / np.where(total == 0, 1, total)
    with np.errstate(divide="ignore"):
        lse = np.log(total[..., 0])
    dp = d_out @ v.swapaxes(1, 2)
    d_bias = p * (dp - (p * dp).sum(-1, keepdims=True))
    ds = d_bias * derivative
    return p @ v, lse, scale * ds @ k, scale * ds.swapaxes(1, 2) @ q, p.swapaxes(1, 2) @ d_out, d_bias


def expected(q, k, v, d_out, lengths_q, lengths_k, *, causal=False, window=(None, None), bottom_right=True, scale=None,
             cap=None, slopes=None, sinks=None, offsets=None, bias=None, seen=None):  # fmt: skip
    """out, lse, dq, dk, dv of packed tokens, one sequence after the other; d_bias too where there is a bias. ``seen`` is
    `[total_q, total_k]`."""
    q, k, v, d_out = (x.astype(np.float64).swapaxes(0, 1) for x in (q, k, v, d_out))
    k, v = (x.repeat(HEADS // KV_HEADS, 0) for x in (k, v))
    scale = DIM**-0.5 if scale is None else scale
    starts_q, starts_k = cumulative(lengths_q), cumulative(lengths_k)
    shape = HEADS, q.shape[1], k.shape[1]
    biases, d_bias = np.zeros(shape) if bias is None else np.broadcast_to(bias, shape), np.zeros(shape)
    seen = np.ones(shape[1:], bool) if seen is None else seen
    pieces = []
    for s in range(len(lengths_q)):
        rows, keys = slice(starts_q[s], starts_q[s + 1]), slice(starts_k[s], starts_k[s + 1])
        inputs = q[:, rows], k[:, keys], v[:, keys], d_out[:, rows], biases[:, rows, keys], seen[rows, keys].copy()
        offset = offsets if offsets is None else offsets[s]
        *piece, d_bias[:, rows, keys] = one_sequence(*inputs, offset, causal, *window, bottom_right, scale, cap, slopes, sinks)
        pieces.append(piece)
    out, lse, dq, dk, dv = (np.concatenate(x, 1) for x in zip(*pieces))
    dk, dv = (x.reshape(KV_HEADS, HEADS // KV_HEADS, *x.shape[1:]).sum(1) for x in (dk, dv))
    results = [out.swapaxes(0, 1), lse, *(x.swapaxes(0, 1) for x in (dq, dk, dv))]
    if bias is None:
        return results
    missing = (1,) * (3 - bias.ndim) + bias.shape
    d_bias = d_bias.sum(tuple(axis for axis, extent in enumerate(missing) if extent == 1), keepdims=True)
    return [*results, d_bias.reshape(bias.shape)]


def run_tensorflow(q, k, v, d_out, cu, mode="eager", bias=None, **options):
    biases = [] if bias is None else [bias]

    def function(q, k, v, d_out, *more):
        cu, biases = more[: len(more) - (bias is not None)], more[len(more) - (bias is not None) :]
        with tf.GradientTape() as tape:
            tape.watch([q, k, v, *biases])
            given = {"bias": x for x in biases}
            out, lse = attn_ops.varlen_attention(q, k, v, *cu, return_lse=True, **given, **options)
            loss = tf.reduce_sum(out * d_out)
        return [out, lse, *tape.gradient(loss, [q, k, v, *biases])]

    arrays = [tf.constant(x) for x in (q, k, v, d_out, *cu, *biases)]
    if mode != "eager":
        unknown = [tf.TensorSpec([None, *x.shape[1:]], x.dtype) for x in arrays]
        function = tf.function(function, autograph=False, input_signature=unknown, jit_compile=mode == "xla")
    return [x.numpy() for x in function(*arrays)]


def run_jax(q, k, v, d_out, cu, mode="eager", bias=None, **options):
    inputs = [q, k, v] + ([] if bias is None else [bias])

    def function(inputs, d_out, cu):
        def attend(q, k, v, bias=None):
            out, lse = attn_ops.jax.varlen_attention(q, k, v, *cu, return_lse=True, bias=bias, **options)
            return (out * d_out).sum(), (out, lse)

        (_, (out, lse)), gradients = jax.value_and_grad(attend, range(len(inputs)), has_aux=True)(*inputs)
        return out, lse, *gradients

    function = jax.jit(function) if mode == "jit" else function
    return [np.asarray(x) for x in function([*map(jax.numpy.asarray, inputs)], jax.numpy.asarray(d_out), cu)]


RUN = {
    "eager": run_tensorflow,
    "graph": lambda *a, **o: run_tensorflow(*a, mode="graph", **o),
    "xla": lambda *a, **o: run_tensorflow(*a, mode="xla", **o),
    "jax": run_jax,
    "jax.jit": lambda *a, **o: run_jax(*a, mode="jit", **o),
}


def assert_near(found, wanted, tolerance=2e-5):
    for name, x, y in zip(("out", "lse", "dq", "dk", "dv", "d_bias")[: len(wanted)], found, wanted, strict=True):
        assert x.shape == y.shape, name
        np.testing.assert_allclose(x, y, rtol=tolerance, atol=tolerance, err_msg=name)


_RNG = np.random.default_rng(4)
OFFSETS = [1, 0, 0, 3, 2]
BIAS = _RNG.standard_normal((HEADS, 16, 14)).astype(np.float32)
SEEN = _RNG.random((16, 14)) < 0.6
ROWS_IDS, KEYS_IDS = _RNG.integers(0, 2, 16), _RNG.integers(0, 2, 14)
PREFIXES = np.array([2, 1, 3, 1, 2])
# Where keys and rows are in their sequences, for the chunks and prefixes of each.
IN_SEQUENCE_Q, IN_SEQUENCE_K = (np.concatenate([np.arange(n) for n in x])[:, None] for x in (LENGTHS_Q, LENGTHS_K))
IN_CHUNK = (IN_SEQUENCE_Q + np.repeat(OFFSETS, LENGTHS_Q)[:, None]) // 2 == IN_SEQUENCE_K.T // 2
IN_PREFIX = (IN_SEQUENCE_K.T <= IN_SEQUENCE_Q) | (IN_SEQUENCE_K.T < np.repeat(PREFIXES, LENGTHS_Q)[:, None])

# options of ours, and of `expected`
OPTIONS = {
    "plain": ({}, {}),
    "causal": ({"causal": True}, {"causal": True}),
    "causal from the first key": (
        {"is_causal": True, "causal_alignment": "top_left"}, {"causal": True, "bottom_right": False},
    ),
    "window": ({"window": (2, 1)}, {"window": (2, 1)}),
    "window by FlashAttention's name": ({"window_size": (1, -1), "causal": True}, {"causal": True, "window": (1, None)}),
    "scale, cap": ({"softmax_scale": 0.7, "softcap": 1.5}, {"scale": 0.7, "cap": 1.5}),
    "sinks": ({"sinks": SINKS, "is_causal": True}, {"sinks": SINKS, "causal": True}),
    "offsets": ({"query_offset": OFFSETS, "causal": True}, {"offsets": OFFSETS, "causal": True}),
    "an offset, window": ({"query_offset": 1, "window": (2, 1)}, {"offsets": [1] * 5, "window": (2, 1)}),
    "bias of heads": ({"bias": BIAS, "causal": True, "softcap": 1.5}, {"bias": BIAS, "causal": True, "cap": 1.5}),
    "bias of keys": ({"bias": BIAS[0, :1]}, {"bias": BIAS[0, :1]}),
    "mask": ({"mask": SEEN, "window": (1, 2)}, {"seen": SEEN, "window": (1, 2)}),
    "masks": (
        {"mask": [SEEN[None, :1], masks.segments(ROWS_IDS, KEYS_IDS) & masks.causal()]},
        {"seen": SEEN[:1] & (ROWS_IDS[:, None] == KEYS_IDS), "causal": True, "bottom_right": False},
    ),
    "chunks": ({"mask": masks.chunked(2), "query_offset": OFFSETS}, {"seen": IN_CHUNK}),
    "prefixes": ({"mask": masks.prefix(PREFIXES)}, {"seen": IN_PREFIX}),
}  # fmt: skip


@pytest.mark.wide(15)
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("mode", RUN)
def test_packed_tokens_are_attended_sequence_by_sequence(mode, options):
    ours, theirs = OPTIONS[options]
    inputs = tokens(LENGTHS_Q, LENGTHS_K)
    cu = cumulative(LENGTHS_Q), cumulative(LENGTHS_K)
    found = RUN[mode](*inputs, cu, implementation="composite", **ours)
    assert_near(found, expected(*inputs, LENGTHS_Q, LENGTHS_K, **theirs))


@pytest.mark.wide(6)
@pytest.mark.parametrize("mode", RUN)
def test_the_keys_lengths_are_the_rows_own_by_default(mode):
    inputs = tokens(LENGTHS_Q, LENGTHS_Q)
    found = RUN[mode](*inputs, [cumulative(LENGTHS_Q)], implementation="composite", causal=True, alibi_slopes=SLOPES)
    assert_near(found, expected(*inputs, LENGTHS_Q, LENGTHS_Q, causal=True, slopes=SLOPES))


@pytest.mark.wide(4)
@pytest.mark.parametrize("alike", ["left out", "the same array", "equal values"])
@pytest.mark.parametrize("run", [run_tensorflow, run_jax])
def test_distances_of_sequences_of_the_same_lengths(run, alike):
    inputs = tokens(LENGTHS_Q, LENGTHS_Q)
    cu = cumulative(LENGTHS_Q)
    given = [cu] + {"left out": [], "the same array": [cu], "equal values": [cu.copy()]}[alike]
    found = run(*inputs, given, implementation="composite", alibi_slopes=SLOPES)
    assert_near(found, expected(*inputs, LENGTHS_Q, LENGTHS_Q, slopes=SLOPES))
    table = np.random.default_rng(2).standard_normal((7, HEADS)).astype(np.float32)
    by_slope = SLOPES * np.arange(-8, 9, dtype=np.float32)[:, None]  # a table that is the slopes
    found = run(*inputs, given, implementation="composite", relative_bias=by_slope)
    assert_near(found, expected(*inputs, LENGTHS_Q, LENGTHS_Q, slopes=SLOPES))
    assert not np.allclose(run(*inputs, given, implementation="composite", relative_bias=table)[0], found[0])


def test_longest_sequences_and_dropout_are_taken_as_flash_attention_has_them():
    inputs = tokens(LENGTHS_Q, LENGTHS_K)
    cu = cumulative(LENGTHS_Q), cumulative(LENGTHS_K)
    q, k, v, _ = inputs
    plain = attn_ops.varlen_attention(q, k, v, *cu, implementation="composite")
    named = attn_ops.varlen_attention(q, k, v, *cu, 7, 5, dropout_p=0.0, window_size=(-1, -1), softcap=0.0,
                                      implementation="composite")  # fmt: skip
    np.testing.assert_array_equal(plain, named)
    dropped = [
        attn_ops.varlen_attention(q, k, v, *cu, implementation="composite", dropout_seed=3, **{name: 0.5})
        for name in ("dropout_p", "dropout_rate")
    ]
    np.testing.assert_array_equal(*dropped)
    assert not np.allclose(dropped[0], plain)


@pytest.mark.parametrize("lengths_q, lengths_k", [([0], [0]), ([0, 0], [3, 1]), ([4], [0]), ([1], [1])])
def test_sequences_without_rows_or_keys(lengths_q, lengths_k):
    inputs = tokens(lengths_q, lengths_k)
    for run in (run_tensorflow, run_jax):
        found = run(*inputs, (cumulative(lengths_q), cumulative(lengths_k)), implementation="composite", causal=True)
        assert_near(found, expected(*inputs, lengths_q, lengths_k, causal=True))


def test_long_sequences_are_intervals_of_two_numbers_per_row():
    """A quarter of a million tokens: no array of their square could be made."""
    from attn_ops.call import varlen
    from attn_ops.call.normalize import normalize
    from attn_ops.tensorflow import xp

    n = 2**18
    x = tf.zeros([n, 1, 1])
    cu = np.arange(0, n + 1, 2**10)
    *inputs, options = varlen.arguments(xp, "f", x, x, x, cu, None, None, None, {"is_causal": True, "window": (100, 0)})
    call = normalize(xp, "f", *inputs, **options)
    begin, end = call.intervals
    assert begin.shape == (1, n) and call.masks == () and call.segments is None and call.blocks is None
    rows = np.arange(n)
    np.testing.assert_array_equal(begin[0], np.maximum(rows - 100, rows // 2**10 * 2**10))
    np.testing.assert_array_equal(end[0], rows + 1)


def test_offsets_and_prefixes_of_which_only_the_running_function_knows():
    q, k, v, _ = tokens(LENGTHS_Q, LENGTHS_K)
    cu = cumulative(LENGTHS_Q), cumulative(LENGTHS_K)

    def attend(module, offsets, prefixes, cu):
        mask = masks.prefix(prefixes)
        return module.varlen_attention(q, k, v, *cu, query_offset=offsets, causal=True, mask=mask, implementation="composite")

    wanted = attend(attn_ops, OFFSETS, PREFIXES, cu)
    given = np.int32(OFFSETS), PREFIXES.astype(np.int32), cu
    function = tf.function(lambda *x: attend(attn_ops, *x), autograph=False)
    np.testing.assert_allclose(function(*tf.nest.map_structure(tf.constant, given)), wanted, rtol=2e-5, atol=2e-5)
    constants = tf.function(lambda: attend(attn_ops, *tf.nest.map_structure(tf.constant, given)), autograph=False)
    np.testing.assert_allclose(constants(), wanted, rtol=2e-5, atol=2e-5)
    np.testing.assert_allclose(jax.jit(lambda *x: attend(attn_ops.jax, *x))(*given), wanted, rtol=2e-5, atol=2e-5)
    with pytest.raises(tf.errors.InvalidArgumentError, match="query_offset must be between 0 and 2"):
        function(*tf.nest.map_structure(tf.constant, (-given[0], *given[1:])))


@pytest.mark.parametrize("module", [attn_ops, attn_ops.jax], ids=["tensorflow", "jax"])
def test_rows_far_behind_their_keys(module):
    """Positions and windows that 32 bits hold apart, but not together."""
    q, k, v, d_out = tokens(LENGTHS_Q, LENGTHS_K)
    window = 2**30 - 3, 2**30
    out = module.varlen_attention(q, k, v, CU_Q, CU_K, query_offset=2**30, window=window, implementation="composite")
    wanted = expected(q, k, v, d_out, LENGTHS_Q, LENGTHS_K, offsets=[2**30] * 5, window=window)[0]
    np.testing.assert_allclose(out, wanted, rtol=2e-5, atol=2e-5)


def ragged(x, lengths):
    return tf.RaggedTensor.from_row_lengths(tf.constant(x), lengths)


@pytest.mark.parametrize("mode", ["eager", "graph"])
def test_ragged_tensors(mode):
    q, k, v, d_out = inputs = tokens(LENGTHS_Q, LENGTHS_K)

    def function(query, key, value):
        flat = [x.values for x in (query, key, value)]
        with tf.GradientTape() as tape:
            tape.watch(flat)
            query, key, value = (x.with_values(y) for x, y in zip((query, key, value), flat))
            out, lse = attn_ops.ragged_attention(
                query, key, value, is_causal=True, return_lse=True, implementation="composite"
            )
            loss = tf.reduce_sum(out.values * d_out)
        return out, lse, *tape.gradient(loss, flat)

    arguments = ragged(q, LENGTHS_Q), ragged(k, LENGTHS_K), ragged(v, LENGTHS_K)
    if mode == "graph":
        function = tf.function(function, autograph=False)
    out, lse, *gradients = function(*arguments)
    assert out.shape.as_list() == [5, None, HEADS, DIM] and lse.shape.as_list() == [5, None, HEADS]
    np.testing.assert_array_equal(out.row_lengths(), LENGTHS_Q)
    np.testing.assert_array_equal(lse.row_lengths(), LENGTHS_Q)
    found = [out.values.numpy(), lse.values.numpy().T, *(x.numpy() for x in gradients)]
    assert_near(found, expected(*inputs, LENGTHS_Q, LENGTHS_K, causal=True))


def test_ragged_self_attention_takes_slopes():
    q, k, v, d_out = inputs = tokens(LENGTHS_Q, LENGTHS_Q)
    query = ragged(q, LENGTHS_Q)
    out = attn_ops.ragged_attention(
        query, query.with_values(k), query.with_values(v), alibi_slopes=SLOPES, implementation="composite"
    )
    wanted = expected(*inputs, LENGTHS_Q, LENGTHS_Q, slopes=SLOPES)[0]
    np.testing.assert_allclose(out.values, wanted, rtol=2e-5, atol=2e-5)


Q, K, V, _ = tokens(LENGTHS_Q, LENGTHS_K)
CU_Q, CU_K = cumulative(LENGTHS_Q), cumulative(LENGTHS_K)
BAD = [
    (ValueError, "cu_seqlens_q must start at 0, got 1", {"cu_seqlens_q": CU_Q + 1}),
    (ValueError, "cu_seqlens_k must never go back, got 4 after 5 at 2", {"cu_seqlens_k": [0, 5, 4, 11, 11, 14]}),
    (ValueError, "cu_seqlens_q must end with the number of tokens, 16, got 15", {"cu_seqlens_q": [0, 3, 3, 8, 9, 15]}),
    (ValueError, "cu_seqlens_q must end with the number of tokens, 14, got 16", {"cu_seqlens_k": None}),
    (ValueError, r"numbers of sequences must be the same, got 5 \(cu_seqlens_q\) and 1 \(cu_seqlens_k\)", {"cu_seqlens_k": [0, 14]}),
    (ValueError, r"cu_seqlens_q: rank must be 1, got shape \(2, 6\)", {"cu_seqlens_q": [CU_Q, CU_Q]}),
    (TypeError, "cu_seqlens_k: dtype must be int, got float64", {"cu_seqlens_k": CU_K.astype(float)}),
    (ValueError, r"q must be packed tokens \[total, num_heads, head_dim\], got shape \(1, 16, 4, 8\)", {"q": Q[None]}),
    (ValueError, "k and v must have the same number of tokens, got 14 and 13", {"v": V[1:]}),
    (ValueError, "max_seqlen_q must be at least the longest sequence, 7, got 6", {"max_seqlen_q": 6}),
    (TypeError, "max_seqlen_q must be an integer, got 7.5", {"max_seqlen_q": 7.5}),
    (TypeError, "max_seqlen_k must be an integer, got 'five'", {"max_seqlen_k": "five"}),
    (ValueError, "logits_soft_cap must be positive and finite, got -1.0", {"softcap": -1.0}),
    (ValueError, "segments: axis 1 of q_ids", {"mask": masks.segments([0] * 3)}),
    (ValueError, r"num_heads \(3\) must be a multiple", {"q": Q[:, :3]}),
    (ValueError, "max_seqlen_k must be at least the longest sequence, 5, got 4", {"max_seqlen_k": 4}),
    (ValueError, "alibi_slopes needs sequences of the same lengths in rows and keys", {"alibi_slopes": SLOPES}),
    (ValueError, "relative_bias needs sequences of the same lengths", {"relative_bias": np.zeros((3, HEADS), "f")}),
    (ValueError, r"alibi_slopes must be \[num_heads\], the same for all", {"alibi_slopes": np.tile(SLOPES, (5, 1))}),
    (TypeError, "causal and is_causal are the same option, got both: True and True", {"causal": True, "is_causal": True}),
    (TypeError, "unexpected keyword argument 'layout'", {"layout": "BSHD"}),
    (ValueError, r"bias must broadcast to .* \[num_heads=4, total_q=16, total_k=14\].* got shape \(1, 4, 16, 14\)", {"bias": BIAS[None]}),
    (ValueError, r"bias must broadcast to .* got shape \(14,\); for the same keys in every row, bias\[None\]", {"bias": BIAS[0, 0]}),
    (TypeError, "bias must be floating, got bool", {"bias": SEEN}),
    (ValueError, r"mask must broadcast to .* got shape \(5, 7, 5\)", {"mask": np.ones((5, 7, 5), bool)}),
    (TypeError, "mask must be boolean .* got float32", {"mask": BIAS}),
    (ValueError, "mask holds lengths, .* cu_seqlens_q and cu_seqlens_k tell", {"mask": masks.padding(key_lengths=[3] * 5)}),
    (ValueError, "mask holds a Python function, which does not know", {"mask": masks.from_function(lambda b, h, q, k: q > k)}),
    (ValueError, r"length of the prefix mask must be .* \[sequences=5\], got \(4,\)", {"mask": masks.prefix(PREFIXES[:4])}),
    (ValueError, r"query_offset must be an integer or have shape \[sequences=5\], got \(4,\)", {"query_offset": OFFSETS[:4]}),
    (ValueError, "query_offset must be between 0 and 2.30, got -1", {"query_offset": [0, 0, -1, 0, 0]}),
    (ValueError, "query_offset tells .* pass one of them", {"query_offset": 1, "causal_alignment": "bottom_right"}),
    (ValueError, "query_offset tells .* pass one of them", {"query_offset": 1, "mask": masks.causal("bottom_right")}),
    (ValueError, "alibi_slopes counts from rows and keys that begin", {"alibi_slopes": SLOPES, "query_offset": 1}),
    (ValueError, "both sides have a causal", {"mask": masks.causal(), "causal": True, "causal_alignment": "bottom_right"}),
    (ValueError, "causal_alignment must be 'top_left' or 'bottom_right', got 'middle'", {"causal_alignment": "middle"}),
]  # fmt: skip


@pytest.mark.parametrize("module", [attn_ops, attn_ops.jax], ids=["tensorflow", "jax"])
@pytest.mark.parametrize("error, message, change", BAD, ids=[message for _, message, _ in BAD])
def test_bad_input(module, error, message, change):
    arguments = {"q": Q, "k": K, "v": V, "cu_seqlens_q": CU_Q, "cu_seqlens_k": CU_K, **change}
    with pytest.raises(error, match="varlen_attention: .*" + message):
        module.varlen_attention(**arguments)


@pytest.mark.parametrize(
    "cu_q, cu_k, rule",
    [
        (CU_Q + 1, CU_K, "cu_seqlens_q must start at 0"),
        (CU_Q, np.array([0, 5, 4, 11, 11, 14], np.int32), "cu_seqlens_k must start at 0, never go back"),
        (CU_Q, CU_K[:-1], "cu_seqlens_k must .* end with the number of tokens|numbers of sequences"),
    ],
)
def test_what_only_the_running_graph_can_know(cu_q, cu_k, rule):
    function = tf.function(
        lambda q, k, v, cu_q, cu_k: attn_ops.varlen_attention(q, k, v, cu_q, cu_k, implementation="composite"),
        autograph=False,
        input_signature=[tf.TensorSpec([None, *x.shape[1:]]) for x in (Q, K, V)] + [tf.TensorSpec([None], tf.int32)] * 2,
    )
    assert function(Q, K, V, CU_Q, CU_K).shape == Q.shape
    with pytest.raises(tf.errors.InvalidArgumentError, match=rule):
        function(Q, K, V, cu_q, cu_k)


@pytest.mark.parametrize("cu_q, cu_k", [([1, 2, 6], None), ([0, 4, 2, 6], None), ([0, 3, 9], None), ([0, 2, 6], [0, 3, 9])])
@pytest.mark.parametrize("mode", ["xla", "jax.jit"])
def test_traced_lengths_that_are_none_are_told_by_xla(mode, cu_q, cu_k):
    """Where nothing can be asserted the kernels refuse intervals that they make of these, and the composite has NaN."""
    cu = [np.array(x, np.int32) for x in (cu_q, cu_k) if x is not None]
    arguments = *tokens([2, 4], [2, 4]), cu
    assert np.isnan(RUN[mode](*arguments, implementation="composite")[0]).all()
    with pytest.raises(Exception, match="must not be less than that of the row before"):
        RUN[mode](*arguments, implementation="fused")


def test_traced_lengths_with_slopes_must_be_given_once():
    function = tf.function(
        lambda cu, other: attn_ops.varlen_attention(Q, Q[:, :2], Q[:, :2], cu, other, alibi_slopes=SLOPES), autograph=False
    )
    with pytest.raises(ValueError, match="cu_seqlens_q and cu_seqlens_k are traced; where they are the same leave"):
        function(tf.constant(CU_Q), tf.constant(CU_Q))


@pytest.mark.parametrize(
    "error, message, change",
    [
        (TypeError, r"query must be a RaggedTensor \[batch, .* got ndarray; tf.RaggedTensor.from_tensor", {"query": Q}),
        (ValueError, "key must be .* with one ragged dimension", {"key": tf.ragged.constant([[[[1.0]]]])}),
        (ValueError, "key and value must have rows of the same lengths", {"value": ragged(V, LENGTHS_K[::-1])}),
        (ValueError, r"numbers of sequences must be the same, got 1 \(cu_seqlens_q\) and 5", {"query": ragged(Q, [16])}),
        (ValueError, "dropout_rate must be in", {"dropout_rate": 1.5}),
    ],
)
def test_bad_ragged_input(error, message, change):
    arguments = {"query": ragged(Q, LENGTHS_Q), "key": ragged(K, LENGTHS_K), "value": ragged(V, LENGTHS_K), **change}
    with pytest.raises(error, match=f"ragged_attention: .*{message}"):
        attn_ops.ragged_attention(**arguments)


def test_ragged_rows_of_other_lengths_are_found_when_a_graph_runs():
    spec = tf.RaggedTensorSpec([None, None, KV_HEADS, DIM], ragged_rank=1)
    function = tf.function(
        lambda key, value: attn_ops.ragged_attention(ragged(Q, LENGTHS_Q), key, value, implementation="composite").values,
        autograph=False, input_signature=[spec, spec],
    )  # fmt: skip
    assert function(ragged(K, LENGTHS_K), ragged(V, LENGTHS_K)).shape == Q.shape
    with pytest.raises(tf.errors.InvalidArgumentError, match="key and value must have rows of the same lengths"):
        function(ragged(K, LENGTHS_K), ragged(V, LENGTHS_K[::-1]))
