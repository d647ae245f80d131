#!/usr/bin/env python3
"""Builds the wheel of a commit twice, in folders of other names, and compares the bytes: whoever builds a release gets the same.

    python tests/package/reproducible.py [--commit HEAD] [--from-sdist] [--summary FILE]

Takes minutes, and needs pip with a way to the build requirements. Without the CUDA kernels, unless CMAKE_ARGS says otherwise.
The time in the archives is the commit's, by SOURCE_DATE_EPOCH, as in the workflow of the releases. --from-sdist: the second one is
built from the sdist. The exit status is 1 if the wheels differ, and what differs is printed.
"""

import argparse
import hashlib
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def unpack(commit, folder):
    folder.mkdir(parents=True)
    archive = subprocess.run(["git", "archive", commit], cwd=ROOT, check=True, capture_output=True).stdout
    subprocess.run(["tar", "-x"], cwd=folder, input=archive, check=True)
    return folder


def environment(commit):
    time = subprocess.run(["git", "log", "-1", "--format=%ct", commit], cwd=ROOT, check=True, capture_output=True, text=True)
    return {"CMAKE_ARGS": "-DATTN_OPS_CUDA=OFF", **os.environ, "SOURCE_DATE_EPOCH": time.stdout.strip()}


def wheel(source, folder, variables):
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", folder, source]
    subprocess.run(command, check=True, env=variables)
    (found,) = folder.glob("*.whl")
    return found


def sdist(source, folder, variables):
    """Through setuptools' own hook, as a front end would, in an environment of its own."""
    subprocess.run([sys.executable, "-m", "venv", folder / "env"], check=True)
    python = folder / "env" / "bin" / "python"
    subprocess.run([python, "-m", "pip", "install", "--quiet", "build"], check=True)
    subprocess.run([python, "-m", "build", "--sdist", "--outdir", folder, source], check=True, env=variables, stdout=2)
    (found,) = folder.glob("*.tar.gz")
    return found


def digest(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


def differences(first, second):
    """What is not the same in two wheels, as a list of texts."""
    if digest(first) == digest(second):
        return []
    archives = [zipfile.ZipFile(path) for path in (first, second)]
    names = [archive.namelist() for archive in archives]
    if names[0] != names[1]:
        return [f"other files, or in another order: {sorted(set(names[0]) ^ set(names[1]))}"]
    found = []
    for name in names[0]:
        infos = [archive.getinfo(name) for archive in archives]
        for what in ("CRC", "date_time", "external_attr", "compress_type"):
            values = [getattr(info, what) for info in infos]
            if values[0] != values[1]:
                found.append(f"{name}: {what} is {values[0]}, and {values[1]}")
    return found or ["the archives themselves"]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--commit", default="HEAD")
    parser.add_argument("--from-sdist", action="store_true")
    parser.add_argument("--summary", type=Path, help="file that the result is added to as well")
    arguments = parser.parse_args()
    variables = environment(arguments.commit)
    with tempfile.TemporaryDirectory() as temporary:
        work = Path(temporary)
        first = wheel(unpack(arguments.commit, work / "a"), work / "wheels-a", variables)
        source = unpack(arguments.commit, work / "another" / "folder")
        if arguments.from_sdist:
            source = sdist(source, work / "sdist", variables)
        second = wheel(source, work / "wheels-b", variables)
        found = differences(first, second)
        text = "\n".join(found) if found else f"twice the same: sha256 {digest(first)}  {first.name}"
    print(text)
    if arguments.summary:
        with arguments.summary.open("a") as file:
            file.write(text + "\n")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
