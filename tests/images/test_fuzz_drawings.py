# SPDX-License-Identifier: Apache-2.0
"""
Damaged and crafted drawings: each is read, or refused in one error, quickly, in little memory and without a connection.

A few with each run of the tests; all of them by `python tests/images/test_fuzz_drawings.py 3000`.
"""

import io
import json
import logging
import os
import random
import re
import socket
import struct
import sys
import tempfile
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw

from diffsketching_pipeline import SketchProcessor


pytestmark = pytest.mark.slow

MAX_SECONDS = 2.0
MAX_MEGABYTES = 300.0
SVG = '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 100 90" width="100" height="90">{}</svg>'
PLAIN = '<path d="M20 20h60v50l-30-9z" fill="none" stroke="#000" stroke-width="2"/><circle cx="50" cy="45" r="12"/>'
DRAWN = """<style>.a{{stroke:black;fill:none}}</style><defs><g id="b"><path d="M10 10L40 70" class="a"/></g></defs>
<use href="#b" x="20"/><g opacity="0.5"><rect x="5" y="5" width="60" height="40" class="a"/></g>{}"""
NUMBERS = ("0", "-1", "1e9", "1e308", "-1e-300", "nan", "99999999999999999999", "50%", "3mm", "", "#", "url(#b)")


def page(mode):
    picture = Image.new("RGBA" if mode == "RGBA" else "RGB", (160, 120), (0, 0, 0, 0) if mode == "RGBA" else "white")
    ImageDraw.Draw(picture).line([(20, 20), (140, 30), (120, 100), (30, 90), (20, 20)], fill="black", width=4)
    return picture if mode in ("RGB", "RGBA") else picture.convert("L").convert(mode)


def saved(kind, mode="RGB", **options):
    file = io.BytesIO()
    page(mode).save(file, kind, **options)
    return file.getvalue()


def whole_files():
    """The content of undamaged files, by suffix."""
    frames = [page("RGB").rotate(k, fillcolor="white") for k in (0, 20, 40)]
    wide = Image.fromarray(np.asarray(page("L"), dtype=np.uint16) * 257)
    exif = Image.Exif()
    exif[274] = 6
    pngs = [saved("PNG", mode) for mode in ("L", "RGB", "RGBA", "P", "1")]
    pngs.append(saved("PNG", pnginfo=None, exif=exif))
    with io.BytesIO() as file:
        wide.save(file, "PNG")
        pngs.append(file.getvalue())
    jpegs = [
        saved("JPEG", mode, progressive=progressive, exif=exif) for mode in ("L", "RGB") for progressive in (0, 1)
    ]
    moving = {"save_all": True, "append_images": frames}
    arrays = [
        np.asarray(page("L")),
        np.asarray(page("RGB")),
        np.asarray(page("L")) / 255.0,
        np.asarray(page("L")) > 99,
    ]
    npys = []
    for array in arrays:
        with io.BytesIO() as file:
            np.save(file, array)
            npys.append(file.getvalue())
    strokes = json.dumps({"drawing": [[[20, 140, 120, 30], [20, 30, 100, 90]], [[5, 9], [7, 40]]]})
    svgs = [
        SVG.format(PLAIN),
        SVG.format(DRAWN.format(PLAIN)),
        SVG.format(DRAWN.format("<text x='9' y='80'>abc</text>")),
    ]
    return {
        ".png": pngs,
        ".jpg": jpegs,
        ".gif": [saved("GIF"), saved("GIF", **moving)],
        ".webp": [saved("WEBP"), saved("WEBP", "RGBA", lossless=True), saved("WEBP", **moving)],
        ".svg": [text.encode() for text in svgs],
        ".ndjson": [2 * (strokes + "\n").encode()],
        ".npy": npys,
    }


def mend_png(content):
    """With the sums that a decoder checks first."""
    out, place = content[:8], 8
    while place + 12 <= len(content):
        (length,) = struct.unpack(">I", content[place : place + 4])
        body = content[place + 4 : place + 8 + min(length, len(content))]
        out += struct.pack(">I", max(0, len(body) - 4)) + body + struct.pack(">I", zlib.crc32(body))
        place += 12 + length
    return out


