"""Rotary position embedding: which angle each pair of features turns by, and the turn.

The arithmetic is the same for TensorFlow and JAX: ``xp`` is tensorflow/xp.py or jax/xp.py.
"""

from __future__ import annotations

import dataclasses
import functools
import math

import numpy as np

from attn_ops.call import arrays, options, shapes

_ON_HOST = 2**20  # angles that are computed in NumPy, and are constants of what is traced
_FACTOR = "factor"
_LENGTH = "original_max_position_embeddings"
# What a scaling is told, beyond its factor: the defaults, or that there is none.
_NEEDED = object()
_SCALINGS = {
    "linear": {},
    "ntk": {},
    "yarn": {_LENGTH: _NEEDED, "beta_fast": 32.0, "beta_slow": 1.0, "attention_factor": None, "truncate": True},
    "llama3": {_LENGTH: _NEEDED, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
}


@dataclasses.dataclass(frozen=True)
class Rotary:
    """How features turn: the arguments of `attn_ops.rotary_embedding`, checked."""

    base: float = 10000.0
    rotary_dim: int | None = None
    interleaved: bool = False
    scaling: tuple | None = None  # (kind, ((name, value), ...))

    @classmethod
    def of(cls, name, base=10000.0, rotary_dim=None, interleaved=False, scaling=None):
        """Raises TypeError for a wrong kind and ValueError for a wrong value, naming the function ``name``."""
        if not options.is_number(base):
            raise TypeError(f"{name}: base must be a number, got {type(base).__name__}")
        if not 0.0 < float(base) < math.inf:
            raise ValueError(f"{name}: base must be positive and finite, got {base}")
        if rotary_dim is not None:
            if not options.is_integer(rotary_dim):
                raise TypeError(f"{name}: rotary_dim must be an integer or None, got {type(rotary_dim).__name__}")
            if rotary_dim < 2 or rotary_dim % 2:
                raise ValueError(f"{name}: rotary_dim must be even and at least 2, got {rotary_dim}")
            rotary_dim = int(rotary_dim)
        interleaved = options.flag(name, "interleaved", interleaved)
        return cls(float(base), rotary_dim, interleaved, _scaling(name, scaling))

    def config(self):
        """The arguments of `of` as values of JSON, without those that have their defaults."""
        given = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if getattr(self, f.name) != f.default}
        if self.scaling is not None:
            kind, values = self.scaling
            given["scaling"] = {"rope_type": kind, **dict(values)}
        return given

    def width(self, name, features):
        """How many features turn, of so many."""
        if features is None:
            raise ValueError(f"{name}: the number of features, the last axis, must be known")
        width = features if self.rotary_dim is None else self.rotary_dim
        if width > features:
            raise ValueError(f"{name}: rotary_dim must not exceed the {features} features, got {width}")
        if width < 2 or width % 2:
            raise ValueError(f"{name}: features turn in pairs: give an even number of them, or rotary_dim; got {width}")
        return width


def from_option(name, rotary):
    """The `Rotary` of an option ``rotary``: None or False, True for the defaults, or a dict of the arguments that are others."""
    if rotary is None or rotary is False:
        return None
    if isinstance(rotary, Rotary):
        return rotary
    if rotary is True:
        return Rotary.of(name)
    if not isinstance(rotary, dict):
        raise TypeError(f"{name}: rotary must be None, True or a dict of options of rotary_embedding, got {rotary!r}")
    known = [*Rotary.__dataclass_fields__]
    if not set(rotary) <= set(known):
        raise ValueError(f"{name}: rotary takes {', '.join(known)}, not {', '.join(sorted(set(rotary) - set(known)))}")
    return Rotary.of(name, **rotary)


