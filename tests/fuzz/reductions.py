"""What can be left out of a case. Each reduction is a text, so that a line can name those that lead to a smaller case:

    no NAME             without an option, a part of the mask's structure, or garbage, poison, d_lse
    no mask N           without one mask of several
    plain NAME          an array that lies in memory as usual;  plain threads: one thread
    AXIS FROM:TO        these of batch, kv_heads, group (heads of each kv head), rows, keys, head_dim, value_dim
    ones NAME           an array of ones; those of -inf stay
    round NAME          an array of one significant digit
"""

import dataclasses

import numpy as np

from fuzz import truth

INPUTS = ("query", "key", "value", "d_out")
LEARNED = ("bias", "relative_bias", "alibi_slopes", "sinks")
AXES = ("batch", "kv_heads", "group", "keys", "rows", "head_dim", "value_dim")  # the order in which they are worth trying


def candidates(case):
    """The reductions of a case, those that leave out most first."""
    names = [name for name, x in case.options.items() if name not in ("layout", "dropout_seed") and x is not None]
    names += list(case.structure) + [name for name in ("garbage", "poison") if getattr(case, name)]
    names += ["d_lse"] if case.d_lse is not None else []
    yield from (f"no {name}" for name in names)
    sizes = extents(case)
    yield from (text for axis in AXES for text in _parts(axis, sizes[axis]))
    count = len(case.options.get("mask") or ())
    yield from (f"no mask {n}" for n in range(count) if count > 1)
    yield from (f"plain {name}" for name in case.views)
    yield from ["plain threads"] if case.threads != (1, 1) else []
    if case.options["layout"] != "BSHD":
        yield "plain layout"
    arrays = {**{name: getattr(case, name) for name in (*INPUTS, "d_lse")}, **{name: _array(case, name) for name in LEARNED}}
    for kind, change in _SIMPLER.items():
        for name, x in arrays.items():
            if x is not None and not np.array_equal(x, change(x)):
                yield f"{kind} {name}"


def _parts(axis, extent):
    """Halves, then quarters at either end, …, then all but one."""
    count = extent // 2
    while count:
        kept = extent - count
        yield f"{axis} 0:{kept}"
        yield f"{axis} {count}:{extent}"
        count //= 2


def extents(case):
    """By axis."""
    batch, num_heads, rows, keys = case.scores_shape
    kv_heads = truth.heads_first(case, case.key).shape[1]
    group = num_heads // kv_heads if kv_heads else 1
    dims = case.query.shape[-1], case.value.shape[-1]
    return dict(zip(("batch", "kv_heads", "group", "rows", "keys", "head_dim", "value_dim"), (batch, kv_heads, group, rows, keys, *dims)))


def reduced(case, text):
    """The case after the reduction that this text names."""
    what, rest = text.split(" ", 1)
    if what == "no":
        return _without(case, rest)
    if what == "plain":
        return _plain(case, rest)
    if what in _SIMPLER:
        return _with_array(case, rest, _SIMPLER[what](_array(case, rest)))
    first, last = map(int, rest.split(":"))
    return sliced(case, **{what: slice(first, last)})


def _changed(case, **fields):
    return dataclasses.replace(case, _seen=None, **fields)


def _without(case, name):
    if name in ("garbage", "poison"):
        return _changed(case, **{name: ()})
    if name == "d_lse":
        return _changed(case, d_lse=None)
    if name.startswith("mask "):
        masks = list(case.options["mask"])
        del masks[int(name.split()[1])]
        return _changed(case, options={**case.options, "mask": masks})
    drop = (name, "dropout_seed") if name == "dropout_rate" else (name,)
    return _changed(
        case,
        options={key: x for key, x in case.options.items() if key not in drop},
        structure={key: x for key, x in case.structure.items() if key != name},
    )


def _plain(case, name):
    if name == "threads":
        return _changed(case, threads=(1, 1))
    if name == "layout":
        arrays = {name: np.ascontiguousarray(truth.heads_first(case, getattr(case, name)).swapaxes(1, 2)) for name in INPUTS}
        return _changed(case, options={**case.options, "layout": "BSHD"}, **arrays)
    return _changed(case, views={key: kind for key, kind in case.views.items() if key != name})


def _array(case, name):
    if name == "relative_bias":
        return truth.table_of(case)
    return case.options.get(name) if name in LEARNED else getattr(case, name)


