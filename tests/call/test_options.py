"""The options of the attention functions: one list, which signatures, documentation and errors of all of them follow."""

import inspect

import jax  # noqa: F401  what the functions need: without, this file is left out (device_runs.py)
import pytest
import tensorflow as tf  # noqa: F401

import attn_ops
import attn_ops.jax

OPTIONS = {
    "bias": None,
    "mask": None,
    "scale": None,
    "is_causal": False,
    "causal_alignment": "top_left",
    "window": None,
    "query_seq_lengths": None,
    "key_value_seq_lengths": None,
    "dropout_rate": 0.0,
    "dropout_seed": None,
    "layout": "BSHD",
    "return_lse": False,
    "query_offset": None,
    "logits_soft_cap": None,
    "alibi_slopes": None,
    "relative_bias": None,
    "sinks": None,
}
OF_WEIGHTS = {k: v for k, v in OPTIONS.items() if k not in ("dropout_rate", "dropout_seed", "return_lse")}
OF_THE_REFERENCE = {k: v for k, v in OPTIONS.items() if k != "return_lse"}
OWN = {"implementation": None}
FUNCTIONS = {
    "attn_ops.scaled_dot_product_attention": (attn_ops.scaled_dot_product_attention, OPTIONS | OWN),
    "attn_ops.attention_weights": (attn_ops.attention_weights, OF_WEIGHTS | {"lse": None} | OWN),
    "attn_ops.explain": (attn_ops.explain, OPTIONS | OWN),
    "attn_ops.can_use_fused": (attn_ops.can_use_fused, OPTIONS),
    "attn_ops.jax.scaled_dot_product_attention": (attn_ops.jax.scaled_dot_product_attention, OPTIONS | OWN),
    "attn_ops.jax.attention_weights": (attn_ops.jax.attention_weights, OF_WEIGHTS | {"lse": None} | OWN),
    "attn_ops.jax.explain": (attn_ops.jax.explain, OPTIONS | OWN),
    "attn_ops.reference.attention": (attn_ops.reference.attention, OF_THE_REFERENCE),
    "attn_ops.reference.attention_weights": (attn_ops.reference.attention_weights, OF_WEIGHTS),
    "attn_ops.reference.attention_gradients": (attn_ops.reference.attention_gradients, OF_THE_REFERENCE),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_signatures_spell_the_options_out(name):
    function, options = FUNCTIONS[name]
    parameters = inspect.signature(function).parameters.values()
    assert {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY} == options
    assert [p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD][:2] == ["query", "key"]
    assert not [p for p in parameters if p.kind is p.VAR_KEYWORD]


@pytest.mark.parametrize("name", [name for name in FUNCTIONS if name.endswith("scaled_dot_product_attention")])
def test_the_documentation_tells_of_every_option(name):
    function, options = FUNCTIONS[name]
    lines = function.__doc__.splitlines()
    for option in options:
        [at] = [i for i, line in enumerate(lines) if line.startswith(f"    {option}: ")]
        assert at > lines.index("Args:") and at < lines.index("Returns:")
    last = "        seqlen_q: a mask [batch, seqlen_k] of the keys goes through `attn_ops.masks.key_padding`."
    assert last in lines  # whole, not its first line
    assert "{options}" not in function.__doc__


@pytest.mark.parametrize("name", FUNCTIONS)
def test_another_option_is_an_error_that_names_the_function(name):
    function, _ = FUNCTIONS[name]
    with pytest.raises(TypeError, match=rf"{function.__name__}: .*'attn_mask'; here it is mask="):
        function(None, None, None, attn_mask=None) if "weights" not in name else function(None, None, attn_mask=None)
