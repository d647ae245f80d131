"""`attn-ops`, which is `python -m attn_ops`: what commands print, with which exit status, and where."""

import importlib
import json
import re
from pathlib import Path

import keras
import pytest
import tensorflow as tf

import attn_ops
from attn_ops import kernels
from attn_ops.cli import bench, checkout, frameworks, info, selftest
from attn_ops.cli.app import _COMMANDS, cli, main
from children import WITHOUT_TENSORFLOW, command, run

MAIN = "from attn_ops.__main__ import main\nsys.exit(main({}))"


def test_the_console_script_is_the_module():
    project = (Path(__file__).parents[2] / "pyproject.toml").read_text()
    module, _, function = re.search(r'^attn-ops = "(.*)"$', project, re.MULTILINE).group(1).partition(":")
    assert getattr(importlib.import_module(module), function)(["--version"]) == 0
    assert re.search(r'^dependencies = \["click>=8', project, re.MULTILINE)


def test_version(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"attn_ops {attn_ops.__version__}\n"


def test_a_bare_call_is_help(capsys):
    assert main([]) == 0
    bare = capsys.readouterr().out
    assert main(["--help"]) == 0
    assert capsys.readouterr().out == bare
    for name in ("bench", "completion", "explain", "info", "matrix", "selftest"):
        assert re.search(rf"^  {name} +\S.*[^.]\.$", bare, re.MULTILINE), name  # with a line that is not cut off
    assert re.findall(r"^ +(\d+)  +\S", bare, re.MULTILINE) == ["0", "1", "2", "3", "130"]


@pytest.mark.parametrize("name", _COMMANDS)
def test_help_has_the_first_line_of_each_command(name):
    assert _COMMANDS[name] == importlib.import_module(f"attn_ops.cli.{name}").command.help.partition("\n")[0]


def test_help_loads_no_command():
    result = run("import sys\nfrom attn_ops.cli.app import main\nmain([])\nprint(*sys.modules)")
    assert result.returncode == 0 and "numpy" not in result.stdout.split(), result.stderr


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["nope"], "No such command 'nope'"),
        (["explain"], "Missing argument 'QUERY'"),
        (["explain", "1xfive"], "is no shape such as 1,2048,12,64"),
        (["explain", "1,2,3,4", "--layout", "SBHD"], "is not one of 'BSHD', 'BHSD'"),
        (["explain", "1,-2,3,4"], "dimensions must be from 0"),
        (["explain", "1,2,3,4", "--dtype", "int32"], "is not one of 'float32'"),
        (["explain", "1,2,3,4", "--convert"], "--convert does not go with shapes"),
        (["explain", "a.keras", "--is-causal"], "--is-causal does not go with the file of a model"),
        (["explain", "a.keras", "1,2,3,4"], "KEY does not go with the file of a model"),
        (["bench", "--report", ""], "--report must name a directory"),
        (["bench", "--quick", "--report="], "--report must name a directory"),
        (["bench", "-k", "decode"], "No such option '-k'"),
        (["bench", "--threads", "0"], "0 is not in the range"),
        (["bench", "--device", "tpu"], "--device must be cpu or cuda, got 'tpu'"),
        (["completion", "csh"], "is not one of 'bash', 'zsh', 'fish'"),
    ],
)
def test_a_wrong_command_line_has_status_2(arguments, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    printed = capsys.readouterr()
    assert stopped.value.code == 2 and message.lower() in printed.err.lower() and printed.out == ""


def test_interrupted(monkeypatch, capsys):
    def interrupt(as_json):
        raise KeyboardInterrupt

    monkeypatch.setattr(info, "show", interrupt)
    assert main(["info"]) == 130
    assert capsys.readouterr().err.strip() == "interrupted"


def test_only_commands_need_click():
    package = Path(attn_ops.__file__).parent
    users = {
        path for path in package.rglob("*.py") if re.search(r"^ *(import|from) click\b", path.read_text(), re.MULTILINE)
    }
    assert users and {path.parent for path in users} == {package / "cli"}
    without = run(WITHOUT_TENSORFLOW + MAIN.format("['info']"), without=("click",))
    assert without.returncode == 2, without.stderr
    assert "the command line needs click" in without.stderr and "pip install click" in without.stderr


def test_a_command_without_its_framework_has_status_2(monkeypatch, capsys):
    def missing():
        raise frameworks.Missing("this command needs TensorFlow")

    monkeypatch.setattr(frameworks, "tensorflow", missing)
    with pytest.raises(SystemExit) as stopped:
        main(["explain", "1,5,4,64"])
    assert stopped.value.code == 2 and "needs TensorFlow" in capsys.readouterr().err


# --------------------------------------------------------------------------------------------------------------- info


def test_info_shows_a_misspelt_instruction_set():
    result = run(WITHOUT_TENSORFLOW + MAIN.format("['info']"), ATTN_OPS_ISA="sse9")
    assert result.returncode == 0, result.stderr
    assert "default: the environment variable ATTN_OPS_ISA ('sse9') must name" in result.stdout


def test_info_without_notes_of_frameworks(monkeypatch):
    monkeypatch.delenv("TF_CPP_MIN_LOG_LEVEL", raising=False)
    result = command("info")
    assert (result.returncode, result.stderr) == (0, "")
    for line in (f"attn_ops: {attn_ops.__version__}", f"tensorflow: {tf.__version__}", "tensorflow op: available"):
        assert line in result.stdout
    assert "default: " in result.stdout and "generic" in result.stdout and "ATTN_OPS_DISABLE: not set" in result.stdout


def test_info_without_tensorflow():
    result = run(WITHOUT_TENSORFLOW + MAIN.format("['info', '--json']"))
    assert result.returncode == 0, result.stderr
    assert "pip install" in json.loads(result.stdout)["tensorflow op"]


WITH_JAX_ALONE = WITHOUT_TENSORFLOW.replace('("tensorflow", "keras")', '("tensorflow",)') + """
import os
os.environ.pop("KERAS_BACKEND", None)
try:
    attn_ops.layers
except ImportError as error:
    assert "needs TensorFlow" in str(error) and "or set KERAS_BACKEND=jax for Keras on JAX" in str(error), error
else:
    raise AssertionError("the backend of Keras is not TensorFlow")
for name in [name for name in sys.modules if name.partition(".")[0] == "keras"]:
    del sys.modules[name]
from attn_ops.cli.app import main
assert main(["explain", "1,5,4,64", "--is-causal", "--json"]) == 0
assert main(["explain", "1,?,4,64"]) == 1
assert main(["explain", sys.argv[1], "--convert"]) == 0
assert main(["selftest"]) == 0
import keras, numpy
assert keras.backend.backend() == "jax"
x = numpy.ones((1, 4, 2, 8), "float32")
assert attn_ops.explain(x, x, x).form == "xla"
for name, remedy in (("can_use_fused", "keras"), ("varlen_attention", "on JAX it is attn_ops.jax.varlen_attention")):
    try:
        getattr(attn_ops, name)
    except ImportError as error:
        assert "pip install tensorflow" in str(error) and str(error).endswith(remedy), error
    else:
        raise AssertionError(name)
"""


def test_commands_on_jax_alone(tmp_path):
    x = keras.Input((5, 8))
    keras.Model(x, keras.layers.MultiHeadAttention(2, 4, name="heads")(x, x)).save(tmp_path / "model.keras")
    result = run(WITH_JAX_ALONE, str(tmp_path / "model.keras"), without=())
    assert result.returncode == 0, result.stderr
    assert '"form": "xla"' in result.stdout and "JAX has no unknown dimensions: query has one" in result.stderr
    assert re.search(r"^heads +MultiHeadAttention +2( +fused){4} +composite$", result.stdout, re.MULTILINE)
    assert re.search(r"^JAX .* ok$", result.stdout, re.MULTILINE) and "all right" in result.stdout


# ------------------------------------------------------------------------------------------------------------ explain


def by_context(printed):
    """The rows of the table, by their first cell."""
    head, *rows = printed.splitlines()
    assert head.split() == ["context", "device", "implementation", "reason"]
    at = [head.index(name) for name in head.split()]
    cells = [[row[a:b].strip() for a, b in zip(at, [*at[1:], None])] for row in rows]
    return {first: rest for first, *rest in cells}


def test_explain_tells_each_context(capsys):
    assert main(["explain", "1,?,8,64", "1,?,2,64", "--is-causal", "--dtype", "bfloat16"]) == 0
    rows = by_context(capsys.readouterr().out)
    assert rows.pop("export")[:2] == ["any", "composite"]
    assert rows == {
        "eager": ["cpu", "fused (op)", ""],
        "graph": ["cpu", "fused (op or xla)", ""],
        "XLA": ["cpu", "fused (xla)", ""],
    }


def test_explain_tells_reasons(monkeypatch, capsys):
    monkeypatch.setattr(kernels, "unavailable_reason", lambda: "it is gone")
    assert main(["explain", "1,5,4,64", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert [*told] == ["eager", "graph", "XLA", "export"]
    for context in told.values():
        assert context["implementation"] == "composite" and "it is gone" in context["reasons"]


def test_explain_tells_where_a_choice_is_refused(capsys):
    assert main(["explain", "1,5,4,64", "--implementation", "reference"]) == 0
    rows = by_context(capsys.readouterr().out)
    assert rows["eager"][1] == "reference" and rows["XLA"][1] == "none" and "XLA cannot compile" in rows["XLA"][2]


def test_explain_of_what_no_call_can_be_has_status_1(capsys):
    assert main(["explain", "1,5,6,64", "1,5,4,64"]) == 1
    assert "num_heads (6) must be a multiple of num_kv_heads (4)" in capsys.readouterr().err


def test_explain_a_model(capsys, tmp_path):
    x = keras.Input((5, 8))
    model = keras.Model(x, keras.layers.MultiHeadAttention(2, 4, name="heads")(x, x))
    model.save(tmp_path / "model.keras")
    assert main(["explain", str(tmp_path / "model.keras")]) == 0
    assert "remedy: attn_ops.convert(model)" in capsys.readouterr().out
    assert main(["explain", str(tmp_path / "model.keras"), "--convert", "--json"]) == 0
    [layer] = json.loads(capsys.readouterr().out)["layers"]
    assert (layer["layer"], layer["eager"], layer["xla"], layer["export"]) == ("heads", "fused", "fused", "composite")
    assert main(["explain", str(tmp_path / "none.keras")]) == 1
    assert "cannot load" in capsys.readouterr().err


# ----------------------------------------------------------------------------------------------------------- selftest


def test_selftest(capsys):
    assert main(["selftest"]) == 0
    printed = capsys.readouterr().out
    assert "WRONG" not in printed and printed.endswith("all right\n")
    names = ("kernels generic", "composite", "fused op", "fused in graphs", "fused in XLA", "JAX")
    for name in names:
        [row] = re.findall(rf"^{name} .*$", printed, re.MULTILINE)
        assert row.endswith(" ok")
    assert len(printed.splitlines()) < 15


@pytest.mark.parametrize("factor", [1.001, float("nan")])
def test_selftest_finds_a_wrong_implementation(factor, monkeypatch, capsys):
    def broken(cases):
        return [[x * factor for x in selftest._expected(*case)] for case in cases]

    monkeypatch.setattr(selftest, "_implementations", lambda: [("broken", broken, None), ("gone", None, "not here")])
    assert main(["selftest"]) == 1
    printed = capsys.readouterr().out
    assert "WRONG: broken, float64, dropout" in printed and "gone: missing: not here" in printed


# -------------------------------------------------------------------------------------------------------------- bench


@pytest.fixture
def short(monkeypatch):
    """Two of the shapes, as --quick has them, and hardly timed."""
    monkeypatch.setattr(bench, "_SHAPES", (bench._SHAPES[3], bench._SHAPES[4]))
    monkeypatch.setattr(bench, "_QUICK", bench._Effort(rounds=1, seconds=0, turn=0))


def test_bench_tells_times_and_no_verdict(short, capsys):
    assert main(["bench", "--quick", "--threads", "1"]) == 0
    printed = capsys.readouterr()
    head, *rows = printed.out.splitlines()[3:6]
    assert re.split(r"  +", head.strip())[1:] == ["attn_ops, ms", "Keras graph, ms", "Keras XLA, ms", "speed-up"]
    for row in rows:
        *times, ratio = row.split()[-4:]
        assert float(ratio.removesuffix("x")) > 0 and all(float(time) > 0 for time in times)
    assert "met" not in printed.out and "not to be quoted" in printed.out
    assert printed.err == ""  # no bar where there is no terminal


def test_bench_refuses_what_is_wrong(short, monkeypatch, capsys):
    monkeypatch.setattr(attn_ops, "scaled_dot_product_attention", lambda q, k, v, is_causal: q * tf.reduce_mean(k * v))
    assert main(["bench", "--quick"]) == 1
    assert "attn_ops and Keras must agree" in capsys.readouterr().err


def test_bench_has_a_bar_on_a_terminal(short, monkeypatch, capsys):
    monkeypatch.setattr(bench, "_row", lambda tf, shape, effort: ("", str(shape), "1", "2", "2", "2x"))
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    assert main(["bench", "--quick"]) == 0
    printed = capsys.readouterr()
    assert "measuring" in printed.err and "measuring" not in printed.out


def test_the_report_needs_a_checkout(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(checkout, "_SUITE", tmp_path / "benchmarks")
    assert main(["bench", "--report", "x"]) == 2
    assert "from a checkout" in capsys.readouterr().err


@pytest.mark.parametrize(
    "given, module, passed",
    [
        (["--report", "DIR", "--threads", "1", "2"], "report", ["--report", "DIR", "--threads", "1", "2"]),
        (["--quick", "--report=DIR", "--device=cpu"], "report", ["--quick", "--report=DIR"]),
        (["--device", "cuda", "--help"], "gpu", ["--help"]),
    ],
)
def test_the_report_gets_its_options(given, module, passed, monkeypatch):
    seen = []
    monkeypatch.setattr(checkout.subprocess, "call", lambda command, env: seen.extend(command) or 3)
    assert main(["bench", *given]) == 3
    assert seen[1:] == ["-m", module, *passed]


# --------------------------------------------------------------------------------------------------------- completion


def test_completion_scripts_ask_the_command(capsys):
    for shell in ("bash", "zsh", "fish"):
        assert main(["completion", shell]) == 0
        assert f"_ATTN_OPS_COMPLETE={shell}_complete" in capsys.readouterr().out


@pytest.mark.parametrize(
    "line, offered",
    [
        ("e", ["plain,explain"]),
        ("explain --im", ["plain,--implementation"]),
        ("explain m", ["file,m"]),
        ("completion z", ["plain,zsh"]),
    ],
)
def test_completions(line, offered, monkeypatch, capsys):
    words = line.split()
    monkeypatch.setenv("COMP_WORDS", f"{cli.name} {line}")
    monkeypatch.setenv("COMP_CWORD", str(len(words)))
    monkeypatch.setenv("_ATTN_OPS_COMPLETE", "bash_complete")
    with pytest.raises(SystemExit) as stopped:
        main([])
    assert stopped.value.code == 0 and capsys.readouterr().out.split("\n")[:-1] == offered
