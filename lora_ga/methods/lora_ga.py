"""LoRA-GA: start the adapters so that their first step follows the full gradient.

LoRA-GA (arXiv 2407.05000, section 3, algorithm 1). Reference: Outsider565/LoRA-GA reproduce/run_exp.py. The paper once
printed gamma for sqrt(gamma) in the stable scale; the code and the author (issue 12) have sqrt(gamma), as here.
Ablations: +SO is direction=gaussian with scale=stable, +GA is direction=ArB2r with scale=unit.
Differs in: the offset is exact (adapters.keep_function); random directions have a seed of their own.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

import torch
from torch import nn

from lora_ga.adapters import adapter_pairs, attach_lora, keep_function, set_factors
from lora_ga.engines import whole
from lora_ga.errors import SetupError
from lora_ga.low_rank import Gradient, LowRank
from lora_ga.methods.base import Setup
from lora_ga.methods.lora import Lora
from lora_ga.methods.svd import TruncatedSVD

Direction = Literal["ArB2r", "A2rBr", "ArBr", "random", "gaussian"]
Scale = Literal["stable", "unit", "gd", "weight_svd"]


def lora_ga_directions(
    G: Gradient, r: int, direction: Direction, *, svd: TruncatedSVD, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """Unscaled lora_A (r, d_in) and lora_B (d_out, r) from the 2r leading singular directions of G (d_out, d_in).

    "gaussian" ignores G: rows of lora_A and columns of lora_B have unit expected norm (the +SO ablation).
    """
    if direction == "gaussian":
        A = torch.randn(r, G.shape[1], generator=generator, dtype=torch.float64) / G.shape[1] ** 0.5
        B = torch.randn(G.shape[0], r, generator=generator, dtype=torch.float64) / G.shape[0] ** 0.5
        like = G.left if isinstance(G, LowRank) else G
        return A.to(like), B.to(like)
    U, _, Vh = svd(G, 2 * r)
    columns = {
        "ArB2r": (torch.arange(r), torch.arange(r, 2 * r)),
        "A2rBr": (torch.arange(r, 2 * r), torch.arange(r)),
        "ArBr": (torch.arange(1, 2 * r, 2), torch.arange(0, 2 * r, 2)),
    }
    if direction == "random":
        shuffled = torch.randperm(2 * r, generator=generator)
        columns["random"] = (shuffled[:r], shuffled[r:])
    for_A, for_B = columns[direction]
    return Vh[for_A], U[:, for_B]


def lora_ga_factors(
    G: Gradient,
    r: int,
    scaling: float,
    *,
    direction: Direction = "ArB2r",
    scale: Scale = "stable",
    stable_gamma: float = 16.0,
    W: torch.Tensor | None = None,
    generator: torch.Generator | None = None,
    svd: TruncatedSVD | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """LoRA-GA's starting factors for a layer with gradient G (d_out, d_in).

    Args:
        scaling: s of the forward pass W + s lora_B lora_A.
        scale: "stable" multiplies both by d_out^(1/4) / sqrt(stable_gamma); "unit" leaves them; "gd" divides both by
            s; "weight_svd" multiplies both by mean_i sqrt(sigma_i(W) / s), i <= r, and needs W (d_out, d_in).
        generator: for the random and gaussian directions.
    Returns:
        lora_A (r, d_in), lora_B (d_out, r), at least float32.
    """
    svd = svd or TruncatedSVD()
    generator = generator or torch.Generator().manual_seed(0)
    A, B = lora_ga_directions(G, r, direction, svd=svd, generator=generator)
    if scale == "stable":
        factor = G.shape[0] ** 0.25 / stable_gamma**0.5
    elif scale == "gd":
        factor = 1 / scaling
    elif scale == "weight_svd":
        if W is None:
            raise ValueError("scale='weight_svd' needs the weight W")
        factor = float((svd(W, r)[1] / scaling).sqrt().mean())
    else:
        factor = 1.0
    return A * factor, B * factor


@dataclass(frozen=True, kw_only=True)
class LoraGA(Lora):
    """LoRA started from the one-step gradient; the paper runs it with rsLoRA's scaling."""

    use_rslora: bool = True
    direction: Direction = "ArB2r"
    scale: Scale = "stable"
    stable_gamma: float = 16.0  # repo config and GLUE; README's Llama runs use 64
    svd_oversampling: int = 2  # of 2r wanted columns: q = 4r, repo
    svd_niter: int = 4  # repo
    needs_gradients: ClassVar[bool] = True
    keeps_function: ClassVar[bool] = True

    def __post_init__(self) -> None:
        for name, value, known in (("direction", self.direction, Direction), ("scale", self.scale, Scale)):
            if value not in get_args(known):
                raise SetupError(f"method.{name}={value} is unknown: use one of {', '.join(get_args(known))}")

    @property
    def smallest_side(self) -> int:
        """A and B take disjoint directions, so 2r of them must exist."""
        return 2 * self.r

    @property
    def gradient_columns(self) -> int:
        """How many directions of each gradient the start asks for."""
        return TruncatedSVD(self.svd_oversampling).columns(2 * self.r)

    def prepare(self, model: nn.Module, setup: Setup) -> nn.Module:
        svd = TruncatedSVD(self.svd_oversampling, self.svd_niter, setup.seed)
        gradients = setup.gradients(self.gradient_columns)
        model = attach_lora(model, self.peft_config(setup), setup.seed)
        generator = torch.Generator().manual_seed(setup.seed)
        for pair in adapter_pairs(model):
            with whole([pair.base.weight] if self.scale == "weight_svd" else []):
                factors = lora_ga_factors(
                    gradients[pair.name],
                    self.r,
                    pair.scaling,
                    direction=self.direction,
                    scale=self.scale,
                    stable_gamma=self.stable_gamma,
                    W=pair.base.weight.data if self.scale == "weight_svd" else None,
                    generator=generator,
                    svd=svd,
                )
            set_factors(pair, *factors)
        keep_function(model, full_precision=setup.full_precision)
        return model
