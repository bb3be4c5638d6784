"""Ours beside others, measured in turns: `python -m experiments.bench [only=start-smollm2,...] [repeats=5] [out=...]`.

Every measurement is a fresh process (`python -m experiments.bench.child COMPARISON SIDE`). Writes
<out>/<comparison>.json as each ends and <out>/README.md from all that are there; prints median ratios of time and of
extra peak memory.
"""

from __future__ import annotations

import json
import logging
import os
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from experiments.bench.compare import Comparison, comparisons
from experiments.bench.measure import require_linux
from experiments.bench.page import lines, page
from experiments.config import ROOT, one_line_errors
from lora_ga.errors import SetupError
from lora_ga.records import capture_environment, write_atomic

log = logging.getLogger(__name__)


def _settings(arguments: Sequence[str], known: Sequence[str]) -> tuple[list[str], int | None, Path]:
    values = {"only": ",".join(known), "repeats": "", "out": "results/bench"}
    for argument in arguments:
        key, equals, value = argument.partition("=")
        if not equals or key not in values:
            raise SetupError(f"{argument!r} is not one of only=, repeats=, out=")
        values[key] = value
    wanted = values["only"].split(",")
    unknown = [name for name in wanted if name not in known]
    if unknown:
        raise SetupError(f"only={unknown[0]} is no comparison: use {', '.join(known)}")
    if values["repeats"] and not values["repeats"].isdigit():
        raise SetupError(f"repeats={values['repeats']}: use a number")
    return wanted, int(values["repeats"]) if values["repeats"] else None, ROOT / values["out"]


def processor() -> str:
    """The CPU's name, as Linux has it."""
    cpus = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.partition(":")[2].strip() for line in cpus if line.startswith("model name")), "unknown")


def child(comparison: str, side: str) -> dict[str, Any]:
    """One measurement; RuntimeError with the process's last lines if it fails."""
    command = [sys.executable, "-m", "experiments.bench.child", comparison, side]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=os.environ, check=False)
    if done.returncode:
        raise RuntimeError(f"{comparison}, {side}: {done.stderr.strip()[-600:]}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def run(name: str, comparison: Comparison, repeats: int | None) -> dict[str, Any]:
    """The sides in turns; all their measurements and medians."""
    measured: dict[str, list[dict[str, Any]]] = {side: [] for side in comparison.sides}
    load = os.getloadavg()[0]
    for turn in range(repeats or comparison.repeats):
        for side, found in measured.items():
            found.append(child(name, side))
            log.info("%s %d: %s %.3f s, %.0f MB", name, turn, side, found[-1]["seconds"], found[-1]["extra_mb"])
    medians = {
        side: {key: statistics.median(one[key] for one in found) for key in found[0]}
        for side, found in measured.items()
    }
    environment = capture_environment()
    return {
        "what": comparison.what,
        "repeats": repeats or comparison.repeats,
        "load_before": load,
        "environment": environment,
        "processor": processor(),
        "threads": int(os.environ.get("OMP_NUM_THREADS", os.cpu_count() or 1)),
        "medians": medians,
        "measured": measured,
    }


def main(arguments: Sequence[str]) -> int:
    with one_line_errors():
        require_linux()
        known = comparisons()
        wanted, repeats, out = _settings(arguments, list(known))
        out.mkdir(parents=True, exist_ok=True)
        failed = 0
        for name in wanted:
            try:
                found = run(name, known[name], repeats)
            except RuntimeError as error:  # the other comparisons are worth their time all the same
                log.error("%s", error)
                failed += 1
                continue
            write_atomic(out / f"{name}.json", json.dumps(found, indent=1) + "\n")
            print("\n".join(lines(name, found)), flush=True)
            write_atomic(out / "README.md", page(out, list(known)))
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
