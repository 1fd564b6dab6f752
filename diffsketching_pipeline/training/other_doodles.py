# SPDX-License-Identifier: Apache-2.0
"""Doodles of things that are no garments, so that a sketch encoder learns when not to believe itself.

A network that has seen garments alone calls a cat a pair of shoes. Its training is shown these, with the advice that every
class is as likely as any other (outlier exposure; Hendrycks et al., "Deep Anomaly Detection with Outlier Exposure", 2019).
Each is put together from parts in random proportions: animals, people, faces, plants, buildings, vehicles, vessels, tools,
furniture, signs, scribbles. No human drawing was traced, and what is meant need not be recognized: it is enough that people
draw such lines and garments have others.
"""

from collections.abc import Callable

import numpy as np

from diffsketching_pipeline.training.doodles import Stroke, arc, ellipse, mirrored


def _circle(x: float, y: float, radius: float) -> Stroke:
    return ellipse(x, y, radius, radius)


def _box(left: float, top: float, right: float, bottom: float) -> Stroke:
    return [(left, top), (right, top), (right, bottom), (left, bottom), (left, top)]


def _turned(strokes: list[Stroke], angle: float) -> list[Stroke]:
    """Strokes turned about (0, 0), `angle` in radians."""
    c, s = np.cos(angle), np.sin(angle)
    return [[(float(c * x - s * y), float(s * x + c * y)) for x, y in stroke] for stroke in strokes]


def _moved(strokes: list[Stroke], x: float, y: float, scale: float = 1.0) -> list[Stroke]:
    return [[(x + scale * a, y + scale * b) for a, b in stroke] for stroke in strokes]


def _rays(rng: np.random.Generator, inner: float, outer: float, count: int) -> list[Stroke]:
    angles = np.linspace(0, 2 * np.pi, count, endpoint=False) + rng.uniform(0, 2)
    return [
        [(inner * float(np.cos(a)), inner * float(np.sin(a))), (outer * float(np.cos(a)), outer * float(np.sin(a)))]
        for a in angles
    ]


def _blob(rng: np.random.Generator, roughness: float = 0.3) -> Stroke:
    """A closed smooth outline around (0, 0) of a radius of about 1."""
    angles = np.linspace(0, 2 * np.pi, 33)
    radius = np.ones_like(angles)
    for k in range(2, 6):
        radius += rng.normal(0, roughness / k) * np.cos(k * angles + rng.uniform(0, 2 * np.pi))
    radius = np.maximum(radius, 0.2)
    stretch = rng.uniform(0.5, 1.8)
    return [(float(stretch * r * np.cos(a)), float(r * np.sin(a))) for r, a in zip(radius, angles, strict=True)]


# ---- living things --------------------------------------------------------------------------------------------------


def _face(rng: np.random.Generator) -> list[Stroke]:
    width = rng.uniform(0.7, 1.1)
    eye_x, eye_y, eye = rng.uniform(0.25, 0.45), rng.uniform(-0.4, -0.1), rng.uniform(0.04, 0.16)
    strokes = [ellipse(0, 0, width, 1), _circle(-eye_x, eye_y, eye), _circle(eye_x, eye_y, eye)]
    mouth, smile = rng.uniform(0.2, 0.5), rng.uniform(-0.2, 0.3)
    strokes.append(arc((-mouth, 0.45), (0, 0.45 + smile), (mouth, 0.45)))
    if rng.random() < 0.5:
        strokes.append([(0, -0.1), (rng.uniform(-0.15, 0.15), 0.2), (0.0, 0.2)])
    kind = rng.integers(5)
    if kind == 0:  # pointed ears
        for side in (-1, 1):
            ear = [(0.85, -0.5), (0.75, -1.3), (0.3, -0.95)]
            strokes.append([(side * width * x, y) for x, y in ear])
        if rng.random() < 0.7:
            strokes += [[(s * 0.3, 0.2 + 0.1 * k), (s * 1.3, 0.1 + 0.2 * k)] for s in (-1, 1) for k in range(3)]
    elif kind == 1:  # round or long ears
        strokes += [ellipse(s * width * 0.7, -0.9, rng.uniform(0.2, 0.35), rng.uniform(0.25, 0.9)) for s in (-1, 1)]
    elif kind == 2:  # hair
        strokes += [[(x, -0.9), (x + rng.normal(0, 0.2), -1.3)] for x in np.linspace(-0.6, 0.6, 6)]
    return strokes


