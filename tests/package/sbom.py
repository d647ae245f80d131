#!/usr/bin/env python3
"""What a release is made of, as a CycloneDX 1.6 bill of materials: the files with their hashes, what was compiled into them, and what
they require.

    python tests/package/sbom.py --output attn_ops.cdx.json dist/*.whl dist/*.tar.gz

Nothing is asked of the network. What is compiled in comes from pyproject.toml's build requirements and third_party; what is required,
from the wheels' metadata. The time is SOURCE_DATE_EPOCH, so that the same release has the same bill.
"""

import argparse
import datetime
import email
import hashlib
import json
import os
import re
import sys
import uuid
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
# Headers whose code is in the binaries; the versions stand where they are required.
COMPILED_IN = {"pybind11": "BSD-3-Clause"}
HEADERS = {"tensorflow": ("2.20.0", "Apache-2.0")}


def build_requirements():
    """Version by name, of pyproject.toml."""
    text = (ROOT / "pyproject.toml").read_text()
    requires = re.search(r"\[build-system\].*?requires = \[(.*?)\]", text, re.DOTALL).group(1)
    return dict(re.findall(r'"([\w-]+)==([\w.]+)"', requires))


def library(name, version, licence, **more):
    reference = f"pkg:pypi/{name}@{version}"
    licences = [{"license": {"id": licence}}]
    return {"type": "library", "bom-ref": reference, "name": name, "version": version, "purl": reference, "licenses": licences} | more


def metadata(wheel):
    with zipfile.ZipFile(wheel) as archive:
        (name,) = [name for name in archive.namelist() if name.endswith(".dist-info/METADATA")]
        return email.message_from_bytes(archive.read(name))


def file(path):
    content = path.read_bytes()
    hashes = [{"alg": "SHA-256", "content": hashlib.sha256(content).hexdigest()}]
    return {"type": "file", "bom-ref": f"file:{path.name}", "name": path.name, "hashes": hashes}


def bill(paths):
    """Of these wheels, and sdists beside them."""
    about = metadata(next(path for path in paths if path.suffix == ".whl"))
    package = library(about["Name"], about["Version"], "Apache-2.0")
    versions = build_requirements()
    inside = [library(name, versions[name], licence, scope="required") for name, licence in COMPILED_IN.items()]
    inside += [library(name, *rest, description="headers only (third_party)") for name, rest in HEADERS.items()]
    # An extra is the user's choice, and so is which version of a range.
    required = [re.match(r"([\w-]+)(.*)", text).groups() for text in about.get_all("Requires-Dist", []) if "extra ==" not in text]
    outside = [
        {"type": "library", "bom-ref": f"pkg:pypi/{name}", "name": name, "purl": f"pkg:pypi/{name}", "description": f"required: {rest}"}
        for name, rest in required
    ]
    tools = [{"type": "application", "name": name, "version": v} for name, v in versions.items() if name not in COMPILED_IN]
    time = datetime.datetime.fromtimestamp(int(os.environ.get("SOURCE_DATE_EPOCH", "0")), datetime.timezone.utc)
    files = [file(path) for path in sorted(paths)]
    serial = uuid.uuid5(uuid.NAMESPACE_URL, json.dumps(files))
    return {
        "bomFormat": "CycloneDX",
        "specVersion": "1.6",
        "serialNumber": f"urn:uuid:{serial}",
        "version": 1,
        "metadata": {"timestamp": time.strftime("%Y-%m-%dT%H:%M:%SZ"), "tools": {"components": tools}, "component": package},
        "components": [*files, *inside, *outside],
        "dependencies": [{"ref": package["bom-ref"], "dependsOn": [x["bom-ref"] for x in (*inside, *outside)]}],
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", type=Path)
    parser.add_argument("--output", type=Path, required=True)
    arguments = parser.parse_args()
    arguments.output.write_text(json.dumps(bill(arguments.files), indent=2) + "\n")


if __name__ == "__main__":
    sys.exit(main())
