"""What a record says of the code it came from."""

from __future__ import annotations

import subprocess

from lora_ga.records import git_state


def test_a_checkout_is_changed_by_code_and_not_by_results(tmp_path):
    def git(*arguments):
        subprocess.run(["git", "-C", str(tmp_path), *arguments], check=True, capture_output=True)

    assert git_state(tmp_path) == {"git_commit": None, "git_dirty": False}
    git("init")
    for name in ("code.py", "results/table.md"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("one\n")
    git("add", ".")
    git("-c", "user.name=n", "-c", "user.email=e", "commit", "-m", "m")
    found = git_state(tmp_path)
    assert len(found["git_commit"]) == 40 and not found["git_dirty"]
    (tmp_path / "results/table.md").write_text("two\n")
    (tmp_path / "notes.txt").write_text("not tracked\n")
    assert git_state(tmp_path) == found
    (tmp_path / "code.py").write_text("two\n")
    assert git_state(tmp_path) == {**found, "git_dirty": True}
