# SPDX-License-Identifier: Apache-2.0
"""The command line of every script: fields of a dataclass as arguments, one parser, one way to say what is wrong."""

import argparse
import dataclasses
import difflib
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar, cast

import yaml
from transformers import HfArgumentParser

from diffsketching_pipeline.messages import brief


ArgumentsT = TypeVar("ArgumentsT")


def argument(default: Any, help: str) -> Any:
    """Return a dataclass field with a help text; lists are copied for each instance."""
    if isinstance(default, list):
        return dataclasses.field(default_factory=lambda: list(default), metadata={"help": help})
    return dataclasses.field(default=default, metadata={"help": help})


def required(help: str) -> Any:
    """Return a dataclass field without a default, with a help text."""
    return dataclasses.field(metadata={"help": help})


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Shows defaults and leaves the description's lines alone."""


def parse_arguments(
    arguments_class: type[ArgumentsT],
    description: str | None,
    words: Sequence[str] | None = None,
    takes_config: bool = False,
    program: str | None = None,
) -> ArgumentsT:
    """
    Read a command line into an instance of a dataclass.

    Args:
        arguments_class: dataclass that lists the arguments.
        description: text of `--help`.
        words: the command line without the program, `sys.argv[1:]` when left out.
        takes_config: `[CONFIG.yaml | --config CONFIG.yaml]` may stand before the arguments, which win over the file.
        program: what `--help` calls it, the name of the script when left out.

    Raises:
        ValueError: an argument that does not exist (with the closest ones that do), or a config that is no mapping.
    """
    remaining = list(sys.argv[1:] if words is None else words)
    usage = "%(prog)s [CONFIG.yaml] [--ARGUMENT VALUE ...]" if takes_config else None
    parser = HfArgumentParser(
        cast(Any, arguments_class),
        prog=program,
        description=description,
        usage=usage,
        formatter_class=HelpFormatter,
        allow_abbrev=False,
    )
    names = [f.name for f in dataclasses.fields(cast(Any, arguments_class))]
    from_file: list[str] = []
    if takes_config:
        parser.add_argument("--config", help="YAML file of arguments; it may also be given first, without `--config`")
        config = _take_config(remaining)
        from_file = _config_to_words(config, names) if config is not None else []
    arguments, *_, unknown = parser.parse_args_into_dataclasses(
        from_file + remaining, return_remaining_strings=True, look_for_args_file=False
    )
    if unknown:
        word = unknown[0].split("=")[0]
        # A config has no dashes, and its errors are those of the command line.
        raise ValueError(_unknown_argument(word.lstrip("-") if takes_config else word, names, "the command line"))
    return arguments


def _take_config(words: list[str]) -> str | None:
    """Take the config's path out of a command line, which may have it first or as `--config`."""
    config = words.pop(0) if words and not words[0].startswith("-") else None
    if "--config" in words:
        position = words.index("--config")
        config = words[position + 1] if len(words) > position + 1 else ""
        del words[position : position + 2]
    return config


def _unknown_argument(name: str, known: Sequence[str], where: str) -> str:
    close = difflib.get_close_matches(name.lstrip("-").replace("-", "_"), known)
    hint = f"did you mean {' or '.join(f'`{c}`' for c in close)}?" if close else "`--help` lists the arguments."
    return f"`{name}` on {where} is not an argument of this script: {hint}"


def _config_to_words(path: str, names: Sequence[str]) -> list[str]:
    """Turn a YAML mapping into command-line words, so that both go through one conversion and one set of checks."""
    if not os.path.isfile(path):
        raise ValueError(f"`config` must be a YAML file, but {path!r} is not a file.")
    with open(path, encoding="utf-8") as file:
        config = yaml.safe_load(file) or {}
    if not isinstance(config, dict):
        raise ValueError(f"`config` must hold `name: value` lines, but {path!r} holds a {type(config).__name__}.")
    words: list[str] = []
    for name, value in config.items():
        if name not in names:
            raise ValueError(_unknown_argument(str(name), names, path))
        if isinstance(value, (list, tuple)):
            words += [f"--{name}", *map(str, value)]
        elif value is not None:
            words.append(f"--{name}={value}")
    return words


@contextmanager
def user_errors(script: str) -> Iterator[None]:
    """Turn what is wrong with the input, a `ValueError`, into one line on stderr and exit code 2. `script` is its `__file__` or name."""
    try:
        yield
    except ValueError as error:
        print(f"{Path(script).name}: error: {brief(error)}", file=sys.stderr)
        raise SystemExit(2) from None
