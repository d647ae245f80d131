"""Which implementation runs, what the user is told about it, and how to force one."""

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf

import attn_ops
from attn_ops import kernels, masks, scaled_dot_product_attention
from attn_ops.tensorflow import attention, composite, gpu
from cases import make_inputs


def tensors(**sizes):
    return [tf.constant(x) for x in make_inputs("float32", **sizes)[:3]]


@pytest.fixture
def without_library(monkeypatch):
    monkeypatch.setattr(kernels, "unavailable_reason", lambda: "the library is hidden by a test")


@pytest.fixture
def ran(monkeypatch):
    """The names of the implementations that ran."""
    names = []
    for name, function in list(attention._RUN.items()):
        monkeypatch.setitem(attention._RUN, name, lambda call, n=name, f=function: (names.append(n), f(call))[1])
    return names


def test_automatic_choice_is_fused(ran):
    scaled_dot_product_attention(*tensors())
    tf.function(scaled_dot_product_attention)(*tensors())
    tf.function(scaled_dot_product_attention, jit_compile=True)(*tensors())
    assert ran == ["fused", "fused", "fused"]
    explanation = attn_ops.explain(*tensors())
    assert explanation.implementation == "fused" and explanation.reasons == ()
    assert str(explanation) == "implementation: fused (op)"
    support = attn_ops.can_use_fused(*tensors())
    assert support and support.ok and support.reasons == ()


def test_without_library_the_composite_runs_and_says_why(ran, without_library):
    scaled_dot_product_attention(*tensors())
    assert ran == ["composite"]
    explanation = attn_ops.explain(*tensors(), is_causal=True, mask=masks.causal())
    assert explanation.implementation == "composite"
    assert explanation.reasons == ("the library is hidden by a test",)
    assert "not fused, because:\n  - the library is hidden by a test" in str(explanation)
    support = attn_ops.can_use_fused(*tensors())
    assert not support and support.reasons == explanation.reasons


def test_forced_fused_raises_with_all_reasons(without_library, monkeypatch):
    monkeypatch.setattr(gpu, "unsupported_reasons", lambda call, forced: ["a GPU is in use"])
    with pytest.raises(ValueError, match="'fused' cannot run: the library is hidden by a test; .*GPU"):
        scaled_dot_product_attention(*tensors(), implementation="fused")


def test_forced_fused_where_xla_takes_no_custom_call(monkeypatch):
    monkeypatch.setattr(kernels, "xla_unavailable_reason", lambda: "it is hidden by a test")

    @tf.function(jit_compile=True)
    def function(*inputs):
        explanation = attn_ops.explain(*inputs)
        assert explanation.implementation == "composite"
        return scaled_dot_product_attention(*inputs, implementation="fused")

    with pytest.raises(ValueError, match=r"'fused' cannot run: the call is traced for XLA \(jit_compile=True\), and it is"):
        function(*tensors())


def test_every_implementation_can_be_forced(ran):
    results = [scaled_dot_product_attention(*tensors(), implementation=n) for n in ("fused", "composite", "reference")]
    assert ran == ["fused", "composite", "reference"]
    for result in results[1:]:
        np.testing.assert_allclose(result, results[0], rtol=1e-5, atol=1e-6)


def test_explain_tells_what_a_forced_one_would_do():
    assert attn_ops.explain(*tensors(), implementation="reference").implementation == "reference"
    with pytest.raises(ValueError, match="explain: implementation must be None or one of 'fused'"):
        attn_ops.explain(*tensors(), implementation="flash")


def test_explain_takes_specifications():
    spec = tf.TensorSpec([None, 2**17, 64, 128], tf.bfloat16)
    assert attn_ops.explain(spec, spec, spec, is_causal=True).implementation == "fused"
    assert attn_ops.can_use_fused(spec, tf.zeros([1, 3, 8, 128], tf.bfloat16), tf.zeros([1, 3, 8, 128], tf.bfloat16))
    with pytest.raises(ValueError, match="explain: query and key must have the same head_dim, got 128, 64"):
        attn_ops.explain(spec, tf.TensorSpec([None, None, 64, 64], tf.bfloat16), spec)


