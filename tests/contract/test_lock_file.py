"""requirements-ci.lock has a version of all that CI installs, each within the bounds that pyproject.toml states."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

REPO = Path(__file__).resolve().parents[2]
LINES = [
    line.strip()
    for line in (REPO / "requirements-ci.lock").read_text(encoding="utf-8").splitlines()
    if line.strip() and not line.lstrip().startswith("#")
]
PROJECT = tomllib.loads((REPO / "pyproject.toml").read_text(encoding="utf-8"))["project"]
EXTRAS = re.search(r"\.\[([a-z,]+)\]", (REPO / "scripts" / "setup.sh").read_text(encoding="utf-8"))


def test_it_holds_exact_versions_and_no_address() -> None:
    locked = [Requirement(line) for line in LINES]
    assert len(locked) > 50
    names = [canonicalize_name(each.name) for each in locked]
    assert names == sorted(set(names))
    assert all(str(each.specifier).startswith("==") and each.url is None for each in locked)
    assert not [line for line in LINES if "://" in line or line.startswith("-")]
    assert not {"torch", "glmtune"} & set(names), "PyTorch's build depends on the machine"


def test_it_keeps_to_the_bounds() -> None:
    assert EXTRAS is not None
    asked = [*PROJECT["dependencies"]]
    for extra in EXTRAS[1].split(","):
        asked += PROJECT["optional-dependencies"][extra]
    locked = {canonicalize_name(Requirement(line).name): Requirement(line) for line in LINES}
    for wanted in map(Requirement, asked):
        if wanted.name == "torch":
            continue
        version = str(locked[canonicalize_name(wanted.name)].specifier).removeprefix("==")
        assert wanted.specifier.contains(version, prereleases=True), (wanted, version)
