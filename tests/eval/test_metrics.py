"""Proves that the metrics equal scikit-learn's and values worked out by hand, and that loading them needs neither the
network nor a writable Hugging Face cache nor the absence of other processes."""

from __future__ import annotations

import math
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef

from eval.base import classification_metrics, score
from eval.glue import Classification

ROOT = Path(__file__).resolve().parents[2]
LOAD = "from eval.base import score; assert score([0, 1, 1, 0], [0, 1, 0, 0], 2)['accuracy'] == 0.75"


@pytest.mark.parametrize("classes", [2, 3, 5])
def test_equal_to_scikit_learn(classes):
    draw = random.Random(classes)
    gold = [draw.randrange(classes) for _ in range(200)]
    predictions = [label if draw.random() < 0.6 else draw.randrange(classes) for label in gold]
    assert score(predictions, gold, classes) == {
        "accuracy": accuracy_score(gold, predictions),
        "matthews_correlation": matthews_corrcoef(gold, predictions),
        "f1": f1_score(gold, predictions, average="binary" if classes == 2 else "macro"),
    }


def test_by_hand():
    """True positives 3, false positives 1, false negatives 2, true negatives 4."""
    gold = [1] * 5 + [0] * 5
    predictions = [1, 1, 1, 0, 0, 1, 0, 0, 0, 0]
    values = score(predictions, gold, 2)
    assert values["accuracy"] == pytest.approx(0.7)
    assert values["f1"] == pytest.approx(2 * 3 / (2 * 3 + 1 + 2))
    assert values["matthews_correlation"] == pytest.approx((3 * 4 - 1 * 2) / math.sqrt(4 * 5 * 5 * 6))


def test_three_classes_by_hand():
    """F1 of the classes: 1.0, 0.5 and 0.5; their mean is 2/3."""
    assert score([0, 0, 1, 2, 2, 1], [0, 0, 1, 1, 2, 2], 3)["f1"] == pytest.approx(2 / 3)


@pytest.mark.parametrize("constant", [0, 1])
def test_constant_predictions(constant):
    values = score([constant] * 10, [1] * 7 + [0] * 3, 2)
    assert values["matthews_correlation"] == 0.0
    assert values["accuracy"] == pytest.approx(0.7 if constant else 0.3)
    assert values["f1"] == pytest.approx(14 / 17 if constant else 0.0)


def test_perfect_and_single_class():
    assert score([0, 1, 1], [0, 1, 1], 2) == {"accuracy": 1.0, "matthews_correlation": 1.0, "f1": 1.0}
    assert score([0, 0], [0, 0], 2)["f1"] == 0.0  # no positive row: F1 of class 1 is 0, as in scikit-learn


@pytest.mark.parametrize(("predictions", "gold"), [([], []), ([0], [0, 1])])
def test_nothing_or_unequal_is_refused(predictions, gold):
    with pytest.raises(ValueError, match="cannot score"):
        score(predictions, gold, 2)


def test_record_metrics():
    result = Classification([0, 1, 1, 0], [[0.0, 0.0]] * 4, [True, False, True, False], 0.25, 8)
    metrics = classification_metrics(result, [0, 1, 0, 0], 2)
    assert set(metrics) == {"accuracy", "matthews_correlation", "f1", "exact_match", "eval_loss"}
    assert metrics["accuracy"] == {"value": 0.75, "n": 4}
    assert metrics["exact_match"] == {"value": 0.5, "n": 4}
    assert metrics["eval_loss"] == {"value": 0.25, "n": 4}


def _environment(cache: Path) -> dict[str, str]:
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "XDG_"))}
    return {**kept, "HF_HOME": str(cache), "HF_HUB_OFFLINE": "1", "HF_EVALUATE_OFFLINE": "1"}


def test_loads_offline_in_concurrent_processes_without_a_cache(tmp_path):
    """HF_HOME is a file here, so that whatever would write to the cache fails, for root too."""
    blocked = tmp_path / "hf"
    blocked.write_text("not a folder")
    environment = {**_environment(blocked), "TMPDIR": str(tmp_path)}
    running = [
        subprocess.Popen([sys.executable, "-c", LOAD], cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    for process in running:
        _, errors = process.communicate(timeout=300)
        assert process.returncode == 0, errors
    assert not list(tmp_path.glob("metrics-*"))  # each process took its folder with it
