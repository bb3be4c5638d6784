"""The kernel filter (seccomp BPF) under which generated code runs: it needs no privilege, so it holds in any container.

Source: Linux, Documentation/userspace-api/seccomp_filter.rst; call numbers from the kernel's asm/unistd_64.h (x86_64)
and asm-generic/unistd.h (aarch64). It refuses new processes, programs and sockets, signals and any other hold on
other processes, shared memory, mounts; with `read_only` also every change of a file. Threads are allowed.
"""

from __future__ import annotations

import errno
import os
import struct
from collections.abc import Iterable, Iterator, Mapping

# linux/audit.h
ARCHITECTURES = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
Numbers = Mapping[str, tuple[int | None, int | None]]  # call -> number on x86_64, on aarch64; None where there is none

REFUSED: Numbers = {
    # processes and programs
    "fork": (57, None), "vfork": (58, None), "execve": (59, 221), "execveat": (322, 281),
    # sockets; io_uring opens them too
    "socket": (41, 198), "io_uring_setup": (425, 425),
    # signals
    "kill": (62, 129), "tkill": (200, 130), "tgkill": (234, 131), "rt_sigqueueinfo": (129, 138),
    "rt_tgsigqueueinfo": (297, 240), "pidfd_send_signal": (424, 424), "pidfd_open": (434, 434),
    # other processes of the same user
    "ptrace": (101, 117), "process_vm_readv": (310, 270), "process_vm_writev": (311, 271), "pidfd_getfd": (438, 438),
    "prlimit64": (302, 261), "setpriority": (141, 140), "ioprio_set": (251, 30), "sched_setaffinity": (203, 122),
    "sched_setscheduler": (144, 119), "sched_setparam": (142, 118), "sched_setattr": (314, 274),
    "migrate_pages": (256, 238), "move_pages": (279, 239), "process_madvise": (440, 440),
    # memory that no limit counts, or that outlives the process
    "memfd_create": (319, 279), "shmget": (29, 194), "msgget": (68, 186), "semget": (64, 190), "mq_open": (240, 180),
    # namespaces, mounts and parts of the kernel that had holes
    "unshare": (272, 97), "setns": (308, 268), "mount": (165, 40), "umount2": (166, 39), "chroot": (161, 51),
    "pivot_root": (155, 41), "keyctl": (250, 219), "add_key": (248, 217), "request_key": (249, 218),
    "bpf": (321, 280), "userfaultfd": (323, 282), "perf_event_open": (298, 241),
}  # fmt: skip

FILE_CHANGES: Numbers = {
    "creat": (85, None), "unlink": (87, None), "unlinkat": (263, 35), "rename": (82, None), "renameat": (264, 38),
    "renameat2": (316, 276), "rmdir": (84, None), "mkdir": (83, None), "mkdirat": (258, 34), "link": (86, None),
    "linkat": (265, 37), "symlink": (88, None), "symlinkat": (266, 36), "mknod": (133, None), "mknodat": (259, 33),
    "truncate": (76, 45), "ftruncate": (77, 46), "chmod": (90, None), "fchmod": (91, 52), "fchmodat": (268, 53),
    "fchmodat2": (452, 452), "chown": (92, None), "fchown": (93, 55), "lchown": (94, None), "fchownat": (260, 54),
    "setxattr": (188, 5), "lsetxattr": (189, 6), "fsetxattr": (190, 7), "removexattr": (197, 14),
    "lremovexattr": (198, 15), "fremovexattr": (199, 16), "utime": (132, None), "utimes": (235, None),
    "futimesat": (261, None), "utimensat": (280, 88),
}  # fmt: skip

CLONE: tuple[int | None, int | None] = (56, 220)
CLONE3, OPENAT2 = 435, 437  # the same on both
OPEN: tuple[int | None, int | None] = (2, None)
OPENAT: tuple[int | None, int | None] = (257, 56)
CLONE_THREAD = 0x10000  # linux/sched.h
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC
X32 = 0x40000000  # asm/unistd.h: the bit of x86_64's second table of calls, which would pass by the numbers above

# linux/bpf_common.h, linux/seccomp.h
LOAD, IF_EQUAL, IF_AT_LEAST, IF_ANY_BIT, RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
ALLOW, REFUSE, KILL = 0x7FFF0000, 0x00050000, 0x80000000
CALL, ARCHITECTURE, ARGUMENTS = 0, 4, 16  # offsets in struct seccomp_data; arguments are of 8 bytes, low half first

Step = tuple[int, int, int, int]  # code, jump if true, jump if false, operand


def build(machine: str, *, read_only: bool) -> bytes | None:
    """The filter as an array of struct sock_filter, or None for a machine (platform.machine()) it does not know.

    `machine` names the kernel's architecture; calls of any other architecture (32-bit, x32) kill the process.
    """
    if machine not in ARCHITECTURES:
        return None
    column = list(ARCHITECTURES).index(machine)
    steps: list[Step] = [
        (LOAD, 0, 0, ARCHITECTURE),
        (IF_EQUAL, 1, 0, ARCHITECTURES[machine]),
        (RETURN, 0, 0, KILL),
        (LOAD, 0, 0, CALL),
    ]
    if machine == "x86_64":
        steps += [(IF_AT_LEAST, 0, 1, X32), (RETURN, 0, 0, KILL)]
    steps += _refuse(_numbers(REFUSED, column), errno.EPERM)
    # Its flags lie in memory, where no filter sees them; "unknown call" makes the C library use clone.
    steps += _refuse([CLONE3], errno.ENOSYS)
    steps += _by_flags(CLONE[column], argument=0, bits=CLONE_THREAD, refuse_if_set=False)
    if read_only:
        steps += _refuse(_numbers(FILE_CHANGES, column), errno.EPERM)
        steps += _refuse([OPENAT2], errno.ENOSYS)
        steps += _by_flags(OPEN[column], argument=1, bits=WRITING, refuse_if_set=True)
        steps += _by_flags(OPENAT[column], argument=2, bits=WRITING, refuse_if_set=True)
    steps.append((RETURN, 0, 0, ALLOW))
    return b"".join(struct.pack("=HBBI", *step) for step in steps)


def _numbers(table: Numbers, column: int) -> Iterator[int]:
    return (number for numbers in table.values() if (number := numbers[column]) is not None)


def _refuse(numbers: Iterable[int], error: int) -> list[Step]:
    steps: list[Step] = []
    for number in numbers:
        steps += [(IF_EQUAL, 0, 1, number), (RETURN, 0, 0, REFUSE | error)]
    return steps


def _by_flags(number: int | None, *, argument: int, bits: int, refuse_if_set: bool) -> list[Step]:
    """Refuse a call whose argument has any of the bits, or none of them."""
    if number is None:
        return []
    set_, unset = (REFUSE | errno.EPERM, ALLOW) if refuse_if_set else (ALLOW, REFUSE | errno.EPERM)
    return [
        (IF_EQUAL, 0, 4, number),
        (LOAD, 0, 0, ARGUMENTS + 8 * argument),
        (IF_ANY_BIT, 0, 1, bits),
        (RETURN, 0, 0, set_),
        (RETURN, 0, 0, unset),
    ]
