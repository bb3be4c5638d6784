"""One list of versions: environment.yml repeats pyproject.toml's pins, and what is installed is what is pinned."""

from __future__ import annotations

import importlib.metadata
import re
import sys
import tomllib
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
PINS = [*PROJECT["dependencies"], *PROJECT["optional-dependencies"]["dev"]]


def environment():
    listed = yaml.safe_load((ROOT / "environment.yml").read_text())["dependencies"]
    (pip,) = [entry["pip"] for entry in listed if isinstance(entry, dict)]
    return [entry for entry in listed if isinstance(entry, str)], pip


def test_every_dependency_is_pinned_exactly():
    assert len(PINS) > 20
    assert not [pin for pin in PINS if not re.fullmatch(r"[A-Za-z0-9-]+==[0-9][0-9A-Za-z.]*", pin)]
    names = [pin.partition("==")[0] for pin in PINS]
    assert len(set(names)) == len(names)


def test_environment_yml_has_the_same_pins():
    _, pip = environment()
    assert sorted(entry for entry in pip if not entry.startswith("-")) == sorted(PINS)
    assert [entry for entry in pip if entry.startswith("-")] == ["--editable ."]


def test_environment_yml_has_a_python_the_project_accepts():
    conda, _ = environment()
    (python,) = [entry for entry in conda if re.match(r"python\b", entry)]
    version = tuple(int(part) for part in python.partition("=")[2].strip("=").split(".")[:2])
    low, high = re.fullmatch(r">=3\.(\d+),<3\.(\d+)", PROJECT["requires-python"]).groups()
    assert (3, int(low)) <= version < (3, int(high))
    assert (3, int(low)) <= sys.version_info[:2] < (3, int(high))


@pytest.mark.parametrize("pin", PINS)
def test_what_is_installed_is_what_is_pinned(pin):
    name, _, version = pin.partition("==")
    assert importlib.metadata.version(name).partition("+")[0] == version


def test_every_package_folder_is_installed():
    """Sub-packages must be found by the patterns, and nothing else may be installed with them."""
    find_packages = pytest.importorskip("setuptools").find_packages
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]["find"]
    found = set(find_packages(str(ROOT), include=settings["include"]))
    on_disk = {
        ".".join(path.parent.relative_to(ROOT).parts)
        for package in ("lora_ga", "eval", "experiments", "slurm")
        for path in (ROOT / package).rglob("__init__.py")
    }
    assert found == on_disk