def _with_array(case, name, x):
    if name not in LEARNED:
        return _changed(case, **{name: x})
    return _changed(case, options={**case.options, name: case.with_table(x) if name == "relative_bias" else x})


def _ones(x):
    return np.where(x == -np.inf, x, x.dtype.type(1))


def _round(x):
    wide = x.astype(np.float64)
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        unit = 10.0 ** np.floor(np.log10(np.abs(wide)))
        rounded = np.round(wide / unit) * unit
        rounded = np.where(np.isfinite(rounded), rounded, wide).astype(x.dtype)
    return np.where(np.isfinite(rounded.astype(np.float64)), rounded, x)


_SIMPLER = {"ones": _ones, "round": _round}


def sliced(case, **parts):
    """The case with a slice of some axes of `AXES`; what stands at a position goes with it."""
    at = {axis: np.arange(n)[parts.get(axis, slice(None))] for axis, n in extents(case).items()}
    group = extents(case)["group"]
    at["heads"] = (at["kv_heads"][:, None] * group + at["group"]).ravel()

    def taken(x, *axes):
        """`x` by these axes; an extent of 1 broadcasts."""
        if x is None:
            return None
        broadcasts = [n == 1 and axis not in ("head_dim", "value_dim") for axis, n in zip(axes, np.shape(x))]
        for axis, (name, one) in enumerate(zip(axes, broadcasts)):
            if name is not None and not (one and len(at[name])):
                x = np.take(x, at[name], axis)
        return x

    def shifted(x, axis, *axes):
        """Positions on an axis, moved with it."""
        if x is None:
            return None
        first = at[axis][0] if len(at[axis]) else 0
        return np.clip(taken(x, *axes) - first, 0, len(at[axis])).astype(x.dtype)

    def blocks(x, size_q, size_k):
        for axis, name, size in ((2, "rows", size_q), (3, "keys", size_k)):
            first = (at[name][0] if len(at[name]) else 0) // size
            x = np.take(x, np.arange(first, first + -(-len(at[name]) // size)), axis)
        return taken(x, "batch", "heads"), size_q, size_k

    shapes = {"query": ("heads", "rows", "head_dim"), "key": ("kv_heads", "keys", "head_dim")}
    shapes |= {"value": ("kv_heads", "keys", "value_dim"), "d_out": ("heads", "rows", "value_dim")}
    fields = {
        name: np.ascontiguousarray(truth.heads_first(case, taken(truth.heads_first(case, getattr(case, name)), "batch", *axes)))
        for name, axes in shapes.items()
    }
    fields["d_lse"] = taken(case.d_lse, "batch", "heads", "rows")
    fields["scores_shape"] = tuple(len(at[axis]) for axis in ("batch", "heads", "rows", "keys"))
    scores = "batch", "heads", "rows", "keys"
    options = dict(case.options)
    given = {name for name, x in options.items() if x is not None}
    if "mask" in given:
        options["mask"] = [taken(mask, *scores) for mask in options["mask"]]
    if "bias" in given:
        options["bias"] = taken(options["bias"], *scores)
    for name, axis in (("query_seq_lengths", "rows"), ("key_value_seq_lengths", "keys")):
        if name in given:
            options[name] = shifted(options[name], axis, "batch")
    if "query_offset" in given:
        options["query_offset"] = taken(options["query_offset"], "batch")
    if "alibi_slopes" in given:
        slopes = options["alibi_slopes"]
        options["alibi_slopes"] = taken(slopes, *("batch", "heads")[-slopes.ndim :])
    if "relative_bias" in given:
        options["relative_bias"] = case.with_table(taken(truth.table_of(case), None, "heads"))
    if "sinks" in given:
        options["sinks"] = taken(options["sinks"], "heads")
    structure = dict(case.structure)
    if "intervals" in structure:
        structure["intervals"] = tuple(shifted(x, "keys", "batch", "rows") for x in structure["intervals"])
    if "segments" in structure:
        structure["segments"] = tuple(taken(x, "batch", axis) for x, axis in zip(structure["segments"], ("rows", "keys")))
    if "blocks" in structure:
        structure["blocks"] = blocks(*structure["blocks"])
    poison = ()
    if case.poison:
        places = [np.flatnonzero(at[axis] == i) for axis, i in zip(("batch", "kv_heads", "keys"), case.poison)]
        poison = tuple(int(place[0]) for place in places) if all(map(len, places)) else ()
    return _changed(case, options=options, structure=structure, poison=poison, **fields)
