"""The kernel filter, run by an interpreter of its own: what it answers for calls of both machines."""

from __future__ import annotations

import errno
import os
import struct

import pytest

from eval.syscall_filter import (
    ALLOW,
    ARCHITECTURES,
    CLONE,
    CLONE3,
    CLONE_THREAD,
    FILE_CHANGES,
    KILL,
    OPEN,
    OPENAT,
    REFUSE,
    REFUSED,
    X32,
    build,
)

READ = {"x86_64": 0, "aarch64": 63}
MACHINES = list(ARCHITECTURES)
REFUSAL = REFUSE | errno.EPERM


def answer(code: bytes, machine: str, call: int, *arguments: int, architecture: int | None = None) -> int:
    """What the kernel would do with a call: the few instructions of classic BPF that filters use, as documented."""
    data = struct.pack(
        "<IIQ6Q", call, architecture or ARCHITECTURES[machine], 0, *arguments, *[0] * (6 - len(arguments))
    )
    at, value = 0, 0
    while True:
        operation, if_true, if_false, operand = struct.unpack_from("<HBBI", code, 8 * at)
        at += 1
        match operation:
            case 0x20:
                value = struct.unpack_from("<I", data, operand)[0]
            case 0x15 | 0x35 | 0x45:
                holds = {0x15: value == operand, 0x35: value >= operand, 0x45: bool(value & operand)}[operation]
                at += if_true if holds else if_false
            case 0x06:
                return operand
            case _:
                raise AssertionError(f"instruction {operation:#x}")


def numbers(table: dict, machine: str) -> set[int]:
    return {row[MACHINES.index(machine)] for row in table.values()} - {None}


@pytest.mark.parametrize("machine", MACHINES)
@pytest.mark.parametrize("read_only", [True, False])
def test_every_call_gets_the_answer_of_the_tables(machine: str, read_only: bool) -> None:
    code = build(machine, read_only=read_only)
    assert code is not None
    column = MACHINES.index(machine)
    by_flags = {CLONE[column], OPEN[column], OPENAT[column]}
    refused = numbers(REFUSED, machine) | (numbers(FILE_CHANGES, machine) if read_only else set())
    for call in set(range(460)) - by_flags:
        got = answer(code, machine, call)
        if call in refused:
            assert got == REFUSAL, call
        elif call == CLONE3 or (call == 437 and read_only):
            assert got == REFUSE | errno.ENOSYS, call
        else:
            assert got == ALLOW, call
    assert answer(code, machine, READ[machine]) == ALLOW


@pytest.mark.parametrize("machine", MACHINES)
def test_threads_start_and_processes_do_not(machine: str) -> None:
    code = build(machine, read_only=False)
    call = CLONE[MACHINES.index(machine)]
    assert answer(code, machine, call, CLONE_THREAD | 0x100) == ALLOW
    assert answer(code, machine, call, 0x11) == REFUSAL  # SIGCHLD: what fork passes


@pytest.mark.parametrize("machine", MACHINES)
@pytest.mark.parametrize("flags", [os.O_WRONLY, os.O_RDWR, os.O_CREAT, os.O_TRUNC, os.O_RDONLY, os.O_DIRECTORY])
def test_files_open_for_writing_only_without_read_only(machine: str, flags: int) -> None:
    column = MACHINES.index(machine)
    writes = bool(flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC))
    for read_only in (True, False):
        code = build(machine, read_only=read_only)
        expected = REFUSAL if read_only and writes else ALLOW
        assert answer(code, machine, OPENAT[column], 0, 0, flags) == expected
        if OPEN[column] is not None:
            assert answer(code, machine, OPEN[column], 0, flags) == expected


@pytest.mark.parametrize("machine", MACHINES)
def test_calls_of_another_architecture_end_the_process(machine: str) -> None:
    code = build(machine, read_only=True)
    for other in {0x40000003, *ARCHITECTURES.values()} - {ARCHITECTURES[machine]}:
        assert answer(code, machine, READ[machine], architecture=other) == KILL
    if machine == "x86_64":
        assert answer(code, machine, X32 | 41) == KILL


def test_an_unknown_machine_has_no_filter() -> None:
    assert build("s390x", read_only=True) is None
