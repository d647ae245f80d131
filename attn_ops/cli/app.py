"""python -m attn_ops info | selftest | matrix | explain | bench"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import pathlib
import subprocess
import sys

from attn_ops.cli import info


def _info(arguments) -> int:
    found = info.info()
    if arguments.json:
        print(json.dumps(found, indent=2))
        return 0
    for section, content in found.items():
        print(f"{section}:", content if isinstance(content, str) else "")
        for name, value in content.items() if isinstance(content, dict) else ():
            note = f"  ({info.ENVIRONMENT[name]})" if name in info.ENVIRONMENT else ""
            print(f"  {name}: {', '.join(value) if isinstance(value, list) else value}{note}")
    return 0


def _selftest(arguments) -> int:
    from attn_ops.cli import selftest

    return selftest.run()


def _matrix(arguments) -> int:
    from attn_ops.cli import matrix

    print(matrix.render(), end="")
    return 0


def _explain(arguments) -> int:
    import tensorflow as tf

    from attn_ops import explain

    if isinstance(arguments.query, pathlib.Path):
        return _explain_model(arguments.query, arguments.convert)

    def spec(shape, dtype=arguments.dtype):
        return None if shape is None else tf.TensorSpec(shape, dtype)

    key = arguments.key or arguments.query
    try:
        print(
            explain(
                spec(arguments.query),
                spec(key),
                spec(arguments.value or key),
                bias=spec(arguments.bias),
                mask=spec(arguments.mask, "bool"),
                is_causal=arguments.is_causal,
                window=arguments.window,
                layout=arguments.layout,
                implementation=arguments.implementation,
            )
        )
    except (TypeError, ValueError) as error:
        print(error, file=sys.stderr)
        return 1
    return 0


def _explain_model(path, convert) -> int:
    import keras

    import attn_ops

    try:
        model = keras.saving.load_model(path, compile=False)
    except (OSError, TypeError, ValueError) as error:
        print(f"cannot load {path}: {error}", file=sys.stderr)
        return 1
    print(attn_ops.explain(attn_ops.convert(model) if convert else model))
    return 0


def _bench(arguments) -> int:
    suite = pathlib.Path(__file__).resolve().parents[2] / "benchmarks"
    if not suite.is_dir():
        print(
            f"the benchmarks are part of the source repository, not of the package: there is no {suite}; run this "
            "from a checkout with an editable install",
            file=sys.stderr,
        )
        return 2
    if arguments.report is not None or arguments.device == "cuda":
        # A process of its own: the modules of the suite have names that are only theirs to use.
        path = os.pathsep.join(filter(None, (str(suite), str(suite.parent), os.environ.get("PYTHONPATH"))))
        report = [] if arguments.report is None else ["--report", arguments.report]
        module = "gpu" if arguments.device == "cuda" else "report"
        command = [sys.executable, "-m", module, *report, *arguments.pytest_arguments]
        return subprocess.call(command, env={**os.environ, "PYTHONPATH": path})
    if importlib.util.find_spec("pytest_benchmark") is None:
        print("the benchmarks need pytest-benchmark: pip install pytest-benchmark", file=sys.stderr)
        return 2
    import pytest

    return int(pytest.main([str(suite), *arguments.pytest_arguments]))


def _shape_or_model(text):
    """A shape, or the path of a Keras model."""
    return pathlib.Path(text) if pathlib.Path(text).suffix in (".keras", ".h5") else _shape(text)


def _shape(text):
    """'1,?,8,64' as (1, None, 8, 64)."""
    try:
        return tuple(None if part.strip() in ("?", "None") else int(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no shape such as 1,2048,12,64 (? for unknown)") from None


def _parser():
    parser = argparse.ArgumentParser(prog="python -m attn_ops", description="Fused attention for TensorFlow and Keras.")
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("info", help="versions, kernels, and what is missing")
    command.add_argument("--json", action="store_true")
    command.set_defaults(run=_info)
    command = commands.add_parser("selftest", help="compare every implementation here with the reference")
    command.set_defaults(run=_selftest)
    command = commands.add_parser("matrix", help="which implementation takes which feature, forward and backward")
    command.set_defaults(run=_matrix)
    command = commands.add_parser("explain", help="what a call of these shapes, or a saved model, would run, and why")
    command.add_argument(
        "query", type=_shape_or_model, help="for example 1,2048,12,64; ? for an unknown dimension. Or model.keras"
    )
    command.add_argument("--convert", action="store_true", help="of a model: after attn_ops.convert")
    command.add_argument("key", type=_shape, nargs="?", help="the shape of query when left out")
    command.add_argument("value", type=_shape, nargs="?", help="the shape of key when left out")
    command.add_argument("--dtype", default="float32")
    command.add_argument("--bias", type=_shape)
    command.add_argument("--mask", type=_shape)
    command.add_argument("--is-causal", action="store_true")
    command.add_argument("--window", type=int, nargs=2, metavar=("LEFT", "RIGHT"))
    command.add_argument("--layout", default="BSHD", choices=["BSHD", "BHSD"])
    command.add_argument("--implementation")
    command.set_defaults(run=_explain)
    command = commands.add_parser("bench", help="run the benchmark suite of a checkout; options go to pytest")
    command.add_argument(
        "--report",
        metavar="DIR",
        help="instead of pytest: compare all installed peers, print which speed targets are met, and write tables, CSV "
        "and charts into DIR. Options of it: --sections, --peers, --threads, --rounds, --seconds, --quick, "
        "--compare OLD.csv, --fail-if-slower FACTOR (see README.md)",
    )
    command.add_argument(
        "--device",
        choices=["cpu", "cuda"],
        default="cpu",
        help="cuda: compare the CUDA kernels with all installed peers on the GPU, without TensorFlow; needs PyTorch. "
        "Options of it beside --report: --sections, --peers, --rounds, --seconds, --quick, --triton-tutorial FILE, "
        "--compare OLD.csv, --fail-if-slower FACTOR",
    )
    command.set_defaults(run=_bench)
    return parser


def main(argv=None) -> int:
    parser = _parser()
    arguments, rest = parser.parse_known_args(argv)
    if arguments.command == "bench":
        arguments.pytest_arguments = rest
    elif rest:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    return arguments.run(arguments)
