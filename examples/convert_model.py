#!/usr/bin/env python3
# %% [markdown]
"""Takes a model of stock Keras layers from its file, converts it, goes on training it, and gives it back to Keras.

    python examples/convert_model.py                       # about a minute

The model is the vision transformer of vision_transformer.py, of `keras.layers` alone. `attn_ops.convert` exchanges
how its attention layers compute, in place: weights, names, optimizer and file stay what they are, and so do
predictions, up to rounding. `attn_ops.revert` takes it back.
"""

# %%
from __future__ import annotations

import pathlib
import tempfile

import attn_ops
import keras
import numpy as np
import shared
from sequence_classification import classification, step_times
from vision_transformer import build_model, load


# %% A model in a file, as somebody else has made it
def train_and_save(learn, arguments, path: pathlib.Path) -> None:
    keras.utils.set_random_seed(arguments.seed)
    model = build_model(keras.layers, learn[0].shape[1], arguments.width, arguments.heads, arguments.layers)
    model.name = "stock_keras"
    shared.train(model, *learn, arguments)
    model.save(path)


# %% Converted
def main(argv=None) -> dict[str, dict[str, float]]:
    parser = shared.parser(__doc__, epochs=8, batch_size=64, width=48, heads=4, layers=2)
    arguments = shared.parse(parser, argv, epochs=1, layers=1)
    learn, test = load(arguments.seed)
    with tempfile.TemporaryDirectory() as directory:
        path = pathlib.Path(directory) / "model.keras"
        train_and_save(learn, arguments, path)
        stock, ours = (keras.models.load_model(path, custom_objects={"Positions": shared.Positions}) for _ in range(2))
        before = attn_ops.explain(ours)
        attn_ops.convert(ours)
        ours.name = "converted"
        print(f"\n{before}\n\n{attn_ops.explain(ours)}")
        results = {model.name: classification(model, *test) for model in (stock, ours)}
        batch = [array[: arguments.batch_size] for array in learn]
        times = step_times((stock, ours), *batch, 3 if arguments.quick else 20)
        for model, time in zip((stock, ours), times, strict=True):
            results[model.name]["training step, ms"] = 1e3 * time
        shared.train(ours, *learn, arguments)  # with the state of its optimizer
        results["trained on"] = classification(ours, *test)
        shared.show(results)

        wanted = ours.predict(test[0], verbose=0)
        attn_ops.revert(ours)
        ours.save(path)
        back = keras.models.load_model(path, custom_objects={"Positions": shared.Positions})
        difference = float(np.abs(back.predict(test[0], verbose=0) - wanted).max())
    print(f"Reverted, saved and loaded, with stock layers alone: predictions differ by {difference:.1e}")
    results["reverted"] = {"difference": difference}
    return results


if __name__ == "__main__":
    main()
