"""The options of an attention call: their names, defaults and documentation, written here alone, and the checks of those
that are Python values, not tensors."""

from __future__ import annotations

import math
import numbers
import operator
import sys
import typing
import warnings

_LARGEST_WINDOW = 2**63 - 1  # the ops take int64
LARGEST_SLOPE = 2.0**64  # times a distance, it stays within float32
LARGEST_OFFSET = 2**30  # a row's position and its distance to any key fit 32 bits
_warned_under = None  # the filters of warnings when `warn_of_top_left` spoke last


class Unsaid(str):
    """A default, told from the same word that somebody chose."""


TOP_LEFT = Unsaid("top_left")  # the default causal_alignment


class Options(typing.NamedTuple):
    """The public functions take these by keyword, and their signatures and documentation from here (public.py).

    Args:
        bias: added to the scaled scores; broadcastable to [batch, num_heads, seqlen_q, seqlen_k], of rank 4, 3 (no
            num_heads) or 2 (no batch either). -inf hides a key like a mask. It keeps float32 beside inputs of 16 bits,
            and is cast to their dtype otherwise.
        mask: True where a query may see a key: a boolean tensor of the shapes that bias may have, an
            `attn_ops.masks.Mask`, or a list of these, all of which must allow (nested lists of Python's True and False
            are one array). Float masks are refused: additive values go to ``bias``. Masks stay apart and broadcast, so
            [batch, 1, 1, seqlen_k] costs only itself. Rank 2 is [seqlen_q, seqlen_k] even where the batch is as large as
            seqlen_q: a mask [batch, seqlen_k] of the keys goes through `attn_ops.masks.key_padding`.
        scale: of the scores; None means 1/sqrt(head_dim). A Python number keeps double precision. A scalar tensor
            is multiplied into the query, and the product rounded to the query's dtype (16 bits: by up to 1 / 256).
        is_causal: row i sees no key after its own position.
        causal_alignment: where row i stands among the keys: "top_left" at key i (Keras, PyTorch), "bottom_right" at
            key i + length_k - length_q, so that the last row stands at the last key (FlashAttention, decoding). Where
            one query meets many keys and "top_left" is not said but the default, a warning tells so once. Everything
            that counts distances follows: is_causal, window, alibi_slopes and relative_bias.
        window: (left, right), how many keys a row sees before and after its own; None or -1 for all. Keras's
            ``sliding_window=w`` is (w - 1, w - 1).
        query_seq_lengths: integers [batch]; rows from there on are padding and see nothing.
        key_value_seq_lengths: integers [batch]; keys from there on are padding and are never read.
        dropout_rate: Python number in [0, 1), the share of the probabilities that are dropped; the others grow by
            1 / (1 - rate).
        dropout_seed: None for a fresh one at each call, an integer, or integers [2] (seed, offset). The same seed drops
            the same probabilities in every implementation and framework. Under `tf.recompute_grad` give one, made
            outside: a fresh one would differ in the recomputation. JAX has no hidden random state: there it must be
            given where anything is dropped, and may be a key of `jax.random`.
        layout: "BSHD" as above, or "BHSD": [batch, num_heads, seqlen, head_dim] for query, key, value and the output.
        return_lse: also return the log of the sum of the exponentials of the scores (before dropout).
        query_offset: the key that the first query row stands at, an integer or integers [batch], from 0 to 2^30: for
            decoding, prefill in chunks, and rows that are a part of longer ones. Row i stands at key i + query_offset,
            whatever the lengths are, and no causal_alignment is to be said beside it.
        logits_soft_cap: Python number > 0: scaled scores s become cap * tanh(s / cap) before anything is added to them
            (Gemma 2).
        alibi_slopes: floating [num_heads] or [batch, num_heads], constants: slope * (j - own) is added to the score of
            key j in a row that stands at key ``own`` (Press et al. 2021, arXiv:2108.12409). `attn_ops.alibi_slopes`
            gives the usual ones.
        relative_bias: floating [2 R + 1, num_heads]: row R + clip(j - own, -R, R) is added to the score of key j in a
            row that stands at key ``own`` (Shaw et al. 2018, arXiv:1803.02155), or an `attn_ops.T5RelativeBias`.
            Nothing of size seqlen_q * seqlen_k is made, and the gradient reaches the table. -inf hides, as in bias.
        sinks: floating [num_heads]: one more logit in the denominator of each row, with no value behind it (gpt-oss;
            Xiao et al. 2023, arXiv:2309.17453). It is counted by lse, is never dropped, and has a gradient. A row that
            sees no key has output 0, and the sink as its lse.
    """

    bias: typing.Any = None
    mask: typing.Any = None
    scale: typing.Any = None
    is_causal: bool = False
    causal_alignment: str = TOP_LEFT
    window: tuple[int | None, int | None] | None = None
    query_seq_lengths: typing.Any = None
    key_value_seq_lengths: typing.Any = None
    dropout_rate: float = 0.0
    dropout_seed: typing.Any = None
    layout: str = "BSHD"
    return_lse: bool = False
    query_offset: typing.Any = None
    logits_soft_cap: float | None = None
    alibi_slopes: typing.Any = None
    relative_bias: typing.Any = None
    sinks: typing.Any = None


