"""pyproject.toml names what the code imports, in versions that CI installs."""

import ast
import sys
import tomllib
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

from tests.places import ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
NEEDED = PROJECT["dependencies"]
EXTRAS = PROJECT["optional-dependencies"]
USERS = {
    "pipeline": (NEEDED, EXTRAS["search"]),
    "tasks": (NEEDED, EXTRAS["mujoco"]),
    "tests": (NEEDED, EXTRAS["dev"]),
    "benchmarks": (NEEDED, EXTRAS["mujoco"], EXTRAS["bench"]),
}
"""Every folder of code, and the lists that it may import from."""
PROMISED = [
    requirement
    for line in (*PROJECT["dependencies"], *PROJECT["optional-dependencies"]["dev"])
    if (requirement := Requirement(line)).specifier
]


BY_MODULE = packages_distributions()
"""Which packages a module may come from; reading all packages takes a second."""


def imported(path: Path) -> set[str]:
    """The packages that a file imports anywhere, without those of the language and of the house."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module.partition(".")[0])
    neighbours = {other.stem for other in path.parent.glob("*.py")}
    return found - set(sys.stdlib_module_names) - set(USERS) - neighbours


@pytest.mark.parametrize("folder", USERS)
def test_what_is_imported_is_named(folder: str) -> None:
    """Not found by way of another package, which may do without it tomorrow."""
    named = {canonicalize_name(Requirement(line).name) for part in USERS[folder] for line in part}
    files = list((ROOT / folder).rglob("*.py"))
    assert files
    for path in files:
        for module in imported(path):
            distributions = {canonicalize_name(name) for name in BY_MODULE.get(module, [module])}
            assert distributions & named, f"{path} imports {module}"


def test_what_is_named_is_imported() -> None:
    used = {
        canonicalize_name(name)
        for folder in ("pipeline", "tasks")
        for path in (ROOT / folder).rglob("*.py")
        for module in imported(path)
        for name in BY_MODULE.get(module, [module])
    }
    assert {canonicalize_name(Requirement(line).name) for line in NEEDED} <= used


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
