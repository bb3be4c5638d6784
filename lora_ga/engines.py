"""What holds the model while it trains: one process, DDP, or unmodified DeepSpeed (ZeRO 0, 2, 3).

Ranks meet here and nowhere else: who am I, sums over all, whole tensors where ZeRO-3 has cut them up, and the proof
that the engine in force is the one that was asked for. Traps of the engines that this answers: accelerate may exit 0
without DeepSpeed, ZeRO flattens matrices, DeepSpeed switches an outer autocast off.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import nn

from lora_ga.errors import SetupError

Part = Literal["optimizer", "parameters"]


@dataclass(frozen=True, kw_only=True)
class Engine:
    """An engine and its number of processes, `nproc` on each node; `offload` names what DeepSpeed keeps on the CPU."""

    name: str = "none"
    kind: Literal["none", "ddp", "deepspeed"] = "none"
    stage: Literal[0, 2, 3] = 0
    offload: tuple[Part, ...] = ()
    nproc: int = 1

    def check(self) -> None:
        """SetupError for a combination that no engine has."""
        if self.nproc < 1:
            raise SetupError(f"launcher.nproc={self.nproc}: use a positive number of processes")
        if self.kind == "none" and self.nproc > 1:
            raise SetupError(f"launcher=none is one process, launcher.nproc={self.nproc}: use launcher=ddp")
        if self.kind != "deepspeed" and (self.stage or self.offload):
            raise SetupError(f"launcher.kind={self.kind} has no ZeRO stage and no offload: use launcher=zero2 or zero3")
        if "optimizer" in self.offload and self.stage < 2:
            raise SetupError("launcher.offload=[optimizer] needs launcher.stage=2 or 3")
        if "parameters" in self.offload and self.stage < 3:
            raise SetupError("launcher.offload=[parameters] needs launcher.stage=3")

    @property
    def shards_weights(self) -> bool:
        """Whether a parameter's data are spread over the ranks (ZeRO-3)."""
        return self.kind == "deepspeed" and self.stage == 3

    def clips(self, *, whole_matrices: bool) -> bool:
        """Whether the engine can clip the gradients and tell their norm.

        DeepSpeed without ZeRO does not tell it; where it flattens, steps of whole matrices clip what they gathered.
        """
        return self.kind != "deepspeed" or (self.flattens and not whole_matrices)

    @property
    def flattens(self) -> bool:
        """Whether the engine's optimizer sees slices of flat buffers instead of matrices (ZeRO-2 and 3)."""
        return self.kind == "deepspeed" and self.stage > 0

    def zero_config(self, *, bf16: bool) -> dict[str, Any]:
        """The part of DeepSpeed's configuration that cuts the model up; `bf16` holds all weights in bfloat16."""
        zero: dict[str, Any] = {"stage": self.stage}
        names: Mapping[Part, str] = {"optimizer": "offload_optimizer", "parameters": "offload_param"}
        zero |= {names[part]: {"device": "cpu", "pin_memory": torch.cuda.is_available()} for part in self.offload}
        return {
            "train_micro_batch_size_per_gpu": 1,
            "zero_optimization": zero,
            "bf16": {"enabled": bf16},
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,  # or accelerate swaps the optimizer for another, dropping its betas
        }

    def training_config(
        self, *, micro_batch: int, accumulation: int, max_grad_norm: float, bf16: bool, autocast: bool
    ) -> dict[str, Any]:
        """The whole DeepSpeed configuration of a training."""
        return self.zero_config(bf16=bf16) | {
            "train_micro_batch_size_per_gpu": micro_batch,
            "gradient_accumulation_steps": accumulation,
            "train_batch_size": micro_batch * accumulation * world_size(),
            "gradient_clipping": max_grad_norm,
            # DeepSpeed turns an autocast around its forward pass off, unless it is told of one. No module is "safe", as
            # the gradients of those would be reduced in bfloat16.
            "torch_autocast": {"enabled": autocast, "dtype": "bfloat16", "lower_precision_safe_modules": []},
        }


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def is_main() -> bool:
    """Whether this process writes what the run leaves; also when the processes are no longer connected."""
    return int(os.environ.get("RANK", 0)) == 0


def device() -> torch.device:
    """This process's device: its own GPU where there is one."""
    if torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
    return torch.device("cpu")


def require_processes(engine: Engine) -> None:
    """SetupError unless this process was started with as many others as `engine` wants."""
    started = int(os.environ.get("WORLD_SIZE", 1))
    if engine.kind == "none":
        if started > 1:
            raise SetupError(f"{started} processes were started for launcher=none: choose launcher=ddp, zero2 or zero3")
        if torch.cuda.device_count() > 1:  # transformers would spread each batch over them (DataParallel)
            raise SetupError(
                f"launcher=none computes on one GPU and {torch.cuda.device_count()} are visible: "
                "set CUDA_VISIBLE_DEVICES=0, or use python -m experiments.launch launcher=ddp nproc=<GPUs> ..."
            )
        return
    nodes = int(os.environ.get("NNODES", 1))
    if "RANK" not in os.environ or started != engine.nproc * nodes:
        raise SetupError(
            f"launcher={engine.name} wants {engine.nproc} processes on each of {nodes} nodes and "
            f"{started if 'RANK' in os.environ else 'none'} were started: "
            f"use python -m experiments.launch launcher={engine.name} nproc={engine.nproc} ..."
        )


