"""Runs generated Python programs in isolation, by what Linux offers without further programs: see `isolation`.

Each run is a process group of its own (sandbox_child.py) with an empty environment, stdin closed, its own folder as
cwd and HOME, limits on time, memory, files and output; killed as a whole, by its own process namespace too.
It does NOT protect against: holes in the kernel; a program that searches the frames of its own interpreter for the
token and so forges its verdict; reading files the user may read, or the environment of his other processes under
/proc, where "private root" is not in force; another kernel than Linux, where only limits and the time are left.
"""

from __future__ import annotations

import contextlib
import functools
import json
import logging
import math
import os
import platform
import secrets
import selectors
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from eval.syscall_filter import build
from lora_ga.errors import SetupError

Outcome = Literal["passed", "failed", "timed out", "resource limit"]

log = logging.getLogger(__name__)
LAUNCHER = Path(__file__).with_name("sandbox_child.py")
LAYERS = (
    "user namespace",
    "network namespace",
    "process namespace",
    "ipc namespace",
    "private root",
    "other user",
    "no capabilities",
    "syscall filter",
    "memory limit",
)
# Any one of the layers gives the protection; what none gives is warned of.
PROTECTIONS: Mapping[str, tuple[str, ...]] = {
    "network access": ("network namespace", "syscall filter"),
    "changes of files outside its folder": ("private root", "other user", "syscall filter"),
    "signals to other processes": ("process namespace", "other user", "syscall filter"),
    "processes without number": ("other user", "syscall filter"),
    "taking all memory": ("memory limit",),
}
START_SECONDS = 30.0  # for the interpreter to start on a loaded machine; no time of the program's
REPORT_BYTES = 1 << 16  # a program may write to the launcher's descriptor
# Imports what tests and answers usually import: a layer that hides the standard library would fail right programs.
PROBE = """
import bisect, collections, copy, datetime, decimal, fractions, functools, hashlib, heapq, itertools, math, operator
import random, re, statistics, string, sys, typing
hashlib.md5(b"").hexdigest()
"""


class SandboxError(RuntimeError):
    """A layer could not be put in force, so the program did not run."""


@dataclass(frozen=True)
class Limits:
    """What one program may use; `seconds` of wall time count from its own start, not the interpreter's."""

    seconds: float
    memory_bytes: int = 1 << 30  # address space; HumanEval's solutions need less than a tenth
    disk_bytes: int = 16 << 20  # one file, and all of its folder where that lies in memory
    open_files: int = 64
    threads: int = 64  # of the sandbox's user, where it has one of its own; processes are refused by the filter
    output_bytes: int = 1 << 20  # stdout and stderr together


@dataclass(frozen=True)
class Verdict:
    """How a program ended; `seconds` is its wall time, `output` the first bytes of stdout and stderr."""

    outcome: Outcome
    detail: str
    seconds: float
    output: bytes


@dataclass
class _Run:
    """What was seen of a running program so far; `stopped` is the outcome if it was stopped from here."""

    token: str
    started: float
    report: bytes = b""
    output: bytes = b""
    ready: float | None = None
    stopped: tuple[Outcome, str] | None = None

    def events(self) -> Iterator[dict[str, Any]]:
        """The launcher's own events; whatever lacks the token is the program's."""
        for line in self.report.splitlines():
            with contextlib.suppress(ValueError):
                event = json.loads(line)
                if isinstance(event, dict) and event.get("token") == self.token:
                    yield event

    def deadline(self, limits: Limits) -> float:
        return self.started + START_SECONDS if self.ready is None else self.ready + limits.seconds

    def take(self, name: str, data: bytes, limits: Limits) -> None:
        """Add what was read from one of the two pipes, up to its bound."""
        if name == "report":
            self.report += data
            if self.ready is None and any(event["event"] == "ready" for event in self.events()):
                self.ready = time.monotonic()
            if len(self.report) > REPORT_BYTES:
                self.stopped = ("resource limit", "output")
        else:
            self.output += data
            if len(self.output) > limits.output_bytes:
                self.output = self.output[: limits.output_bytes]
                self.stopped = ("resource limit", "output")


def run(program: str, limits: Limits, *, layers: Sequence[str] | None = None) -> Verdict:
    """Run a program to its end or its limits.

    Args: layers, what to put in force (default: all that this machine has, see `isolation`).
    Returns: Verdict; "passed" only if the program's last statement was reached and raised nothing, so neither an exit
    before it nor anything printed passes.
    Errors: SandboxError if a layer cannot be put in force, SetupError where programs cannot be run at all.
    """
    if not hasattr(os, "fork"):
        raise SetupError("generated code cannot be run on this system: score the saved generations on Linux")
    chosen = tuple(name for name, on in isolation().items() if on) if layers is None else tuple(layers)
    token = secrets.token_hex(16)
    with tempfile.TemporaryDirectory(prefix="program-", ignore_cleanup_errors=True) as folder:
        job = {
            "program": program,
            "token": token,
            "layers": chosen,
            "folder": folder,
            # Wall time is what stops a program; this stops one with many threads.
            "cpu_seconds": math.ceil(limits.seconds) + 1,
            "memory_bytes": limits.memory_bytes,
            "disk_bytes": limits.disk_bytes,
            "open_files": limits.open_files,
            "threads": limits.threads,
            "filter": _filter(read_only="private root" not in chosen) if "syscall filter" in chosen else "",
        }
        return _verdict(_watch(job, limits))


