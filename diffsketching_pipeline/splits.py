# SPDX-License-Identifier: Apache-2.0
"""Splits of photos and drawings for training, choosing and reporting, by the hash of their names."""

import hashlib
import unicodedata
from collections.abc import Sequence


VALIDATION_PERCENT = 8


def normalize_name(name: str) -> str:
    """Return the name of a file or class as NFC: macOS writes the same name with its accents apart."""
    return unicodedata.normalize("NFC", name)


def in_first_half(name: str) -> bool:
    """
    Split photos or drawings in two: the parity of the first eight hexadecimal digits of the SHA-256 of a file's stem.

    The low digits are left alone because the split into train, validation and test is made with them.
    """
    return int(_digest(name)[:8], 16) % 2 == 0


def in_validation(stem: str) -> bool:
    """Return whether a photo is used for validation: 8 of 100 are, by the SHA-256 of its name."""
    return int(_digest(stem), 16) % 100 < VALIDATION_PERCENT


def validation_names(names: Sequence[str]) -> set[str]:
    """Return which of these photos validate; at least one does, and one does not, if there are two or more."""
    chosen = {name for name in names if in_validation(name)}
    if not chosen or len(chosen) == len(set(names)):
        chosen = {min(names, key=_digest)}
    return chosen


def first_by_hash(names: Sequence[str], count: int | None) -> list[int]:
    """Indices, in order, of `count` of these names, chosen by their hash; of all where it is `None` or larger."""
    ranked = sorted(range(len(names)), key=lambda index: _digest(names[index]))
    return sorted(ranked[:count])


def _digest(name: str) -> str:
    return hashlib.sha256(normalize_name(name).encode()).hexdigest()
