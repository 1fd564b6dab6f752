# SPDX-License-Identifier: Apache-2.0
"""Tests of which part of the package may import which."""

import ast
import re
from graphlib import TopologicalSorter

import pytest
from testing_utils import ROOT


PACKAGE = "diffsketching_pipeline"
SCRIPTS = {path.stem for path in (ROOT / "training").glob("*.py")}


def find_imports(path, modules=frozenset()):
    """The modules that a file names in its import statements, wherever they stand; of a package's names, those that are modules."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            yield from names & set(modules) or {str(node.module)}


def read_arrows():
    """`{module: modules of ours that it imports}`, of the package without its lazy head, and of the scripts."""
    paths = {path: ".".join(path.relative_to(ROOT).with_suffix("").parts) for path in (ROOT / PACKAGE).rglob("*.py")}
    names = {
        path: name.removesuffix(".__init__")
        for path, name in paths.items()
        if path.parent.name != PACKAGE or path.stem != "__init__"
    }
    names |= {path: path.stem for path in (ROOT / "training").glob("*.py")}
    modules = set(names.values())
    return {name: set(find_imports(path, modules)) & modules for path, name in names.items()}


ARROWS = read_arrows()
FLAT_OR_IMAGES = rf"{PACKAGE}\.(\w+|images(\..+)?)"
WINGS = rf"{PACKAGE}\.(hub|converters|cli|demo|evaluation|training)(\..+)?"
A_SCRIPT = "|".join(sorted(SCRIPTS))


@pytest.mark.parametrize(
    "source, target",
    [
        (rf"(?!{WINGS}$){FLAT_OR_IMAGES}", WINGS),
        (rf"{PACKAGE}\.(denoising|schedulers|conditioning|losses|guidance)", rf"{PACKAGE}\.pipeline_.+"),
        (rf"{PACKAGE}\.images\..+", rf"{PACKAGE}\.(modeling|pipeline)_.+"),
        (rf"{PACKAGE}\.demo\..+", rf"{PACKAGE}\.cli(\..+)?"),
        (rf"{PACKAGE}\.training\..+", rf"{PACKAGE}\.evaluation(\..+)?"),
        (rf"{PACKAGE}\.evaluation\..+", rf"{PACKAGE}\.training(\..+)?"),
        (rf"{PACKAGE}\..+|{A_SCRIPT}", A_SCRIPT),
    ],
)
def test_arrows_that_are_never_drawn(source, target):
    drawn = {
        (a, b)
        for a, imported in ARROWS.items()
        for b in imported
        if re.fullmatch(source, a) and re.fullmatch(target, b)
    }
    assert not drawn
    assert any(re.fullmatch(source, name) for name in ARROWS) and any(re.fullmatch(target, name) for name in ARROWS)


def test_no_circle():
    list(TopologicalSorter(ARROWS).static_order())
