"""Runs smoke.py with one wheel in several versions of TensorFlow; see README.md."""

import argparse
import subprocess
import sys
import tempfile
import venv
from pathlib import Path

HERE = Path(__file__).resolve().parent


def build_wheel(directory: Path) -> Path:
    pip = [sys.executable, "-m", "pip", "wheel", "--no-deps"]
    subprocess.run([*pip, "-w", directory, HERE.parents[1]], check=True)
    (wheel,) = directory.glob("attn_ops-*.whl")
    return wheel


def passes(version: str, wheel: Path, work: Path) -> bool:
    environment = work / f"tensorflow-{version}"
    python = environment / "bin" / "python"
    if not python.exists():
        venv.create(environment, with_pip=True)
    pip = [python, "-m", "pip", "install", "--quiet"]
    subprocess.run([*pip, f"tensorflow-cpu=={version}.*", "keras>=3.7"], check=True)
    subprocess.run([*pip, "--force-reinstall", "--no-deps", wheel], check=True)
    # From another directory, so that the installed package is found and not this checkout.
    return subprocess.run([python, HERE / "smoke.py"], cwd=work).returncode == 0


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--versions", nargs="+", default=["2.17", "2.19", "2.21"])
    parser.add_argument("--wheel", type=Path)
    parser.add_argument("--work", type=Path)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        work = (arguments.work or Path(temporary)).resolve()
        work.mkdir(parents=True, exist_ok=True)
        wheel = (arguments.wheel or build_wheel(Path(temporary))).resolve()
        results = {version: passes(version, wheel, work) for version in arguments.versions}
    print(f"\n{wheel.name}, Python {sys.version.split()[0]}")
    for version, passed in results.items():
        print(f"  TensorFlow {version}: {'passed' if passed else 'FAILED'}")
    sys.exit(not all(results.values()))


if __name__ == "__main__":
    main()
