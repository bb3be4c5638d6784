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
from typing import Any, TypeVar

from hydra import compose, initialize_config_dir
from hydra.errors import HydraException, OverrideParseException
from hydra.utils import get_class
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import TypeAdapter, ValidationError
from transformers.utils import is_flash_attn_2_available

from eval.decoding import Decoding
from eval.vllm_engine import require_vllm
from experiments.settings import (
    Answers,
    Benchmark,
    ChatAnswers,
    CodeAnswers,
    EvalSettings,
    GradientSettings,
    Logger,
    MathAnswers,
    Plain,
    Prompt,
    Protocol,
    Seeds,
    Task,
)
from lora_ga.compilation import check_compiler
from lora_ga.engines import Engine, device
from lora_ga.errors import SetupError
from lora_ga.hardware import AUTO, choose, has_bf16
from lora_ga.methods.base import Method
from lora_ga.models import ModelSpec
from lora_ga.optim.steps import Steps
from lora_ga.records import as_first, content_hash
from lora_ga.training import TrainSettings

ROOT = Path(__file__).resolve().parents[1]
CONF = ROOT / "conf"
T = TypeVar("T")


GROUPS = ("scale", "model", "task", "protocol", "scoring", "method", "train", "eval", "launcher", "logger", "seeds")
MEANS = ("batch_size", "generation_batch_size", "run_code", "code_workers")  # keys of eval that change no number


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """One run. `resolved` is the whole configuration as plain data; `run_id` hashes what can change its numbers."""

    scale: str
    model: ModelSpec
    task: Task
    protocol: Protocol
    scoring: Protocol
    method_name: str
    method: Method
    train: TrainSettings
    gradient: GradientSettings
    eval: EvalSettings
    launcher: Engine
    logger: Logger
    seed: int
    seeds: Seeds
    experiment_name: str
    records: Path
    outputs: Path
    export: bool
    checkpoint_every: int | None
    resolved: Mapping[str, Any]

    @property
    def prompt(self) -> Prompt:
        return self.protocol.prompts[self.task.name]

    @property
    def run_id(self) -> str:
        """Hash of all that can change the run's numbers."""
        scored = {k: v for k, v in self.resolved["eval"].items() if k not in MEANS}
        task = {k: v for k, v in self.resolved["task"].items() if k != "data_root"}
        part = {**self._trained_part, "task": task, "seeds": self.resolved["seeds"], "eval": scored}
        if self.task.kind == "generation":
            kinds = sorted({benchmark.kind for benchmark in self.benchmarks.values()})
            answers = {kind: self.resolved["scoring"]["answers"][kind] for kind in kinds}
            part["scoring"] = {"name": self.scoring.name, "answers": answers}
        return content_hash(part)

    @property
    def train_id(self) -> str:
        """Hash of all that can change the trained weights: runs that share it share one training."""
        return content_hash(self._trained_part)

    @property
    def _trained_part(self) -> dict[str, Any]:
        raw = self.resolved
        part = {key: raw[key] for key in ("scale", "model", "method", "train")}
        part["train"] = as_first(raw["train"])
        part["seeds"] = {key: raw["seeds"][key] for key in ("data", "adapter")}
        part["task"] = {key: raw["task"][key] for key in ("name", "source", "sizes", "max_length")}
        part["task"]["max_tokens"] = self.task.max_tokens
        part["protocol"] = {"name": self.protocol.name, "prompt": raw["protocol"]["prompts"][self.task.name]}
        return part

    @property
    def protocol_hash(self) -> str:
        return content_hash([self.resolved["protocol"], self.resolved["scoring"]])

    @property
    def benchmarks(self) -> dict[str, Benchmark]:
        """The benchmarks to run: those of the task, or the ones eval.benchmarks names."""
        chosen = self.eval.benchmarks
        return {name: b for name, b in self.task.benchmarks.items() if chosen is None or name in chosen}

    def limit(self, benchmark: Benchmark) -> int | None:
        """How many problems of a benchmark are asked: the smaller of its own rows and eval.limit."""
        return min((limit for limit in (self.eval.limit, benchmark.rows) if limit is not None), default=None)

    @property
    def records_folder(self) -> Path:
        return self.records / f"{self.experiment_name}-{self.scale}"


def build(kind: type[T], values: Mapping[str, Any], where: str) -> T:
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
    return build(kind, settings, where)


def _task(raw: Mapping[str, Any]) -> Task:
    benchmarks = {k: build(Benchmark, v, f"task.benchmarks.{k}") for k, v in raw.get("benchmarks", {}).items()}
    return build(Task, {**raw, "benchmarks": benchmarks}, "task")


