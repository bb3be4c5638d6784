"""Time and extra memory of one piece of work in this process.

Extra memory is how far the resident set rises above where it was when the work began, from Linux' own high-water mark
(VmHWM, set back through /proc/self/clear_refs); on a GPU, what torch allocated above that.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from lora_ga.errors import SetupError

Work = Callable[[], Any]


@dataclass(frozen=True)
class Measured:
    """`seconds` of one go (the median of several), `extra_mb` over all of them, and what else the side tells."""

    seconds: float
    extra_mb: float
    facts: dict[str, float] = field(default_factory=dict)


def _status_mb(key: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(key + ":"))


def require_linux() -> None:
    """SetupError where the kernel does not tell a process's memory."""
    if not Path("/proc/self/clear_refs").exists():
        raise SetupError("the bench reads memory from Linux' /proc: run it on Linux")


def measure(
    work: Work, *, times: int = 1, warm: int = 0, facts: Callable[[Any], dict[str, float]] | None = None
) -> Measured:
    """Do `work` warm + times times, of which `warm` are not timed; `facts` are taken from the last result."""
    gpu = torch.cuda.is_available()
    if gpu:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated() / 2**20 if gpu else _status_mb("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    seconds = []
    for _ in range(warm + times):
        started = time.perf_counter()
        result = work()
        if gpu:
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started)
    after = torch.cuda.max_memory_allocated() / 2**20 if gpu else _status_mb("VmHWM")
    return Measured(statistics.median(seconds[warm:]), after - before, facts(result) if facts else {})
