"""Proves that answers follow the model alone: not the batch, its padding, the checkpoint's settings or chance."""

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from scipy import stats
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import GenerationConfig, MistralConfig, MistralForCausalLM, PreTrainedTokenizerFast, TopPLogitsWarper

from eval import refill
from eval.decoding import Decoding, Generation, Request, encode_prompt
from eval.generation import generate
from eval.sampling import Nucleus, add_gumbel_noise
from experiments.config import load_config
from lora_ga.errors import SetupError
from lora_ga.models import load_model

PROMPTS = ["w1 w2 w3", "w4", "w5 w6 w7 w8 w9 w10 w11 w12", "w13 w14", "w15 w16 w17 w18 w19", "w20 w3 w2"]
GREEDY = Decoding(do_sample=False, max_new_tokens=12)
SAMPLED = Decoding(do_sample=True, temperature=0.8, top_p=0.95, max_new_tokens=6)

Answer = Callable[..., list[list[Generation]]]


@pytest.fixture
def answer(tiny: Callable[..., Any], tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> Answer:
    """answer(prompts, decoding): fresh answers of the random model, kept in a folder of their own."""
    calls = iter(range(1000))

    def run(prompts: Sequence[str] = PROMPTS, decoding: Decoding = GREEDY, **others: Any) -> list[list[Generation]]:
        settings = {"model": tiny(), "tokenizer": tokenizer, "seed": 0, "batch_size": 4, **others}
        return generate(
            prompts=prompts, decoding=decoding, weights="tiny", folder=tmp_path / str(next(calls)), **settings
        )[0]

    return run


def by_hand(model: Any, ids: list[int], count: int, eos: int) -> list[int]:
    """Greedy decoding without cache, batch or padding."""
    new: list[int] = []
    while len(new) < count and eos not in new:
        logits = model(input_ids=torch.tensor([ids + new]), use_cache=False).logits
        new.append(int(logits[0, -1].argmax()))
    return new


def test_greedy_is_the_argmax_of_each_prompt_alone(
    answer: Answer, tiny: Callable[..., Any], tokenizer: PreTrainedTokenizerFast
) -> None:
    model = tiny()
    for prompt, [given] in zip(PROMPTS, answer(), strict=True):
        ids = by_hand(model, encode_prompt(tokenizer, prompt, seq2seq=False), 12, 1)
        assert given.tokens == len(ids)
        assert given.text.split() == [
            t for t in tokenizer.convert_ids_to_tokens(ids) if t not in ("<pad>", "</s>", "<unk>")
        ]


def test_seq2seq_answers_are_the_decoders_argmax(
    answer: Answer, tiny: Callable[..., Any], tokenizer: PreTrainedTokenizerFast
) -> None:
    model = tiny("seq2seq")
    model.generation_config = GenerationConfig()
    for prompt, [given] in zip(PROMPTS, answer(model=model), strict=True):
        source = torch.tensor([encode_prompt(tokenizer, prompt, seq2seq=True)])
        target = [0]
        while len(target) <= 12 and 1 not in target:
            logits = model(input_ids=source, decoder_input_ids=torch.tensor([target]), use_cache=False).logits
            target.append(int(logits[0, -1].argmax()))
        assert given.tokens == len(target) - 1
        assert given.text.split() == tokenizer.decode(target, skip_special_tokens=True).split()


@pytest.mark.parametrize("architecture", ["causal", "seq2seq"])
@pytest.mark.parametrize("decoding", [GREEDY, SAMPLED])
def test_batch_and_order_change_nothing(
    answer: Answer, tiny: Callable[..., Any], decoding: Decoding, architecture: str
) -> None:
    model, decoding = tiny(architecture), dataclasses.replace(decoding, stop=("w2",))  # rows end at different steps
    alone = answer(decoding=decoding, batch_size=1, model=model)
    for batch_size in (2, 4, 6):
        assert answer(decoding=decoding, batch_size=batch_size, model=model) == alone
    assert answer(PROMPTS[::-1], decoding, batch_size=3, model=model)[::-1] == alone
    if architecture == "causal" or decoding.do_sample:  # this T5 repeats itself when greedy
        assert len({row[0].tokens for row in alone}) > 2


def test_a_sliding_window_is_counted_in_a_rows_own_tokens(answer: Answer) -> None:
    torch.manual_seed(0)
    config = MistralConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        sliding_window=3,
        initializer_range=0.3,
    )
    model = MistralForCausalLM(config).eval()
    decoding = Decoding(do_sample=False, max_new_tokens=12, stop=("w2",))
    ids = [by_hand(model, [3 + 7 + int(word[1:]) for word in prompt.split()], 12, 1) for prompt in PROMPTS]
    assert [row[0].tokens for row in answer(decoding=GREEDY, batch_size=2, model=model)] == [len(row) for row in ids]
    assert answer(decoding=decoding, batch_size=2, model=model) == answer(decoding=decoding, batch_size=1, model=model)