def _stick_person(rng: np.random.Generator) -> list[Stroke]:
    hip, arm = rng.uniform(1.4, 2.0), rng.uniform(0.6, 0.9)
    reach, lift = rng.uniform(0.5, 1.0), rng.uniform(-0.6, 0.7)
    spread = rng.uniform(0.3, 0.8)
    strokes: list[Stroke] = [_circle(0, 0, rng.uniform(0.3, 0.5)), [(0, 0.4), (0, hip)]]
    strokes += [[(0, arm), (s * reach, arm + lift * rng.choice([-1, 1]))] for s in (-1, 1)]
    strokes += [[(0, hip), (s * spread, hip + rng.uniform(0.8, 1.2))] for s in (-1, 1)]
    return strokes


def _animal(rng: np.random.Generator) -> list[Stroke]:
    """From the side: a body, a head at its end, legs, a tail; with few legs a bird or a fish."""
    long, high = rng.uniform(0.9, 1.6), rng.uniform(0.4, 0.8)
    strokes = [ellipse(0, 0, long, high)]
    head, head_y = rng.uniform(0.25, 0.55), rng.uniform(-1.1, 0.1)
    head_x = long + rng.uniform(-0.2, 0.4)
    strokes += [_circle(head_x, head_y, head), _circle(head_x + 0.3 * head, head_y - 0.2 * head, 0.05)]
    if head_y < -0.7:
        strokes += [[(head_x - 0.2, head_y + head), (long * 0.6, -high * 0.6)]]
    length = rng.uniform(0.2, 1.3)
    for x in np.linspace(-0.75, 0.75, int(rng.choice([0, 2, 4, 4, 4, 6]))):
        if rng.random() < 0.5:
            strokes.append([(x * long, high * 0.7), (x * long + rng.normal(0, 0.1), high * 0.7 + length)])
        else:
            foot = high * 0.7 + length
            strokes.append([(x * long, 0.6 * high), (x * long, foot), (x * long + 0.2, foot), (x * long + 0.2, high)])
    tail = rng.integers(4)
    if tail == 0:
        strokes.append(arc((-long, 0), (-long - 0.4, rng.uniform(-0.8, 0.4)), (-long - 0.7, rng.uniform(-1, 0.5))))
    elif tail == 1:
        strokes.append([(-long, 0), (-long - 0.6, -0.5), (-long - 0.6, 0.5), (-long, 0)])
    if rng.random() < 0.5:
        ear = head_y - head
        strokes.append([(head_x - 0.2, ear), (head_x - 0.2, ear - rng.uniform(0.2, 0.7)), (head_x + 0.1, ear)])
    if rng.random() < 0.3:
        strokes.append(arc((-0.6, -0.2), (0, rng.uniform(-1.6, -0.8)), (0.5, -0.2)))  # a wing or a fin
    return strokes


def _insect(rng: np.random.Generator) -> list[Stroke]:
    long = rng.uniform(0.6, 1.4)
    strokes = [ellipse(0, 0, rng.uniform(0.15, 0.5), long), _circle(0, -long - 0.2, 0.22)]
    wings = rng.random() < 0.6
    for side in (-1, 1):
        if wings:
            for y, size in ((-0.4, 0.7), (0.4, 0.5)):
                strokes.append(ellipse(side * (0.3 + size), y, size, size * rng.uniform(0.5, 0.9)))
        else:
            for y in np.linspace(-0.6, 0.6, int(rng.integers(3, 5))):
                strokes.append([(0.0, y * long), (side * 0.8, y * long - 0.3), (side * 1.3, y * long + 0.3)])
        strokes.append([(0, -long - 0.4), (side * 0.4, -long - 0.9)])
    return strokes


