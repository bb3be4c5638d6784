"""From a name to a model and its tokenizer: a hub id, a folder, a pinned GGUF asset, or random weights for tests.

Every source has an identity that goes into records and cache keys: hub id and revision, or the sha256 of the weights.
The generation config is emptied: decoding belongs to the protocol, never to what a checkpoint happens to carry.
"""

from __future__ import annotations

import functools
import hashlib
import logging
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    GenerationConfig,
    GgufConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    set_seed,
)

from lora_ga.adapters import target_linears
from lora_ga.cache import cache_folder
from lora_ga.data.assets import asset
from lora_ga.engines import Engine, device, shard, sharding
from lora_ga.errors import SetupError

log = logging.getLogger(__name__)

ATTENTION = ("eager", "sdpa", "flash_attention_2")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True, kw_only=True)
class ModelSpec:
    """What to load and how.

    `source` is "asset:<name>" (a pinned GGUF file), "random:<model_type>" (built from `config`, tokenizer of the local
    asset), a folder, or a hub id (then `revision` is required: a moving checkpoint moves the numbers).
    """

    name: str
    architecture: Literal["causal", "seq2seq"]
    source: str
    target_modules: tuple[str, ...]
    revision: str | None = None
    dtype: str = "float32"
    attn_implementation: str = "eager"
    config: Mapping[str, Any] = field(default_factory=dict)

    def check(self) -> None:
        """Refuse, before anything is loaded, what cannot work."""
        if self.dtype not in DTYPES:
            raise SetupError(f"model.dtype={self.dtype} is unknown: use one of {', '.join(DTYPES)}")
        if self.attn_implementation not in ATTENTION:
            raise SetupError(
                f"model.attn_implementation={self.attn_implementation} is unknown: use auto or one of "
                f"{', '.join(ATTENTION)}"
            )
        if self.architecture == "seq2seq" and self.attn_implementation == "flash_attention_2":
            raise SetupError("transformers has no flash attention for T5: use model.attn_implementation=sdpa or eager")
        if self.architecture == "seq2seq" and self.dtype == "float16":
            raise SetupError(
                "T5 overflows in float16 (it was trained in bfloat16): use model.dtype=float32 or model.dtype=bfloat16"
            )

    @property
    def is_random(self) -> bool:
        return self.source.startswith("random:")


@dataclass(frozen=True)
class Loaded:
    """A model in eval mode with all its parameters frozen, its tokenizer, and what identifies its weights."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    identity: str


@functools.cache
def _converted_gguf(name: str) -> Path:
    """The GGUF asset as a transformers folder (float32, exact), converted once: parsing it takes seconds."""
    gguf = asset(name)
    digest = hashlib.sha256(gguf.read_bytes()).hexdigest()
    folder = cache_folder("models", f"{gguf.stem}-{digest[:12]}")
    if folder.exists():
        return folder
    log.info("converting %s to %s, once", gguf.name, folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=folder.parent))
    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, dtype=torch.float32, quantization_config=GgufConfig(dequantize=True)
    )
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.save_pretrained(temporary)
    AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(temporary)
    try:
        temporary.rename(folder)
    except OSError:  # another process was first
        shutil.rmtree(temporary)
    return folder


def _location(spec: ModelSpec) -> str:
    if spec.source.startswith("asset:"):
        return str(_converted_gguf(spec.source.removeprefix("asset:")))
    if Path(spec.source).expanduser().is_dir():
        return str(Path(spec.source).expanduser())
    if spec.source.startswith((".", "/", "~")):
        raise SetupError(f"model.source={spec.source}: there is no such folder")
    if spec.revision is None:
        raise SetupError(f"model.source={spec.source} is a hub id: pin it with model.revision=<commit>")
    return spec.source


def _config(spec: ModelSpec) -> PreTrainedConfig:
    if spec.is_random:
        return AutoConfig.for_model(spec.source.removeprefix("random:"), **spec.config)
    location = _location(spec)
    try:
        return AutoConfig.from_pretrained(location, revision=None if Path(location).is_dir() else spec.revision)
    except OSError as error:
        raise SetupError(
            f"cannot reach {spec.source} ({str(error).splitlines()[0]}): download it and set model.source=<folder>"
        ) from error


def _auto_class(spec: ModelSpec) -> Any:
    return AutoModelForSeq2SeqLM if spec.architecture == "seq2seq" else AutoModelForCausalLM


def skeleton(spec: ModelSpec) -> PreTrainedModel:
    """The model on the meta device, from the architecture alone: shapes, and no weight is read."""
    config = _config(spec)  # may convert the asset, which is no work for the meta device
    with torch.device("meta"):
        return _auto_class(spec).from_config(config)


def target_shapes(spec: ModelSpec) -> dict[str, tuple[int, int]]:
    """Shape (d_out, d_in) of every target."""
    linears = target_linears(skeleton(spec), spec.target_modules)
    return {name: (linear.out_features, linear.in_features) for name, linear in linears.items()}


def _identity(spec: ModelSpec, location: str) -> str:
    if not Path(location).is_dir():
        return f"{spec.source}@{spec.revision}"
    digest = hashlib.sha256()
    for path in sorted(Path(location).glob("*.safetensors")) + sorted(Path(location).glob("*.bin")):
        with path.open("rb") as handle:
            digest.update(hashlib.file_digest(handle, "sha256").digest())
    return f"{spec.name}:sha256:{digest.hexdigest()[:16]}"


def load_tokenizer(spec: ModelSpec) -> PreTrainedTokenizerBase:
    """The model's tokenizer; random models borrow the one of the local asset."""
    location = str(_converted_gguf("smollm2_gguf")) if spec.is_random else _location(spec)
    revision = None if Path(location).is_dir() else spec.revision
    tokenizer = AutoTokenizer.from_pretrained(location, revision=revision)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token  # Llama has none; padding is masked out everywhere
    return tokenizer


def load_model(spec: ModelSpec, engine: Engine | None = None) -> Loaded:
    """Load model and tokenizer onto this process's device, in slices where `engine` shards weights.

    Random weights depend on the configuration alone (seed 0).
    """
    spec.check()
    engine, bf16 = engine or Engine(), spec.dtype == "bfloat16"
    if spec.is_random:
        set_seed(0)
        model = _auto_class(spec).from_config(_config(spec), attn_implementation=spec.attn_implementation)
        model = model.to(DTYPES[spec.dtype])
        shard(model, engine, bf16=bf16)  # afterwards: drawn slice by slice the weights would be others
        identity = f"{spec.name}:seed0"
    else:
        location = _location(spec)
        _config(spec)
        with sharding(engine, bf16=bf16):
            model = _auto_class(spec).from_pretrained(
                location,
                revision=None if Path(location).is_dir() else spec.revision,
                dtype=DTYPES[spec.dtype],
                attn_implementation=spec.attn_implementation,
            )
        identity = _identity(spec, location)
    if not engine.shards_weights:
        model = model.to(device())
    model.generation_config = GenerationConfig(
        **{k: getattr(model.config, k, None) for k in ("bos_token_id", "decoder_start_token_id")}
    )
    model.config.use_cache = False
    return Loaded(model.requires_grad_(False).eval(), load_tokenizer(spec), identity)
