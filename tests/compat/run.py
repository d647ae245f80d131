"""Runs smoke.py with one wheel in every pair of TensorFlow and Keras versions, and prints the matrix; see README.md."""

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import venv
from pathlib import Path

HERE = Path(__file__).resolve().parent
TENSORFLOW = ["2.16", "2.17", "2.18", "2.19", "2.20", "2.21", "2.22.0rc0", "nightly"]
KERAS = ["3.6", "3.7", "3.10", "3.12", "3.15"]
TOO_OLD = {"3.6"}  # the layers must say so


def build_wheel(directory: Path) -> Path:
    pip = [sys.executable, "-m", "pip", "wheel", "--no-deps"]
    subprocess.run([*pip, "-w", directory, HERE.parents[1]], check=True)
    (wheel,) = directory.glob("attn_ops-*.whl")
    return wheel


def make_environment(directory: Path, tensorflow: str, wheel: Path) -> Path:
    """The Python of a virtual environment with that TensorFlow and the wheel."""
    python = directory / "bin" / "python"
    if not python.exists():
        venv.create(directory, with_pip=True)
    if tensorflow == "nightly":
        install(python, "--pre", "tf-nightly-cpu", "keras-nightly")
    else:
        install(python, f"tensorflow-cpu=={tensorflow}" + (".*" if tensorflow.count(".") == 1 else ""))
    install(python, "--force-reinstall", "--no-deps", wheel)
    return python


def install(python, *what):
    subprocess.run([python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *what], check=True)


def brings_its_keras(tensorflow: str) -> bool:
    """Whether it needs keras-nightly: that and Keras share a folder, so no other can be tried beside it."""
    return tensorflow == "nightly" or "rc" in tensorflow


def smoke(python: Path, work: Path, script="smoke.py") -> dict | None:
    """What the last line of smoke.py reports, or None if it failed."""
    # From another directory, so that the installed package is found and not this checkout.
    run = subprocess.run([python, HERE / script], cwd=work, stdout=subprocess.PIPE, text=True)
    print(run.stdout, end="", flush=True)
    return json.loads(run.stdout.splitlines()[-1]) if run.returncode == 0 else None


def try_all(python: Path, tensorflow: str, keras_versions: list[str], work: Path) -> dict:
    """What came of each Keras."""
    if brings_its_keras(tensorflow):
        return {"nightly": smoke(python, work)}
    results = {}
    for keras in keras_versions:
        install(python, f"keras=={keras}.*")
        results[keras] = smoke(python, work, "old_keras.py" if keras in TOO_OLD else "smoke.py")
    return results


def as_markdown(results: dict) -> str:
    versions = list(dict.fromkeys(version for cells in results.values() for version in cells))
    rows = [["TensorFlow", *(f"Keras {version}" for version in versions), "under XLA"]]
    rows.append(["---"] * len(rows[0]))
    for tensorflow, cells in results.items():
        under_xla = sorted({cell["under_xla"] for cell in cells.values() if cell and "under_xla" in cell})
        words = [cells[v]["result"] if cells.get(v) else "FAILED" if v in cells else "" for v in versions]
        rows.append([tensorflow, *words, " / ".join(under_xla)])
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tensorflow", nargs="+", default=TENSORFLOW, metavar="VERSION")
    parser.add_argument("--keras", nargs="+", default=KERAS, metavar="VERSION")
    parser.add_argument("--wheel", type=Path, help="a wheel that is built; one of this checkout is built otherwise")
    parser.add_argument("--work", type=Path, help="directory that keeps the environments for the next time")
    parser.add_argument("--summary", type=Path, help="file that the matrix is added to as well")
    arguments = parser.parse_args()
    results = {}
    with tempfile.TemporaryDirectory() as temporary:
        work = (arguments.work or Path(temporary)).resolve()
        work.mkdir(parents=True, exist_ok=True)
        wheel = (arguments.wheel or build_wheel(Path(temporary))).resolve()
        for tensorflow in arguments.tensorflow:
            directory = work / f"tensorflow-{tensorflow}"
            python = make_environment(directory, tensorflow, wheel)
            results[tensorflow] = try_all(python, tensorflow, arguments.keras, work)
            if arguments.work is None:
                shutil.rmtree(directory)
    summary = f"{wheel.name}, Python {sys.version.split()[0]}\n\n{as_markdown(results)}\n"
    print("\n" + summary)
    if arguments.summary:
        with arguments.summary.open("a") as file:
            file.write(summary)
    sys.exit(any(cell is None for cells in results.values() for cell in cells.values()))


if __name__ == "__main__":
    main()
