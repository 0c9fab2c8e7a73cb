"""Runs under torchrun in two processes: what one process computes, computed by two. Writes rank 0's results."""

import sys
from pathlib import Path

import torch

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "tests" / "train"))

from tiny import options  # noqa: E402
from toy import ToyData, toy_config, toy_model  # noqa: E402

from mmfast.train import Trainer, build, load_config  # noqa: E402
from mmfast.train.optim import adamw  # noqa: E402


def tiny_config(data, out, **changes):
    """The shipped configuration, tiny, without dropout."""
    arguments = options(
        data, out, model__dropout=0, model__modality_dropout=0, trainer__max_steps=20, **changes
    )
    return load_config(arguments[1], arguments[2:])


def trained(trainer, model, data, steps):
    """Losses of ``steps`` steps, added over ranks, and the weights after them."""
    model = trainer.parallelize(model)
    optimizer = adamw(model, trainer.config.trainer)
    with trainer.loader(data, "train") as loader:
        values = [
            s.values for _, s in zip(range(steps), trainer.steps(model, optimizer, loader), strict=False)
        ]
    values = torch.stack(values)
    losses = values[:, :-1].contiguous()
    torch.distributed.all_reduce(losses)
    weights = {name: p.full_tensor().detach() for name, p in model.named_parameters()}
    return {"losses": losses, "norms": values[:, -1], "weights": weights}


def gradients(trainer, model, data):
    """The gradient of the first step, before anything is changed."""
    model = trainer.parallelize(model)
    optimizer = adamw(model, trainer.config.trainer)
    found = {}
    optimizer.step = lambda: found.update({n: p.grad.full_tensor() for n, p in model.named_parameters()})
    with trainer.loader(data, "train") as loader:
        next(iter(trainer.steps(model, optimizer, loader)))
    return found


class Divided:
    """Real data of which one rank of two sees only images, the other all but images; NaN in what is not seen."""

    def __init__(self, data):
        self.data, self.fingerprint = data, data.fingerprint

    def loader(self, split, *, rank, world_size, **options):
        self.rank, self.size = rank, world_size
        self.inner = self.data.loader(split, rank=rank, world_size=world_size, **options)
        return self

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.inner.close()

    def __iter__(self):
        for batch in self.inner:
            rows = len(batch["id"])
            number = torch.arange(rows) if self.size == 1 else torch.full((rows,), self.rank)
            seen = torch.stack([number % 2 == 0, number % 2 == 1, number % 2 == 1], 1)  # image, text, audio
            batch["present"] = batch["present"] & seen
            batch["lengths"] = batch["lengths"] * seen
            for column, name in ((0, "image"), (2, "audio")):
                batch[name][~seen[:, column]] = torch.nan
            yield batch


def everything(data, out):
    """All the comparisons, small enough for one start of torchrun."""
    wide = tiny_config(data, out, trainer__precision="fp64")
    narrow = tiny_config(data, out, trainer__precision="fp32")
    ragged = toy_config(out, precision="fp64", batch_size=16)  # 13 and 11 samples to evaluate: filler rows
    results = {
        "shipped": trained(Trainer(wide, quiet=True), *build(wide), 20),
        "gradients": gradients(Trainer(narrow, quiet=True), *build(narrow)),
        "divided": trained(Trainer(wide, quiet=True), (made := build(wide))[0], Divided(made[1]), 5),
    }
    trainer = Trainer(ragged, quiet=True)
    model = toy_model(ragged)
    results["test"] = trainer.test(model, ToyData())
    results["predictions"] = trainer.predict(model, ToyData(), "validation").probability
    saved = toy_config(Path(out) / "saved", max_steps=6, stop_after=3, precision="fp64")
    Trainer(saved, quiet=True).fit(toy_model(saved), ToyData())
    return results


if __name__ == "__main__":
    torch.set_num_threads(1)
    found = everything(*sys.argv[1:])
    if torch.distributed.get_rank() == 0:
        torch.save(found, Path(sys.argv[2]) / "results.pt")
