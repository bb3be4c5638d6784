"""The rule for attention and autocast on a device, for a configuration that says `auto`.

It knows three facts: the kind of device, whether that has bfloat16 arithmetic, and the longest row. Weights keep
model.dtype; flash_attention_2 is never chosen, only asked for by name. Measured on 2 cores with avx512_bf16, two layers
of SmolLM2's shape, forward and backward under bfloat16: eager takes 0.77 of SDPA's time at 48 tokens a row, 0.84 at
128, 0.90 at 256, 1.03 at 512, 1.05 at 1024; in float32 1.00 to 1.10.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

AUTO = "auto"
EAGER_UP_TO = 512  # tokens: where both are level, and most rows are shorter than the longest
BF16_CAPABILITY = (8, 0)  # Ampere; older GPUs emulate bfloat16


@dataclass(frozen=True)
class Choice:
    """Values of model.attn_implementation and train.autocast."""

    attn_implementation: str
    autocast: str | None


def choose(device: str, *, bf16: bool, length: int) -> Choice:
    """What is fastest on `device` ("cpu", "cuda", "mps", ...) for rows of up to `length` tokens.

    Without bfloat16 arithmetic: float32 and SDPA, which keeps no (length, length) probabilities; so on MPS too, where
    autocast is not tried. On a GPU with it: autocast and SDPA, whose kernels are fused both ways. On a CPU with it:
    autocast, and eager attention on short rows, as the backward pass of the CPU's SDPA is slow. The same for causal
    models and T5: transformers has both attentions for both.
    """
    if not bf16 or device not in ("cpu", "cuda"):
        return Choice("sdpa", None)
    if device == "cpu" and length <= EAGER_UP_TO:
        return Choice("eager", "bfloat16")
    return Choice("sdpa", "bfloat16")


def has_bf16(device: torch.device) -> bool:
    """Whether the device computes in bfloat16 rather than emulating it: AMX, AVX512-bf16 or ARM's, or Ampere on."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= BF16_CAPABILITY
    found = torch.cpu.get_capabilities()
    return device.type == "cpu" and any(found.get(name, False) for name in ("amx_bf16", "avx512_bf16", "bf16"))
