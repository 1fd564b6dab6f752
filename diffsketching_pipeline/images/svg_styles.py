# SPDX-License-Identifier: Apache-2.0
"""Style sheets and variables of an SVG file, resolved into the attributes that every renderer reads."""

import re
from collections.abc import Iterator
from xml.etree import ElementTree

import cssselect2
import tinycss2
from tinycss2 import ast


# Beyond these, style sheets are left to the renderer, which has a process with limits.
_MAX_SHEET = 65_536
_MAX_MATCHES = 1_000_000
# Characters of a value, which variables may blow up, and how often one stands for another.
_MAX_VALUE = 2_000
_MAX_VARIABLES = 32
_GEOMETRY = {"x", "y", "width", "height", "r", "rx", "ry", "cx", "cy"}
_DATA = re.compile(r"url\(\s*['\"]?data:[^)]*\)", re.IGNORECASE)
_VARIABLE = re.compile(r"var\(\s*(--[\w-]+)\s*(?:,((?:[^()]|\([^()]*\))*))?\)")
_LIGHT_DARK = re.compile(r"light-dark\(((?:[^(),]|\([^()]*\))*),(?:[^()]|\([^()]*\))*\)", re.IGNORECASE)
# What only a pass over the elements can resolve, in an attribute.
_UNRESOLVED = re.compile(r"var\(|light-dark\(|\bunset\b|\brevert\b", re.IGNORECASE)
_NOT_READ = re.compile(rf"(?:^|;)\s*(translate|rotate|scale|d|{'|'.join(_GEOMETRY)})\s*:")

Declaration = tuple[str, str, bool]


def apply_styles(root: ElementTree.Element) -> list[str]:
    """
    Write what style sheets say of each element into its `style` attribute, with variables replaced, and take the sheets away.
    Geometry and transforms that renderers do not read in a style become attributes of their own.

    Args:
        root: elements without namespaces; changed in place.

    Returns:
        `list[str]`: the names of what a browser may show and the elements do not say.

    Raises:
        ValueError: if a style sheet nests deeper than can be read.
    """
    text = _DATA.sub("url()", "\n".join(sheet.text or "" for sheet in root.iter("style")))
    if len(text) > _MAX_SHEET or not (text.strip() or _has_unresolved(root)):
        return []
    left_out: list[str] = []
    try:
        rules = list(_rules(tinycss2.parse_stylesheet(text, skip_comments=True, skip_whitespace=True), left_out))
        matcher, count = _matcher(rules)
        elements = list(root.iter())
        if count * len(elements) > _MAX_MATCHES:
            return []
        _resolve(root, matcher, left_out)
    except RecursionError as error:
        raise ValueError("its style sheet is too deeply nested: save it as plain SVG.") from error
    for element in elements:
        for sheet in element.findall("style"):
            element.remove(sheet)
    return left_out


def _has_unresolved(root: ElementTree.Element) -> bool:
    return any(
        _UNRESOLVED.search(value) or (name == "style" and _NOT_READ.search(value))
        for element in root.iter()
        for name, value in element.attrib.items()
    )


def _rules(nodes: list[ast.Node], left_out: list[str]) -> Iterator[ast.QualifiedRule]:
    """The rules that hold on a light screen, those within `@media` and its like too."""
    for node in nodes:
        if isinstance(node, ast.QualifiedRule):
            yield node
        elif isinstance(node, ast.AtRule):
            name, prelude = node.lower_at_keyword, tinycss2.serialize(node.prelude).lower()
            if name == "import":
                left_out.append("a style sheet outside of the file")
            holds = name == "layer" or (name == "supports" and not prelude.strip().startswith("not"))
            if node.content is not None and (holds or (name == "media" and _is_light_screen(prelude))):
                yield from _rules(
                    tinycss2.parse_rule_list(node.content, skip_comments=True, skip_whitespace=True), left_out
                )


def _is_light_screen(queries: str) -> bool:
    """Return whether a media query is one of a wide, light screen."""

    def holds(query: str) -> bool:
        is_not = query.startswith("not ")
        wrong = re.search(
            r"\bprint\b|\bspeech\b|scheme\s*:\s*dark|max-(device-)?width|forced-colors\s*:\s*active", query
        )
        return bool(wrong) == is_not

    return any(holds(query.strip()) for query in queries.split(","))


