"""The versions that pyproject.toml promises are those that CI tries."""

import tomllib

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

from tests.places import ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
PROMISED = [
    requirement
    for line in (*PROJECT["dependencies"], *PROJECT["optional-dependencies"]["dev"])
    if (requirement := Requirement(line)).specifier
]


def pinned(name: str) -> dict[str, Version]:
    """The versions that a file of constraints names."""
    lines = (ROOT / ".ci" / name).read_text().splitlines()
    pins = [Requirement(line) for line in lines if line and not line.startswith("#")]
    versions = {}
    for pin in pins:
        (one,) = pin.specifier
        assert one.operator == "==", pin
        versions[canonicalize_name(pin.name)] = Version(one.version)
    return versions


@pytest.mark.parametrize("requirement", PROMISED, ids=lambda requirement: requirement.name)
def test_what_is_promised_is_tried(requirement: Requirement) -> None:
    name = canonicalize_name(requirement.name)
    assert pinned("constraints.txt")[name] in requirement.specifier
    (lowest,) = (s for s in requirement.specifier if s.operator in (">=", "=="))
    assert pinned("lowest.txt")[name] == Version(lowest.version)


@pytest.mark.parametrize("name", ["constraints.txt", "lowest.txt"])
def test_no_version_is_one_of_this_machine_alone(name: str) -> None:
    """Such as torch's 2.13.0+cpu: a plain 2.13.0 takes it where it is, and is found elsewhere."""
    assert all(version.local is None for version in pinned(name).values())
