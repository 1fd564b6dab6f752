# SPDX-License-Identifier: Apache-2.0
import json
import os
import socket
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw
from safetensors.torch import load_file

from diffsketching_pipeline import DiffSketchingEditPipeline, DiffSketchingPipeline, cli
from diffsketching_pipeline.results import contact_sheet


# Each runs a command.
pytestmark = pytest.mark.slow


SIZE = (48, 40)


@pytest.fixture(scope="module")
def checkpoint(tiny_pipeline_factory, tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint") / "tiny"
    tiny_pipeline_factory(recommended={"num_inference_steps": 2}).save_pretrained(folder)
    return str(folder)


@pytest.fixture
def files(tmp_path):
    """A photo, two drawings of its size, a mask, and a photo that breaks off."""
    noise = np.random.default_rng(0).integers(0, 256, (SIZE[1], SIZE[0], 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "photo.png")
    Image.fromarray(255 - noise).save(tmp_path / "other.png")
    (tmp_path / "broken.png").write_bytes((tmp_path / "photo.png").read_bytes()[:900])
    for name, line in (("one", (14, 12, 14, 28, 26, 28)), ("two", (26, 12, 14, 28))):
        page = Image.new("L", SIZE, 255)
        ImageDraw.Draw(page).line(line, fill=0, width=2)
        page.save(tmp_path / f"{name}.png")
    mask = Image.new("L", SIZE, 0)
    mask.save(tmp_path / "empty.png")
    mask.paste(255, (12, 10, 28, 30))
    mask.save(tmp_path / "mask.png")
    mask.resize((40, 48)).save(tmp_path / "turned.png")
    return tmp_path


@pytest.fixture
def run(monkeypatch, checkpoint, files):
    def run(*arguments):
        command = [
            "diffsketching",
            *arguments,
            "--model",
            checkpoint,
            "--output-dir",
            files / "out",
            "--device",
            "cpu",
        ]
        monkeypatch.setattr(sys, "argv", list(map(str, command)))
        with pytest.raises(SystemExit) as stopped:
            cli.main()
        return stopped.value.code

    return run


def records(files):
    return json.loads((files / "out" / "metadata.json").read_text())["images"]


def test_edit_writes_results_sheet_and_what_reproduces_them(run, files, checkpoint, capsys):
    arguments = ("--mask", files / "mask.png", "--sketch", files / "one.png", "--num-images", 2, "--seed", 3)
    options = ("--class-label", "a=1,b=3", "--strength", 1.0, "--resample-steps", 2, "--color-hint", "navy")
    assert run("edit", files / "photo.png", *arguments, *options, "--batch-size", 1) == 0
    assert sorted(os.listdir(files / "out")) == ["metadata.json", "photo_3.png", "photo_4.png", "photo_sheet.png"]
    assert capsys.readouterr().out == f"{files / 'out' / 'photo_sheet.png'}\n"
    record = records(files)[1]
    assert record["class_label"] == {"a": 0.25, "b": 0.75} and not record["class_predicted"]
    pipe = DiffSketchingEditPipeline.from_pretrained(checkpoint)
    keys = ("strength", "feather", "mask_padding", "crop_margin", "num_resample_steps", "num_inference_steps", "eta")
    image = pipe(
        record["photo"],
        record["mask"],
        record["drawing"],
        record["class_label"],
        generator=[torch.Generator().manual_seed(record["seed"])],
        color_hint=record["color_hint"],
        **{key: record[key] for key in keys},
        **{key: value for key, value in record.items() if key.endswith("_scale")},
    ).images[0]
    written = np.asarray(Image.open(files / "out" / record["file"]), dtype=int)
    assert np.abs(written - np.asarray(image, dtype=int)).max() <= 2


def test_edit_takes_a_box(run, files):
    assert run("edit", files / "photo.png", "--box", "12,10,28,30", "--num-images", 1, "--class-label", "a") == 0
    changed = np.asarray(Image.open(files / "out" / "photo_0.png")) != np.asarray(Image.open(files / "photo.png"))
    rows, columns = np.nonzero(changed.any(axis=2))
    assert (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1) == (12, 10, 28, 30)


def test_interpolate_writes_frames_film_and_sheet(run, files):
    keys = (files / "one.png", files / "two.png")
    assert run("interpolate", *keys, "--num-frames", 3, "--seed", 4, "--seed", 5, "--class-label", "b") == 0
    names = ["metadata.json", "one-two.gif", *(f"one-two_00{k}.png" for k in range(3)), "one-two_sheet.png"]
    assert sorted(os.listdir(files / "out")) == names
    film = Image.open(files / "out" / "one-two.gif")
    assert film.n_frames == 3 and film.size == (256, 256) and film.info["duration"] == 120
    assert records(files)[2]["seeds"] == [4, 5] and records(files)[2]["class_labels"] == ["b", "b"]
    assert run("generate", files / "two.png", "--num-images", 1, "--seed", 5, "--class-label", "b") == 0
    last, plain = (np.asarray(Image.open(files / "out" / name), int) for name in ("one-two_002.png", "two_5.png"))
    assert np.abs(last - plain).max() <= 2


def test_interpolate_between_photos_and_into_an_mp4(run, files, capsys):
    pytest.importorskip("imageio_ffmpeg", reason="MP4 needs an encoder")
    keys = (files / "photo.png", files / "other.png")
    assert run("interpolate", *keys, "--photos", "--num-frames", 3, "--film", "mp4") == 0
    assert (files / "out" / "photo-other.mp4").read_bytes()[4:8] == b"ftyp"


def test_matrix_has_a_row_for_each_class(run, files):
    assert run("matrix", files / "one.png", "--num-images", 2) == 0
    found = {record["file"]: record for record in records(files)}
    assert set(found) == {f"one_{label}_{seed}.png" for label in "abc" for seed in (0, 1)}
    assert found["one_c_1.png"]["class_label"] == "c" and found["one_c_1.png"]["seed"] == 1
    assert Image.open(files / "out" / "one_matrix.png").width == 3 * 196
    assert run("generate", files / "one.png", "--num-images", 1, "--seed", 1, "--class-label", "c") == 0
    cell, plain = (np.asarray(Image.open(files / "out" / name), int) for name in ("one_c_1.png", "one_1.png"))
    assert np.abs(cell - plain).max() <= 2


def test_beside_strokes_of_color_a_drawing_keeps_its_place(run, files, checkpoint):
    page = Image.new("RGBA", SIZE, "white")
    page.paste("red", (4, 4, 40, 36))
    page.save(files / "hint.png")
    options = ("--class-label", "a", "--num-images", 1, "--color-hint", files / "hint.png")
    assert run("matrix", files / "two.png", *options) == 0 and run("generate", files / "two.png", *options) == 0
    pipe = DiffSketchingPipeline.from_pretrained(checkpoint)
    generator = [torch.Generator().manual_seed(0)]
    expected = pipe(files / "two.png", "a", 1, generator=generator, color_hint=files / "hint.png").images[0]
    for name in ("two_a_0.png", "two_0.png"):
        written = np.asarray(Image.open(files / "out" / name), int)
        assert np.abs(written - np.asarray(expected, int)).max() <= 2


def test_a_sheet_lays_what_is_transparent_on_white():
    tile = Image.new("RGBA", (8, 8), (0, 0, 0, 0))
    tile.paste((255, 0, 0, 255), (4, 0, 8, 8))
    sheet = np.asarray(contact_sheet([(tile, "")], "", 1))
    assert sheet[120, 20].tolist() == [255, 255, 255] and sheet[120, 180].tolist() == [255, 0, 0]


def test_invert_writes_noise_from_which_the_photo_comes_back(run, files, checkpoint):
    assert run("invert", files / "photo.png", "--steps", 4, "--class-label", "a") == 0
    names = ["metadata.json", "photo_back.png", "photo_noise.safetensors", "photo_sheet.png"]
    assert sorted(os.listdir(files / "out")) == names
    noise = load_file(files / "out" / "photo_noise.safetensors")["noise"]
    pipe = DiffSketchingPipeline.from_pretrained(checkpoint)
    torch.testing.assert_close(noise, pipe.invert(files / "photo.png", "a", num_inference_steps=4))
    back = pipe(None, "a", 1, 4, latents=noise, clip_sample=False).images[0]
    written = np.asarray(Image.open(files / "out" / "photo_back.png"), int)
    assert np.abs(written - np.asarray(back, int)).max() <= 1
    assert records(files)[0]["psnr_db"] > 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("edit", "broken.png", "--mask", "mask.png"), "broken.png') is damaged or truncated"),
        (("edit", "photo.png", "--box", "1,2,x"), "`--box` has to be left,top,right,bottom"),
        (("edit", "photo.png", "--box", "1,2,3,4", "--mask", "mask.png"), "give one of them"),
        (("edit", "photo.png", "--mask", "mask.png", "--class-label", "a=b"), "a mixture is like"),
        (("interpolate", "one.png"), "there are 1 in `sketches`"),
        (("interpolate", "one.png", "two.png", "--film", "avi"), "`--film` has to be gif or mp4"),
        (("interpolate", "one.png", "two.png", "--fps", "0"), "`--fps` has to be at least 1"),
        (("matrix", "one.png", "--class-label", "d"), "unknown class 'd'"),
        (("matrix", "one.png", "--color-hint", "reddest"), "`color_hint` has 'reddest', which is no color"),
        (("matrix", "one.png", "--negative-class-label", "a=1"), "`--negative-class-label` has to be one class"),
        (("interpolate", "photo.png", "other.png", "--photos", "--seed", "3"), "`--seed` makes noise"),
        (("invert", "broken.png"), "broken.png') is damaged or truncated"),
    ],
)
def test_bad_input_is_one_line_and_writes_nothing(run, files, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(files)
    assert run(*arguments) == 2
    error = capsys.readouterr().err
    assert message in error
    assert len([line for line in error.splitlines() if line.startswith("diffsketching: error: ")]) == 1
    assert not (files / "out").exists()


def test_an_option_in_its_old_spelling_warns(run, files, monkeypatch, capsys):
    monkeypatch.chdir(files)
    with pytest.warns(FutureWarning, match="`--colour-hint` is now `--color-hint`"):
        assert run("matrix", "one.png", "--colour-hint", "reddest") == 2
    assert "`color_hint` has 'reddest'" in capsys.readouterr().err


def test_an_earlier_result_is_kept(run, files, capsys):
    arguments = ("edit", files / "photo.png", "--mask", files / "mask.png", "--num-images", 1)
    assert run(*arguments) == 0 and run(*arguments) == 2
    assert "photo_0.png' exists already" in capsys.readouterr().err
    assert run(*arguments, "--overwrite") == 0


@pytest.mark.slow
@pytest.mark.parametrize("command", ["generate", "matrix", "edit", "interpolate"])
def test_a_threshold_leaves_faint_lines_out(run, files, command):
    for name in ("one", "two"):
        page = Image.open(files / f"{name}.png")
        ImageDraw.Draw(page).line((12, 34, 36, 34), fill=140, width=2)
        (files / "ruled").mkdir(exist_ok=True)
        page.save(files / "ruled" / f"{name}.png")

    def photo(folder, *options):
        one, two = folder / "one.png", folder / "two.png"
        words = {"edit": (files / "photo.png", "--mask", files / "mask.png", "--sketch", one)}
        words |= {"interpolate": (one, two, "--num-frames", 2)}
        counted = () if command == "interpolate" else ("--num-images", 1)
        options = (*options, *counted, "--class-label", "a", "--overwrite")
        assert run(command, *words.get(command, (one,)), *options) == 0
        return (files / "out" / records(files)[-1]["file"]).read_bytes()

    assert photo(files / "ruled") != photo(files) and records(files)[-1]["threshold"] is None
    options = ("--threshold", 0.3)
    assert photo(files / "ruled", *options) == photo(files, *options) and records(files)[-1]["threshold"] == 0.3


@pytest.mark.parametrize(
    "words",
    [
        ("generate", "ADDRESS"),
        ("generate", "ADDRESS.svg"),
        ("matrix", "ADDRESS"),
        ("interpolate", "one.png", "ADDRESS"),
        ("interpolate", "ADDRESS", "photo.png", "--photos"),
        ("edit", "ADDRESS", "--mask", "mask.png"),
        ("edit", "photo.png", "--sketch", "ADDRESS"),
        ("edit", "photo.png", "--mask", "ADDRESS"),
        ("invert", "ADDRESS"),
        ("matrix", "one.png", "--color-hint", "ADDRESS"),
    ],
)
def test_an_address_is_to_be_downloaded_first_and_no_request_is_made(run, files, monkeypatch, capsys, words):
    def connect(*arguments):
        raise AssertionError(f"a request: {arguments}")

    monkeypatch.chdir(files)
    monkeypatch.setattr(socket.socket, "connect", connect)
    monkeypatch.setattr(socket, "getaddrinfo", connect)
    address = "https://example.org/a/drawing.png"
    assert run(*(address + word[7:] if word.startswith("ADDRESS") else word for word in words)) == 2
    error = capsys.readouterr().err
    assert "is an address, not a file: download it first" in error and "example.org/a/drawing.png" in error
    assert not (files / "out").exists()


def test_a_drawn_svg_starts_its_renderer_once(run, files, monkeypatch):
    started, start = [], subprocess.run

    def count(*arguments, **options):
        started.append(arguments)
        return start(*arguments, **options)

    monkeypatch.setattr(subprocess, "run", count)
    shape = '<g opacity="0"><path d="M0 0h9"/></g><path d="M20 20h60v50z" fill="none" stroke="#000" stroke-width="3"/>'
    (files / "drawn.svg").write_text(f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 100 90">{shape}</svg>')
    assert run("generate", files / "drawn.svg", "--num-images", 1, "--class-label", "a") == 0
    assert len(started) == 1


def test_with_perceptual_guidance_a_photo_is_the_same_to_the_bit_in_any_batch(run, files):
    options = ("--num-images", 3, "--class-label", "a", "--perceptual-guidance-scale", 0.3, "--overwrite")
    made = []
    for batch_size in (1, 3):
        assert run("generate", files / "one.png", *options, "--batch-size", batch_size) == 0
        made.append([(files / "out" / f"one_{k}.png").read_bytes() for k in range(3)])
    assert made[0] == made[1]
