"""Proves that `classify` scores labels as a full forward of each label would, whatever the batch, and that `exact` is
what greedy decoding gives."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
    set_seed,
)

from eval import glue
from eval.glue import _encode, _sequences, classify
from lora_ga.data.encoding import encode_row
from lora_ga.errors import SetupError

PAIR = ["yes", "no"]
THREE = ["yes", "no maybe", "maybe w1 w2"]
PREFIX = ["not", "not same"]
SUFFIX = ["acceptable", "un acceptable"]
LABEL_SETS = [PAIR, THREE, PREFIX, SUFFIX]
LENGTHS = [3, 9, 1, 5, 7, 2, 11]


def _model(architecture: str, vocab: int = 100) -> nn.Module:
    set_seed(0)
    if architecture == "causal":
        config = LlamaConfig(
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            vocab_size=vocab,
            pad_token_id=0,
            bos_token_id=None,
            eos_token_id=1,
        )
        return _spread(LlamaForCausalLM(config))
    config = T5Config(
        d_model=32,
        d_kv=8,
        d_ff=64,
        num_layers=2,
        num_heads=4,
        vocab_size=vocab,
        pad_token_id=0,
        eos_token_id=1,
        decoder_start_token_id=0,
        dropout_rate=0.0,
    )
    return _spread(T5ForConditionalGeneration(config))


def _spread(model: nn.Module) -> nn.Module:
    """Larger weights, so that the scores depend on the prompt enough for a mistake to show."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.normal_(std=0.25)
    return model.eval()


def _prompts(count: int = 7) -> tuple[list[str], torch.Generator]:
    generator = torch.Generator().manual_seed(3)
    lengths = [LENGTHS[i % len(LENGTHS)] for i in range(count)]
    picks = [torch.randint(0, 85, (length,), generator=generator).tolist() for length in lengths]
    return [" ".join(f"w{i}" for i in pick) for pick in picks], generator


def _brute(model, tokenizer, prompt, words, architecture, *, eos):
    """The log-likelihood of each label from one unbatched forward of the whole sequence."""
    scores = []
    for word in words:
        row = encode_row(tokenizer, prompt, word, architecture, 64)
        target = row.target if eos else row.target[:-1]
        with torch.no_grad():
            if architecture == "causal":
                ids = torch.tensor([row.prompt + target])
                logits = model(input_ids=ids).logits[0, len(row.prompt) - 1 : -1]
            else:
                decoder = torch.tensor([[0, *target[:-1]]])
                logits = model(input_ids=torch.tensor([row.prompt]), decoder_input_ids=decoder).logits[0]
        picked = F.log_softmax(logits, -1)[range(len(target)), target]
        scores.append((picked.sum().item(), len(target)))
    return scores


ARCHITECTURES = ["causal", "seq2seq"]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("words", LABEL_SETS)
def test_scores_equal_a_forward_of_each_label(architecture, words, tokenizer):
    model = _model(architecture)
    prompts, _ = _prompts()
    gold = [i % len(words) for i in range(len(prompts))]
    common = dict(architecture=architecture, max_length=64)
    alone = classify(model, tokenizer, prompts, words, gold, batch_size=1, **common)
    together = classify(model, tokenizer, prompts, words, gold, batch_size=5, **common)
    assert alone.predictions == together.predictions and alone.exact == together.exact
    loss, tokens = 0.0, 0
    for i, prompt in enumerate(prompts):
        expected = [value for value, _ in _brute(model, tokenizer, prompt, words, architecture, eos=words == PREFIX)]
        assert alone.scores[i] == pytest.approx(expected, abs=1e-4)
        assert together.scores[i] == pytest.approx(expected, abs=1e-4)
        assert together.predictions[i] == max(range(len(words)), key=expected.__getitem__)
        value, length = _brute(model, tokenizer, prompt, words, architecture, eos=True)[gold[i]]
        loss, tokens = loss - value, tokens + length
    assert together.tokens == tokens
    assert together.gold_loss == pytest.approx(loss / tokens, abs=1e-4)
    assert len({tuple(row) for row in alone.scores}) == len(prompts)  # the scores do depend on the prompt


