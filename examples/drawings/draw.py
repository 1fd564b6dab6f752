# SPDX-License-Identifier: Apache-2.0
"""Draws the six drawings next to this file, stroke by stroke: python draw.py"""

import math
import random
from pathlib import Path

from PIL import Image, ImageDraw


SIZE, PEN, FINE = 512, 6, 3

# Strokes in the order a hand makes them. A curve passes through all "x,y" points of a stroke; "!" makes a corner.
DRAWINGS = {
    "t-shirt": """196,96! 130,120 54,186! 96,250! 150,212! 152,330 146,442! 258,450 368,440! 362,320 362,208!
        314,94! 386,122 458,184! 420,250! 358,208
        192,98! 216,140 256,152 296,138 320,92""",
    "dress": """208,48! 204,96 186,128! 206,176 214,214! 176,300 128,400 98,462
        98,458! 168,478 256,484 346,476 420,452!
        302,46! 308,98 326,126! 304,174 298,212! 336,300 384,390 416,456
        206,50! 222,92 256,106 290,92 304,44
        212,216! 256,224 302,210""",
    "pants": """150,48! 256,56 366,46! 378,150 392,300 402,462! 352,470 304,466! 290,340 260,196!
        152,46! 138,160 124,310 112,464! 162,472 214,466! 232,330 258,194
        146,88! 256,96 372,84
        256,98! 258,132 246,158""",
    "shoes": """74,212! 68,270 66,322 76,358! 180,372 330,370 446,360! 462,330 444,300 402,286 330,268 276,240 236,188!
        72,216! 110,222 136,206 150,180! 190,186 240,190!
        66,330! 180,342 320,342 458,330
        230,248! 262,214
        262,264! 292,232
        296,276! 322,246""",
    "hat": """150,294! 150,220 172,150 226,134! 258,150 288,132! 344,152 360,220 362,296
        152,292! 92,292 40,312 52,338! 120,372 256,382 396,370 460,336! 470,306 420,292 358,294
        148,262! 220,284 296,284 364,260""",
    "longsleeve": """200,88! 150,104 128,128! 96,230 50,366! 78,384 104,386! 134,300 164,234!
        160,200! 162,320 156,440! 256,448 358,438! 352,320 354,202
        310,86! 364,106 384,130! 420,230 464,362! 438,382 410,386! 380,300 352,236
        198,90! 226,116 256,120 286,114 314,84""",
}


def curve(stroke: str) -> list[list[float]]:
    """The Catmull-Rom curve through the points of a stroke, in steps of a pixel, with no tangent at its corners."""
    points = [[float(number) for number in word.split(",")] for word in stroke.replace("!", "").split()]
    corners = [0, *(i for i, word in enumerate(stroke.split()) if word.endswith("!")), len(points) - 1]
    path = []
    for i, (b, c) in enumerate(zip(points, points[1:], strict=False)):
        a, d = b if i in corners else points[i - 1], c if i + 1 in corners else points[i + 2]
        for t in (step / math.dist(b, c) for step in range(math.ceil(math.dist(b, c)))):
            weights = (-t + 2 * t**2 - t**3, 2 - 5 * t**2 + 3 * t**3, t + 4 * t**2 - 3 * t**3, t**3 - t**2)
            path.append([sum(w * p[k] / 2 for w, p in zip(weights, (a, b, c, d), strict=True)) for k in (0, 1)])
    return path


for name, strokes in DRAWINGS.items():
    rng = random.Random(name)
    page = Image.new("L", (SIZE * FINE, SIZE * FINE), 255)
    for stroke in strokes.splitlines():
        # A hand does not quite start where it wants to, and trembles in slow waves: amplitude, length, phase.
        start = [rng.uniform(-3, 3), rng.uniform(-3, 3)]
        waves = [[(rng.uniform(0.6, 2.4), rng.uniform(20, 60), rng.uniform(0, 7)) for _ in range(3)] for _ in start]
        for i, point in enumerate(curve(stroke)):
            x, y = (point[k] + start[k] + sum(a * math.sin(i / n + p) for a, n, p in waves[k]) for k in (0, 1))
            box = [FINE * value for value in (x - PEN / 2, y - PEN / 2, x + PEN / 2, y + PEN / 2)]
            ImageDraw.Draw(page).ellipse(box, fill=0)
    page.reduce(FINE).save(Path(__file__).with_name(f"{name}.png"), optimize=True)
