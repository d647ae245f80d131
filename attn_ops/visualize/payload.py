"""The attention of one example as the viewer reads it (viewer.js): a description in JSON, and bytes.

A weight w is the byte 255 sqrt(w / scale), where scale is the largest of the head: small weights keep their digits.
"""

from __future__ import annotations

import base64
import json
import struct
import zlib

import numpy as np

from attn_ops.visualize import recorded
from attn_ops.visualize.probabilities import Given

_LARGEST_IMAGE = 1024  # pixels in each direction


def payload(name, attention, example, image, grid, title, max_bytes):
    """(header, data) of a `ModelAttention`; errors in the name of the function."""
    batches = {layer.shape[0] for layer in attention}
    if not len(attention):
        raise ValueError(f"{name}: there are no layers to show")
    if not all(-batch <= example < batch for batch in batches):
        raise ValueError(f"{name}: example {example} is not in a batch of {min(batches)}")
    broken = [layer.name for layer in attention if np.isnan(_values(layer)[example]).any()]
    if broken:
        raise ValueError(
            f"{name}: weights of {', '.join(broken)} are NaN for example {example}: queries or keys there are no finite numbers. "
            "plot_attention_weights draws such weights, hatched; attention(layers=) leaves layers out"
        )
    parts, tokens, sizes = _Parts(), _Tokens(), [_bytes(layer) for layer in attention]
    layers = []
    for layer, size in zip(attention, sizes):
        if sum(sizes) > max_bytes and layer.weights is not None:
            layer = _coarser(layer, size * max_bytes / sum(sizes))
        layers.append(_layer(parts, tokens, layer, example))
    data = parts.compressed()
    if len(parts.joined()) > max_bytes:
        raise ValueError(
            f"{name}: {len(attention)} layers take {len(parts.joined()):,} bytes, and max_bytes allows {max_bytes:,}: record fewer "
            "(layers=), with a smaller top_keys=, or allow more"
        )
    header = {"title": title or attention.model, "layers": layers, "tokens": tokens.lists}
    header["image"], header["grid"] = _picture(name, attention, image, grid)
    return json.dumps(header, ensure_ascii=False, allow_nan=False), data


def _values(layer):
    """What its cells show, `[batch, heads, rows, keys]` or blocks of those."""
    return layer.blocks.means if layer.weights is None else layer.weights


def _bytes(layer):
    """About what a layer takes, of one example."""
    _, heads, rows, keys = layer.shape
    if layer.weights is not None:
        return heads * rows * keys
    return layer.blocks.means[0].size + 5 * layer.blocks.top_keys[0].size


