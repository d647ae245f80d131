"""What is kept of the attention of a model: the weights, or a summary of them where there are too many."""

from __future__ import annotations

import dataclasses
import typing

import numpy as np

from attn_ops.visualize import checks
from attn_ops.visualize.probabilities import Given

LONGEST = 512
TOP_KEYS = 8
MAX_BYTES = 2**30
_BLOCKS = 256  # at most so many in each direction


class Blocks(typing.NamedTuple):
    """A summary of the weights of a layer.

    Attributes:
        size: how many rows and keys a block has; those at the end may have fewer.
        means: float32 `[batch, num_heads, blocks of rows, blocks of keys]`, of all weights of a block, hidden ones too.
        seen: float32 `[batch, num_heads or 1, blocks of rows, blocks of keys]`, the share of pairs that no mask hides.
        top_keys: int32 `[batch, num_heads, seqlen_q, k]`, the keys with the largest weights of each row, the largest
            first; -1 where a row weighs fewer.
        top_weights: float32, their weights; 0 where there is no key.
    """

    size: int
    means: np.ndarray
    seen: np.ndarray
    top_keys: np.ndarray
    top_weights: np.ndarray


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class LayerAttention:
    """The attention of one layer in one call of it.

    Attributes:
        name: the path of names in the model, with `#2`, `#3`, … for further calls of a shared layer.
        cls: the name of its class.
        shape: (batch, num_heads, seqlen_q, seqlen_k).
        weights: float32 `[batch, num_heads, seqlen_q, seqlen_k]`, or None where `blocks` summarizes them. 0 where hidden.
        hidden: bool `[batch, num_heads or 1, seqlen_q, seqlen_k]`, True where a mask or a bias of -inf hides a key; None
            beside `blocks`, of which `seen` tells it.
        blocks: None or the :class:`attn_ops.visualize.recorded.Blocks`.
        real_rows, real_keys: bool `[batch, seqlen_q]` and `[batch, seqlen_k]`: what is no padding: keys that some row
            sees, and rows that see a key (and that others see, where each row is also a key).
        entropy: float32 `[batch, num_heads]`, -sum p ln p, the mean over real rows: 0 for heads that look at one key,
            ln n for those that look at n keys alike.
        distance: float32 `[batch, num_heads]`, how far from its own position a row looks, the mean of abs(j - i), and
            that over real rows; NaN where rows and keys are different sequences.
        received: float32 `[batch, num_heads, seqlen_k]`, the weight that a key receives, the mean over real rows.
        query_tokens, key_tokens: lists of a label for each row and key, one list for each entry of the batch, or None.
    """

    name: str
    cls: str
    shape: tuple[int, int, int, int]
    weights: np.ndarray | None
    hidden: np.ndarray | None
    blocks: Blocks | None
    real_rows: np.ndarray
    real_keys: np.ndarray
    entropy: np.ndarray
    distance: np.ndarray
    received: np.ndarray
    query_tokens: list | None = None
    key_tokens: list | None = None

    @property
    def heads(self) -> int:
        """How many query heads there are."""
        return self.shape[1]

    @property
    def of_one_sequence(self) -> bool:
        """Whether rows and keys are the same positions, as far as that can be told."""
        same_tokens = self.query_tokens == self.key_tokens
        return self.shape[2] == self.shape[3] and same_tokens and not np.isnan(self.distance).all()

    def __repr__(self):
        batch, heads, rows, keys = self.shape
        kept = (
            "weights"
            if self.blocks is None
            else f"blocks of {self.blocks.size} and {self.blocks.top_keys.shape[-1]} keys a row"
        )
        return f"<LayerAttention {self.name}: batch {batch}, {heads} heads, {rows} x {keys}, {kept}>"


