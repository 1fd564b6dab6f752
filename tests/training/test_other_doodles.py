# SPDX-License-Identifier: Apache-2.0
import numpy as np
import pytest

from diffsketching_pipeline.training.doodles import draw_carelessly
from diffsketching_pipeline.training.other_doodles import OTHER_DOODLES, other_strokes


@pytest.mark.parametrize("program", sorted(set(OTHER_DOODLES), key=lambda p: p.__name__), ids=lambda p: p.__name__)
def test_each_program_draws_something_else_each_time(program):
    pages = [draw_carelessly(program(np.random.default_rng(i)), np.random.default_rng(i)) for i in range(20)]
    ink = [page.mean() for page in pages]
    assert min(ink) > 0.002 and max(ink) < 0.5
    assert len({page.tobytes() for page in pages}) == 20
    # The page is filled in one direction at least.
    assert all(max(np.ptp(np.flatnonzero(page.any(axis))) for axis in (0, 1)) > 100 for page in pages)


def test_the_same_source_of_randomness_gives_the_same_strokes():
    assert other_strokes(np.random.default_rng(3)) == other_strokes(np.random.default_rng(3))
