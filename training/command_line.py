# Copyright 2026 The DiffSketching Pipeline Authors. All rights reserved.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""What the scripts around the evaluation share of their command line; those that train have `trainer.parse_args`."""

import argparse
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar, cast

from transformers import HfArgumentParser


ArgumentsT = TypeVar("ArgumentsT")


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Shows defaults and leaves the description's lines alone."""


def parse_arguments(
    arguments_class: type[ArgumentsT], description: str | None, words: Sequence[str] | None = None
) -> ArgumentsT:
    """The command line (or `words`) as an instance of a dataclass; `ValueError` for an argument that does not exist."""
    parser = HfArgumentParser(
        cast(Any, arguments_class), description=description, formatter_class=HelpFormatter, allow_abbrev=False
    )
    (arguments,) = parser.parse_args_into_dataclasses(None if words is None else list(words), look_for_args_file=False)
    return arguments


@contextmanager
def user_errors(script: str) -> Iterator[None]:
    """What is wrong with the input, a `ValueError`, becomes one line on stderr and exit code 2. `script` is its `__file__`."""
    try:
        yield
    except ValueError as error:
        print(f"{Path(script).name}: error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
