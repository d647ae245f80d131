"""KerasHub's `generate`, stock against `attn_ops.convert`: tokens per second, and the seconds of a prompt.

    python benchmarks/generation.py                                   # Llama and GPT-2 at 2048 positions, 1 thread
    python benchmarks/generation.py --models Llama --positions 512 4096 --xla

Four layers of width 512, 8 heads (Llama and Gemma: 2 for keys), one sequence, greedy, float32. Both write the same tokens. The
time of a token is that of a call that writes many less that of one that writes a single one, divided by how many more those are;
processor time, medians of interleaved rounds.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time

import numpy as np
from peers.base import set_threads

_SIZES = {"vocabulary_size": 1000, "num_layers": 4, "hidden_dim": 512, "intermediate_dim": 1024}
_GROUPS = {**_SIZES, "num_query_heads": 8, "num_key_value_heads": 2}
MODELS = {
    "GPT-2": ("GPT2", {**_SIZES, "num_heads": 8, "dropout": 0.0}),
    "Gemma": ("Gemma", {**_GROUPS, "head_dim": 64}),
    "Llama": ("Llama", _GROUPS),
}


def make(name, positions, xla):
    import keras
    import keras_hub

    prefix, arguments = MODELS[name]
    length = {"max_sequence_length": positions} if name == "GPT-2" else {}
    keras.utils.set_random_seed(0)
    backbone = getattr(keras_hub.models, f"{prefix}Backbone")(**arguments, **length)
    model = getattr(keras_hub.models, f"{prefix}CausalLM")(backbone=backbone, preprocessor=None)
    model.compile(sampler="greedy", jit_compile=xla)
    return model


def measure(name, positions, arguments):
    """By "stock" and "converted": (seconds of a token, seconds of the prompt)."""
    import attn_ops

    def prompt(new):
        tokens = np.random.default_rng(0).integers(1, 1000, (1, positions)).astype("int32")
        return {"token_ids": tokens, "padding_mask": (np.arange(positions)[None] < positions - new).astype("int32")}

    def seconds(model, new):
        begin = time.process_time()
        model.generate(prompt(new), stop_token_ids=None)
        return time.process_time() - begin

    models = {"stock": make(name, positions, arguments.xla)}
    models["converted"] = attn_ops.convert(make(name, positions, arguments.xla))
    written = [np.asarray(model.generate(prompt(arguments.tokens), stop_token_ids=None)["token_ids"]) for model in models.values()]
    np.testing.assert_array_equal(*written)
    times = {which: [] for which in models}
    for _ in range(arguments.rounds):
        for which, model in models.items():
            many, one = seconds(model, arguments.tokens), seconds(model, 1)
            times[which].append(((many - one) / (arguments.tokens - 1), one))
    return {which: [statistics.median(column) for column in zip(*rounds)] for which, rounds in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=("Llama", "GPT-2"), choices=MODELS)
    parser.add_argument("--positions", nargs="+", type=int, default=(2048,))
    parser.add_argument("--tokens", type=int, default=48, help="how many tokens are written")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--xla", action="store_true", help="with jit_compile=True")
    arguments = parser.parse_args()
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    set_threads(arguments.threads)
    print("| model | positions | stock, tokens/s | converted | stock, prompt, s | converted |\n|---|---:|---:|---:|---:|---:|")
    for name in arguments.models:
        for positions in arguments.positions:
            (token, prompt), (our_token, our_prompt) = measure(name, positions, arguments).values()
            print(f"| {name} | {positions} | {1 / token:.1f} | {1 / our_token:.1f} | {prompt:.2f} | {our_prompt:.2f} |", flush=True)


if __name__ == "__main__":
    main()