def test_padding_that_is_not_masked_would_change_answers(answer: Answer, monkeypatch: pytest.MonkeyPatch) -> None:
    right = answer(batch_size=6)
    padded = refill._padded

    def unmasked(prompts: Sequence[list[int]], pad: int) -> tuple[torch.Tensor, torch.Tensor]:
        ids, mask = padded(prompts, pad)
        return ids, torch.ones_like(mask)

    def on_the_right(prompts: Sequence[list[int]], pad: int) -> tuple[torch.Tensor, torch.Tensor]:
        ids, mask = padded([prompt[::-1] for prompt in prompts], pad)
        return ids.flip(1), mask.flip(1)

    for broken in (unmasked, on_the_right):
        monkeypatch.setattr(refill, "_padded", broken)
        assert answer(batch_size=6) != right


def test_padding_with_eos_changes_nothing(answer: Answer, tokenizer: PreTrainedTokenizerFast) -> None:
    plain = answer(batch_size=6)
    same = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer, eos_token="</s>", unk_token="<unk>")
    same.pad_token = "</s>"
    assert [[g.tokens for g in row] for row in answer(batch_size=6, tokenizer=same)] == [
        [g.tokens for g in row] for row in plain
    ]
    assert answer(batch_size=6, tokenizer=same) == answer(batch_size=1, tokenizer=same)


def test_settings_of_the_checkpoint_count_for_nothing(answer: Answer, tiny: Callable[..., Any]) -> None:
    model = tiny()
    kept = GenerationConfig(do_sample=True, temperature=5.0, repetition_penalty=3.0, max_length=3, suppress_tokens=[5])
    model.generation_config = kept
    model.train()
    assert answer(model=model) == answer()
    assert model.generation_config is kept and model.training


def test_unmerged_adapters_answer(answer: Answer, tiny: Callable[..., Any]) -> None:
    model = get_peft_model(tiny(), LoraConfig(target_modules=["q_proj", "down_proj"], init_lora_weights=False))
    adapted = answer(model=model)
    assert adapted != answer()
    assert adapted == answer(model=model.merge_and_unload())


def test_eos_ends_an_answer(answer: Answer, tokenizer: PreTrainedTokenizerFast) -> None:
    [[free]] = answer(PROMPTS[:1])
    words = free.text.split()
    other = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer.backend_tokenizer, pad_token="<pad>", eos_token=words[4], unk_token="<unk>"
    )
    first = words.index(words[4])
    [[ended]] = answer(PROMPTS[:1], tokenizer=other)
    assert (ended.text.split(), ended.finish, ended.tokens) == (words[:first], "eos", first + 1)
    [[cut]] = answer(PROMPTS[:1], Decoding(do_sample=False, max_new_tokens=first), tokenizer=other)
    assert (cut.text.split(), cut.finish, cut.tokens) == (words[:first], "length", first)


