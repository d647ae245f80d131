"""Checks a built wheel: its tag, its size, and every rule of wheel_rules.py; see README.md."""

import argparse
import sys
import tempfile
import zipfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from wheel_rules import LIBRARY_RULES, is_cuda

MAX_BYTES = 5_000_000  # without the CUDA kernels


def problems(wheel: Path) -> list[str]:
    found = []
    platform = wheel.stem.split("-")[-1]
    if platform not in ("manylinux_2_28_x86_64", "manylinux_2_28_aarch64"):
        found.append(f"its platform is {platform}, not manylinux_2_28")
    with tempfile.TemporaryDirectory() as directory, zipfile.ZipFile(wheel) as archive:
        libraries = [archive.extract(name, directory) for name in archive.namelist() if ".so" in Path(name).name]
        size = wheel.stat().st_size - sum(x.compress_size for x in archive.infolist() if is_cuda(x.filename))
        if size >= MAX_BYTES:
            found.append(f"it has {size} bytes, not less than {MAX_BYTES}")
        names = [Path(library).name for library in libraries]
        if len([name for name in names if not is_cuda(name)]) != 2:
            found.append(f"it has the libraries {names}, not the operators and the Python module")
        for library, name in zip(libraries, names):
            for broken in LIBRARY_RULES:
                found += [f"{name}, {broken.__name__}: {what}" for what in sorted(broken(library), key=str)]
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("wheels", nargs="+", type=Path)
    parser.add_argument("--count", type=int, help="how many wheels there must be")
    arguments = parser.parse_args()
    failed = arguments.count not in (None, len(arguments.wheels))
    if failed:
        print(f"there are {len(arguments.wheels)} wheels, not {arguments.count}")
    for wheel in arguments.wheels:
        found = problems(wheel)
        failed |= bool(found)
        print(f"{wheel.name}, {wheel.stat().st_size} bytes:", "; ".join(found) or "passed")
    sys.exit(failed)


if __name__ == "__main__":
    main()
