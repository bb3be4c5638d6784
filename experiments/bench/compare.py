"""What is compared: for each comparison its sides, the first being ours, each a call that measures itself.

A side runs in a fresh process; the sides take turns, `repeats` times, so that what else the machine does hits all.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

from experiments.bench import answers, loops, starts, steps
from experiments.bench.measure import Measured

SMOLLM2 = ["task=word_problems"]
FLOAT32 = "train.autocast=null"
IN_PARTS = "train.gradient.rows_at_once=2"
# Without power iterations: the kept-* comparisons show what they would add.
INCREMENTAL = ["train.gradient.mode=incremental", "train.gradient.power_iterations=0"]


def _starts(model: list[str], *, peft: bool = True, parts: Sequence[str] = ()) -> dict[str, Callable[[], Measured]]:
    """The start from factors and from whole matrices, and the others', which compute in float32 unless told."""
    sides: dict[str, Callable[[], Measured]] = {
        "incremental": partial(starts.ours, [*model, *INCREMENTAL, *parts]),
        "exact": partial(starts.ours, model),
        "plain": partial(starts.plain, model),
    }
    if peft:
        sides["incremental, float32"] = partial(starts.ours, [*model, *INCREMENTAL, *parts, FLOAT32])
        sides["PEFT"] = partial(starts.peft, model)
        sides["plain, float32"] = partial(starts.plain, [*model, FLOAT32])
        sides["PEFT, float32"] = partial(starts.peft, [*model, FLOAT32])
    return sides


def _limit(model: list[str]) -> dict[str, Callable[[], Measured]]:
    given = [*model, *INCREMENTAL]
    return {
        "incremental": partial(starts.ours, given),
        "its passes alone": partial(starts.passes_alone, given),
        "their matrix products alone": partial(starts.multiplications, given),
    }


@dataclass(frozen=True)
class Comparison:
    """`what` is measured; `repeats` how often by default; facts that the sides tell are shown under their names."""

    what: str
    sides: Mapping[str, Callable[[], Measured]]
    repeats: int = 5


def _kept(task: str) -> dict[str, Callable[[], Measured]]:
    ways = {
        "incremental": [*INCREMENTAL, IN_PARTS],
        "incremental, 1 power iteration": [*INCREMENTAL, IN_PARTS, "train.gradient.power_iterations=1"],
        "sketch, 2 passes": ["train.gradient.mode=sketch"],
        "sketch, 4 passes": ["train.gradient.mode=sketch", "train.gradient.passes=4"],
    }
    return {name: partial(starts.kept_energy, [f"task={task}"], way) for name, way in ways.items()}


def _training(task: str) -> dict[str, Callable[[], Measured]]:
    given = [f"task={task}"]
    return {
        "ours": partial(loops.ours, given),
        "ours, compiled": partial(loops.ours, [*given, "train.compile=true"]),
        "ours, float32": partial(loops.ours, [*given, FLOAT32]),
        "stock, fixed length, float32": partial(loops.stock, [*given, FLOAT32], fixed=True),
        "stock, dynamic, float32": partial(loops.stock, [*given, FLOAT32], fixed=False),
        "stock, dynamic, bf16": partial(loops.stock, given, fixed=False),
    }


