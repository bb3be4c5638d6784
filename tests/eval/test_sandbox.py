"""Hostile programs, each with small limits of its own: none does harm, none passes."""

from __future__ import annotations

import logging
import os
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from eval import sandbox
from eval.sandbox import LAUNCHER, LAYERS, Limits, SandboxError, isolation, run
from lora_ga.errors import SetupError

SMALL = Limits(30.0, memory_bytes=192 << 20, disk_bytes=1 << 20, open_files=32, threads=8, output_bytes=1 << 16)
NAMESPACES = ("network namespace", "process namespace", "ipc namespace", "private root")
SETS = {
    "all": None,
    "container": ("syscall filter", "memory limit"),  # as without any privilege
    "user": ("user namespace", *NAMESPACES, "no capabilities", "syscall filter", "memory limit"),
    "root": (*NAMESPACES, "other user", "no capabilities", "syscall filter", "memory limit"),
}


@pytest.fixture(params=list(SETS))
def layers(request: pytest.FixtureRequest) -> tuple[str, ...] | None:
    """Every set of layers that this machine can put in force."""
    chosen = SETS[request.param]
    try:
        assert run("import math", SMALL, layers=chosen).outcome == "passed"
    except SandboxError as error:
        pytest.skip(f"this machine refuses {request.param}: {error}")
    return chosen


@pytest.fixture
def survivors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Fails if a process of the test's own launcher is left at its end."""
    own = tmp_path / "launcher" / LAUNCHER.name
    own.parent.mkdir()
    own.write_bytes(LAUNCHER.read_bytes())
    monkeypatch.setattr(sandbox, "LAUNCHER", own)

    def left() -> list[str]:
        found = []
        for process in Path("/proc").glob("[0-9]*"):
            try:
                found += [process.name] if str(own).encode() in (process / "cmdline").read_bytes() else []
            except OSError:  # it has just ended
                continue
        return found

    yield left()
    until = time.monotonic() + 20  # the kernel ends a namespace's processes a moment after its first one
    while left() and time.monotonic() < until:
        time.sleep(0.05)
    assert not left()


def test_a_program_passes_by_reaching_its_end(layers: tuple[str, ...] | None) -> None:
    verdict = run("import math\nassert math.sqrt(4) == 2\nprint('out', flush=True)", SMALL, layers=layers)
    assert (verdict.outcome, verdict.detail) == ("passed", "")
    assert verdict.output == b"out\n"


@pytest.mark.parametrize(
    "ending",
    [
        "import os; os._exit(0)",
        "import sys; sys.exit(0)",
        "raise SystemExit",
        "raise KeyboardInterrupt",
        "assert False",
        "def broken(:",
        "\x00",
        "\ud800",
        "import ctypes; ctypes.string_at(0)",
        "import os; os.abort()",
        "print('passed'); import os; os._exit(0)",
        "input()",
        "class E(Exception):\n    def __str__(self): raise SystemExit(0)\nraise E",
    ],
)
def test_any_other_end_is_a_failure(ending: str) -> None:
    assert run(f"{ending}\nx = 1", SMALL).outcome == "failed"


def test_events_without_the_token_are_no_verdict() -> None:
    forged = '{"token": "0", "event": "verdict", "outcome": "passed", "detail": ""}'
    program = f"""
import os
for descriptor in range(3, 32):
    try:
        os.write(descriptor, b'\\n{forged}\\n{{"event": "end"}}\\nnull\\n[1]\\n{{{{')
    except OSError:
        continue
os._exit(0)
"""
    verdict = run(program, SMALL)
    assert verdict.outcome == "failed"
    assert "code 0" in verdict.detail


def test_seeds_are_fixed() -> None:
    program = "import random; print(random.random(), hash('a'), list({'x', 'y', 'z', 'w'}), flush=True)"
    assert b"[" in run(program, SMALL).output
    assert run(program, SMALL).output == run(program, SMALL).output


def test_waiting_for_ever_is_timed_out(layers: tuple[str, ...] | None, survivors: list[str]) -> None:
    for program in ("while True: pass", "import time; time.sleep(1000)", "import signal; signal.pause()"):
        assert run(program, Limits(0.5), layers=layers).outcome == "timed out"


def test_more_processor_time_than_wall_time_is_a_limit() -> None:
    # One thread cannot use more of the one than of the other, so the program lowers the limit itself.
    program = "import resource; resource.setrlimit(resource.RLIMIT_CPU, (1, 1))\nwhile True: pass"
    chosen = [name for name, on in isolation().items() if on and name != "syscall filter"]
    assert run(program, Limits(30.0), layers=chosen).outcome == "resource limit"


