# SPDX-License-Identifier: Apache-2.0
"""Draws the six drawings next to this file, stroke by stroke: python draw.py"""

import logging
import os
import runpy
import shutil
import struct
import subprocess
import sys
import zlib

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw, features
from scipy import ndimage
from testing_utils import ROOT

from diffsketching_pipeline.images import reading
from diffsketching_pipeline.images.reading import (
    MAX_SKETCH_SIDE,
    preprocess_mask,
    preprocess_photos,
    read_photo,
)
from diffsketching_pipeline.images.sketch_processor import SketchProcessor
from diffsketching_pipeline.images.surround import find_sheet


DRAWINGS = ROOT / "examples" / "drawings"
# An open zigzag, as shares of the page's shorter side.
ZIGZAG = [(0.15, 0.2), (0.85, 0.3), (0.2, 0.5), (0.8, 0.8), (0.3, 0.75)]


def draw(size=(256, 256), width=4, points=ZIGZAG, paper=255, ink=0, mode="L", scale=1.0, shift=(0.0, 0.0)):
    image = Image.new(mode, size, paper)
    side = min(size)
    path = [(side * (scale * x + shift[0]), side * (scale * y + shift[1])) for x, y in points]
    pen = ImageDraw.Draw(image)
    pen.line(path, fill=ink, width=width)
    if width > 2:
        for x, y in path:
            pen.ellipse((x - width / 2, y - width / 2, x + width / 2, y + width / 2), fill=ink)
    return image


def photograph(drawing, seed=0, contrast=0.4, shade=0.5, noise=6.0):
    """Pencil on paper that the light falls on from one corner."""
    rng = np.random.default_rng(seed)
    ink = ndimage.gaussian_filter(1 - np.asarray(drawing) / 255.0, 1.0) * contrast
    y, x = np.mgrid[0 : 1 : ink.shape[0] * 1j, 0 : 1 : ink.shape[1] * 1j]
    light = 230 * (1 - shade * (0.6 * x + 0.4 * y))
    return Image.fromarray(np.uint8(np.clip((1 - ink) * light + noise * rng.standard_normal(ink.shape), 0, 255)))


def farthest(sketch, reference):
    """Distance in pixels of the dark pixels of either sketch from those of the other, the largest (Hausdorff)."""
    first, second = (np.asarray(s).squeeze() < 0 for s in (sketch, reference))
    to_first, to_second = (ndimage.distance_transform_edt(~s) for s in (first, second))
    return max(to_second[first].max(), to_first[second].max())


def dark_box(sketch):
    """Left, top, right and bottom of the dark pixels."""
    rows, columns = (np.flatnonzero((np.asarray(sketch).squeeze() < 0).any(axis)) for axis in (1, 0))
    return [columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]


@pytest.fixture(scope="module")
def processor():
    return SketchProcessor(resolution=64)


@pytest.fixture(scope="module")
def reference(processor):
    return processor.preprocess(draw())


def test_convention(processor, reference):
    assert reference.shape == (1, 1, 64, 64) and reference.dtype == torch.float32
    assert reference.min() == -1 and reference.max() == 1
    assert (reference == 1).float().mean() > 0.8
    assert torch.equal(reference, processor.preprocess(draw()))
    assert processor.preprocess(draw(), height=32, width=48).shape == (1, 1, 32, 48)


@pytest.mark.parametrize(
    "size, width",
    [((64, 64), 1), ((256, 256), 1), ((256, 256), 20), ((4096, 4096), 1), ((700, 300), 3), ((90, 1500), 2)],
)
def test_lines_come_out_alike_whatever_their_width_and_the_page(processor, reference, size, width):
    sketch = processor.preprocess(draw(size, width))
    # Where thick lines meet or end, their center is uncertain by half their width.
    assert farthest(sketch, reference) <= max(2, 1.2 + 64 * width / min(size) / 2)
    assert (1 - sketch).sum().item() == pytest.approx((1 - reference).sum().item(), rel=0.12)


