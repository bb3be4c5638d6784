"""Prints, as JSON, by how many bytes the run given as arguments raised this process's peak memory.

A tiny run of the same method comes first, so that imports and thread pools are not counted.
"""

from __future__ import annotations

import json
import sys
import tempfile

from experiments.config import load_config
from experiments.run import run
from experiments.stages import keep_freed_memory, peak_memory_mb
from lora_ga.records import read_record

if __name__ == "__main__":
    keep_freed_memory()
    with tempfile.TemporaryDirectory() as folder:
        places = [f"records={folder}/records", f"outputs={folder}/outputs"]
        method = [argument for argument in sys.argv[1:] if argument.startswith("method")]
        run(
            load_config(
                ["model=llama_tiny", "train.max_steps=2", "train.autocast=null", "eval.limit=4", *method, *places]
            )
        )
        before = peak_memory_mb()
        cost = read_record(run(load_config([*sys.argv[1:], *places]))).cost
    print(json.dumps({"peak": (cost["peak_memory_mb"] - before) * 2**20, **cost}))