class ModelAttention:
    """The attention of a model, layer by layer, in the order in which the layers ran; a table when printed.

    `attention["encoder/attention"]`, `attention["attention"]` (the last name of a path, if it is the only one of that
    name) and `attention[0]` are :class:`LayerAttention`.

    Attributes:
        model: the name of the model.
        layers: a tuple of :class:`LayerAttention`.
        left_out: a dict of reasons by the names of those attention layers whose weights could not be had.
    """

    def __init__(self, model: str, layers, left_out=None):
        self.model = model
        self.layers = tuple(layers)
        self.left_out = dict(left_out or {})

    @classmethod
    def from_weights(cls, weights, *, tokens=None, hidden=None, model="weights", longest=LONGEST, top_keys=TOP_KEYS):
        """The same for weights that come from elsewhere.

        Args:
            weights: probabilities `[batch, num_heads, seqlen_q, seqlen_k]`, `[num_heads, seqlen_q, seqlen_k]` or
                `[seqlen_q, seqlen_k]`, or a dict of them by the name of a layer, or a list. Exact zeros are weights of
                0, and NaN stands for hidden.
            tokens: as for :func:`attention`.
            hidden: None, or what hides keys: bool that broadcasts to the weights, or a dict of them.
            model: a title.
            longest, top_keys: as for :func:`attention`.

        Raises:
            TypeError: weights that hold no real numbers.
            ValueError: weights that are no probabilities (negative, above 1, rows whose sum is above 1), or of another
                rank; tokens that do not fit.
        """
        if not isinstance(weights, dict):
            several = isinstance(weights, (list, tuple)) and len(weights) > 0 and np.ndim(weights[0]) >= 2
            weights = {f"layer {n}": x for n, x in enumerate(weights)} if several else {"weights": weights}
        layers = []
        for name, x in weights.items():
            x, of_nan = checks.probabilities("ModelAttention.from_weights", name, x)
            own = hidden.get(name) if isinstance(hidden, dict) else hidden
            visible = checks.visible("ModelAttention.from_weights", name, own, x.shape)
            if of_nan is not None:
                visible = ~of_nan if visible is None else visible & ~of_nan
            layers.append(summarized(name, "array", Given(x, visible), longest, top_keys))
        return cls(model, with_tokens("ModelAttention.from_weights", layers, tokens))

    @property
    def names(self) -> list[str]:
        return [layer.name for layer in self.layers]

    def __len__(self):
        return len(self.layers)

    def __iter__(self):
        return iter(self.layers)

    def __getitem__(self, name) -> LayerAttention:
        if not isinstance(name, str):
            return self.layers[name]
        matching = checks.matches(name, self.names)
        if len(matching) != 1:
            what = "there is none" if not matching else f"there are {len(matching)}: {', '.join(matching)}"
            raise KeyError(f"attention of a layer {name!r}: {what}; known: {', '.join(self.names)}")
        return self.layers[self.names.index(matching[0])]

    def __str__(self):
        head = ["layer", "class", "heads", "rows x keys", "kept", "entropy", "distance"]
        rows = [head]
        for layer in self.layers:
            kept = "weights" if layer.blocks is None else f"blocks of {layer.blocks.size}"
            far = "" if np.isnan(layer.distance).all() else f"{layer.distance.mean():.2f}"
            sizes = f"{layer.shape[2]} x {layer.shape[3]}"
            rows.append([layer.name, layer.cls, str(layer.heads), sizes, kept, f"{layer.entropy.mean():.2f}", far])
        widths = [max(map(len, column)) for column in zip(*rows)]
        batch = f", {self.layers[0].shape[0]} of them" if self.layers and self.layers[0].shape[0] > 1 else ""
        lines = [f"attention of {self.model}{batch}"]
        lines += ["  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows]
        lines += [f"left out: {name}: {reason}" for name, reason in self.left_out.items()]
        return "\n".join(lines)

    __repr__ = __str__


def kept_bytes(shape, longest: int, top_keys: int) -> int:
    """About what :func:`summarized` keeps of weights of this shape."""
    batch, heads, rows, keys = shape
    if max(rows, keys) <= longest:
        return 4 * batch * heads * rows * keys + batch * rows * keys
    size = _block_size(rows, keys)
    return batch * heads * (4 * -(-rows // size) * -(-keys // size) + 8 * rows * min(top_keys, keys))


def summarized(name, cls, source, longest: int, top_keys: int, block: int | None = None) -> LayerAttention:
    """What is kept of a `Probabilities` or `Given`; in blocks of ``block``, or of a size that goes by the length."""
    batch, num_heads, seqlen_q, seqlen_k = source.shape
    whole = max(seqlen_q, seqlen_k) <= longest
    keeper = _Whole(source) if whole else _InBlocks(source, top_keys, block or _block_size(seqlen_q, seqlen_k))
    same = seqlen_q == seqlen_k
    per_row = {"entropy": np.zeros(source.shape[:3], np.float32), "distance": np.zeros(source.shape[:3], np.float32)}
    received = np.zeros((batch, num_heads, seqlen_k), np.float32)
    visibility = [source.visibility(entry) for entry in range(batch)]
    sees, seen = map(np.stack, zip(*visibility))
    real = sees & seen if same else sees
    for entry in range(batch):
        for heads, rows, weights, visible, own in source.chunks(entry, keeper.multiple):
            keeper.add(entry, heads, rows, weights, visible)
            logs = np.log(np.where(weights > 0, weights, 1.0))
            per_row["entropy"][entry, heads, rows] = -(weights * logs).sum(-1)
            per_row["distance"][entry, heads, rows] = (weights * np.abs(np.arange(seqlen_k) - own[:, None])).sum(-1)
            received[entry, heads] += weights[:, real[entry, rows]].sum(1)
            same &= bool((own == np.arange(rows.start, rows.stop)).all())
    count = np.maximum(real.sum(-1), 1).astype(np.float32)[:, None, None]
    entropy, distance = ((np.where(real[:, None], x, 0) / count).sum(-1) for x in per_row.values())
    distance = distance if same else np.full_like(distance, np.nan)
    return LayerAttention(name, cls, source.shape, *keeper.results(), real, seen, entropy, distance, received / count)


class _Whole:
    multiple = 1

    def __init__(self, source):
        batch, _, rows, keys = source.shape
        self._weights = np.zeros(source.shape, np.float32)
        self._hidden = np.zeros((batch, source.mask_heads, rows, keys), bool)

    def add(self, entry, heads, rows, weights, visible):
        self._weights[entry, heads, rows] = weights
        self._hidden[entry, _of_mask(self._hidden, heads), rows] = ~visible

    def results(self):
        return self._weights, self._hidden, None


class _InBlocks:
    def __init__(self, source, top_keys, block):
        batch, heads, rows, keys = source.shape
        self.multiple = block
        blocks = -(-rows // self.multiple), -(-keys // self.multiple)
        self._means = np.zeros((batch, heads, *blocks), np.float32)
        self._seen = np.zeros((batch, source.mask_heads, *blocks), np.float32)
        self._keys = np.full((batch, heads, rows, min(top_keys, keys)), -1, np.int32)
        self._top = np.zeros(self._keys.shape, np.float32)

    def add(self, entry, heads, rows, weights, visible):
        size = self.multiple
        blocks = slice(rows.start // size, -(-rows.stop // size))
        self._means[entry, heads, blocks] = _block_means(weights, size)
        self._seen[entry, _of_mask(self._seen, heads), blocks] = _block_means(visible, size)
        count = self._keys.shape[-1]
        keys = np.argpartition(weights, -count, axis=-1)[..., -count:]
        top = np.take_along_axis(weights, keys, -1)
        order = np.lexsort((keys, -top), axis=-1)  # of equal weights the first key first
        keys, top = np.take_along_axis(keys, order, -1), np.take_along_axis(top, order, -1)
        self._keys[entry, heads, rows] = np.where(top > 0, keys, -1)
        self._top[entry, heads, rows] = top

    def results(self):
        return None, None, Blocks(self.multiple, self._means, self._seen, self._keys, self._top)


def _of_mask(x, heads):
    """Which heads of an array of masks, `[batch, num_heads or 1, …]`."""
    return heads if x.shape[1] > 1 else slice(None)


def _block_size(rows, keys):
    size = 1
    while -(-max(rows, keys) // size) > _BLOCKS:
        size *= 2
    return size


def _block_means(x, size):
    """`[heads, rows, keys]` by blocks; the last ones may be smaller."""
    starts = [np.arange(0, extent, size) for extent in x.shape[1:]]
    sums = np.add.reduceat(np.add.reduceat(x, starts[0], axis=1, dtype=np.float64), starts[1], axis=2)
    counts = [np.minimum(size, extent - start) for extent, start in zip(x.shape[1:], starts)]
    return sums / (counts[0][:, None] * counts[1])


def with_tokens(name, layers, tokens):
    """The layers with the labels that ``tokens`` has for them."""
    if tokens is None:
        return list(layers)
    found = checks.tokens(name, layers, tokens)
    return [
        dataclasses.replace(layer, query_tokens=of_rows, key_tokens=of_keys)
        for layer, (of_rows, of_keys) in zip(layers, found)
    ]


def with_labels_of(made, layer):
    """``made`` with the labels of another layer, and with what was known of that before it was summarized."""
    names = ("real_rows", "real_keys", "entropy", "distance", "received", "query_tokens", "key_tokens")
    return dataclasses.replace(made, **{name: getattr(layer, name) for name in names})
