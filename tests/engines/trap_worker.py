"""Each silent trap of the engines, provoked on one DeepSpeed rank; started by test_traps.py.

What the training said goes to <folder>/said.json: trap -> message, "nothing" where it ended as if all were well.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any
from unittest.mock import PropertyMock, patch

import torch

from lora_ga import training as module
from lora_ga.engines import Engine, joined
from lora_ga.optim.steps import LoraPlus
from lora_ga.training import Resume
from tests.engines.training_worker import training

ENGINE = Engine(name="zero2", kind="deepspeed", stage=2, nproc=1)


def without_deepspeed() -> AbstractContextManager[Any]:
    """accelerate ends well without the engine if it is not told of it at the right time."""
    arguments = module.TrainingArguments
    return patch.object(module, "TrainingArguments", lambda **given: arguments(**{**given, "deepspeed": None}))


def optimizer_of_deepspeed() -> AbstractContextManager[Any]:
    """A DeepSpeed configuration with an optimizer of its own silently wins over the method's."""
    config = Engine.training_config
    own = {"optimizer": {"type": "Adam", "params": {"lr": 5e-3, "torch_adam": True}}}
    return patch.object(Engine, "training_config", lambda self, **given: config(self, **given) | own)


def flat_slices() -> AbstractContextManager[Any]:
    """ZeRO hands an optimizer flat slices; one that looks for its pairs finds no gradients and moves nothing."""
    return patch.object(Engine, "flattens", PropertyMock(return_value=False))


def empty_group() -> AbstractContextManager[Any]:
    """DeepSpeed drops empty parameter groups, and rates slide to other groups."""
    optimizer = LoraPlus.optimizer

    def with_empty(self: LoraPlus, *arguments: Any, **given: Any) -> torch.optim.Optimizer:
        made = optimizer(self, *arguments, **given)
        made.param_groups.insert(1, {**made.param_groups[0], "params": [], "lr": 1e-6})
        return made

    return patch.object(LoraPlus, "optimizer", with_empty)


TRAPS: dict[str, tuple[Callable[[], AbstractContextManager[Any]], str]] = {
    "without_deepspeed": (without_deepspeed, "lora"),
    "optimizer_of_deepspeed": (optimizer_of_deepspeed, "lora_pro"),
    "flat_slices": (flat_slices, "lora_pro"),
    "empty_group": (empty_group, "lora_plus"),
}


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    said = {}
    with joined(ENGINE):
        for name, (trap, method) in TRAPS.items():
            with trap():
                try:
                    training("causal", method, ENGINE, Resume(folder / name))
                    said[name] = "nothing"
                except Exception as error:
                    said[name] = f"{type(error).__name__}: {error}"
    (folder / "said.json").write_text(json.dumps(said))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
