"""From Hydra's groups to typed, checked settings: everything that can be refused is refused here, in one line."""

from __future__ import annotations

import dataclasses
import difflib
import logging
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

from hydra import compose, initialize_config_dir
from hydra.errors import HydraException, OverrideParseException
from hydra.utils import get_class
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import PositiveInt, TypeAdapter, ValidationError

from lora_ga.errors import SetupError
from lora_ga.methods.base import Method
from lora_ga.models import ModelSpec
from lora_ga.optim.steps import Steps
from lora_ga.records import content_hash
from lora_ga.training import TrainSettings

ROOT = Path(__file__).resolve().parents[1]
CONF = ROOT / "conf"
T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Task:
    """Which rows, how many, and the metric of the table."""

    name: str
    source: Literal["local", "glue"]
    metric: str
    sizes: Mapping[str, int | None]
    max_length: PositiveInt
    data_root: str | None = None


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """A template over the row's fields, and the words that stand for the labels."""

    template: str
    labels: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Protocol:
    """What makes two papers' numbers differ though method and task are the same."""

    name: str
    prompts: Mapping[str, Prompt]


@dataclass(frozen=True, kw_only=True)
class GradientSettings:
    """The rows behind the one-step gradient: the first batch_size x batches of the training set."""

    batch_size: PositiveInt
    batches: PositiveInt
    dropout: bool
    cache: bool


@dataclass(frozen=True, kw_only=True)
class EvalSettings:
    """What is scored after training."""

    split: Literal["validation", "test"]
    limit: PositiveInt | None
    batch_size: PositiveInt


@dataclass(frozen=True, kw_only=True)
class Seeds:
    """Three sources of chance, apart."""

    data: int
    adapter: int
    generation: int


@dataclass(frozen=True, kw_only=True)
class Logger:
    """Where a copy of the run goes."""

    name: Literal["none", "wandb"]
    mode: Literal["offline", "online"] = "offline"
    project: str = "lora-repro"
    entity: str | None = None


@dataclass(frozen=True, kw_only=True)
class Plain:
    """The keys of conf/config.yaml that belong to no group."""

    experiment_name: str
    seed: int
    records: str
    outputs: str
    export: bool


GROUPS = ("scale", "model", "task", "protocol", "method", "train", "eval", "launcher", "logger", "seeds")


@dataclass(frozen=True, kw_only=True)
class Launcher:
    """What starts the processes; one process is all there is so far."""

    name: Literal["none"]


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """One run. `resolved` is the whole configuration as plain data; `run_id` hashes what can change its numbers."""

    scale: str
    model: ModelSpec
    task: Task
    protocol: Protocol
    method_name: str
    method: Method
    train: TrainSettings
    gradient: GradientSettings
    eval: EvalSettings
    launcher: Launcher
    logger: Logger
    seed: int
    seeds: Seeds
    experiment_name: str
    records: Path
    outputs: Path
    export: bool
    resolved: Mapping[str, Any]

    @property
    def prompt(self) -> Prompt:
        return self.protocol.prompts[self.task.name]

    @property
    def run_id(self) -> str:
        part = {key: self.resolved[key] for key in ("scale", "model", "protocol", "method", "train", "seeds")}
        task = {k: v for k, v in self.resolved["task"].items() if k != "data_root"}
        scored = {k: v for k, v in self.resolved["eval"].items() if k != "batch_size"}
        part["protocol"] = {"name": self.protocol.name, "prompt": self.resolved["protocol"]["prompts"][self.task.name]}
        return content_hash({**part, "task": task, "eval": scored})

    @property
    def protocol_hash(self) -> str:
        return content_hash(self.resolved["protocol"])

    @property
    def records_folder(self) -> Path:
        return self.records / f"{self.experiment_name}-{self.scale}"


def _build(kind: type[T], values: Mapping[str, Any], where: str) -> T:
    """`kind(**values)` with unknown keys, missing keys and wrong types refused in one line that names the key."""
    where = f"{where}." if where else ""
    known = [field.name for field in dataclasses.fields(kind)]  # type: ignore[arg-type]
    for key in values:
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            hint = f"did you mean {near[0]}?" if near else f"known keys: {', '.join(known)}"
            raise SetupError(f"unknown key {where}{key}; {hint}")
    try:
        return TypeAdapter(kind).validate_python(dict(values))
    except ValidationError as error:
        first = error.errors()[0]
        path = where + ".".join(str(part) for part in first["loc"])
        given = "" if first["type"] == "missing" else f"={first['input']}"
        raise SetupError(f"{path}{given}: {first['msg']}") from error


