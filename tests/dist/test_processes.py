"""Two real processes compute what one does."""

import compiled
import pytest
import torch
from check import assert_promised, backends, worst
from job import everything
from tiny import dataset, options, torchrun
from toy import ToyData, toy_config, toy_model

from mmfast.train import Trainer


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """Results of one process (this one) and of two."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("dist")
    data = dataset(folder)
    for name in ("one", "two"):
        (folder / name).mkdir()
    said = torchrun(2, "tests/dist/job.py", data, folder / "two", module=None)
    assert said.returncode == 0, said.stderr[-4000:]
    two = torch.load(folder / "two" / "results.pt")
    return everything(data, folder / "one"), two, folder


def test_the_shipped_job_in_float64_agrees_to_1e_9_over_20_steps(both):
    one, two, _ = both
    assert one["shipped"]["losses"].shape == (20, 1)
    for key in ("losses", "norms"):
        assert torch.allclose(one["shipped"][key], two["shipped"][key], rtol=0, atol=1e-9)
    for name, weight in one["shipped"]["weights"].items():
        assert (weight - two["shipped"]["weights"][name]).abs().max() <= 1e-9, name


def test_the_first_gradients_in_float32_agree_to_1e_5_of_the_largest(both):
    one, two, _ = both
    largest = max(grad.abs().max() for grad in one["gradients"].values())
    assert one["gradients"].keys() == two["gradients"].keys() and largest > 0
    for name, grad in one["gradients"].items():
        assert (grad - two["gradients"][name]).abs().max() <= 1e-5 * largest, name


def test_ranks_that_see_different_modalities_stay_exact(both):
    one, two, _ = both
    assert torch.isfinite(one["divided"]["losses"]).all() and one["divided"]["norms"].min() > 0
    assert torch.allclose(one["divided"]["losses"], two["divided"]["losses"], rtol=0, atol=1e-9)
    for name, weight in one["divided"]["weights"].items():
        assert (weight - two["divided"]["weights"][name]).abs().max() <= 1e-9, name


def test_evaluation_and_predictions_are_the_same(both):
    one, two, _ = both
    assert one["test"]["count"] == two["test"]["count"] == 11
    assert one["test"]["accuracy"] == two["test"]["accuracy"]
    assert one["test"]["loss"] == pytest.approx(two["test"]["loss"], abs=1e-12)
    assert torch.allclose(one["predictions"], two["predictions"])


def test_a_checkpoint_of_two_processes_goes_on_in_one(both):
    folder = both[2]
    ends = []
    for name in ("one", "two"):
        config = toy_config(folder / name / "saved", max_steps=6, resume="latest", precision="fp64")
        model = toy_model(config)
        Trainer(config, quiet=True).fit(model, ToyData())
        ends.append([p.full_tensor().detach() for p in model.parameters()])
    assert all(torch.allclose(p, q, rtol=0, atol=1e-9) for p, q in zip(*ends, strict=True))


def test_more_ranks_than_samples_is_said_once(tmp_path):
    data = dataset(tmp_path, train=1, validation=2, test=2)
    said = torchrun(2, "fit", *options(data, tmp_path / "run"))
    assert said.returncode != 0
    lines = [line for line in said.stderr.splitlines() if line.startswith("mmfast: ")]
    assert lines == ["mmfast: error: 'train' has 1 samples, fewer than the 2 ranks"]


@pytest.mark.inductor
def test_a_sharded_model_compiled_with_mmfast_has_the_gradients_of_the_whole_one(tmp_path):
    said = torchrun(2, "tests/dist/compiled.py", tmp_path / "results.pt", module=None)
    assert said.returncode == 0, said.stderr[-4000:]
    two = torch.load(tmp_path / "results.pt")
    assert two["native calls"] == (1 if "cpu" in backends("concat_linear") else 0)
    results = {}
    for dtype in (torch.float32, torch.float64):
        model, inputs = compiled.made()
        out = model.to(dtype)(*(t.to(dtype) for t in inputs))
        compiled.loss(out).backward()
        results[dtype] = {name: p.grad for name, p in model.named_parameters()} | {"out": out.detach()}
    for name, meant in results[torch.float64].items():
        own = worst(results[torch.float32][name].double() - meant)
        assert_promised(two["results"][name], meant, own, name)