def _llama(**sizes: int) -> list[str]:
    """A Llama of 4 layers of width 512, but for `sizes`."""
    shape = {"hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 4, "num_attention_heads": 8} | sizes
    shape.setdefault("num_key_value_heads", shape["num_attention_heads"])
    return ["task=word_problems", "model=llama_tiny", *(f"model.config.{key}={value}" for key, value in shape.items())]


SCALED = {
    "rank": {r: [*_llama(), f"method.r={r}"] for r in (4, 16, 64)},
    "width": {w: _llama(hidden_size=w, intermediate_size=w * 11 // 4) for w in (256, 512, 1024)},
    "layers": {n: _llama(num_hidden_layers=n) for n in (2, 4, 8)},
    "batch": {b: [*_llama(), f"train.gradient.batch_size={b}"] for b in (2, 8, 32)},
}


def _scaling(axis: str) -> dict[str, Callable[[], Measured]]:
    return {
        f"{way} {axis}={value}": partial(side, [*given, *more])
        for value, given in SCALED[axis].items()
        for way, side, more in (
            ("incremental", starts.ours, [*INCREMENTAL, IN_PARTS]),
            ("plain", starts.plain, []),
        )
    }


def _step_scaling() -> dict[str, Callable[[], Measured]]:
    cases = {f"r={r}": ([(1024, 1024)] * 8, r) for r in (4, 16, 64)}
    cases |= {f"width={w}": ([(w, w)] * 8, 8) for w in (256, 512, 2048)}
    cases |= {f"layers={n}": ([(1024, 1024)] * n, 8) for n in (2, 8, 32)}
    found: dict[str, Callable[[], Measured]] = {}
    for name, (layers, r) in cases.items():
        found[f"ours {name}"] = partial(steps.lora_pro, layers, r, "full")
        found[f"per layer {name}"] = partial(steps.per_layer_lora_pro, layers, r)
    return found


def _optimizers() -> dict[str, Comparison]:
    """One step of each optimizer on the adapters of SmolLM2-135M."""

    def on(side: Callable[..., Measured], *more: object) -> Callable[[], Measured]:
        return lambda: side(steps.shapes(["model=smollm2_135m"]), *more)

    return {
        "lora_pro-full": Comparison(
            "LoRA-Pro's full step on SmolLM2-135M's adapters, r = 8",
            {
                "ours": on(steps.lora_pro, 8, "full"),
                "per layer, pinv and eig": on(steps.per_layer_lora_pro, 8),
                "two moments read and written": on(steps.floor),
                "its multiplications as one matrix product": on(steps.multiplications, 8),
                "fused AdamW": on(steps.adamw, 8),
            },
        ),
        "lora_pro-efficient": Comparison(
            "LoRA-Pro's efficient step on SmolLM2-135M's adapters, r = 8",
            {
                "ours": on(steps.lora_pro, 8, "efficient"),
                "fused AdamW and the small matrices": on(steps.adamw_and_grams, 8),
                "fused AdamW": on(steps.adamw, 8),
            },
        ),
        "preconditioned": Comparison(
            "preconditioned AdamW's step on SmolLM2-135M's adapters, r = 8",
            {
                "ours": on(steps.scaled, 8),
                "PEFT's Riemannian": on(steps.riemannian, 8),
                "fused AdamW": on(steps.adamw, 8),
            },
        ),
    }


def comparisons() -> dict[str, Comparison]:
    """All of them, in the order they run."""
    return {
        "start-smollm2": Comparison(
            "LoRA-GA's start of SmolLM2-135M, 32 word problems", _starts(SMOLLM2, parts=[IN_PARTS]), 2
        ),
        "start-t5-base": Comparison(
            "LoRA-GA's start of T5-Base's shape (random weights), 32 film reviews",
            _starts([*starts.T5_BASE, "task=movies"]),  # reviews are short: parts would be merged for a few tokens
            2,
        ),
        "start-llama-1b": Comparison(
            "LoRA-GA's start of a Llama of 1.1 billion bf16 weights (random), 2 word problems",
            _starts(
                [*starts.LLAMA_1B, *SMOLLM2, "train.gradient.batch_size=1", "train.gradient.batches=2"], peft=False
            ),
            1,
        ),
        "limit-smollm2": Comparison(
            "LoRA-GA's start of SmolLM2-135M beside its forward and backward passes", _limit([*SMOLLM2, IN_PARTS]), 3
        ),
        "limit-t5-base": Comparison(
            "LoRA-GA's start of T5-Base's shape beside its forward and backward passes",
            _limit([*starts.T5_BASE, "task=movies"]),
            3,
        ),
        "kept-word_problems": Comparison("energy kept of SmolLM2's gradient, word problems", _kept("word_problems"), 1),
        "kept-movies": Comparison("energy kept of SmolLM2's gradient, film reviews", _kept("movies"), 1),
        **_optimizers(),
        "train-movies": Comparison("LoRA training of SmolLM2-135M on film reviews", _training("movies"), 3),
        "train-word_problems": Comparison(
            "LoRA training of SmolLM2-135M on word problems", _training("word_problems"), 2
        ),
        "answers": Comparison(
            f"greedy answers of SmolLM2-135M to {answers.PROBLEMS} word problems, at most {answers.TOKENS} tokens",
            {
                "batches of 24": partial(answers.ours, SMOLLM2, 24),
                "batches of 8": partial(answers.ours, SMOLLM2, 8),
                "one by one": partial(answers.one_by_one, SMOLLM2),
            },
            3,
        ),
        **{
            f"scaling-{axis}": Comparison(f"LoRA-GA's start against {axis}, random Llamas", _scaling(axis), 1)
            for axis in SCALED
        },
        "scaling-lora_pro": Comparison("LoRA-Pro's full step against rank, width and layers", _step_scaling(), 1),
    }
