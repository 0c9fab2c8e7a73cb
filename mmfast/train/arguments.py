"""From a YAML file and command-line options to a ``Config``; every mistake is one line that names the key."""

import difflib
import re
import warnings
from argparse import ArgumentError
from collections.abc import Sequence
from pathlib import Path

from jsonargparse import ArgumentParser, set_parsing_settings
from jsonargparse._actions import ActionConfigFile

from mmfast import models
from mmfast.data import Modality
from mmfast.errors import UserError
from mmfast.train.config import Config

# the settings whose class the YAML chooses by ``class_path``
set_parsing_settings(subclasses_enabled=[Modality, models.EncoderConfig, models.FusionConfig])


def parser(prog: str) -> ArgumentParser:
    """Make the parser of a whole job: ``--config FILE`` and one option for every key."""
    made = ArgumentParser(prog=prog, exit_on_error=False, allow_abbrev=False)
    made.add_argument("--config", action=ActionConfigFile, help="a YAML file of the keys below")
    made.add_class_arguments(Config)
    return made


def parse(arguments: Sequence[str], prog: str = "mmfast fit") -> Config:
    """Read ``--config FILE --trainer.max_steps 300 …``; later options override earlier ones and the file."""
    made = parser(prog)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            values = made.parse_args(list(arguments))
            built = made.instantiate(values)
    except (ArgumentError, TypeError, ValueError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(explain(str(error), made)) from None
    return Config(built.data, built.model, built.trainer)


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Read a configuration file, with overrides as on the command line: ``["--trainer.max_steps=20"]``."""
    return parse(["--config", str(path), *overrides])


def explain(message: str, made: ArgumentParser) -> str:
    """Turn jsonargparse's answer into one line, with the nearest known key where a key is unknown."""
    line = " ".join(message.split())
    option = re.search(r"[Uu]nrecognized arguments: --([\w.]+)", line)
    group = re.search(r"Group '([\w.]+)' does not accept option '(\w+)'", line)
    inner = re.findall(r"Option '([\w.]+)' is not accepted", line)
    within = re.search(r'key "([\w.]+)"', line)
    if group:
        return unknown(f"{group[1]}.{group[2]}", made)
    if inner:
        return unknown(f"{within[1]}: …{inner[-1]}" if within else inner[-1], made)
    if option:
        return unknown(option[1], made)
    return line


def unknown(key: str, made: ArgumentParser) -> str:
    """Say that there is no such key, and which one may have been meant."""
    known = [action.dest for action in made._actions if "." in action.dest]
    near = difflib.get_close_matches(key, known, 1)
    return f"unknown configuration key '{key}'" + (f"; did you mean '{near[0]}'?" if near else "")
