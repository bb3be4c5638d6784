"""Training speed on real rows: our trainer, and the stock transformers Trainer with PEFT's LoRA on the same rows.

The stock loop is what a tutorial shows: rows padded to max_length (fixed) or to the longest of their batch (dynamic),
labels -100 on prompt and padding, the model's own loss over all positions. Tokens are those that were read and are not
padding; the first step, in which libraries set themselves up, is not timed.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import Trainer, TrainerCallback, TrainingArguments

from experiments.bench.measure import Measured, measure
from experiments.config import RunConfig, load_config
from experiments.rows import Encoded, Rows
from lora_ga.data.encoding import IGNORED, EncodedRow, EncodedRows
from lora_ga.methods.base import Setup
from lora_ga.methods.lora import Lora
from lora_ga.models import Loaded, load_model
from lora_ga.trainer import Resume
from lora_ga.training import train

STEPS = 5


def case(overrides: Sequence[str]) -> tuple[RunConfig, Loaded, Encoded]:
    """A LoRA run of STEPS steps on as many rows as they take, so that every loop reads the same tokens."""
    config = load_config(["method=lora", *overrides])
    loaded = load_model(config.model)
    encoded = Encoded.of(config, loaded, Rows.load(config))
    rows = encoded.train.rows[: STEPS * config.train.global_batch_size]
    return config, loaded, Encoded(EncodedRows(rows), [], encoded.collator)


def _facts(curve: Sequence[dict[str, float]]) -> dict[str, float]:
    first, last = curve[0], curve[-1]
    return {
        "tokens_per_second": (last["tokens"] - first["tokens"]) / (last["seconds"] - first["seconds"]),
        "last_loss": last["loss"],
    }


def ours(overrides: Sequence[str]) -> Measured:
    """The training of a run."""
    config, loaded, encoded = case(overrides)
    setup = Setup(config.model.target_modules, dict, 0, STEPS, config.train.autocast is None)  # type: ignore[arg-type]
    model = config.method.prepare(loaded.model, setup)

    def work() -> Any:
        with tempfile.TemporaryDirectory() as folder:
            resume = Resume(Path(folder))
            return train(model, encoded.train, encoded.collator, config.method, config.train, seed=0, resume=resume)

    return measure(work, facts=lambda result: _facts(result[0].loss_curve))


class _Clock(TrainerCallback):
    def __init__(self, batches: list[int]) -> None:
        self.batches = batches
        self.curve: list[dict[str, float]] = []
        self.began = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        read = sum(self.batches[: state.global_step])
        self.curve.append({"tokens": read, "seconds": time.perf_counter() - self.began, "loss": float("nan")})

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if "loss" in kwargs["logs"]:
            self.curve[-1]["loss"] = float(kwargs["logs"]["loss"])


def stock(overrides: Sequence[str], *, fixed: bool) -> Measured:
    """transformers' Trainer and PEFT, in train.autocast's precision."""
    config, loaded, encoded = case(overrides)
    assert isinstance(config.method, Lora)
    lora = LoraConfig(r=config.method.r, lora_alpha=16, target_modules=list(config.model.target_modules))
    pad, read = int(loaded.tokenizer.pad_token_id), []

    def collate(rows: Sequence[EncodedRow]) -> dict[str, torch.Tensor]:
        texts = [[*row.prompt, *row.target] for row in rows]
        labels = [[*[IGNORED] * len(row.prompt), *row.target] for row in rows]
        read.append(sum(map(len, texts)) - len(texts))  # ours does not read a row's last token, which nothing follows
        width = config.task.max_length if fixed else max(map(len, texts))

        def block(cells: Sequence[list[int]], filler: int) -> torch.Tensor:
            return torch.tensor([cell + [filler] * (width - len(cell)) for cell in cells])

        mask = block([[1] * len(text) for text in texts], 0)
        return {"input_ids": block(texts, pad), "attention_mask": mask, "labels": block(labels, IGNORED)}

    clock = _Clock(read)

    def work() -> None:
        with tempfile.TemporaryDirectory() as folder:
            size = config.train.global_batch_size
            arguments = TrainingArguments(
                output_dir=folder,
                max_steps=STEPS,
                per_device_train_batch_size=size,
                learning_rate=config.train.learning_rate,
                lr_scheduler_type="cosine",
                bf16=config.train.autocast is not None,
                use_cpu=not torch.cuda.is_available(),
                logging_steps=1,
                report_to=[],
                save_strategy="no",
                remove_unused_columns=False,
                disable_tqdm=True,
            )
            model = get_peft_model(loaded.model, lora)
            Trainer(
                model=model, args=arguments, train_dataset=encoded.train, data_collator=collate, callbacks=[clock]
            ).train()

    return measure(work, facts=lambda _: _facts(clock.curve))
