# SPDX-License-Identifier: Apache-2.0
"""Doodles: every class draws, differently each time, on any page, and as it should look."""

import numpy as np
import pytest
from scipy import ndimage

from diffsketching_pipeline.training.doodles import (
    DOODLES,
    ONE_LINE,
    _outlined,
    _redrawn_ends,
    _rounded,
    arc,
    draw_doodle,
    mirrored,
)


def doodles(class_name, count=40, side=96):
    return [draw_doodle(class_name, np.random.default_rng([7, i]), side) for i in range(count)]


@pytest.mark.parametrize(("class_name", "side"), [*((name, 32) for name in DOODLES), (next(iter(DOODLES)), 200)])
def test_a_doodle_fills_its_page_and_is_keyed_by_its_generator(class_name, side):
    pages = doodles(class_name, 6, side)
    assert all(np.array_equal(*pair) for pair in zip(pages, doodles(class_name, 6, side), strict=True))
    assert len({page.tobytes() for page in pages}) == 6
    for page in pages:
        assert page.shape == (side, side) and page.dtype == bool
        extent = max(np.ptp(np.flatnonzero(page.any(axis))) + 1 for axis in (0, 1))
        assert 0.85 * side <= extent <= 0.95 * side + 2
        assert 0.01 < page.mean() < 0.45


def aspect(page):
    rows, columns = np.flatnonzero(page.any(1)), np.flatnonzero(page.any(0))
    return (np.ptp(rows) + 1) / (np.ptp(columns) + 1)


def test_classes_differ_as_the_garments_do():
    mean_aspect = {name: np.mean([aspect(page) for page in doodles(name)]) for name in DOODLES}
    assert mean_aspect["pants"] > mean_aspect["shorts"] + 0.3
    assert mean_aspect["dress"] > mean_aspect["skirt"] + 0.3
    assert mean_aspect["hat"] < 0.9 < mean_aspect["undershirt"]
    # Long sleeves reach further out than short ones.
    assert mean_aspect["longsleeve"] < mean_aspect["t-shirt"] - 0.1
    # Buttons, collars and openings are ink inside the outline.
    ink = {name: np.mean([page.mean() for page in doodles(name)]) for name in ("longsleeve", "shirt", "blazer")}
    assert ink["shirt"] > 1.15 * ink["longsleeve"] and ink["blazer"] > 1.1 * ink["longsleeve"]


def test_curves():
    curve = np.array(arc((0, 0), (1, 2), (2, 0)))
    np.testing.assert_allclose(curve[[0, 4, 8]], [(0, 0), (1, 2), (2, 0)], atol=1e-12)
    np.testing.assert_allclose(curve[:, 1], 2 - 2 * (curve[:, 0] - 1) ** 2, atol=1e-12)
    assert mirrored([(1, 0), (2, 3)]) == [(1, 0), (2, 3), (-2, 3), (-1, 0)]
    corner = np.array([(0.0, 0.0), (1.0, 0.0), (1.0, 1.0)])
    np.testing.assert_allclose(_rounded(corner, 1), [(0, 0), (0.75, 0), (1, 0.25), (1, 1)])
    np.testing.assert_array_equal(_rounded(corner, 0), corner)
    np.testing.assert_array_equal(_rounded(corner[:2], 2), corner[:2])


def test_one_line_is_the_outline_of_what_closes():
    page = np.zeros((64, 64), bool)
    page[10:50, 10:12] = page[10:50, 48:50] = page[10:12, 10:50] = page[48:50, 10:50] = True
    square = page.copy()
    page[30, 10:50] = page[20:40, 25] = True
    np.testing.assert_array_equal(_outlined(page), square)
    page[48:50] = False
    page[30] = False
    np.testing.assert_array_equal(_outlined(page), page)


def test_some_garments_are_one_line_without_anything_inside():
    def encloses_one_area(page):
        return ndimage.label(~page)[1] == 2

    assert set(DOODLES) > ONE_LINE
    for name in ("hat", "shoes", "pants"):
        assert sum(encloses_one_area(page) for page in doodles(name)) >= 8
    # What is inside is all that tells these from a longsleeve.
    assert not ONE_LINE & {"blazer", "hoodie", "outwear", "polo", "shirt"}


def test_redrawn_ends_run_on_or_stop_short_along_their_line():
    strokes = [np.array([(0.0, 0.0), (1.0, 0.0), (1.0, 1.0)]), np.array([(0.0, 0.5), (0.01, 0.5)])]
    lengths = []
    for seed in range(60):
        redrawn = _redrawn_ends(strokes, np.random.default_rng(seed))
        np.testing.assert_allclose(redrawn[0][1], (1, 0))
        assert redrawn[0][0, 1] == 0 and redrawn[0][2, 0] == 1 and (redrawn[1][:, 1] == 0.5).all()
        lengths.append(redrawn[0][2, 1])
    assert min(lengths) < 0.99 and 1.08 < max(lengths) < 1.3
    np.testing.assert_array_equal(strokes[0][2], (1, 1))


def test_an_unknown_class_is_refused():
    with pytest.raises(ValueError, match="`class_name`.* 'sock'"):
        draw_doodle("sock", np.random.default_rng(0))
