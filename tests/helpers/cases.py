"""Random attention inputs, and the comparison of an implementation with the specification."""

import ml_dtypes
import numpy as np

from implementations import specification

DTYPES = {
    "float64": np.dtype("float64"),
    "float32": np.dtype("float32"),
    "float16": np.dtype("float16"),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
}
# Of the largest value. What the dtype itself costs is judged by test_attention_accuracy; this finds wrong features.
TOLERANCES = {"float64": 1e-12, "float32": 2e-5, "float16": 1e-2, "bfloat16": 8e-2}


def make_inputs(
    dtype="float32",
    batch=2,
    seqlen_q=13,
    seqlen_k=17,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    value_dim=None,
    layout="BSHD",
    seed=0,
):
    """(query, key, value, d_out, d_lse), normal; d_lse in the dtype of lse."""
    rng = np.random.default_rng([seed, batch, seqlen_q, seqlen_k, num_heads, head_dim])
    value_dim = head_dim if value_dim is None else value_dim

    def normal(seqlen, heads, dim):
        x = rng.standard_normal((batch, seqlen, heads, dim)).astype(DTYPES[dtype])
        return x if layout == "BSHD" else np.ascontiguousarray(x.swapaxes(1, 2))

    query, key = normal(seqlen_q, num_heads, head_dim), normal(seqlen_k, num_kv_heads, head_dim)
    value, d_out = normal(seqlen_k, num_kv_heads, value_dim), normal(seqlen_q, num_heads, value_dim)
    d_lse = rng.standard_normal((batch, num_heads, seqlen_q))
    return query, key, value, d_out, d_lse.astype("float64" if dtype == "float64" else "float32")


def assert_close(result, expected, tolerance, what):
    """Every array of ``result`` near that of ``expected``, relative to its largest value; inf and NaN in place."""
    assert [name for name, _ in result.items()] == [name for name, _ in expected.items()], what
    for (name, found), (_, wanted) in zip(result.items(), expected.items()):
        assert found.shape == wanted.shape, f"{what}: {name} has shape {found.shape}, expected {wanted.shape}"
        found = found.astype(np.float64)
        special = ~np.isfinite(wanted)
        np.testing.assert_array_equal(found[special], wanted[special], f"{what}: {name}, where not finite")
        if special.all():
            continue
        wanted = np.where(special, 0.0, wanted)
        found = np.where(special, 0.0, found)
        scale = max(np.abs(wanted).max(), 1e-30)
        error = np.abs(found - wanted).max() / scale
        assert error <= tolerance, f"{what}: {name} is off by {error:.2e} of its largest value {scale:.3g}"


def check(implementation, dtype="float32", with_d_lse=True, inputs=None, **arguments):
    """Runs ``implementation`` and the specification on the same inputs and compares; returns both results.

    ``arguments`` named like those of `make_inputs` shape the inputs, the others go to the attention.
    """
    shape = {}
    for name in ("batch", "seqlen_q", "seqlen_k", "num_heads", "num_kv_heads", "head_dim", "value_dim", "seed"):
        if name in arguments:
            shape[name] = arguments.pop(name)
    if inputs is None:
        inputs = make_inputs(dtype, layout=arguments.get("layout", "BSHD"), **shape)
    query, key, value, d_out, d_lse = inputs
    if not with_d_lse:
        d_lse = None
    result = implementation(query, key, value, d_out, d_lse, **arguments)
    expected = specification(query, key, value, d_out, d_lse, **arguments)
    assert result.out.dtype == query.dtype
    assert result.lse.dtype == np.dtype("float64" if dtype == "float64" else "float32")
    for name in ("dq", "dk", "dv"):
        assert getattr(result, name).dtype == query.dtype, name
    options = {name: f"array {x.shape}" if isinstance(x, np.ndarray) else x for name, x in arguments.items()}
    assert_close(result, expected, TOLERANCES[dtype], f"{implementation} {dtype} {shape} {options}")
    return result, expected