def test_endless_output_is_cut() -> None:
    for stream in ("stdout", "stderr"):
        verdict = run(f"import sys\nwhile True: sys.{stream}.write('x' * 1000)", SMALL)
        assert (verdict.outcome, verdict.detail) == ("resource limit", "output")
        assert len(verdict.output) == SMALL.output_bytes


def test_endless_report_is_cut() -> None:
    program = """
import os
while True:
    for descriptor in range(3, 32):
        try: os.write(descriptor, b'x' * 4096)
        except OSError: pass
"""
    assert run(program, SMALL).outcome == "resource limit"


@pytest.mark.parametrize("step", ["bytearray(1 << 20)", "object()", "'x' * 1000 + str(len(hog))"])
def test_taking_memory_is_a_limit(step: str, layers: tuple[str, ...] | None) -> None:
    verdict = run(f"hog = []\nwhile True: hog.append({step})", Limits(30.0, memory_bytes=128 << 20), layers=layers)
    assert (verdict.outcome, verdict.detail) == ("resource limit", "memory")


def test_large_files_are_a_limit() -> None:
    if not isolation()["private root"]:
        pytest.skip("no file can be written at all")
    one = "with open('a', 'wb') as file: file.write(b'x' * (2 << 20))"
    many = "for i in range(9):\n    with open(f'a{i}', 'wb') as file: file.write(b'x' * (1 << 19))"
    for program in (one, many):
        assert run(program, SMALL).outcome == "resource limit"
    assert run("open('a', 'w').write('x'); import os; os.remove('a')", SMALL).outcome == "passed"


def test_bounded_forks_are_refused(layers: tuple[str, ...] | None, survivors: list[str]) -> None:
    assert "Permission" in run("import os; os.fork()", SMALL, layers=layers).detail
    assert run("import subprocess, sys; subprocess.run([sys.executable])", SMALL, layers=layers).outcome == "failed"


def bomb(forks: int) -> str:
    """At most `forks` children, which sleep; it says how many came to be."""
    return f"""
import os, time
made = 0
for _ in range({forks}):
    try: child = os.fork()
    except OSError: break
    if child == 0:
        time.sleep(1000)
        os._exit(0)
    made += 1
print(made, flush=True)
assert made == 0
"""


@pytest.mark.parametrize("owner", ["other user", "user namespace"])
def test_without_the_filter_the_number_of_processes_is_bounded_and_all_end(owner: str, survivors: list[str]) -> None:
    chosen = ((owner,) if owner == "user namespace" else ()) + NAMESPACES
    chosen += ("no capabilities", "memory limit") + ((owner,) if owner == "other user" else ())
    if os.geteuid() == 0 and owner == "user namespace":
        pytest.skip("the limit does not bind root")
    try:
        verdict = run(bomb(12), SMALL, layers=chosen)
    except SandboxError as error:
        pytest.skip(f"this machine refuses {owner}: {error}")
    assert verdict.outcome == "failed"
    assert 0 < int(verdict.output) < SMALL.threads


def test_a_fork_bomb_starts_nothing(survivors: list[str]) -> None:
    if not isolation()["syscall filter"]:
        pytest.skip("only the filter makes this safe to try")
    assert run(bomb(4), SMALL).output == b"0\n"  # a bounded one first
    endless = "import os\nwhile True:\n    try: os.fork()\n    except OSError: pass"
    assert run(endless, Limits(0.5)).outcome == "timed out"


def test_threads_are_bounded() -> None:
    program = """
import threading, time
for _ in range(200): threading.Thread(target=time.sleep, args=(1000,), daemon=True).start()
"""
    assert run(program, SMALL).outcome in ("failed", "resource limit")
    assert run("import threading\nt = threading.Thread(target=int)\nt.start()\nt.join()", SMALL).outcome == "passed"