@contextmanager
def joined(engine: Engine) -> Iterator[None]:
    """Within, the processes of `engine` are connected."""
    require_processes(engine)
    if engine.kind == "none":
        yield
        return
    if torch.cuda.is_available():
        torch.cuda.set_device(device())
    dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    if engine.kind == "deepspeed":
        import deepspeed  # seconds to import, and only this engine needs it

        deepspeed.init_distributed(dist_backend=dist.get_backend())
    try:
        yield
    finally:
        dist.destroy_process_group()


def sum_over_ranks(tensor: torch.Tensor) -> torch.Tensor:
    """Add `tensor` up over all ranks, in place where there is more than one."""
    if world_size() > 1:
        dist.all_reduce(tensor)
    return tensor


def from_ranks(tensor: torch.Tensor) -> list[torch.Tensor]:
    """Every rank's `tensor`, all of one shape, in the order of ranks."""
    if world_size() == 1:
        return [tensor]
    found = [torch.empty_like(tensor) for _ in range(world_size())]
    dist.all_gather(found, tensor.contiguous())
    return found


def any_rank(flag: bool) -> bool:
    """Whether `flag` is true on some rank; every rank must ask."""
    return bool(sum_over_ranks(torch.tensor(int(flag), device=device())).item())


def largest(value: float) -> float:
    """The largest of all ranks' values."""
    tensor = torch.tensor(value, dtype=torch.float64, device=device())
    if world_size() > 1:
        dist.all_reduce(tensor, dist.ReduceOp.MAX)
    return tensor.item()


def wait_for_all() -> None:
    if world_size() > 1:
        dist.barrier()


def is_sharded(model: nn.Module) -> bool:
    """Whether ZeRO-3 holds the model's parameters."""
    return any(hasattr(parameter, "ds_id") for parameter in model.parameters())


def whole(parameters: Iterable[torch.Tensor]) -> AbstractContextManager[Any]:
    """Within, these parameters have their full shape on every rank, to be read; what is whole already stays so."""
    cut = [parameter for parameter in parameters if hasattr(parameter, "ds_id") and parameter.numel() == 0]
    if not cut:
        return nullcontext()
    import deepspeed

    return deepspeed.zero.GatheredParameters(cut)


@contextmanager
def sharding(engine: Engine, *, bf16: bool) -> Iterator[None]:
    """Within, transformers cuts models up as it loads them, if `engine` shards weights."""
    if not engine.shards_weights:
        yield
        return
    from transformers.integrations import HfDeepSpeedConfig, unset_hf_deepspeed_config

    config = HfDeepSpeedConfig(engine.zero_config(bf16=bf16))  # transformers holds a weak reference to it
    try:
        yield
    finally:
        unset_hf_deepspeed_config()
        del config


def shard(model: nn.Module, engine: Engine, *, bf16: bool) -> None:
    """Cut up a model that was built whole, if `engine` shards weights."""
    if engine.shards_weights:
        import deepspeed

        deepspeed.zero.Init(module=model, config_dict_or_path=engine.zero_config(bf16=bf16))


@contextmanager
def runnable(model: nn.Module, engine: Engine) -> Iterator[None]:
    """Within, a model cut up by ZeRO-3 computes, forwards and backwards, on all ranks together.

    Before training there is no engine that would gather each layer's weights in its turn; this is a short-lived one,
    with one parameter of no use, as DeepSpeed wants something to train.
    """
    if not is_sharded(model):
        yield
        return
    import deepspeed

    idle = nn.Parameter(torch.zeros(1, device=device()))
    model.register_parameter("idle", idle)
    states = [(parameter, parameter.requires_grad) for parameter in model.parameters() if parameter is not idle]
    for parameter, _ in states:
        parameter.requires_grad_(False)
    bf16 = any(parameter.dtype == torch.bfloat16 for parameter, _ in states)
    holder, *_ = deepspeed.initialize(
        model=model, optimizer=torch.optim.SGD([idle], lr=0.0), config=engine.zero_config(bf16=bf16)
    )
    for parameter, state in states:
        parameter.requires_grad_(state)
    try:
        yield
    finally:
        _let_go(holder)
        del model._parameters["idle"]


def _let_go(holder: Any) -> None:
    """Take DeepSpeed's hooks off a model, so that another engine, or none, can run it."""
    offload = getattr(holder.optimizer, "parameter_offload", None)
    if offload is not None:
        offload.destroy()
    holder.destroy()


def gather(model: nn.Module, wrapped: Any = None) -> None:
    """After training: the engine `wrapped` lets go, and every rank has the whole model as a plain one."""
    if not is_sharded(model):
        return
    if wrapped is not None:
        _let_go(wrapped)
    parameters: list[Any] = list(model.parameters())
    parameters[0].all_gather(param_list=parameters)


def confirm(engine: Engine, wrapped: nn.Module) -> dict[str, Any]:
    """What holds the model now, for the record; RuntimeError if it is not what was asked for."""
    found: dict[str, Any] = {"kind": "none", "stage": 0, "world_size": world_size()}
    if isinstance(wrapped, nn.parallel.DistributedDataParallel):
        found["kind"] = "ddp"
    elif type(wrapped).__name__ == "DeepSpeedEngine":
        found |= {"kind": "deepspeed", "stage": int(wrapped.zero_optimization_stage())}  # type: ignore[operator]
    wanted = {"kind": engine.kind, "stage": engine.stage, "world_size": engine.nproc * int(os.environ.get("NNODES", 1))}
    if found != wanted:
        raise RuntimeError(f"training would run under {found}, and launcher={engine.name} asks for {wanted}")
    return {"name": engine.name, **found, "offload": list(engine.offload)}
