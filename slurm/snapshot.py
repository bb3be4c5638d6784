"""A copy of the code for one submission, so that editing goes on while its jobs wait.

It is a git clone with the working tree's changes laid over it: the records that its runs leave say by themselves which
commit it was, and whether it was changed.
"""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

from experiments.config import ROOT
from lora_ga.errors import SetupError

CODE = ("conf", "eval", "experiments", "lora_ga", "slurm")


def _git(*arguments: str, at: Path = ROOT) -> str:
    answer = subprocess.run(["git", "-C", str(at), *arguments], capture_output=True, text=True, check=False)
    if answer.returncode:
        raise SetupError(f"git {arguments[0]} failed ({' '.join(answer.stderr.split())[:200]}): mend the repository")
    return answer.stdout


def snapshot(folder: Path) -> dict[str, str | bool | None]:
    """Copy the code to `folder`; returns its commit (None outside git) and whether it differs from that."""
    if not (ROOT / ".git").exists():
        for name in CODE:
            shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
        return {"commit": None, "dirty": None}
    _git("clone", "--quiet", "--depth=1", ROOT.as_uri(), str(folder))
    changed = _git("diff", "--name-only", "--no-renames", "-z", "HEAD")
    new = _git("ls-files", "--others", "--exclude-standard", "-z", "--", *CODE)
    for name in filter(None, (changed + new).split("\0")):
        source, target = ROOT / name, folder / name
        if source.is_file():
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(source, target)
        else:
            target.unlink(missing_ok=True)
    _git("add", "--all", at=folder)  # a new file counts as a change, too
    return {"commit": _git("rev-parse", "HEAD", at=folder).strip(), "dirty": bool(_git("status", "-s", at=folder))}
