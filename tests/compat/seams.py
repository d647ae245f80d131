"""Which releases of KerasHub have the code that the adapters of attn_ops were checked against.

    python tests/compat/seams.py [RELEASE ...]     the table; releases default to all the latest ones of 0.20 to 0.32
    python tests/compat/seams.py --codes RELEASE   the fingerprints of one, as known_code.py has them

Needs Keras, and pip's access to a registry; nothing is installed. A cell is "yes", "other" (code that is not known, so that
convert leaves the layer alone) or "-" (no such class or method in the release).
"""

from __future__ import annotations

import argparse
import ast
import functools
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from attn_ops.models import seams
from attn_ops.models.adapters.table import SEAMS

RELEASES = (
    *("0.20.0", "0.21.1", "0.22.2", "0.23.0", "0.24.0", "0.25.1", "0.26.0", "0.27.1", "0.28.0", "0.29.1", "0.30.0"),
    *("0.31.1", "0.32.0"),
)


class Release:
    """The sources of one release."""

    def __init__(self, version):
        with tempfile.TemporaryDirectory() as folder:
            command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--dest", folder, f"keras-hub=={version}"]
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

    def code(self, seam):
        """The fingerprint of a seam, or None where the release does not have it."""
        sources = [self.method(seam.module, seam.name, name) for name in (seam.method, *seam.steps)]
        beside = [self.function(seam.module, name) for name in seam.beside]
        if None in sources + beside:
            return None
        own = seams.fingerprint_of_source(*sources)
        return f"{own}+{seams.fingerprint_of_source(*beside)}" if beside else own


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("releases", nargs="*", default=RELEASES)
    parser.add_argument("--codes", action="store_true", help="print fingerprints in place of the table")
    options = parser.parse_args()
    releases = {version: Release(version) for version in options.releases}
    of_hub = [seam for seam in SEAMS if seam.codes and seam.module.startswith("keras_hub.")]
    if options.codes:
        for seam in of_hub:
            codes = dict.fromkeys(filter(None, (release.code(seam) for release in releases.values())))
            print(f'    "{seam.name}.{seam.method}": {tuple(codes)},')
        return
    print("| seam | " + " | ".join(releases) + " |")
    print("|---|" + "---|" * len(releases))
    for seam in of_hub:
        codes = [release.code(seam) for release in releases.values()]
        cells = ["-" if code is None else "yes" if code in seam.codes else "other" for code in codes]
        print(f"| `{seam.name}.{seam.method}` | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
