"""A training's state at a step boundary: written whole or not at all, taken back only by the training it belongs to.

<folder>/checkpoint-<step>/ holds the trainable parameters and the frozen start (without it the adapters of LoRA-GA and
PiSSA mean nothing), optimizer, schedule, random state of every rank, transformers' trainer_state.json and
checkpoint.json: step, curve and `identity`, which says what is being trained. ZeRO-2 and 3 add DeepSpeed's own files.
"""

from __future__ import annotations

import json
import os
import random
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from lora_ga.engines import is_main, rank, wait_for_all, whole
from lora_ga.errors import SetupError
from lora_ga.records import write_atomic

META = "checkpoint.json"


def latest(folder: Path) -> Path | None:
    """The newest whole checkpoint under `folder`; what a kill left half-written has another name."""
    whole_ones = [path.parent for path in folder.glob(f"checkpoint-*/{META}")]
    return max(whole_ones, key=lambda path: int(path.name.removeprefix("checkpoint-")), default=None)


def read_meta(checkpoint: Path, identity: Mapping[str, Any]) -> dict[str, Any]:
    """checkpoint.json; SetupError, naming what differs, if it belongs to another training."""
    meta: dict[str, Any] = json.loads((checkpoint / META).read_text())
    kept = meta["identity"]
    other = [key for key in {**kept, **identity} if kept.get(key) != identity.get(key)]
    if other:
        key = sorted(other)[0]
        raise SetupError(
            f"{checkpoint} was written with {key}={kept.get(key)} and this run has {identity.get(key)}: "
            "run it as before, or delete the checkpoint to start anew"
        )
    return meta


def random_file() -> str:
    """Name of the file of this rank's generators."""
    return f"random-{rank()}.pt"


def random_state() -> dict[str, Any]:
    """Every generator this process draws from."""
    state = {"python": random.getstate(), "numpy": np.random.get_state(), "torch": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def set_random_state(state: Mapping[str, Any]) -> None:
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
    torch.set_rng_state(state["torch"])
    if torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


def load_random_state(checkpoint: Path) -> None:
    """This rank's generators as they were."""
    set_random_state(torch.load(checkpoint / random_file(), weights_only=False))  # numpy's is no tensor


class Writer:
    """Writes one checkpoint: every rank adds its part, then `close` makes it visible and drops the older ones."""

    def __init__(self, folder: Path, step: int) -> None:
        self.final = folder / f"checkpoint-{step}"
        self.folder = folder / f".writing-{step}"
        if is_main():
            shutil.rmtree(self.folder, ignore_errors=True)
            self.folder.mkdir(parents=True)
        wait_for_all()

    def tensors(self, name: str, parameters: Mapping[str, nn.Parameter]) -> None:
        """Whole parameters as <name>.safetensors, from the main rank."""
        with whole(parameters.values()):
            if is_main():
                kept = {key: parameter.detach().cpu().contiguous() for key, parameter in parameters.items()}
                save_file(kept, self.folder / f"{name}.safetensors")

    def state(self, name: str, value: Any) -> None:
        """A state dict as file `name`: each rank's own where the name ends in its number, else the main rank's."""
        if is_main() or name.endswith(f"-{rank()}.pt"):
            torch.save(value, self.folder / name)

    def close(self, meta: Mapping[str, Any]) -> None:
        wait_for_all()
        if is_main():
            write_atomic(self.folder / META, json.dumps(meta))
            for path in self.folder.rglob("*"):
                if path.is_file():
                    _to_disk(path)
            shutil.rmtree(self.final, ignore_errors=True)
            self.folder.rename(self.final)
            _to_disk(self.final.parent)
            for old in self.final.parent.glob("checkpoint-*"):
                if old != self.final:
                    shutil.rmtree(old, ignore_errors=True)
        wait_for_all()


def _to_disk(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def load_tensors(checkpoint: Path, name: str, shapes: Mapping[str, torch.Size]) -> dict[str, torch.Tensor]:
    """The tensors kept under `name`; SetupError if they are not those of `shapes`."""
    kept = load_file(checkpoint / f"{name}.safetensors")
    if {key: tensor.shape for key, tensor in kept.items()} != dict(shapes):
        raise SetupError(f"{checkpoint} holds other parameters than this run has: delete it to start anew")
    return kept


def discard(folder: Path) -> None:
    """Delete the checkpoints of a training that is done with."""
    if is_main():
        for path in (*folder.glob("checkpoint-*"), *folder.glob(".writing-*")):
            shutil.rmtree(path, ignore_errors=True)
