"""What a release goes through: the workflows' rules, its bill of materials, and whether two builds have the same bytes."""

import hashlib
import json
import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from package import reproducible, sbom

ROOT = Path(__file__).resolve().parents[2]
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_workflows_run_what_is_pinned_with_no_more_rights_than_needed(path):
    text = path.read_text()
    actions = re.findall(r"uses: (\S+)(.*)", text)
    assert actions and all(re.fullmatch(r"[\w-]+/[\w-]+@[0-9a-f]{40}", name) and "# v" in version for name, version in actions)
    assert text.count("uses: actions/checkout@") == text.count("persist-credentials: false")
    assert re.search(r"^permissions:\n  contents: read$", text, re.MULTILINE)
    # What an event says may hold anything; a script must not take it as its text.
    scripts = re.findall(r"run: (.*(?:\n {8,}.*)*)", text)
    assert not [script for script in scripts if re.search(r"\$\{\{\s*github\.(head_ref|event\.(?!\w+ ==))", script)]
    # It would replace pyproject.toml's environment, and with it where the CUDA kernels come from.
    assert not re.search(r"^\s+CIBW_ENVIRONMENT:", text, re.MULTILINE)
    jobs = re.split(r"\n  (?=\w+:\n)", text.partition("\njobs:")[2])
    for job in jobs:  # the runner's own Python is not for installing
        if re.search(r"\bpip install\b", job):
            assert "actions/setup-python@" in job, job


def test_a_release_is_checked_before_it_is_published():
    text = (ROOT / ".github/workflows/wheels.yml").read_text()
    publish = text[text.index("\n  publish:") :]
    (needs,) = re.findall(r"needs: \[(.*)\]", publish)
    assert set(needs.split(", ")) == {"wheels", "sdist", "check", "compat", "reproducible"}
    assert publish.index("attest-build-provenance") < publish.index("gh-action-pypi-publish")
    check = text[text.index("\n  check:") : text.index("\n  compat:")]
    count = len(re.search(r'^build = \[(.*)\]', (ROOT / "pyproject.toml").read_text(), re.MULTILINE).group(1).split(","))
    assert f"check_wheel.py --count {2 * count} --cuda yes" in check
    assert "pip install dist/*.tar.gz" in text[text.index("\n  sdist:") : text.index("\n  check:")]


@pytest.mark.parametrize("repository", ["someone/attn_ops", None])
def test_a_release_names_the_addresses_of_where_it_is_built(repository):
    """And no build elsewhere names any: they would be guesses."""
    code = "import json, setuptools; setuptools.setup = lambda **given: print(json.dumps(given['project_urls']))\n"
    environment = {name: value for name, value in os.environ.items() if not name.startswith("GITHUB_")}
    if repository:
        environment |= {"GITHUB_SERVER_URL": "https://forge.example", "GITHUB_REPOSITORY": repository}
    code += f"__file__ = {str(ROOT / 'setup.py')!r}\nexec(open(__file__).read())"
    run = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    home = f"https://forge.example/{repository}"
    expected = {"Source": home, "Issues": f"{home}/issues", "Changelog": f"{home}/blob/main/CHANGELOG.md"}
    assert json.loads(run.stdout) == (expected if repository else {})
    passed = re.search(r"^environment-pass = (.*)$", (ROOT / "pyproject.toml").read_text(), re.MULTILINE).group(1)
    assert {"GITHUB_SERVER_URL", "GITHUB_REPOSITORY"} <= set(json.loads(passed))


def wheel(folder, name="attn_ops-0.1.0-cp311-cp311-linux_x86_64.whl", when=(2026, 1, 1, 0, 0, 0), text="print(1)"):
    requires = "Requires-Dist: numpy>=1.23\nRequires-Dist: keras>=3.7; extra == 'tf'\n"
    with zipfile.ZipFile(folder / name, "w") as archive:
        archive.writestr(zipfile.ZipInfo("attn_ops/__init__.py", when), text)
        metadata = f"Metadata-Version: 2.4\nName: attn_ops\nVersion: 0.1.0\n{requires}\n"
        archive.writestr(zipfile.ZipInfo("attn_ops-0.1.0.dist-info/METADATA", when), metadata)
    return folder / name


def test_bill_of_materials(tmp_path):
    path, output = wheel(tmp_path), tmp_path / "bill.json"
    subprocess.run([sys.executable, sbom.__file__, "--output", output, path], check=True)
    bill = json.loads(output.read_text())
    parts = {part["name"]: part for part in bill["components"]}
    assert set(parts) == {path.name, "pybind11", "tensorflow", "numpy"}
    assert parts[path.name]["hashes"] == [{"alg": "SHA-256", "content": hashlib.sha256(path.read_bytes()).hexdigest()}]
    versions = sbom.build_requirements()
    assert parts["pybind11"]["version"] == versions["pybind11"] and len(versions) == 4
    readme = (ROOT / "third_party/tensorflow/README.md").read_text()
    assert f"`tensorflow-cpu` {parts['tensorflow']['version']} wheel" in readme
    (depends,) = bill["dependencies"]
    assert set(depends["dependsOn"]) == {parts[name]["bom-ref"] for name in ("pybind11", "tensorflow", "numpy")}


def test_what_differs_between_two_wheels_is_told(tmp_path):
    for name in "abc":
        (tmp_path / name).mkdir()
    first = wheel(tmp_path / "a")
    assert reproducible.differences(first, wheel(tmp_path / "b")) == []
    assert [text.split(" is ")[0] for text in reproducible.differences(first, wheel(tmp_path / "b", when=(2026, 1, 2, 0, 0, 0)))] == [
        "attn_ops/__init__.py: date_time",
        "attn_ops-0.1.0.dist-info/METADATA: date_time",
    ]
    (told,) = reproducible.differences(first, wheel(tmp_path / "c", text="print(2)"))
    assert told.startswith("attn_ops/__init__.py: CRC is ")


def test_two_builds_have_the_same_bytes(pytestconfig):
    """That of the commit: two builds, which take minutes, in folders of two names."""
    if not pytestconfig.getoption("whole"):
        pytest.skip("with --whole: it builds twice, in minutes")
    built = subprocess.run([sys.executable, reproducible.__file__], capture_output=True, text=True)
    assert built.returncode == 0, built.stdout + built.stderr
