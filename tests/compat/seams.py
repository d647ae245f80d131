"""Which releases of KerasHub and of Keras have the seams that the adapters of attn_ops were checked against.

    python tests/compat/seams.py                    the tables; releases default to the latest ones of 0.20 to 0.32 and 3.7 to 3.15
    python tests/compat/seams.py --hub 0.32.0 --keras
    python tests/compat/seams.py --codes --hub 0.32.0   the fingerprints, as known_code.py has them

Needs Keras, and pip's access to a registry; nothing is installed. A cell is "yes", "other" (code that is not known, or for
the layers of Keras itself other arguments, so that convert leaves the layer alone) or "-" (no such class or method in the
release).
"""

from __future__ import annotations

import argparse
import ast
import functools
import subprocess
import sys
import tempfile
import textwrap
import zipfile
from pathlib import Path

from attn_ops.models import seams
from attn_ops.models.adapters.table import SEAMS

HUB = (
    *("0.20.0", "0.21.1", "0.22.2", "0.23.0", "0.24.0", "0.25.1", "0.26.0", "0.27.1", "0.28.0", "0.29.1", "0.30.0"),
    *("0.31.1", "0.32.0"),
)
KERAS = ("3.7.0", "3.8.0", "3.9.2", "3.10.0", "3.11.3", "3.12.4", "3.13.2", "3.14.1", "3.15.1")


class Release:
    """The sources of one release of a package."""

    def __init__(self, package, version):
        with tempfile.TemporaryDirectory() as folder:
            command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--dest", folder, f"{package}=={version}"]
            subprocess.run(command, check=True, stderr=subprocess.DEVNULL)
            (wheel,) = Path(folder).glob("*.whl")
            with zipfile.ZipFile(wheel) as files:
                self._files = {name: files.read(name).decode() for name in files.namelist() if name.endswith(".py")}

    @functools.cache
    def _classes(self, module):
        source = self._files.get(module.replace(".", "/") + ".py")
        if source is None:
            return {}
        return {node.name: (node, source) for node in ast.parse(source).body if isinstance(node, ast.ClassDef)}

    def method(self, module, name, method):
        """The source of a method, of the class or of one in KerasHub that it is derived from; or None."""
        found = self._classes(module).get(name)
        if found is None:
            return None
        cls, source = found
        for node in cls.body:
            if isinstance(node, ast.FunctionDef) and node.name == method:
                first = min([node.lineno, *(d.lineno for d in node.decorator_list)])
                return "\n".join(source.split("\n")[first - 1 : node.end_lineno]) + "\n"
        bases = [base.id for base in cls.bases if isinstance(base, ast.Name)]
        imported = {
            alias.asname or alias.name: (node.module, alias.name)
            for node in ast.walk(ast.parse(source))
            if isinstance(node, ast.ImportFrom)
            for alias in node.names
        }
        inherited = (self.method(*imported.get(base, (module, base)), method) for base in bases)
        return next(filter(None, inherited), None)

    def function(self, module, name):
        """The source of a function of a module, or of a method "Class.method" of it; or None."""
        if "." in name:
            return self.method(module, *name.split("."))
        source = self._files.get(module.replace(".", "/") + ".py", "")
        nodes = (node for node in ast.parse(source).body if isinstance(node, ast.FunctionDef) and node.name == name)
        return next((ast.get_source_segment(source, node) + "\n" for node in nodes), None)

    def parameters(self, seam):
        """The names of the arguments of a seam, or None where the release does not have it."""
        source = self.method(seam.module, seam.name, seam.method)
        if source is None:
            return None
        (function,) = ast.parse(textwrap.dedent(source)).body
        return tuple(argument.arg for argument in function.args.args[1:])

    def cell(self, seam):
        if not seam.codes:
            names = self.parameters(seam)
            return "-" if names is None else "yes" if names == seam.parameters[: len(names)] else "other"
        code = self.code(seam)
        return "-" if code is None else "yes" if code in seam.codes else "other"

    def code(self, seam):
        """The fingerprint of a seam, or None where the release does not have it."""
        sources = [self.method(seam.module, seam.name, name) for name in (seam.method, *seam.steps)]
        beside = [self.function(seam.module, name) for name in seam.beside]
        if None in sources + beside:
            return None
        own = seams.fingerprint_of_source(*sources)
        return f"{own}+{seams.fingerprint_of_source(*beside)}" if beside else own


def table(package, versions, known):
    releases = {version: Release(package, version) for version in versions}
    print(f"| {package} | " + " | ".join(releases) + " |\n|---|" + "---|" * len(releases))
    for seam in known:
        print(f"| `{seam.name}.{seam.method}` | " + " | ".join(release.cell(seam) for release in releases.values()) + " |")


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--hub", nargs="*", default=HUB, metavar="RELEASE")
    parser.add_argument("--keras", nargs="*", default=KERAS, metavar="RELEASE")
    parser.add_argument("--codes", action="store_true", help="print fingerprints of KerasHub's in place of the tables")
    options = parser.parse_args()
    of_hub = [seam for seam in SEAMS if seam.codes and seam.module.startswith("keras_hub.")]
    if options.codes:
        releases = [Release("keras-hub", version) for version in options.hub]
        for seam in of_hub:
            codes = dict.fromkeys(filter(None, (release.code(seam) for release in releases)))
            print(f'    "{seam.name}.{seam.method}": {tuple(codes)},')
        return
    if options.keras:
        table("keras", options.keras, [seam for seam in SEAMS if seam.module.startswith("keras.")])
        print()
    if options.hub:
        table("keras-hub", options.hub, of_hub)


if __name__ == "__main__":
    main()
