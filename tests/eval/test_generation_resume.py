"""Proves that no answer is made twice and none is lost: killed runs, damaged files, more samples, two processes."""

import fcntl
import json
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from eval.decoding import Decoding, Generation, Request
from eval.generation import AnswerFile, GenerationReport, generate
from lora_ga.errors import SetupError

PROMPTS = [f"w{i} w{i + 1} w{2 * i}" for i in range(10)]
SAMPLED = Decoding(do_sample=True, max_new_tokens=5, samples=2)

# Dies in the middle, as by the kernel, after writing half a line as a full disk or a lost node would leave it.
VICTIM = """
import os, signal, sys
from pathlib import Path
from transformers import AutoModelForCausalLM, AutoTokenizer
from eval.decoding import Decoding
from eval.generation import generate

folder, prompts = Path(sys.argv[1]), sys.argv[2:]
model = AutoModelForCausalLM.from_pretrained(folder / "model")
whole = model.forward

def dying(**arguments):
    path = next((folder / "answers").glob("*.jsonl"), None)
    if path and path.read_bytes().count(b"\\n") >= 8:
        with path.open("a") as handle:
            handle.write('{"prompt_hash": "12ab", "sam')
        os.kill(os.getpid(), signal.SIGKILL)
    return whole(**arguments)

model.forward = dying
decoding = Decoding(do_sample=True, max_new_tokens=5, samples=2)
generate(model, AutoTokenizer.from_pretrained(folder / "model"), prompts, decoding,
         weights="tiny", seed=0, batch_size=4, folder=folder / "answers")
"""

Run = Callable[..., tuple[list[list[Generation]], GenerationReport]]


@pytest.fixture
def run(tiny: Callable[..., Any], tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> Run:
    """run(...): answers of the random model, kept in one folder for the whole test."""

    def call(prompts: list[str] = PROMPTS, decoding: Decoding = SAMPLED, **others: Any) -> Any:
        settings = {"weights": "tiny", "seed": 0, "batch_size": 4, "folder": tmp_path / "answers", **others}
        return generate(settings.pop("model", None) or tiny(), tokenizer, prompts, decoding, **settings)

    return call


def test_a_killed_run_goes_on_where_it_was(
    run: Run, tiny: Callable[..., Any], tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    tiny().save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    died = subprocess.run(
        [sys.executable, "-c", VICTIM, str(tmp_path), *PROMPTS],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[2],
        check=False,
    )
    assert died.returncode == -signal.SIGKILL, died.stderr
    resumed, report = run()
    assert (report.found, report.made) == (8, 12)  # every answer that had ended was kept
    assert resumed == run(folder=tmp_path / "uninterrupted")[0]
    assert sum(answer.tokens for row in resumed for answer in row) > report.tokens > 0
    lines = [json.loads(line) for line in report.path.read_text().splitlines()]
    assert len({(line["prompt_hash"], line["sample"]) for line in lines}) == len(lines) == 20
    assert sorted(line["prompt"] for line in lines if line["sample"] == 0) == sorted(PROMPTS)


def test_what_is_there_is_never_made_again(run: Run) -> None:
    class Refusing(torch.nn.Module):
        """Has the weights' dtype and nothing else: any attempt to generate fails."""

        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.zeros(1))

    first, made = run()
    again, report = run(model=Refusing())
    assert again == first
    assert (made.found, made.made, report.found, report.made, report.tokens) == (0, 20, 20, 0, 0)
    fewer, _ = run(PROMPTS[3:5], Decoding(do_sample=True, max_new_tokens=5), model=Refusing())
    assert fewer == [[row[0]] for row in first[3:5]]


def test_more_samples_and_prompts_only_add(run: Run) -> None:
    first, before = run(PROMPTS[:4])
    more, report = run(PROMPTS, Decoding(do_sample=True, max_new_tokens=5, samples=3))
    assert report.path == before.path
    assert (report.found, report.made) == (8, 22)
    assert [row[:2] for row in more[:4]] == first
    assert run([PROMPTS[0], PROMPTS[0]])[0] == [first[0], first[0]]


def test_what_decides_an_answer_parts_the_files(run: Run) -> None:
    greedy = Decoding(do_sample=False, max_new_tokens=5)
    paths = {
        run()[1].path,
        run(seed=1)[1].path,
        run(weights="other")[1].path,
        run(decoding=Decoding(do_sample=True, max_new_tokens=4, samples=2))[1].path,
        run(decoding=Decoding(do_sample=True, max_new_tokens=5, stop=("w3",)))[1].path,
        run(decoding=greedy)[1].path,
    }
    assert len(paths) == 6
    assert run(decoding=greedy, seed=1)[1].made == 0  # greedy answers do not hang on the seed
    assert all(path.with_suffix(".settings.json").exists() for path in paths)


def test_a_damaged_line_is_made_again(run: Run, caplog: pytest.LogCaptureFixture) -> None:
    first, report = run()
    lines = report.path.read_text().splitlines()
    lines[2], lines[5] = lines[2][:20], '{"valid": "but no answer"}'
    report.path.write_text("\n".join(lines) + "\n")
    again, repaired = run()
    assert again == first and repaired.made == 2
    assert ":3 is damaged" in caplog.text and ":6 is damaged" in caplog.text


def test_processes_do_not_mix_their_lines(tmp_path: Path) -> None:
    # Lines longer than a pipe or a buffer, from three processes that begin with half a line in the file.
    (tmp_path / "x.jsonl").write_text('{"half')
    writer = """
import sys
from pathlib import Path
from eval.decoding import Generation, Request
from eval.generation import AnswerFile
file = AnswerFile(Path(sys.argv[1]))
for i in range(30):
    file.append([(Request(f"{sys.argv[2]} {i}", k), Generation(sys.argv[2] * 50_000, "eos", i)) for k in range(2)])
"""
    arguments = [sys.executable, "-c", writer, str(tmp_path / "x.jsonl")]
    processes = [subprocess.Popen([*arguments, name], cwd=Path(__file__).parents[2]) for name in "abc"]
    assert [process.wait() for process in processes] == [0, 0, 0]
    answers = AnswerFile(tmp_path / "x.jsonl").read()
    expected = {
        (Request(f"{name} {i}", k).prompt_hash, k): Generation(name * 50_000, "eos", i)
        for name in "abc"
        for i in range(30)
        for k in range(2)
    }
    assert answers == expected


def test_half_a_line_of_a_living_process_is_left_to_it(tmp_path: Path) -> None:
    file, line = (
        AnswerFile(tmp_path / "x.jsonl"),
        '{"prompt_hash": "a", "sample": 0, "text": "", "finish": "eos", "tokens": 1}',
    )
    waiting = threading.Thread(target=file.append, args=([(Request("p", 0), Generation("mine", "eos", 1))],))
    with file.path.open("a") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        other.write(line[:20])
        other.flush()
        waiting.start()
        waiting.join(timeout=0.5)
        assert waiting.is_alive()
        other.write(line[20:] + "\n")
    waiting.join()
    assert [answer.text for answer in file.read().values()] == ["", "mine"]


def test_the_first_of_two_answers_counts(tmp_path: Path) -> None:
    file = AnswerFile(tmp_path / "x.jsonl")
    for text in ("first", "second"):
        file.append([(Request("p", 0), Generation(text, "eos", 1))])
    assert [answer.text for answer in file.read().values()] == ["first"]


def test_refused_settings_leave_no_file(run: Run, tmp_path: Path) -> None:
    with pytest.raises(SetupError, match="batch of 0"):
        run(batch_size=0)
    assert not (tmp_path / "answers").exists()
