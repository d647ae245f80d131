"""Whole models of KerasHub, stock against `attn_ops.convert`: time of a forward call and of a training step, and memory.

    python benchmarks/models.py                                    # 8 models at 512 and 2048 tokens, 1 thread
    python benchmarks/models.py --models Llama GPT-2 --tokens 128 512 1024 2048 4096 --threads 2 --xla

Two layers of width 512, 8 heads of 64 (2 for keys where they are grouped), one sequence, float32. Stock and converted models
have the same weights, take turns in the rounds of one process, and must agree. Times are the medians of the processors' own,
memory is the growth of the resident set in the first call of a fresh process: both as stock / converted.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys

import numpy as np
from attn_ops.cli import interleave, peak_memory
from peers.base import set_threads

_SIZES = {"vocabulary_size": 1000, "num_layers": 2, "hidden_dim": 512, "intermediate_dim": 2048}
_HEADS = {**_SIZES, "num_heads": 8, "dropout": 0.0}
_GROUPS = {**_SIZES, "num_query_heads": 8, "num_key_value_heads": 2}
_GEMMA = {**_GROUPS, "head_dim": 64}
MODELS = {
    "ALBERT": ("AlbertBackbone", {**_HEADS, "embedding_dim": 128}),
    "BERT": ("BertBackbone", _HEADS),
    "BLOOM": ("BloomBackbone", _HEADS),
    "GPT-2": ("GPT2Backbone", _HEADS),
    "GPT-NeoX": ("GPTNeoXBackbone", _HEADS),
    "Gemma": ("GemmaBackbone", _GEMMA),
    "Gemma 2": (
        "GemmaBackbone",
        {**_GEMMA, "attention_logit_soft_cap": 50, "use_sliding_window_attention": True, "sliding_window_size": 512},
    ),
    "Llama": ("LlamaBackbone", _GROUPS),
    "Mistral": ("MistralBackbone", {**_GROUPS, "sliding_window": 512}),
    "Qwen 3": ("Qwen3Backbone", {**_GEMMA, "sliding_window_size": None}),
    "Falcon": (
        "FalconBackbone",
        {**_SIZES, "num_attention_heads": 8, "attention_dropout_rate": 0.0, "feedforward_dropout_rate": 0.0},
    ),
    "T5": ("T5Backbone", {**_HEADS, "key_value_dim": 64}),
}
_DEFAULT = ("BERT", "GPT-2", "Llama", "Mistral", "Gemma 2", "Qwen 3", "BLOOM", "T5")
_LEARNED_POSITIONS = ("ALBERT", "BERT", "BLOOM", "GPT-2", "GPT-NeoX")
_GROWTH = "growth_bytes="


def make(name, tokens):
    import keras
    import keras_hub

    cls, arguments = MODELS[name]
    length = {"max_sequence_length": tokens} if name in _LEARNED_POSITIONS else {}
    keras.utils.set_random_seed(0)
    return getattr(keras_hub.models, cls)(**arguments, **length)


def step(model, tokens, training, xla):
    """A forward call, or one with all gradients, as a traced function of nothing."""
    import tensorflow as tf

    rng = np.random.default_rng(0)
    inputs = {}
    for name in model.input:
        values = rng.integers(1, 1000, (1, tokens)) if "token" in name else np.full((1, tokens), int("padding" in name))
        inputs[name] = tf.constant(values.astype("int32"))
    weights = [weight.value for weight in model.trainable_weights]

    def output(training):
        out = model(inputs, training=training)
        return out if not isinstance(out, dict) else out.get("sequence_output", out.get("decoder_sequence_output"))

    def train():
        with tf.GradientTape() as tape:
            loss = tf.reduce_mean(tf.square(output(True)))
        return loss, tape.gradient(loss, weights)

    function = train if training else lambda: output(False)
    return tf.function(function, jit_compile=xla, autograph=False).get_concrete_function()


def times(name, tokens, training, arguments):
    """Stock time / converted time."""
    import attn_ops

    steps = {"stock": step(make(name, tokens), tokens, training, arguments.xla)}
    steps["converted"] = step(attn_ops.convert(make(name, tokens)), tokens, training, arguments.xla)
    results = [np.asarray(function()[0]) for function in steps.values()]
    np.testing.assert_allclose(results[1], results[0], rtol=1e-3, atol=1e-3)
    samples, _, _ = interleave.run(steps, arguments.rounds, arguments.seconds)
    return samples["stock"].median("cpu") / samples["converted"].median("cpu")


def growth(name, tokens, training, converted, arguments):
    """Megabytes that the first call of a fresh process takes."""
    child = [name, str(tokens), str(int(training)), str(int(converted)), str(int(arguments.xla))]
    command = [sys.executable, __file__, "--threads", str(arguments.threads), "--child", *child]
    done = subprocess.run(command, capture_output=True, text=True)
    lines = [line for line in done.stdout.splitlines() if line.startswith(_GROWTH)]
    if not lines:
        raise RuntimeError(f"{child} ended with status {done.returncode}: {done.stderr[-2000:]}")
    return int(lines[0].removeprefix(_GROWTH)) / 1e6


def _measure_growth(name, tokens, training, converted, xla):
    import attn_ops

    tokens, training, converted, xla = map(int, (tokens, training, converted, xla))
    model = make(name, tokens)
    if converted:
        attn_ops.convert(model)
    step(model, 64, training, xla)()
    function = step(model, tokens, training, xla)
    print(f"{_GROWTH}{peak_memory.growth(function)}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=_DEFAULT, choices=MODELS)
    parser.add_argument("--tokens", nargs="+", type=int, default=(512, 2048))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--seconds", type=float, default=60, help="no new round of a comparison is begun after this time")
    parser.add_argument("--xla", action="store_true", help="with jit_compile=True")
    left_out = parser.add_mutually_exclusive_group()
    left_out.add_argument("--no-memory", action="store_true")
    left_out.add_argument("--no-times", action="store_true", help="memory alone, which other work on the machine leaves as it is")
    parser.add_argument("--child", nargs=5, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    set_threads(arguments.threads)
    if arguments.child:
        _measure_growth(*arguments.child)
        return
    measured = [f"{tokens} {mode}" for tokens in arguments.tokens for mode in ("forward", "training")]
    columns = [] if arguments.no_times else measured
    memory = [] if arguments.no_memory else [f"MB, {column}" for column in measured]
    print(f"| model | {' | '.join([*columns, *memory])} |\n|---|{'---:|' * len([*columns, *memory])}", flush=True)
    for name in arguments.models:
        cases = [(tokens, training) for tokens in arguments.tokens for training in (False, True)]
        cells = [f"{times(name, *case, arguments):.2f}" for case in cases if columns]
        for case in cases if memory else ():
            stock, ours = (growth(name, *case, converted, arguments) for converted in (False, True))
            cells.append(f"{stock:.0f} → {ours:.0f}")
        print(f"| {name} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