def _plant(rng: np.random.Generator) -> list[Stroke]:
    kind, height = rng.integers(4), rng.uniform(1.2, 2.5)
    stem = [arc((0, 0), (rng.normal(0, 0.2), height / 2), (0, height))]
    if kind == 0:  # a flower
        petals = int(rng.integers(4, 9))
        size = rng.uniform(0.3, 0.6)
        angles = np.linspace(0, 2 * np.pi, petals, endpoint=False)
        strokes = [_circle(0, 0, 0.3)]
        strokes += [_circle(float((0.3 + size) * np.cos(a)), float((0.3 + size) * np.sin(a)), size) for a in angles]
    elif kind == 1:  # a tree with a round crown
        strokes = _moved([_blob(rng, 0.4)], 0, -0.6)
        stem = [[(-0.15, 0.3), (-0.2, height)], [(0.15, 0.3), (0.2, height)]]
    elif kind == 2:  # a fir
        strokes = []
        for k in range(int(rng.integers(1, 4))):
            y, w = 0.5 * k - 1, 0.5 + 0.25 * k
            strokes.append([(0, y - 0.7), (w, y + 0.2), (-w, y + 0.2), (0, y - 0.7)])
        stem = [_box(-0.15, 0.2, 0.15, 0.8)]
    else:  # leaves along a stem, a cactus
        strokes = []
        for y in np.linspace(0.2, height - 0.3, int(rng.integers(2, 6))):
            side = rng.choice([-1, 1])
            strokes.append(arc((0, y), (side * 0.8, y - 0.5), (side * 0.9, y - 0.9)))
            strokes.append(arc((0, y), (side * 0.3, y - 0.6), (side * 0.9, y - 0.9)))
    if rng.random() < 0.3:
        stem += [[(-0.5, height), (-0.35, height + 0.7), (0.35, height + 0.7), (0.5, height), (-0.5, height)]]
    return strokes + stem


def _fruit(rng: np.random.Generator) -> list[Stroke]:
    strokes = [_blob(rng, 0.15)]
    strokes.append(arc((0, -0.9), (rng.normal(0, 0.1), -1.2), (rng.normal(0, 0.3), -1.5)))
    if rng.random() < 0.6:
        strokes.append(arc((0, -1.2), (0.4, -1.6), (0.8, -1.3)))
        strokes.append(arc((0, -1.2), (0.4, -1.0), (0.8, -1.3)))
    if rng.random() < 0.4:
        spots = rng.uniform(-0.6, 0.6, (int(rng.integers(3, 12)), 2))
        strokes += [_circle(float(x), float(y), 0.04) for x, y in spots]
    return strokes


# ---- made things ----------------------------------------------------------------------------------------------------


def _building(rng: np.random.Generator) -> list[Stroke]:
    width, height = rng.uniform(0.6, 1.6), rng.uniform(0.8, 2.4)
    strokes = [_box(-width, 0, width, height)]
    roof = rng.uniform(0.4, 1.2)
    if rng.random() < 0.7:
        over = rng.uniform(0, 0.25)
        strokes.append([(-width - over, 0), (0, -roof), (width + over, 0)])
    door = rng.uniform(0.15, 0.3)
    strokes.append([(-door, height), (-door, height - 0.6), (door, height - 0.6), (door, height)])
    for x in (-0.6, 0.6):
        for y in np.linspace(0.3, height - 0.7, int(rng.integers(1, 4))):
            window = _box(x * width - 0.15, float(y) - 0.15, x * width + 0.15, float(y) + 0.15)
            strokes.append(window)
            if rng.random() < 0.5:
                strokes += [[window[0], window[2]]]
    if rng.random() < 0.3:
        strokes.append(_box(width * 0.4, -roof, width * 0.6, -roof * 0.4))
    return strokes


def _vehicle(rng: np.random.Generator) -> list[Stroke]:
    long, high = rng.uniform(1.2, 2.2), rng.uniform(0.4, 0.9)
    kind = rng.integers(4)
    if kind == 0:  # a car, a bus, a train
        strokes = [_box(-long, 0, long, high)]
        cabin = rng.uniform(0.3, 0.9)
        strokes.append(
            [(-long * cabin, 0), (-long * cabin * 0.7, -0.6), (long * cabin * 0.6, -0.6), (long * cabin, 0)]
        )
        wheel = rng.uniform(0.2, 0.4)
        for x in np.linspace(-0.6, 0.6, int(rng.integers(2, 5))):
            strokes.append(_circle(float(x) * long, high, wheel))
    elif kind == 1:  # a bicycle
        radius = rng.uniform(0.5, 0.8)
        strokes = [_circle(-1, 0, radius), _circle(1, 0, radius)]
        strokes += [[(-1, 0), (-0.3, -0.9), (0.7, -0.9), (0, 0), (-1, 0)], [(1, 0), (0.6, -1.2), (0.9, -1.3)]]
        strokes += [[(0, 0), (-0.4, -1.1)], [(-0.6, -1.1), (-0.2, -1.1)]]
    elif kind == 2:  # a ship
        strokes = [[(-long, 0), (-long * 0.7, high), (long * 0.7, high), (long, 0), (-long, 0)], [(0, 0), (0, -1.6)]]
        strokes.append([(0, -1.5), (rng.uniform(0.5, 1.2), -0.3), (0, -0.3)])
    else:  # an airplane, a rocket
        strokes = [ellipse(0, 0, long, 0.3)]
        strokes.append([(0.3, 0.1), (-0.6, rng.uniform(0.7, 1.3)), (-0.3, 0.1)])
        strokes.append([(0.3, -0.1), (-0.6, -rng.uniform(0.7, 1.3)), (-0.3, -0.1)])
        strokes.append([(-long, 0), (-long - 0.3, -0.6), (-long * 0.7, -0.1)])
        strokes = _turned(strokes, rng.uniform(-np.pi / 2, 0.4))
    return strokes