def test_long_sequences_of_the_composite_are_chunked(monkeypatch, without_library):
    monkeypatch.setattr(composite, "UNCHUNKED_SCORES", 100)
    monkeypatch.setattr(composite, "CHUNK_SCORES", 50)
    inputs = tensors()
    out = scaled_dot_product_attention(*inputs, is_causal=True)
    expected, _ = attn_ops.reference.attention(*[x.numpy() for x in inputs], is_causal=True)
    np.testing.assert_allclose(out, expected, rtol=1e-5, atol=1e-6)


def run(code, *arguments, **environment):
    return subprocess.run(
        [sys.executable, *arguments, *(["-c", code] if code else [])],
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
        cwd=os.path.dirname(os.path.dirname(attn_ops.__file__)),
    )


def test_environment_switches_the_fused_op_off():
    code = (
        "import attn_ops, tensorflow as tf\n"
        "print(attn_ops.explain(*[tf.zeros([1, 2, 3, 4])] * 3))\n"
        "attn_ops.scaled_dot_product_attention(*[tf.zeros([1, 2, 3, 4])] * 3)\n"
    )
    result = run(code, ATTN_OPS_DISABLE="1")
    assert result.returncode == 0, result.stderr
    assert "implementation: composite" in result.stdout and "ATTN_OPS_DISABLE" in result.stdout


WITHOUT_TENSORFLOW = """
import sys

class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("tensorflow", "keras"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Missing())
import attn_ops
"""


def test_import_without_tensorflow():
    code = """
import numpy as np
assert "scaled_dot_product_attention" in dir(attn_ops)
x = np.ones((1, 2, 3, 4), np.float32)
assert attn_ops.reference.attention(x, x, x)[0].shape == x.shape
assert attn_ops.masks.causal().materialize(2, 2).shape == (1, 1, 2, 2)
from attn_ops import _core
assert _core.forward(x, x, x)[0].shape == x.shape
for name in ("scaled_dot_product_attention", "attention_weights", "explain", "can_use_fused", "layers", "patch"):
    try:
        getattr(attn_ops, name)
    except ImportError as error:
        assert f"attn_ops.{name} needs TensorFlow" in str(error) and "pip install tensorflow keras" in str(error)
    else:
        raise SystemExit(f"{name} came without TensorFlow")
assert "tensorflow" not in sys.modules
"""
    result = run(WITHOUT_TENSORFLOW + code)
    assert result.returncode == 0, result.stderr


def test_import_does_not_load_tensorflow():
    result = run("import attn_ops, sys; assert attn_ops.__version__ and 'tensorflow' not in sys.modules")
    assert result.returncode == 0, result.stderr


def test_dir_is_what_is_public():
    assert dir(attn_ops) == sorted(attn_ops.__all__)


def test_the_kernels_for_numpy_are_an_attribute():
    result = run("import attn_ops; print(attn_ops._core.isas())")
    assert result.returncode == 0 and "generic" in result.stdout, result.stderr
    without = "import sys, attn_ops; sys.modules['attn_ops._core'] = None; attn_ops._core"
    result = run(without)
    assert "ImportError: attn_ops._core cannot be imported" in result.stderr
    assert "in a checkout, pip install ." in result.stderr


@pytest.mark.parametrize("framework", ["tensorflow", "jax"])
def test_a_misspelt_instruction_set_is_a_reason(framework):
    """Not the fused op, and not an error before anybody asked for it."""
    code = {
        "tensorflow": "import attn_ops as a, numpy as np; x = np.ones((1, 3, 2, 8), 'float32')\n",
        "jax": "import attn_ops.jax as a, numpy as np; x = np.ones((1, 3, 2, 8), 'float32')\n",
    }[framework] + "print(a.explain(x, x, x)); print(float(a.scaled_dot_product_attention(x, x, x)[0, 0, 0, 0]))"
    result = run(code, ATTN_OPS_ISA="sse9")
    assert result.returncode == 0, result.stderr
    assert "implementation: composite" in result.stdout and result.stdout.endswith("1.0\n")
    usable = ", ".join(kernels.core().isas())
    assert f"ATTN_OPS_ISA ('sse9') must name an instruction set that is usable here: {usable}" in result.stdout
    good = run(code, ATTN_OPS_ISA="generic")
    assert "implementation: fused" in good.stdout


