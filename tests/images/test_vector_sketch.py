# SPDX-License-Identifier: Apache-2.0
import json
import os
import resource
import shutil
import subprocess
import time

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw
from scipy import ndimage
from testing_utils import FIXTURES

from diffsketching_pipeline import SketchProcessor, VectorSketch
from diffsketching_pipeline.images import vector_sketch
from diffsketching_pipeline.images.svg import parse_svg
from diffsketching_pipeline.images.svg_rendering import SvgPicture


SVG = '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 100 100">{}</svg>'
DRAWINGS = FIXTURES / "drawings"
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
        ("a.svg", '<!DOCTYPE x [<!ENTITY a "b"><!ENTITY c "&a;">]><svg>&c;</svg>', "declares entities"),
        ("a.svg", '<!DOCTYPE x [<!ENTITY a SYSTEM "b.txt">]><svg>&a;</svg>', "declares entities"),
        (
            "a.svg",
            '<!DOCTYPE x [<!ATTLIST g a CDATA "{}">]><svg>{}</svg>'.format(9999 * "y", 99 * "<g/>"),
            "or attributes",
        ),
        (
            "a.svg",
            '<!DOCTYPE x [<!ENTITY a "{}">]><svg>{}</svg>'.format(999 * "b", 66 * "&a;"),
            "stand for 65934 characters",
        ),
        ("a.svg", '<?xml version="1.0" encoding="zip"?><svg/>', "in the encoding 'zip'"),
        ("a.svg", "<svg>" + "<g/>" * 900_000 + "</svg>", "more than 20000 elements"),
        ("a.svg", "<svg " + " ".join(f'a{i}="b"' for i in range(1001)) + "/>", "more than 1000 attributes"),
        (
            "a.svg",
            '<svg><path d="M0 0L9 9" transform="%s"/></svg>' % (60_001 * "scale(1)"),
            "more than 60000 transforms",
        ),
        ("a.svg", '<svg viewBox="0 0 9 9"><path fill="none" d="M0 0L9 9"/></svg>', "nothing of it is seen"),
        ("a.svg", "<html/>", "it is <html>, not <svg>"),
        ("a.svg", "nothing", "it is not XML"),
        ("a.svg", "<svg/>", "the drawing has no lines"),
        ("a.svg", '<svg><path d="M0 0L1"/></svg>', "cannot be understood: Not enough coordinates"),
        ("a.svg", '<svg><path d="M0 0L1e999 0"/></svg>', "not finite or beyond 1e9"),
        ("a.svg", '<svg><path transform="turn(3)" d="M0 0L1 1"/></svg>', "unknown transform 'turn'"),
        ("a.svg", "<svg>" + "<g>" * 50_000 + "</g>" * 50_000 + "</svg>", "more than 256 deep"),
        ("a.svg", '<svg><path d="M0 0' + "h1" * 200_000 + '"/></svg>', "more than 200000 points"),
        ("a.svg", " " * 4_000_001, "it is too large: 4000001 bytes"),
        ("a.ndjson", "", "it has 0 drawings"),
        ("a.ndjson", '{"word": "hat"}', "line 1 cannot be read"),
        ("a.ndjson", '{"drawing": [[[1, 2], [1]]]}', "not a list of strokes"),
        ("a.ndjson", '{"drawing": [[[1, NaN], [1, 2]]]}', "not finite"),
        ("a.ndjson", '{"drawing": [[[1, %s], [1, 2]]]}' % (400 * "9"), "not a list of strokes"),
        ("a.ndjson", "[" * 100_000, "line 1 cannot be read"),
    ],
)
def test_hostile_and_broken_files_are_one_error(tmp_path, name, text, message):
    path = write(tmp_path / name, text)
    with pytest.raises(ValueError, match=message) as error:
        SketchProcessor(16).preprocess(path)
    assert str(path) in str(error.value) and len(str(error.value)) < 600


def test_lines_outside_of_the_page_are_an_error(tmp_path):
    path = write(tmp_path / "far.svg", SVG.format('<path d="M500 500L900 900" stroke="black"/>'))
    for fit in ("page", "content"):
        with pytest.raises(ValueError, match="outside of its page"):
            SketchProcessor(16).preprocess(path, fit=fit)
    far = VectorSketch.from_svg(path.read_text())
    with pytest.raises(ValueError, match="outside of its page"):
        SketchProcessor(16).preprocess(far, fit="page")
    assert (SketchProcessor(16).preprocess(far) < 0).any()


