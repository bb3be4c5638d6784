"""LoRA-Pro's pass through full-size moments, compiled for this CPU where there is a C compiler (moments.c).

What bounds the step is memory traffic: this reads and writes the moments once and stores nothing else of the weights'
size. Without a compiler, on a GPU, for bfloat16 moments and for odd shapes lora_pro.py does the same with torch.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import logging
import os
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from lora_ga.cache import cache_folder

log = logging.getLogger(__name__)

SOURCE = Path(__file__).with_name("moments.c")
# Contraction keeps the chains of fused multiply-adds that the source spells out; fast-math would take them apart.
FLAGS = (
    "-O3",
    "-march=native",
    "-mprefer-vector-width=512",
    "-fno-math-errno",
    "-ffp-contract=fast",
    "-fPIC",
    "-shared",
)
ROWS, COLUMNS = 4, 32  # the shapes it takes are multiples of these


def fits(moments: torch.Tensor, factors: torch.Tensor) -> bool:
    """Whether moments (n, d_out, d_in) and the factors' dtype are such that the compiled pass may be asked for."""
    on_cpu = moments.device.type == "cpu" and moments.dtype == factors.dtype == torch.float32
    return on_cpu and moments.is_contiguous() and moments.shape[1] % ROWS == 0 and moments.shape[2] % COLUMNS == 0


@functools.cache
def _library(r: int) -> ctypes.CDLL | None:
    """The compiled source for one rank, from the cache of this CPU's kind; None if it can not be had."""
    compiler = shutil.which(os.environ.get("CC", "cc"))
    if compiler is None or r % 2:
        return None
    command = [compiler, *FLAGS, f"-DRANK={r}"]
    try:
        # What the compiler takes "native" for: a cache on a network drive is seen by other machines too.
        native = subprocess.run([*command, "-E", "-dM", "-x", "c", os.devnull], capture_output=True, check=True).stdout
        digest = hashlib.sha256(SOURCE.read_bytes() + native + " ".join(command).encode()).hexdigest()[:16]
        path = cache_folder("kernels") / f"moments-{digest}.so"
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary = path.with_suffix(f".{os.getpid()}.tmp")
            subprocess.run([*command, str(SOURCE), "-lm", "-o", str(temporary)], capture_output=True, check=True)
            temporary.replace(path)
        return ctypes.CDLL(str(path))
    except (OSError, subprocess.CalledProcessError) as error:
        log.warning("LoRA-Pro's step is slower than it could be, %s did not compile it: %s", compiler, error)
        return None


def _at(tensor: torch.Tensor, first: int) -> ctypes.c_void_p:
    return ctypes.c_void_p(tensor.data_ptr() + first * tensor.stride(0) * tensor.element_size())


def through_moments(
    A: torch.Tensor,
    B: torch.Tensor,
    g_A: torch.Tensor,
    g_B: torch.Tensor,
    scaling: float,
    moments: tuple[torch.Tensor, torch.Tensor],
    betas: tuple[float, float],
    eps: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Adam's direction u of the gradient s (B g_A + g_B A), as B^T u (n, r, d_in) and s u A^T (n, d_out, r).

    Args:
        A, g_A: (n, r, d_in), B, g_B: (n, d_out, r), float32.
        moments: exp_avg and exp_avg_sq (n, d_out, d_in), float32, `fits`; updated in place.
        eps: (n,), added to sqrt(exp_avg_sq) before dividing.
    Returns:
        None, with nothing done, where the machine has no compiled pass.
    """
    n, d_out, d_in = moments[0].shape
    r = A.shape[1]
    library = _library(r)
    if library is None:
        return None
    left, right = [t.contiguous() for t in (B, g_B)], [t.contiguous() for t in (g_A, A)]
    eps, grad_A, grad_B = eps.contiguous(), torch.empty(n, r, d_in), torch.zeros(n, d_out, r)

    def some(first: int, last: int) -> None:
        library.through_moments(
            *(ctypes.c_size_t(size) for size in (last - first, d_out, d_in)),
            *(_at(tensor, first) for tensor in (*left, *right)),
            ctypes.c_float(scaling),
            *(_at(tensor, first) for tensor in moments),
            *(ctypes.c_float(beta) for beta in betas),
            *(_at(tensor, first) for tensor in (eps, grad_A, grad_B)),
        )

    threads = min(torch.get_num_threads(), n)
    bounds = [n * thread // threads for thread in range(threads + 1)]
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(some, bounds[:-1], bounds[1:]))
    return grad_A, grad_B
