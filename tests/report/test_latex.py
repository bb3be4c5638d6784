"""Proves that every committed LaTeX table compiles."""

import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

TABLES = sorted(Path(__file__).resolve().parents[2].glob("results/baseline/*/tables/*.tex"))
DOCUMENT = r"""\documentclass{article}
\usepackage{booktabs}
\usepackage{graphicx}
\usepackage{xcolor}
\begin{document}
\input{table}
\end{document}
"""


@pytest.fixture(scope="module")
def pdflatex(debian: Callable[..., None]) -> None:
    debian("texlive-latex-base", "texlive-latex-recommended", commands=("pdflatex",))


def test_there_are_tables() -> None:
    assert len(TABLES) > 10


@pytest.mark.slow
@pytest.mark.usefixtures("pdflatex")
@pytest.mark.parametrize("table", TABLES, ids=lambda path: path.stem)
def test_it_compiles_with_the_packages_it_names(table: Path, tmp_path: Path) -> None:
    text = table.read_text(encoding="utf-8")
    (tmp_path / "table.tex").write_text(text, encoding="utf-8")
    named = [line for line in DOCUMENT.splitlines() if "usepackage" not in line or line in text]
    (tmp_path / "main.tex").write_text("\n".join(named))
    command = ["pdflatex", "-halt-on-error", "-interaction=nonstopmode", "main.tex"]
    answer = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, errors="replace", check=False)
    assert answer.returncode == 0, answer.stdout[-1500:]
    assert (tmp_path / "main.pdf").stat().st_size > 5000
    assert "Missing character" not in answer.stdout
