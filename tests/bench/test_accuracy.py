"""What the accuracies with subsets of the modalities are made into."""

from itertools import product
from pathlib import Path
from types import SimpleNamespace

import pytest

from mmfast.bench.accuracy import Outcome, fusion_table, fusions, subsets, with_missing
from mmfast.errors import UserError
from mmfast.models import build_model
from mmfast.train import load_config

DIGITS = Path(__file__).parents[2] / "configs" / "digits.yaml"
NAMES = ("image", "text", "audio")
SUBSETS = ["+".join(chosen) for chosen in subsets(NAMES)]


def test_what_is_missing_is_averaged_over_every_way_to_be_missing():
    accuracy = {shown: 1 / (i + 1) for i, shown in enumerate(SUBSETS)}
    whole = weight = 0.0
    for kept in product([False, True], repeat=3):
        if any(kept):
            chance = 0.7 ** sum(kept) * 0.3 ** (3 - sum(kept))
            whole += chance * accuracy["+".join(n for n, k in zip(NAMES, kept, strict=True) if k)]
            weight += chance
    assert with_missing(accuracy, 0.3) == pytest.approx(whole / weight)
    assert with_missing(accuracy, 0.0) == accuracy["image+text+audio"]


def test_the_table_has_each_fusion_beside_the_first():
    def outcome(accuracy, *seconds):
        return Outcome(dict.fromkeys(SUBSETS, accuracy), list(seconds), {})

    outcomes = {
        "Concat": [outcome(0.5, 1.0, 1.0, 9.0), outcome(0.7, 2.0)],
        "Gated": [outcome(0.6, 2.0), outcome(0.6, 4.0)],
    }
    _, _, concat, gated = fusion_table(outcomes).split("\n")
    assert concat.startswith("| Concat | 0.600 ± 1.271 | 0.600 ± 1.271 | 1.00 ")
    assert gated == "| Gated | 0.600 ± 0.000 | 0.600 ± 0.000 | 2.00 (2.00–2.00) |"


def test_every_fusion_is_tried_at_the_same_width():
    jobs = fusions(load_config(DIGITS))
    assert list(jobs) == ["Concat", "Attention", "Weighted", "Gated", "LowRank", "Bottleneck", "Pairwise"]
    for name, job in jobs.items():
        assert type(job.model.fusion).__name__ == name
        assert job.model.fusion.dim == 128
        data = SimpleNamespace(modalities=job.data.modalities, vocab_size=100, num_classes=10)
        assert build_model(job.model, data).fusion.dim == 128
    assert len({job.trainer.out for job in jobs.values()}) == len(jobs)
    assert list(fusions(load_config(DIGITS), ["Gated", "Concat"])) == ["Gated", "Concat"]
    with pytest.raises(UserError, match="--fusions: Sum is none, wanted some of Concat, Attention"):
        fusions(load_config(DIGITS), ["Sum"])