def mutated(content, suffix, rng):
    """Another file: bytes, parts and numbers of it changed in one to four places."""
    data = bytearray(content)
    for _ in range(rng.randint(1, 4)):
        place = rng.randrange(len(data) + 1)
        length = int(rng.choice((1, 4, 16, 200, len(data) // 2 + 1)) * rng.random()) + 1
        if suffix in (".svg", ".ndjson") and rng.random() < 0.6:
            numbers = list(re.finditer(rb"-?\d+(\.\d+)?", data))
            if numbers:
                found = rng.choice(numbers)
                data[found.start() : found.end()] = rng.choice(NUMBERS).encode()
            continue
        kind = rng.randrange(7)
        if kind == 0 and data:
            data[place % len(data)] ^= 1 << rng.randrange(8)
        elif kind == 1 and data:
            data[place % len(data)] = rng.choice((0, 1, 127, 128, 255))
        elif kind == 2:
            del data[place : place + length]
        elif kind == 3:
            data[place:place] = data[place : place + length] * rng.choice((1, 2, 50))
        elif kind == 4:
            data[place:place] = rng.randbytes(length)
        elif kind == 5:
            data[place : place + 4] = struct.pack(
                rng.choice("<>") + "I", rng.choice((0, 1, 2**16, 2**20, 2**31, 2**32 - 1))
            )
        else:
            del data[place:]
        data = data[:300_000]
    return mend_png(bytes(data)) if suffix == ".png" and rng.random() < 0.7 else bytes(data)


def peak_megabytes():
    status = Path("/proc/self/status").read_text()
    return int(re.search(r"VmHWM:\s+(\d+)", status)[1]) / 1024


def read(path, processor):
    """Read a file as a caller would; returns what was said where it is refused."""
    try:
        if path.suffix == ".npy":
            try:
                value = np.load(io.BytesIO(path.read_bytes()), allow_pickle=False)
            except Exception:  # numpy's, not ours
                return "no array"
        else:
            value = path
        sketch = processor.preprocess(value)
    except ValueError as error:
        assert str(error) and len(str(error)) < 2000 and "\n\n" not in str(error), error
        return str(error)
    values = sketch.numpy()
    assert values.shape[1:] == (1, 64, 64) and np.isfinite(values).all() and np.abs(values).max() <= 1
    return None


def fuzz(count, folder, seed=0):
    """Read `count` files; returns how many were read, and what of each went wrong."""
    rng, processor, whole = random.Random(seed), SketchProcessor(64), whole_files()
    for suffix, contents in whole.items():
        for k, content in enumerate(contents):
            path = folder / f"whole-{k}{suffix}"
            path.write_bytes(content)
            assert read(path, processor) is None, path
    num_read, wrong = 0, []
    for number in range(count):
        suffix = rng.choice(list(whole))
        path = folder / f"{number}{suffix}"
        path.write_bytes(mutated(rng.choice(whole[suffix]), suffix, rng))
        Path("/proc/self/clear_refs").write_text("5")
        before, began = peak_megabytes(), sum(os.times()[:4])
        try:
            num_read += read(path, processor) is None
        except Exception as error:
            wrong.append(f"{path.name}: {type(error).__name__}: {error}")
        seconds, megabytes = sum(os.times()[:4]) - began, peak_megabytes() - before
        if seconds > MAX_SECONDS or megabytes > MAX_MEGABYTES:
            wrong.append(f"{path.name}: {seconds:.1f} s, {megabytes:.0f} MB")
        if not wrong or not wrong[-1].startswith(path.name):
            path.unlink()
    return num_read, wrong


@pytest.mark.skipif(sys.platform != "linux", reason="memory is measured on Linux")
def test_changed_files_are_read_or_refused(tmp_path, monkeypatch):
    def connect(*arguments):
        raise AssertionError(f"a connection: {arguments}")

    monkeypatch.setattr(socket.socket, "connect", connect)
    monkeypatch.setattr(socket, "getaddrinfo", connect)
    num_read, wrong = fuzz(150, tmp_path)
    assert not wrong and 15 < num_read < 135


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    logging.disable()
    socket.socket.connect = lambda *arguments: sys.exit(f"a connection: {arguments}")
    kept = Path(tempfile.mkdtemp())
    found, problems = fuzz(int(sys.argv[1]), kept, int(sys.argv[2]) if len(sys.argv) > 2 else 0)
    print(f"{found} of {sys.argv[1]} read, {len(problems)} wrong, in {kept}", *problems, sep="\n")