def _protocol(raw: Mapping[str, Any], where: str) -> Protocol:
    kinds = {"math": MathAnswers, "code": CodeAnswers, "chat": ChatAnswers}
    answers: dict[str, Any] = {}
    for key, values in raw["answers"].items():
        if key not in kinds:
            raise SetupError(f"unknown key {where}.answers.{key}; known keys: {', '.join(kinds)}")
        at = f"{where}.answers.{key}"
        decoding = build(Decoding, values["decoding"], f"{at}.decoding")
        decoding.check()
        answers[key] = build(kinds[key], {**values, "decoding": decoding}, at)
    prompts = {k: build(Prompt, v, f"{where}.prompts.{k}") for k, v in raw["prompts"].items()}
    return build(Protocol, {**raw, "answers": Answers(**answers), "prompts": prompts}, where)


def require_means(config: RunConfig) -> None:
    """SetupError unless compiler, attention and the benchmarks' engine are installed, and programs they run allowed."""
    if config.train.compile:
        check_compiler(device().type)
    if config.model.attn_implementation == "flash_attention_2" and not is_flash_attn_2_available():
        raise SetupError("model.attn_implementation=flash_attention_2 needs a GPU and pip install flash-attn: use sdpa")
    if config.benchmarks and config.eval.engine == "vllm":
        require_vllm()
    code = [name for name, benchmark in config.benchmarks.items() if benchmark.kind == "code"]
    if code and not config.eval.run_code:
        raise SetupError(
            f"{code[0]} runs programs that the model writes: allow it with eval.run_code=true (eval/sandbox.py says "
            "what the isolation covers), or leave it out with eval.benchmarks=[]"
        )


def check_engine(config: RunConfig, engine: Engine) -> None:
    """SetupError if the run cannot be what it is under this engine."""
    engine.check()
    if config.train.compile and engine.kind != "none":
        raise SetupError(f"train.compile=true runs on one process, not under launcher={engine.name}: set it to false")
    config.train.micro_batch(engine.nproc)
    config.method.check_engine(engine)
    # The engine takes the update for a gradient, which has the weights' precision there.
    if config.method.steps.whole_matrices and engine.shards_weights and config.model.dtype == "bfloat16":
        raise SetupError(
            f"{type(config.method.steps).__name__} steps would be rounded to bfloat16 under ZeRO-3: "
            "use launcher=zero2, or model.dtype=float32 with train.autocast=bfloat16"
        )


def _chosen(raw: Mapping[str, Any]) -> Mapping[str, Any]:
    """`raw` with each `auto` replaced by what this machine's device asks for.

    So ids and records hold what is computed with: machines that choose alike share runs, others do not.
    """
    asked = {"model": "attn_implementation", "train": "autocast"}
    if all(raw[group].get(key) != AUTO for group, key in asked.items()):
        return raw
    here = device()
    choice = choose(here.type, bf16=has_bf16(here), length=raw["task"]["max_length"])
    settled = dict(raw)
    for group, key in asked.items():
        if raw[group].get(key) == AUTO:
            settled[group] = {**raw[group], key: getattr(choice, key)}
    return settled


def parse(raw: Mapping[str, Any]) -> RunConfig:
    """Typed settings from a resolved configuration; SetupError, in one line, for anything wrong in it."""
    raw = _chosen(raw)
    method = {k: v for k, v in raw["method"].items() if k != "name"}
    train = {k: v for k, v in raw["train"].items() if k != "gradient"}
    plain = build(Plain, {k: v for k, v in raw.items() if k not in GROUPS}, "")
    config = RunConfig(
        scale=raw["scale"]["name"],
        model=build(ModelSpec, raw["model"], "model"),
        task=_task(raw["task"]),
        protocol=_protocol(raw["protocol"], "protocol"),
        scoring=_protocol(raw["scoring"], "scoring"),
        method_name=raw["method"]["name"],
        method=_build_target(Method, method, "method"),
        train=build(TrainSettings, train, "train"),
        gradient=build(GradientSettings, raw["train"]["gradient"], "train.gradient"),
        eval=build(EvalSettings, raw["eval"], "eval"),
        launcher=build(Engine, raw["launcher"], "launcher"),
        logger=build(Logger, raw["logger"], "logger"),
        seed=plain.seed,
        seeds=build(Seeds, raw["seeds"], "seeds"),
        experiment_name=plain.experiment_name,
        records=ROOT / plain.records,
        outputs=ROOT / plain.outputs,
        export=plain.export,
        checkpoint_every=plain.checkpoint_every,
        resolved=raw,
    )
    if config.eval.judge is not None:
        config.eval.judge.check()
    config.model.check()
    config.train.check()
    config.gradient.check()
    if config.train.alignment_every:
        config.method.check_alignment()
    check_engine(config, config.launcher)
    unknown = set(config.eval.benchmarks or ()) - set(config.task.benchmarks)
    if unknown:
        known = ", ".join(config.task.benchmarks) or "none"
        raise SetupError(f"eval.benchmarks names {sorted(unknown)[0]}, task={config.task.name} has {known}")
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
