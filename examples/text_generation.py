#!/usr/bin/env python3
# %% [markdown]
"""Learns to write like Python's manual, and generates text: with a cache, and without.

    python examples/text_generation.py                      # about two minutes on two cores
    python examples/text_generation.py --steps 2000 --prompt "The for statement"

The text is the manual's chapters that ship with Python as `pydoc_data.topics`, some 470 kB of English, read byte by
byte. The model is a small decoder of attn_ops's layers (rotary positions, grouped queries):

    Embedding -> 3 x [norm, GroupedQueryAttention(rotary=True), norm, Dense, Dense] -> norm -> Dense(256)

What it writes is of the manual's sort and makes little sense: it has trained for a minute. The text is generated four
times, greedily, to the same bytes: with a cache (`attn_ops.KVCache`, one per layer), where a token costs one row of
each layer, and without, where it costs the whole text so far; each with and without XLA (``jit_compile``).
"""

# %%
from __future__ import annotations

import argparse
import os
import sys
import time

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import keras
import numpy as np
import tensorflow as tf
from pydoc_data import topics

import attn_ops

BYTES = 256
HEADS, KV_HEADS = 4, 2


# %% The text
def load_text() -> np.ndarray:
    """The manual's chapters, one after the other, as numbers of bytes."""
    chapters = "\n\n".join(topics.topics[name].strip() for name in sorted(topics.topics))
    return np.frombuffer(chapters.encode("utf-8"), np.uint8).astype(np.int32)


