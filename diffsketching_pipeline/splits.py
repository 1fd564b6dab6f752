# SPDX-License-Identifier: Apache-2.0
"""Who trains, who is chosen by and who is reported on: photos and drawings, told apart by the hash of their names."""

import hashlib
import unicodedata


VALIDATION_PERCENT = 8


def normalize_name(name: str) -> str:
    """Return the name of a file or class as NFC: macOS writes the same name with its accents apart."""
    return unicodedata.normalize("NFC", name)


def in_first_half(name: str) -> bool:
    """
    Split photos or drawings in two: the parity of the first eight hexadecimal digits of the SHA-256 of a file's stem.

    The low digits are left alone because the split into train, validation and test is made with them.
    """
    return int(hashlib.sha256(normalize_name(name).encode()).hexdigest()[:8], 16) % 2 == 0


def in_validation(stem: str) -> bool:
    """Whether a photo validates: 8 of 100, by the SHA-256 of its name."""
    return int(hashlib.sha256(normalize_name(stem).encode()).hexdigest(), 16) % 100 < VALIDATION_PERCENT