@pytest.mark.parametrize(
    ("architecture", "words", "sequences"),
    [
        *(("causal", words, 1) for words in LABEL_SETS),
        ("seq2seq", PAIR, 1),
        ("seq2seq", SUFFIX, 2),
        ("seq2seq", PREFIX, 1),
        ("seq2seq", THREE, 3),
    ],
)
def test_few_sequences(architecture, words, sequences, tokenizer):
    """A causal row is one sequence whatever its labels; T5's decoder needs one for each longest context."""
    row = _encode(tokenizer, "w1 w2", words, 0, architecture, 64)
    found = list(_sequences([row], architecture))
    assert len(found) == sequences
    covered = [context for item in found for context in item.wanted]
    assert sorted(covered) == sorted(row.wanted())  # each context once


def _each_context_alone(monkeypatch):
    """Causal rows scored as T5's are: a sequence, with the prompt in it, for each longest context."""
    monkeypatch.setattr(glue, "_sequences", lambda rows, _architecture: _sequences(rows, "seq2seq"))


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize(("autocast", "rounding"), [(None, 1e-5), (torch.bfloat16, 2**-6)])
def test_a_tree_of_labels_scores_as_each_label_alone(attention, autocast, rounding, tokenizer, monkeypatch):
    model = _model("causal")
    model.set_attn_implementation(attention)
    prompts, _ = _prompts(20)
    gold = [i % 3 for i in range(20)]
    common = dict(architecture="causal", max_length=64, autocast=autocast)
    trees = [classify(model, tokenizer, prompts, THREE, gold, batch_size=size, **common) for size in (1, 6)]
    _each_context_alone(monkeypatch)
    alone = classify(model, tokenizer, prompts, THREE, gold, batch_size=6, **common)
    for tree in trees:
        assert tree.exact == alone.exact and tree.tokens == alone.tokens
        assert tree.gold_loss == pytest.approx(alone.gold_loss, rel=rounding)
        for a, b in zip(tree.scores, alone.scores, strict=True):
            assert a == pytest.approx(b, rel=rounding)
    if autocast is None:
        assert trees[0].predictions == trees[1].predictions == alone.predictions


@pytest.mark.parametrize(
    ("words", "gold", "contexts", "sequences"),
    [(PAIR, 1, 1, 1), (PREFIX, 1, 2, 1), (THREE, 2, 4, 2), (SUFFIX, 0, 2, 2)],
)
def test_the_prompt_is_computed_once_a_row(words, gold, contexts, sequences, tokenizer, monkeypatch):
    """Token slots (rows x columns of every forward): prompt and label contexts, never the prompt again."""
    model, prompts = _model("causal"), [" ".join(f"w{i}" for i in range(30))] * 4
    slots, masks = [], []

    def note(_module, _arguments, named):
        slots.append(named["input_ids"].numel())
        masks.append(named["attention_mask"].dim())

    model.register_forward_pre_hook(note, with_kwargs=True)
    common = dict(architecture="causal", max_length=64, batch_size=2)
    classify(model, tokenizer, prompts, words, [gold] * 4, **common)
    assert sum(slots) == 4 * (30 + contexts)
    assert set(masks) == {4 if sequences > 1 else 2}  # no tree where a chain does
    slots.clear()
    _each_context_alone(monkeypatch)
    classify(model, tokenizer, prompts, words, [gold] * 4, **common)
    assert sum(slots) >= 4 * (sequences * 30 + contexts)


