"""Proves what is asked of vLLM and how its answers are read; vLLM itself is replaced, as it needs a GPU."""

import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from eval.decoding import Decoding, Generation
from eval.generation import generate
from eval.vllm_engine import load_vllm
from lora_ga.errors import SetupError

PROMPTS = ["w1 w2", "w3", "w4 w5"]
ENDS: dict[str, tuple[str, Any]] = {"eos": ("stop", None), "stop": ("stop", "\nQ:"), "length": ("length", None)}


class FakeVllm(ModuleType):
    """Records what it is asked and answers by the prompts' ids, with one way to end after another."""

    def __init__(self) -> None:
        super().__init__("vllm")
        self.loaded: list[dict[str, Any]] = []
        self.asked: list[tuple[list[int], Any]] = []
        outer = self

        class LLM:
            def __init__(self, **settings: Any) -> None:
                outer.loaded.append(settings)

            def generate(self, prompts: list[dict[str, list[int]]], params: list[Any], use_tqdm: bool) -> list[Any]:
                answers = []
                for prompt, one in zip(prompts, params, strict=True):
                    reason, stop = list(ENDS.values())[len(outer.asked) % 3]
                    outer.asked.append((prompt["prompt_token_ids"], one))
                    text = f"said {prompt['prompt_token_ids']}"
                    answers.append(SimpleNamespace(text=text, finish_reason=reason, stop_reason=stop, token_ids=[5, 6]))
                return [SimpleNamespace(outputs=[answer]) for answer in answers]

        self.LLM, self.SamplingParams = LLM, SimpleNamespace


@pytest.fixture
def vllm(monkeypatch: pytest.MonkeyPatch) -> FakeVllm:
    fake = FakeVllm()
    fake.__spec__ = SimpleNamespace(name="vllm")  # type: ignore[assignment]
    monkeypatch.setitem(sys.modules, "vllm", fake)
    return fake


@pytest.fixture
def ask(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> Callable[..., Any]:
    """ask(decoding): answers of the replaced engine on an exported folder."""
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")

    def call(decoding: Decoding, **others: Any) -> Any:
        settings = {"model": tmp_path / "model", "weights": "w", "seed": 3, "batch_size": 2, "engine": "vllm", **others}
        return generate(
            tokenizer=tokenizer, prompts=PROMPTS, decoding=decoding, folder=tmp_path / "answers", **settings
        )

    return call


def test_every_setting_is_explicit(vllm: FakeVllm, ask: Callable[..., Any]) -> None:
    stop = ("\nQ:", "<unk>", "</s>")
    ask(Decoding(do_sample=True, temperature=0.8, top_p=0.95, max_new_tokens=9, samples=2, stop=stop))
    [loaded] = vllm.loaded
    assert loaded["generation_config"] == "vllm"  # nothing of the folder's own
    assert len(vllm.asked) == 6
    assert len({params.seed for _, params in vllm.asked}) == 6
    for _, params in vllm.asked:
        assert (params.temperature, params.top_p, params.top_k, params.min_p, params.n) == (0.8, 0.95, -1, 0.0, 1)
        assert (params.max_tokens, params.repetition_penalty, params.ignore_eos) == (9, 1.0, False)
        assert (params.stop, params.stop_token_ids, params.include_stop_str_in_output) == (["\nQ:"], [2], False)


def test_seeds_do_not_depend_on_the_batch(vllm: FakeVllm, ask: Callable[..., Any], tmp_path: Path) -> None:
    decoding = Decoding(do_sample=True, max_new_tokens=9, samples=2)
    ask(decoding)
    ask(decoding, batch_size=5, weights="other")
    seeds = [(ids, params.seed) for ids, params in vllm.asked]
    assert seeds[:6] == seeds[6:]


def test_answers_are_read_and_kept(vllm: FakeVllm, ask: Callable[..., Any]) -> None:
    decoding = Decoding(do_sample=False, max_new_tokens=9)
    rows, report = ask(decoding)
    ids = [asked for asked, _ in vllm.asked]
    assert rows == [[Generation(f"said {i}", end, 2)] for i, end in zip(ids, ENDS, strict=True)]
    assert all(params.temperature == 0.0 for _, params in vllm.asked)
    assert (report.found, report.made, report.tokens) == (0, 3, 6)
    assert ask(decoding)[1].made == 0 and len(vllm.loaded) == 1


def test_a_loaded_engine_is_used_as_it_is(vllm: FakeVllm, ask: Callable[..., Any], tmp_path: Path) -> None:
    engine = load_vllm(tmp_path / "model")
    for seed in (1, 2):
        ask(Decoding(do_sample=True, max_new_tokens=9), model=engine, seed=seed)
    assert len(vllm.loaded) == 1 and len(vllm.asked) == 6


def test_a_folder_without_a_model_is_refused(vllm: FakeVllm, tmp_path: Path) -> None:
    with pytest.raises(SetupError, match="export"):
        load_vllm(tmp_path)


def test_a_missing_vllm_is_one_line(ask: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(SetupError, match="pip install vllm, or engine=hf"):
        ask(Decoding(do_sample=False, max_new_tokens=9))