def test_limits_of_what_is_made_in_memory():
    with pytest.raises(ValueError, match=r"`strokes` have to be \[N, 2\]"):
        VectorSketch([np.zeros((3, 3))])
    with pytest.raises(ValueError, match="`page` has to have"):
        VectorSketch([np.eye(2)], (0.0, 0.0, 0.0, 1.0))
    with pytest.raises(ValueError, match="has no lines"):
        VectorSketch([np.ones((3, 2))])
    with pytest.raises(ValueError, match="does not exist"):
        vector_sketch.read_vector_sketches("none.svg")


# ---- SVG means what a browser shows ----------------------------------------------------------------------------------


def distance(first, second):
    """Mean distance between the lines of two sketches `[1, 1, S, S]`, either way, as a share of the side."""
    first, second = ((sketch[0, 0] < 0).numpy() for sketch in (first, second))
    to_first, to_second = (ndimage.distance_transform_edt(~lines) for lines in (first, second))
    return (to_second[first].mean() + to_first[second].mean()) / 2 / first.shape[0]


@pytest.fixture(scope="module")
def processor():
    return SketchProcessor(64)


@pytest.fixture(scope="module")
def shirt(processor):
    return processor.preprocess(DRAWINGS / "00-plain.svg")


# Others are another drawing, or not the whole shirt: a browser's picture is what they are held against.
OTHERS = ("09", "16", "17", "18", "19", "20", "25")


@pytest.mark.parametrize("name", sorted(p.stem for p in DRAWINGS.glob("*.svg") if not p.stem.startswith(OTHERS)))
def test_the_same_shirt_is_read_from_every_way_to_save_it(processor, shirt, name):
    # Pens' outlines and the polyline have another neck: straight, or an arc.
    assert distance(processor.preprocess(DRAWINGS / f"{name}.svg"), shirt) < 0.02


