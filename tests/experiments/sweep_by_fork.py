"""Starts sweeps by fork: a line of JSON arguments in, the sweep's pid out, and its status when it has ended.

Importing torch and transformers takes ten times as long as a tiny run, so the runs are forks of this process as well;
they are real processes that the real code executes, with its locks, its death signal and its records.
"""

from __future__ import annotations

import functools
import json
import os
import signal
import subprocess
import sys
import traceback
from types import SimpleNamespace

import experiments.workers
from experiments.config import load_config
from experiments.run import run
from experiments.sweep import main as sweep


def forked(work, prepare=lambda: None):
    """Pid of a process that does `work` and ends with the code it returns."""
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        prepare()
        code = work()
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


class ForkedRun:
    """What the sweep uses of subprocess.Popen."""

    def __init__(self, command, *, stdout, pass_fds, preexec_fn, **_):
        def prepare():
            os.setsid()
            preexec_fn()
            for number in experiments.workers.STOP_SIGNALS:
                signal.signal(number, signal.SIG_DFL)
            os.dup2(stdout.fileno(), 1)
            os.dup2(1, 2)
            for descriptor in set(map(int, os.listdir("/proc/self/fd"))) - {0, 1, 2, *pass_fds}:
                if os.path.exists(f"/proc/self/fd/{descriptor}"):
                    os.close(descriptor)

        self.returncode = None
        self.pid = forked(lambda: run(load_config(command[3:])) and 0, prepare)

    def poll(self):
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self.returncode = os.waitstatus_to_exitcode(status) if pid else None
        return self.returncode


if __name__ == "__main__":
    constants = {"DEVNULL": subprocess.DEVNULL, "STDOUT": subprocess.STDOUT}
    experiments.workers.subprocess = SimpleNamespace(Popen=ForkedRun, **constants)  # git is still asked as ever
    for line in sys.stdin:
        given = json.loads(line)
        pid = forked(functools.partial(sweep, given))
        print(pid, flush=True)
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
