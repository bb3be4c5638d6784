"""Proves that the README does not rot: its links exist, its commands compose, its make targets are there."""

import re
import shlex
from pathlib import Path

import pytest

from experiments.config import load_config
from experiments.plan import expand

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()
COMMANDS = re.findall(r"^    (?:\w+=\S+ )*\.venv/bin/python -m (experiments\.\w+)([^#\n]*)", README, re.M)


def test_links_name_files() -> None:
    links = [link for link in re.findall(r"\]\(([^)]+)\)", README) if not link.startswith("http")]
    assert len(links) > 15
    assert [link for link in links if not (ROOT / link).exists()] == []


def test_there_are_commands() -> None:
    assert len(COMMANDS) >= 6


@pytest.mark.parametrize(("module", "arguments"), COMMANDS, ids=[arguments.strip() for _, arguments in COMMANDS])
def test_commands_compose(module: str, arguments: str) -> None:
    overrides = shlex.split(arguments)
    if module == "experiments.run":
        assert load_config(overrides).run_id
    else:
        assert module in ("experiments.plan", "experiments.sweep") and expand(overrides)


def test_make_targets_exist() -> None:
    makefile = (ROOT / "Makefile").read_text()
    targets = set(re.findall(r"make ([a-z-]+)", README))
    assert "reproduce-glue" in targets and "test" in targets
    assert [target for target in targets if not re.search(rf"^{target}:", makefile, re.M)] == []