def _vessel(rng: np.random.Generator) -> list[Stroke]:
    """A cup, a bottle, a bowl, a vase, a lamp: a profile that is mirrored, and a handle."""
    points = int(rng.integers(2, 5))
    widths, heights = rng.uniform(0.15, 1.0, points), np.sort(rng.uniform(0, 2.0, points))
    half = [(float(w), float(h)) for w, h in zip(widths, heights, strict=True)]
    half = [(half[0][0], 0.0), *half, (half[-1][0], 2.1)]
    strokes = [mirrored(half) + [half[0]]]
    if rng.random() < 0.4:
        strokes.append(ellipse(0, 0, half[0][0], rng.uniform(0.05, 0.2)))
    if rng.random() < 0.5:
        x = half[1][0]
        strokes.append(ellipse(x, 1.0, rng.uniform(0.3, 0.6), rng.uniform(0.3, 0.6), -np.pi / 2, np.pi / 2))
    if rng.random() < 0.3:
        strokes += [[(-0.6, y), (0.6, y)] for y in rng.uniform(0.3, 1.8, int(rng.integers(1, 4)))]
    return strokes


def _tool(rng: np.random.Generator) -> list[Stroke]:
    """Something long with something at its end: a brush, a key, a knife, an axe, a racket, a broom."""
    long, wide = rng.uniform(1.5, 3.0), rng.uniform(0.04, 0.25)
    shaft: Stroke = _box(-wide, 0, wide, long) if rng.random() < 0.7 else [(0, 0), (0, long)]
    strokes = [shaft]
    kind = rng.integers(5)
    size = rng.uniform(0.3, 0.9)
    if kind == 0:
        strokes.append(ellipse(0, -size, size * rng.uniform(0.5, 1), size))
        if rng.random() < 0.5:
            strokes.append(_circle(0, -size, size * 0.4))
    elif kind == 1:
        strokes.append([(-wide, 0), (-wide - size, -0.3), (-wide - size, 0.6), (-wide, 0.4)])
    elif kind == 2:
        strokes.append([(-wide, 0), (0, -size), (wide, 0)])
    elif kind == 3:
        strokes += [[(0, 0), (x, -size)] for x in np.linspace(-0.5, 0.5, int(rng.integers(3, 8)))]
    else:
        strokes.append(_box(-size, -0.5, size, 0))
    return _turned(strokes, rng.uniform(0, 2 * np.pi) if rng.random() < 0.7 else 0.0)


def _furniture(rng: np.random.Generator) -> list[Stroke]:
    width, height = rng.uniform(0.6, 1.8), rng.uniform(0.5, 1.5)
    plate: Stroke = _box(-width, -0.12, width, 0.0) if rng.random() < 0.5 else [(-width, 0), (width, 0)]
    strokes = [plate]
    strokes += [[(x * width, 0), (x * width, height)] for x in (-0.95, 0.95)]
    if rng.random() < 0.4:
        strokes += [[(x * width, 0), (x * width, height * 0.8)] for x in (-0.6, 0.6)]
    if rng.random() < 0.5:  # the back of a chair, a bed
        strokes += [[(-width, 0), (-width, -height)], [(-width * 0.6, -height), (-width, -height)]]
    for y in rng.uniform(0, height, int(rng.integers(0, 5))):
        strokes.append([(-width * 0.95, float(y)), (width * 0.95, float(y))])
    return strokes


