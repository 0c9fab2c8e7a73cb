"""What a configuration learns: with all modalities, with each alone, and beside the article's model.

``python -m mmfast.bench.accuracy configs/digits.yaml --seeds 5`` trains every variant once per seed and
prints a table with 95 % intervals; ``--stock`` trains the same model by the stock loop too. ``--fusions``
trains the model with every fusion instead, or with those it names, and tells how it does where modalities are
missing.
``examples/demo.py`` uses the same functions with one seed.
"""

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from pathlib import Path

import numpy as np
from scipy import stats

from mmfast.bench.report import RESULTS, Machine, commit
from mmfast.bench.stock_loop import StockLoop
from mmfast.data import Data
from mmfast.errors import UserError
from mmfast.models import ArticleConfig, FusionConfig, ModelConfig
from mmfast.train import Config, Trainer, build, load_config

MISSING = 0.3  # of the modalities at test time, in the table of fusions


@dataclass(frozen=True)
class Outcome:
    """A trained model, tested: ``by_modalities`` has the accuracy when only those are shown to it.

    ``attention`` has each modality's share of it in the last validation, where the fusion attends.
    """

    by_modalities: dict[str, float]
    step_seconds: list[float]
    attention: dict[str, float]

    @property
    def accuracy(self) -> float:
        """With everything that the model was trained on."""
        return list(self.by_modalities.values())[-1]


def subsets(names: Sequence[str]) -> list[tuple[str, ...]]:
    """Every choice of at least one modality, all of them last."""
    return [chosen for size in range(1, len(names) + 1) for chosen in combinations(names, size)]


def variants(config: Config) -> dict[str, Config]:
    """The job itself, each of its modalities alone, and the article's model, all with the same trainer."""

    def variant(name: str, only: list[str] | None = None) -> Config:
        out = f"{config.trainer.out}/{name.replace(' ', '-')}"
        return replace(config, trainer=replace(config.trainer, out=out, only=only, overwrite=True))

    alone = {f"{name} alone": variant(f"{name} alone", [name]) for name in config.data.modalities}
    return {"all": variant("all"), **alone, "article": replace(variant("article"), model=ArticleConfig())}


def fusions(config: Config, names: Sequence[str] = ()) -> dict[str, Config]:
    """The job with every fusion there is, or with the named ones, each at the width that it has."""
    model = config.model
    assert isinstance(model, ModelConfig)
    kinds = {kind.__name__: kind for kind in FusionConfig.__subclasses__()}
    for name in names:
        if name not in kinds:
            raise UserError(f"--fusions: {name} is none, wanted some of {', '.join(kinds)}")

    def variant(kind: Callable[..., FusionConfig], name: str) -> Config:
        trainer = replace(config.trainer, out=f"{config.trainer.out}/{name}", overwrite=True)
        return replace(config, model=replace(model, fusion=kind(dim=model.fusion.dim)), trainer=trainer)

    return {name: variant(kinds[name], name) for name in names or kinds}


def with_missing(by_modalities: dict[str, float], share: float) -> float:
    """Accuracy to be expected where each modality is missing in ``share`` of samples, but never all of them.

    By the accuracies with each subset of modalities, so that no draw of what is missing adds noise.
    """
    names = max(by_modalities, key=len).split("+")
    chances = {
        shown: (1 - share) ** (kept := len(shown.split("+"))) * share ** (len(names) - kept)
        for shown in by_modalities
    }
    return sum(chances[s] * accuracy for s, accuracy in by_modalities.items()) / sum(chances.values())


def learn(
    config: Config,
    *,
    every_subset: bool = False,
    on_step: Callable[[int], None] | None = None,
    quiet: bool = False,
) -> Outcome:
    """Train as ``config`` says and test the final weights, shown all modalities or every subset of them."""
    trainer = Trainer(config, quiet=quiet)
    model, data = build(config)
    result = trainer.fit(model, data, on_step=on_step)
    names = list(trainer.config.data.modalities)
    shown = subsets(names) if every_subset else [tuple(names)]
    scores = {"+".join(chosen): trainer.test(model, data, only=chosen)["accuracy"] for chosen in shown}
    attention = {
        name.removeprefix("share/"): value
        for name, value in result.metrics.items()
        if name.startswith("share/")
    }
    return Outcome(scores, result.step_seconds, attention)


def learn_stock(config: Config) -> float:
    """Train the same model by the stock loop for as many steps; returns its test accuracy."""
    model, data = build(config)
    loop = StockLoop(config.data, model, config.trainer)
    try:
        loop.steps(config.trainer.max_steps)
    finally:
        loop.close()
    with data.loader("test", batch_size=config.trainer.batch_size, train=False) as batches:
        return loop.accuracy(batches)


