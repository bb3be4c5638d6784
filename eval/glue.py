"""Classification by likelihood: the label word to which the model gives the highest probability after the prompt.

T5 on GLUE as in LoRA-GA and LoRA-One: the input is instruction and sentences, the target is a label word.
Differs in: their "soft" metric compares the first tokens of two labels, so it cannot score MNLI's three nor labels that
begin alike; ours sums over all tokens of any number of labels. Their other metric, greedy decoding compared with the
gold label (an off-label answer is wrong), is `Classification.exact`.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase
from transformers.modeling_outputs import BaseModelOutput

from lora_ga.data.encoding import Architecture, encode_row
from lora_ga.errors import SetupError
from lora_ga.losses import only_positions

Context = tuple[int, ...]  # the label tokens already read after the prompt


@dataclass(frozen=True)
class Classification:
    """What the model says of each row; see `classify`."""

    predictions: list[int]
    scores: list[list[float]]
    exact: list[bool]
    gold_loss: float
    tokens: int


@dataclass(frozen=True)
class _Row:
    """One row's prompt, its labels' tokens (with eos only where it decides) and the gold label's tokens with eos."""

    prompt: list[int]
    labels: list[Context]
    gold: Context

    def wanted(self) -> dict[Context, list[int]]:
        """The next tokens whose probability is needed, by context."""
        pairs: dict[Context, dict[int, None]] = {}
        for tokens in (*self.labels, self.gold):
            for i, token in enumerate(tokens):
                pairs.setdefault(tokens[:i], {})[token] = None
        return {context: list(tokens) for context, tokens in pairs.items()}


@dataclass(frozen=True)
class _Sequence:
    """One sequence to run: a row's prompt, then the last token of each context in `read`; `wanted` are answered there.

    A context's prefixes are read before it, so `read` is a chain or, where labels part, a tree. Both are in one order.
    """

    row: int
    prompt: list[int]
    read: list[Context]
    wanted: dict[Context, list[int]]

    @property
    def tokens(self) -> list[int]:
        return [context[-1] for context in self.read]

    @property
    def branches(self) -> bool:
        return [len(context) for context in self.read] != list(range(1, len(self.read) + 1))

    def __len__(self) -> int:
        return len(self.prompt) + len(self.read)


@dataclass(frozen=True)
class _Answer:
    """The model's next token after one context: its most likely one, and log-probabilities of the wanted ones."""

    argmax: int
    log_probs: dict[int, float]


def _common_prefix(sequences: Sequence[Sequence[int]]) -> int:
    columns = zip(*sequences, strict=False)
    shortest = min(len(sequence) for sequence in sequences)
    return next((i for i, column in enumerate(columns) if len(set(column)) > 1), shortest)


def _encode(
    tokenizer: PreTrainedTokenizerBase,
    prompt: str,
    label_words: Sequence[str],
    gold: int,
    architecture: Architecture,
    max_length: int,
) -> _Row:
    """One row with one prompt for all labels.

    A causal prompt is cut once, to what leaves room for the longest label: cut per label, labels of different lengths
    would be given different prompts.
    """
    limit = max_length if architecture == "seq2seq" else sys.maxsize
    encoded = [encode_row(tokenizer, prompt, word, architecture, limit) for word in label_words]
    shared = _common_prefix([row.prompt for row in encoded])
    # What a merge with the label changed in the prompt is part of the label.
    targets = [(*row.prompt[shared:], *row.target) for row in encoded]
    room = shared if architecture == "seq2seq" else max(1, max_length - max(map(len, targets)))
    bare = [target[:-1] for target in targets]
    if len(set(bare)) < len(bare):
        raise SetupError(f"label words {list(label_words)} are not told apart by the tokenizer: use other label words")
    nested = any(a != b and b[: len(a)] == a for a in bare for b in bare)
    return _Row(encoded[0].prompt[:shared][:room], targets if nested else bare, targets[gold])