def _filter(*, read_only: bool) -> str:
    code = build(platform.machine(), read_only=read_only)
    if code is None:
        raise SandboxError(f"no filter for {platform.machine()}")
    return code.hex()


def _watch(job: Mapping[str, Any], limits: Limits) -> _Run:
    """Start the launcher, read what it and the program write, and kill them all at the end."""
    reader, writer = os.pipe()
    # -P -s -S: nothing of ours is importable; the fixed hash seed makes the order of sets the same at every run.
    command = [sys.executable, "-P", "-s", "-S", "-B", "-X", "utf8", str(LAUNCHER), str(writer)]
    try:
        process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            pass_fds=(writer,),
            env={"PYTHONHASHSEED": "0"},
            cwd=job["folder"],
            start_new_session=True,
        )
    except BaseException:
        os.close(reader)
        raise
    finally:
        os.close(writer)
    seen = _Run(str(job["token"]), time.monotonic())
    assert process.stdin is not None and process.stdout is not None
    try:
        with contextlib.suppress(BrokenPipeError):
            process.stdin.write(json.dumps(job).encode())
            process.stdin.close()
        _read(seen, {reader: "report", process.stdout.fileno(): "output"}, limits)
    finally:
        # The launcher is not yet reaped, so the group is still its own; its child dies with it wherever it went.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        process.stdout.close()
        os.close(reader)
    return seen


def _read(seen: _Run, pipes: Mapping[int, str], limits: Limits) -> None:
    """Read both pipes until the launcher is gone, the time is over or too much was written."""
    with selectors.DefaultSelector() as selector:
        for descriptor, name in pipes.items():
            selector.register(descriptor, selectors.EVENT_READ, name)
        while seen.stopped is None:
            left = seen.deadline(limits) - time.monotonic()
            if left <= 0:
                seen.stopped = ("timed out", f"after {limits.seconds:g} s")
                return
            for key, _ in selector.select(left):
                data = os.read(key.fd, 1 << 16)
                if data:
                    seen.take(key.data, data, limits)
                elif key.data == "report":
                    return
                else:
                    selector.unregister(key.fd)


def _verdict(seen: _Run) -> Verdict:
    events = {event["event"]: event for event in seen.events()}
    if seen.ready is None:
        detail = events.get("refused", {}).get("detail") or seen.output.decode(errors="replace")[-200:] or "no start"
        raise SandboxError(detail)
    outcome: Outcome
    if seen.stopped:
        outcome, detail = seen.stopped
    elif "verdict" in events:
        outcome, detail = events["verdict"]["outcome"], events["verdict"]["detail"]
    else:
        code = events.get("end", {}).get("code")
        # The kernel sends these for processor time and for memory; the program's own exits are plain failures.
        outcome = "resource limit" if code in (-signal.SIGXCPU, -signal.SIGKILL) else "failed"
        detail = f"ended before its last statement (code {code})"
    return Verdict(outcome, detail, time.monotonic() - seen.ready, seen.output)


@functools.cache
def isolation() -> Mapping[str, bool]:
    """Which layers work on this machine, tried once: name -> in force. It belongs into the record.

    "user namespace" is there to give an ordinary user the namespaces after it. "private root": the program sees the
    interpreter's files, read-only, and a folder in memory; nothing else. "syscall filter" refuses processes, sockets
    and signals, and every change of a file where there is no private root. Logs a warning for each missing protection.
    """
    accepted = _accepted(LAYERS[1:])
    if "network namespace" not in accepted:
        with_user = _accepted(LAYERS)
        accepted = with_user if "network namespace" in with_user else accepted
    for danger, layers in PROTECTIONS.items():
        if not set(layers) & set(accepted):
            log.warning("generated code runs WITHOUT protection against %s: none of %s works here", danger, layers)
    return {layer: layer in accepted for layer in LAYERS}


def _accepted(layers: Sequence[str]) -> tuple[str, ...]:
    """Those of the layers, in order, with which a harmless program that imports the standard library still passes."""
    accepted: tuple[str, ...] = ()
    for layer in layers:
        if layer == "other user" and ("user namespace" in accepted or os.geteuid() != 0):
            continue  # only root can become another user, and no other one exists in that namespace
        with contextlib.suppress(SandboxError):
            if run(PROBE, Limits(START_SECONDS), layers=(*accepted, layer)).outcome == "passed":
                accepted = (*accepted, layer)
    return accepted
