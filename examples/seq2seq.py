#!/usr/bin/env python3
# %% [markdown]
"""Writes Korean in Latin letters: an encoder, a decoder, and cross attention from one to the other.

    python examples/seq2seq.py                             # under two minutes
    python examples/seq2seq.py --epochs 12

The data ship with Python: Unicode names each of 11,172 syllables of Korean by how it is written in Latin letters, and
takes it apart into two or three letters of its own (`unicodedata`). A phrase is three syllables, written without
spaces: 6 to 9 Korean letters, as many as 21 Latin ones. The phrases to test on are made of syllables that no phrase
to learn from has.

    encoder: letters -> Embedding(mask_zero=True) -> + positions -> self-attention block
    decoder: letters -> Embedding -> + positions -> causal self-attention block -> cross-attention block -> Dense

Which Korean letters a Latin one comes from is what cross attention has to find. Both models, ours and the one of stock
Keras, get the padding of the Korean letters as a mask.
"""

# %%
from __future__ import annotations

import unicodedata

import keras
import numpy as np
import shared

SYLLABLES = 3
LATIN = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
START, END = 1, 2  # beside padding, 0
FIRST_JAMO, JAMO = 0x1100, 256
SOURCE, TARGET = 3 * SYLLABLES, 7 * SYLLABLES + 1


# %% Phrases: Korean letters, and the Latin ones
def pair(syllables: list[str]) -> tuple[list[int], list[int]]:
    """A phrase as numbers of its Korean letters, and of its Latin ones with END behind."""
    korean = unicodedata.normalize("NFD", "".join(syllables))
    latin = "".join(unicodedata.name(syllable).removeprefix("HANGUL SYLLABLE ") for syllable in syllables)
    return [ord(letter) - FIRST_JAMO + 1 for letter in korean], [*(LATIN.index(letter) + 3 for letter in latin), END]


def phrases(syllables: np.ndarray, count: int, random) -> tuple[list[np.ndarray], np.ndarray]:
    """x, [Korean letters, Latin letters so far], and y, the next Latin letters; zeros behind."""
    korean, latin = np.zeros((count, SOURCE), np.int32), np.zeros((count, TARGET), np.int32)
    for row, chosen in enumerate(random.choice(syllables, (count, SYLLABLES))):
        source, target = pair([chr(syllable) for syllable in chosen])
        korean[row, : len(source)], latin[row, : len(target)] = source, target
    so_far = np.pad(latin[:, :-1], ((0, 0), (1, 0)), constant_values=START)
    return [korean, so_far], latin


def load(count: int, seed: int):
    """(x, y) to learn from, and (x, y) to test on, of a fifth of the syllables."""
    random = np.random.default_rng(seed)
    syllables = random.permutation(np.arange(0xAC00, 0xD7A4))
    test = len(syllables) // 5
    return phrases(syllables[test:], count, random), phrases(syllables[:test], max(count // 20, 32), random)


# %% The model
def build_model(layers, width: int, heads: int) -> keras.Model:
    """``layers`` is `attn_ops.layers` or `keras.layers`; Latin letters so far to the logits of the next ones."""
    korean, latin = (keras.Input((None,), dtype="int32", name=name) for name in ("korean", "latin"))
    source = keras.layers.Embedding(JAMO, width, mask_zero=True)(korean)
    source = shared.transformer_block(layers, shared.Positions(SOURCE)(source), heads)
    x = keras.layers.Embedding(len(LATIN) + 3, width)(latin)
    x = shared.transformer_block(layers, shared.Positions(TARGET)(x), heads, use_causal_mask=True)
    x = shared.transformer_block(layers, x, heads, context=source)
    logits = keras.layers.Dense(len(LATIN) + 3)(keras.layers.LayerNormalization()(x))
    model = keras.Model([korean, latin], logits)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True, ignore_class=0)
    model.compile(optimizer=keras.optimizers.Adam(3e-3), loss=loss)
    return model


# %% Writing, letter by letter
def write(model: keras.Model, korean: np.ndarray) -> np.ndarray:
    """`[phrases, TARGET]`: the likeliest letter each time, behind those before it."""
    written = np.zeros((len(korean), TARGET + 1), np.int32)
    written[:, 0] = START
    for i in range(TARGET):
        logits = model.predict_on_batch([korean, written[:, :-1]])
        written[:, i + 1] = logits[:, i].argmax(-1)
    return written[:, 1:]


def until_end(letters: np.ndarray) -> str:
    return "".join(LATIN[number - 3] if number > 2 else "?" for number in [*letters, END][: [*letters, END].index(END)])


def score(model: keras.Model, x, y) -> dict[str, float]:
    """How many letters are right where those before are given, and how many phrases are where they are not."""
    there = y != 0
    right = model.predict(x, verbose=0).argmax(-1) == y
    some = slice(64)
    written = write(model, x[0][some])
    pairs = [(until_end(ours), until_end(wanted)) for ours, wanted in zip(written, y[some], strict=True)]
    print(
        "\n".join(
            f"  {''.join(chr(n + FIRST_JAMO - 1) for n in x[0][i] if n)}  {pairs[i][0]}  ({pairs[i][1]})"
            for i in range(3)
        )
    )
    return {
        "letters right": float(right[there].mean()),
        "phrases right": float(np.mean([ours == wanted for ours, wanted in pairs])),
    }


# %% Both models learn
def main(argv=None) -> dict[str, dict[str, float]]:
    parser = shared.parser(__doc__, epochs=3, batch_size=64, phrases=6000, width=48, heads=4)
    arguments = shared.parse(parser, argv, epochs=1, phrases=512, width=16)
    learn, test = load(arguments.phrases, arguments.seed)
    print(f"{len(learn[1])} phrases to learn from, {len(test[1])} of other syllables to test on")
    models = shared.twins(lambda layers: build_model(layers, arguments.width, arguments.heads), arguments.seed)
    return shared.compare(models, learn, test, score, arguments)


if __name__ == "__main__":
    main()