def _sequences(rows: Sequence[_Row], architecture: Architecture) -> Iterator[_Sequence]:
    """As few sequences as cover every wanted context.

    Causal: one a row. T5's decoder counts positions by columns, so there it is a sequence for each context that is no
    prefix of another; the encoder has read the prompt once for them all.
    """
    for index, row in enumerate(rows):
        left = dict(sorted(row.wanted().items(), key=lambda item: len(item[0])))
        if architecture == "causal":
            yield _Sequence(index, row.prompt, [context for context in left if context], left)
            continue
        for longest in sorted(left, key=len, reverse=True):
            if longest in left:
                prefixes = [longest[:i] for i in range(len(longest) + 1)]
                covered = {context: left.pop(context) for context in prefixes if context in left}
                yield _Sequence(index, row.prompt, prefixes[1:], covered)


def _padded(sequences: Sequence[Sequence[int]], value: int, device: torch.device) -> torch.Tensor:
    return pad_sequence([torch.tensor(s) for s in sequences], batch_first=True, padding_value=value).to(device)


def _tree(batch: Sequence[_Sequence], width: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Additive mask (batch, 1, width, width) by which a context's token sees the prompt and the context alone, and the
    positions (batch, width) that it has there."""
    seen = torch.ones(len(batch), width, width, dtype=torch.bool).tril()
    positions = torch.zeros(len(batch), width, dtype=torch.long)
    for i, item in enumerate(batch):
        start, end = len(item.prompt), len(item)
        seen[i, start:end, start:end] = torch.tensor([[one[: len(o)] == o for o in item.read] for one in item.read])
        positions[i, :end] = torch.tensor([*range(start), *(start + len(context) - 1 for context in item.read)])
    mask = torch.zeros(seen.shape, dtype=dtype).masked_fill(~seen, torch.finfo(dtype).min)
    return mask[:, None], positions


def _causal_inputs(model: Any, batch: Sequence[_Sequence], pad: int, device: torch.device) -> dict[str, Any]:
    texts = [[*item.prompt, *item.tokens] for item in batch]
    ids = _padded(texts, pad, device)
    if not any(item.branches for item in batch):
        return {"input_ids": ids, "attention_mask": _padded([[1] * len(text) for text in texts], 0, device)}
    mask, positions = _tree(batch, ids.shape[1], model.get_input_embeddings().weight.dtype)
    return {"input_ids": ids, "attention_mask": mask.to(device), "position_ids": positions.to(device)}


def _seq2seq_inputs(
    model: Any, batch: Sequence[_Sequence], pad: int, start: int, device: torch.device
) -> dict[str, Any]:
    prompts = {item.row: item.prompt for item in batch}
    place = {row: i for i, row in enumerate(prompts)}
    index = torch.tensor([place[item.row] for item in batch], device=device)
    mask = _padded([[1] * len(prompt) for prompt in prompts.values()], 0, device)
    ids = _padded(list(prompts.values()), pad, device)
    # Once for each row, however many sequences its labels need.
    hidden = model.get_encoder()(input_ids=ids, attention_mask=mask).last_hidden_state  # (rows, length, d_model)
    return {
        "encoder_outputs": BaseModelOutput(last_hidden_state=hidden[index]),
        "attention_mask": mask[index],
        "decoder_input_ids": _padded([[start, *item.tokens] for item in batch], pad, device),
    }


def _answers(
    model: nn.Module, batch: Sequence[_Sequence], pad: int, start: int | None, autocast: torch.dtype | None
) -> dict[tuple[int, Context], _Answer]:
    """The model's answer at every context of a batch, by row and context."""
    device = next(model.parameters()).device
    with torch.autocast(device.type, autocast, enabled=autocast is not None):
        if start is None:
            inputs = _causal_inputs(model, batch, pad, device)
        else:
            inputs = _seq2seq_inputs(model, batch, pad, start, device)
        mask = torch.zeros_like(inputs["input_ids" if start is None else "decoder_input_ids"], dtype=torch.bool)
        for i, item in enumerate(batch):
            empty = len(item.prompt) - 1 if start is None else 0  # where the empty context is answered
            mask[i, [empty + (item.read.index(context) + 1 if context else 0) for context in item.wanted]] = True
        with only_positions(model, mask):
            logits = model(**inputs, use_cache=False).logits  # (contexts, vocabulary)
    log_probs = torch.log_softmax(logits.float(), dim=-1)
    keys = [(item.row, context, tokens) for item in batch for context, tokens in item.wanted.items()]
    at = [i for i, (_, _, tokens) in enumerate(keys) for _ in tokens]
    values = iter(log_probs[at, [token for _, _, tokens in keys for token in tokens]].tolist())
    return {
        (row, context): _Answer(argmax, {token: next(values) for token in tokens})
        for (row, context, tokens), argmax in zip(keys, log_probs.argmax(dim=-1).tolist(), strict=True)
    }


@torch.inference_mode()
def _run(
    model: nn.Module,
    rows: Sequence[_Row],
    pad: int,
    start: int | None,
    batch_size: int,
    autocast: torch.dtype | None,
) -> dict[tuple[int, Context], _Answer]:
    # Longest first, so that a batch too large for the memory fails at once.
    sequences = _sequences(rows, "causal" if start is None else "seq2seq")
    ordered = sorted(sequences, key=lambda item: (len(item.prompt), item.row, len(item)), reverse=True)
    answers: dict[tuple[int, Context], _Answer] = {}
    training = model.training
    model.eval()
    try:
        with tqdm(total=len(ordered), desc="classify", unit="seq", leave=False) as bar:
            for first in range(0, len(ordered), batch_size):
                batch = ordered[first : first + batch_size]
                answers.update(_answers(model, batch, pad, start, autocast))
                bar.update(len(batch))
    finally:
        model.train(training)
    return answers


def _start_token(model: Any, architecture: Architecture, given: int | None) -> int | None:
    if architecture == "causal":
        return None
    start = given if given is not None else getattr(model.config, "decoder_start_token_id", None)
    if start is None:
        raise SetupError("this sequence-to-sequence model has no decoder_start_token_id: set it in its config.json")
    return start


def classify(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    label_words: Sequence[str],
    gold: Sequence[int],
    *,
    architecture: Architecture,
    max_length: int,
    batch_size: int,
    autocast: torch.dtype | None = None,
    decoder_start_token_id: int | None = None,
) -> Classification:
    """Predict for each prompt the label word of highest likelihood; the model may be wrapped by PEFT.

    scores[i][k] is the sum of the log-probabilities of all tokens of label k after prompt i, in nats, not divided by
    their number; eos is counted for every label if one label's tokens begin another's, and for none otherwise.
    exact[i] says that greedy decoding yields the gold label's tokens and then eos. That needs no decoding: greedy
    decoding emits g_1..g_n iff for every j the argmax after g_1..g_(j-1) is g_j, which is read off where the gold label
    is teacher-forced. gold_loss is the mean over all `tokens` gold tokens, eos included.
    Raises SetupError if there are no rows or two labels have the same tokens.
    """
    if not prompts:
        raise SetupError("there are no rows to classify: check the task's split and its limit on rows")
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    start = _start_token(model, architecture, decoder_start_token_id)
    rows = [
        _encode(tokenizer, prompt, label_words, label, architecture, max_length)
        for prompt, label in zip(prompts, gold, strict=True)
    ]
    answers = _run(model, rows, int(pad), start, batch_size, autocast)  # type: ignore[arg-type]

    def log_likelihood(row: int, tokens: Context) -> float:
        return sum(answers[row, tokens[:i]].log_probs[token] for i, token in enumerate(tokens))

    scores = [[log_likelihood(i, label) for label in row.labels] for i, row in enumerate(rows)]
    exact = [all(answers[i, row.gold[:j]].argmax == g for j, g in enumerate(row.gold)) for i, row in enumerate(rows)]
    tokens = sum(len(row.gold) for row in rows)
    loss = -sum(log_likelihood(i, row.gold) for i, row in enumerate(rows)) / tokens
    return Classification([row.index(max(row)) for row in scores], scores, exact, loss, tokens)