def is_number(x) -> bool:
    """Whether ``x`` is a Python or NumPy number that is no boolean."""
    return isinstance(x, numbers.Real) and not isinstance(x, bool)


def is_integer(x) -> bool:
    return isinstance(x, numbers.Integral) and not isinstance(x, bool)


def size(what, x, least=1) -> int:
    """An extent that is known: an integer up to 2**30."""
    try:
        value = operator.index(x)
    except TypeError:
        raise TypeError(f"{what} must be a Python integer, got {type(x).__name__}") from None
    if isinstance(x, bool) or not least <= value <= 2**30:
        raise ValueError(f"{what} must be an integer from {least} to 2**30, got {x}")
    return value


def scale(name, value):
    """``value`` as a finite float, or None."""
    if value is None:
        return None
    try:
        number = float(value)
    except OverflowError:  # an integer beyond every float
        number = math.inf
    if not math.isfinite(number):
        raise ValueError(f"{name}: scale must be finite, got {value}")
    return number


def logits_soft_cap(name, cap, in_float64):
    """``cap`` as a float that scores in float32, or ``in_float64``, can be divided by; None where it changes none."""
    if cap is None:
        return None
    if not is_number(cap):
        raise TypeError(
            f"{name}: logits_soft_cap must be a Python number, fixed when the call is made or traced, "
            f"got {type(cap).__name__}"
        )
    try:
        number = float(cap)
    except OverflowError:  # an integer beyond every float
        number = math.inf
    if not 0.0 < number < math.inf:  # NaN fails too
        raise ValueError(f"{name}: logits_soft_cap must be positive and finite, got {cap}; None is no cap")
    smallest, largest = (sys.float_info.min, sys.float_info.max) if in_float64 else (2.0**-126, 2.0**127)
    return max(number, smallest) if number <= largest else None


def check_offset(name, low, high):
    """ValueError unless all offsets, from ``low`` to ``high``, are positions that a first query row can have."""
    if low < 0 or high > LARGEST_OFFSET:
        bad = low if low < 0 else high
        raise ValueError(f"{name}: query_offset must be between 0 and 2^30, got {bad}")


def flag(name, what, value) -> bool:
    """``value``, which is True or False (or None, for False) and no tensor: it is fixed when a call is traced."""
    if value is True or value is False:
        return value
    if value is None or type(value).__name__ in ("bool", "bool_", "int"):
        return bool(value)
    raise TypeError(
        f"{name}: {what} must be True or False, fixed when the call is made or traced, got {type(value).__name__}"
    )