def test_files_outside_its_folder_stay(layers: tuple[str, ...] | None, tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_text("here")
    victim.chmod(0o666)
    for act in ("os.remove(p)", "open(p, 'w')", "os.truncate(p, 0)", "os.rename(p, p + '2')", "os.chmod(p, 0)"):
        assert run(f"import os; p = {str(victim)!r}; {act}", SMALL, layers=layers).outcome == "failed", act
        assert (victim.read_text(), victim.stat().st_mode & 0o777) == ("here", 0o666)
    assert run("import shutil; shutil.rmtree('/usr/lib')", SMALL).outcome == "failed"
    assert Path("/usr/lib").exists()


def test_its_folder_is_its_home_and_is_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    program = (
        "import os, tempfile; assert os.getcwd() == os.environ['HOME'] == tempfile.gettempdir(); print(os.getcwd())"
    )
    if isolation()["private root"]:
        assert run(program, SMALL).outcome == "passed"
    assert run("assert __import__('os').listdir('.') == []", SMALL).outcome == "passed"
    run("open('left', 'w')", SMALL)
    assert list(tmp_path.iterdir()) == []


def test_a_local_server_is_not_reached(layers: tuple[str, ...] | None) -> None:
    reached = []
    with socket.create_server(("127.0.0.1", 0)) as server:

        def accept() -> None:
            try:
                reached.append(server.accept())
            except OSError:
                return

        threading.Thread(target=accept, daemon=True).start()
        address = server.getsockname()
        program = f"import socket\nsocket.create_connection({address!r}, 1)"
        assert run(program, SMALL, layers=layers).outcome == "failed"
        assert not reached
        socket.create_connection(address, 5).close()  # the server was there
        server.shutdown(socket.SHUT_RDWR)


def test_the_environment_is_not_inherited(layers: tuple[str, ...] | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET_OF_THE_PARENT", "hidden")
    program = """
import os
print(sorted(os.environ), flush=True)
os.environ["SECRET_OF_THE_PARENT"]
"""
    verdict = run(program, SMALL, layers=layers)
    assert verdict.outcome == "failed"
    assert "KeyError" in verdict.detail
    assert b"SECRET" not in verdict.output


def test_in_a_private_root_nothing_of_the_user_is_seen(tmp_path: Path) -> None:
    if not isolation()["private root"]:
        pytest.skip("no private root here")
    program = """
import os, sys
shown = ("/usr", "/lib", "/lib64", "/nix", sys.base_prefix + "/lib", sys.base_prefix + "/lib64")
for folder, folders, files in os.walk("/"):
    folders[:] = [name for name in folders if os.path.join(folder, name) not in shown]
    for name in files: print(os.path.join(folder, name), flush=True)
"""
    (tmp_path / "own").write_text("secret")
    found = run(program, SMALL).output.decode().split()
    assert "/dev/null" in found
    assert set(found) <= {"/dev/null", "/etc/ld.so.cache"}


def test_other_processes_get_no_signal(layers: tuple[str, ...] | None) -> None:
    for target in ("os.kill(os.getppid(), 9)", "os.killpg(0, 9)", f"os.kill({os.getpid()}, 0)"):
        assert run(f"import os; {target}; raise ValueError", SMALL, layers=layers).outcome == "failed"
    assert run("x = 1", SMALL, layers=layers).outcome == "passed"


def test_a_program_that_leaves_its_group_ends_with_it(layers: tuple[str, ...] | None, survivors: list[str]) -> None:
    assert run("import os, time\nos.setsid()\ntime.sleep(1000)", Limits(0.5), layers=layers).outcome == "timed out"


def test_a_layer_that_fails_runs_nothing(tmp_path: Path) -> None:
    missing = ("private root",) if os.geteuid() != 0 else ("user namespace", "other user")
    mark = tmp_path / "ran"
    with pytest.raises(SandboxError):
        run(f"open({str(mark)!r}, 'w')", SMALL, layers=missing)
    assert not mark.exists()


def test_isolation_names_every_layer_and_is_what_runs() -> None:
    found = isolation()
    assert tuple(found) == LAYERS
    assert found["memory limit"]
    assert not (found["other user"] and os.geteuid() != 0)
    in_force = tuple(name for name, on in found.items() if on)
    assert run("x = 1", SMALL, layers=in_force).outcome == "passed"


def test_missing_protection_is_warned_of(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(sandbox, "_accepted", lambda layers: ("memory limit",))
    isolation.cache_clear()
    try:
        with caplog.at_level(logging.WARNING):
            assert isolation()["network namespace"] is False
    finally:
        isolation.cache_clear()
    assert [record.levelname for record in caplog.records] == ["WARNING"] * 4
    assert "network access" in caplog.text


def test_a_system_without_processes_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "fork")
    with pytest.raises(SetupError, match="on Linux"):
        run("x = 1", SMALL)
