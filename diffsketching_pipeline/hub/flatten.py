# SPDX-License-Identifier: Apache-2.0
"""Joins modules of this package into one file that needs nothing of it: the code that travels with a checkpoint."""

import ast
import importlib
import textwrap
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from diffsketching_pipeline import __all__ as _PUBLIC


_PACKAGE = __name__.split(".")[0]
# A file that stands for the package has no use for old names, nor for what registers the installed package with diffusers.
_LEFT_OUT = ("deprecation", "registry")
# What stays in the package alone, imported where it is needed: one file asks there for the package, to do this.
_OPTIONAL = {
    "images.vector_sketch": "read drawings as vectors",
    "pipeline_loading": "load and save pipelines with checks",
}
_LINE_LENGTH = 119
_LICENSE = """\
# Copyright 2026 The DiffSketching Pipeline Authors.
# SPDX-License-Identifier: Apache-2.0
# http://www.apache.org/licenses/LICENSE-2.0
"""


@dataclass
class _Statement:
    """One at the top of a module, with its lines of it: the gap and the comments above are its own."""

    node: ast.stmt
    lines: list[str | None]
    start: int  # of `lines`, counted from 1


@dataclass
class _Flattened:
    imports: dict[str, tuple[str, str | None]] = field(default_factory=dict)  # bound name -> (module, name in it)
    definitions: dict[str, ast.stmt] = field(default_factory=dict)
    parts: dict[str, list[_Statement]] = field(default_factory=dict)  # those of each module


def flatten_modules(names: Iterable[str], description: str) -> str:
    """
    Return the source code of modules of this package, and of what they use of the modules that they import, as one file.

    Docstrings and comments are kept where users read them: in the classes that are public names of the package, and in their
    bases.

    Args:
        names: module names without the package's, e.g. `"pipeline_diffsketching"` or `"images.reading"`.
        description: the file's docstring.

    Raises:
        ValueError: two modules give one name to different things, or a module uses what cannot be left out.
    """
    flattened, names = _Flattened(), list(names)
    for name in names:
        _add_module(flattened, name)
    used, documented = _find_used_names(flattened, names), _find_documented(flattened)
    parts = []
    for statements in flattened.parts.values():
        lines = [
            line
            for statement in statements
            if used.issuperset(_defined_names(statement.node))
            for line in _write_statement(statement, documented)
        ]
        parts.append("\n".join(lines).strip())
    docstring = "\n".join(textwrap.wrap(description, _LINE_LENGTH))
    imports = {bound: origin for bound, origin in flattened.imports.items() if bound.split(".")[0] in used}
    body = "\n\n\n".join(filter(None, parts))
    return f'{_LICENSE}"""{docstring}"""\n\n{_import_block(imports)}\n\n\n{body}\n'


def _read(name: str) -> str:
    return Path(__file__).parents[1].joinpath(*name.split(".")).with_suffix(".py").read_text(encoding="utf-8")


def _internal(node: ast.AST) -> str | None:
    """The module of this package that a statement imports from, if it does."""
    if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == _PACKAGE:
        return (node.module or "").removeprefix(f"{_PACKAGE}.")
    return None


def _add_module(flattened: _Flattened, name: str) -> None:
    """Adds what a module defines, after what the modules it imports define."""
    if name in flattened.parts:
        return
    flattened.parts[name] = []
    source = _read(name)
    left_out: set[str] = set()
    kept: list[_Statement] = []
    end = 0
    for node in ast.parse(source).body:
        start, end = end + 1, node.end_lineno or node.lineno
        module = _internal(node)
        if module in _LEFT_OUT:
            left_out |= {alias.name for alias in node.names}  # type: ignore[attr-defined]
        elif module is not None:
            if any(alias.asname for alias in node.names):  # type: ignore[attr-defined]
                raise ValueError(f"`{name}` renames what it imports from `{module}`, which one file cannot.")
            _add_module(flattened, module)
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            _add_imports(flattened, node, name)
        elif not (_is_docstring(node) or _is_for_types(node) or _calls(node, left_out)):
            lines: list[str | None] = [*source.splitlines()[start - 1 : end]]
            _drop_decorators(node, left_out, lines, start)
            if not _is_known(flattened, node, name):
                kept.append(_Statement(node, lines, start))
    for child in (child for statement in kept for child in ast.walk(statement.node)):
        if isinstance(child, ast.Name) and child.id in left_out:
            raise ValueError(f"`{name}` uses `{child.id}`, which one file cannot have.")
        if _internal(child) not in (None, *_OPTIONAL):
            raise ValueError(f"`{name}` imports `{_internal(child)}` where it is needed, which one file cannot.")
    # After those of the modules that it imports.
    del flattened.parts[name]
    flattened.parts[name] = kept


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


