"""Varlen and ragged attention as a way: the sequences of a case one after the other, without their padding."""

import dataclasses

import numpy as np
from attn_ops import kernels

from fuzz import frameworks, truth, ways
from implementations import differentiable

# What `varlen_attention` takes.
OPTIONS = ("scale", "window", "is_causal", "causal_alignment", "logits_soft_cap", "alibi_slopes", "relative_bias", "sinks")
OPTIONS += ("query_offset", "bias", "mask")


class Varlen(ways.Way):
    """`varlen_attention` on packed tokens; in TensorFlow also `ragged_attention` on tensors with these row splits, and in
    JAX in `jax.jit`."""

    share = 0.1

    def __init__(self, framework):
        self.framework = framework
        self.name = f"{framework.prefix}varlen"

    def precision(self, case):
        return ways.kernel_precision(case, kernels.core().default_isa())

    def suited(self, case):
        if 0 in case.scores_shape or case.value.shape[-1] == 0:
            return None
        options = {name: x for name, x in case.options.items() if name in (*OPTIONS, "layout")}
        lengths = dict(zip(("query_seq_lengths", "key_value_seq_lengths"), map(np.int32, truth.lengths(case))))
        if options.get("alibi_slopes") is not None or options.get("relative_bias") is not None:  # need rows like keys
            lengths = dict.fromkeys(lengths, np.minimum(*lengths.values()))
            options.pop("query_offset", None)
        options |= lengths
        if options.get("alibi_slopes") is not None:
            options["alibi_slopes"] = np.atleast_2d(options["alibi_slopes"])[0]
        if options.get("bias") is not None:  # its gradient stays apart for each score
            options["bias"] = np.broadcast_to(options["bias"], case.scores_shape)
        d_lse = case.d_lse
        if d_lse is not None:  # there is no padding that could have one
            rows = np.arange(case.scores_shape[2]) < lengths["query_seq_lengths"][:, None, None]
            d_lse = np.where(rows, d_lse, 0).astype(d_lse.dtype)
        return dataclasses.replace(case, options=options, structure={}, d_lse=d_lse, views={}, _seen=None)

    def __call__(self, case):
        query, key, value, d_out, d_lse, options = case.arguments()
        batch, heads, rows, keys = case.scores_shape
        lengths = [options.pop(name) for name in ("query_seq_lengths", "key_value_seq_lengths")]
        by_rows, by_keys = (_Packing(x, extent) for x, extent in zip(lengths, (rows, keys)))
        layout = options.pop("layout")
        if options.get("query_offset") is None:
            options.setdefault("causal_alignment", "top_left")  # of varlen_attention another one is the default
        query, key, value, d_out = (x if layout == "BSHD" else x.swapaxes(1, 2) for x in (query, key, value, d_out))
        packed = [by_rows.packed(query), by_keys.packed(key), by_keys.packed(value), by_rows.packed(d_out)]
        d_lse = np.zeros(case.scores_shape[:3], case.accumulator) if d_lse is None else d_lse
        for name, outside in (("bias", 0), ("mask", True)):
            if options.get(name) is not None:
                given = options[name] if name == "mask" else [options[name]]
                given = [_of_scores(x, case.scores_shape, by_rows, by_keys, outside) for x in given]
                options[name] = given if name == "mask" else given[0]
        rng = np.random.default_rng([case.seed, case.number, 50])
        run = _RUNS[self.framework.name]
        with self.framework.of(case):
            given = packed, by_rows.packed(d_lse.swapaxes(1, 2)).T, by_rows.ends, by_keys.ends, options
            results = [np.asarray(x) for x in run(rng.random() < 0.3, *given)]
        out, lse, dq, dk, dv, *learned = results
        found = {"out": by_rows.padded(out), "dq": by_rows.padded(dq), "dk": by_keys.padded(dk), "dv": by_keys.padded(dv)}
        if layout == "BHSD":
            found = {name: x.swapaxes(1, 2) for name, x in found.items()}
        sinks = case.options.get("sinks")
        nothing = np.full(heads, -np.inf) if sinks is None else sinks  # what a row of padding has
        there = np.arange(rows) < lengths[0][:, None, None]
        found["lse"] = np.where(there, by_rows.padded(lse.T).swapaxes(1, 2), nothing[:, None].astype(lse.dtype))
        names = differentiable(case.options)
        found |= {f"d_{name}": x for name, x in zip(names, learned, strict=True)}
        if "d_bias" in found:
            d_bias = by_keys.padded(found["d_bias"].transpose(2, 0, 1))  # [batch, keys, heads, packed rows]
            d_bias = by_rows.padded(d_bias.transpose(3, 0, 2, 1))  # [batch, rows, batch, heads, keys]
            found["d_bias"] = np.stack([d_bias[b, :, b].swapaxes(0, 1) for b in range(batch)])
        return found


