"""Uploads the offline W&B runs: `python -m experiments.wandb_sync [outputs]`, from a node with a network."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from experiments.config import ROOT


def waiting_runs(outputs: Path) -> list[Path]:
    """Folders of offline runs anywhere under `outputs` that have not been uploaded yet, oldest first."""
    folders = (path for path in outputs.glob("**/wandb/offline-run-*") if path.is_dir())
    return sorted((path for path in folders if not list(path.glob("*.wandb.synced"))), key=lambda path: path.name)


def main(arguments: Sequence[str]) -> int:
    """Command line; exit code 1 if W&B did not take everything."""
    outputs = ROOT / (arguments[0] if arguments else "outputs")
    waiting = waiting_runs(outputs)
    if not waiting:
        print(f"no offline W&B run under {outputs} is waiting: runs leave one with logger=wandb")
        return 0
    print(f"{len(waiting)} offline W&B runs to upload", flush=True)
    parents = sorted({str(path.parent) for path in waiting})  # W&B skips what it has marked as uploaded
    code = subprocess.run([sys.executable, "-m", "wandb", "sync", *parents], check=False).returncode
    left = len(waiting_runs(outputs))
    if code or left:
        print(
            f"error: {left} runs were not uploaded: check the network and the login "
            f"({Path(sys.executable).parent / 'wandb'} login, or WANDB_API_KEY), then run this again",
            file=sys.stderr,
        )
    return 1 if code or left else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
