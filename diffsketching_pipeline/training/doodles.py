# SPDX-License-Identifier: Apache-2.0
"""Garments as people doodle them: few strokes, from memory, in other proportions than any photo.

A contour of a photo shows a cap lying on a table; a person who is asked for a hat draws a crown on a brim. So the sketch
encoder learns from both: `train_encoders.py --task sketch` mixes contours with the doodles of the classes known here.
Each doodle is a small program with random proportions and details; no human drawing was traced. The hand that draws it is
careless: lines miss each other or run on, are drawn twice or left out, and an outline is often one line without anything inside.
"""

from collections.abc import Callable, Sequence

import numpy as np
from PIL import Image, ImageDraw
from scipy import ndimage


Stroke = list[tuple[float, float]]
"""Points (x, y), y downwards, in any unit: a drawing is scaled to its page."""


def arc(start: tuple[float, float], middle: tuple[float, float], end: tuple[float, float]) -> Stroke:
    """The parabola through three points."""
    t = np.linspace(0, 1, 9)
    weights = np.stack([(1 - t) * (1 - 2 * t), 4 * t * (1 - t), t * (2 * t - 1)], axis=-1)
    return [(float(x), float(y)) for x, y in weights @ np.array([start, middle, end])]


def ellipse(x: float, y: float, width: float, height: float, first: float = 0.0, last: float = 2 * np.pi) -> Stroke:
    """An arc of an ellipse, angles clockwise from the right."""
    angles = np.linspace(first, last, 17)
    return [(float(x + width * np.cos(a)), float(y + height * np.sin(a))) for a in angles]


def mirrored(half: Stroke) -> Stroke:
    """A closed outline from its right half, listed from top to bottom."""
    return [*half, *[(-x, y) for x, y in reversed(half)]]


# ---- upper body -----------------------------------------------------------------------------------------------------


def _top(
    rng: np.random.Generator, sleeve: tuple[float, float], length: tuple[float, float] = (1.1, 3.2)
) -> list[Stroke]:
    """A garment with two sleeves, `sleeve` and `length` being ranges in half shoulder widths; neckline last."""
    neck, slope = rng.uniform(0.25, 0.5), rng.uniform(0.05, 0.35)
    reach, angle = rng.uniform(*sleeve), np.radians(rng.uniform(0, 82))
    along, cuff = np.array([np.cos(angle), np.sin(angle)]), rng.uniform(0.22, 0.5)
    tip = np.array([1.0, slope])
    outer = tip + reach * along
    inner = outer + cuff * np.array([-along[1], along[0]])
    waist = rng.uniform(0.6, 0.95)
    armpit = np.array([waist, slope + rng.uniform(0.35, 0.7)])
    if inner[0] < waist + 0.05:  # the sleeve hangs beside the body
        inner[0] = waist + 0.05
        outer[0] = max(outer[0], inner[0] + cuff)
    hem = (waist * rng.uniform(0.85, 1.25), slope + rng.uniform(*length))
    half = [(neck, 0.0), tuple(tip), tuple(outer), tuple(inner), tuple(armpit), hem]
    depth = rng.uniform(0.05, 0.45)
    pointed = rng.random() < 0.3
    neckline = [(-neck, 0.0), (0.0, depth), (neck, 0.0)] if pointed else arc((-neck, 0), (0, depth), (neck, 0))
    right = [(float(x), float(y)) for x, y in half]
    return [right, [(-x, y) for x, y in right], [(-hem[0], hem[1]), hem], neckline]


def _hem(strokes: list[Stroke]) -> tuple[float, float]:
    return strokes[2][1]


def _buttons(rng: np.random.Generator, top: float, bottom: float) -> list[Stroke]:
    count = int(rng.integers(2, 6))
    return [ellipse(0.0, y, 0.03, 0.03) for y in np.linspace(top + 0.1, bottom - 0.1, count)]