def _device(rng: np.random.Generator) -> list[Stroke]:
    """A box with things on it: a radio, a camera, a book, an oven, a telephone."""
    width, height = rng.uniform(0.6, 1.4), rng.uniform(0.5, 1.4)
    strokes = [_box(-width, -height, width, height)]
    if rng.random() < 0.5:
        strokes.append(_box(-width * 0.8, -height * 0.8, width * 0.8, height * rng.uniform(-0.2, 0.8)))
    for _ in range(int(rng.integers(0, 5))):
        x, y = rng.uniform(-0.8, 0.8) * width, rng.uniform(-0.8, 0.8) * height
        strokes.append(_circle(x, y, rng.uniform(0.05, 0.4)))
    if rng.random() < 0.3:
        strokes += [[(0, -height), (rng.uniform(-1, 1), -height - 0.8)]]
    if rng.random() < 0.3:
        strokes += [[(x * width, height), (x * width, height + 0.3)] for x in (-0.7, 0.7)]
    return strokes


def _handled(rng: np.random.Generator) -> list[Stroke]:
    """An umbrella, a basket, a bag, a balloon, a lollipop: something round on a line or under an arc."""
    kind = rng.integers(4)
    if kind == 0:
        arcs = int(rng.integers(1, 5))
        xs = np.linspace(-1, 1, arcs + 1)
        strokes = [ellipse(0, 0, 1, rng.uniform(0.6, 1.1), -np.pi, 0), [(0, 0), (0, 1.3), (0.2, 1.5), (0.4, 1.3)]]
        strokes += [arc((a, 0), ((a + b) / 2, -0.25), (b, 0)) for a, b in zip(xs[:-1], xs[1:], strict=True)]
        return strokes
    if kind == 1:
        low = rng.uniform(0.5, 1.0)
        strokes = [[(-1, 0), (-low, 1.2), (low, 1.2), (1, 0), (-1, 0)]]
        return [*strokes, ellipse(0, 0, rng.uniform(0.4, 1), rng.uniform(0.5, 1.2), -np.pi, 0)]
    strokes = [ellipse(0, 0, rng.uniform(0.6, 1), 1), arc((0, 1), (rng.normal(0, 0.3), 2), (0, 2.8))]
    if rng.random() < 0.4:
        strokes.append(_spiral(rng))
    return strokes


def _tower_of_lines(rng: np.random.Generator) -> list[Stroke]:
    """A ladder, a fence, rails, a bridge, a net, a keyboard."""
    rows, columns = int(rng.integers(2, 8)), int(rng.integers(2, 8))
    wide, high = rng.uniform(0.5, 2.0), rng.uniform(0.5, 2.0)
    strokes: list[Stroke] = [[(-wide, float(y)), (wide, float(y))] for y in np.linspace(-high, high, rows)]
    strokes += [[(float(x), -high), (float(x), high)] for x in np.linspace(-wide, wide, columns)]
    if rng.random() < 0.3:
        strokes.append(arc((-wide, high), (0, -high), (wide, high)))
    return _turned(strokes, rng.normal(0, 0.2))


# ---- signs ----------------------------------------------------------------------------------------------------------


def _radiant(rng: np.random.Generator) -> list[Stroke]:
    """A sun, a wheel, a clock, a snowflake, a target."""
    kind = rng.integers(4)
    strokes = [_circle(0, 0, 1)] if kind < 3 else []
    if kind == 0:
        return strokes + _rays(rng, 1.15, rng.uniform(1.4, 2.2), int(rng.integers(5, 14)))
    if kind == 1:
        return [*strokes, _circle(0, 0, rng.uniform(0.1, 0.8)), *_rays(rng, 0.2, 1, int(rng.integers(3, 10)))]
    if kind == 2:
        return [*strokes, *_rays(rng, 0.0, rng.uniform(0.4, 0.9), 2)]
    return _rays(rng, 0, 1, int(rng.integers(3, 9)))


def _star(rng: np.random.Generator) -> list[Stroke]:
    points, inner = int(rng.integers(3, 9)), rng.uniform(0.3, 0.9)
    angles = np.linspace(0, 2 * np.pi, 2 * points + 1) - np.pi / 2
    radius = np.where(np.arange(2 * points + 1) % 2 == 0, 1.0, inner)
    outline = [(float(r * np.cos(a)), float(r * np.sin(a))) for r, a in zip(radius, angles, strict=True)]
    return _turned([outline], rng.normal(0, 0.3))


def _spiral(rng: np.random.Generator) -> Stroke:
    turns = np.linspace(0, rng.uniform(2, 5) * 2 * np.pi, 65)
    radius = turns / turns[-1]
    return [(float(r * np.cos(a)), float(r * np.sin(a))) for r, a in zip(radius, turns, strict=True)]


