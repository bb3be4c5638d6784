"""The trained model as one set of weights: for fast generation within a `with`, or as a checkpoint folder to serve.

PEFT merges each layer (LoRA, DoRA, AdaLoRA, whatever the scaling); what is ours is that the sum of weight, adapters
and frozen offset is formed in float32 and rounded once, and that the model comes back bit for bit.
Differs in: PEFT's merge_adapter adds adapter after adapter in the weight's own type, and its unmerge subtracts again.
Merged in float32 the logits are the same to 2e-4 (SmolLM2-135M, LoRA-GA); in bf16 weights the merge adds about as much
noise as bf16 arithmetic has (KL to float32 1.6e-3 a token, 1.1e-3 unmerged).
"""

from __future__ import annotations

import copy
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lora_ga.errors import SetupError


@torch.no_grad()
def _merge(layer: BaseTunerLayer, dtype: torch.dtype | None) -> None:
    """Give the layer a merged weight of its own; the parameter it had stays as it is, and so does what shares it."""
    base: Any = layer.get_base_layer()
    weight = base.weight
    if not weight.is_floating_point():
        raise SetupError(f"cannot merge into a {weight.dtype} weight: load the base model in float32 or bfloat16")
    whole = weight.detach().to(torch.promote_types(weight.dtype, torch.float32), copy=True)
    base.weight = nn.Parameter(whole, requires_grad=False)
    layer.merge()
    base.weight.data = base.weight.data.to(dtype or weight.dtype)


@contextmanager
def merged(model: nn.Module, dtype: torch.dtype | None = None) -> Iterator[nn.Module]:
    """Within, the active adapters are part of the weights, so a forward pass costs what the base model's does.

    Afterwards every weight is the very parameter it was, also after an error. A model without adapters, or merged
    already, is yielded as it is. Needs a second copy of the adapted weights.

    Args:
        dtype: of the merged weights, by default each base weight's own; a bfloat16 weight then rounds the sum.
    Raises:
        SetupError: a weight holds integers (a quantised base).
    """
    layers = [module for module in model.modules() if isinstance(module, BaseTunerLayer) and not module.merged]
    weights = [layer.get_base_layer().weight for layer in layers]
    try:
        for layer in layers:
            _merge(layer, dtype)
        yield model
    finally:
        for layer, weight in zip(layers, weights, strict=True):
            if layer.merged:
                layer.unmerge()  # for PEFT's bookkeeping: the weight it works on is dropped
            layer.get_base_layer().weight = weight


def _plain(model: PreTrainedModel, dtype: torch.dtype | None) -> PreTrainedModel:
    """A model of the same architecture on the same tensors (or their copies in `dtype`), without adapter modules."""
    state = {
        name.replace(".base_layer.", "."): tensor.to(dtype or tensor.dtype) if tensor.is_floating_point() else tensor
        for name, tensor in model.state_dict().items()
    }
    config = copy.deepcopy(model.config)
    config.use_cache = True  # switched off for training alone
    with torch.device("meta"):
        plain = type(model)(config)
    plain.load_state_dict({name: state[name] for name in plain.state_dict()}, assign=True)
    plain.tie_weights()
    return plain


def _check_tied(model: PreTrainedModel) -> None:
    head = model.get_output_embeddings()
    if isinstance(head, BaseTunerLayer) and getattr(model.config, "tie_word_embeddings", False):
        raise SetupError(
            "a checkpoint cannot hold an adapted output layer tied to the embeddings: leave it out of "
            "model.target_modules, or load the export as an adapter"
        )


def _replace(written: Path, folder: Path) -> None:
    """Move a finished folder to its place, over an earlier checkpoint."""
    if folder.exists() and any(folder.iterdir()):
        earlier = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}.")) / folder.name
        folder.rename(earlier)
        written.rename(folder)
        shutil.rmtree(earlier.parent)
    else:
        written.rename(folder)


def save_merged(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, folder: Path, dtype: torch.dtype | None = None
) -> None:
    """Write the trained model as a plain transformers checkpoint: safetensors, configuration and tokenizer.

    AutoModel classes, vLLM and others load it without PEFT. The folder appears only when it is whole.

    Args:
        model: a PEFT model (its active adapters are merged) or, after full fine-tuning, the model itself.
        folder: new, empty, or an earlier checkpoint, which is replaced.
        dtype: of the merged weights, see `merged`; float32 keeps them exact and makes the whole checkpoint float32.
    Raises:
        SetupError: the folder holds something else, a weight is quantised, or a tied output layer was adapted.
    """
    folder = folder.resolve()
    if folder.exists() and any(folder.iterdir()) and not (folder / "config.json").is_file():
        raise SetupError(f"{folder} holds other files than a checkpoint: choose a new folder")
    whole = model.get_base_model() if isinstance(model, PeftModel) else model
    if not isinstance(whole, PreTrainedModel):
        raise TypeError(f"a checkpoint is made of a transformers model, not {type(whole).__name__}")
    _check_tied(whole)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.") as scratch:
        written = Path(scratch) / folder.name
        with merged(model, dtype):
            plain = _plain(whole, dtype)
            generation = plain.generation_config
            if generation is not None and generation.eos_token_id is None:
                generation.eos_token_id = tokenizer.eos_token_id  # or nothing would end an answer
            plain.save_pretrained(written)
        tokenizer.save_pretrained(written)
        _replace(written, folder)