class _Packing:
    """Where the tokens of sequences of these lengths lie."""

    def __init__(self, lengths, extent):
        self.there = np.arange(extent) < np.asarray(lengths)[:, None]
        self.ends = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)

    def packed(self, x):
        """`[batch, extent, ...]` as `[tokens, ...]`."""
        return np.ascontiguousarray(x[self.there])

    def padded(self, x):
        """The inverse, with zeros."""
        whole = np.zeros((*self.there.shape, *x.shape[1:]), x.dtype)
        whole[self.there] = x
        return whole


def _of_scores(x, scores_shape, by_rows, by_keys, outside):
    """A bias or mask as one of the packed scores, `[num_heads or 1, rows, keys]`, with garbage between the sequences."""
    heads = x.shape[1]
    x = np.broadcast_to(x, (scores_shape[0], heads, *scores_shape[2:]))
    whole = np.full((heads, by_rows.ends[-1], by_keys.ends[-1]), outside, x.dtype)
    for b, (rows, keys) in enumerate(zip(np.diff(by_rows.ends), np.diff(by_keys.ends))):
        whole[:, by_rows.ends[b] : by_rows.ends[b + 1], by_keys.ends[b] : by_keys.ends[b + 1]] = x[b, :, :rows, :keys]
    return whole


def _run_tensorflow(ragged, arrays, d_lse, rows, keys, options):
    """out, lse, dq, dk, dv, and the gradients of the options that have one."""
    import attn_ops
    import tensorflow as tf
    from attn_ops import T5RelativeBias

    q, k, v, d_out = (tf.constant(x) for x in arrays)
    options, learned, table = dict(options), {}, options.get("relative_bias")
    if isinstance(table, T5RelativeBias):
        options["relative_bias"] = table.table
    for name in differentiable(options):
        learned[name] = tf.constant(options.pop(name))
    if options.get("mask") is not None:
        options["mask"] = [mask != 0 for mask in options["mask"]]
    inputs = [q, k, v, *learned.values()]
    with tf.GradientTape() as tape:
        tape.watch(inputs)
        given = dict(learned)
        if isinstance(table, T5RelativeBias):
            given["relative_bias"] = T5RelativeBias(learned["relative_bias"], table.bidirectional, table.max_distance)
        if ragged:
            tensors = (tf.RaggedTensor.from_row_splits(x, ends) for x, ends in ((q, rows), (k, keys), (v, keys)))
            out, lse = (x.values for x in attn_ops.ragged_attention(*tensors, return_lse=True, **given, **options))
            lse = tf.transpose(lse)
        else:
            out, lse = attn_ops.varlen_attention(q, k, v, rows, keys, return_lse=True, **given, **options)
    gradients = tape.gradient([out, lse], inputs, output_gradients=[d_out, tf.constant(d_lse)])
    return [out, lse, *gradients]


def _run_jax(compiles, arrays, d_lse, rows, keys, options):
    """The same."""
    import attn_ops.jax
    import jax

    options = dict(options)
    if options.get("mask") is not None:
        options["mask"] = [mask != 0 for mask in options["mask"]]
    learned = {name: options.pop(name) for name in differentiable(options)}
    *inputs, d_out = map(jax.numpy.asarray, arrays)

    def attend(inputs, learned):
        return attn_ops.jax.varlen_attention(*inputs, rows, keys, return_lse=True, **learned, **options)

    attend = jax.jit(attend) if compiles else attend
    (out, lse), pull = jax.vjp(attend, inputs, jax.tree.map(jax.numpy.asarray, learned))
    gradients, of_learned = pull((d_out, jax.numpy.asarray(d_lse, lse.dtype)))
    tables = (getattr(of_learned[name], "table", of_learned[name]) for name in learned)
    return [out, lse, *gradients, *tables]


_RUNS = {"tensorflow": _run_tensorflow, "jax": _run_jax}
WAYS = {way.name: way for way in map(Varlen, frameworks.ALL)}
