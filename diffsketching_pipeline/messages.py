# SPDX-License-Identifier: Apache-2.0
"""The form of what a message repeats of a file or an argument: one short line, and nothing that a terminal acts upon."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


# Control characters, what turns the direction of text, and halves of surrogate pairs, which no terminal can print.
CONTROL_CHARACTERS = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
_MAX_LENGTH = 1000


def brief(text: Any, length: int = _MAX_LENGTH) -> str:
    """Return a text on one line, its control characters escaped, and its middle left out where it has more than `length`."""
    text = str(text)
    if len(text) > length:
        text = f"{text[: length // 2]} ... {text[-(length // 2) :]}"
    text = " ".join(line.strip() for line in text.splitlines())
    return CONTROL_CHARACTERS.sub(lambda match: match[0].encode("unicode_escape").decode(), text)


@contextmanager
def brief_errors() -> Iterator[None]:
    """Shorten, by [`brief`], what a `ValueError` or an `OSError` says that repeats too much of a file."""
    try:
        yield
    except (ValueError, OSError) as error:
        message = str(error)
        if len(message) <= _MAX_LENGTH and not CONTROL_CHARACTERS.search(message.replace("\n", "")):
            raise
        raise (ValueError if isinstance(error, ValueError) else OSError)(brief(message)) from error