def _collar(rng: np.random.Generator, neck: float, depth: float) -> list[Stroke]:
    tip = rng.uniform(0.1, 0.3)
    right = [(neck, 0.0), (neck * 0.9, depth + tip), (0.0, depth)]
    return [right, [(-x, y) for x, y in right]]


def _another_neckline(rng: np.random.Generator, strokes: list[Stroke], turtleneck: float = 0.0) -> list[Stroke]:
    """Now and then the neckline is left open, has a border, is drawn as a straight line, or stands up."""
    *others, neckline = strokes
    neck = neckline[-1][0]
    kind = rng.choice(
        ["open", "border", "straight", "turtleneck", "same"], p=[0.1, 0.1, 0.1, turtleneck, 0.7 - turtleneck]
    )
    if kind == "open":
        return others
    if kind == "border":
        return [*strokes, [(x * 1.2, y + 0.1 * (y > 0)) for x, y in neckline]]
    if kind == "straight":
        return [*others, [(-neck, 0.0), (neck, 0.0)]]
    if kind == "turtleneck":
        height = rng.uniform(0.12, 0.35)
        return [*others, [(-neck, 0.0), (-neck, -height), (neck, -height), (neck, 0.0)]]
    return strokes


def _cuffs(rng: np.random.Generator, strokes: list[Stroke]) -> list[Stroke]:
    """A line across each sleeve near its end, and one above the hem."""
    (_, tip, outer, inner, armpit, hem), share = (np.array(strokes[0][i]) for i in range(6)), rng.uniform(0.08, 0.25)
    across = [tuple(outer + share * (tip - outer)), tuple(inner + share * (armpit - inner))]
    lines = [[(float(x), float(y)) for x, y in across]]
    lines.append([(-x, y) for x, y in lines[0]])
    if rng.random() < 0.5:
        y = float(hem[1] - 0.12)
        lines.append([(-float(hem[0]), y), (float(hem[0]), y)])
    return lines


def _print(rng: np.random.Generator, x: float, top: float, bottom: float) -> list[Stroke]:
    """Something on the front: stripes, a number of dashes, a heart of lines, a pocket."""
    kind = rng.integers(4)
    if kind == 0:
        return [[(-x, y), (x, y)] for y in np.linspace(top, bottom, int(rng.integers(2, 6)))]
    if kind == 1:
        ends = rng.uniform((-x, top), (x, bottom), (int(rng.integers(4, 12)), 2))
        return [[(a, b), (a + rng.normal(0, 0.05), b + 0.12)] for a, b in ends.tolist()]
    middle, size = (top + bottom) / 2, rng.uniform(0.1, 0.3)
    if kind == 2:
        return [ellipse(0.0, middle, size, size)]
    return [[(0.2, top), (0.2, top + size), (0.2 + size, top + size), (0.2 + size, top), (0.2, top)]]


def _plain_top(rng: np.random.Generator, sleeve: tuple[float, float], turtleneck: float) -> list[Stroke]:
    strokes = _top(rng, sleeve)
    details = _cuffs(rng, strokes) if rng.random() < 0.15 else []
    if rng.random() < 0.12:
        details += _print(rng, 0.45, 0.7, 0.85 * _hem(strokes)[1])
    return _another_neckline(rng, strokes, turtleneck) + details


def _t_shirt(rng: np.random.Generator) -> list[Stroke]:
    return _plain_top(rng, (0.25, 0.8), turtleneck=0.02)


def _longsleeve(rng: np.random.Generator) -> list[Stroke]:
    return _plain_top(rng, (0.9, 1.9), turtleneck=0.15)


