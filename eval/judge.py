"""A judge's ratings: every conversation put to it k times, and a record of every reply.

Source: Zheng et al., "Judging LLM-as-a-Judge with MT-Bench and Chatbot Arena", NeurIPS 2023; patterns of the rating:
FastChat's llm_judge/common.py.
Differs in: any endpoint; k repeats and their median (FastChat issue 3018: 0.16 between five runs of one judge); a
rating outside 1..10 is unparsed, FastChat averages it; replies are recorded, so scoring again costs no request.
"""

from __future__ import annotations

import json
import logging
import os
import re
import statistics
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tqdm import tqdm

from eval.judge_client import Client, JudgeSettings, Messages, Reply, safe_name
from lora_ga.errors import SetupError
from lora_ga.records import content_hash

__all__ = ["JudgeSettings", "Messages", "Reply", "ask", "median_rating", "parse_rating", "safe_name"]

log = logging.getLogger(__name__)

# FastChat's two patterns, tried in this order; the first match in the text counts.
RATINGS = (re.compile(r"\[\[(\d+\.?\d*)\]\]"), re.compile(r"\[(\d+\.?\d*)\]"))
LOWEST, HIGHEST = 1.0, 10.0


def parse_rating(text: str) -> float | None:
    """The rating in a judge's text, [[7]] or [[7.5]], else [7]; None if there is none or it is not in 1..10."""
    match = next((found for pattern in RATINGS if (found := pattern.search(text))), None)
    rating = float(match[1]) if match else None
    return rating if rating is not None and LOWEST <= rating <= HIGHEST else None


def median_rating(replies: Sequence[Reply]) -> float | None:
    """The median of the ratings that could be read; None if none could."""
    ratings = [rating for reply in replies if (rating := parse_rating(reply.text)) is not None]
    return statistics.median(ratings) if ratings else None


def ask(conversations: Sequence[Messages], settings: JudgeSettings, cache: Path) -> list[list[Reply]]:
    """Put every conversation to the judge `repeats` times.

    Args: cache, a JSONL file of replies keyed by request and repeat: what it holds is not asked again, and every new
    reply is appended at once, so a killed judging continues. The address is no part of the key.
    Returns: the replies, in the order of `conversations`.
    Errors: SetupError for a refused request, a judge that does not answer, or (replay_only) a reply not recorded.
    """
    settings.check()
    bodies = [settings.body(messages) for messages in conversations]
    keys = [[_key(body, repeat) for repeat in range(settings.repeats)] for body in bodies]
    known = _read(cache)
    # A mapping, so that a request which occurs twice is sent once.
    missing = {key: body for body, row in zip(bodies, keys, strict=True) for key in row if key not in known}
    log.info("judge %s: %d replies to ask for, the others are recorded", settings.judge_id, len(missing))
    if missing and settings.replay_only:
        raise SetupError(
            f"{len(missing)} of the judge's replies are not in {cache}: set judge.replay_only=false to ask for them"
        )
    if missing:
        known |= _fetch(missing, settings, cache)
    return [[known[key] for key in row] for row in keys]


def _key(body: Mapping[str, Any], repeat: int) -> str:
    return content_hash({"request": body, "repeat": repeat}, 32)


def _read(cache: Path) -> dict[str, Reply]:
    """Recorded replies by key; a line that a kill cut short is passed over."""
    known: dict[str, Reply] = {}
    if not cache.exists():
        return known
    for number, line in enumerate(cache.read_text(encoding="utf-8", errors="replace").split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            known[row["key"]] = Reply(row["text"], row["model"], row["finish"])
        except (ValueError, KeyError, TypeError):
            log.warning("%s: line %d is no reply and will be asked again", cache, number)
    return known


class _Recorder:
    """Appends replies to the cache, each in one write, from any thread."""

    def __init__(self, cache: Path) -> None:
        self._lock = threading.Lock()
        cache.parent.mkdir(parents=True, exist_ok=True)
        self._handle = cache.open("ab")
        if cache.stat().st_size and cache.read_bytes()[-1:] != b"\n":
            self._handle.write(b"\n")

    def add(self, key: str, reply: Reply) -> None:
        line = json.dumps({"key": key, **asdict(reply)}) + "\n"
        with self._lock:
            self._handle.write(line.encode())
            self._handle.flush()
            os.fsync(self._handle.fileno())

    def close(self) -> None:
        self._handle.close()


def _fetch(missing: Mapping[str, Mapping[str, Any]], settings: JudgeSettings, cache: Path) -> dict[str, Reply]:
    client, recorder = Client(settings), _Recorder(cache)

    def one(key: str, body: Mapping[str, Any]) -> tuple[str, Reply]:
        reply = client.reply(body)
        recorder.add(key, reply)
        return key, reply

    pool = ThreadPoolExecutor(settings.concurrency, thread_name_prefix="judge")
    try:
        futures = [pool.submit(one, key, body) for key, body in missing.items()]
        finished = as_completed(futures)
        return dict(future.result() for future in tqdm(finished, total=len(futures), desc="judge", leave=False))
    finally:
        # After an error the rest is not sent; replies already under way are waited for and recorded.
        pool.shutdown(wait=True, cancel_futures=True)
        recorder.close()