def _is_docstring(node: ast.stmt) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)


def _is_for_types(node: ast.stmt) -> bool:
    """Return whether a statement is there for a type checker alone."""
    return isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING" and not node.orelse


def _calls(node: ast.stmt, names: set[str]) -> bool:
    if not isinstance(node, (ast.Expr, ast.Assign)) or not isinstance(node.value, ast.Call):
        return False
    return isinstance(node.value.func, ast.Name) and node.value.func.id in names


def _drop_decorators(node: ast.stmt, names: set[str], lines: list[str | None], start: int) -> None:
    """Remove decorators that are calls of `names`, which stand on lines of their own, from a statement and its `lines`."""
    for child in ast.walk(node):
        if isinstance(child, ast.FunctionDef):
            for decorator in child.decorator_list[:]:
                if _calls(ast.Expr(decorator), names):
                    child.decorator_list.remove(decorator)
                    lines[decorator.lineno - start] = None


def _defined_names(node: ast.stmt) -> list[str]:
    if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
        return [node.name]
    targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
    return [name.id for target in targets if target for name in ast.walk(target) if isinstance(name, ast.Name)]


def _is_known(flattened: _Flattened, node: ast.stmt, where: str) -> bool:
    """Return whether a module before had the same statement, such as the one that makes the logger."""
    known = False
    for name in _defined_names(node):
        if name in flattened.imports:
            raise ValueError(f"`{where}` defines `{name}`, which a module before it imports.")
        known = name in flattened.definitions
        if ast.dump(flattened.definitions.setdefault(name, node)) != ast.dump(node):
            raise ValueError(f"`{where}` defines another `{name}` than the modules before it.")
    return known


def _find_used_names(flattened: _Flattened, names: Iterable[str]) -> set[str]:
    """All names that are met on the way from what the modules `names` define, and from what is no definition."""
    used: set[str] = set()
    waiting = []
    for module, statements in flattened.parts.items():
        waiting += [s.node for s in statements if module in names or not _defined_names(s.node)]
    while waiting:
        node = waiting.pop()
        met = {child.id for child in ast.walk(node) if isinstance(child, ast.Name)}.union(_defined_names(node))
        # An annotation may be in quotes.
        met |= {str(child.value) for child in ast.walk(node) if isinstance(child, ast.Constant)}
        waiting += [flattened.definitions[name] for name in met - used if name in flattened.definitions]
        used |= met
    return used


def _find_documented(flattened: _Flattened) -> set[str]:
    """The public classes, and their bases, which stand before them."""
    documented = set(_PUBLIC)
    for node in reversed(flattened.definitions.values()):
        if isinstance(node, ast.ClassDef) and node.name in documented:
            documented |= {base.id for base in node.bases if isinstance(base, ast.Name)}
    return documented


def _write_statement(statement: _Statement, documented: set[str]) -> list[str]:
    """Its lines, without docstrings and comments that no user reads, and with what to say where the package is needed."""
    lines: list[str | None] = list(statement.lines)
    if not documented.intersection(_defined_names(statement.node)):
        # Whoever wants to know why a part is as it is reads the package, which has the same functions by the same names.
        lines = [None if line and line.lstrip().startswith("#") else line for line in statement.lines]
    for child in ast.walk(statement.node):
        if isinstance(child, (ast.FunctionDef, ast.ClassDef)) and len(child.body) > 1 and _is_docstring(child.body[0]):
            is_private = child.name.startswith("_") and child.name != "__call__"
            if is_private or not documented.intersection(_defined_names(statement.node)):
                # With the gap below.
                for number in range(child.body[0].lineno, child.body[1].lineno):
                    lines[number - statement.start] = None
        elif isinstance(child, ast.stmt) and _is_for_types(child):
            first, last = child.lineno - statement.start, (child.end_lineno or child.lineno) - statement.start
            lines[first : last + 1] = [None] * (last + 1 - first)
        elif isinstance(child, ast.ImportFrom) and (module := _internal(child)):
            indent = child.col_offset * " "
            first, last = child.lineno - statement.start, (child.end_lineno or child.lineno) - statement.start
            # On one line: diffusers warns of packages that lines of a file begin to import from and that are not there.
            lines[first] = f"{indent}try: {str(statement.lines[first]).lstrip()}"
            lines[last] = (
                f"{lines[last]}\n{indent}except ImportError as error:\n"
                f'{indent}    raise ImportError("Install {_PACKAGE} to {_OPTIONAL[module]}.") from error'
            )
    return [line for line in lines if line is not None]


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
            listed = textwrap.fill(
                ", ".join(sorted(names)), _LINE_LENGTH, initial_indent="    ", subsequent_indent="    "
            )
            line = f"from {module} import (\n{listed}\n)"
        lines.append(line)
    return "\n".join(lines)
