"""The whole road in one command: real data, training, every subset of modalities, a table and a picture.

``python examples/demo.py`` takes Debian's tuxpaint stamps (picture + caption + speech), or handwritten
digits with synthetic speech where that package cannot be had. Everything it shows was measured in the run.
Further options override the configuration's keys, as for ``mmfast fit``: ``--model.fusion=Attention`` adds
each modality's share of the attention to the picture.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

from mmfast.bench.accuracy import learn, majority, variants
from mmfast.bench.stock_loop import StockLoop
from mmfast.data import Data
from mmfast.data.prepare import digits, stamps
from mmfast.errors import UserError
from mmfast.train import Config, build, load_config

ROOT = Path(__file__).resolve().parents[1]
TURNS = 4  # of the stock loop
CHUNK = 15  # steps of one loop before the other has its turn
WARM = 5  # steps of ours in a turn that are not counted: their batches were made during the other's turn


def prepared(dataset: str) -> str:
    """The data set's name, made if it is not there; ``auto`` is stamps where Debian's package can be had."""
    if dataset in ("auto", "stamps"):
        try:
            stamps.prepare_stamps(ROOT / "data" / "stamps")
            return "stamps"
        except UserError as error:
            if dataset == "stamps":
                raise
            print(f"no stamps here ({error}); the demo goes on with digits")
    digits.prepare_digits(ROOT / "data" / "digits")
    return "digits"


class Race:
    """Runs the stock loop in turns with ours, in one process on the same data.

    Ours keeps the log-mels it has made (``data.memory_mb``); the stock loop makes each anew.

    ``on_step`` is given to ``fit``: after every ``CHUNK`` steps of ours the stock loop takes as many.
    """

    def __init__(self, config: Config, turns: int) -> None:
        """The stock loop trains the same model from the same initial weights."""
        self.stock = StockLoop(config.data, build(config)[0], config.trainer)
        self.batch_size = config.trainer.batch_size
        self.turns = turns

    def on_step(self, number: int) -> None:
        """Hand over when the turn is up."""
        if number == 1:
            self.stock.steps(WARM)
            self.stock.seconds = 0.0
        if number % CHUNK == 0 and number // CHUNK <= self.turns:
            self.stock.steps(CHUNK)

    def speeds(self, step_seconds: list[float]) -> tuple[float, float]:
        """Samples per second, ours and the stock loop's, over the turns that both had."""
        counted = [s for i, s in enumerate(step_seconds[: self.turns * CHUNK]) if i % CHUNK >= WARM]
        ours = self.batch_size * len(counted) / sum(counted)
        return ours, self.batch_size * self.turns * CHUNK / self.stock.seconds


def say(summary: dict[str, Any]) -> None:
    """The one table."""
    table = Table("trained on", "shown in the test", "test accuracy", "samples/s")
    *fewer, everything = summary["by_modalities"]
    ours, stock = summary["samples_per_s"], summary["stock_samples_per_s"]
    table.add_row(everything, everything, f"{summary['accuracy']:.3f}", f"{ours:.1f}")
    for names in reversed(fewer):
        table.add_row(everything, names, f"{summary['by_modalities'][names]:.3f}", "")
    for name, accuracy in summary["trained_alone"].items():
        table.add_row(name, name, f"{accuracy:.3f}", "")
    table.add_row(f"{everything}: the article's model", everything, f"{summary['article_accuracy']:.3f}", "")
    table.add_row("nothing: the majority class", "", f"{summary['majority_accuracy']:.3f}", "")
    table.add_row(f"{everything}: the stock loop", "", "", f"{stock:.1f}")
    Console().print(table)
    print(f"{summary['speedup']:.2f} x the samples per second of the stock loop, in turns with it")


