"""Checks a built wheel: its tag, its size, what is in it, and every rule of wheel_rules.py; see README.md."""

import argparse
import sys
import tempfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests/helpers"))

from wheel_rules import LIBRARY_RULES, is_cuda  # noqa: E402

MAX_BYTES = 5_000_000  # without the CUDA kernels


def modules() -> set[str]:
    """The modules of this checkout, by their paths in a wheel."""
    return {path.relative_to(ROOT).as_posix() for path in (ROOT / "attn_ops").rglob("*.py")}


def problems(wheel: Path, cuda: bool | None = None) -> list[str]:
    """What is wrong with a wheel. ``cuda``: whether it must have the CUDA kernels; None is either."""
    found = []
    platform = wheel.stem.split("-")[-1]
    if platform not in ("manylinux_2_28_x86_64", "manylinux_2_28_aarch64"):
        found.append(f"its platform is {platform}, not manylinux_2_28")
    with tempfile.TemporaryDirectory() as directory, zipfile.ZipFile(wheel) as archive:
        libraries = [archive.extract(name, directory) for name in archive.namelist() if ".so" in Path(name).name]
        size = wheel.stat().st_size - sum(x.compress_size for x in archive.infolist() if is_cuda(x.filename))
        if size >= MAX_BYTES:
            found.append(f"it has {size} bytes, not less than {MAX_BYTES}")
        packed = {name for name in archive.namelist() if name.endswith(".py")}
        if packed - modules():
            found.append(f"it has modules that are not in this checkout: {sorted(packed - modules())}")
        if modules() - packed:
            found.append(f"it lacks modules of this checkout: {sorted(modules() - packed)}")
        names = [Path(library).name for library in libraries]
        if cuda is not None and any(map(is_cuda, names)) != cuda:
            found.append("it lacks the CUDA kernels" if cuda else "it has CUDA kernels")
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
    parser.add_argument("--cuda", choices=["yes", "no"], help="whether they must have the CUDA kernels, or may not")
    arguments = parser.parse_args()
    failed = arguments.count not in (None, len(arguments.wheels))
    if failed:
        print(f"there are {len(arguments.wheels)} wheels, not {arguments.count}")
    for wheel in arguments.wheels:
        found = problems(wheel, arguments.cuda and arguments.cuda == "yes")
        failed |= bool(found)
        print(f"{wheel.name}, {wheel.stat().st_size} bytes:", "; ".join(found) or "passed")
    sys.exit(failed)


if __name__ == "__main__":
    main()
