"""What SLURM is asked for: the group conf/slurm, typed and checked."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from pydantic import NonNegativeInt, PositiveInt

from experiments.config import CONF, build, compose_config, resolve
from lora_ga.engines import Engine
from lora_ga.errors import SetupError


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The keys are explained in conf/slurm/default.yaml."""

    partition: str | None
    account: str | int | None
    time: str
    gpus: NonNegativeInt
    cpus: PositiveInt
    memory: str | int | None
    extra: tuple[str, ...]
    setup: tuple[str, ...]
    throttle: PositiveInt
    signal_seconds: PositiveInt
    max_requeues: NonNegativeInt
    launcher: str
    nproc: PositiveInt

    def options(self) -> list[str]:
        """The options of sbatch that ask for what one run needs; extra ones come last and win."""
        asked = {
            "partition": self.partition,
            "account": self.account,
            "time": self.time,
            "gres": f"gpu:{self.gpus}" if self.gpus else None,
            "cpus-per-task": self.cpus,
            "mem": self.memory,
            "signal": f"B:USR1@{self.signal_seconds}",
        }
        options = [f"--{key}={value}" for key, value in asked.items() if value is not None]
        return ["--nodes=1", "--ntasks=1", *options, *self.extra]


def split(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """The arguments that set conf/slurm, and those that set the runs."""
    ours: list[str] = []
    runs: list[str] = []
    for argument in arguments:
        key = argument.lstrip("+~").partition("=")[0]
        if key in ("launcher", "nproc"):
            raise SetupError(f"{argument}: on a cluster say slurm.{argument}")
        (ours if key.partition(".")[0] == "slurm" else runs).append(argument)
    return ours, runs


def engine_of(settings: Settings) -> Engine:
    """What a run's processes will be held by."""
    chosen = [f"launcher={settings.launcher}", *([f"launcher.nproc={settings.nproc}"] if settings.nproc > 1 else [])]
    return build(Engine, resolve(compose_config(chosen))["launcher"], "launcher")


def read_settings(overrides: Sequence[str]) -> Settings:
    """conf/slurm under `overrides`; SetupError, in one line, for anything wrong in it."""
    settings = build(Settings, resolve(compose_config(overrides, "submit"))["slurm"], "slurm")
    known = sorted(path.stem for path in (CONF / "launcher").glob("*.yaml"))
    if settings.launcher not in known:
        raise SetupError(f"slurm.launcher={settings.launcher} is not one of {', '.join(known)}")
    return settings
