"""What a run takes in memory on each rank, from the architecture and the method alone: no weight is loaded.

Peak = framework + the larger of the start (one-step gradient) and the training (weights, gradients, optimizer state,
activations at full length). Tests hold it to within 25 % of measured peaks of live memory, one process on a CPU, whose
allocator may hold more in gaps; under the launchers it is arithmetic, with one copy of the gradients for communication.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from experiments.config import RunConfig
from lora_ga.adapters import target_linears
from lora_ga.errors import SetupError
from lora_ga.methods.adalora import AdaLora
from lora_ga.methods.lora import Lora
from lora_ga.methods.lora_ga import LoraGA
from lora_ga.methods.lora_one import LoraOne
from lora_ga.models import DTYPES, skeleton
from lora_ga.optim.lora_pro import CHUNK_BYTES_CPU
from lora_ga.optim.steps import MOMENT_DTYPES, LoraPro, Scaled

FRAMEWORK = 700 * 2**20  # python, torch, transformers and PEFT imported, on a CPU; a CUDA context is like it
LABEL_TOKENS = 3  # of a label word and its end
ANSWER_SHARE = 0.5  # of max_length, where a task is answered in words
FLOAT32, BFLOAT16 = 4, 2
LAUNCHERS = ("none", "ddp", "zero2", "zero3", "zero2_offload", "zero3_offload")


@dataclass(frozen=True)
class Model:
    """Sizes of an architecture, in parameters, and what its activations depend on."""

    base: int
    linears: int
    largest: int
    targets: tuple[tuple[int, int], ...]  # (d_out, d_in)
    hidden: int
    intermediate: int
    heads: int
    layers: int
    vocabulary: int
    tied: bool

    @classmethod
    def of(cls, config: RunConfig) -> Model:
        """Read off the meta device."""
        model = skeleton(config.model)
        c: Any = model.config
        linears = [module for module in model.modules() if isinstance(module, nn.Linear)]
        targets = target_linears(model, config.model.target_modules).values()
        seq2seq = config.model.architecture == "seq2seq"
        return cls(
            base=sum(p.numel() for p in model.parameters()),
            linears=sum(linear.weight.numel() for linear in linears),
            largest=max(p.numel() for p in model.parameters()),
            targets=tuple((linear.out_features, linear.in_features) for linear in targets),
            hidden=c.d_model if seq2seq else c.hidden_size,
            intermediate=c.d_ff if seq2seq else c.intermediate_size,
            heads=c.num_heads if seq2seq else c.num_attention_heads,
            layers=c.num_layers if seq2seq else c.num_hidden_layers,  # T5's decoder reads a label of few tokens
            vocabulary=c.vocab_size,
            tied=len(linears) > 0 and bool(c.tie_word_embeddings),
        )

    @property
    def target_weights(self) -> int:
        return sum(d_out * d_in for d_out, d_in in self.targets)


@dataclass(frozen=True)
class Estimate:
    """Bytes of one run: `peak` on the rank's device, `host` in the CPU's memory where a launcher moves things there."""

    trainable: int  # parameters
    optimizer_state: int
    peak: int
    host: int


def trainable_parameters(config: RunConfig, model: Model) -> int:
    """Numbers that training moves."""
    method = config.method
    if not isinstance(method, Lora):
        return model.base
    if isinstance(method, AdaLora):
        return sum(method.init_r * (d_out + d_in + 1) for d_out, d_in in model.targets)  # lora_E has one a rank
    magnitudes = sum(d_out for d_out, _ in model.targets) if method.use_dora else 0
    return sum(method.r * (d_out + d_in) for d_out, d_in in model.targets) + magnitudes


def optimizer_state(config: RunConfig, model: Model) -> int:
    """Bytes of both moments, on one process."""
    steps = config.method.steps
    trainable = trainable_parameters(config, model)
    if isinstance(steps, LoraPro):
        size = MOMENT_DTYPES[steps.moment_dtype].itemsize
        return 2 * size * (model.target_weights if steps.mode == "full" else trainable)
    return 2 * trainable * (FLOAT32 if isinstance(steps, Scaled) else _trainable_size(config))


def _trainable_size(config: RunConfig) -> int:
    """Bytes of a trainable number: PEFT keeps adapters in float32, whatever the base has."""
    return FLOAT32 if isinstance(config.method, Lora) else DTYPES[config.model.dtype].itemsize


def _compute_size(config: RunConfig) -> int:
    return BFLOAT16 if config.train.autocast else DTYPES[config.model.dtype].itemsize


def activations(config: RunConfig, model: Model, rows: int, *, everything: bool) -> int:
    """Bytes kept for the backward pass of `rows` rows at full length, with the output layer's at scored positions.

    A layer keeps, a token: both norms' inputs and outputs, q, the repeated k and v, attention's output (8 hidden),
    gate, its SiLU, up and their product (4 intermediate), eager attention's probabilities; and with `everything` (every
    weight trains) what the norms multiply their weights with. One layer more is at work in the backward pass.
    """
    tokens, size = rows * config.task.max_length, _compute_size(config)
    stream = DTYPES[config.model.dtype].itemsize
    layer = (3 + 2 * everything) * stream * model.hidden + 5 * size * model.hidden + 4 * size * model.intermediate
    if config.model.attn_implementation == "eager":
        softmax = size if size == FLOAT32 else size + FLOAT32  # it is computed in float32
        layer += softmax * model.heads * config.task.max_length
    answers = config.task.kind == "generation"
    scored = rows * (int(ANSWER_SHARE * config.task.max_length) if answers else LABEL_TOKENS)
    logits = scored * model.vocabulary * (3 * FLOAT32 + (0 if size == FLOAT32 else 2 * size))
    return int((model.layers + 1) * layer * tokens + logits + casts(config, model))


def casts(config: RunConfig, model: Model) -> int:
    """Bytes of the linears' weights in autocast's type."""
    return BFLOAT16 * model.linears if config.train.autocast and config.model.dtype == "float32" else 0


def _moving(config: RunConfig, model: Model) -> int:
    """Bytes that exist only while gradients turn into steps."""
    trainable, size = trainable_parameters(config, model), _trainable_size(config)
    if isinstance(config.method.steps, LoraPro | Scaled):
        return 16 * FLOAT32 * trainable + 2 * CHUNK_BYTES_CPU  # stacked factors, float64 copies, two chunks of G
    if isinstance(config.method, AdaLora):
        return 3 * size * trainable  # importance, its mean and its spread
    return size * model.vocabulary * model.hidden if model.tied and not isinstance(config.method, Lora) else 0


def _start(config: RunConfig, model: Model) -> int:
    """Bytes of the one-step gradient: of all targets at once, whole or in factors, and two more that are being made."""
    method, settings = config.method, config.gradient
    if not isinstance(method, LoraGA | LoraOne):
        return 0
    k = method.gradient_columns
    sizes = [d_out * d_in if settings.mode == "exact" else k * (d_out + d_in) for d_out, d_in in model.targets]
    kept = (DTYPES[settings.dtype].itemsize if settings.mode == "exact" else FLOAT32) * sum(sizes)
    rows = min(settings.batch_size, settings.rows_at_once or settings.batch_size)
    return kept + 2 * FLOAT32 * max(sizes) + activations(config, model, rows, everything=False)


def estimate(config: RunConfig, model: Model, launcher: str, ranks: int) -> Estimate:
    """What one of `ranks` ranks takes (launcher "none" has one).

    DDP keeps all on every rank, and a bucket as large as the gradients; LoRA-Pro's full moments are dealt out by pair.
    ZeRO-2 divides optimizer state, its float32 master copy and gradients; ZeRO-3 the weights too, frozen or not, and
    gathers one at a time. Offload moves state and master copy, with ZeRO-3 also the weights, to the CPU.
    """
    ranks = 1 if launcher == "none" else ranks
    zero3 = launcher.startswith("zero3")
    zero = zero3 or launcher.startswith("zero2")
    method, trainable, size = config.method, trainable_parameters(config, model), _trainable_size(config)
    pairs = isinstance(method.steps, LoraPro) and method.steps.mode == "full"

    adapters = 0 if not isinstance(method, Lora) else FLOAT32 * trainable * (2 if method.keeps_function else 1)
    weights = DTYPES[config.model.dtype].itemsize * model.base + adapters
    gathered = DTYPES[config.model.dtype].itemsize * model.largest if zero3 else 0
    weights = weights // ranks if zero3 else weights
    state = optimizer_state(config, model) // (ranks if zero or pairs else 1)
    master = FLOAT32 * trainable // ranks if zero else 0
    gradients = size * trainable // (ranks if zero else 1)
    bucket = size * trainable if launcher != "none" else 0
    working = activations(
        config, model, config.train.per_device_train_batch_size, everything=not isinstance(method, Lora)
    )
    host = 0
    if launcher.endswith("_offload"):
        host, state, master = state + master, 0, 0
        if zero3:
            host, weights = host + weights, 0
    # Gradients come as activations go: both are whole at no time, but for the output layer's, which is the first.
    first = size * min(trainable, model.largest)
    kept = casts(config, model) if isinstance(method, Lora) and launcher in ("none", "ddp") else 0  # lora_ga/precast.py
    training = state + master + bucket + max(working + first, gradients + kept + _moving(config, model))
    peak = FRAMEWORK + weights + gathered + max(training, _start(config, model))
    return Estimate(trainable, optimizer_state(config, model) // (ranks if zero or pairs else 1), peak, host)


def memory_table(configs: Sequence[RunConfig], ranks: int) -> list[str]:
    """Lines of a table: runs that differ in seed and learning rate alone take the same and have one line."""
    if not isinstance(ranks, int) or ranks < 1:
        raise SetupError(f"nproc={ranks}: use a number of ranks, 1 or more")
    kinds = {(config.task.name, config.method_name, config.model.name): config for config in configs}
    models = {config.model.name: Model.of(config) for config in kinds.values()}
    head = f"{'task':<15}{'method':<20}{'model':<14}{'trainable':>13}{'state MB':>10}"
    lines = [
        "",
        f"Memory at full length, peak MB of one of {ranks} ranks (none: of one process); +: on its CPU instead",
        head + "".join(f"{name:>15}" for name in LAUNCHERS),
    ]
    for (task, method, name), config in kinds.items():
        found = [estimate(config, models[name], launcher, ranks) for launcher in LAUNCHERS]
        cells = (f"{e.peak / 2**20:,.0f}" + (f" + {e.host / 2**20:,.0f}" if e.host else "") for e in found)
        one = found[0]
        state = f"{one.optimizer_state / 2**20:,.1f}"
        lines.append(
            f"{task:<15}{method:<20}{name:<14}{one.trainable:>13,}{state:>10}" + "".join(f"{c:>15}" for c in cells)
        )
    return lines