def draw(summary: dict[str, Any], losses: list[float]) -> Figure:
    """The picture: accuracies, speed, the training loss, and where the model attends, the attention."""
    attention = summary["attention"]
    widths = (2.2, 1, 1.6, 1)[: 4 if attention else 3]
    figure, (left, middle, right, *last) = plt.subplots(
        1, len(widths), figsize=(2.7 * sum(widths), 4.2), width_ratios=widths, constrained_layout=True
    )
    rows = [
        ("majority class", summary["majority_accuracy"], "0.75"),
        ("article's model", summary["article_accuracy"], "0.55"),
    ]
    rows += [
        (f"{name}, trained alone", value, "tab:orange") for name, value in summary["trained_alone"].items()
    ]
    rows += [(names, value, "tab:blue") for names, value in summary["by_modalities"].items()]
    names, values, colours = zip(*rows, strict=True)
    bars = left.barh(names, values, color=colours)
    left.bar_label(bars, [f"{value:.2f}" for value in values], padding=3)
    left.set(
        xlim=(0, 1.1),
        xlabel="test accuracy",
        title=f"{summary['dataset']}: what is shown to one model (blue)",
    )
    speeds = [summary["stock_samples_per_s"], summary["samples_per_s"]]
    bars = middle.bar(["stock loop", "mmfast"], speeds, color=["0.55", "tab:blue"])
    middle.bar_label(bars, [f"{value:.0f}" for value in speeds], padding=3)
    middle.set(ylabel="samples / s", title=f"{summary['speedup']:.2f} x", ylim=(0, 1.15 * max(speeds)))
    right.plot(range(1, len(losses) + 1), losses, color="tab:blue")
    right.set(xlabel="step", ylabel="training loss", title="all modalities", ylim=(0, None))
    for axes in last:
        bars = axes.bar(attention.keys(), attention.values(), color="tab:green")
        axes.bar_label(bars, [f"{value:.0%}" for value in attention.values()], padding=3)
        axes.set(ylabel="share of the attention", title="in validation", ylim=(0, 1.1))
    for axes in figure.axes:
        axes.spines[["top", "right"]].set_visible(False)
    return figure


def run(
    dataset: str, steps: int | None, out: Path, quiet: bool, overrides: Sequence[str] = ()
) -> dict[str, Any]:
    """Prepare, train, test and measure; returns the summary."""
    name = prepared(dataset)
    overrides = [*overrides, f"--trainer.out={out}", f"--data.path={ROOT / 'data' / name}"]
    overrides += [f"--trainer.max_steps={steps}"] if steps else []
    config = load_config(ROOT / "configs" / f"{name}.yaml", overrides)
    jobs = variants(config)

    if config.trainer.max_steps < CHUNK:
        raise UserError(
            f"--steps is {config.trainer.max_steps}, wanted at least {CHUNK}: a turn of each loop"
        )
    race = Race(jobs["all"], turns=min(TURNS, config.trainer.max_steps // CHUNK))
    together = learn(jobs["all"], every_subset=True, on_step=race.on_step, quiet=quiet)
    race.stock.close()
    alone = {
        key.removesuffix(" alone"): learn(job, quiet=quiet)
        for key, job in jobs.items()
        if key.endswith(" alone")
    }
    article = learn(jobs["article"], quiet=quiet)
    ours, stock = race.speeds(together.step_seconds)
    summary = {
        "dataset": name,
        "steps": config.trainer.max_steps,
        "accuracy": together.accuracy,
        "by_modalities": together.by_modalities,
        "trained_alone": {key: outcome.accuracy for key, outcome in alone.items()},
        "article_accuracy": article.accuracy,
        "majority_accuracy": majority(Data(config.data)),
        "attention": together.attention,
        "samples_per_s": ours,
        "stock_samples_per_s": stock,
        "speedup": ours / stock,
    }
    (out / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")
    log = (json.loads(line) for line in open(Path(jobs["all"].trainer.out) / "metrics.jsonl"))
    figure = draw(summary, [row["loss"] for row in log if row["kind"] == "train"])
    figure.savefig(out / "report.png", dpi=130)
    plt.close(figure)
    say(summary)
    return summary


def main() -> int:
    """Run the demo; a mistake of the user's is one line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dataset", choices=("auto", "stamps", "digits"), default="auto")
    parser.add_argument(
        "--steps", type=int, help="training steps of each model; the configuration's if not given"
    )
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "demo")
    parser.add_argument("--quiet", action="store_true", help="no progress bars")
    options, overrides = parser.parse_known_args()
    try:
        options.out.mkdir(parents=True, exist_ok=True)
        run(options.dataset, options.steps, options.out, options.quiet, overrides)
    except (UserError, OSError) as error:
        print(f"demo: error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt as stopped:
        print(f"demo: {stopped or 'interrupted'}", file=sys.stderr)
        return 130
    print(f"{options.out / 'summary.json'} and {options.out / 'report.png'} have it all")
    return 0


if __name__ == "__main__":
    sys.exit(main())
