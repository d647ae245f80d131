"""The layers on other backends of Keras than TensorFlow, which is that of this process."""

from pathlib import Path

from children import pass_on_jax, run


def test_jax(pytestconfig):
    share = [] if pytestconfig.getoption("whole") else ["-p", "shares"]
    pass_on_jax(Path(__file__).with_name("on_jax.py"), *share)


def test_other_backends_are_refused():
    process = run("import attn_ops; attn_ops.layers", without=(), KERAS_BACKEND="numpy")
    assert process.returncode
    assert "attn_ops.layers needs Keras on the tensorflow or the jax backend, not on 'numpy'" in process.stderr
