"""The judge's client against a real HTTP server that fails in every way a real one does."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from eval.judge import JudgeSettings, Reply, ask, median_rating, parse_rating, safe_name
from eval.judge_prompts import FASTCHAT_NAMES, OWN, PLACES, load_prompts
from lora_ga.errors import SetupError
from tests.eval.judge_stub import JudgeStub, completion

GOOD = completion("Fine. Grade: [[7]]")


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


def _settings(url: str = "http://127.0.0.1:9/v1", **changes) -> JudgeSettings:
    return JudgeSettings(base_url=url, model="stub", backoff=0.0, **changes)


def _talks(count: int) -> list[list[dict[str, str]]]:
    return [[{"role": "user", "content": f"question {i}"}] for i in range(count)]


@given(st.integers(10, 100), st.text(alphabet="abc [9", max_size=20), st.text(alphabet="abc ]9", max_size=20))
def test_a_rating_is_read_wherever_it_stands(tenths, before, after):
    assert parse_rating(f"{before}\n[[{tenths / 10}]]{after}") == tenths / 10


@pytest.mark.parametrize(
    ("text", "rating"),
    [
        ("Rating: [[10]]", 10.0),
        ("[[1]] or rather [[9]]", 1.0),
        ("see [3]; Rating: [[8]]", 8.0),
        ("Rating: [6]", 6.0),
        ("[[0]]", None),
        ("[[11]]", None),
        ("[[7.]]", 7.0),
        ("Rating: 7", None),
        ("[[rating]] [[-3]] [[7/10]]", None),
        ("", None),
    ],
)
def test_what_a_rating_is(text, rating):
    assert parse_rating(text) == rating


def test_median_is_of_what_can_be_read():
    def replies(*texts: str) -> list[Reply]:
        return [Reply(text, "m", "stop") for text in texts]

    assert median_rating(replies("[[2]]", "[[9]]", "[[8]]")) == 8.0
    assert median_rating(replies("[[2]]", "nothing", "[[9]]")) == 5.5
    assert median_rating(replies("nothing", "[[12]]")) is None


def test_request_is_openai_s_and_carries_the_key_of_the_environment(tmp_path, monkeypatch):
    monkeypatch.setenv("A_KEY", "sk-secret")
    with JudgeStub(lambda number, body: (200, GOOD)) as stub:
        [[reply]] = ask(_talks(1), _settings(stub.url, api_key_env="A_KEY", max_tokens=5), tmp_path / "c.jsonl")
    assert stub.paths == ["/v1/chat/completions"]
    assert stub.bodies == [{"model": "stub", "messages": _talks(1)[0], "temperature": 0.0, "max_tokens": 5}]
    assert stub.headers[0]["Authorization"] == "Bearer sk-secret"
    assert reply == Reply("Fine. Grade: [[7]]", "stub-0613", "stop")
    assert "sk-secret" not in (tmp_path / "c.jsonl").read_text()


def test_newer_models_take_another_limit_and_no_temperature():
    settings = _settings(max_tokens_field="max_completion_tokens", temperature=None, max_tokens=9)
    assert set(settings.body([])) == {"model", "messages", "max_completion_tokens"}


@pytest.mark.parametrize(
    "bad", [(429, "slow down"), (500, "oops"), (503, ""), (200, "<html>"), (200, '{"choices": []}')]
)
def test_asks_again_after_a_passing_failure(bad, tmp_path):
    with JudgeStub(lambda number, body: bad if number < 2 else (200, GOOD)) as stub:
        [[reply]] = ask(_talks(1), _settings(stub.url), tmp_path / "c.jsonl")
    assert parse_rating(reply.text) == 7.0 and len(stub.bodies) == 3


def test_a_silent_server_is_asked_again(tmp_path):
    release = threading.Event()

    def answer(number, body):
        if number == 0:
            release.wait(60)
        return 200, GOOD

    with JudgeStub(answer) as stub:
        try:
            [[reply]] = ask(_talks(1), _settings(stub.url, timeout=1.0), tmp_path / "c.jsonl")
        finally:
            release.set()
    assert parse_rating(reply.text) == 7.0 and len(stub.bodies) >= 2


@pytest.mark.parametrize("bad", [(500, "oops"), (429, "busy"), (200, "not json")])
def test_gives_up_after_the_retries_in_one_line(bad, tmp_path):
    with JudgeStub(lambda number, body: bad) as stub, pytest.raises(SetupError) as caught:
        ask(_talks(1), _settings(stub.url, retries=2), tmp_path / "c.jsonl")
    assert len(stub.bodies) == 3 and "\n" not in str(caught.value) and "are kept" in str(caught.value)


def test_a_refusal_is_not_repeated_and_hides_the_key(tmp_path, monkeypatch):
    monkeypatch.setenv("A_KEY", "sk-secret")
    with JudgeStub(lambda number, body: (401, "bad key\nsk-secret")) as stub, pytest.raises(SetupError) as caught:
        ask(_talks(1), _settings(stub.url, api_key_env="A_KEY"), tmp_path / "c.jsonl")
    assert len(stub.bodies) == 1 and "bad key ***" in str(caught.value) and "sk-secret" not in str(caught.value)


def test_nobody_there_is_one_line(tmp_path):
    with JudgeStub(lambda number, body: (200, GOOD)) as stub:
        url = stub.url
    with pytest.raises(SetupError, match="does not answer"):
        ask(_talks(1), _settings(url, retries=1), tmp_path / "c.jsonl")


def test_concurrency_is_reached_and_never_exceeded(tmp_path):
    """Each request waits for two others: fewer than three at once would never end, more show in the peak."""
    meeting = threading.Barrier(3, timeout=60)

    def answer(number, body):
        meeting.wait()
        return 200, completion(body["messages"][0]["content"])

    with JudgeStub(answer) as stub:
        replies = ask(_talks(9), _settings(stub.url, concurrency=3), tmp_path / "c.jsonl")
    assert stub.peak == 3
    assert [reply.text for [reply] in replies] == [f"question {i}" for i in range(9)]


def test_recorded_replies_cost_no_request(tmp_path):
    cache = tmp_path / "c.jsonl"
    with JudgeStub(lambda number, body: (200, completion(f"[[{number % 9 + 1}]]"))) as stub:
        first = ask(_talks(4), _settings(stub.url, repeats=2), cache)
        assert len(stub.bodies) == 8
        elsewhere = _settings("http://other.invalid/v1", repeats=2, replay_only=True, api_key_env="NOT_SET")
        assert ask(_talks(4), elsewhere, cache) == first
        more = ask(_talks(4), _settings(stub.url, repeats=3), cache)
    assert len(stub.bodies) == 12 and [row[:2] for row in more] == first


@pytest.mark.parametrize("change", [{"model": "other"}, {"temperature": 0.5}, {"max_tokens": 7}, {"repeats": 2}])
def test_replay_refuses_what_was_not_recorded(change, tmp_path):
    cache = tmp_path / "c.jsonl"
    with JudgeStub(lambda number, body: (200, GOOD)) as stub:
        ask(_talks(2), _settings(stub.url), cache)
        with pytest.raises(SetupError, match="2 of the judge's replies are not in"):
            ask(_talks(2), replace(_settings(stub.url, replay_only=True), **change), cache)
    assert len(stub.bodies) == 2


def test_a_request_that_occurs_twice_is_sent_once(tmp_path):
    with JudgeStub(lambda number, body: (200, completion(f"[[{number + 1}]]"))) as stub:
        replies = ask([*_talks(1), *_talks(1)], _settings(stub.url, concurrency=1), tmp_path / "c.jsonl")
    assert len(stub.bodies) == 1 and replies[0] == replies[1]


CHILD = """
import sys
from pathlib import Path
from eval.judge import JudgeSettings, ask
talks = [[{"role": "user", "content": f"question {i}"}] for i in range(6)]
ask(talks, JudgeSettings(base_url=sys.argv[1], model="stub", concurrency=1), Path(sys.argv[2]))
"""


def test_a_killed_judging_continues(tmp_path):
    """The fourth request finds its client killed: three replies are on disk, and only the others are asked again."""
    fourth, release = threading.Event(), threading.Event()

    def answer(number, body):
        if number == 3:
            fourth.set()
            release.wait(60)
        return 200, completion(f"[[{int(body['messages'][0]['content'][-1]) + 1}]]")

    cache = tmp_path / "c.jsonl"
    root = Path(__file__).resolve().parents[2]
    with JudgeStub(answer) as stub:
        child = subprocess.Popen(
            [sys.executable, "-c", CHILD, stub.url, str(cache)], cwd=root, stderr=subprocess.DEVNULL, env=os.environ
        )
        try:
            assert fourth.wait(120)
        finally:
            child.kill()
            child.wait()
            release.set()
        before = len(stub.bodies)
        with cache.open("a") as handle:  # a kill in the middle of a write
            handle.write('{"key": "half')
        replies = ask(_talks(6), _settings(stub.url), cache)
        assert len(stub.bodies) - before == 3
        assert ask(_talks(6), _settings(stub.url), cache) == replies and len(stub.bodies) - before == 3
    assert [parse_rating(reply.text) for [reply] in replies] == [1.0, 2.0, 3.0, 4.0, 5.0, 6.0]


def test_an_error_keeps_what_was_paid_for(tmp_path):
    cache = tmp_path / "c.jsonl"
    stub = JudgeStub(lambda number, body: (200, GOOD) if number < 2 else (400, "too long"))
    with stub, pytest.raises(SetupError, match="too long"):
        ask(_talks(5), _settings(stub.url, concurrency=1), cache)
    assert len(cache.read_text().splitlines()) == 2


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"base_url": "localhost:8000"}, "judge.base_url"),
        ({"base_url": "http://h/v1/chat/completions"}, "judge.base_url"),
        ({"base_url": "https://user:pw@h/v1"}, "judge.api_key_env"),
        ({"base_url": "https://h/v1?key=x"}, "judge.api_key_env"),
        ({"base_url": "http://[h/v1"}, "judge.base_url"),
        ({"repeats": 0}, "judge.repeats"),
        ({"concurrency": 0}, "judge.concurrency"),
        ({"timeout": 0.0}, "judge.timeout"),
        ({"api_key_env": "SURELY_NOT_SET"}, "SURELY_NOT_SET"),
    ],
)
def test_bad_settings_are_refused_before_anything_is_asked(changes, named):
    with pytest.raises(SetupError, match=named) as caught:
        replace(_settings(), **changes).check()
    assert "pw" not in str(caught.value)


def test_names_fit_into_file_names():
    assert safe_name("meta-llama/Llama-2-7b") == "meta-llama_Llama-2-7b"
    assert safe_name("/home/somebody/models/SmolLM2-135M@main") == "SmolLM2-135M@main"
    assert safe_name("..") == "model"


def test_own_prompts_ask_for_a_rating_and_show_every_place():
    for case, prompt in OWN.cases.items():
        text = prompt.template.format(**{place: f"<{place} {{}}>" for place in PLACES[case]})
        assert all(f"<{place} {{}}>" in text for place in PLACES[case])
        assert parse_rating(text) is not None  # the form it shows is one that is read
    assert len({prompt.template for prompt in OWN.cases.values()}) == 4 and len(OWN.sha256) == 64


def _prompt_file(folder: Path, **changes: str) -> Path:
    rows = [
        {
            "name": name,
            "system_prompt": "s",
            "prompt_template": f"{turn}{with_reference}",
            "output_format": "[[rating]]",
        }
        for (turn, with_reference), name in FASTCHAT_NAMES.items()
    ]
    rows[0] |= changes
    path = folder / "prompts.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_prompts_of_a_file_replace_ours(tmp_path):
    prompts = load_prompts(str(_prompt_file(tmp_path)))
    assert prompts.origin == "file" and prompts.cases[2, True].template == "2True"
    assert prompts.sha256 != OWN.sha256 == load_prompts(None).sha256


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": "pair-v2"}, "has no prompt single-v1"),
        ({"output_format": "[[A]]"}, "output_format"),
        ({"prompt_template": "{ref_answer_1}"}, "use only {question}, {answer}"),
    ],
)
def test_a_prompt_file_that_cannot_work_is_refused(changes, message, tmp_path):
    with pytest.raises(SetupError, match=message):
        load_prompts(str(_prompt_file(tmp_path, **changes)))


def test_a_missing_prompt_file_is_one_line(tmp_path):
    with pytest.raises(SetupError, match=r"judge_prompts\.jsonl"):
        load_prompts(str(tmp_path / "absent.jsonl"))
