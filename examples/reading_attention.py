#!/usr/bin/env python3
# %% [markdown]
"""Reads the attention of a trained text classifier: which words it looks at, as pictures and in a viewer for browsers.

    python examples/reading_attention.py                   # about a minute
    python examples/reading_attention.py --folder pictures --text "Returns the mean of each column of an array."

The model is the one of text_classification.py, which tells of documentation strings which library they are of; here it
has stock Keras layers, since weights are read of any model. Written are

    attention.html      all heads, to look into: open it in a browser, it needs no network
    heads.png           each head as a heat map
    words.png           the text, each word on the colour of the weight that it receives

and printed are the words that receive most, of the text and of all test texts.
"""

# %%
from __future__ import annotations

import collections
import pathlib

import docstrings
import keras
import numpy as np
import shared
import text_classification
from sequence_classification import classification

from attn_ops import visualize


# %% The texts, and the words that stand for their numbers
def load(per_library: int, length: int, seed: int):
    """What text_classification learns from and tests on, and the vocabulary."""
    learn, test = text_classification.load(per_library, length, seed)
    texts, _ = docstrings.load(per_library, seed)
    known = docstrings.vocabulary(texts[len(texts) // 5 :], text_classification.VOCABULARY)
    return learn, test, known


def words_of(numbers, names: dict[int, str]) -> list[str]:
    """A word for each number, "" for padding."""
    return ["" if number == 0 else names.get(int(number), "?") for number in numbers]


# %% What a text's words receive
def most_attended(layer, example: int, count: int) -> list[tuple[str, float]]:
    """The words of a text that receive most, in the mean of all heads and of all its words."""
    received = layer.received[example].mean(0)
    return [(layer.key_tokens[example][key], float(received[key])) for key in np.argsort(-received)[:count]]


def most_attended_of_all(attention, count: int) -> list[tuple[str, float]]:
    """The words that receive most wherever they stand: how many times what each would receive if all were alike."""
    times, sums = collections.Counter(), collections.Counter()
    for layer in attention:
        for words, received, real in zip(layer.key_tokens, layer.received.mean(1), layer.real_keys):
            for word, weight in zip(words, received * real.sum()):
                times[word] += bool(word)
                sums[word] += float(weight)
    means = {word: sums[word] / n for word, n in times.items() if n >= 5 and word != "?"}
    return sorted(means.items(), key=lambda pair: -pair[1])[:count]


# %% Train, look, and write it all
def main(argv=None) -> dict[str, dict[str, float]]:
    parser = shared.parser(
        __doc__, epochs=4, batch_size=32, length=64, texts=500, width=64, heads=4, folder="reading_attention", text=""
    )
    arguments = shared.parse(parser, argv, epochs=1, length=32, texts=100, width=16)
    learn, test, known = load(arguments.texts, arguments.length, arguments.seed)
    names = {number: word for word, number in known.items()}

    keras.utils.set_random_seed(arguments.seed)
    model = text_classification.build_model(keras.layers, arguments.length, arguments.width, arguments.heads)
    model.name = "text_classifier"
    shared.train(model, *learn, arguments)
    results = {model.name: classification(model, *test)}
    shared.show(results)

    text = test[0][0] if not arguments.text else docstrings.numbers(arguments.text, known, arguments.length)
    attention = visualize.attention(model, text[None], tokens=[words_of(text, names)])
    print(f"\n{attention}")
    probabilities = model.predict(text[None], verbose=0)[0]
    print(f"\nThe text is of {docstrings.LIBRARIES[probabilities.argmax()]} with probability {probabilities.max():.2f}")

    layer = attention[0]
    print("\nMost attended words of it; all together receive 1")
    for word, weight in most_attended(layer, 0, 8):
        print(f"  {word:<20}{weight:.3f}")
    some = test[0][:100]
    over_all = visualize.attention(model, some, tokens=[words_of(numbers, names) for numbers in some])
    print(f"\nMost attended words of {len(some)} texts; 1 is what each would receive if all were alike")
    for word, weight in most_attended_of_all(over_all, 8):
        print(f"  {word:<20}{weight:.2f}")

    folder = pathlib.Path(arguments.folder)
    folder.mkdir(parents=True, exist_ok=True)
    title = f"Is it of {', '.join(docstrings.LIBRARIES)}?"
    visualize.viewer(attention, folder / "attention.html", title=title)
    visualize.plot_attention_weights(layer, title=title, crop=True, power=0.5).savefig(folder / "heads.png", dpi=120)
    visualize.plot_attention_over_text(layer, title=title, power=0.5).figure.savefig(folder / "words.png", dpi=120)
    print(f"\nTo look at: {', '.join(str(folder / name) for name in ('attention.html', 'heads.png', 'words.png'))}")
    return results


if __name__ == "__main__":
    main()
