"""A trained model between training and scoring, so that a killed scoring, or another protocol, trains nothing anew.

Only trainable parameters are written, to <outputs>/trained/<train id>. They are taken back only onto the very start
they came from; anything else trains again.
"""

from __future__ import annotations

import hashlib
import json
import logging
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from lora_ga.adapters import trainable
from lora_ga.engines import whole
from lora_ga.records import RunRecord, write_atomic

log = logging.getLogger(__name__)

COSTS = ("train_seconds", "trainable_parameters", "optimizer_state_mb", "peak_memory_mb")


def _copies(model: nn.Module) -> dict[str, torch.Tensor]:
    tensors = {}
    for name, parameter in trainable(model).items():
        with whole([parameter]):
            tensors[name] = parameter.detach().cpu().clone(memory_format=torch.contiguous_format)
    return tensors


def fingerprint(model: nn.Module) -> str:
    """16 hex digits of the sha256 of the trainable parameters, names and bytes."""
    digest = hashlib.sha256()
    for name, tensor in sorted(_copies(model).items()):
        digest.update(name.encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def save(folder: Path, model: nn.Module, record: RunRecord, start: str) -> None:
    """Keep the trained parameters and what the record knows of the training; `start` names what it began from."""
    folder.mkdir(parents=True, exist_ok=True)
    temporary = folder / "trained.tmp"
    save_file(_copies(model), temporary)
    temporary.replace(folder / "trained.safetensors")
    known = {
        "start": start,
        "trained": fingerprint(model),
        "commit": record.environment["git_commit"],
        "loss_curve": record.loss_curve,
        "adapters": record.adapters,
        "held_out_loss": record.step0.get("held_out_loss"),
        "cost": {key: record.cost[key] for key in COSTS},
    }
    write_atomic(folder / "trained.json", json.dumps(known))


@torch.no_grad()
def restore(folder: Path, model: nn.Module, record: RunRecord, start: str) -> bool:
    """Put kept parameters into a prepared model and its training into the record; False if there are none that fit."""
    try:
        known = json.loads((folder / "trained.json").read_text())
        kept = load_file(folder / "trained.safetensors")
    except (OSError, ValueError):
        return False
    parameters = trainable(model)
    if known["start"] != start or set(kept) != set(parameters):
        log.warning("%s began from another start than this one: training again", folder)
        return False
    for name, parameter in parameters.items():
        parameter.copy_(kept[name])
    if fingerprint(model) != known["trained"]:
        raise RuntimeError(f"{folder} is damaged; delete it and run again")
    log.info("trained before (commit %s): %s", known["commit"], folder)
    record.loss_curve, record.adapters = known["loss_curve"], known["adapters"]
    record.step0["held_out_loss"] = known["held_out_loss"]
    record.cost |= known["cost"]
    record.data["trained_at_commit"] = known["commit"]
    return True
