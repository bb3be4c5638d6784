"""The whole path on a real OpenAI-compatible server: `transformers serve` with SmolLM2-135M as the judge."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import requests

from eval.judge import JudgeSettings
from eval.judge_prompts import FASTCHAT_NAMES
from eval.mt_bench import Answer, Question, answer_questions, write_answers
from eval.mt_bench_scores import judge_answers, scores, write_judgments
from lora_ga.cache import cache_folder
from lora_ga.models import ModelSpec, load_tokenizer

pytestmark = pytest.mark.slow

# Two questions of our own: one open, one with a single solution, so both kinds of prompt are judged.
QUESTIONS = [
    Question(1, "writing", ("Name three colours.", "Now name three fruits of these colours.")),
    Question(2, "math", ("What is 12 + 30?", "Take half of it."), ("12 + 30 = 42.", "Half of 42 is 21.")),
]


@pytest.fixture(scope="module", autouse=True)
def no_proxy() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NO_PROXY", "127.0.0.1")
        yield


@pytest.fixture(scope="module")
def server(tmp_path_factory) -> Iterator[tuple[str, str]]:
    """The address and model id of a server on a free port, stopped at the end."""
    pytest.importorskip("openai", reason="transformers serve needs openai: pip install -e '.[dev]'")
    folder = _smollm2()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = tmp_path_factory.mktemp("server") / "log"
    # By a relative path, as the model's id is what stands after `serve`.
    command = [str(Path(sys.executable).with_name("transformers")), "serve", folder.name, "--device", "cpu"]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    with log.open("wb") as handle:
        process = subprocess.Popen(
            [*command, "--host", "127.0.0.1", "--port", str(port)],
            cwd=folder.parent,
            stdout=handle,
            stderr=handle,
            env=environment,
        )
    try:
        _wait(f"http://127.0.0.1:{port}/health", process, log)
        yield f"http://127.0.0.1:{port}/v1", folder.name
    finally:
        process.terminate()
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _smollm2() -> Path:
    """The folder of the local scale's model, converted once."""
    load_tokenizer(
        ModelSpec(name="smollm2", architecture="causal", source="asset:smollm2_gguf", target_modules=("q_proj",))
    )
    [folder] = cache_folder("models").glob("SmolLM2-135M-Instruct*")
    return folder


def _wait(url: str, process: subprocess.Popen, log: Path) -> None:
    for _ in range(300):
        assert process.poll() is None, log.read_text()
        try:
            if requests.get(url, timeout=5).ok:
                return
        except requests.RequestException:
            time.sleep(1)
    raise AssertionError(log.read_text())


def _complete(url: str, model: str):
    """The model under test is the same one, over the server's plain completions: prompts are FastChat's."""

    def complete(prompts: list[str], _: float | None) -> list[str]:
        texts = []
        for prompt in prompts:
            body = {"model": model, "prompt": prompt, "max_tokens": 24, "temperature": 0.0}
            response = requests.post(f"{url}/completions", json=body, timeout=300)
            response.raise_for_status()
            texts.append(response.json()["choices"][0]["text"])
        return texts

    return complete


@pytest.fixture(scope="module")
def answers(server) -> list[Answer]:
    answers = answer_questions(QUESTIONS, "alpaca", _complete(*server), turns=2)
    assert all(len(answer.turns) == 2 for answer in answers) and any("".join(answer.turns) for answer in answers)
    return answers


def _echo_prompts(folder: Path) -> str:
    """Prompts that name the rating to repeat, another per turn: this judge is too small to grade, but it can copy."""
    rows = [
        {
            "name": name,
            "system_prompt": "You repeat the user's text.",
            "prompt_template": f"Repeat exactly this text: Rating: [[{7 if turn == 1 else 4}]]",
            "output_format": "[[rating]]",
        }
        for (turn, _), name in FASTCHAT_NAMES.items()
    ]
    path = folder / "prompts.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def _settings(server: tuple[str, str], **changes) -> JudgeSettings:
    url, model = server
    return JudgeSettings(base_url=url, model=model, name="smollm2-judge", timeout=300, max_tokens=24, **changes)


def test_ratings_travel_from_a_real_server_to_the_viewer(server, answers, tmp_path):
    """A test of the path, not of grading: the numbers are those the prompts ask to be repeated."""
    folder, cache, prompts = tmp_path / "data" / "mt_bench", tmp_path / "replies.jsonl", _echo_prompts(tmp_path)
    write_answers(answers, folder, "smollm2")
    judged = judge_answers(
        QUESTIONS, answers, _settings(server, repeats=2, concurrency=2, prompts=prompts), cache=cache
    )
    found = scores(judged.judgments)
    means = [found[name] for name in ("first_turn", "second_turn", "average")]
    assert means == [{"value": 7.0, "n": 2}, {"value": 4.0, "n": 2}, {"value": 5.5, "n": 4}]
    path = write_judgments(judged.judgments, folder, "smollm2", "smollm2-judge")
    assert _show_result("smollm2-judge", tmp_path) == pytest.approx([7.0, 4.0, 5.5])

    nowhere = ("http://127.0.0.1:9/v1", server[1])
    again = judge_answers(
        QUESTIONS, answers, _settings(nowhere, repeats=2, prompts=prompts, replay_only=True), cache=cache
    )
    assert again.details == judged.details
    assert write_judgments(again.judgments, tmp_path, "smollm2", "smollm2-judge").read_bytes() == path.read_bytes()


def test_our_own_prompts_on_a_real_server_are_fully_accounted_for(server, answers, tmp_path):
    """Whatever so small a judge says: every judgment is in a mean or counted as unparsed, and the label is there."""
    judged = judge_answers(QUESTIONS, answers, _settings(server), cache=tmp_path / "replies.jsonl")
    assert [(j.question_id, j.turn) for j in judged.judgments] == [(1, 1), (2, 1), (1, 2), (2, 2)]
    assert all(reply.text and reply.finish in ("stop", "length") for j in judged.judgments for reply in j.replies)
    found = scores(judged.judgments)
    rated = found.get("average", {"n": 0})["n"]
    assert rated + found["unparsed_judgments"]["value"] == 4 == rated + len(judged.details["unparsed"])
    path = write_judgments(judged.judgments, tmp_path, "smollm2", "smollm2-judge")
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert len(rows) == 4 and sum(row["score"] == -1 for row in rows) == 4 - rated
    [reported] = judged.details["reported_models"]
    assert reported.startswith(server[1]) and judged.details["with_reference"] == 2
    assert "not to be compared" in judged.details["note"]


def _show_result(judge: str, cwd: Path) -> list[float]:
    command = [sys.executable, "-m", "fastchat.llm_judge.show_result", "--judge-model", judge]
    printed = subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=True).stdout
    assert "First turn" in printed and "Second turn" in printed and "Average" in printed
    return [float(number) for number in re.findall(r"^smollm2\s.*?(-?[\d.]+)$", printed, flags=re.MULTILINE)]
