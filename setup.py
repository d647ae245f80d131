"""Builds the compiled part with CMake, and knows the addresses of a release; everything else is in pyproject.toml."""

import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build import build
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent


def cmake(*arguments):
    try:
        subprocess.run(["cmake", *arguments], check=True)
    except FileNotFoundError:
        raise SystemExit("attn_ops: building without isolation needs CMake and Ninja: pip install cmake ninja") from None
    except subprocess.CalledProcessError as error:
        raise SystemExit(f"attn_ops: `cmake {shlex.join(arguments)}` failed ({error.returncode}); it says why above") from None


class CleanBuild(build):
    """A wheel is all that lies in the build directory, where earlier builds leave modules and libraries of their own."""

    def run(self):
        shutil.rmtree(Path(self.build_lib) / "attn_ops", ignore_errors=True)
        super().run()


class CMakeBuild(build_ext):
    """Runs CMake, which puts ``libattn_ops.so`` and ``_core`` into the package.

    The environment variable ``CMAKE_ARGS`` adds arguments, as in ``-DATTN_OPS_TF_INCLUDE_DIR=...``, and
    ``CMAKE_BUILD_PARALLEL_LEVEL`` limits how many compilers run at once.
    """

    def run(self):
        in_place = self.inplace or self.editable_mode
        package = ROOT / "attn_ops" if in_place else Path(self.build_lib).resolve() / "attn_ops"
        # setuptools throws an editable build's directory away, and with it the objects that tests look into.
        temporary = ROOT / "build" / f"editable.{sys.implementation.cache_tag}" if self.editable_mode else self.build_temp
        build = Path(temporary).resolve()
        build.mkdir(parents=True, exist_ok=True)
        # It remembers tools of an isolated build environment, which are gone by the next one. Objects are kept.
        (build / "CMakeCache.txt").unlink(missing_ok=True)

        cmake(
            f"-S{ROOT}",
            f"-B{build}",
            "-GNinja",
            f"-DPython_EXECUTABLE={sys.executable}",
            *shlex.split(os.environ.get("CMAKE_ARGS", "")),
        )
        cmake("--build", str(build))
        # An earlier build may have made more of them: with CUDA, or under another name.
        for pattern in ("libattn_ops*.so", f"_core{sysconfig.get_config_var('EXT_SUFFIX')}"):
            for old in package.glob(pattern):
                old.unlink()
        cmake("--install", str(build), "--prefix", str(package), "--strip")


def addresses():
    """Of the project, for its page on an index: those of the service that builds a release, which alone knows where it is."""
    server, repository = map(os.environ.get, ("GITHUB_SERVER_URL", "GITHUB_REPOSITORY"))
    if not server or not repository:
        return {}
    home = f"{server}/{repository}"
    return {"Source": home, "Issues": f"{home}/issues", "Changelog": f"{home}/blob/main/CHANGELOG.md"}


setup(
    project_urls=addresses(),
    # Names the extension so that the wheel is known to be for one Python and one platform; CMake has the sources.
    ext_modules=[Extension("attn_ops._core", sources=[])],
    cmdclass={"build": CleanBuild, "build_ext": CMakeBuild},
)
