"""Prints, as JSON, by how many bytes the run given as arguments raised this process's peak memory (Linux).

A tiny run of the same method comes first, so that imports and thread pools are not counted; then free memory goes back
to the system and the kernel's mark of the peak is set anew.
"""

from __future__ import annotations

import ctypes
import gc
import json
import re
import sys
import tempfile
from pathlib import Path

from experiments.config import load_config
from experiments.run import run
from lora_ga.records import read_record

PROCESS = Path("/proc/self")


def status(field: str) -> int:
    """Bytes that /proc/self/status tells of a field, e.g. VmRSS (now) or VmHWM (at most)."""
    found = re.search(rf"{field}:\s+(\d+) kB", (PROCESS / "status").read_text())
    assert found, field
    return int(found[1]) * 1024


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        places = [f"records={folder}/records", f"outputs={folder}/outputs"]
        method = [argument for argument in sys.argv[1:] if argument.startswith("method")]
        run(
            load_config(
                ["model=llama_tiny", "train.max_steps=2", "train.autocast=null", "eval.limit=4", *method, *places]
            )
        )
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)
        (PROCESS / "clear_refs").write_text("5")
        before = status("VmRSS")
        cost = read_record(run(load_config([*sys.argv[1:], *places]))).cost
        peak = status("VmHWM") - before
    print(json.dumps({"peak": peak, **cost}))