# %% The model
class Block(keras.layers.Layer):
    """One layer of the decoder; with a cache it returns that as well."""

    def __init__(self, width: int, **kwargs):
        super().__init__(**kwargs)
        self.norms = [keras.layers.LayerNormalization() for _ in range(2)]
        self.attention = attn_ops.layers.GroupedQueryAttention(width // HEADS, HEADS, KV_HEADS, rotary=True)
        self.up = keras.layers.Dense(4 * width, activation="gelu")
        self.down = keras.layers.Dense(width)

    def build(self, shape):
        for layer in (*self.norms, self.up):
            layer.build(shape)
        self.attention.build(shape, shape)
        self.down.build((*shape[:-1], 4 * shape[-1]))

    def call(self, x, cache=None):
        y = self.norms[0](x)
        if cache is None:
            y = self.attention(y, y, use_causal_mask=True)
        else:
            y, cache = self.attention(y, y, cache=cache)
        x = x + y
        x = x + self.down(self.up(self.norms[1](x)))
        return x if cache is None else (x, cache)

    def compute_output_spec(self, x, cache=None):
        return x if cache is None else (x, cache)


class Writer(keras.Model):
    """The decoder: bytes `[batch, length]` to the logits of the ones that follow."""

    def __init__(self, width: int, layers: int):
        super().__init__()
        self.embedding = keras.layers.Embedding(BYTES, width)
        self.blocks = [Block(width) for _ in range(layers)]
        self.norm = keras.layers.LayerNormalization()
        self.logits = keras.layers.Dense(BYTES)
        self.width = width

    def call(self, text):
        x = self.embedding(text)
        for block in self.blocks:
            x = block(x)
        return self.logits(self.norm(x))

    def new_caches(self, batch: int, max_length: int):
        """An empty cache for each block."""
        return tuple(
            attn_ops.KVCache.create(batch, max_length, KV_HEADS, self.width // HEADS, self.compute_dtype)
            for _ in self.blocks
        )

    def continued(self, text, caches):
        """The logits after the last byte of ``text``, which stands behind what the ``caches`` hold; and the caches."""
        x, grown = self.embedding(text), []
        for block, cache in zip(self.blocks, caches, strict=True):
            x, cache = block(x, cache=cache)
            grown.append(cache)
        return self.logits(self.norm(x[:, -1:]))[:, 0], tuple(grown)


# %% Writing with a cache, and without
def with_cache(model: Writer, count: int, jit_compile: bool):
    """A function that gives `[batch, count]` bytes after a prompt `[batch, length]`, and writes ``some`` of them."""

    @tf.function(jit_compile=jit_compile)
    def generate(prompt, some=count):
        batch, length = prompt.shape
        logits, caches = model.continued(prompt, model.new_caches(batch, length + count))
        first = tf.argmax(logits, -1, tf.int32)

        def body(i, written, last, caches):
            logits, caches = model.continued(last[:, None], caches)
            last = tf.argmax(logits, -1, tf.int32)
            return i + 1, tf.tensor_scatter_nd_update(written, [[i]], last[None]), last, caches

        written = tf.tensor_scatter_nd_update(tf.zeros([count, batch], tf.int32), [[0]], first[None])
        loop = (tf.constant(1), written, first, caches)
        written = tf.while_loop(lambda i, *_: i < some, body, loop, maximum_iterations=count)[1]
        return tf.transpose(written)

    return generate


def without_cache(model: Writer, count: int, jit_compile: bool):
    """The same, and each byte is computed from the whole text before it."""

    @tf.function(jit_compile=jit_compile)
    def generate(prompt, some=count):
        batch, length = prompt.shape
        text = tf.concat([prompt, tf.zeros([batch, count], tf.int32)], 1)  # causal: nothing sees what is not there yet

        def body(i, text):
            last = tf.argmax(model(text)[:, i - 1], -1, tf.int32)
            at = tf.stack([tf.range(batch), tf.fill([batch], i)], 1)
            return i + 1, tf.tensor_scatter_nd_update(text, at, last)

        loop = (tf.constant(length), text)
        return tf.while_loop(lambda i, _: i < length + some, body, loop, maximum_iterations=count)[1][:, length:]

    return generate


# %% Training and timing
def train(model: Writer, text: np.ndarray, arguments) -> float:
    """Trains on random pieces of the text, with Keras's progress bar; the loss at the end, in bits per byte."""
    random = np.random.default_rng(arguments.seed)
    starts = random.integers(0, len(text) - arguments.length - 1, (arguments.steps, arguments.batch_size))
    pieces = text[starts[..., None] + np.arange(arguments.length + 1)]
    data = tf.data.Dataset.from_tensor_slices((pieces[..., :-1], pieces[..., 1:]))
    rate = keras.optimizers.schedules.CosineDecay(3e-3, arguments.steps)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(optimizer=keras.optimizers.AdamW(rate), loss=loss)
    history = model.fit(data, epochs=1, shuffle=False, verbose=1)
    return history.history["loss"][-1] / np.log(2)


def timed(generate, prompt, count: int):
    """What a function generates, and how many tokens per second: of its second run, the first one compiles."""
    generate(prompt, tf.constant(1))
    begin = time.perf_counter()
    written = generate(prompt, tf.constant(count)).numpy()
    return written, written.size / (time.perf_counter() - begin)


# %% All of it
def main(argv=None) -> dict:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=300, help="of training")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--length", type=int, default=128, help="of the pieces that it trains on")
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--layers", type=int, default=3)
    parser.add_argument("--prompt", default="The following example ")
    parser.add_argument("--count", type=int, default=256, help="bytes to generate")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="a tiny model and few steps, to see that it runs")
    arguments = parser.parse_args(argv)
    if arguments.quick:
        arguments.steps, arguments.width, arguments.layers, arguments.count = 3, 32, 1, 24

    keras.utils.set_random_seed(arguments.seed)
    text = load_text()
    model = Writer(arguments.width, arguments.layers)
    model(text[None, : arguments.length])
    print(f"{len(text):,} bytes of the manual to learn from, {model.count_params():,} parameters")
    bits = train(model, text, arguments)
    print(f"The mean of the whole training: {bits:.2f} bits per byte\n")

    prompt = tf.constant(np.frombuffer(arguments.prompt.encode("utf-8"), np.uint8)[None].astype(np.int32))
    written, speeds = {}, {}
    for jit_compile in (False, True):
        for make in (with_cache, without_cache):
            name = f"{make.__name__.replace('_', ' ')}, jit_compile={jit_compile}"
            written[name], speeds[name] = timed(make(model, arguments.count, jit_compile), prompt, arguments.count)

    first, *others = written.values()
    print(arguments.prompt + bytes(first[0].astype(np.uint8)).decode("utf-8", "replace"))
    print(f"\n{'tokens per second':<36}")
    for name, speed in speeds.items():
        print(f"{name:<36}{speed:>12,.0f}")
    same = all((other == first).all() for other in others)
    print(f"All four wrote {'the same bytes' if same else 'other bytes: sums in another order decided near ties'}.")
    return {"bits": bits, "written": written, "speeds": speeds}


if __name__ == "__main__":
    main([] if "ipykernel" in sys.modules else None)  # a notebook has no command line