def chromium_pictures(paths, folder, side=400):
    """Return what a browser shows of each file, from one page that shows them all."""
    browser = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("no Chromium to hold it against")
    sizes = []
    for path in paths:
        width, height = SvgPicture(parse_svg(path.read_bytes())).size
        sizes.append((round(width * side / max(width, height)), round(height * side / max(width, height))))
    shown = "".join(
        f'<img src="{path.resolve().as_uri()}" style="position:absolute;left:0;top:{side * i}px;width:{w}px;height:{h}px">'
        for i, (path, (w, h)) in enumerate(zip(paths, sizes, strict=True))
    )
    page = write(folder / "page.html", f'<body style="margin:0;background:#fff">{shown}</body>')
    shot = folder / "shot.png"
    command = [browser, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", f"--screenshot={shot}"]
    command += [
        f"--window-size={side},{side * len(paths) + 200}",
        f"--user-data-dir={folder / 'profile'}",
        page.as_uri(),
    ]
    subprocess.run(command, check=True, capture_output=True, timeout=300)
    with Image.open(shot) as whole:
        picture = whole.convert("RGB")
    return [picture.crop((0, side * i, w, side * i + h)) for i, (w, h) in enumerate(sizes)]


@pytest.mark.slow
def test_every_file_is_read_as_the_picture_that_a_browser_shows(tmp_path):
    processor = SketchProcessor(256)
    paths = [path for path in sorted(DRAWINGS.glob("*.svg")) if not path.stem.startswith("25")]
    for path, picture in zip(paths, chromium_pictures(paths, tmp_path), strict=True):
        found = distance(processor.preprocess(path), processor.preprocess(picture))
        assert found < 0.02, (path.name, found)


def test_plain_strokes_are_lines_and_anything_else_is_a_picture(tmp_path):
    def kind(body):
        [value] = vector_sketch.read_vector_sketches(write(tmp_path / "a.svg", SVG.format(body)))
        return type(value)

    plain = '<path d="M10 10H60V80H30" {}/>'
    stroke = 'fill="none" stroke="#222"'
    assert kind(plain.format(stroke)) is VectorSketch
    assert kind(f'<g {stroke} transform="scale(0.5)">{plain.format("")}</g><defs/><title>a</title>') is VectorSketch
    assert kind(plain.format('style="fill: none; stroke: currentColor"')) is VectorSketch
    assert kind('<line x1="10" y1="10" x2="60" y2="60" stroke="navy"/>') is VectorSketch
    odd = ["opacity='.5'", "stroke-dasharray='3'", "clip-path='url(#a)'", "stroke-width='20'", "visibility='hidden'"]
    for more in odd:
        assert kind(plain.format(f"{stroke} {more}")) is SvgPicture
    for paint in ('fill="none" stroke="white"', 'fill="none"', 'stroke="#222"', 'fill="none" stroke="url(#a)"'):
        assert kind(plain.format(paint)) is SvgPicture
    for other in (
        "<text>a</text>",
        '<use href="#a"/>',
        "<style/>",
        "<animate/>",
        '<path d="M80 80L95 95" stroke="#eee"/>',
    ):
        assert kind(plain.format(stroke) + other) is SvgPicture
    assert (
        kind('<rect x="1" y="1" width="98" height="98" fill="none" stroke="#222"/>' + plain.format(stroke))
        is SvgPicture
    )
    assert kind('<path d="M10 10H160" fill="none" stroke="#222"/>') is SvgPicture


def test_what_leads_out_of_the_file_is_not_followed_and_named(tmp_path, caplog):
    Image.new("L", (50, 50)).save(tmp_path / "black.png")
    outside = f'<image width="90" height="90" href="{tmp_path / "black.png"}"/><use href="{tmp_path / "a.svg"}#a"/>'
    shape = '<path d="M10 10H60V80H30" fill="none" stroke="#222"/>'
    path = write(tmp_path / "b.svg", SVG.format(shape + outside + "<script>a</script><foreignObject/>"))
    found = SketchProcessor(64).preprocess(path)
    assert distance(found, SketchProcessor(64).preprocess(VectorSketch.from_svg(SVG.format(shape)))) < 0.01
    for named in ("<image> of another file", "<use> of another file", "HTML"):
        assert named in caplog.text


def test_white_strokes_on_no_paper_are_strokes_and_on_dark_strokes_an_eraser(processor, shirt, tmp_path):
    text = (DRAWINGS / "00-plain.svg").read_text()
    white = write(tmp_path / "white.svg", text.replace("#1e1e1e", "white"))
    assert distance(processor.preprocess(white), shirt) < 0.01
    dark = write(
        tmp_path / "dark.svg",
        text.replace("#1e1e1e", "white").replace("<path", '<rect width="250" height="280"/><path'),
    )
    assert distance(processor.preprocess(dark), shirt) < 0.01


def test_a_small_drawing_on_a_large_page_is_drawn_close(processor, shirt, tmp_path):
    text = (DRAWINGS / "26-white-fill-shape.svg").read_text()
    assert (
        distance(processor.preprocess(write(tmp_path / "a.svg", text.replace("0 0 400 400", "0 0 9000 9000"))), shirt)
        < 0.005
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    "body",
    [
        '<filter id="f">'
        + 99 * '<feMorphology radius="40"/>'
        + '</filter><rect width="99" height="99" filter="url(#f)"/>',
        '<path d="M1 1L9 9" stroke="red" transform="%s"/>' % (20_000 * "a"),
        '<path d="M1 1L9 9" stroke="red" transform="%s"/>' % (10_000 * "a("),
    ],
)
def test_no_file_takes_more_than_two_seconds_of_the_processor(tmp_path, body):
    path, start, own = write(tmp_path / "slow.svg", SVG.format(body)), resource.getrusage, time.process_time()
    children = start(resource.RUSAGE_CHILDREN).ru_utime
    try:
        SketchProcessor(16).preprocess(path)
    except ValueError as error:
        assert "too much time or memory" in str(error)
    assert time.process_time() - own < 1 and start(resource.RUSAGE_CHILDREN).ru_utime - children < 1.5


def test_of_an_ndjson_file_only_what_is_asked_for_is_read(tmp_path):
    line = json.dumps({"drawing": STROKES})
    path = write(tmp_path / "many.ndjson", "\n".join([line, line, "broken"]))
    assert SketchProcessor(16).preprocess(path, max_drawings=2).shape[0] == 2
    with pytest.raises(ValueError, match="line 3 cannot be read"):
        SketchProcessor(16).preprocess(path)


@pytest.mark.parametrize("name", ["https://example.org/a.svg", "data:image/png;base64,AAAA"])
def test_an_address_is_no_file(name):
    with pytest.raises(ValueError, match="download it first"):
        SketchProcessor(16).preprocess(name)


def test_a_pipe_or_a_device_is_no_file(tmp_path):
    os.mkfifo(tmp_path / "pipe.svg")
    (tmp_path / "zero.ndjson").symlink_to("/dev/zero")
    for name in ("pipe.svg", "zero.ndjson"):
        with pytest.raises(ValueError, match="it is not a file"):
            SketchProcessor(16).preprocess(tmp_path / name)


SHIRT = "M70 40 20 80 45 115 65 100V240H185V100L205 115 230 80 180 40Q125 80 70 40Z"
SHEETS = {
    "is": ":is(path, g).i { stroke: #000 }",
    "where": ":where(.i) { stroke: #000 }",
    "not": "path:not(.gone) { stroke: #000 }",
    "nth": "path:nth-child(1) { stroke: #000 }",
    "has": "g:has(> path) { stroke: #000 }",
    "prefix": "path[class^=i] { stroke: #000 }",
    "important": ".i { stroke: #000 !important } #k { stroke: none }",
    "specificity": "#k { stroke: #000 } .i { stroke: none }",
    "variable": ":root { --s: var(--t); --t: #000 } path { stroke: var(--s) }",
    "fallback": "path { stroke: var(--zz, rgb(0, 0, 0)) }",
    "light-dark": "path { stroke: light-dark(rgb(0, 0, 0), white) }",
    "screen": "@media screen { path { stroke: #000 } }",
    "not print": "@media not print { path { stroke: #000 } }",
    "print": "path { stroke: #000 } @media print { path { stroke: none } }",
    "dark": "path { stroke: #000 } @media (prefers-color-scheme: dark) { path { stroke: none } }",
    "layer": "@layer a { path { stroke: #000 } }",
    "supports": "@supports (fill: none) { path { stroke: #000 } }",
    "unknown rules": "path:frob(1) { stroke: none } @frob { path { stroke: none } } path { stroke: #000 }",
    "unset": "g { stroke: #000 } path { stroke: red } .i { stroke: unset }",
}


@pytest.mark.parametrize("name", SHEETS)
def test_style_sheets_are_what_a_browser_makes_of_them(tmp_path, name):
    style = f"<style>{SHEETS[name].replace('>', '&gt;')} .gone {{ display: none }}</style>"
    shapes = f'<g><path id="k" class="i" d="{SHIRT}" fill="none" stroke-width="3"/></g>'
    gone = '<circle class="gone" cx="125" cy="140" r="120" stroke="#000"/>'
    page = '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 250 280">{}</svg>'
    plain = page.format(f'<path d="{SHIRT}" fill="none" stroke="black" stroke-width="3"/>')
    paths = [write(tmp_path / "styled.svg", page.format(style + shapes + gone)), write(tmp_path / "plain.svg", plain)]
    styled, expected = (SvgPicture(parse_svg(path.read_bytes())).draw()[0] for path in paths)
    assert np.array_equal(styled, expected)


@pytest.mark.parametrize(
    ("shape", "plain"),
    [
        ('<rect style="x:30px;y:20px;width:50px;height:70px"/>', '<rect x="30" y="20" width="50" height="70"/>'),
        ("<path d='M0 0' style=\"d:path('M10 10H90V50Z')\"/>", '<path d="M10 10H90V50Z"/>'),
        ('<path style="translate:20px 10px;scale:.5" d="M10 10H90V50Z"/>', '<path transform="translate(20 10) scale(.5)" d="M10 10H90V50Z"/>'),
        ('<path style="transform:skew(10deg,5deg)" d="M10 10H90V50Z"/>', '<path transform="matrix(1 .0874887 .176327 1 0 0)" d="M10 10H90V50Z"/>'),
        ('<rect x="40q" y="1REM" width="80Q" height="2rem"/>', '<rect x="37.795" y="16" width="75.591" height="32"/>'),
        ('<symbol id="s" viewBox="0 0 10 10"><path d="M1 1H9V5Z"/></symbol><use href="#s" x="50%" width="50%" height="50%"/>',
         '<symbol id="s" viewBox="0 0 10 10"><path d="M1 1H9V5Z"/></symbol><use href="#s" x="50" width="50" height="50"/>'),
        ('<path style="--a:M;stroke:var(--none)" d="M10 10H90V50Z"/>', '<path d="M10 10H90V50Z"/>'),
    ],
)  # fmt: skip
def test_geometry_in_a_style_is_read(shape, plain):
    drawn = []
    for text in (shape, plain):
        body = f'<g fill="none" stroke="CurrentColor" stroke-width="2">{text}<text/></g>'
        drawn.append(SvgPicture(parse_svg(SVG.format(body))).draw()[0].astype(int))
    assert drawn[0].min() < 50 and np.abs(drawn[0] - drawn[1]).max() <= 3


def test_style_sheets_are_bounded():
    rules = "".join(f".a{n} {{ stroke: red }}" for n in range(2000))
    variables = ":root { --v0: black;" + "".join(f"--v{n}: {9 * f'var(--v{n - 1}) '};" for n in range(1, 30)) + "}"
    for sheet in (20 * rules, variables + " path { stroke: var(--v29) }", "@media screen {" * 3000, "a" + 5000 * "("):
        body = f"<style>{sheet}</style>" + 2000 * '<path d="M10 10H90V50Z" stroke="black"/>'
        began = time.process_time()
        try:
            SvgPicture(parse_svg(SVG.format(body))).draw()
        except ValueError as error:
            assert len(str(error)) < 300
        assert time.process_time() - began < 2
