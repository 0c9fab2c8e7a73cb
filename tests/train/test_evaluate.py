"""Evaluation: exact over a whole split, with subsets of modalities, filler rows left out."""

import pytest
import torch
from toy import SIZES, ToyData, toy_config, toy_model

from mmfast.errors import UserError
from mmfast.train import Trainer


@pytest.mark.parametrize("batch_size", [1, 4, 8, 64])
def test_metrics_are_those_of_the_whole_split_at_any_batch_size(tmp_path, batch_size):
    config = toy_config(tmp_path, batch_size=batch_size, precision="fp64")
    model, data = toy_model(config).double(), ToyData()
    rows = next(iter(data.loader("test", batch_size=SIZES["test"], train=False)))
    y = model(rows | {"image": rows["image"].double()})["label"]
    metrics = Trainer(config, quiet=True).test(model, data)
    assert metrics["count"] == SIZES["test"]
    assert metrics["accuracy"] == (y.argmax(-1) == rows["label"]).double().mean().item()
    expected = torch.nn.functional.cross_entropy(y, rows["label"]).item()
    assert metrics["loss"] == pytest.approx(expected, abs=1e-12)


def test_shares_are_means_over_the_samples_of_the_split(tmp_path):
    class Sharing(torch.nn.Module):
        def __init__(self, model):
            super().__init__()
            self.model = model

        def forward(self, batch):
            return self.model(batch) | {"share/image": batch["present"][:, 0] * (1.0 + batch["id"])}

    config = toy_config(tmp_path, batch_size=8)
    data = ToyData()
    rows = next(iter(data.loader("test", batch_size=SIZES["test"], train=False)))
    metrics = Trainer(config, quiet=True).test(Sharing(toy_model(config)), data)
    wanted = (rows["present"][:, 0] * (1.0 + rows["id"])).mean().item()
    assert metrics["share/image"] == pytest.approx(wanted, rel=1e-6)


def test_only_reports_the_other_modalities_absent(tmp_path):
    config = toy_config(tmp_path)
    model, data, trainer = toy_model(config), ToyData(), Trainer(config, quiet=True)
    seen = trainer.predict(model, data, only=["image"]).present
    assert not seen[:, 1].any() and seen[:, 0].any()
    assert trainer.test(model, data, ["image"]) != trainer.test(model, data)


def test_predictions_are_in_the_order_of_the_split(tmp_path):
    config = toy_config(tmp_path, batch_size=4)
    answers = Trainer(config, quiet=True).predict(toy_model(config), ToyData(), "validation")
    assert answers.id.tolist() == list(range(SIZES["validation"]))
    assert torch.allclose(answers.probability.sum(-1), torch.ones(SIZES["validation"]))


def test_a_split_without_labels_is_named(tmp_path):
    class Unlabelled(ToyData):
        def loader(self, *arguments, **options):
            made = super().loader(*arguments, **options)
            row = made.row
            made.row = lambda i, step: row(i, step) | {"label": torch.tensor(-1)}
            return made

    config = toy_config(tmp_path)
    with pytest.raises(UserError, match=r"no sample of the test split has a 'label'"):
        Trainer(config, quiet=True).test(toy_model(config), Unlabelled())


def test_evaluation_changes_nothing_in_training(tmp_path):
    options = {"max_steps": 6, "dropout": 0.2}
    plain = Trainer(toy_config(tmp_path / "a", **options), quiet=True)
    often = Trainer(toy_config(tmp_path / "b", validate_every=1, **options), quiet=True)
    assert (
        plain.fit(toy_model(plain.config), ToyData()).loss
        == often.fit(toy_model(often.config), ToyData()).loss
    )


def test_speed_leaves_out_what_happens_between_the_steps(tmp_path):
    import time

    config = toy_config(tmp_path, max_steps=6, log_every=2)
    result = Trainer(config, quiet=True).fit(toy_model(config), ToyData(), on_step=lambda _: time.sleep(0.3))
    assert len(result.step_seconds) == 6 and sum(result.step_seconds) < 1.0
    assert result.samples_per_s > 8 / 0.3 and 0 <= result.waiting <= 1
