"""What only a running graph can know about a call of the composite, asserted there.

`normalize` has checked whatever was known when the call was made: everything in eager mode, and in a graph
all but unknown dimensions and the values of lengths. XLA drops assertions: there, shapes that do not fit still fail in
the operations themselves, and entries of the batch with lengths, offsets or intervals out of range get NaN
(`call.out_of_range`).
"""

import tensorflow as tf

from attn_ops.call.attention_call import canonical
from attn_ops.call.options import LARGEST_OFFSET, LARGEST_SLOPE

_NAME = "scaled_dot_product_attention"


def checked(call):
    """`call`, with tensors that wait for the checks: tf.errors.InvalidArgumentError where one fails."""
    assertions = [] if tf.executing_eagerly() else _assertions(call)
    if not assertions:
        return call
    with tf.control_dependencies(assertions):
        return call.map_tensors(tf.identity)


def checked_pages(call, no_pages):
    """`call`, with a table of pages, if it has one, that waits for the check of its entries: ``no_pages(call)`` says which
    are none."""
    if call.block_table is None or tf.executing_eagerly():
        return call
    table = call.block_table
    rule = f"{_NAME}: entries of block_table that a length reaches must be pages, from 0 to their number without it"
    total = canonical_extents(call.key, call.layout)[0]
    legal = tf.debugging.Assert(~tf.reduce_any(no_pages(call)), [rule, total, "got", table])
    with tf.control_dependencies([legal]):
        return call._replace(block_table=tf.identity(table))


def extents(x):
    """The shape as a list: integers where known and int32 scalars elsewhere."""
    known = x.shape.as_list()
    dynamic = tf.shape(x) if None in known else None
    return [dynamic[axis] if n is None else n for axis, n in enumerate(known)]


def canonical_extents(x, layout):
    """(batch, heads, seqlen, dim) of a tensor in `layout`."""
    return canonical(extents(x), layout)


def at_least_1(n):
    return max(n, 1) if isinstance(n, int) else tf.maximum(n, 1)


def _assertions(call):
    batch, num_heads, seqlen_q, head_dim = canonical_extents(call.query, call.layout)
    batch_k, num_kv_heads, seqlen_k, head_dim_k = canonical_extents(call.key, call.layout)
    batch_v, num_kv_heads_v, seqlen_v, _ = canonical_extents(call.value, call.layout)
    inputs = (call.query, call.key, call.value)
    agreements = [
        _equal(batch_k, batch),
        _equal(batch_v, batch),
        _equal(head_dim_k, head_dim),
        _equal(seqlen_v, seqlen_k),
        _equal(num_kv_heads_v, num_kv_heads),
        _equal(num_heads % at_least_1(num_kv_heads), 0),
    ]
    rule = "query, key and value must agree in batch, key length, key heads and head_dim, and num_heads must be a "
    assertions = _assert(agreements, rule + f"multiple of num_kv_heads (layout {call.layout})", inputs)
    full = (batch, num_heads, seqlen_q, seqlen_k)
    for x in (*call.masks, *(() if call.bias is None else (call.bias,))):
        fits = [_one_or(n, m) for n, m in zip(extents(x), full)]
        rule = "masks and bias must broadcast to [batch, num_heads, seqlen_q, seqlen_k] of the inputs"
        assertions += _assert(fits, rule, (x, *inputs))
    for what, lengths, seqlen in (
        ("query_seq_lengths", call.query_lengths, seqlen_q),
        ("key_value_seq_lengths", call.key_lengths, seqlen_k),
    ):
        if lengths is not None:
            assertions += _assert([_equal(extents(lengths)[0], batch)], f"{what} must have shape [batch]", (lengths,))
            legal = tf.reduce_all((lengths >= 0) & (lengths <= seqlen))
            rule = f"{_NAME}: {what} must be between 0 and the sequence length"
            assertions.append(tf.debugging.Assert(legal, [rule, seqlen, "got", lengths]))
    return assertions + _assertions_of_positions(call, full) + _assertions_of_scores(call, batch, num_heads)


