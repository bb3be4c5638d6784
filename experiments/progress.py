"""What a sweep shows while it works: a bar over its runs and a line for each run at work, or plain log lines."""

from __future__ import annotations

import logging
import re
import sys
import time
from collections.abc import Iterable
from pathlib import Path

from tqdm import tqdm

log = logging.getLogger(__name__)

TAIL_BYTES = 4096
PLAIN_SECONDS = 60.0  # between two lines about the runs at work, where there is no terminal
BAR = re.compile(r"([^\r\n:|]+):\s*\d+%\|[^|]*\|\s*(\d+/\d+ \[[^\]]*\])")  # as tqdm prints it


def last_progress(log_path: Path) -> str:
    """The latest progress bar in a run's log, as in "train 24/48 [00:20<00:20]", else its last line, else "starts"."""
    try:
        with log_path.open("rb") as handle:
            handle.seek(max(0, log_path.stat().st_size - TAIL_BYTES))
            tail = handle.read().decode(errors="replace")
    except OSError:
        return "starts"
    bars = BAR.findall(tail)
    if bars:
        return f"{bars[-1][0].strip()} {bars[-1][1]}"
    lines = re.split(r"[\r\n]+", tail.strip())
    return lines[-1][:60] or "starts"


class Display:
    """Shows how far `total` runs are; `lines` runs at work have a line each where standard error is a terminal."""

    def __init__(self, total: int, lines: int) -> None:
        self.done, self.total, self.shown = 0, total, time.monotonic()
        self.bars: list[tqdm] = []
        if total and sys.stderr.isatty():
            self.bars = [tqdm(total=total, desc="sweep", unit="run", position=0)]
            self.bars += [tqdm(total=0, bar_format="{desc}", position=1 + i, leave=False) for i in range(lines)]

    def ended(self, label: str, how: str) -> None:
        """One run is over."""
        self.done += 1
        if self.bars:
            self.bars[0].update()
        else:
            log.info("%d of %d: %s %s", self.done, self.total, label, how)

    def at_work(self, runs: Iterable[tuple[int, str, Path]]) -> None:
        """Runs at work as (worker, label, log); called as often as one likes."""
        if self.bars:
            texts = {worker: f"  {label}: {last_progress(path)}" for worker, label, path in runs}
            for worker, bar in enumerate(self.bars[1:]):
                bar.set_description_str(texts.get(worker, ""))
        elif time.monotonic() - self.shown > PLAIN_SECONDS:
            self.shown = time.monotonic()
            for _, label, path in runs:
                log.info("at work: %s: %s", label, last_progress(path))

    def close(self) -> None:
        """Leave the terminal as it was."""
        for bar in reversed(self.bars):
            bar.close()
