"""What many tests share: one thread (small matrices, and reproducible sums), random models of two layers, the report of
our records, and Debian's packages."""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, T5Config, T5ForConditionalGeneration

from experiments.report.__main__ import main as report
from lora_ga.data.encoding import Collator, EncodedRow

torch.set_num_threads(1)
os.environ.setdefault("OMP_NUM_THREADS", "1")  # for the processes that tests start

VOCABULARY = 64
TARGETS = {
    "causal": ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
    "seq2seq": ("q", "k", "v", "o", "wi", "wo"),
}


def build(architecture: str, dropout: float) -> nn.Module:
    if architecture == "causal":
        config = LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            attn_implementation="eager",
            use_cache=False,
        )
        return LlamaForCausalLM(config)
    config = T5Config(
        vocab_size=VOCABULARY,
        d_model=32,
        d_kv=8,
        d_ff=48,
        num_layers=2,
        num_heads=4,
        dropout_rate=dropout,
        decoder_start_token_id=0,
        use_cache=False,
    )
    return T5ForConditionalGeneration(config)


@pytest.fixture(scope="session")
def tiny() -> Callable[..., nn.Module]:
    """tiny("causal" or "seq2seq"): the same random model at every call, frozen and in eval mode."""

    def make(architecture: str = "causal", dropout: float = 0.1, seed: int = 0) -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = build(architecture, dropout)
            with torch.no_grad():
                for name, parameter in model.named_parameters():  # large enough for logits that differ
                    if parameter.ndim == 2 and "lm_head" not in name and "shared" not in name:
                        parameter.copy_(torch.randn(parameter.shape) / parameter.shape[1] ** 0.5)
        return model.requires_grad_(False).eval()

    return make


@pytest.fixture(scope="session")
def targets() -> dict[str, tuple[str, ...]]:
    """Every adapted layer name, by architecture."""
    return TARGETS


@pytest.fixture(scope="session")
def random_rows() -> Callable[..., list[EncodedRow]]:
    """random_rows(n): rows whose prompts and targets differ in length."""

    def make(count: int, seed: int = 0) -> list[EncodedRow]:
        generator = torch.Generator().manual_seed(seed)

        def ids(low: int, high: int) -> list[int]:
            length = int(torch.randint(low, high, (1,), generator=generator))
            return torch.randint(3, VOCABULARY, (length,), generator=generator).tolist()

        return [EncodedRow(ids(3, 12), [*ids(1, 6), 1]) for _ in range(count)]

    return make


@pytest.fixture(scope="session")
def collators() -> dict[str, Collator]:
    """The collator of each architecture."""
    return {"causal": Collator("causal", 0), "seq2seq": Collator("seq2seq", 0, 0)}


@pytest.fixture(scope="session")
def debian() -> Callable[..., None]:
    """debian("chromium", commands=("chromium",)): the packages are there, installed by root if need be, or a skip."""

    def install(*packages: str, commands: tuple[str, ...]) -> None:
        missing = [name for name in commands if not shutil.which(name)]
        if not missing:
            return
        if os.geteuid() != 0 or not shutil.which("apt-get"):
            pytest.skip(f"no {', '.join(missing)}; installing {', '.join(packages)} takes root and apt-get")
        environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
        # Workers may want different packages at the same time, and apt-get refuses a second of itself.
        with (Path(tempfile.gettempdir()) / "lora-repro-apt.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            for words in (["update"], ["install", "--yes", "--no-install-recommends", *packages]):
                answer = subprocess.run(["apt-get", *words], env=environment, capture_output=True, text=True)
                if answer.returncode:
                    pytest.skip(f"apt-get {words[0]} failed: {answer.stderr.strip().splitlines()[-1]}")

    return install


@pytest.fixture(scope="session")
def committed_report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `make report RECORDS=results/baseline` writes."""
    out = tmp_path_factory.mktemp("report")
    assert report(["records=results/baseline", f"out={out}"]) == 0
    return out
