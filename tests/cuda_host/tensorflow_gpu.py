"""The operators on the GPU of a real TensorFlow, on a machine without one. By hand: TensorFlow's GPU wheel is 0.6 GB.

    python tests/cuda_host/tensorflow_gpu.py [--work DIR] [--tensorflow DIR] [--library FILE] [--driver FILE ...]

Needs a built checkout, gcc, and an environment that has what TensorFlow needs. CUDA is blank_cuda.c under all its names,
so TensorFlow finds a GPU whose kernels do nothing. The CUDA kernels are those of the CPU behind the same interface
(cuda_library_on_cpu.cc), on memory that is the host's: what is tested is the way from TensorFlow and its XLA to them and
back, by tensorflow_gpu_checks.py in a process of its own. With a driver that runs kernels, and their library, it is all of it.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
VERSION = "2.21.0"
SONAMES = (
    "libcuda.so.1", "libnvidia-ml.so.1", "libcudart.so.12", "libcublas.so.12", "libcublasLt.so.12", "libcufft.so.11",
    "libcusolver.so.11", "libcusparse.so.12", "libcudnn.so.9",
)  # fmt: skip


def install_tensorflow(directory):
    if not (directory / "tensorflow").is_dir():
        pip = [sys.executable, "-m", "pip", "install", "--no-deps", "--target", directory, f"tensorflow=={VERSION}"]
        subprocess.run(pip, check=True)


def names_looked_up(library):
    """What TensorFlow's wrappers ask the libraries of CUDA for: they hold the names as strings."""
    pattern = rb"\0((?:cu|nvml|cuda|__cuda|cudnn|cublas|cublasLt)[A-Z]\w+)(?=\0)"
    return {name.decode() for name in re.findall(pattern, library.read_bytes())}


def build_cuda(tensorflow, directory, driver):
    """One library under all the names: opened under any of them it is the same, with the same state.

    What ``driver`` defines, in sources or objects, is taken instead of what is blank.
    """
    directory.mkdir(parents=True, exist_ok=True)
    source = (HERE / "blank_cuda.c").read_text()
    defined = set(re.findall(r"^[\w* ]+?\*? ?(\w+)\(", source, re.MULTILINE))
    blank = names_looked_up(tensorflow / "tensorflow/libtensorflow_framework.so.2") - defined
    whole = directory / "cuda.c"
    whole.write_text(source + "\n" + "\n".join(f"Status {name}(void) {{ return 0; }}" for name in sorted(blank)))
    blank_object, library = directory / "blank.o", directory / "cuda.so"
    subprocess.run(["gcc", "-c", "-fPIC", "-O1", whole, "-o", blank_object], check=True)
    subprocess.run(["objcopy", "--weaken", blank_object], check=True)
    compiler = ["g++", "-std=c++17", "-shared", "-fPIC", "-O1", "-pthread", f"-I{ROOT / 'csrc'}"]
    subprocess.run([*compiler, *driver, blank_object, "-o", library], check=True)
    for name in SONAMES:
        (directory / name).unlink(missing_ok=True)
        (directory / name).symlink_to(library)


def install_package(site, library):
    package = site / "attn_ops"
    shutil.rmtree(package, ignore_errors=True)
    shutil.copytree(ROOT / "attn_ops", package, ignore=shutil.ignore_patterns("__pycache__", "libattn_ops_cuda.so"))
    target = package / "libattn_ops_cuda.so"
    if library is not None:
        shutil.copy(library, target)
        return
    objects = sorted(ROOT.glob("build/CMakeFiles/attn_ops_*.dir/csrc/cpu/*.o"))
    command = ["g++", "-std=c++17", "-O1", "-shared", "-fPIC", f"-I{ROOT / 'csrc'}", HERE / "cuda_library_on_cpu.cc"]
    subprocess.run([*command, *objects, "-o", target], check=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, default=ROOT / "build/tensorflow_gpu", help="for all that is made")
    parser.add_argument("--tensorflow", type=Path, help="an unpacked wheel instead of one to fetch")
    parser.add_argument("--library", type=Path, help="CUDA kernels to put in the place of those of the CPU")
    parser.add_argument("--driver", type=Path, nargs="+", default=[], help="sources or objects of a stand-in libcuda")
    arguments = parser.parse_args()
    work = arguments.work.resolve()
    tensorflow = (arguments.tensorflow or work / "tensorflow").resolve()
    install_tensorflow(tensorflow)
    build_cuda(tensorflow, work / "cuda", arguments.driver)
    install_package(work / "site", arguments.library)
    environment = {
        **os.environ,
        "LD_LIBRARY_PATH": str(work / "cuda"),
        "PYTHONPATH": os.pathsep.join(map(str, (work / "site", tensorflow))),
        "TF_FORCE_GPU_ALLOW_GROWTH": "true",
        "TF_CPP_MIN_LOG_LEVEL": os.environ.get("TF_CPP_MIN_LOG_LEVEL", "2"),
    }
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", HERE / "tensorflow_gpu_checks.py"]
    return subprocess.run(command, env=environment, cwd=work).returncode


if __name__ == "__main__":
    sys.exit(main())