@pytest.mark.parametrize("resolution, pixels", [(64, 4), (128, 8)])
def test_line_width_is_a_share_of_the_output(resolution, pixels):
    line = draw(points=[(0.1, 0.5), (0.9, 0.5)], width=3)
    column = SketchProcessor(resolution, line_width=1 / 16).preprocess(line)[0, 0, :, resolution // 2]
    assert ((1 - column) / 2).sum().item() == pytest.approx(pixels, abs=0.3)
    assert (column == -1).sum() == pixels


def test_double_strokes_become_one(processor):
    once = draw((512, 512), 3)
    twice = Image.fromarray(np.minimum(once, draw((512, 512), 3, shift=(0.0, 0.01))))
    first, second = processor.preprocess([once, twice])
    assert (1 - second).sum().item() == pytest.approx((1 - first).sum().item(), rel=0.1)


@pytest.mark.parametrize("scale, shift", [(0.05, (0.9, 0.02)), (0.9, (0.05, 0.05))])
def test_content_is_centered_and_scaled_to_the_margin(processor, reference, scale, shift):
    sketch = processor.preprocess(draw((2000, 2000), 3, scale=scale, shift=shift))
    assert farthest(sketch, reference) <= 1.5
    left, top, right, bottom = dark_box(sketch)
    assert [left, 64 - right] == pytest.approx([2, 2], abs=1.1)
    assert abs(top - (64 - bottom)) <= 1


def test_page_keeps_its_place_and_is_padded(processor):
    # A 128 x 64 page shrinks to half and is centered: x -> x / 2, y -> y / 2 + 16.
    page = draw((128, 64), 3, points=[(0.25, 0.5), (1.75, 0.5)])
    sketch = processor.preprocess(page, fit="page")
    assert dark_box(sketch) == pytest.approx([8, 31, 56, 33], abs=1)
    stretched = processor.preprocess(page, fit="page", resize_mode="stretch")
    assert dark_box(stretched) == pytest.approx([8, 31, 56, 33], abs=1)
    high = draw((128, 64), 3, points=[(0.25, 0.25), (1.75, 0.25)])
    assert dark_box(processor.preprocess(high, fit="page"))[1] == pytest.approx(23, abs=1)
    assert dark_box(processor.preprocess(high, fit="page", resize_mode="stretch"))[1] == pytest.approx(15, abs=1)


def test_aspect_ratio_is_kept_unless_asked(processor):
    box = draw((300, 300), 4, points=[(0.1, 0.4), (0.9, 0.4), (0.9, 0.6), (0.1, 0.6), (0.1, 0.4)])
    left, top, right, bottom = dark_box(processor.preprocess(box))
    assert (right - left) / (bottom - top) == pytest.approx(4, rel=0.15)
    left, top, right, bottom = dark_box(processor.preprocess(box, resize_mode="stretch"))
    assert [right - left, bottom - top] == pytest.approx([60, 60], abs=2)


def test_every_pil_mode_gives_the_same(processor, reference):
    page = draw()
    ink = Image.eval(page, lambda value: 255 - value)
    transparent = Image.merge("LA", [Image.new("L", page.size, 0), ink])
    palette = page.convert("P")
    palette.info["transparency"] = palette.getpixel((0, 0))
    levels = np.asarray(page)
    images = [page.convert(mode) for mode in ("1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr", "HSV", "I", "F")]
    images += [transparent, transparent.convert("RGBA"), palette]
    images += [Image.fromarray(levels.astype(np.uint16) * 257), Image.fromarray(levels.astype(np.float32) / 255)]
    assert {image.mode for image in images} >= {"1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "I;16", "I", "F"}
    for image in images:
        assert (processor.preprocess(image) - reference).abs().max() <= 0.02, image.mode


def test_every_array_layout_gives_the_same(processor, reference):
    levels = np.asarray(draw())
    unit = torch.from_numpy(levels / 255.0)
    rgb = np.repeat(levels[..., None], 3, axis=2)
    for value in (
        levels,
        levels[..., None],
        levels[None],
        rgb,
        levels > 127,
        levels.astype(np.uint16) * 257,
        levels / 255.0,
        levels / 127.5 - 1,
        torch.from_numpy(levels.copy()),
        unit,
        unit[None].half(),
        2 * unit[None].bfloat16() - 1,
        unit.expand(3, -1, -1),
        unit.expand(1, 3, -1, -1),
        torch.stack([torch.zeros_like(unit)] * 3 + [1 - unit]),
    ):
        assert (processor.preprocess(value) - reference).abs().max() <= 0.02, (type(value), value.dtype, value.shape)


def test_zero_is_mid_gray_in_floats_with_a_negative_value(processor):
    page = np.asarray(draw()) / 127.5 - 1
    page[236:240, 60:200] = 0.0
    for value in (page, torch.from_numpy(page)):
        below = processor.preprocess(value, threshold=0.45, fit="page")[0, 0]
        above = processor.preprocess(value, threshold=0.55, fit="page")[0, 0]
        assert (below[57:] == 1).all() and (above[57:].amin(0)[16:49] < 0).all()


def test_a_batch_is_several_results_and_a_nested_list_several_drawings_of_one(processor, reference, tmp_path):
    other = draw(points=[(0.2, 0.2), (0.8, 0.8), (0.2, 0.8)])
    path = tmp_path / "zigzag.png"
    draw().save(path)
    batch = torch.from_numpy(np.stack([np.asarray(draw()), np.asarray(other)]))[:, None]
    assert processor.preprocess(batch).shape == (2, 1, 64, 64)
    assert [len(group) for group in processor.preprocess_groups(batch)] == [1, 1]
    groups = processor.preprocess_groups([[other, str(path)], path, batch])
    assert [len(group) for group in groups] == [2, 1, 2]
    for sketch in (groups[0][1], groups[1][0], groups[2][0]):
        assert torch.equal(sketch, reference[0])
    assert torch.equal(groups[0][0], groups[2][1])
    assert torch.equal(torch.cat(groups), processor.preprocess(groups))


def test_white_on_black_is_inverted_with_a_warning(processor, reference, tmp_path, caplog):
    path = tmp_path / "chalk.png"
    draw(paper=0, ink=255).save(path)
    with caplog.at_level(logging.WARNING):
        sketches = processor.preprocess([draw(), path])
    assert torch.equal(sketches[1], reference[0])
    assert len(caplog.records) == 1 and "sketch 1" in caplog.text and "chalk.png" in caplog.text
    caplog.clear()
    assert torch.equal(processor.preprocess(path, invert=True), reference)
    assert torch.equal(SketchProcessor(64, invert=True).preprocess(path), reference)
    assert not caplog.records
    as_it_is = SketchProcessor(64, line_width=None).preprocess(path, invert=False, fit="page")
    assert (as_it_is[0, 0, :8] == -1).all() and (as_it_is > 0).any()


def test_dark_drawings_are_not_taken_for_dark_paper(processor, caplog):
    filled = Image.new("L", (200, 200), 255)
    ImageDraw.Draw(filled).rectangle((20, 20, 180, 180), fill=0)
    framed = draw()
    ImageDraw.Draw(framed).rectangle((0, 0, 255, 255), outline=0, width=4)
    shaded = photograph(draw((600, 600), 6), shade=0.8)
    processor.preprocess([filled, framed, shaded])
    assert not caplog.records


def test_transparent_pages_with_white_strokes(processor, reference):
    ink = Image.eval(draw(), lambda value: 255 - value)
    white, yellow = (Image.new("RGBA", ink.size, color) for color in ("white", "yellow"))
    for image in (white, yellow):
        image.putalpha(ink)
        assert (processor.preprocess(image) - reference).abs().max() <= 0.02


def test_colored_strokes_on_white(processor, reference):
    for ink in ("yellow", "red", "blue", "cyan"):
        assert farthest(processor.preprocess(draw(ink=ink, paper="white", mode="RGB")), reference) <= 1.5, ink


def test_pencil_on_unevenly_lit_paper(processor):
    drawing = draw((900, 1200), 6)
    sketch = processor.preprocess(photograph(drawing))
    assert farthest(sketch, processor.preprocess(drawing)) <= 2
    dark_board = Image.eval(photograph(drawing), lambda value: 255 - value)
    assert farthest(processor.preprocess(dark_board), processor.preprocess(drawing)) <= 2


def test_a_large_noisy_photo_and_the_edge_of_a_shadow(processor):
    drawing = draw((1600, 2000), 12, scale=0.8, shift=(0.1, 0.1))
    noisy = photograph(drawing, contrast=0.3, noise=30.0, shade=0.3)
    shadow = Image.new("L", drawing.size, 255)
    ImageDraw.Draw(shadow).polygon([(0, 2000), (0, 1500), (1200, 2000)], fill=140)
    shaded = np.asarray(photograph(drawing, shade=0.2)) * (np.asarray(shadow) / 255.0)
    for image in (noisy, Image.fromarray(shaded.astype(np.uint8))):
        assert farthest(processor.preprocess(image), processor.preprocess(drawing)) <= 2


def test_grain_dust_and_jpeg_blocks_are_no_strokes(processor, reference, tmp_path):
    rng = np.random.default_rng(0)
    page = np.array(draw((500, 500), 5))
    page[tuple(rng.integers(0, 500, (2, 40)))] = 60
    path = tmp_path / "scan.jpg"
    Image.fromarray(page).save(path, quality=25)
    assert farthest(processor.preprocess(path), reference) <= 1.5
    blank = photograph(Image.new("L", (500, 500), 255))
    with pytest.raises(ValueError, match="sketch 0 holds no drawing"):
        processor.preprocess(blank)


def test_frame_and_table_are_left_out(processor):
    drawing = draw((600, 600), 6, scale=0.8, shift=(0.1, 0.1))
    expected = processor.preprocess(drawing)
    framed = drawing.copy()
    ImageDraw.Draw(framed).rectangle((0, 0, 599, 599), outline=0, width=5)
    table = Image.new("L", (800, 780), 40)
    table.paste(photograph(drawing, shade=0.2), (90, 80))
    for image in (framed, table):
        assert farthest(processor.preprocess(image), expected) <= 2


def test_threshold_decides_about_faint_lines(processor):
    page = draw()
    ImageDraw.Draw(page).line((40, 240, 220, 240), fill=200, width=4)
    with_faint = processor.preprocess(page, threshold=0.9, fit="page")
    without = processor.preprocess(page, threshold=0.5, fit="page")
    assert (with_faint[0, 0, 59:61, 12:53].amin(0) < 0).all()
    assert (without[0, 0, 56:] == 1).all()


def test_filled_shapes_become_outlines_unless_widths_are_kept(processor):
    shirt = [(0.3, 0.1), (0.7, 0.1), (0.95, 0.4), (0.75, 0.5), (0.75, 0.9), (0.25, 0.9), (0.25, 0.5), (0.05, 0.4)]
    outline = draw((512, 512), 4, points=[*shirt, shirt[0]])
    expected = processor.preprocess(outline)
    for ink, paper in ((120, 255), (210, 255), (0, 255), (255, 0)):
        filled = Image.new("L", (512, 512), paper)
        ImageDraw.Draw(filled).polygon([(512 * x, 512 * y) for x, y in shirt], fill=ink)
        sketch = processor.preprocess(filled)
        assert farthest(sketch, expected) <= 2, ink
        assert (sketch[0, 0, 24:40, 26:38] == 1).all(), ink
    kept = SketchProcessor(64, line_width=None).preprocess(filled)
    assert (kept[0, 0, 24:40, 26:38] == -1).all()
    # A drawing colored in keeps the lines inside.
    colored = np.where(np.asarray(outline) < 128, 0, np.where(np.asarray(filled) > 0, 150, 255)).astype(np.uint8)
    colored[150:350, 254:259] = 0
    details = processor.preprocess(colored)
    assert (details[0, 0, 24:40, 30:34].amin(1) < 0).all()
    assert farthest(processor.preprocess(outline), details) > 5


def test_a_tensor_in_the_convention_is_passed_through(processor, reference, caplog):
    soft = reference * 0.7 + 0.3
    assert torch.equal(processor.preprocess(soft), soft)
    assert torch.equal(processor.preprocess(list(soft)), soft)
    assert not caplog.records
    assert torch.equal(processor.preprocess(-reference), reference)
    assert "inverted" in caplog.text
    # What is not in the convention is redrawn, and hardly changes.
    again = processor.preprocess((reference + 1) / 2)
    assert not torch.equal(again, reference) and farthest(again, reference) <= 1.5


def test_exif_orientation(processor, reference, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # shown turned by 90 degrees clockwise
    path = tmp_path / "phone.jpg"
    draw().transpose(Image.Transpose.ROTATE_90).save(path, exif=exif, quality=95)
    assert farthest(processor.preprocess(path), reference) <= 1.5


# ---- pages in surroundings, on patterns, on no paper ------------------------------------------------------------------

SHIRT = [(0.28, 0.14), (0.08, 0.28), (0.18, 0.41), (0.26, 0.36), (0.26, 0.86), (0.74, 0.86), (0.74, 0.36)]
SHIRT += [(0.82, 0.41), (0.92, 0.28), (0.72, 0.14), (0.6, 0.22), (0.4, 0.22), (0.28, 0.14)]


def shirt(size=(500, 560), **options):
    return draw(size, width=options.pop("width", 5), points=SHIRT, **options)


def on_a_table(share, turn, level=60, size=(450, 600)):
    """A sheet that covers this share of a dark table, turned; and the drawing alone, as it is turned."""
    rng = np.random.default_rng(0)
    height = round((share * size[0] * size[1] * 1.3) ** 0.5)
    turned = [
        shirt((round(height / 1.3), height), width=3, paper=paper, ink=ink, mode="RGB").rotate(
            turn, Image.Resampling.BICUBIC, expand=True, fillcolor=fill
        )
        for paper, ink, fill in (((225, 225, 225), (40, 40, 40), (level,) * 3), ((255,) * 3, (0, 0, 0), (255,) * 3))
    ]
    table = Image.new("RGB", size, (level,) * 3)
    table.paste(turned[0], ((size[0] - turned[0].width) // 2, (size[1] - turned[0].height) // 2))
    noisy = np.asarray(table.convert("L")) + 3 * rng.standard_normal(size[::-1])
    return Image.fromarray(np.uint8(np.clip(noisy, 0, 255))), turned[1].convert("L")


@pytest.mark.parametrize("share, turn, level", [(0.26, 0, 60), (0.26, 25, 60), (0.3, 10, 110), (0.7, 3, 60)])
def test_a_sheet_on_a_dark_table_is_the_page(processor, caplog, share, turn, level):
    picture, drawing = on_a_table(share, turn, level)
    assert farthest(processor.preprocess(picture), processor.preprocess(drawing)) <= 1.5
    assert "inverted" not in caplog.text


@pytest.mark.parametrize("left, top, right, bottom", [(400, 0, 400, 0), (0, 90, 0, 90), (30, 25, 0, 40), (0, 0, 9, 0)])
def test_bars_and_dark_edges_are_no_strokes(processor, left, top, right, bottom):
    page = Image.new("L", (500 + left + right, 560 + top + bottom), 15)
    page.paste(shirt(), (left, top))
    assert farthest(processor.preprocess(page), processor.preprocess(shirt())) <= 1.5


def test_a_shape_that_only_resembles_a_sheet_is_drawn(processor):
    box = [(0.1, 0.1), (0.9, 0.1), (0.9, 0.9), (0.1, 0.9), (0.1, 0.1)]
    outline = processor.preprocess(draw(points=box))
    assert farthest(processor.preprocess(draw(points=box, paper=10, ink=240)), outline) <= 1.5
    disc = Image.new("L", (300, 300), 10)
    ImageDraw.Draw(disc).ellipse((40, 40, 260, 260), fill=245)
    ImageDraw.Draw(disc).line((90, 150, 210, 150), fill=10, width=4)
    assert find_sheet(np.asarray(disc)) is None
    assert dark_box(processor.preprocess(disc)) == [1, 1, 63, 63]


@pytest.mark.parametrize("kind, step", [("grid", 12), ("grid", 25), ("rules", 25), ("dots", 12)])
@pytest.mark.parametrize("paper, pattern, ink", [(255, 185, 0), (25, 65, 240)])
def test_dark_strokes_win_over_a_pale_pattern(processor, kind, paper, pattern, ink, step):
    page = Image.new("L", (500, 560), paper)
    pen = ImageDraw.Draw(page)
    for y in range(step // 2, 560, step):
        if kind == "dots":
            for x in range(step // 2, 500, step):
                pen.rectangle((x, y, x + 1, y + 1), fill=pattern)
        else:
            pen.line((0, y, 500, y), fill=pattern)
    for x in range(step // 2, 500, step) if kind == "grid" else (60,) if kind == "rules" else ():
        pen.line((x, 0, x, 560), fill=pattern)
    strokes = Image.fromarray(np.asarray(shirt()) < 128)
    page.paste(ink, mask=strokes)
    assert farthest(processor.preprocess(page), processor.preprocess(shirt())) <= 1.5


def test_pale_lines_that_are_no_pattern_of_the_page_are_kept(processor):
    page, dark = shirt(), shirt()
    for image, ink in ((page, 150), (dark, 0)):
        for y in range(220, 470, 20):
            ImageDraw.Draw(image).line((150, y, 350, y), fill=ink, width=3)
    assert farthest(processor.preprocess(page), processor.preprocess(dark)) <= 1


@pytest.mark.parametrize("colors", [("white", "black"), ("white",), ("#ffc8c8", "#f0f05a", "#5ac8ff")])
def test_on_a_transparent_page_ink_is_where_alpha_is(processor, colors):
    page = Image.new("RGBA", (500, 560))
    pen = ImageDraw.Draw(page)
    points = [(500 * x, 500 * y) for x, y in SHIRT]
    for i, line in enumerate(zip(points, points[1:], strict=False)):
        pen.line(line, fill=colors[i % len(colors)], width=5)
    assert farthest(processor.preprocess(page), processor.preprocess(shirt())) <= 1.5


def test_a_white_fill_on_a_transparent_page_is_no_ink(processor):
    page = Image.new("RGBA", (500, 500))
    points = [(500 * x, 500 * y) for x, y in SHIRT]
    pen = ImageDraw.Draw(page)
    pen.polygon(points, fill="white")
    pen.line(points, fill="black", width=5)
    pen.line((180, 300, 320, 300), fill="black", width=5)
    inside = processor.preprocess(page)[0, 0, 20:44, 26:38]
    assert (inside < 0).any(1).sum() in (1, 2)


# ---- files that are large, moving or without an end -------------------------------------------------------------------


@pytest.mark.parametrize("suffix", ["gif", "webp", "png"])
def test_a_time_lapse_is_read_at_its_last_frame(processor, tmp_path, suffix):
    frames = [Image.new("L", (256, 256), 255), draw(points=ZIGZAG[:2]), draw(points=ZIGZAG[:4]), draw()]
    frames[0].save(tmp_path / f"a.{suffix}", save_all=True, append_images=frames[1:], duration=100)
    assert farthest(processor.preprocess(tmp_path / f"a.{suffix}"), processor.preprocess(draw())) <= 1
    frames[-1].save(tmp_path / f"b.{suffix}", save_all=True, append_images=frames[:1], duration=100)
    assert farthest(processor.preprocess(tmp_path / f"b.{suffix}"), processor.preprocess(draw())) <= 1


def test_a_long_animation_is_refused_with_its_name(processor, tmp_path, monkeypatch):
    monkeypatch.setattr(reading, "_MAX_ANIMATION", 3 * 256 * 256)
    frames = [Image.new("L", (256, 256), level) for level in (255, 254, 253, 252)]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    with pytest.raises(ValueError, match=r"a.gif'\) is an animation of 4 frames"):
        processor.preprocess(tmp_path / "a.gif")


def test_a_jpeg_of_many_scans_is_refused(processor, tmp_path):
    path = tmp_path / "a.jpg"
    draw().save(path, progressive=True)
    assert processor.preprocess(path).min() == -1
    data = path.read_bytes()
    path.write_bytes(data[:-2] + 500 * data[data.rfind(b"\xff\xda") : -2] + data[-2:])
    with pytest.raises(ValueError, match="scans; save it as PNG"):
        processor.preprocess(path)


def test_a_pipe_and_a_device_are_refused(processor, tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "zero.jpg").symlink_to("/dev/zero")
    for name in ("pipe.png", "zero.jpg"):
        with pytest.raises(ValueError, match=rf"{name}'.*it is not a file"):
            processor.preprocess(tmp_path / name)


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGBA", "I;16"])
def test_a_very_large_picture_is_made_smaller_first(processor, reference, tmp_path, monkeypatch, mode):
    # As 64 megapixels are to what is traced at most.
    monkeypatch.setattr(reading, "_MAX_TRACED_PIXELS", 300 * 300)
    page = draw((600, 600), 6)
    page = Image.fromarray(np.asarray(page).astype(np.uint16) * 257) if mode == "I;16" else page.convert(mode)
    exif = Image.Exif()
    exif[0x0112] = 3  # shown upside down
    page.transpose(Image.Transpose.ROTATE_180).save(tmp_path / "large.png", exif=exif)
    assert farthest(processor.preprocess(tmp_path / "large.png"), reference) <= 1.5
    if mode == "L":
        page.save(tmp_path / "large.jpg")
        assert farthest(processor.preprocess(tmp_path / "large.jpg"), reference) <= 1.5


@pytest.mark.parametrize(
    "suffix, options, parts",
    [("webp", {}, 4), ("avif", {}, 4), ("jpg", {"progressive": True}, 2), ("jpg", {}, 1), ("png", {}, 1)],
)
def test_what_decoders_hold_several_times_has_a_lower_limit(processor, tmp_path, monkeypatch, suffix, options, parts):
    if suffix == "avif" and not features.check("avif"):
        pytest.skip("Pillow reads no AVIF here")
    draw((200, 200), 6).save(tmp_path / f"page.{suffix}", **options)
    monkeypatch.setattr(reading, "MAX_SKETCH_PIXELS", 200 * 200 * parts)
    processor.preprocess(tmp_path / f"page.{suffix}")
    monkeypatch.setattr(reading, "MAX_SKETCH_PIXELS", 200 * 200 * parts - 1)
    with pytest.raises(ValueError, match=rf"page.{suffix}'.*too large: 200 x 200"):
        processor.preprocess(tmp_path / f"page.{suffix}")


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="memory is measured on Linux")
@pytest.mark.parametrize("name, mode", [("large.png", "RGBA"), ("large.tif", "RGBA"), ("large.jpg", "CMYK")])
def test_64_megapixels_are_read_in_300_megabytes(tmp_path, name, mode):
    options = {"compression": "tiff_lzw"} if name == "large.tif" else {}
    draw((8000, 8000), 80).convert(mode).save(tmp_path / name, **options)
    code = """
import re, sys
from diffsketching_pipeline import SketchProcessor

def megabytes(name):
    return int(re.search(name + r":\\s+(\\d+)", open("/proc/self/status").read())[1]) / 1024

processor = SketchProcessor(64)
processor.preprocess(sys.argv[1])
open("/proc/self/clear_refs", "w").write("5")
before = megabytes("VmRSS")
strokes = int((processor.preprocess(sys.argv[2]) < 0).sum())
print(strokes, megabytes("VmHWM") - before)
"""
    words = [sys.executable, "-c", code, str(DRAWINGS / "hat.png"), str(tmp_path / name)]
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    strokes, megabytes = map(float, done.stdout.split())
    expected = int((SketchProcessor(64).preprocess(draw((800, 800), 8)) < 0).sum())
    assert abs(strokes - expected) <= 0.02 * expected and megabytes < 300


@pytest.mark.parametrize("threshold", ["otsu", 0.5])
def test_a_pale_rule_on_the_border_is_no_stroke(processor, reference, threshold):
    page = np.asarray(draw()).copy()
    page[np.arange(256) % 24 < 3] = np.minimum(page[np.arange(256) % 24 < 3], 170)
    assert farthest(processor.preprocess(page, threshold=threshold), reference) <= 1.5


def test_config_round_trip(tmp_path):
    processor = SketchProcessor(resolution=32, threshold=0.6, fit="page", line_width=None)
    processor.save_config(tmp_path)
    loaded = SketchProcessor.from_config(SketchProcessor.load_config(tmp_path))
    assert (loaded.config.resolution, loaded.config.threshold, loaded.config.fit) == (32, 0.6, "page")
    assert loaded.config.line_width is None
    assert torch.equal(loaded.preprocess(draw()), processor.preprocess(draw()))


def png_header(width, height):
    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"\0")) + chunk(b"IEND", b"")


def bad_files(folder):
    draw((400, 400)).save(folder / "whole.png")
    draw((400, 400)).save(folder / "whole.jpg")
    for name in ("whole.png", "whole.jpg"):
        data = (folder / name).read_bytes()
        (folder / f"truncated{name[-4:]}").write_bytes(data[: len(data) // 2])
    (folder / "huge.png").write_bytes(png_header(30_000, 30_000))
    (folder / "large.png").write_bytes(png_header(9_000, 8_000))
    (folder / "long.png").write_bytes(png_header(MAX_SKETCH_SIDE + 1, 10))
    (folder / "text.png").write_text("no image")
    (folder / "page.eps").write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n")
    (folder / "folder.png").mkdir()
    Image.new("L", (50, 50), 255).save(folder / "blank.png")
    Image.new("RGB", (50, 50), 0).save(folder / "black.png")
    Image.new("RGBA", (50, 50), 0).save(folder / "clear.png")


@pytest.mark.parametrize(
    "name, message",
    [
        ("truncated.png", "damaged or truncated"),
        ("huge.png", "too large.*64 megapixels"),
        ("large.png", "too large: 9000 x 8000"),
        ("long.png", f"too large.*{MAX_SKETCH_SIDE} pixels a side"),
        ("text.png", "cannot be read as an image"),
        ("page.eps", "cannot be read as an image"),
        ("folder.png", "cannot be read as an image"),
        ("missing.png", "does not exist"),
        ("blank.png", "holds no drawing: it is blank"),
        ("black.png", "holds no drawing: it is all dark"),
        ("clear.png", "holds no drawing: it is fully transparent"),
    ],
)
def test_bad_files_are_named(processor, tmp_path, name, message):
    bad_files(tmp_path)
    with pytest.raises(ValueError, match=rf"(?s)sketch 1 \('.*{name}'\).*{message}"):
        processor.preprocess([tmp_path / "whole.png", tmp_path / name])
    if name not in ("blank.png", "black.png", "clear.png"):
        with pytest.raises(ValueError, match=rf"(?s){name}'.*{message}"):
            SketchProcessor.load(tmp_path / name)


def test_headers_and_arrays_are_checked_before_anything_is_decoded(processor, tmp_path):
    bad_files(tmp_path)
    with pytest.raises(ValueError, match=r"sketch 1 has dtype int64"):
        processor.preprocess([tmp_path / "truncated.png", np.zeros((9, 9), dtype=np.int64)])


@pytest.mark.parametrize(
    "value, message",
    [
        (torch.full((9, 9), float("nan")), "NaN"),
        (np.array([[0.0, np.inf]]), "NaN or infinite"),
        (torch.zeros(1, 9, 9), "0 everywhere.*`sketch=None`"),
        (torch.zeros(9, 9, dtype=torch.uint8), "all dark"),
        (torch.ones(9, 9), "blank"),
        (255 * torch.rand(9, 9), "pass values of 0 to 255 as uint8"),
        (np.zeros((9, 9), dtype=np.int32), "dtype int32"),
        (torch.rand(2, 9, 9), r"shape \[2, 9, 9\].*\[B, C, H, W\]"),
        (np.random.rand(9, 9, 9), r"shape \[9, 9, 9\].*\[H, W, C\]"),
        (torch.rand(9), r"shape \[9\]"),
        (torch.rand(0, 9), "side of 0 pixels: 9 x 0"),
        (Image.new("L", (0, 5)), "side of 0 pixels: 0 x 5"),
        (np.broadcast_to(np.uint8(0), (9000, 8000)), "too large"),
        (None, "NoneType"),
        ([], "empty list"),
    ],
)
def test_bad_values_are_named_by_index(processor, value, message):
    with pytest.raises(ValueError, match=rf"(?s)sketch 2.*{message}"):
        processor.preprocess([draw(), draw(), value])


def test_the_place_in_a_batch_or_group_is_named(processor):
    batch = torch.from_numpy(np.stack([np.asarray(draw()) / 255.0] * 2))[:, None]
    batch[1] = float("nan")
    with pytest.raises(ValueError, match="^sketch 1 contains NaN"):
        processor.preprocess(batch)
    with pytest.raises(ValueError, match="^sketch 1, drawing 1 contains NaN"):
        processor.preprocess([draw(), [draw(), batch[1]]])
    for empty in ([], batch[:0]):
        with pytest.raises(ValueError, match="empty list|does not exist"):
            processor.preprocess(empty)


@pytest.mark.parametrize(
    "options, name",
    [
        ({"threshold": 0}, "threshold"),
        ({"threshold": 1.5}, "threshold"),
        ({"threshold": "auto"}, "threshold"),
        ({"threshold": float("nan")}, "threshold"),
        ({"fit": "cover"}, "fit"),
        ({"resize_mode": "crop"}, "resize_mode"),
        ({"invert": "yes"}, "invert"),
        ({"height": 0}, "height"),
        ({"width": 64.0}, "width"),
    ],
)
def test_bad_options(processor, options, name):
    with pytest.raises(ValueError, match=f"`{name}`.*has? to be|`{name}`"):
        processor.preprocess(draw(), **options)
    if name not in ("height", "width"):
        with pytest.raises(ValueError, match=f"`{name}`"):
            SketchProcessor(**options)


@pytest.mark.parametrize("options", [{"resolution": 4}, {"margin": 0.5}, {"line_width": 0}, {"line_width": 2}])
def test_bad_configuration(options):
    with pytest.raises(ValueError, match=f"`{next(iter(options))}`"):
        SketchProcessor(**options)


def test_odd_pages_do_not_break_it(processor):
    for size, path in [
        ((1, 300), [(0, 10), (0, 200)]),
        ((3000, 40), [(5, 20), (2500, 20)]),
        ((9, 9), [(2, 2), (6, 6)]),
    ]:
        page = Image.new("L", size, 255)
        ImageDraw.Draw(page).line(path, fill=0)
        for fit in ("content", "page"):
            assert processor.preprocess(page, fit=fit).min() < 0


def test_example_drawings_are_what_the_script_draws(processor, tmp_path):
    names = {"t-shirt", "dress", "pants", "shoes", "hat", "longsleeve"}
    assert {path.stem for path in DRAWINGS.glob("*.png")} == names
    shutil.copy(DRAWINGS / "draw.py", tmp_path)
    runpy.run_path(str(tmp_path / "draw.py"), run_name="__main__")
    for name in names:
        path = DRAWINGS / f"{name}.png"
        assert path.stat().st_size < 20_000
        drawn, kept = (np.asarray(Image.open(folder / path.name), dtype=float) for folder in (tmp_path, DRAWINGS))
        assert np.abs(drawn - kept).mean() < 1
        assert max(dark_box(processor.preprocess(path))) <= 63


# ---- photos -----------------------------------------------------------------------------------------------------------


def test_photos_are_scaled_to_cover_and_cropped_in_the_middle():
    page = np.zeros((40, 80, 3), np.uint8)
    page[:, 20:60] = (255, 0, 0)  # the middle square
    found = preprocess_photos(Image.fromarray(page), 16, 16)
    assert found.shape == (1, 3, 16, 16) and found.dtype == torch.float32
    middle = found[0, :, 2:-2, 2:-2]
    assert middle[0].min() > 0.98 and middle[1:].max() < -0.98
    tall = preprocess_photos(page.transpose(1, 0, 2), 16, 16)
    torch.testing.assert_close(tall, found.transpose(2, 3), rtol=0, atol=0.02)
    assert preprocess_photos([page, page], 8, 16).shape == (2, 3, 8, 16)


def test_floats_are_taken_as_they_are():
    signed = torch.linspace(-1, 1, 3 * 4 * 4).reshape(1, 3, 4, 4)
    assert torch.equal(preprocess_photos(signed, 4, 4), signed)
    torch.testing.assert_close(preprocess_photos((signed + 1) / 2, 4, 4), signed)
    array = signed[0].permute(1, 2, 0).numpy()
    assert torch.equal(preprocess_photos([array, signed], 4, 4), signed.repeat(2, 1, 1, 1))


def test_deep_and_transparent_photos_keep_their_brightness():
    deep = Image.fromarray(np.full((8, 8), 20000, np.uint16))
    expected = 20000 / 65535 * 2 - 1
    assert abs(preprocess_photos(deep, 8, 8).mean() - expected) < 0.01
    assert abs(preprocess_photos(np.full((8, 8, 3), 20000, np.uint16), 8, 8).mean() - expected) < 0.01
    clear = Image.new("RGBA", (8, 8), (10, 10, 10, 0))
    clear.paste((255, 0, 0, 255), (0, 0, 4, 8))
    found = preprocess_photos(clear, 8, 8)[0]
    assert found[:, :, 6].min() > 0.98 and found[0, :, 1].min() > 0.98 and found[1:, :, 1].max() < -0.98


@pytest.mark.parametrize("mode", ["RGBA", "P", "1"])
def test_photos_of_any_mode_become_rgb(mode):
    image = Image.new("RGB", (8, 8), (200, 200, 200)).convert(mode)
    expected = np.asarray(image.convert("RGB")).mean() / 127.5 - 1
    found = preprocess_photos(image, 8, 8)
    assert found.shape == (1, 3, 8, 8) and abs(found.mean() - expected) < 0.01


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (
            np.zeros((4, 4, 3), np.int64),
            "photo 0 has dtype int64, but has to be uint8, uint16, bool or floating point",
        ),
        (np.zeros((5, 5, 2), np.uint8), r"photo 0 has shape \[5, 5, 2\], but one array has to be"),
        (torch.full((3, 4, 4), float("nan")), r"photo 0 has floats in \[nan, nan\]"),
        ([None], "photo 0 has to be a path, PIL image, NumPy array or tensor"),
        (Image.new("RGB", (0, 4)), "photo 0 has a side of 0 pixels: 0 x 4"),
        (torch.zeros(0, 3, 4, 4), "photo 0 does not exist"),
    ],
)
def test_what_is_no_photo_is_refused(images, message):
    with pytest.raises(ValueError, match=message):
        preprocess_photos(images, 4, 4)


def test_a_photo_or_a_mask_may_be_black():
    assert np.asarray(read_photo(np.zeros((8, 8, 3), np.float32), "photo")).max() == 0
    assert np.asarray(preprocess_mask(torch.zeros(8, 8), "mask")).max() == 0


def test_a_deep_photo_with_a_transparent_level_is_scaled(tmp_path):
    values = np.linspace(0, 65535, 64).astype(np.uint16).reshape(8, 8)
    Image.fromarray(values).save(tmp_path / "deep.png", transparency=int(values[2, 3]))
    photo = read_photo(tmp_path / "deep.png", "photo")
    assert photo.mode == "RGBA" and np.argwhere(np.asarray(photo)[..., 3] == 0).tolist() == [[2, 3]]
    assert np.abs(np.asarray(photo)[..., 0] - values / 257).max() < 1
    photo = preprocess_photos(tmp_path / "deep.png", 8, 8)[0, 0]
    assert photo[2, 3] == 1 and photo[0, 0] == -1


def test_a_mode_that_does_not_convert_names_the_photo():
    for read in (read_photo, preprocess_mask):
        with pytest.raises(ValueError, match="`image` has mode 'La'; convert it to RGB"):
            read(Image.new("La", (8, 8)), "`image`")


@pytest.mark.parametrize("size", [(301, 207), (640, 512)])
def test_a_picture_in_colors_is_made_smaller_before_it_is_made_gray(size, tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    path = tmp_path / "colors.png"
    Image.fromarray(pixels).save(path)
    small = reading.load_image(path, "sketch 0", max_pixels=size[0] * size[1] // 8)
    expected = Image.fromarray(pixels).reduce(3).convert("L", (1 / 3, 1 / 3, 1 / 3, 0))
    assert small.mode == "L" and np.array_equal(np.asarray(small), np.asarray(expected))


@pytest.mark.parametrize("kind", ["GIF", "PNG", "WEBP"])
def test_an_animation_that_breaks_off_anywhere_is_one_error(kind, tmp_path):
    frames = [Image.new("L", (24, 24), 255) for _ in range(3)]
    for k, frame in enumerate(frames):
        ImageDraw.Draw(frame).rectangle((4, 4, 14 + 3 * k, 19), outline=0)
    path = tmp_path / "drawing"
    frames[0].save(path, kind, save_all=True, append_images=frames[1:])
    content = path.read_bytes()
    for length in range(len(content)):
        path.write_bytes(content[:length])
        try:
            SketchProcessor(16).preprocess(path)
        except ValueError as error:
            assert "drawing') " in str(error)
