"""What a sweep consists of, with model and data untouched: `python -m experiments.plan experiment=glue scale=paper`.

With memory=true also what its runs take under each launcher, of nproc=<ranks>.
"""

from __future__ import annotations

import copy
import itertools
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from experiments.config import RunConfig, compose_config, one_line_errors, parse, resolve
from experiments.memory import memory_table
from lora_ga.errors import SetupError
from lora_ga.records import read_record, record_name


@dataclass(frozen=True)
class PlannedRun:
    """One run of a sweep: the overrides that make it, and the settings they give."""

    overrides: tuple[str, ...]
    config: RunConfig

    @property
    def record(self) -> Path:
        """Where its record will be."""
        run = self.config
        return run.records_folder / record_name(run.task.name, run.method_name, run.seed, run.run_id)

    @property
    def label(self) -> str:
        run = self.config
        scored = "" if run.scoring.name == run.protocol.name else f" scored under {run.scoring.name}"
        return f"{run.task.name} {run.method_name} lr={run.train.learning_rate:g} seed={run.seed}{scored}"

    @property
    def state(self) -> str:
        """ "pending", or what its record says: finished, failed, diverged; a damaged record counts as pending."""
        try:
            return read_record(self.record).status if self.record.exists() else "pending"
        except ValueError:
            return "pending"


def _rates(name: str, settings: Mapping[str, Any]) -> Sequence[float]:
    if set(settings) - {"learning_rate", "overrides"} or "learning_rate" not in settings:
        raise SetupError(f"experiment method {name}: give learning_rate: [..] and, if need be, overrides: [..]")
    return settings["learning_rate"]


def expand(overrides: Sequence[str]) -> list[PlannedRun]:
    """The runs of conf/sweep.yaml with `overrides`, seeds outermost, so that one whole table is there first."""
    sweep = resolve(compose_config(overrides, "sweep"))
    scale, name = sweep["scale"]["name"], sweep["experiment"]["name"]
    if scale not in sweep["experiment"]:
        raise SetupError(f"experiment={name} has no scale={scale}: its file conf/experiment/{name}.yaml says which")
    fixed = {override.partition("=")[0] for override in sweep["overrides"]}
    if "seed" in fixed:
        raise SetupError("overrides sets seed, which a sweep counts itself: use seeds=<how many>")
    table = sweep["experiment"][scale]
    protocols = [[f"protocol@scoring={name}"] for name in table.get("scored_under", ())] or [[]]
    cells = [
        (composed, chosen, rate)
        for task, (method, settings), scored in itertools.product(table["tasks"], table["methods"].items(), protocols)
        for composed, chosen in [_compose(sweep, (f"task={task}", f"method={method}", *scored), settings)]
        for rate in ([None] if "train.learning_rate" in fixed else _rates(method, settings))
    ]
    return [
        _planned(composed, chosen, seed, rate)
        for seed in range(sweep["seeds"] or table["seeds"])
        for composed, chosen, rate in cells
    ]


def _compose(
    sweep: Mapping[str, Any], cell: Sequence[str], settings: Mapping[str, Any]
) -> tuple[DictConfig, tuple[str, ...]]:
    """One cell's task, method and protocol, and the overrides that say so; slow, so done once for seeds and rates."""
    chosen = (
        f"scale={sweep['scale']['name']}",
        *sweep["experiment"][sweep["scale"]["name"]]["overrides"],
        *cell,
        f"experiment_name={sweep['experiment']['name']}",
        f"records={sweep['records']}",
        f"outputs={sweep['outputs']}",
        *settings.get("overrides", ()),
        *sweep["overrides"],
    )
    # A group has to be chosen before a key inside it is set: task.sizes.train=.. must follow task=..
    ordered = tuple(sorted(chosen, key=lambda override: "." in override.partition("=")[0]))
    return compose_config(ordered), ordered


def _planned(composed: DictConfig, chosen: tuple[str, ...], seed: int, rate: float | None) -> PlannedRun:
    """The cell with one seed and one learning rate; None leaves the rate that an override of the sweep has set."""
    cell = copy.deepcopy(composed)
    cell.seed = seed
    if rate is not None:
        cell.train.learning_rate = rate
        chosen = (*chosen, f"train.learning_rate={rate}")
    return PlannedRun((*chosen, f"seed={seed}"), parse(resolve(cell)))


def main(arguments: Sequence[str]) -> None:
    """Print one line a run, then their number."""
    with one_line_errors():
        runs = expand(arguments)
        print(f"{'task':<15}{'method':<20}{'model':<14}{'protocol':<10}{'lr':>9}{'seed':>6}  {'run id':<14}state")
        for run in runs:
            c = run.config
            print(
                f"{c.task.name:<15}{c.method_name:<20}{c.model.name:<14}{c.scoring.name:<10}"
                f"{c.train.learning_rate:>9g}{c.seed:>6}  {c.run_id:<14}{run.state}"
            )
        finished = sum(run.state == "finished" for run in runs)
        print(f"{len(runs)} runs, {finished} finished")
        settings = compose_config(arguments, "sweep")
        if settings.memory:
            print(*memory_table([run.config for run in runs], settings.nproc), sep="\n")


if __name__ == "__main__":
    main(sys.argv[1:])
