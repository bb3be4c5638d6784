"""The user's cache folder: assets, converted models, token ids, gradients. Deleting it loses nothing but time."""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder(*parts: str) -> Path:
    """`$LORA_GA_CACHE` (or ~/.cache/lora_ga), and `parts` under it; not created."""
    root = os.environ.get("LORA_GA_CACHE")
    return (Path(root) if root else Path.home() / ".cache" / "lora_ga").joinpath(*parts)
