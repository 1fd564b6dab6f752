# SPDX-License-Identifier: Apache-2.0
import json

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

from diffsketching_pipeline import SketchProcessor, VectorSketch
from diffsketching_pipeline.images import vector_sketch


SVG = '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 100 100">{}</svg>'
STROKES = [[[30, 30, 90, 90, 30], [20, 70, 70, 20, 20]], [[60, 60], [20, 70]]]


def strokes_of(body):
    return VectorSketch.from_svg(SVG.format(body)).strokes


def write(path, text):
    path.write_text(text)
    return path


def test_a_vector_and_its_picture_come_out_alike():
    page = Image.new("L", (120, 90), 255)
    draw = ImageDraw.Draw(page)
    for xs, ys in STROKES:
        draw.line(list(zip(xs, ys, strict=True)), fill=0, width=3)
    processor = SketchProcessor(64)
    drawn, traced = processor.preprocess(VectorSketch.from_quickdraw(STROKES)), processor.preprocess(page)
    assert drawn.shape == (1, 1, 64, 64)
    assert float((drawn < 0).sum()) == pytest.approx(float((traced < 0).sum()), rel=0.1)
    # Each stroke of the one has one of the other within a pixel.
    near = torch.nn.functional.max_pool2d(-traced, 3, stride=1, padding=1) > 0
    assert bool(near[drawn < 0].all())


def test_a_stroke_has_the_width_of_the_model_whatever_its_size():
    for scale in (1e-3, 1.0, 1e6):
        sketch = SketchProcessor(64).preprocess(
            VectorSketch([scale * np.array([[0.0, 5.0], [10.0, 5.0], [10.0, 0.0]])])
        )
        ink = ((1 - sketch[0, 0]) / 2).numpy()
        # From margin to margin, 0.9 pixels wide, with a gain of 1.6 for its dark core.
        assert 1.0 < ink[:, 20].sum() < 1.6 and np.flatnonzero(ink.any(0)).tolist()[0] in (1, 2)


def test_an_ndjson_file_is_a_batch(tmp_path):
    lines = [
        json.dumps({"word": "x", "drawing": STROKES}),
        "",
        json.dumps({"drawing": [[*STROKES[0], [1, 2, 3, 4, 5]]]}),
    ]
    path = write(tmp_path / "two.ndjson", "\n".join(lines))
    processor = SketchProcessor(32)
    both = processor.preprocess(path)
    assert both.shape == (2, 1, 32, 32)
    torch.testing.assert_close(both[:1], processor.preprocess(VectorSketch.from_quickdraw(STROKES)))
    torch.testing.assert_close(both[1:], processor.preprocess(VectorSketch.from_quickdraw(STROKES[:1])))
    assert [len(group) for group in processor.preprocess_groups([path, VectorSketch.from_quickdraw(STROKES)])] == [
        2,
        1,
    ]


def test_the_place_on_the_page_is_kept(tmp_path):
    path = write(tmp_path / "corner.svg", SVG.format('<path d="M50 10H90V50H50Z"/>'))
    ink = (SketchProcessor(50).preprocess(path, fit="page")[0, 0] < 0).nonzero()
    assert ink.min(0).values.tolist() == pytest.approx([5, 25], abs=1)
    assert ink.max(0).values.tolist() == pytest.approx([25, 45], abs=1)


def test_shapes_and_curves_are_where_svg_puts_them():
    [line] = strokes_of('<line x1="1" y1="2" x2="30" y2="40"/>')
    assert line.tolist() == [[1, 2], [30, 40]]
    [polygon] = strokes_of('<polygon points="1,1 9,1 5,8"/>')
    assert polygon.tolist() == [[1, 1], [9, 1], [5, 8], [1, 1]]
    [circle] = strokes_of('<circle cx="50" cy="40" r="20"/>')
    np.testing.assert_allclose(np.hypot(*(circle - [50, 40]).T), 20, rtol=1e-3)
    [curve] = strokes_of('<path d="M0 0 C0 8 8 8 8 0"/>')
    assert curve.max(0).tolist() == [8, 6] and [4, 6] in curve.tolist()
    assert len(strokes_of('<path d="m1 1 l1 0 m5 5 l0 1 z"/>')) == 2


def test_transforms_compose_and_what_is_not_shown_is_left_out():
    body = '<g transform="translate(10 5) scale(2)"><path transform="rotate(90)" d="M1 0L3 0"/></g>'
    [stroke] = strokes_of(body)
    np.testing.assert_allclose(stroke, [[10, 7], [10, 11]], atol=1e-9)
    hidden = '<defs><path d="M0 0L9 9"/></defs><g style="display: none"><path d="M0 0L9 9"/></g><text>a</text>'
    assert len(strokes_of(body + hidden)) == 1


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.svg", '<!DOCTYPE x [<!ENTITY a "b">]><svg>&a;</svg>', "declares entities"),
        ("a.svg", "<html/>", "it is <html>, not <svg>"),
        ("a.svg", "nothing", "it is not XML"),
        ("a.svg", "<svg/>", "the drawing has no lines"),
        ("a.svg", '<svg><path d="M0 0L1"/></svg>', "cannot be understood: Not enough coordinates"),
        ("a.svg", '<svg><path d="M0 0L1e999 0"/></svg>', "not finite or beyond 1e9"),
        ("a.svg", '<svg><path transform="turn(3)" d="M0 0L1 1"/></svg>', "unknown transform 'turn'"),
        ("a.svg", "<svg>" + "<g>" * 50_000 + "</g>" * 50_000 + "</svg>", "no lines"),
        ("a.svg", '<svg><path d="M0 0' + "h1" * 200_000 + '"/></svg>', "more than 200000 points"),
        ("a.svg", " " * 4_000_001, "it is too large: 4000001 bytes"),
        ("a.ndjson", "", "it has 0 drawings"),
        ("a.ndjson", '{"word": "hat"}', "line 1 cannot be read"),
        ("a.ndjson", '{"drawing": [[[1, 2], [1]]]}', "not a list of strokes"),
        ("a.ndjson", '{"drawing": [[[1, NaN], [1, 2]]]}', "not finite"),
        ("a.ndjson", "[" * 100_000, "line 1 cannot be read"),
    ],
)
def test_hostile_and_broken_files_are_one_error(tmp_path, name, text, message):
    path = write(tmp_path / name, text)
    with pytest.raises(ValueError, match=message) as error:
        SketchProcessor(16).preprocess(path)
    assert str(path) in str(error.value) and len(str(error.value)) < 600


def test_lines_outside_of_the_page_are_an_error(tmp_path):
    path = write(tmp_path / "far.svg", SVG.format('<path d="M500 500L900 900"/>'))
    with pytest.raises(ValueError, match="outside of its page"):
        SketchProcessor(16).preprocess(path, fit="page")
    assert (SketchProcessor(16).preprocess(path) < 0).any()


def test_limits_of_what_is_made_in_memory():
    with pytest.raises(ValueError, match=r"`strokes` have to be \[N, 2\]"):
        VectorSketch([np.zeros((3, 3))])
    with pytest.raises(ValueError, match="`page` has to have"):
        VectorSketch([np.eye(2)], (0.0, 0.0, 0.0, 1.0))
    with pytest.raises(ValueError, match="has no lines"):
        VectorSketch([np.ones((3, 2))])
    with pytest.raises(ValueError, match="does not exist"):
        vector_sketch.read_vector_sketches("none.svg")
