# SPDX-License-Identifier: Apache-2.0
import numpy as np
import pytest
from PIL import Image, ImageDraw


@pytest.fixture(scope="session")
def shapes_dir(tmp_path_factory):
    """An imagefolder of coloured shapes on light paper: discs are red, squares are blue."""
    root = tmp_path_factory.mktemp("shapes")
    rng = np.random.default_rng(0)
    for split, count in (("train", 16), ("validation", 8)):
        for i in range(count):
            name, color = (("disc", (200, 40, 40)), ("square", (40, 40, 200)))[i % 2]
            picture = Image.new("RGB", (64, 64), (240, 240, 240))
            draw = ImageDraw.Draw(picture)
            left, top, side = rng.integers(6, 20), rng.integers(6, 20), rng.integers(24, 36)
            shape = draw.ellipse if name == "disc" else draw.rectangle
            shape((left, top, left + side, top + side), fill=color)
            path = root / split / name / f"{name}-{i:02d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            picture.save(path)
    return root


@pytest.fixture(scope="session")
def cache_dir(tmp_path_factory):
    """Contours that several tests need; the tests of the cache itself make their own."""
    return tmp_path_factory.mktemp("cache")