def _assertions_of_positions(call, full):
    batch, num_heads, seqlen_q, seqlen_k = full
    assertions = []
    if call.query_offset is not None:
        fits = [_one_or(extents(call.query_offset)[0], batch)]
        assertions += _assert(fits, "query_offset must have shape [batch]", (call.query_offset,))
        legal = tf.reduce_all((call.query_offset >= 0) & (call.query_offset <= LARGEST_OFFSET))
        rule = f"{_NAME}: query_offset must be between 0 and 2^30"
        assertions.append(tf.debugging.Assert(legal, [rule, "got", call.query_offset]))
    by_token = [("intervals", x, seqlen_q) for x in call.intervals or ()]
    by_token += [("segments", x, n) for x, n in zip(call.segments or (), (seqlen_q, seqlen_k))]
    for what, x, seqlen in by_token:
        entries, tokens = extents(x)
        rule = f"{what} of the mask must have shape [batch or 1, length of the sequence]"
        assertions += _assert([_one_or(entries, batch), _equal(tokens, seqlen)], rule, (x, call.query, call.key))
    for x in call.intervals or ():
        legal = tf.reduce_all((x >= 0) & (x <= seqlen_k)) & tf.reduce_all(x[:, 1:] >= x[:, :-1])
        rule = f"{_NAME}: the ends of intervals must be between 0 and the number of keys, and never move back along the rows"
        assertions.append(tf.debugging.Assert(legal, [rule, seqlen_k, "got", x]))
    if call.blocks is not None:
        counts = [-(-n // size) for n, size in ((seqlen_q, call.block_q), (seqlen_k, call.block_k))]
        entries, heads, *given = extents(call.blocks)
        fits = [_one_or(entries, batch), _one_or(heads, num_heads), *map(_equal, given, counts)]
        rule = f"there must be a block for each {call.block_q} rows and {call.block_k} keys"
        assertions += _assert(fits, rule, (call.blocks, call.query, call.key))
    return assertions


def _assertions_of_scores(call, batch, num_heads):
    assertions = []
    if call.alibi_slopes is not None:
        entries, heads = extents(call.alibi_slopes)
        fits = [_one_or(entries, batch), _equal(heads, num_heads)]
        assertions += _assert(fits, "alibi_slopes must have shape [num_heads] or [batch, num_heads]", (call.alibi_slopes,))
        legal = tf.reduce_all(tf.abs(call.alibi_slopes) <= LARGEST_SLOPE)
        rule = f"{_NAME}: alibi_slopes must be finite numbers from -2^64 to 2^64"
        assertions.append(tf.debugging.Assert(legal, [rule, "got", call.alibi_slopes], summarize=8))
    if call.relative_bias is not None:
        heads, distances = extents(call.relative_bias)
        odd = None if isinstance(distances, int) else tf.equal(distances % 2, 1)
        rule = "relative_bias must have shape [2 R + 1, num_heads] (here transposed)"
        assertions += _assert([_equal(heads, num_heads), odd], rule, (call.relative_bias,))
    if call.sinks is not None:
        assertions += _assert([_equal(extents(call.sinks)[0], num_heads)], "sinks must have shape [num_heads]", (call.sinks,))
    return assertions


def _assert(conditions, rule, tensors):
    conditions = [condition for condition in conditions if condition is not None]
    if not conditions:
        return []
    data = [f"{_NAME}: {rule}; got shapes", *map(tf.shape, tensors)]
    return [tf.debugging.Assert(tf.reduce_all(conditions), data, summarize=8)]


def _equal(a, b):
    """The condition, or None where it is known to be checked already."""
    return None if isinstance(a, int) and isinstance(b, int) else tf.equal(a, b)


def _one_or(n, full):
    same = _equal(n, full)
    return None if same is None or (isinstance(n, int) and n == 1) else same | tf.equal(n, 1)


def with_rows_of(name, key, value, what="key and value"):
    """The ragged ``value``, whose rows must be as long as those of ``key``: ValueError where they are known to differ, else
    tf.errors.InvalidArgumentError as the graph runs."""
    if key.row_splits is value.row_splits:
        return value
    splits = [tf.cast(x.row_splits, tf.int64) for x in (key, value)]
    known = [tf.get_static_value(x) for x in splits]
    rule = f"{name}: {what} must have rows of the same lengths"
    if not any(x is None for x in known):
        if known[0].shape != known[1].shape or (known[0] != known[1]).any():
            raise ValueError(f"{rule}, got row splits {known[0]} and {known[1]}")
        return value
    with tf.control_dependencies([tf.debugging.assert_equal(*splits, message=rule)]):
        return value.with_values(tf.identity(value.values))