def _coarser(layer, room):
    """The layer in blocks that take about so many bytes, if there are such."""
    _, heads, rows, keys = layer.shape
    room = max(1.0, room - heads * keys)  # what each key receives
    top = int(np.clip(room / 3 // (5 * heads * rows), 1, recorded.TOP_KEYS))
    left = max(1.0, 0.9 * room - 5 * heads * rows * top)
    size = max(2, int(np.ceil(np.sqrt((heads + layer.hidden.shape[1]) * rows * keys / left))))
    made = recorded.summarized(layer.name, layer.cls, Given(layer.weights, ~layer.hidden), 0, top, block=size)
    return recorded.with_labels_of(made, layer)


def _layer(parts, tokens, layer, example):
    _, heads, rows, keys = layer.shape
    whole = layer.weights is not None
    values = _values(layer)[example]
    scale, codes = _coded(values)
    received_scale, received = _coded(layer.received[example])
    ranges = [_real(real[example]) for real in (layer.real_rows, layer.real_keys)]
    distance = layer.distance[example]
    header = {
        "name": layer.name,
        "cls": layer.cls,
        "heads": heads,
        "rows": rows,
        "keys": keys,
        "same": layer.of_one_sequence,
        "queryTokens": tokens.index(layer.query_tokens, example),
        "keyTokens": tokens.index(layer.key_tokens, example),
        "realRows": ranges[0],
        "realKeys": ranges[1],
        "padded": ranges != [[0, rows], [0, keys]],
        "entropy": [round(float(x), 4) for x in layer.entropy[example]],
        "distance": None if np.isnan(distance).any() else [round(float(x), 3) for x in distance],
        "block": 1 if whole else layer.blocks.size,
        "scale": scale,
        "codesAt": parts.add(codes),
        "hiddenAt": None,
        "seenAt": None,
        "receivedScale": received_scale,
        "receivedAt": parts.add(received),
    }
    if whole:
        hidden = layer.hidden[example]
        if hidden.any():
            header |= {"hiddenAt": parts.add(np.packbits(hidden, bitorder="little")), "hiddenHeads": len(hidden)}
        return header
    blocks = layer.blocks
    seen = blocks.seen[example]
    if (seen == 0).any():
        header |= {"seenAt": parts.add(np.ceil(255 * seen).astype(np.uint8)), "seenHeads": len(seen)}
    top_scale, top_codes = _coded(blocks.top_weights[example])
    top_keys = np.ascontiguousarray(blocks.top_keys[example], "<i4")
    return header | {
        "top": top_keys.shape[-1],
        "topKeysAt": parts.add(top_keys),
        "topScale": top_scale,
        "topCodesAt": parts.add(top_codes),
    }


def _coded(values):
    """The scales and the bytes of `[heads, …]` weights."""
    values = np.asarray(values, np.float64)
    scale = values.reshape(len(values), -1).max(-1)
    shape = (-1,) + (1,) * (values.ndim - 1)
    relative = values / np.where(scale > 0, scale, 1.0).reshape(shape)
    return [float(f"{x:.6g}") for x in scale], np.rint(255 * np.sqrt(np.clip(relative, 0, 1))).astype(np.uint8)


def _real(real):
    """[first, stop] of what is no padding."""
    there = np.flatnonzero(real)
    return [int(there[0]), int(there[-1]) + 1] if len(there) else [0, len(real)]


class _Parts:
    """Arrays one after the other, each from a multiple of four bytes on."""

    def __init__(self):
        self._parts, self._length = [], 0

    def add(self, array) -> list[int]:
        """Where it is: [first byte, bytes]."""
        data = np.ascontiguousarray(array).tobytes()
        place = [self._length, len(data)]
        self._parts.append(data + bytes(-len(data) % 4))
        self._length += len(self._parts[-1])
        return place

    def joined(self) -> bytes:
        return b"".join(self._parts)

    def compressed(self) -> bytes:
        return zlib.compress(self.joined(), 6)


class _Tokens:
    """The lists of labels, each once."""

    def __init__(self):
        self.lists = []

    def index(self, tokens, example):
        if tokens is None:
            return None
        if tokens[example] not in self.lists:
            self.lists.append(list(tokens[example]))
        return self.lists.index(tokens[example])


# ---------------------------------------------------------------------------------------------------------------- images


def _picture(name, attention, image, grid):
    """The image as a description, and the grid of its patches; None each where there are none."""
    if image is None and grid is None:
        return None, None
    shown = None if image is None else _image(name, image)
    extents = sorted({layer.shape[3] for layer in attention})
    if grid is None:
        ratio = shown["height"] / shown["width"]
        found = [places for extent in extents for places in _grids(extent, ratio)]
        if not found:
            raise ValueError(
                f"{name}: {' and '.join(map(str, extents))} keys are no grid of patches over an image of {shown['height']} x "
                f"{shown['width']}, with up to 8 other tokens before them: pass grid=(rows, columns)"
            )
        first, rows, columns = found[0]
    else:
        try:
            rows, columns = (int(x) for x in grid)
        except (TypeError, ValueError):
            raise ValueError(f"{name}: grid must be (rows of patches, columns of patches), got {grid!r}") from None
        fitting = [extent for extent in extents if rows > 0 and columns > 0 and 0 <= extent - rows * columns <= 64]
        if not fitting:
            raise ValueError(
                f"{name}: a grid of {rows} x {columns} patches does not fit {' or '.join(map(str, extents))} keys"
            )
        first = fitting[0] - rows * columns
    return shown, {"rows": rows, "columns": columns, "first": first}


def _grids(keys, ratio):
    """(tokens before them, rows, columns) of patches that are squares over an image of this height by width, nearest first."""
    for first in range(9):
        count = keys - first
        for rows in range(1, count + 1):
            columns = count // rows
            if rows * columns == count and abs(rows / columns - ratio) <= 0.01 * ratio:
                yield first, rows, columns


def _image(name, image):
    """A PNG of an array [height, width], or with 1, 3 or 4 channels: bytes as they are, floats from 0 to 1 or of any range."""
    try:
        pixels = np.asarray(image)
        good = pixels.dtype.kind in "fiub" and pixels.ndim in (2, 3) and pixels.size > 0
    except (TypeError, ValueError):
        good = False
    if not good or (pixels.ndim == 3 and pixels.shape[2] not in (1, 3, 4)):
        raise ValueError(
            f"{name}: image must be an array [height, width], or with 1, 3 or 4 channels last, got "
            f"{getattr(image, 'shape', type(image).__name__)}"
        )
    if pixels.dtype != np.uint8:
        pixels = np.nan_to_num(pixels.astype(np.float64))
        low, high = min(pixels.min(), 0.0), pixels.max()
        high = high if high > 1 or low < 0 else 1.0
        pixels = np.rint(255 * (pixels - low) / ((high - low) or 1.0)).astype(np.uint8)
    pixels = pixels[..., None] if pixels.ndim == 2 else pixels
    step = -(-max(pixels.shape[:2]) // _LARGEST_IMAGE)
    pixels = np.ascontiguousarray(pixels[::step, ::step])
    height, width, channels = pixels.shape
    return {
        "src": f"data:image/png;base64,{base64.b64encode(_png(pixels)).decode()}",
        "width": width,
        "height": height,
        "channels": channels,
    }


def _png(pixels):
    """ISO/IEC 15948: the rows, each behind a byte 0 (no filter), deflated."""
    height, width, channels = pixels.shape

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    rows = np.concatenate([np.zeros((height, 1), np.uint8), pixels.reshape(height, -1)], axis=1).tobytes()
    head = struct.pack(">IIBBBBB", width, height, 8, {1: 0, 3: 2, 4: 6}[channels], 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(rows, 9)) + chunk(b"IEND", b"")
