"""The house keeps its plan: imports go one way, `eval` and `experiments` are ours, files and functions stay small."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

import experiments
import lora_ga
import slurm
from eval import __file__ as eval_file

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("lora_ga", "eval", "experiments", "slurm")
SOURCES = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))
FORBIDDEN = {
    "lora_ga": {"eval", "experiments", "slurm", "hydra", "omegaconf", "wandb", "argparse"},
    "eval": {"experiments", "slurm", "hydra", "omegaconf", "wandb"},
    "experiments": {"slurm"},
    "slurm": {"eval", "hydra", "omegaconf", "wandb"},
}
DOCUMENTS = sorted(
    path
    for pattern in ("*.md", "Makefile", "docs/**/*", "scripts/**/*", "slurm/*.sbatch", "conf/**/*.yaml", "notebooks/*")
    for path in ROOT.glob(pattern)
    if path.is_file()
)


def imports(path):
    """(top-level package, line, whether written `import x`) of every import, also inside functions."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name.partition(".")[0], node.lineno, True
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name}:{node.lineno} imports relatively"
            yield node.module.partition(".")[0], node.lineno, False


def relative(path):
    return str(path.relative_to(ROOT))


def test_there_is_something_to_check():
    assert len(SOURCES) > 30 and len(DOCUMENTS) > 20


@pytest.mark.parametrize("path", SOURCES, ids=relative)
def test_imports_go_one_way(path):
    package = path.relative_to(ROOT).parts[0]
    wrong = [(name, line) for name, line, _ in imports(path) if name in FORBIDDEN[package]]
    assert not wrong, f"{package} must not import {wrong}"


@pytest.mark.parametrize("path", [*SOURCES, *sorted((ROOT / "tests").rglob("*.py"))], ids=relative)
def test_nothing_rebinds_the_builtin_eval(path):
    """`import eval.x` binds the name eval to our package."""
    assert not [line for name, line, plain in imports(path) if name == "eval" and plain]


def test_the_packages_are_the_ones_of_this_checkout():
    for file in (eval_file, experiments.__file__, lora_ga.__file__, slurm.__file__):
        assert Path(file).resolve().is_relative_to(ROOT)


def test_every_package_folder_says_so_and_the_others_do_not():
    for folder in {path.parent for path in SOURCES}:
        assert (folder / "__init__.py").is_file(), relative(folder)
    assert not list((ROOT / "tests").rglob("__init__.py")) and not list((ROOT / "conf").rglob("__init__.py"))


def test_no_drawer_for_everything():
    assert not [relative(path) for path in SOURCES if path.stem in {"utils", "util", "helpers", "common", "misc"}]


@pytest.mark.parametrize("path", SOURCES, ids=relative)
def test_files_and_functions_fit(path):
    text = path.read_text()
    assert len(text.splitlines()) <= 350
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef)
    functions = [node for node in ast.walk(ast.parse(text)) if isinstance(node, kinds)]
    long = {node.name: node.end_lineno - node.lineno + 1 for node in functions}
    assert not {name: lines for name, lines in long.items() if lines > 60}


@pytest.mark.parametrize("path", [path for path in SOURCES if path.parts[-2] != "experiments"], ids=relative)
def test_the_library_reads_no_arguments_and_prints_nothing(path):
    """Commands (a file with a __main__ part) may print; what others import may not."""
    tree = ast.parse(path.read_text())
    if path.name == "__main__.py" or any(
        isinstance(n, ast.If) and "__main__" in ast.unparse(n.test) for n in tree.body
    ):
        return
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)]
    assert not [node.lineno for node in calls if node.func.id in {"print", "input", "breakpoint"}]


@pytest.mark.parametrize("path", [path for path in SOURCES if path.name != "__init__.py"], ids=relative)
def test_every_module_says_what_it_is_in_at_most_eight_lines(path):
    docstring = ast.get_docstring(ast.parse(path.read_text()))
    assert docstring and len(docstring.splitlines()) <= 8


def test_run_py_is_one_page():
    assert len((ROOT / "experiments" / "run.py").read_text().splitlines()) <= 100


@pytest.mark.parametrize("path", DOCUMENTS, ids=relative)
def test_no_document_adds_keys_by_force(path):
    """Hydra's `++key=value` also takes a key with a typing error in it, so no command of ours uses it."""
    assert not re.search(r"\+\+\w", path.read_text(errors="replace"))


@pytest.mark.parametrize("path", [*SOURCES, *DOCUMENTS], ids=relative)
def test_no_path_of_one_machine(path):
    assert not re.search(r"(?<![\w.$}])/(home|root|work|Users|mnt|scratch)/\w", path.read_text(errors="replace"))
