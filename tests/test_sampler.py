"""The order of the training rows: every row once, like lengths together, and no trend from batch to batch."""

from __future__ import annotations

import itertools

import torch

from lora_ga.data.encoding import LengthBucketSampler


def test_the_sampler_gives_every_row_once_and_reproducibly():
    lengths = [(7 * i) % 50 + 5 for i in range(403)]

    def order(seed, epoch=0):
        sampler = LengthBucketSampler(lengths, 8, seed, chunk=10)
        sampler.set_epoch(epoch)
        return list(sampler)

    assert len(LengthBucketSampler(lengths, 8, 0)) == 403
    assert sorted(order(0)) == list(range(403))
    assert order(0) == order(0)
    assert len({tuple(order(seed, epoch)) for seed in (0, 1, 2) for epoch in (0, 1, 2)}) == 9


def test_batches_hold_like_lengths_in_an_order_without_trend():
    lengths = torch.randint(5, 100, (1600,), generator=torch.Generator().manual_seed(0)).tolist()
    order = list(LengthBucketSampler(lengths, 8, 0))
    batches = [[lengths[i] for i in order[start : start + 8]] for start in range(0, 1600, 8)]
    spread = sum(max(batch) - min(batch) for batch in batches) / len(batches)
    assert spread < 5  # of 95; shuffled rows have about 75
    longest = torch.tensor([float(max(batch)) for batch in batches])
    position = torch.arange(len(batches), dtype=torch.float32)
    assert abs(float(torch.corrcoef(torch.stack([longest, position]))[0, 1])) < 0.2
    falls = sum(a > b for a, b in itertools.pairwise(longest.tolist()))
    assert 0.35 * len(batches) < falls < 0.65 * len(batches)  # a sorted order has nearly none, or nearly all


def test_the_part_of_a_batch_comes_last():
    order = list(LengthBucketSampler([i % 9 for i in range(21)], 8, 0))
    assert sorted(order) == list(range(21))
    without = list(LengthBucketSampler([0] * 21, 8, 0))
    assert len(set(without)) == 21