def test_command_info_shows_a_misspelt_instruction_set():
    result = run(None, "-m", "attn_ops", "info", ATTN_OPS_ISA="sse9")
    assert "default: the environment variable ATTN_OPS_ISA ('sse9') must name" in result.stdout


def test_messages_name_commands_that_work():
    """This package is in no index: what to install is a framework, or a checkout."""
    package = Path(attn_ops.__file__).parent
    named = [
        (path.name, command)
        for path in package.rglob("*.py")
        for command in re.findall(r"pip install ([^\n`;]*)", path.read_text())
    ]
    assert named
    assert not [(name, command) for name, command in named if "attn_ops" in command or "attn-ops" in command]


def test_unknown_name():
    with pytest.raises(AttributeError, match="no attribute 'flash'"):
        attn_ops.flash  # noqa: B018


@pytest.mark.parametrize("name", attn_ops.__all__)
def test_public_names_load(name):
    assert getattr(attn_ops, name) is not None
    assert name in dir(attn_ops)


def test_command_info():
    result = run(None, "-m", "attn_ops", "info")
    assert result.returncode == 0, result.stderr
    for line in (f"attn_ops: {attn_ops.__version__}", f"tensorflow: {tf.__version__}", "tensorflow op: available"):
        assert line in result.stdout
    assert "default: " in result.stdout and "generic" in result.stdout and "ATTN_OPS_DISABLE: not set" in result.stdout


def test_command_info_without_tensorflow():
    result = run(WITHOUT_TENSORFLOW + "from attn_ops.__main__ import main\nsys.exit(main(['info', '--json']))")
    assert result.returncode == 0, result.stderr
    assert "pip install" in result.stdout


def test_command_explain(capsys):
    from attn_ops.cli.app import main

    assert main(["explain", "1,?,8,64", "1,?,2,64", "--is-causal", "--dtype", "bfloat16"]) == 0
    assert capsys.readouterr().out == "implementation: fused (op)\n"
    assert main(["explain", "1,5,6,64", "1,5,4,64"]) == 1
    assert "num_heads (6) must be a multiple of num_kv_heads (4)" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["explain", "1xfive"])
    assert "is no shape" in capsys.readouterr().err


def test_command_selftest(capsys):
    from attn_ops.cli.app import main

    assert main(["selftest"]) == 0
    printed = capsys.readouterr().out
    assert "WRONG" not in printed and printed.endswith("all right\n")
    assert all(name in printed for name in ("kernels generic", "composite", "fused op"))


def test_selftest_finds_a_wrong_implementation(monkeypatch, capsys):
    from attn_ops.cli import selftest

    monkeypatch.setattr(selftest, "_implementations", lambda: [("broken", lambda q, k, v, d, o: [d, q, k, v], None)])
    assert selftest.run() == 1
    assert "WRONG" in capsys.readouterr().out


def test_command_bench_outside_of_a_checkout(monkeypatch, capsys, tmp_path):
    from attn_ops.cli import app

    monkeypatch.setattr(app, "__file__", str(tmp_path / "attn_ops" / "__main__.py"))
    assert app.main(["bench"]) == 2
    assert "from a checkout" in capsys.readouterr().err


def test_command_bench_gives_its_arguments_to_pytest(monkeypatch):
    from attn_ops.cli.app import main

    seen = []
    monkeypatch.setattr(pytest, "main", lambda arguments: seen.extend(arguments) or 0)
    assert main(["bench", "-k", "decode", "--benchmark-json=x.json"]) == 0
    assert seen[0].endswith("benchmarks") and seen[1:] == ["-k", "decode", "--benchmark-json=x.json"]
