"""What may be drawn: weights that are probabilities, masks and labels that fit them."""

from __future__ import annotations

import fnmatch

import numpy as np

_TOLERANCE = 1e-2  # of sums of rows: weights of 16 bits are rounded


def real_array(name: str, weights) -> np.ndarray:
    """``weights`` as float64; TypeError in the name of the function where there are no values or no real ones."""
    try:
        array = np.asarray(weights)
    except (TypeError, ValueError, NotImplementedError, AttributeError) as error:
        raise TypeError(_not_an_array(name, weights)) from error
    if array.dtype == object:
        raise TypeError(_not_an_array(name, weights))
    try:  # one dtype for float16, bfloat16, masks, ...; complex numbers and strings have no colour
        return array.astype(np.float64, casting="unsafe" if array.dtype.kind != "c" else "same_kind")
    except (TypeError, ValueError) as error:
        raise TypeError(f"{name}: weights must be real numbers, got dtype {array.dtype}") from error


_DENSE = {"RaggedTensor": "weights.to_tensor()", "SparseTensor": "tf.sparse.to_dense(weights)"}


def _not_an_array(name, weights):
    if type(weights).__name__ in _DENSE:
        return f"{name}: weights must be dense, got {type(weights).__name__}; pass {_DENSE[type(weights).__name__]}"
    return (
        f"{name}: weights must hold values, got {type(weights).__name__}; call the model on data first (a symbolic tensor "
        "of a functional model or a tf.function has none)"
    )


def probabilities(name: str, layer: str, weights):
    """Weights as float32 `[batch, num_heads, seqlen_q, seqlen_k]`, and where they were NaN, which hides, or None."""
    x = real_array(name, weights)
    if not 2 <= x.ndim <= 4 or x.size == 0:
        raise ValueError(
            f"{name}: weights of {layer!r} must be [batch, num_heads, seqlen_q, seqlen_k], [num_heads, seqlen_q, seqlen_k] or "
            f"[seqlen_q, seqlen_k] and not empty, got shape {x.shape}"
        )
    x = x.reshape((1,) * (4 - x.ndim) + x.shape)
    hidden = np.isnan(x)
    x = np.where(hidden, 0.0, x)
    sums = x.sum(-1)
    if x.min() < 0 or x.max() > 1 + _TOLERANCE or sums.max() > 1 + _TOLERANCE:
        raise ValueError(
            f"{name}: weights of {layer!r} must be probabilities, at least 0 and with sums of at most 1 over the keys; got "
            f"values from {x.min():.4g} to {x.max():.4g} and sums up to {sums.max():.4g}. Scores become weights by a softmax "
            "over the last axis; attn_ops.attention_weights(query, key) gives them"
        )
    return x.astype(np.float32), hidden if hidden.any() else None


def visible(name: str, layer: str, hidden, shape):
    """What is not ``hidden``, bool `[batch or 1, num_heads or 1, seqlen_q or 1, seqlen_k or 1]`, or None."""
    if hidden is None:
        return None
    hidden = np.asarray(hidden)
    if hidden.dtype != bool:
        raise TypeError(f"{name}: hidden of {layer!r} must be bool, True where a key is hidden, got {hidden.dtype}")
    full = (1,) * (4 - hidden.ndim) + hidden.shape
    if len(full) != 4 or any(extent not in (1, whole) for extent, whole in zip(full, shape)):
        raise ValueError(
            f"{name}: hidden of {layer!r} must broadcast to the weights {tuple(shape)}, got {hidden.shape}"
        )
    return ~hidden.reshape(full)


def matches(name: str, names) -> list[str]:
    """Those of the paths that a name means: itself, its last part, or a pattern such as `decoder/*`."""
    if name in names:
        return [name]
    return [path for path in names if path.endswith(f"/{name}") or fnmatch.fnmatchcase(path, name)]


def tokens(name: str, layers, given) -> list:
    """(labels of the rows, labels of the keys) of each layer: a list for each entry of the batch, or None each.

    ``given`` is what :func:`attn_ops.visualize.attention` documents.
    """
    if not isinstance(given, dict):
        return _by_length(name, layers, given)
    names = [layer.name for layer in layers]
    found = {}
    for pattern, own in given.items():
        matching = matches(pattern, names)
        matching = [path for path in names if path in matching or path.partition("#")[0] in matching]
        if not matching:
            raise ValueError(f"{name}: tokens for {pattern!r}, which is no layer here; known: {', '.join(names)}")
        for path in matching:
            layer = layers[names.index(path)]
            if isinstance(own, tuple) and len(own) == 2:
                of_rows = _labels(name, f"query tokens of {path}", own[0], layer.shape[0], layer.shape[2])
                of_keys = _labels(name, f"key tokens of {path}", own[1], layer.shape[0], layer.shape[3])
                found[path] = (of_rows, of_keys)
            else:
                found[path] = _by_length(name, [layer], own)[0]
    return [found.get(path, (None, None)) for path in names]


def _by_length(name, layers, given):
    """One sequence, or a pair of them, for whatever axes have their lengths."""
    sequences = [x for x in (given if isinstance(given, tuple) and len(given) == 2 else (given,)) if x is not None]
    lengths = sorted({extent for layer in layers for extent in layer.shape[2:]})
    batches = {layer.shape[0] for layer in layers}
    by_length = {}
    for sequence in sequences:
        count = _count(name, sequence)
        if count not in lengths:
            raise ValueError(
                f"{name}: {count} tokens, and the attention is over {' and '.join(map(str, lengths))} positions: pass a label "
                "for each, padding too"
            )
        by_length.setdefault(count, sequence)
    found = []
    for layer in layers:
        batch, _, rows, keys = layer.shape
        found.append(tuple(
            None if extent not in by_length else _labels(name, "tokens", by_length[extent], batch, extent)
            for extent in (rows, keys)
        ))  # fmt: skip
    if len(sequences) == 2 and len(by_length) == 1 and batches:
        raise ValueError(
            f"{name}: two sequences of {next(iter(by_length))} tokens, and which layers are of which cannot be told: pass a dict, "
            f"{{layer: (query tokens, key tokens)}}, for the layers {', '.join(layer.name for layer in layers)}"
        )
    return found


def _count(name, sequence):
    if isinstance(sequence, (str, bytes)) or not hasattr(sequence, "__len__"):
        raise TypeError(f"{name}: tokens must be a sequence of labels, got {type(sequence).__name__} {sequence!r}")
    of_entries = _of_entries(sequence)
    lengths = {len(x) for x in sequence} if of_entries else {len(sequence)}
    if len(lengths) > 1:
        raise ValueError(f"{name}: the token lists of a batch must have one length, got {sorted(lengths)}: pad them")
    return lengths.pop()


def _of_entries(sequence):
    """Whether there is a list for each entry of the batch."""
    return len(sequence) > 0 and not isinstance(sequence[0], (str, bytes)) and hasattr(sequence[0], "__len__")


def _labels(name, what, sequence, batch, extent):
    """A list of str for each entry of the batch, or None."""
    if sequence is None:
        return None
    count = _count(name, sequence)
    if count != extent:
        raise ValueError(f"{name}: {count} {what} for {extent} positions: pass a label for each, padding too")
    if not _of_entries(sequence):
        return [[label(x) for x in sequence]] * batch
    if len(sequence) != batch:
        raise ValueError(f"{name}: {len(sequence)} lists of {what} for a batch of {batch}")
    return [[label(x) for x in entry] for entry in sequence]


def label(x) -> str:
    """A token as text."""
    return x.decode("utf-8", "replace") if isinstance(x, bytes) else str(x)