@functools.lru_cache(maxsize=64)
def frequencies(name, rotary, width):
    """(the angles per position of each pair, float64 [width / 2], the factor of cosine and sine).

    Scalings as in the models that have them: Chen et al. 2023 (arXiv:2306.15595; "linear"), NTK-aware bases, YaRN (Peng
    et al. 2023, arXiv:2309.00071, and the code that came with it, whose ramp is linear in the pair), Llama 3.1.
    """
    kind, values = rotary.scaling or (None, ())
    given = dict(values)
    factor, base = given.get(_FACTOR), rotary.base
    if kind == "ntk":
        if width < 4:
            raise ValueError(f"{name}: scaling 'ntk' needs at least 4 features that turn, got {width}")
        base *= factor ** (width / (width - 2))
    plain = base ** (-np.arange(0, width, 2) / width)
    if kind == "linear":
        return plain / factor, 1.0
    if kind == "yarn":
        if base == 1.0:
            raise ValueError(f"{name}: scaling 'yarn' needs a base other than 1")

        def pair_of(rotations):
            """The pair that turns so often over the original length."""
            return width * math.log(given[_LENGTH] / (rotations * 2 * math.pi)) / (2 * math.log(base))

        low, high = pair_of(given["beta_fast"]), pair_of(given["beta_slow"])
        if given["truncate"]:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, width - 1)
        ramp = np.clip((np.arange(width // 2) - low) / (high - low if high != low else 0.001), 0.0, 1.0)
        attention_factor = given["attention_factor"]
        if attention_factor is None:
            attention_factor = 0.1 * math.log(factor) + 1.0 if factor > 1.0 else 1.0
        return plain * (1.0 - ramp) + plain / factor * ramp, attention_factor
    if kind == "llama3":
        low, high = given["low_freq_factor"], given["high_freq_factor"]
        turns = given[_LENGTH] * plain / (2 * math.pi)  # of each pair over the original length
        part = np.clip((turns - low) / (high - low), 0.0, 1.0)
        return plain * part + plain / factor * (1.0 - part), 1.0
    return plain, 1.0


def rotate(xp, name, x, rotary, seq_axis, start=None, positions=None):
    """``x`` with the pairs of its last axis turned by the angles of their positions along ``seq_axis``.

    ``positions`` are integers [seqlen] or [batch or 1, seqlen]; None: they count from ``start``, an integer or integers
    [batch], which is 0 unless given. The batch is axis 0.
    """
    extents = xp.extents(x)
    width = rotary.width(name, extents[-1])
    freq, factor = frequencies(name, rotary, width)
    positions = _positions(xp, name, positions, start, x, extents, seq_axis)
    if 0 in extents:  # nothing to turn; TensorFlow 2.21 divides by 0 as it folds the gradient of an empty product
        return x
    dtype = xp.float64 if x.dtype == xp.float64 else xp.float32
    cos, sin = _cos_sin(xp, positions, freq, factor, dtype)
    shape = [1] * len(extents)
    shape[seq_axis], shape[-1] = -1, width // 2
    if seq_axis:  # else there is no batch
        shape[0] = 1 if len(positions.shape) == 1 else positions.shape[0]
        if shape[0] is None:
            shape[0] = xp.extent(positions, 0)
            shape[seq_axis] = xp.extent(x, seq_axis)  # no two unknowns
    cos, sin = (xp.reshape(y, shape) for y in (cos, sin))

    turning = x if width == extents[-1] else x[..., :width]
    half = width // 2
    ends = (np.s_[..., 0::2], np.s_[..., 1::2]) if rotary.interleaved else (np.s_[..., :half], np.s_[..., half:])
    first, second = (xp.cast(turning[end], dtype) for end in ends)
    turned = [xp.cast(y, x.dtype) for y in (first * cos - second * sin, second * cos + first * sin)]
    if rotary.interleaved:
        out = xp.reshape_like(xp.stack(turned, -1), turning)
    else:
        out = xp.concat(turned, -1)
    return out if turning is x else xp.concat([out, x[..., width:]], -1)


def checked_input(xp, name, x, layout):
    """``x`` as a floating tensor, and the axis of its sequence."""
    shapes.check_layout(name, layout)
    x = xp.as_tensor(name, "x", x)
    if not xp.is_floating(x.dtype):
        raise TypeError(f"{name}: x must be floating, got {x.dtype.name}")
    extents = xp.extents(x)
    if extents is None or len(extents) not in (2, 3, 4):
        raise ValueError(
            f"{name}: x must be [batch, seqlen, num_heads, head_dim] (or in layout 'BHSD'), [batch, seqlen, features] or "
            f"[seqlen, features], got shape {'unknown' if extents is None else shapes.shape_text(extents)}"
        )
    rank = len(extents)
    return x, rank - 2 if rank < 4 or layout == "BHSD" else 1


def _positions(xp, name, positions, start, x, extents, seq_axis):
    """Integers [seqlen] or [batch or 1, seqlen]: NumPy where they are known."""
    batch, seqlen = extents[0] if seq_axis else 1, extents[seq_axis]
    if positions is None:
        if start is None:
            start = 0
        elif not options.is_integer(start):
            start = _integers(xp, name, "start_index", start, [[], [batch]], "an integer or [batch]")
            start = start[:, None] if len(start.shape) else start
        known = isinstance(seqlen, int) and (options.is_integer(start) or isinstance(start, (np.ndarray, np.generic)))
        return start + (np.arange(seqlen) if known else xp.arange_like(xp.extent(x, seq_axis), start))
    allowed = [[seqlen], [batch, seqlen], [1, seqlen]] if seq_axis else [[seqlen]]
    return _integers(xp, name, "positions", positions, allowed, f"[seqlen={seqlen}] or [batch={batch}, seqlen]")


def _integers(xp, name, what, given, allowed, rule):
    """What was ``given``, of an ``allowed`` shape: NumPy where its values are known, which JAX may not have room for."""
    x = xp.as_tensor(name, what, given)
    if not xp.is_integer(x.dtype):
        raise TypeError(f"{name}: {what} must hold integers, got {x.dtype.name}")
    extents = xp.extents(x)
    if extents is None or not any(shapes.compatible(extents, shape) for shape in allowed):
        got = "unknown rank" if extents is None else shapes.shape_text(extents)
        raise ValueError(f"{name}: {what} must be {rule}, got {got}")
    known = arrays.known_values(xp, given, x)
    return x if known is None else np.asarray(known)


def _cos_sin(xp, positions, freq, factor, dtype):
    """Cosine and sine, times the factor, of position times frequency: [*positions, pairs]."""
    known = isinstance(positions, (np.ndarray, np.generic))
    if known and (positions.size * freq.size <= _ON_HOST or positions.max() >= 2**31 or positions.min() < -(2**31)):
        angles = positions[..., None] * freq
        return tuple(xp.cast(xp.as_tensor("", "", factor * f(angles)), dtype) for f in (np.cos, np.sin))
    positions = xp.as_tensor("", "", positions)
    if dtype == xp.float64:
        angles = xp.cast(positions[..., None], dtype) * freq
    else:
        angles = xp.cast(_turns(xp, positions[..., None], freq), dtype) * np.float32(2 * math.pi / 2**32)
    return tuple(xp.cast(f(angles) * factor, dtype) for f in (xp.cos, xp.sin))


def _turns(xp, positions, freq):
    """Position times frequency in units of 2^-32 of a turn, whole turns left out, as int32.

    A float32 product at position 100000 is some 0.004 off. This one is right to its last bit but one, with the frequency in
    turns as a fraction of 64 bits, in integers of 32, signed ones, which every device, JAX without 64 bits and the formats of
    exports have; sums and products are meant modulo 2^32.
    """
    fraction = np.array([int(f * 2.0**64 / (2 * math.pi)) & (2**64 - 1) for f in freq], np.uint64)
    high, low = ((fraction >> np.uint64(n)).astype(np.uint32) for n in (32, 0))
    k = 2**16
    p = xp.cast(positions, xp.int32)
    p_1, p_0 = p // k, p % k
    # The upper word of p * low: what is no whole product of 16 bits is below 2^17, and exact enough in float32.
    rest = xp.cast(p_1, xp.float32) * np.float32(low % k / k) + xp.cast(p_0, xp.float32) * np.float32(low / k**2)
    turns = p * high.view(np.int32) + p_1 * (low // k).astype(np.int32) + xp.cast(rest, xp.int32)
    if positions.dtype.name in ("uint32", "int64", "uint64"):  # the cast left out multiples of 2^32
        turns = turns + xp.cast((positions // 2**30 + 2) // 4, xp.int32) * low.view(np.int32)
    return turns


def _scaling(name, given):
    """``(kind, ((what, value), ...))`` of what `attn_ops.rotary_embedding` takes as ``scaling``."""
    if given is None:
        return None
    if isinstance(given, dict):
        values = dict(given)
        kind = values.pop("rope_type", None)
        kind = values.pop("type", kind) if kind is None else kind
        values.pop("type", None)
    elif isinstance(given, (tuple, list)) and len(given) == 2:
        kind, values = given
        values = dict(values) if isinstance(values, dict) else {_FACTOR: values}
    else:
        raise TypeError(
            f"{name}: scaling must be None, a pair such as ('linear', 4.0), or a dict with 'rope_type', got {given!r}"
        )
    if kind == "default" and not values:
        return None
    if kind not in _SCALINGS:
        raise ValueError(f"{name}: scaling must be one of {', '.join(map(repr, _SCALINGS))}, got {kind!r}")
    known = {_FACTOR: _NEEDED, **_SCALINGS[kind]}
    values = {**known, **values}
    missing = [what for what, value in values.items() if value is _NEEDED]
    unknown = sorted(set(values) - set(known))
    if missing or unknown:
        told = f"needs {', '.join(missing)}" if missing else f"takes {', '.join(known)}, not {', '.join(unknown)}"
        raise ValueError(f"{name}: scaling {kind!r} {told}, got {given!r}")
    for what, value in values.items():
        if what == "truncate":
            values[what] = options.flag(name, what, value)
        elif value is not None or what != "attention_factor":
            if not options.is_number(value):
                raise TypeError(f"{name}: {what} of scaling {kind!r} must be a number, got {value!r}")
            if not 0.0 < float(value) < math.inf:
                raise ValueError(f"{name}: {what} of scaling {kind!r} must be positive and finite, got {value}")
            values[what] = float(value)
    for less, more in (("beta_slow", "beta_fast"), ("low_freq_factor", "high_freq_factor")):
        if less in values and values[less] >= values[more]:
            raise ValueError(
                f"{name}: {less} of scaling {kind!r} must be below {more}, got {values[less]} and {values[more]}"
            )
    return kind, tuple(sorted(values.items()))
