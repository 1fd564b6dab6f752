# SPDX-License-Identifier: Apache-2.0
"""Old spellings of public names, which are accepted for one version with a `FutureWarning` that gives the new one."""

import functools
import importlib
import warnings
from collections.abc import Callable
from typing import Any, TypeVar


_Function = TypeVar("_Function", bound=Callable[..., Any])


def warn_renamed(old: str, new: str, stacklevel: int = 3) -> None:
    """Warn that `old` is written `new` now; `stacklevel` is that of `warnings.warn`, by default the caller's caller."""
    warnings.warn(f"`{old}` is now `{new}`; the old name goes with the next version.", FutureWarning, stacklevel)


def renamed_arguments(**names: str) -> Callable[[_Function], _Function]:
    """
    Return a decorator for a function whose arguments were renamed, given as `old="new"`.

    An export of a checkpoint leaves it out: nobody has called its code by the old names.
    """

    def decorate(function: _Function) -> _Function:
        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            for old in names.keys() & kwargs.keys():
                warn_renamed(old, names[old])
                if names[old] in kwargs:
                    raise ValueError(f"`{old}` is the old name of `{names[old]}`: give one of them.")
                kwargs[names[old]] = kwargs.pop(old)
            return function(*args, **kwargs)

        return call  # type: ignore[return-value]

    return decorate


def renamed_attributes(module: str, **names: str) -> Callable[[str], Any]:
    """
    Return the `__getattr__` of a module with renamed functions and classes, given as `old="new"`.

    Args:
        module: the name of the one that has them now.
    """

    def getattr_of_module(name: str) -> Any:
        if name not in names:
            raise AttributeError(f"module {module!r} has no attribute {name!r}")
        warn_renamed(name, names[name])
        return getattr(importlib.import_module(module), names[name])

    return getattr_of_module


def normalize_option(name: str) -> str:
    """Return the name of an option of the command line, without its dashes, as it is spelled now."""
    if "colour" in name:
        warn_renamed(f"--{name}", f"--{name.replace('colour', 'color')}")
    return name.replace("colour", "color")
