"""The tests of whole models on JAX, without TensorFlow; this process has the other backend."""

from pathlib import Path

from children import pass_on_jax

# What KerasHub computes otherwise there, by the op of Keras: rows without keys, and Qwen's windows, which it forgets.
ALWAYS = ("test_rows_that_a_mask_of_the_users_empties",)
SHARE = "test_patched_process[Llama]", "test_converted_models_answer_as_stock_ones[Qwen 3]"
WHOLE = "test_converted_models_answer_as_stock_ones", "test_patched_process", "test_other_padding"


def test_jax(keras_hub, pytestconfig):
    file = Path(__file__).with_name("test_language_models.py")
    chosen = WHOLE if pytestconfig.getoption("whole") else SHARE
    pass_on_jax("-p", "optional_packages", "-W", "ignore", *(f"{file}::{test}" for test in ALWAYS + chosen))