def majority(data: Data) -> float:
    """Accuracy on the test split of the class that is most frequent in training."""
    train, test = (data.dataset.split(name).labels for name in ("train", "test"))
    return float(np.mean(test[test >= 0] == np.bincount(train[train >= 0]).argmax()))


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Mean and half the width of its 95 % interval (Student's t over the seeds)."""
    n = len(values)
    spread = stats.t.ppf(0.975, n - 1) * np.std(values, ddof=1) / np.sqrt(n) if n > 1 else float("nan")
    return float(np.mean(values)), float(spread)


def table(scores: dict[str, list[float]], chance: float) -> str:
    """A Markdown table: a row for each variant, its accuracy and the paired difference of "all" to it."""
    lines = ["| trained on | test accuracy | all modalities minus this |", "|---|---|---|"]
    for name, values in scores.items():
        mean, half = interval(values)
        gain, gain_half = interval([a - b for a, b in zip(scores["all"], values, strict=True)])
        versus = "" if name == "all" else f"{gain:+.3f} ± {gain_half:.3f}"
        lines.append(f"| {name} | {mean:.3f} ± {half:.3f} | {versus} |")
    return "\n".join([*lines, f"| majority class | {chance:.3f} | |"])


def fusion_table(outcomes: dict[str, list[Outcome]]) -> str:
    """A Markdown table: a row for each fusion; a step's time is in those of the first one, seed by seed."""
    lines = [
        f"| fusion | test accuracy | {MISSING:.0%} of modalities missing | time of a training step |",
        "|---|---|---|---|",
    ]
    first = next(iter(outcomes.values()))
    for name, learnt in outcomes.items():
        columns = [
            "{:.3f} ± {:.3f}".format(*interval(values))
            for values in (
                [one.accuracy for one in learnt],
                [with_missing(one.by_modalities, MISSING) for one in learnt],
            )
        ]
        ratios = [
            np.median(one.step_seconds) / np.median(other.step_seconds)
            for one, other in zip(learnt, first, strict=True)
        ]
        low, middle, high = np.quantile(ratios, [0.25, 0.5, 0.75])
        lines.append(f"| {' | '.join([name, *columns])} | {middle:.2f} ({low:.2f}–{high:.2f}) |")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Train every variant over the seeds, print the table and keep it in bench/results/."""
    parser = argparse.ArgumentParser(prog="python -m mmfast.bench.accuracy", description=__doc__)
    parser.add_argument("config", help="as for mmfast fit; further options override its keys")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--stock", action="store_true", help="train by the stock loop too")
    parser.add_argument(
        "--fusions", nargs="*", metavar="FUSION", help="with these, or every one, instead of every modality"
    )
    options, overrides = parser.parse_known_args(arguments)
    try:
        config = load_config(options.config, overrides)
        outcomes: dict[str, list[Outcome]] = {}
        stock: list[float] = []
        for seed in range(options.seeds):
            data = replace(config.data, seed=seed)
            seeded = replace(config, data=data, trainer=replace(config.trainer, seed=seed))
            jobs = variants(seeded) if options.fusions is None else fusions(seeded, options.fusions)
            for name, variant in jobs.items():
                one = learn(variant, every_subset=options.fusions is not None, quiet=True)
                outcomes.setdefault(name, []).append(one)
                print(f"seed {seed}, {name}: {one.accuracy:.3f}", flush=True)
            if options.stock:
                stock.append(learn_stock(seeded))
                print(f"seed {seed}, stock loop: {stock[-1]:.3f}", flush=True)
        scores = {name: [one.accuracy for one in learnt] for name, learnt in outcomes.items()}
        scores |= {"stock loop": stock} if stock else {}
        if options.fusions is None:
            words = table(scores, majority(Data(config.data)))
        else:
            words = fusion_table(outcomes)
    except UserError as error:
        print(f"mmfast: error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt as stopped:
        print(f"mmfast: {stopped or 'interrupted'}", file=sys.stderr)
        return 130
    print(words)
    name = Path(options.config).stem
    if options.fusions is not None:
        name += "-" + "-".join(options.fusions or ["fusions"])
    record = {
        "name": name,
        "scores": scores,
        "by_modalities": {name: [one.by_modalities for one in learnt] for name, learnt in outcomes.items()},
        "commit": commit(),
        "machine": vars(Machine.here()),
        "table": words.split("\n"),
    }
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"accuracy-{name}.json").write_text(json.dumps(record, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