def test_stop_strings_cut_exactly_and_end_the_row(answer: Answer) -> None:
    texts = {prompt: row[0].text for prompt, row in zip(PROMPTS, answer(), strict=True)}
    texts = {prompt: text for prompt, text in texts.items() if len(text.split()) == 12}  # no special token among them
    assert len(texts) >= 4
    free = list(texts.values())
    for text in free:  # every place and length of a stop string that the model is known to write
        for stop in (text[i:j] for i in range(0, len(text), 5) for j in range(i + 1, min(i + 9, len(text)), 3)):
            decoding = Decoding(do_sample=False, max_new_tokens=12, stop=("never said", stop))
            for whole, [given] in zip(free, answer(list(texts), decoding), strict=True):
                assert given.text == whole.split(stop)[0]
                words = whole.split()
                needed = next((n for n in range(1, 13) if stop in " " + " ".join(words[:n])), 12)
                assert given.finish == ("stop" if stop in whole else "length")
                assert given.tokens == needed


def test_an_answer_is_what_is_added_to_the_prompt(answer: Answer) -> None:
    # Llama's tokenizer drops the first space of what it decodes: code would lose a level of its indentation.
    vocabulary = {word: i for i, word in enumerate(["<pad>", "</s>", "<unk>", *(f"▁w{i}" for i in range(61))])}
    marks = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    marks.pre_tokenizer, marks.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    llama = PreTrainedTokenizerFast(tokenizer_object=marks, pad_token="<pad>", eos_token="</s>", unk_token="<unk>")
    assert llama.decode(llama("w1 w2")["input_ids"][1:]) == "w2"
    [[given]] = answer(PROMPTS[:1], tokenizer=llama)
    assert given.text.startswith(" w")
    stop = given.text[:3]
    [[empty]] = answer(PROMPTS[:1], Decoding(do_sample=False, max_new_tokens=12, stop=(stop,)), tokenizer=llama)
    assert empty == Generation("", "stop", 1)


def test_a_stop_string_that_begins_in_the_prompt_is_none(answer: Answer) -> None:
    [[free]] = answer(PROMPTS[:1])
    bridge = PROMPTS[0][-2:] + " " + free.text.split()[0]  # last word of the prompt, first of the answer
    assert answer(PROMPTS[:1], Decoding(do_sample=False, max_new_tokens=12, stop=(bridge, PROMPTS[0]))) == [[free]]


def test_a_special_token_may_be_a_stop_string(answer: Answer, tokenizer: PreTrainedTokenizerFast) -> None:
    [[free]] = answer(PROMPTS[:1])
    word = free.text.split()[3]
    marked = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer.backend_tokenizer, pad_token="<pad>", eos_token="</s>", extra_special_tokens=[word]
    )
    decoding = Decoding(do_sample=False, max_new_tokens=12, stop=(word,))
    [[given]] = answer(PROMPTS[:1], decoding, tokenizer=marked)
    assert (given.text.split(), given.finish) == (free.text.split()[: free.text.split().index(word)], "stop")


def test_no_prompts_no_answers(answer: Answer) -> None:
    assert answer([]) == []


def test_samples_differ_by_number_prompt_and_seed(answer: Answer) -> None:
    three = Decoding(do_sample=True, max_new_tokens=12, samples=3)
    rows = answer(decoding=three)
    assert all(len({g.text for g in row}) == 3 for row in rows)
    assert rows == answer(decoding=three)
    assert rows != answer(decoding=three, seed=1)


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.7, 1.0), (0.8, 0.6)])
def test_draws_follow_the_models_distribution(
    answer: Answer, tiny: Callable[..., Any], tokenizer: PreTrainedTokenizerFast, temperature: float, top_p: float
) -> None:
    draws = 3000
    decoding = Decoding(do_sample=True, temperature=temperature, top_p=top_p, max_new_tokens=1, samples=draws)
    [row] = answer(PROMPTS[:1], decoding, batch_size=500)
    ids = torch.tensor([encode_prompt(tokenizer, PROMPTS[0], seq2seq=False)])
    logits = tiny()(input_ids=ids, use_cache=False).logits[:, -1] / temperature
    expected = TopPLogitsWarper(top_p)(ids, logits).softmax(-1)[0].double().numpy()
    names = {tokenizer.decode([i], skip_special_tokens=True): i for i in range(3, len(expected))}
    # Pad, eos and <unk> read alike, as no text: one cell.
    cells = np.concatenate([[expected[:3].sum()], expected[3:]])
    counts = np.bincount([names[g.text.strip()] - 2 if g.text else 0 for g in row], minlength=len(cells))
    assert counts[cells == 0].sum() == 0
    usual = cells * draws >= 5  # the rule of thumb for a chi-square cell; the others are pooled
    observed, wanted = ([*x[usual], x[~usual].sum()] for x in (counts, cells / cells.sum() * draws))
    keep = slice(None) if wanted[-1] > 0 else slice(-1)
    assert stats.chisquare(observed[keep], wanted[keep]).pvalue > 0.001


