"""The command ``mmfast``. Every mistake of a user's ends in one line and a non-zero exit status.

Heavy imports stay inside the commands, so that ``mmfast --help`` answers at once.
"""

import argparse
import os
import re
import signal
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmfast.errors import UserError

if TYPE_CHECKING:
    from mmfast.train import Config

COMMANDS = {
    "prepare": "make a dataset: stamps, digits, folder, csv or index",
    "check": "read a configuration, decode a batch, take a step, say what would be used",
    "fit": "train",
    "validate": "score a checkpoint on the validation split",
    "test": "score a checkpoint on the test split",
    "predict": "write a checkpoint's answers for a split",
    "bench": "measure the ops on this machine",
    "plan": "parameters, memory and steps of a job, without running it",
    "doctor": "versions, hardware, and which backend of each op is ready",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    listing = "\n".join(f"  {name:9} {words}" for name, words in COMMANDS.items())
    top = argparse.ArgumentParser(
        prog="mmfast",
        usage="mmfast COMMAND …",
        description=f"Train multimodal models fast.\n\ncommands:\n{listing}",
        epilog="mmfast COMMAND --help says more.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    if not arguments or arguments[0] in ("-h", "--help"):
        top.print_help()
        return 0 if arguments else 2
    name, rest = arguments[0], arguments[1:]
    try:
        if name not in COMMANDS:
            raise UserError(f"there is no command '{name}'; wanted one of {', '.join(COMMANDS)}")
        command: Callable[[list[str]], int] = globals()[name]
        return command(rest)
    except KeyboardInterrupt as stopped:
        tell(f"mmfast: {stopped if stopped.args else 'interrupted'}")
        return 128 + int(getattr(stopped, "signum", signal.SIGINT))
    except UserError as error:
        tell(f"mmfast: error: {error}")
    except OSError as error:  # a full disk, a folder that cannot be written
        tell(f"mmfast: error: {' '.join(str(error).split())}")
    except Exception as error:
        line = " ".join(f"{type(error).__name__}: {error}".split())
        tell(f"{traceback.format_exc()}mmfast: error: {line}")
    return 1


def tell(words: str) -> None:
    """Print for the user: of all processes of a job only the first that has something to say."""
    if "RANK" in os.environ and not _first_to_tell():
        return
    print(words, file=sys.stderr, flush=True)


def _first_to_tell() -> bool:
    import torch.distributed as dist

    if not dist.is_initialized():  # so early that every process has the same to say: once a node
        return os.environ.get("LOCAL_RANK", "0") == "0"
    try:
        return dist.distributed_c10d._get_default_store().add("mmfast/told", 1) == 1
    except RuntimeError:  # the store went with rank 0, which has told
        return False


def fit(arguments: list[str]) -> int:
    """``mmfast fit --config FILE [--resume [latest|PATH]] [--KEY VALUE …]``."""
    from mmfast.train import Trainer, build

    config = _config("fit", arguments)
    trainer = Trainer(config)
    result = trainer.fit(*build(config))
    if trainer.world.rank == 0:
        metrics = "".join(
            f", {name} {value:.4g}" for name, value in result.metrics.items() if name != "count"
        )
        print(
            f"step {result.steps}{metrics}; {result.samples_per_s:.1f} samples/s, "
            f"{result.waiting:.0%} of the time waiting for data; {result.checkpoint}"
        )
    return 0


def validate(arguments: list[str]) -> int:
    """``mmfast validate --config FILE [--checkpoint best|latest|PATH] [--only image,text]``."""
    return _score("validate", arguments)


def test(arguments: list[str]) -> int:
    """``mmfast test --config FILE [--checkpoint best|latest|PATH] [--only image,text]``."""
    return _score("test", arguments)


def _score(name: str, arguments: list[str]) -> int:
    from mmfast.train import Trainer, build

    options, rest = _options(arguments, "checkpoint", "only")
    config = _config(name, rest)
    trainer = Trainer(config)
    model, data = build(config)
    trainer.load(model, options.checkpoint, data)
    score = trainer.validate if name == "validate" else trainer.test
    metrics = score(model, data, options.only)
    if trainer.world.rank == 0:
        for key, value in metrics.items():
            print(f"{key:12} {value:.6g}")
    return 0


def predict(arguments: list[str]) -> int:
    """``mmfast predict --config FILE [--split test] [--checkpoint …] [--only …] [--output FILE]``."""
    import json

    from mmfast.train import Trainer, build, checkpoint
    from mmfast.train.log import naming

    options, rest = _options(arguments, "checkpoint", "only", "split", "output")
    config = _config("predict", rest)
    trainer = Trainer(config)
    found = trainer.find(options.checkpoint)
    path = Path(options.output or Path(config.trainer.out) / f"predictions-{options.split}.jsonl")

    def refuse() -> None:  # now, not after all predictions
        if path.is_dir() or not os.access(path if path.exists() else path.parent, os.W_OK):
            raise UserError(f"cannot write {path}; wanted a file that can be written")

    checkpoint.on_first_rank(refuse)
    model, data = build(config, checkpoint.facts(found)["job"].get("data classes", ()))
    trainer.load(model, str(found), data)
    answers = trainer.predict(model, data, options.split, options.only)
    if trainer.world.rank == 0:
        index, classes = data.dataset.split(options.split), data.classes
        with naming(path), open(path, "w") as file:
            for sample, row in zip(answers.id.tolist(), answers.probability.tolist(), strict=True):
                chosen = max(range(len(row)), key=row.__getitem__)
                answer = {"key": index.key(sample), "label": classes[chosen], "probability": row[chosen]}
                file.write(json.dumps(answer | {"probabilities": row}) + "\n")
        print(f"{len(answers.id)} predictions in {path}")
    return 0


def check(arguments: list[str]) -> int:
    """``mmfast check --config FILE``: everything a job needs, tried once, without writing anything."""
    from mmfast.train.report import check as run

    return run(_config("check", arguments))


def plan(arguments: list[str]) -> int:
    """``mmfast plan --config FILE``: what a job will need."""
    from mmfast.train.report import plan as run

    return run(_config("plan", arguments))


def prepare(arguments: list[str]) -> int:
    """``mmfast prepare SOURCE …``."""
    from mmfast.data.prepare import SOURCES

    parser = argparse.ArgumentParser(prog="mmfast prepare", description=COMMANDS["prepare"])
    chosen = parser.add_subparsers(dest="source", required=True, metavar="SOURCE")
    for name, source in SOURCES.items():
        words = (source.__doc__ or "").strip().split("\n")[0].partition("``: ")[2]
        source.add_arguments(chosen.add_parser(name, help=words, description=words))
    options = parser.parse_args(arguments)
    path = SOURCES[options.source].prepare(options)
    print(f"{path} is ready")
    return 0


def bench(arguments: list[str]) -> int:
    """``mmfast bench [pytest options]``: pytest-benchmark over ``mmfast/bench``."""
    import pytest

    folder = Path(__file__).parent / "bench"
    if not folder.is_dir():
        raise UserError(f"the benchmarks are not installed: {folder} is not there")
    return int(pytest.main([str(folder), "--benchmark-only", "-q", *arguments]))


def doctor(arguments: list[str]) -> int:
    """``mmfast doctor``."""
    from mmfast import doctor as room

    return int(room.main() or 0)


def _options(arguments: list[str], *own: str) -> tuple[argparse.Namespace, list[str]]:
    settings: dict[str, Any] = {
        "checkpoint": {"default": "best"},
        "only": {"type": lambda names: names.split(",")},
        "split": {"default": "test"},
        "output": {},
    }
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for name in own:
        parser.add_argument(f"--{name}", **settings[name])
    return parser.parse_known_args(arguments)


def _config(command: str, arguments: list[str]) -> "Config":
    from mmfast.train.arguments import parse

    arguments = [re.sub(r"^--resume=", "--trainer.resume=", argument) for argument in arguments]
    if "--resume" in arguments:  # short for --trainer.resume, "latest" unless it says which
        at = arguments.index("--resume")
        given = at + 1 < len(arguments) and not arguments[at + 1].startswith("-")
        arguments[at : at + 1 + given] = ["--trainer.resume", arguments[at + 1] if given else "latest"]
    usage = (globals()[command].__doc__ or "").replace("``", "")  # the options that are not keys
    return parse(arguments, f"mmfast {command}", usage)
