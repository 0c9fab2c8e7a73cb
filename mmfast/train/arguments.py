"""From a YAML file and command-line options to a ``Config``; every mistake is one line that names the key."""

import dataclasses
import difflib
import re
import warnings
from argparse import ArgumentError
from collections.abc import Sequence
from pathlib import Path
from pydoc import locate
from typing import Any, get_args, get_type_hints

from jsonargparse import ArgumentParser, Namespace, set_parsing_settings
from jsonargparse._actions import ActionConfigFile

from mmfast import models
from mmfast.data import Modality
from mmfast.errors import UserError
from mmfast.train.config import Config

# the settings whose class the YAML chooses by ``class_path``
set_parsing_settings(subclasses_enabled=[Modality, models.EncoderConfig, models.FusionConfig])


class File(ActionConfigFile):
    """``--config FILE``; names the file in what is wrong with the whole of it."""

    def __call__(self, parser: Any, cfg: Any, values: Any, option_string: str | None = None) -> None:
        """Read the file."""
        try:
            super().__call__(parser, cfg, values, option_string)
        except (ArgumentError, TypeError, ValueError) as error:
            line = " ".join(str(error).split())
            if line.startswith("Unexpected config:"):
                line = "wanted keys of data, model and trainer"
            elif not isinstance(error, UnicodeDecodeError) and not line.startswith("Problems parsing"):
                raise
            raise UserError(f"{values} is not a configuration: {line}") from None


def parser(prog: str, description: str | None = None) -> ArgumentParser:
    """Make the parser of a whole job: ``--config FILE`` and one option for every key."""
    made = ArgumentParser(prog=prog, description=description, exit_on_error=False, allow_abbrev=False)
    made.add_argument("--config", action=File, help="a YAML file of the keys below")
    made.add_class_arguments(Config)
    return made


def parse(arguments: Sequence[str], prog: str = "mmfast fit", description: str | None = None) -> Config:
    """Read ``--config FILE --trainer.max_steps 300 …``; later options override earlier ones and the file."""
    made = parser(prog, description)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            values = made.parse_args(list(arguments))
            for name, hint in get_type_hints(Config).items():
                refuse_null(values.get(name), hint, name)
            built = made.instantiate(values)
    except (ArgumentError, TypeError, ValueError, OverflowError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(explain(str(error), made)) from None
    return Config(built.data, built.model, built.trainer)


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Read a configuration file, with overrides as on the command line: ``["--trainer.max_steps=20"]``."""
    return parse(["--config", str(path), *overrides])


def refuse_null(value: Any, hint: Any, key: str) -> None:
    """Raise a ``UserError`` for a null where the setting's type has none: jsonargparse lets some pass."""
    if value is None and hint is not Any and type(None) not in get_args(hint):
        raise UserError(f"{key} is null; wanted {getattr(hint, '__name__', hint)}")
    if isinstance(value, dict):
        for name, item in value.items():
            refuse_null(item, (*get_args(hint), Any, Any)[1], f"{key}.{name}")  # dict[str, V]: the V
    elif isinstance(value, Namespace):
        path = value.get("class_path")
        classes: Any = [locate(path)] if path else get_args(hint) or [hint]
        hints = {name: h for made in classes for name, h in get_type_hints(made.__init__).items()}
        for name, item in vars(value.get("init_args", Namespace()) if path else value).items():
            refuse_null(item, hints.get(name, Any), f"{key}.{name}")


def explain(message: str, made: ArgumentParser) -> str:
    """Turn jsonargparse's answer into one line, with the nearest known key where a key is unknown."""
    line = " ".join(message.split())
    if alternatives := re.search(r"Errors: - (.*) Given value type:", line):
        # a setting of several types failed as each of them: the one that was meant says most
        head = line[: alternatives.start()].partition("Does not validate")[0]
        says = [text for text in alternatives[1].split(" - ") if not re.search(NOISE, text)]
        line = f"{head}{(says or [alternatives[1]])[0]}"
    if found := re.search(r"Group '([\w.]+)' does not accept option '(\w+)'", line):
        return unknown(f"{found[1]}.{found[2]}", [a.dest for a in made._actions])
    if found := re.search(r"[Uu]nrecognized arguments: --([\w.]+)", line):
        return unknown(found[1], [a.dest for a in made._actions])
    if found := re.search(r"Option '([\w.]+)' is not accepted", line):
        owner = re.findall(r"class_path '[\w.]*?(\w+)'", line[: found.start()])
        for base in (Modality, models.EncoderConfig, models.FusionConfig):
            if owner[-1:] == [base.__name__]:
                wanted = ", ".join(made.__name__ for made in base.__subclasses__())
                return f"a {base.__name__} with '{found[1]}' has no class_path; wanted one of {wanted}"
        return unknown(found[1], field_names(), f" of {owner[-1]}" if owner else "")
    line = re.sub(r"Expected an? <class '(\w+)'>\. Got value: (.*)", r"got \2, wanted \1", line)
    line = re.sub(r"Expected a dot import path string: (\w+)", r"there is no class '\1'", line)
    line = re.sub(r"Expected an? <class '(\w+)'>", r"wanted \1", line)
    line = re.sub(r"Problem with given class_path '[\w.]*?(\w+)':", r"\1:", line)
    return re.sub(r'Parser key "([\w.]+)":', r"\1:", line)


NOISE = r"Subclasses are disabled|unexpected keyword|NoneType|path string: (Model|Article)Config$"


def unknown(key: str, known: Sequence[str], where: str = "") -> str:
    """Say that there is no such key, and which one may have been meant."""
    near = difflib.get_close_matches(key, known, 1)
    return f"unknown configuration key '{key}'{where}" + (f"; did you mean '{near[0]}'?" if near else "")


def field_names() -> list[str]:
    """Name every setting of the classes that a ``class_path`` can choose."""
    chosen: list[Any] = [models.ModelConfig, models.ArticleConfig]
    for base in (Modality, models.EncoderConfig, models.FusionConfig):
        chosen += base.__subclasses__()
    return sorted(
        {f.name for made in chosen if dataclasses.is_dataclass(made) for f in dataclasses.fields(made)}
    )