def _matcher(rules: list[ast.QualifiedRule]) -> tuple[cssselect2.Matcher, int]:
    """Return the matcher that finds the declarations for an element, and the number of selectors."""
    matcher, count = cssselect2.Matcher(), 0
    for rule in rules:
        try:
            selectors = cssselect2.compile_selector_list(rule.prelude)
        except cssselect2.SelectorError:
            # As a browser does with a rule that it does not understand.
            continue
        content = tinycss2.parse_blocks_contents(rule.content, skip_comments=True, skip_whitespace=True)
        declarations = [_declaration(node) for node in content if isinstance(node, ast.Declaration)]
        for selector in selectors:
            matcher.add_selector(selector, declarations)
            count += 1
    return matcher, count


def _declaration(node: ast.Declaration) -> Declaration:
    return (
        node.name if node.name.startswith("--") else node.lower_name,
        tinycss2.serialize(node.value).strip(),
        node.important,
    )


def _inline(style: str) -> list[Declaration]:
    if "(" in style and ("data:" in style or "path(" in style):
        content = tinycss2.parse_blocks_contents(style, skip_comments=True, skip_whitespace=True)
        return [_declaration(node) for node in content if isinstance(node, ast.Declaration)]
    parts = (part.partition(":") for part in re.sub(r"/\*.*?\*/", "", style).split(";"))
    cleaned = ((name.strip(), value.partition("!")) for name, colon, value in parts if colon)
    return [(n if n.startswith("--") else n.lower(), value[0].strip(), bool(value[1])) for n, value in cleaned]


def _resolve(root: ElementTree.Element, matcher: cssselect2.Matcher, left_out: list[str]) -> None:
    variables: dict[ElementTree.Element | None, dict[str, str]] = {None: {}}
    for wrapper in cssselect2.ElementWrapper.from_xml_root(root).iter_subtree():
        element = wrapper.etree_element
        # Sorted from the weakest to the strongest, and each later one wins.
        matched = [d for _, _, pseudo, found in matcher.match(wrapper) if pseudo is None for d in found]
        declarations = matched + _inline(element.attrib.pop("style", ""))
        style: dict[str, str] = {}
        for is_important in (False, True):
            style |= {name: value for name, value, important in declarations if important is is_important}
        parent = wrapper.parent.etree_element if wrapper.parent is not None else None
        own = variables[parent] | {name: value for name, value in style.items() if name.startswith("--")}
        variables[element] = own
        for name, value in element.attrib.items():
            if "light-dark(" in value or "var(" in value:
                element.attrib[name] = _value(value, own) or ""
        kept: dict[str, str] = {}
        for name, value in style.items():
            resolved = None if name.startswith("--") else _value(value, own)
            if resolved is None or resolved.lower() in ("unset", "revert", "revert-layer"):
                element.attrib.pop(name, None)
            elif name in _GEOMETRY and element.tag != "text":
                element.attrib[name] = resolved
            elif name == "d":
                path = re.fullmatch(r"path\(\s*['\"](.*)['\"]\s*\)", resolved, re.DOTALL)
                element.attrib["d"] = path[1] if path else element.attrib.get("d", "")
            else:
                kept[name] = resolved
            if name == "clip-path" and re.match(
                r"(inset|circle|ellipse|polygon|path|rect|xywh|shape)\(", resolved or ""
            ):
                left_out.append("a clip path of CSS")
        _compose_transform(element, kept)
        if kept:
            element.attrib["style"] = ";".join(f"{name}:{value}" for name, value in kept.items())


def _value(text: str, variables: dict[str, str]) -> str | None:
    """A value without variables; `None` where one has no value."""
    for _ in range(_MAX_VARIABLES):
        found = _VARIABLE.search(text)
        if found is None:
            return _LIGHT_DARK.sub(r"\1", text).strip()
        replacement = variables.get(found[1], found[2])
        if replacement is None:
            return None
        text = text[: found.start()] + replacement.strip() + text[found.end() :]
        if len(text) > _MAX_VALUE:
            return None
    return None


def _compose_transform(element: ElementTree.Element, style: dict[str, str]) -> None:
    """The properties `translate`, `rotate` and `scale` as the functions that a transform has before its own."""
    parts = [(name, style.pop(name)) for name in ("translate", "rotate", "scale") if name in style]
    functions = [f"{name}({re.sub(r'(?<=[0-9.])(px|deg)', '', value)})" for name, value in parts if value != "none"]
    if functions:
        style["transform"] = " ".join([*functions, style.get("transform", element.get("transform", ""))]).strip()
