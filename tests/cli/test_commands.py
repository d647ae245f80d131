"""`python -m attn_ops`: info, explain, selftest, and what bench is called with."""

import pytest
import tensorflow as tf

import attn_ops
from children import WITHOUT_TENSORFLOW, command, run


def test_info_shows_a_misspelt_instruction_set():
    result = run("from attn_ops.__main__ import main\nsys.exit(main(['info']))", ATTN_OPS_ISA="sse9")
    assert result.returncode == 0, result.stderr
    assert "default: the environment variable ATTN_OPS_ISA ('sse9') must name" in result.stdout


def test_info():
    result = command("info")
    assert result.returncode == 0, result.stderr
    for line in (f"attn_ops: {attn_ops.__version__}", f"tensorflow: {tf.__version__}", "tensorflow op: available"):
        assert line in result.stdout
    assert "default: " in result.stdout and "generic" in result.stdout and "ATTN_OPS_DISABLE: not set" in result.stdout


def test_info_without_tensorflow():
    result = run(WITHOUT_TENSORFLOW + "from attn_ops.__main__ import main\nsys.exit(main(['info', '--json']))")
    assert result.returncode == 0, result.stderr
    assert "pip install" in result.stdout


def test_explain(capsys):
    from attn_ops.cli.app import main

    assert main(["explain", "1,?,8,64", "1,?,2,64", "--is-causal", "--dtype", "bfloat16"]) == 0
    assert capsys.readouterr().out == "implementation: fused (op)\n"
    assert main(["explain", "1,5,6,64", "1,5,4,64"]) == 1
    assert "num_heads (6) must be a multiple of num_kv_heads (4)" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["explain", "1xfive"])
    assert "is no shape" in capsys.readouterr().err


def test_selftest(capsys):
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


def test_bench_outside_of_a_checkout(monkeypatch, capsys, tmp_path):
    from attn_ops.cli import app

    monkeypatch.setattr(app, "__file__", str(tmp_path / "attn_ops" / "__main__.py"))
    assert app.main(["bench"]) == 2
    assert "from a checkout" in capsys.readouterr().err


def test_bench_gives_its_arguments_to_pytest(monkeypatch):
    from attn_ops.cli.app import main

    seen = []
    monkeypatch.setattr(pytest, "main", lambda arguments: seen.extend(arguments) or 0)
    assert main(["bench", "-k", "decode", "--benchmark-json=x.json"]) == 0
    assert seen[0].endswith("benchmarks") and seen[1:] == ["-k", "decode", "--benchmark-json=x.json"]