def dropout_rate(name, rate):
    if not is_number(rate):
        raise TypeError(
            f"{name}: dropout_rate must be a Python number, fixed when the call is made or traced, "
            f"got {type(rate).__name__}"
        )
    rate = float(rate)
    if not 0.0 <= rate < 1.0:  # NaN fails too
        raise ValueError(f"{name}: dropout_rate must be in [0, 1), got {rate}")
    return rate


def window(name, pair):
    """(left, right) with -1 for unbounded, from None or a pair whose sides are None or integers from -1."""
    if pair is None:
        return -1, -1
    if not isinstance(pair, (tuple, list)) or len(pair) != 2:
        raise TypeError(f"{name}: window must be a pair (left, right), got {pair!r}{window_hint(pair)}")
    return _window_side(name, pair, pair[0]), _window_side(name, pair, pair[1])


def window_hint(given) -> str:
    """For those who give a window in the one number of other libraries: what it is here."""
    if not is_integer(given):
        return ""
    return f": Keras's sliding_window={given} is ({given - 1}, {given - 1}), JAX's local_window_size={given} is ({given}, {given})"


def _window_side(name, pair, side):
    if side is None:
        return -1
    try:
        keys = operator.index(side)
    except TypeError:
        raise TypeError(f"{name}: window must hold integers or None, got {pair!r}") from None
    if keys < -1 or isinstance(side, bool):
        raise ValueError(f"{name}: window must hold integers from 0, or None or -1 for unbounded, got {pair!r}")
    return min(keys, _LARGEST_WINDOW)


def bottom_right(name, causal_alignment) -> bool:
    if causal_alignment == "top_left":
        return False
    if causal_alignment == "bottom_right":
        return True
    raise ValueError(f"{name}: causal_alignment must be 'top_left' or 'bottom_right', got {causal_alignment!r}")


def check_one_position(name, query_offset, is_bottom_right) -> None:
    """ValueError where two arguments say where rows stand."""
    if is_bottom_right and query_offset is not None:
        raise ValueError(
            f"{name}: query_offset tells where the first row stands, and causal_alignment='bottom_right' that the last row "
            "stands at the last key: pass one of them"
        )


def check_distances(name, causal_alignment, of_mask) -> None:
    """ValueError where slopes or tables count distances and ``causal_alignment`` was said to be another one than that
    ``of_mask``, of a mask with parts that ask where rows stand: a row stands at one key."""
    if not isinstance(causal_alignment, Unsaid) and causal_alignment != of_mask:
        raise ValueError(
            f"{name}: alibi_slopes and relative_bias count from where rows stand, and causal_alignment is "
            f"{causal_alignment!r}, but {str(of_mask)!r} in the mask: make them the same"
        )


def warn_of_top_left(name, seqlen_k) -> None:
    """Tells, once, whoever decodes with ``is_causal`` and the default alignment that the row sees the first key only.

    Once as Python counts, which forgets what it has warned of where the filters of warnings are changed.
    """
    global _warned_under
    if _warned_under is warnings.filters:
        return
    _warned_under = warnings.filters
    level, frame = 2, sys._getframe(1)
    while frame.f_back is not None and frame.f_globals.get("__name__", "").startswith(("attn_ops.", "tensorflow.")):
        level, frame = level + 1, frame.f_back
    warnings.warn(
        f"{name}: is_causal=True, one query and {seqlen_k} keys: the query stands at the first key and sees no other. For "
        'the last one of a sequence (decoding) pass causal_alignment="bottom_right"; causal_alignment="top_left" says '
        "that this is meant",
        stacklevel=level,
    )


def seed_words(name, seed):
    """An integer seed as the two int64 words (seed, offset); its 64 bits count, signed or unsigned."""
    seed = int(seed)
    if not -(2**63) <= seed < 2**64:
        raise ValueError(f"{name}: dropout_seed must fit 64 bits, got {seed}")
    return [seed - 2**64 if seed >= 2**63 else seed, 0]
