"""Texts with labels that are there wherever the examples run: documentation strings of four Python libraries.

The question that is asked of a text is whose it is. The libraries' own names are taken out, as they would tell.
"""

from __future__ import annotations

import collections
import importlib.util
import pathlib
import re

import numpy as np

LIBRARIES = ("keras", "matplotlib", "numpy", "sklearn")
_NAMES = re.compile(r"\b(keras|tensorflow|tf|matplotlib|mpl|plt|pyplot|numpy|np|sklearn|scikit|learn)\b", re.IGNORECASE)
_WORD = re.compile(r"[a-z]+|\d+|[^\sa-z\d]")


def load(per_library: int, seed: int) -> tuple[list[str], np.ndarray]:
    """So many texts of 30 words or more of each library, shuffled, and the number of the library of each."""
    random = np.random.default_rng(seed)
    found = []
    for label, library in enumerate(LIBRARIES):
        root = pathlib.Path(importlib.util.find_spec(library).origin).parent
        files = [path for path in sorted(root.rglob("*.py")) if "test" not in str(path.relative_to(root))]
        texts = (text for path in files for text in strings(path.read_text("utf-8", "ignore")))
        texts = sorted({_NAMES.sub(" ", text) for text in texts if len(text.split()) >= 30})
        found += [(texts[i], label) for i in random.permutation(len(texts))[:per_library]]
    order = random.permutation(len(found))
    return [found[i][0] for i in order], np.array([found[i][1] for i in order])


def strings(source: str) -> list[str]:
    """The documentation strings of Python code: those that begin a line."""
    parts = source.split('"""')
    return [text for before, text in zip(parts[::2], parts[1::2]) if before.rpartition("\n")[2].strip() in ("", "r")]


def words(text: str) -> list[str]:
    """Words, numbers and signs, one by one."""
    return _WORD.findall(text.lower())


def sentences(text: str) -> list[str]:
    """What ends with a stop, a colon or a blank line."""
    return [part for part in re.split(r"(?<=[.:])\s+|\n\s*\n", text) if part.strip()]


def vocabulary(texts: list[str], size: int) -> dict[str, int]:
    """The most frequent words, by number; 0 is left for padding and 1 for all other words."""
    counts = collections.Counter(word for text in texts for word in words(text))
    return {word: number for number, (word, _) in enumerate(counts.most_common(size - 2), 2)}


def numbers(text: str, known: dict[str, int], length: int) -> np.ndarray:
    """`[length]`: the numbers of its first words, then zeros."""
    found = [known.get(word, 1) for word in words(text)[:length]]
    return np.array(found + [0] * (length - len(found)), np.int32)