def _front_opening(rng: np.random.Generator, strokes: list[Stroke], pairs: float = 0.3) -> list[Stroke]:
    """A line down the front, or two."""
    x, (_, bottom) = rng.uniform(0.03, 0.15), _hem(strokes)
    top = strokes[3][len(strokes[3]) // 2][1]
    if rng.random() < pairs:
        return [[(x, top), (x, bottom)], [(-x, top), (-x, bottom)]]
    return [[(0.0, top), (rng.uniform(-0.05, 0.05), bottom)]]


def _outwear(rng: np.random.Generator) -> list[Stroke]:
    strokes = _top(rng, (0.9, 1.7))
    strokes += _front_opening(rng, strokes)
    if rng.random() < 0.5:
        strokes += _collar(rng, strokes[3][-1][0], strokes[3][len(strokes[3]) // 2][1])
    if rng.random() < 0.4:
        y = rng.uniform(0.55, 0.75) * _hem(strokes)[1]
        strokes += [[(0.2, y), (0.5, y - 0.1)], [(-0.2, y), (-0.5, y - 0.1)]]
    return strokes


def _blazer(rng: np.random.Generator) -> list[Stroke]:
    strokes = _top(rng, (0.95, 1.6))
    neck, (_, bottom) = strokes[3][-1][0], _hem(strokes)
    meet = rng.uniform(0.45, 0.7) * bottom
    width = rng.uniform(0.1, 0.25)
    lapel = [(neck, 0.0), (neck + width, 0.4 * meet), (neck * 0.7 + width, 0.5 * meet), (0.0, meet)]
    strokes[3] = [(-neck, 0.0), (0.0, meet), (neck, 0.0)]
    strokes += [lapel, [(-x, y) for x, y in lapel], [(0.0, meet), (0.0, bottom)]]
    return strokes + (_buttons(rng, meet, bottom) if rng.random() < 0.6 else [])


def _polo(rng: np.random.Generator) -> list[Stroke]:
    strokes = _top(rng, (0.3, 0.75))
    neck, depth = strokes[3][-1][0], strokes[3][len(strokes[3]) // 2][1]
    end = depth + rng.uniform(0.2, 0.45)
    return [*strokes, *_collar(rng, neck, depth), [(0.0, depth), (0.0, end)]] + (
        _buttons(rng, depth, end) if rng.random() < 0.5 else []
    )


def _shirt(rng: np.random.Generator) -> list[Stroke]:
    strokes = _top(rng, (0.95, 1.7) if rng.random() < 0.7 else (0.35, 0.8))
    neck, depth = strokes[3][-1][0], strokes[3][len(strokes[3]) // 2][1]
    strokes += _collar(rng, neck, depth) + [[(0.0, depth), (0.0, _hem(strokes)[1])]]
    strokes += _buttons(rng, depth, _hem(strokes)[1]) if rng.random() < 0.7 else []
    if rng.random() < 0.3:
        strokes.append([(0.25, 0.6), (0.25, 0.85), (0.5, 0.85), (0.5, 0.6), (0.25, 0.6)])
    return strokes


def _hoodie(rng: np.random.Generator) -> list[Stroke]:
    strokes = _top(rng, (0.95, 1.7))
    neck, bottom = strokes[3][-1][0], _hem(strokes)[1]
    height = rng.uniform(0.35, 0.7)
    strokes.append(arc((-neck * 1.1, 0.05), (0.0, -height), (neck * 1.1, 0.05)))
    if rng.random() < 0.5:
        strokes.append(arc((-neck * 0.7, 0.05), (0.0, -height * 0.6), (neck * 0.7, 0.05)))
    if rng.random() < 0.6:
        low, wide = bottom * 0.92, rng.uniform(0.3, 0.5)
        strokes.append([(-wide, low), (-wide * 0.6, low * 0.75), (wide * 0.6, low * 0.75), (wide, low), (-wide, low)])
    if rng.random() < 0.4:
        strokes += [[(x, 0.15), (x * 1.2, 0.5)] for x in (-0.12, 0.12)]
    if rng.random() < 0.3:
        strokes += _front_opening(rng, strokes, pairs=0.0)
    return strokes


def _undershirt(rng: np.random.Generator) -> list[Stroke]:
    inner, strap, depth = rng.uniform(0.25, 0.45), rng.uniform(0.1, 0.3), rng.uniform(0.3, 0.7)
    arm, waist, length = rng.uniform(0.5, 0.85), rng.uniform(0.7, 0.95), rng.uniform(1.5, 2.3)
    right = [(inner, 0.0), (inner + strap, 0.0), (inner + strap, arm * 0.6), (waist, arm), (waist * 1.05, length)]
    neckline = arc((-inner, 0.0), (0.0, depth), (inner, 0.0))
    return [right, [(-x, y) for x, y in right], [(-right[-1][0], length), right[-1]], neckline]


def _bodysuit(rng: np.random.Generator) -> list[Stroke]:
    strokes = _top(rng, (0.25, 0.7) if rng.random() < 0.6 else (0.9, 1.4), (1.3, 1.7))
    x, y = _hem(strokes)
    crotch, drop = rng.uniform(0.12, 0.3), rng.uniform(0.2, 0.45)
    strokes[2] = arc((x, y), (0.55 * x, y + 0.3 * drop), (crotch, y + drop))
    return [*strokes, [(-a, b) for a, b in strokes[2]], [(-crotch, y + drop), (crotch, y + drop)]]


def _dress(rng: np.random.Generator) -> list[Stroke]:
    neck, strap = rng.uniform(0.2, 0.45), rng.uniform(0.1, 0.35)
    bust, waist, hem = rng.uniform(0.55, 0.75), rng.uniform(0.35, 0.6), rng.uniform(0.8, 1.6)
    high, length = rng.uniform(0.9, 1.3), rng.uniform(2.2, 3.4)
    right = [(neck, 0.0), (neck + strap, 0.05)]
    if rng.random() < 0.4:  # a short sleeve
        right += [(neck + strap + 0.4, 0.45), (neck + strap + 0.2, 0.6)]
    right += [(bust, 0.5), (waist, high), (hem, length)]
    strokes = [right, [(-x, y) for x, y in right], arc((-hem, length), (0, length + 0.15), (hem, length))]
    strokes.append(arc((-neck, 0.0), (0.0, rng.uniform(0.05, 0.5)), (neck, 0.0)))
    return strokes + ([[(-waist, high), (waist, high)]] if rng.random() < 0.5 else [])


# ---- lower body -----------------------------------------------------------------------------------------------------


def _legs(rng: np.random.Generator, length: tuple[float, float], rise: tuple[float, float]) -> list[Stroke]:
    """Two legs below a waist 2 wide; the crotch is a point or, as people often draw it, a bridge."""
    total, crotch = rng.uniform(*length), rng.uniform(*rise)
    outer, gap = rng.uniform(0.9, 1.5), rng.choice([0.0, rng.uniform(0.05, 0.45)])
    inner = rng.uniform(max(gap, 0.06), 0.55)
    hem = rng.uniform(-0.08, 0.08)
    right = [(1.0, 0.0), (outer, total), (min(inner, outer - 0.3), total + hem), (gap, crotch)]
    strokes = [mirrored(right)]
    if rng.random() < 0.93:
        strokes.append([(-1.0, 0.0), (1.0, 0.0)])
    if rng.random() < 0.3:
        strokes.append([(-1.0, 0.2), (1.0, 0.2)])
    if rng.random() < 0.2:
        strokes.append([(0.0, 0.1), (0.0, crotch)])
    return strokes + _leg_details(rng, right)


def _leg_details(rng: np.random.Generator, right: Stroke) -> list[Stroke]:
    """Pockets, turned-up legs, creases or side stripes: at most one kind, on both legs."""
    (waist, _), (outer, total), (inner, _), (_, crotch) = right
    kind = rng.choice(["pockets", "cuffs", "creases", "button", "none"], p=[0.12, 0.08, 0.06, 0.08, 0.66])
    if kind == "button":
        return [ellipse(0.0, 0.1, 0.05, 0.05)]
    if kind == "pockets":
        line = [(0.55 * waist, 0.12), (waist, 0.12 + 0.35 * crotch)]
    elif kind == "cuffs":
        y = rng.uniform(0.85, 0.93) * total
        line = [(inner, y), (outer, y)]
    else:
        line = [(0.6 * waist, 0.3 * crotch), ((inner + outer) / 2, 0.95 * total)]
    return [line, [(-x, y) for x, y in line]] if kind != "none" else []


def _pants(rng: np.random.Generator) -> list[Stroke]:
    return _legs(rng, (2.2, 4.2), (0.6, 1.5))


def _shorts(rng: np.random.Generator) -> list[Stroke]:
    return _legs(rng, (1.0, 1.75), (0.5, 0.95))


def _skirt(rng: np.random.Generator) -> list[Stroke]:
    hem, length = rng.uniform(0.9, 2.2), rng.uniform(1.0, 2.6)
    bend = length + rng.uniform(0.0, 0.3)
    strokes = [[(-1.0, 0.0), (1.0, 0.0), (hem, length)], [(-1.0, 0.0), (-hem, length)]]
    strokes.append(arc((-hem, length), (0.0, bend), (hem, length)))
    if rng.random() < 0.5:
        strokes.append([(-1.02, 0.18), (1.02, 0.18)])
    if rng.random() < 0.4:
        folds = rng.uniform(-0.7, 0.7, int(rng.integers(2, 6)))
        strokes += [[(x, 0.3), (x * hem, length * 0.95)] for x in folds]
    return strokes


# ---- shoes and hats -------------------------------------------------------------------------------------------------


def _tube_shoe(rng: np.random.Generator) -> list[Stroke]:
    """A leg and a foot of about one thickness, a slipper where the leg is short."""
    length, foot, leg = rng.uniform(1.6, 3.2), rng.uniform(0.35, 0.75), rng.uniform(0.4, 0.9)
    shaft = rng.uniform(0.0, 1.3)
    top = -foot - shaft
    slope = rng.uniform(0.0, 0.35)
    outline = [(0.0, top), (rng.uniform(-0.1, 0.15), 0.0), (length - 0.2, 0.0)]
    outline += ellipse(length - 0.2, -foot / 2, rng.uniform(0.15, 0.4), foot / 2, np.pi / 2, -np.pi / 2)
    outline += [(leg + slope, -foot - rng.uniform(0.0, 0.12)), (leg, top + rng.uniform(-0.1, 0.1))]
    strokes = [outline]
    if rng.random() < 0.7:
        strokes.append([outline[-1], outline[0]] if rng.random() < 0.6 else ellipse(leg / 2, top, leg / 2, 0.12))
    if rng.random() < 0.25:
        strokes.append([(0.0, -0.12), (length - 0.1, -0.12)])
    if rng.random() < 0.3:  # laces, crossed by the line that they tie
        y, first = -0.6 * foot, leg * rng.uniform(0.9, 1.3)
        strokes += [[(first + 0.2 * i, y - 0.12), (first + 0.2 * i, y + 0.12)] for i in range(int(rng.integers(2, 5)))]
        strokes.append([(first - 0.15, y), (first + 0.8, y + rng.uniform(-0.05, 0.15))])
    return strokes


def _shoes(rng: np.random.Generator) -> list[Stroke]:
    """One shoe from the side, a boot, or a tube with a corner as people draw a shoe in one line."""
    if rng.random() < 0.3:
        return _tube_shoe(rng)
    length, shaft = rng.uniform(2.0, 3.0), rng.uniform(0.5, 1.9) if rng.random() < 0.5 else rng.uniform(0.3, 0.7)
    toe, opening = rng.uniform(0.35, 0.7), rng.uniform(0.6, 1.0)
    top = -toe - shaft
    upper = [(0.0, 0.0), (rng.uniform(-0.1, 0.1), top), (opening, top + rng.uniform(-0.1, 0.15))]
    upper += [(opening + rng.uniform(0.0, 0.4), -toe - rng.uniform(0.05, 0.3)), (length * 0.75, -toe)]
    upper += [*ellipse(length - 0.35, -toe / 2, 0.35, toe / 2, -np.pi / 2, np.pi / 2), (0.0, 0.0)]
    strokes = [upper]
    if rng.random() < 0.4:
        strokes.append([(0.0, -0.12), (length, -0.12)])
    if rng.random() < 0.3:
        strokes.append(ellipse(opening / 2, top, opening / 2, 0.12))
    if rng.random() < 0.3:
        x = opening + 0.15
        strokes += [
            [(x + 0.2 * i, -toe - 0.1), (x + 0.2 * i + 0.15, -toe + 0.12)] for i in range(int(rng.integers(2, 5)))
        ]
    if rng.random() < 0.15:
        strokes.append([(0.0, 0.0), (0.05, 0.4), (0.3, 0.4), (0.45, 0.0)])
    return strokes


def _hat(rng: np.random.Generator) -> list[Stroke]:
    """A crown, round or flat, on a brim; or a cap with its visor to one side."""
    height, flat = rng.uniform(0.7, 1.7), rng.random() < 0.4
    top, right = rng.uniform(0.7, 1.25), rng.uniform(0.45, 1.0)
    if flat:
        crown = [(-right, 0.0), (-right * top, -height), (right * top, -height + rng.uniform(-0.1, 0.1)), (right, 0.0)]
    else:
        crown = ellipse(0.0, 0.0, right, height, np.pi, 2 * np.pi)
    kind = rng.choice(["ellipse", "line", "flat", "visor", "none"], p=[0.3, 0.2, 0.25, 0.2, 0.05])
    wide, thick = right + rng.uniform(0.4, 1.1), rng.uniform(0.12, 0.4)
    if kind == "ellipse":
        brim = [ellipse(0.0, thick * 0.4, wide, thick)]
    elif kind == "line":
        brim = [[(-wide, rng.uniform(-0.1, 0.15)), (wide, rng.uniform(-0.1, 0.15))]]
    elif kind == "flat":
        brim = [[(-wide, 0.0), (wide, 0.0), (wide * rng.uniform(0.85, 1), thick), (-wide, thick), (-wide, 0.0)]]
    elif kind == "visor":
        end = right + rng.uniform(0.5, 1.3)
        brim = [
            arc((right * 0.8, 0.0), ((right + end) / 2, -0.05), (end, thick)),
            [(-right, 0.0), (right, 0.0), (end, thick)],
        ]
    else:
        brim = [[(-right, 0.0), (right, 0.0)]]
    strokes = [crown, *brim]
    if rng.random() < 0.15:  # a button or a bobble on top
        size = rng.uniform(0.06, 0.2)
        strokes.append(ellipse(0.0, -height - size, size, size))
    if rng.random() < 0.15:  # the brim is bent up at its ends
        strokes[1:] = [[(x, y - 0.35 * (abs(x) / wide) ** 2) for x, y in stroke] for stroke in strokes[1:]]
    if rng.random() < 0.3:
        strokes.append(arc((-right, -0.2 * height), (0.0, -0.12 * height), (right, -0.2 * height)))
    return strokes


DOODLES: dict[str, Callable[[np.random.Generator], list[Stroke]]] = {
    "blazer": _blazer,
    "bodysuit": _bodysuit,
    "dress": _dress,
    "hat": _hat,
    "hoodie": _hoodie,
    "longsleeve": _longsleeve,
    "outwear": _outwear,
    "pants": _pants,
    "polo": _polo,
    "shirt": _shirt,
    "shoes": _shoes,
    "shorts": _shorts,
    "skirt": _skirt,
    "t-shirt": _t_shirt,
    "undershirt": _undershirt,
}
"""The program of each class that has one: takes the source of randomness, returns strokes."""

ONE_LINE = frozenset({"dress", "hat", "longsleeve", "pants", "shoes", "shorts", "skirt", "t-shirt", "undershirt"})
"""Classes that the outline alone shows: people often draw these in one line, with nothing inside."""


def _redrawn_ends(strokes: list[np.ndarray], rng: np.random.Generator) -> list[np.ndarray]:
    """Strokes that run on beyond their ends, stop short of them, or leave a tail where the pen was lifted late."""
    size = max(np.ptp(np.concatenate(strokes), axis=0).max(), 1e-6)
    result = []
    for stroke in strokes:
        ends = stroke.copy()
        for end, inner in ((0, 1), (-1, -2)):
            step = stroke[end] - stroke[inner]
            length = max(float(np.hypot(*step)), 1e-6)
            by = rng.uniform(0.08, 0.25) * size if rng.random() < 0.04 else rng.normal(0, 0.02) * size
            ends[end] = stroke[end] + step / length * max(by, -0.5 * length)
        result.append(ends)
    return result


def _outlined(page: np.ndarray) -> np.ndarray:
    """The outline of a drawing, as one line of two pixels; the drawing where it does not close."""
    filled = ndimage.binary_fill_holes(page)
    if filled.sum() < 2 * page.sum():
        return page
    return filled & ~ndimage.binary_erosion(filled, iterations=2)


def _rounded(stroke: np.ndarray, rounds: int) -> np.ndarray:
    """Cuts the corners of an open line (Chaikin, 1974); its ends stay."""
    for _ in range(rounds):
        first, last = stroke[:-1], stroke[1:]
        cut = np.stack([0.75 * first + 0.25 * last, 0.25 * first + 0.75 * last], axis=1).reshape(-1, 2)
        stroke = np.concatenate([stroke[:1], cut[1:-1], stroke[-1:]]) if len(cut) > 2 else stroke
    return stroke


def draw_doodle(class_name: str, rng: np.random.Generator, side: int = 128) -> np.ndarray:
    """
    One doodle of a class, in proportions that the program and a careless hand vary.

    Args:
        class_name (`str`): a key of `DOODLES`.
        rng (`np.random.Generator`): the only source of randomness.
        side (`int`): side of the page in pixels.

    Returns:
        `np.ndarray`: bool [side, side], True = stroke; lines two pixels wide.

    Raises:
        ValueError: there is no doodle of that class.
    """
    if class_name not in DOODLES:
        raise ValueError(f"`class_name` must be one of {', '.join(DOODLES)}, but is {class_name!r}.")
    page = draw_carelessly(DOODLES[class_name](rng), rng, side)
    return _outlined(page) if class_name in ONE_LINE and rng.random() < 0.3 else page


def draw_carelessly(lines: Sequence[Stroke], rng: np.random.Generator, side: int = 128) -> np.ndarray:
    """
    Draw strokes as a careless hand does, see above, on a page that they fill.

    Returns:
        `np.ndarray`: bool [side, side], True = stroke; lines two pixels wide.
    """
    strokes = [np.asarray(line, dtype=np.float64) for line in lines]
    if len(strokes) > 3 and rng.random() < 0.06:
        strokes.pop(int(rng.integers(1, len(strokes))))
    if rng.random() < 0.5:
        strokes = _redrawn_ends(strokes, rng)
    # Both halves of a garment are meant to be alike; each point of each stroke misses its place on its own.
    wobble = rng.uniform(0.0, 0.06)
    strokes = [stroke + rng.normal(0, wobble, stroke.shape) for stroke in strokes]
    rounds = int(rng.integers(0, 3))
    strokes = [_rounded(stroke, rounds) for stroke in strokes]
    if rng.random() < 0.1:  # every line drawn twice
        again = rng.uniform(0.01, 0.05)
        strokes += [stroke + rng.normal(0, again, 2) + rng.normal(0, again / 3, stroke.shape) for stroke in strokes]
    points = np.concatenate(strokes)
    low, size = points.min(axis=0), np.ptp(points, axis=0)
    scale = 0.9 * side / max(size.max(), 1e-6)
    offset = (side - scale * size) / 2
    page = Image.new("1", (side, side))
    for stroke in strokes:
        pixels = (stroke - low) * scale + offset
        ImageDraw.Draw(page).line([(float(x), float(y)) for x, y in pixels], fill=1, width=2)
    return np.asarray(page)