def _build_target(base: type[T], values: Mapping[str, Any], where: str) -> T:
    settings = dict(values)
    target = settings.pop("_target_", None)
    try:
        kind = get_class(str(target))
    except Exception as error:
        raise SetupError(f"{where}._target_={target} names no class that can be imported") from error
    if not issubclass(kind, base):
        raise SetupError(f"{where}._target_={target} is not a {base.__name__}")
    if "steps" in settings:
        settings["steps"] = _build_target(Steps, settings["steps"], f"{where}.steps")  # type: ignore[type-abstract]
    return _build(kind, settings, where)


def parse(raw: Mapping[str, Any]) -> RunConfig:
    """Typed settings from a resolved configuration; SetupError, in one line, for anything wrong in it."""
    method = {k: v for k, v in raw["method"].items() if k != "name"}
    train = {k: v for k, v in raw["train"].items() if k != "gradient"}
    protocol = {
        **raw["protocol"],
        "prompts": {k: _build(Prompt, v, f"protocol.prompts.{k}") for k, v in raw["protocol"]["prompts"].items()},
    }
    plain = _build(Plain, {k: v for k, v in raw.items() if k not in GROUPS}, "")
    config = RunConfig(
        scale=raw["scale"]["name"],
        model=_build(ModelSpec, raw["model"], "model"),
        task=_build(Task, raw["task"], "task"),
        protocol=_build(Protocol, protocol, "protocol"),
        method_name=raw["method"]["name"],
        method=_build_target(Method, method, "method"),
        train=_build(TrainSettings, train, "train"),
        gradient=_build(GradientSettings, raw["train"]["gradient"], "train.gradient"),
        eval=_build(EvalSettings, raw["eval"], "eval"),
        launcher=_build(Launcher, raw["launcher"], "launcher"),
        logger=_build(Logger, raw["logger"], "logger"),
        seed=plain.seed,
        seeds=_build(Seeds, raw["seeds"], "seeds"),
        experiment_name=plain.experiment_name,
        records=ROOT / plain.records,
        outputs=ROOT / plain.outputs,
        export=plain.export,
        resolved=raw,
    )
    config.model.check()
    config.train.check()
    if config.task.name not in config.protocol.prompts:
        raise SetupError(
            f"protocol={config.protocol.name} has no prompt for task={config.task.name}; "
            f"it knows {', '.join(config.protocol.prompts)}"
        )
    return config


def compose_config(overrides: Sequence[str], name: str = "config") -> DictConfig:
    """conf/<name>.yaml with `overrides`, interpolations not yet resolved; SetupError, in one line, for a wrong one."""
    try:
        with initialize_config_dir(str(CONF), version_base=None):
            return compose(name, overrides=list(overrides))
    except OverrideParseException as error:
        raise SetupError(
            f"cannot read {error.override} ({str(error).splitlines()[0]}): "
            "put inner values that hold = in quotes, as in 'overrides=[\"train.max_steps=4\"]'"
        ) from error
    except (HydraException, OmegaConfBaseException) as error:
        text = " ".join(str(error).split())
        unknown = re.match(r"Could not override '([^']+)'\. To append", text)
        raise SetupError(
            f"unknown key {unknown[1]}: see conf/ for the known ones" if unknown else text[:300]
        ) from error


def resolve(composed: DictConfig) -> dict[str, Any]:
    """The resolved configuration as plain data."""
    try:
        return OmegaConf.to_container(composed, resolve=True)  # type: ignore[return-value]
    except OmegaConfBaseException as error:
        raise SetupError(" ".join(str(error).split())[:300]) from error


def load_config(overrides: Sequence[str]) -> RunConfig:
    """Compose and check the configuration of one run."""
    return parse(resolve(compose_config(overrides)))


@contextmanager
def one_line_errors() -> Iterator[None]:
    """Set logging up, and end the process with code 2 and one line on a SetupError."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s: %(message)s", datefmt="%H:%M:%S")
    for noisy in ("httpx", "datasets", "filelock", "urllib3"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    try:
        yield
    except SetupError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