def _scribble(rng: np.random.Generator) -> list[Stroke]:
    kind = rng.integers(4)
    if kind == 0:
        return [_spiral(rng)]
    if kind == 1:  # a zigzag, waves
        count = int(rng.integers(4, 14))
        x, y = np.linspace(-1.5, 1.5, count), rng.uniform(0.3, 1.0) * (-1.0) ** np.arange(count)
        wave = [(float(a), float(b)) for a, b in zip(x, y, strict=True)]
        return [wave] if rng.random() < 0.6 else [wave, [(a, b + 1.0) for a, b in wave]]
    if kind == 2:  # a walk
        walk = np.cumsum(rng.normal(0, 1, (int(rng.integers(6, 30)), 2)), axis=0)
        return [[(float(a), float(b)) for a, b in walk]]
    return [[(x, y) for x, y in rng.uniform(-1, 1, (int(rng.integers(2, 5)), 2)).tolist()] for _ in range(6)]


def _heart_moon_cloud(rng: np.random.Generator) -> list[Stroke]:
    kind = rng.integers(4)
    if kind == 0:
        half = [(0.0, -0.3), (0.4, -0.8), (0.9, -0.6), (0.9, -0.1), (0.4, 0.5), (0.0, 1.0)]
        return [mirrored(half)]
    if kind == 1:
        outer = ellipse(0, 0, 1, 1, -np.pi / 2 - 0.6, np.pi / 2 + 0.6)
        middle = rng.uniform(-0.2, 0.6)
        return _turned([outer, arc(outer[0], (middle, 0), outer[-1])], rng.uniform(0, 6))
    if kind == 2:
        angles = np.linspace(0, 2 * np.pi, int(rng.integers(5, 10)), endpoint=False)
        return [ellipse(float(1.2 * np.cos(a)), float(0.6 * np.sin(a)), 0.5, 0.45, a - 1.3, a + 1.3) for a in angles]
    return [[(0.2, -1), (-0.5, 0.1), (0.0, 0.1), (-0.3, 1), (0.6, -0.2), (0.1, -0.2), (0.5, -1), (0.2, -1)]]


def _parts(rng: np.random.Generator) -> list[Stroke]:
    """A few plain figures that touch one another: anything."""
    strokes: list[Stroke] = []
    for _ in range(int(rng.integers(1, 6))):
        x, y = rng.normal(0, 0.9, 2).tolist()
        size = rng.uniform(0.2, 1.0)
        kind = rng.integers(4)
        if kind == 0:
            part = [ellipse(0, 0, 1, rng.uniform(0.4, 1.5))]
        elif kind == 1:
            part = [_box(-1, -rng.uniform(0.3, 1.5), 1, rng.uniform(0.3, 1.5))]
        elif kind == 2:
            part = [_blob(rng, 0.5)]
        else:
            corners = [(float(a), float(b)) for a, b in rng.uniform(-1, 1, (int(rng.integers(3, 6)), 2))]
            part = [[*corners, corners[0]]]
        strokes += _moved(_turned(part, rng.normal(0, 0.5)), x, y, size)
    return strokes


OTHER_DOODLES: tuple[Callable[[np.random.Generator], list[Stroke]], ...] = (
    _face,
    _stick_person,
    _animal,
    _animal,
    _insect,
    _plant,
    _plant,
    _fruit,
    _building,
    _vehicle,
    _vehicle,
    _vessel,
    _tool,
    _tool,
    _furniture,
    _device,
    _handled,
    _tower_of_lines,
    _radiant,
    _star,
    _scribble,
    _heart_moon_cloud,
    _parts,
    _parts,
)
"""The programs, the ones that stand for many things more than once."""


def other_strokes(rng: np.random.Generator) -> list[Stroke]:
    """Return the strokes of one thing that is no garment, now and then of two beside each other."""
    strokes = OTHER_DOODLES[rng.integers(len(OTHER_DOODLES))](rng)
    if rng.random() < 0.1:
        strokes = [
            *strokes,
            *_moved(OTHER_DOODLES[rng.integers(len(OTHER_DOODLES))](rng), rng.uniform(1, 2.5), 0.5, 0.6),
        ]
    if rng.random() < 0.5:
        strokes = [[(-x, y) for x, y in stroke] for stroke in strokes]
    return strokes
