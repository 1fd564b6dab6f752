# SPDX-License-Identifier: Apache-2.0
"""Joins modules of this package into one file that needs nothing of it: the code that travels with a checkpoint."""

import ast
import importlib
import textwrap
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path


_PACKAGE = __name__.split(".")[0]
# It registers the installed package with diffusers, so a file that stands for the package has no use for it.
_LEFT_OUT = ("registry",)
_LINE_LENGTH = 119
_LICENCE = """\
# Copyright 2026 The DiffSketching Pipeline Authors.
# SPDX-License-Identifier: Apache-2.0
# http://www.apache.org/licenses/LICENSE-2.0
"""


@dataclass
class _Flattened:
    imports: dict[str, tuple[str, str | None]] = field(default_factory=dict)  # bound name -> (module, name in it)
    definitions: dict[str, str] = field(default_factory=dict)  # name -> its syntax tree, to compare
    parts: list[str] = field(default_factory=list)
    done: set[str] = field(default_factory=set)


def flatten_modules(names: Iterable[str], description: str) -> str:
    """
    Source code of modules of this package and of those that they import, as one file.

    Args:
        names: module names without the package's, e.g. `"pipeline_diffsketching"` or `"images.reading"`.
        description: the file's docstring.

    Raises:
        ValueError: two modules give one name to different things, or a module uses what cannot be left out.
    """
    flattened = _Flattened()
    for name in names:
        _add_module(flattened, name)
    docstring = "\n".join(textwrap.wrap(description, _LINE_LENGTH))
    body = "\n\n\n".join(flattened.parts)
    return f'{_LICENCE}"""{docstring}"""\n\n{_import_block(flattened.imports)}\n\n\n{body}\n'


def _read(name: str) -> str:
    return Path(__file__).parents[1].joinpath(*name.split(".")).with_suffix(".py").read_text(encoding="utf-8")


def _internal(node: ast.stmt) -> str | None:
    """The module of this package that a statement imports from, if it does."""
    if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == _PACKAGE:
        return (node.module or "").removeprefix(f"{_PACKAGE}.")
    return None


def _add_module(flattened: _Flattened, name: str) -> None:
    """Appends what a module defines, after what the modules it imports define."""
    if name in flattened.done:
        return
    flattened.done.add(name)
    source = _read(name)
    tree = ast.parse(source)
    left_out: set[str] = set()
    dropped: list[ast.stmt] = []
    for position, node in enumerate(tree.body):
        module = _internal(node)
        if module in _LEFT_OUT:
            left_out |= {alias.name for alias in node.names}  # type: ignore[attr-defined]
        elif module is not None:
            if any(alias.asname for alias in node.names):  # type: ignore[attr-defined]
                raise ValueError(f"`{name}` renames what it imports from `{module}`, which one file cannot.")
            _add_module(flattened, module)
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            _add_imports(flattened, node, name)
        elif not (_calls(node, left_out) or (position == 0 and isinstance(node, ast.Expr))):
            if _is_known(flattened, node, name):
                dropped.append(node)
            continue
        dropped.append(node)
    kept = [node for node in tree.body if node not in dropped]
    used = {child.id for node in kept for child in ast.walk(node) if isinstance(child, ast.Name)}
    if used & left_out:
        raise ValueError(f"`{name}` uses {sorted(used & left_out)}, which one file cannot have.")
    flattened.parts.append(_without(source, dropped))


def _add_imports(flattened: _Flattened, node: ast.Import | ast.ImportFrom, where: str) -> None:
    for alias in node.names:
        module, attribute = (node.module or "", alias.name) if isinstance(node, ast.ImportFrom) else (alias.name, None)
        bound = alias.asname or alias.name
        first = flattened.imports.setdefault(bound, (module, attribute))
        # One class may be imported from where it is defined and from its library.
        if first != (module, attribute) and _imported(*first) is not _imported(module, attribute):
            raise ValueError(f"`{where}` imports another `{bound}` than the modules before it.")
        if bound in flattened.definitions:
            raise ValueError(f"`{where}` imports `{bound}`, which a module before it defines.")


def _imported(module: str, attribute: str | None) -> object:
    if attribute is None:
        return importlib.import_module(module)
    try:
        return getattr(importlib.import_module(module), attribute)
    except AttributeError:
        return importlib.import_module(f"{module}.{attribute}")


def _calls(node: ast.stmt, names: set[str]) -> bool:
    if not isinstance(node, ast.Expr) or not isinstance(node.value, ast.Call):
        return False
    return isinstance(node.value.func, ast.Name) and node.value.func.id in names


def _defined_names(node: ast.stmt) -> list[str]:
    if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
        return [node.name]
    targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
    return [target.id for target in targets if isinstance(target, ast.Name)]


def _is_known(flattened: _Flattened, node: ast.stmt, where: str) -> bool:
    """Whether a module before had the same statement, such as the one that makes the logger."""
    known = False
    for name in _defined_names(node):
        if name in flattened.imports:
            raise ValueError(f"`{where}` defines `{name}`, which a module before it imports.")
        known = name in flattened.definitions
        if flattened.definitions.setdefault(name, ast.dump(node)) != ast.dump(node):
            raise ValueError(f"`{where}` defines another `{name}` than the modules before it.")
    return known


def _without(source: str, dropped: list[ast.stmt]) -> str:
    """The source without some statements, without the licence that one file has once, and without the gaps they leave."""
    lines = source.splitlines()
    for node in dropped:
        for number in range(node.lineno - 1, node.end_lineno or node.lineno):
            lines[number] = ""
    while lines and (not lines[0] or lines[0].startswith("#")):
        lines.pop(0)
    kept: list[str] = []
    for line in lines:
        if line or kept[-2:] != ["", ""]:
            kept.append(line)
    return "\n".join(kept).strip()


def _import_block(imports: dict[str, tuple[str, str | None]]) -> str:
    plain: set[str] = set()
    members: dict[str, list[str]] = {}
    for bound, (module, attribute) in imports.items():
        if attribute is None:
            plain.add(f"import {module}" if bound == module else f"import {module} as {bound}")
        else:
            members.setdefault(module, []).append(attribute if bound == attribute else f"{attribute} as {bound}")
    lines = sorted(plain)
    for module, names in sorted(members.items()):
        line = f"from {module} import {', '.join(sorted(names))}"
        if len(line) > _LINE_LENGTH:
            line = f"from {module} import (\n" + "".join(f"    {name},\n" for name in sorted(names)) + ")"
        lines.append(line)
    return "\n".join(lines)