def _trained(architecture, tokenizer, prompts, words, gold):
    """A tiny model that answers part of the rows right, so that `exact` is neither all true nor all false."""
    model = _model(architecture)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    for _ in range(25):
        for prompt, label in list(zip(prompts, gold, strict=True))[::2]:
            row = encode_row(tokenizer, prompt, words[label], architecture, 64)
            if architecture == "causal":
                ids = torch.tensor([row.prompt + row.target])
                labels = torch.tensor([[-100] * len(row.prompt) + row.target])
            else:
                ids, labels = torch.tensor([row.prompt]), torch.tensor([row.target])
            model(input_ids=ids, labels=labels).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    return model.eval()


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_exact_is_what_generate_says(architecture, tokenizer):
    prompts, generator = _prompts(20)
    gold = torch.randint(0, 3, (20,), generator=generator).tolist()
    model = _trained(architecture, tokenizer, prompts, THREE, gold)
    result = classify(model, tokenizer, prompts, THREE, gold, architecture=architecture, max_length=64, batch_size=4)
    ids, texts = [], []
    for prompt, label in zip(prompts, gold, strict=True):
        row = encode_row(tokenizer, prompt, THREE[label], architecture, 64)
        out = model.generate(
            input_ids=torch.tensor([row.prompt]), do_sample=False, max_new_tokens=6, eos_token_id=1, pad_token_id=0
        )[0]
        new = out[len(row.prompt) if architecture == "causal" else 1 :].tolist()
        ids.append(new == row.target)
        texts.append(1 in new and tokenizer.decode(new, skip_special_tokens=True) == THREE[label])
    assert result.exact == ids == texts
    assert any(ids) and not all(ids)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_peft_model_and_training_mode(architecture, tokenizer):
    """A PEFT model with B != 0 scores as its merged model does, and keeps its training mode."""
    prompts, _ = _prompts()
    targets = ["q_proj", "v_proj"] if architecture == "causal" else ["q", "v"]
    model = get_peft_model(
        _model(architecture),
        LoraConfig(
            r=2,
            target_modules=targets,
            lora_dropout=0.5,
            task_type="CAUSAL_LM" if architecture == "causal" else "SEQ_2_SEQ_LM",
        ),
    )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.3)
    model.train()
    common = dict(architecture=architecture, max_length=64, batch_size=3)
    wrapped = classify(model, tokenizer, prompts, THREE, [0] * 7, **common)
    assert model.training
    merged = classify(model.merge_and_unload().eval(), tokenizer, prompts, THREE, [0] * 7, **common)
    for a, b in zip(wrapped.scores, merged.scores, strict=True):
        assert a == pytest.approx(b, abs=1e-4)


def test_bfloat16_autocast_runs_and_scores_stay_close(tokenizer):
    prompts, _ = _prompts()
    common = dict(architecture="causal", max_length=64, batch_size=3)
    full = classify(_model("causal"), tokenizer, prompts, PAIR, [0] * 7, **common)
    half = classify(_model("causal"), tokenizer, prompts, PAIR, [0] * 7, autocast=torch.bfloat16, **common)
    assert half.gold_loss == pytest.approx(full.gold_loss, rel=0.05)
    assert half.scores != full.scores


def test_a_cut_prompt_is_the_same_for_all_labels(tokenizer):
    prompt = " ".join(f"w{i}" for i in range(30))
    row = _encode(tokenizer, prompt, THREE, 0, "causal", 12)
    assert row.prompt == tokenizer(prompt)["input_ids"][:8]  # room for three words and eos
    assert [len(label) for label in row.labels] == [1, 2, 3]
    [item] = _sequences([row], "causal")
    assert max(len(row.prompt) + len(context) for context in item.read) <= 12
    encoded = _encode(tokenizer, prompt, THREE, 0, "seq2seq", 12).prompt
    assert len(encoded) == 12 and encoded[-1] == tokenizer.eos_token_id


def test_tokens_that_merge_with_the_label_become_the_label(monkeypatch, tokenizer):
    """Where one label changes the prompt's last token, all labels start from the tokens before it."""
    rows = {"yes": ([5, 6, 7], [8, 1]), "no": ([5, 6], [9, 10, 1])}
    monkeypatch.setattr(
        "eval.glue.encode_row", lambda _t, _p, word, _a, _m: SimpleNamespace(prompt=rows[word][0], target=rows[word][1])
    )
    row = _encode(tokenizer, "any", PAIR, 0, "causal", 64)
    assert row.prompt == [5, 6]
    assert row.labels == [(7, 8), (9, 10)] and row.gold == (7, 8, 1)


def test_refusals(tokenizer):
    common = dict(architecture="causal", max_length=64, batch_size=3)
    with pytest.raises(SetupError, match="no rows"):
        classify(_model("causal"), tokenizer, [], PAIR, [], **common)
    with pytest.raises(SetupError, match="not told apart"):
        classify(_model("causal"), tokenizer, ["w1"], ["unseen", "unknown"], [0], **common)