def test_noise_lets_no_impossible_token_win() -> None:
    # numpy's float32 exponentials are 0 once in 2^23: with 50,000 tokens that is one step in 170.
    keys = [Request("x", i).random_bits(0) for i in range(200)]
    for step in range(15):
        scores = torch.full((200, 49_152), -40.0)
        scores[:, 7] = 0.0
        scores[:, 9] = -torch.inf
        assert (add_gumbel_noise(scores, keys, [step] * 200).argmax(-1) == 7).all()


def test_every_step_of_an_answer_draws_anew() -> None:
    keys = [Request("x", 0).random_bits(0)] * 2000
    drawn = add_gumbel_noise(torch.zeros(2000, 10), keys, range(2000)).argmax(-1).tolist()
    assert stats.chisquare(np.bincount(drawn, minlength=10)).pvalue > 0.001
    pairs = np.bincount(np.multiply(drawn[:-1], 10) + drawn[1:], minlength=100)  # a step says nothing of the next
    assert stats.chisquare(pairs).pvalue > 0.001


def test_nucleus_is_that_of_transformers() -> None:
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(20, 300, generator=generator) * torch.linspace(0.1, 6, 20)[:, None]
    ids = torch.zeros(20, 1, dtype=torch.long)
    for top_p in (0.01, 0.5, 0.95, 0.999):
        wanted = TopPLogitsWarper(top_p)(ids, scores)
        assert torch.equal(
            Nucleus(top_p, usual=16)(ids, scores), wanted
        )  # sharp rows within 16 tokens, flat ones beyond
        assert torch.equal(Nucleus(top_p)(ids, scores), wanted)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"do_sample": False, "samples": 2}, "samples=1"),
        ({"do_sample": False, "temperature": 0.8}, "do nothing"),
        ({"do_sample": True, "temperature": 0.0}, "temperature > 0"),
        ({"do_sample": True, "top_p": 0.0}, "top_p"),
        ({"do_sample": True, "samples": 0}, "at least 1"),
        ({"do_sample": False, "stop": ("",)}, "empty string"),
    ],
)
def test_impossible_settings_are_refused(settings: dict[str, Any], message: str, answer: Answer) -> None:
    with pytest.raises(SetupError, match=message):
        answer(decoding=Decoding(max_new_tokens=4, **settings))


def test_what_cannot_be_answered_is_refused(answer: Answer, tiny: Callable[..., Any], tmp_path: Path) -> None:
    with pytest.raises(SetupError, match="positions"):
        answer(decoding=Decoding(do_sample=False, max_new_tokens=5000))
    with pytest.raises(SetupError, match="no tokens"):
        answer([""])
    with pytest.raises(SetupError, match="engine=other"):
        answer(engine="other")
    with pytest.raises(SetupError, match="needs a loaded model"):
        answer(model=tmp_path)


@pytest.mark.slow
def test_batches_agree_on_a_real_model(tmp_path: Path) -> None:
    loaded = load_model(load_config(["model=smollm2_135m"]).model)
    prompts = [
        "Q: Natalia sold 48 clips in April and half as many in May. How many did she sell?\nA:",
        "The capital of France is",
        "def fibonacci(n):\n",
        "Once upon a time, in a village by the sea, there lived an old fisherman who",
    ]
    texts = []
    for batch_size in (1, 4):
        rows, _ = generate(
            loaded.model,
            loaded.tokenizer,
            prompts,
            Decoding(do_sample=False, max_new_tokens=48),
            weights=loaded.identity,
            seed=0,
            batch_size=batch_size,
            folder=tmp_path / str(batch_size),
        )
        texts.append([row[0] for row in rows])
    assert texts[0] == texts[1]
    assert "Paris" in texts[0][1].text
