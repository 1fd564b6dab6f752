# SPDX-License-Identifier: Apache-2.0
import importlib
import json
import os
import subprocess
import sys
import tempfile

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

from diffsketching_pipeline import cli
from diffsketching_pipeline.cli.running import load_pipeline
from diffsketching_pipeline.cli.writing import write_atomically
from diffsketching_pipeline.files import check_writable


@pytest.fixture(scope="module")
def checkpoint(tiny_pipeline_factory, tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint") / "tiny"
    tiny_pipeline_factory().save_pretrained(folder)
    return str(folder)


@pytest.fixture
def drawing(tmp_path):
    path = tmp_path / "shape.png"
    image = Image.new("L", (120, 90), 255)
    ImageDraw.Draw(image).rectangle((30, 20, 90, 70), outline=0, width=3)
    image.save(path)
    return path


def run(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["diffsketching", *map(str, arguments)])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    return stopped.value.code


def generate(monkeypatch, checkpoint, drawing, output_dir, *arguments):
    return run(
        monkeypatch,
        *("generate", drawing, "--model", checkpoint, "--output-dir", output_dir, "--steps", 2, "--device", "cpu"),
        *arguments,
    )


def test_generate_writes_photos_sheet_and_metadata(monkeypatch, checkpoint, drawing, tmp_path):
    out = tmp_path / "out"
    assert generate(monkeypatch, checkpoint, drawing, out, "--num-images", 3, "--seed", 5) == 0
    names = ["metadata.json", "shape_5.png", "shape_6.png", "shape_7.png", "shape_sheet.png"]
    assert sorted(os.listdir(out)) == names
    records = json.loads((out / "metadata.json").read_text())["images"]
    assert [record["seed"] for record in records] == [5, 6, 7]
    assert records[0]["class_predicted"] is True
    assert records[0]["num_inference_steps"] == 2


def test_a_photo_does_not_depend_on_batch_size_or_caller(monkeypatch, checkpoint, drawing, tmp_path):
    from diffsketching_pipeline import DiffSketchingPipeline

    for batch_size in (1, 4):
        out = tmp_path / f"batch{batch_size}"
        arguments = ("--num-images", 4, "--seed", 3, "--batch-size", batch_size, "--class-label", "b")
        assert generate(monkeypatch, checkpoint, drawing, out, *arguments) == 0
    pipe = DiffSketchingPipeline.from_pretrained(checkpoint)
    generator = torch.Generator().manual_seed(4)
    alone = pipe(
        drawing, class_labels="b", num_images_per_sketch=1, num_inference_steps=2, generator=[generator]
    ).images[0]
    for batch_size in (1, 4):
        written = np.asarray(Image.open(tmp_path / f"batch{batch_size}" / "shape_4.png"), dtype=int)
        assert np.abs(written - np.asarray(alone, dtype=int)).max() <= 2


def test_metadata_reproduces_a_photo(monkeypatch, checkpoint, drawing, tmp_path):
    from diffsketching_pipeline import DiffSketchingPipeline

    out = tmp_path / "out"
    options = ("--sketch-guidance-scale", 3.0, "--classifier-guidance-scale", 1.5, "--eta", 0.5)
    options += ("--dtype", "bfloat16")
    assert generate(monkeypatch, checkpoint, drawing, out, "--num-images", 2, *options) == 0
    record = json.loads((out / "metadata.json").read_text())["images"][1]
    assert record["dtype"] == "bfloat16"
    image = DiffSketchingPipeline.from_pretrained(checkpoint, torch_dtype=torch.bfloat16)(
        record["drawing"],
        class_labels=record["class_label"],
        num_images_per_sketch=1,
        generator=[torch.Generator().manual_seed(record["seed"])],
        **{key: value for key, value in record.items() if key.endswith("_scale")},
        num_inference_steps=record["num_inference_steps"],
        eta=record["eta"],
        strength=record["strength"],
    ).images[0]
    written = np.asarray(Image.open(out / record["file"]), dtype=int)
    assert np.abs(written - np.asarray(image, dtype=int)).max() <= 2


def test_a_second_run_keeps_what_the_first_wrote(monkeypatch, capsys, checkpoint, drawing, tmp_path):
    out = tmp_path / "out"
    assert generate(monkeypatch, checkpoint, drawing, out, "--num-images", 1) == 0
    first = (out / "shape_0.png").read_bytes()
    assert generate(monkeypatch, checkpoint, drawing, out, "--num-images", 1) == 2
    assert "shape_0.png' exists already" in capsys.readouterr().err
    assert (out / "shape_0.png").read_bytes() == first
    other = drawing.with_name("other.png")
    other.write_bytes(drawing.read_bytes())
    assert generate(monkeypatch, checkpoint, other, out, "--num-images", 1) == 0
    files = [record["file"] for record in json.loads((out / "metadata.json").read_text())["images"]]
    assert files == ["shape_0.png", "other_0.png"]
    assert generate(monkeypatch, checkpoint, drawing, out, "--num-images", 1, "--overwrite") == 0


def test_drawings_of_one_name_in_two_folders_do_not_collide(monkeypatch, checkpoint, drawing, tmp_path):
    paths = []
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        paths.append(tmp_path / folder / "shape.png")
        paths[-1].write_bytes(drawing.read_bytes())
    out = tmp_path / "out"
    assert generate(monkeypatch, checkpoint, paths[0], out, paths[1], "--num-images", 1, "--class-label", "a") == 0
    assert {"a-shape_0.png", "b-shape_0.png"} <= set(os.listdir(out))


def test_vector_files_are_drawings_one_or_several(monkeypatch, checkpoint, drawing, tmp_path):
    strokes = [[[30, 90, 90, 30, 30], [20, 20, 70, 70, 20]]]
    (tmp_path / "two.ndjson").write_text(2 * (json.dumps({"drawing": strokes}) + "\n"))
    (tmp_path / "one.svg").write_text('<svg><rect x="3" y="2" width="6" height="5"/></svg>')
    out = tmp_path / "out"
    arguments = (
        tmp_path / "one.svg",
        "--num-images",
        1,
        "--class-label",
        "a",
        "--class-label",
        "b",
        "--class-label",
        "a",
    )
    assert generate(monkeypatch, checkpoint, tmp_path / "two.ndjson", out, *arguments) == 0
    records = json.loads((out / "metadata.json").read_text())["images"]
    assert [(r["file"], r["drawing_index"], r["class_label"]) for r in records] == [
        ("two-0_0.png", 0, "a"),
        ("two-1_0.png", 1, "b"),
        ("one_0.png", 0, "a"),
    ]
    assert all((out / r["file"]).exists() for r in records)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--num-images", 0), "`--num-images` has to be at least 1 but is 0."),
        (("--seed", -1), "`--seed` has to be a non-negative integer"),
        (("--class-label", "bb"), "unknown class 'bb': did you mean 'b'?"),
        (("--class-label", "7"), "`class_labels` has to be between 0 and 2 but has 7."),
        (("--class-label", "a", "--class-label", "b"), "`--class-label` was given 2 times for 1 drawings"),
        (("--steps", 0), "`num_inference_steps` has to be between 1 and"),
        (("--device", "nowhere"), "nowhere"),
        (("--no-such-option",), "No such option"),
    ],
)
def test_bad_options_are_one_line_and_exit_code_2(
    monkeypatch, capsys, checkpoint, drawing, tmp_path, arguments, message
):
    assert generate(monkeypatch, checkpoint, drawing, tmp_path / "out", *arguments) == 2
    error = capsys.readouterr().err
    assert message in error
    assert len([line for line in error.splitlines() if line.startswith("diffsketching: error: ")]) == 1
    assert not (tmp_path / "out").exists()


def _truncated(path):
    noise = np.random.default_rng(0).integers(0, 255, (256, 256), dtype=np.uint8)
    Image.fromarray(noise).save(path)
    path.write_bytes(path.read_bytes()[:2000])


@pytest.mark.parametrize("make", [_truncated, lambda path: None])
def test_bad_drawings_name_the_file_and_leave_nothing(monkeypatch, capsys, checkpoint, tmp_path, make):
    path = tmp_path / "bad.png"
    make(path)
    assert generate(monkeypatch, checkpoint, path, tmp_path / "out") == 2
    assert "bad.png" in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "out").exists()


def test_a_folder_of_drawings_goes_on_where_it_was_stopped(monkeypatch, capsys, checkpoint, drawing, tmp_path):
    folder, out = tmp_path / "drawings", tmp_path / "out"
    for name in ("b/one.png", "b/two.png", "a/one.png", ".trash/no.png", "._two.png"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(drawing.read_bytes())
    (folder / "notes.txt").write_text("mine")
    for name in ("bad.png", "worse.png"):
        _truncated(folder / name)
    options = ("--num-images", 1, "--class-label", "a")
    assert generate(monkeypatch, checkpoint, folder, out, *options) == 2
    message = capsys.readouterr().err
    assert "2 of 5 drawings" in message and "bad.png" in message and "worse.png" in message and not out.exists()

    assert generate(monkeypatch, checkpoint, folder, out, *options, "--skip-bad") == 0
    skipped = capsys.readouterr().err
    assert skipped.count("Skipped: ") == 2 and "worse.png" in skipped
    photos = {"a-one_0.png", "b-one_0.png", "two_0.png"}
    assert {name for name in os.listdir(out) if name.endswith("_0.png")} == photos
    before = {name: (out / name).read_bytes() for name in os.listdir(out)}

    (out / "two_0.png").unlink()
    (out / "b-one_0.png").write_bytes(b"kept as it is")
    assert generate(monkeypatch, checkpoint, folder, out, *options, "--skip-bad", "--skip-existing") == 0
    assert "2 of 3 drawings have their pictures already" in capsys.readouterr().err
    assert (out / "b-one_0.png").read_bytes() == b"kept as it is"
    assert (out / "two_0.png").read_bytes() == before["two_0.png"]
    assert {record["file"] for record in json.loads((out / "metadata.json").read_text())["images"]} == photos
    (tmp_path / "empty").mkdir()
    assert generate(monkeypatch, checkpoint, tmp_path / "empty", out, *options) == 2
    assert "holds no drawings" in capsys.readouterr().err


def test_a_folder_that_holds_something_else_is_refused(monkeypatch, capsys, checkpoint, drawing, tmp_path):
    (tmp_path / "file").write_text("mine")
    assert generate(monkeypatch, checkpoint, drawing, tmp_path / "file") == 2
    assert "is a file" in capsys.readouterr().err
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "metadata.json").write_text("[]")
    assert generate(monkeypatch, checkpoint, drawing, tmp_path / "out") == 2
    assert (tmp_path / "out" / "metadata.json").read_text() == "[]"


def test_a_failed_write_leaves_no_half_file(monkeypatch, tmp_path):
    def fail(source, target):
        raise OSError("disk full")

    (tmp_path / "kept.png").write_bytes(b"whole")
    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        write_atomically(tmp_path / "kept.png", b"other")
    assert os.listdir(tmp_path) == ["kept.png"]
    assert (tmp_path / "kept.png").read_bytes() == b"whole"


@pytest.mark.skipif(
    not os.path.isdir("/proc/self"), reason="a folder that nobody can write to is a file system of Linux"
)
def test_an_output_folder_that_cannot_be_written_to_is_found_before_the_model_is_loaded(
    monkeypatch, capsys, drawing, tmp_path
):
    assert generate(monkeypatch, "no/such-model", drawing, "/proc/self/out") == 2
    assert "`--output-dir` must be a folder that can be written to, but /proc/self is not" in capsys.readouterr().err
    resource = pytest.importorskip("resource")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    # Stands for a full disk.
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**19, before[1]))
    try:
        with pytest.raises(ValueError, match=f"`output_dir` must be .*, but {tmp_path} is not: File too large"):
            check_writable(tmp_path / "a" / "b")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    check_writable(tmp_path / "a" / "b")
    assert sorted(os.listdir(tmp_path)) == ["shape.png"]


def test_photos_that_were_made_are_kept_where_their_folder_is_lost(monkeypatch, capsys, checkpoint, drawing, tmp_path):
    out, rescue = tmp_path / "out", tmp_path / "elsewhere"
    rescue.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(rescue))

    def load_and_lose_the_folder(*arguments, **options):
        out.write_text("in the way")
        return load_pipeline(*arguments, **options)

    monkeypatch.setattr(
        importlib.import_module("diffsketching_pipeline.cli.generate"), "load_pipeline", load_and_lose_the_folder
    )
    monkeypatch.setattr("diffsketching_pipeline.cli.writing.RESCUED", rescued := {})
    monkeypatch.setattr("diffsketching_pipeline.cli.RESCUED", rescued)
    assert generate(monkeypatch, checkpoint, drawing, out, "--num-images", 2) == 2
    [kept] = rescue.iterdir()
    assert sorted(os.listdir(kept)) == ["metadata.json", "shape_0.png", "shape_1.png", "shape_sheet.png"]
    shown = capsys.readouterr()
    assert f"what could not be written any more is in '{kept}' instead of '{out}'" in shown.err
    assert shown.out == f"{kept / 'shape_sheet.png'}\n"


def test_info_shows_names_as_they_are(monkeypatch, capsys, tiny_pipeline_factory, tmp_path):
    names = {0: "[red]a[/red]", 1: "[link=https://x]b", 2: ":smile:"}
    tiny_pipeline_factory(id2label=names).save_pretrained(tmp_path / "[bold]tiny")
    assert run(monkeypatch, "info", tmp_path / "[bold]tiny") == 0
    shown = "".join(capsys.readouterr().out.split())
    assert "classes(3):[red]a[/red],[link=https://x]b,:smile:" in shown and "[bold]tiny" in shown


def test_no_message_repeats_much_of_a_file_or_has_escape_sequences(monkeypatch, capsys, checkpoint, drawing, tmp_path):
    for label in ("x" * 100_000, "\x1b[2J\x1b]0;title\x07" + "y" * 30, "a\nb"):
        assert generate(monkeypatch, checkpoint, drawing, tmp_path / "out", "--class-label", label) == 2
        error = capsys.readouterr().err
        assert error.startswith("diffsketching: error: `class_labels` has the unknown class") and len(error) < 1200
        assert error.endswith("\n") and error[:-1].isprintable()


def test_info_shows_components_and_classes(monkeypatch, capsys, checkpoint):
    assert run(monkeypatch, "info", checkpoint) == 0
    shown = capsys.readouterr().out
    assert "UNet2DModel" in shown
    assert "classes (3): a, b, c" in shown
    assert "photo + sketch" in shown


def test_convert_commands_refuse_in_one_line(monkeypatch, capsys, tmp_path):
    missing = tmp_path / "none.pt"
    out = tmp_path / "out"
    common = ("convert-guided-diffusion", "--unet-checkpoint", missing, "--output-dir", out)
    assert run(monkeypatch, *common) == 2
    assert "either `--flags` or `--preset`" in capsys.readouterr().err
    assert run(monkeypatch, *common, "--preset", "256") == 2
    assert "none.pt" in capsys.readouterr().err
    assert run(monkeypatch, "convert-photosketch", missing, "--output-dir", out) == 2
    assert "none.pt" in capsys.readouterr().err
    assert not out.exists()


def test_convert_commands_pass_their_options_on(monkeypatch, capsys, tmp_path):
    seen = {}
    module = importlib.import_module("diffsketching_pipeline.converters.guided_diffusion")
    monkeypatch.setattr(module, "convert_guided_diffusion", lambda *args, **kw: seen.update(kw))
    common = ("convert-guided-diffusion", "--unet-checkpoint", "u.pt", "--output-dir", tmp_path / "out")
    assert run(monkeypatch, *common, "--preset", "256", "--sketch-channel") == 0
    assert (seen["preset"], seen["sketch_channel"], seen["flags"]) == ("256", True, None)
    assert run(monkeypatch, *common, "--preset", "64") == 0
    assert (seen["preset"], seen["sketch_channel"]) == ("64", False)


def test_evaluate_is_part_of_the_package_and_says_what_it_needs(monkeypatch, capfd):
    words = ["--sketches", "a", "--reference", "b", "--train", "c", "--evaluator", "d"]
    assert run(monkeypatch, "evaluate", *words) == 2
    assert capfd.readouterr().err.startswith("diffsketching evaluate: error: give `model` to generate images")
    assert run(monkeypatch, "evaluate", "--help") == 0
    assert capfd.readouterr().out.startswith("usage: diffsketching evaluate ")
    monkeypatch.delitem(sys.modules, "diffsketching_pipeline.evaluation.run")
    monkeypatch.setitem(sys.modules, "torchmetrics", None)
    assert run(monkeypatch, "evaluate", *words) == 2
    assert "this needs torchmetrics: `pip install 'diffsketching_pipeline[evaluate]'`" in capfd.readouterr().err


def test_the_command_is_cheap_to_ask_for_help():
    code = (
        "import sys; from diffsketching_pipeline import cli; print('torch' in sys.modules, 'diffusers' in sys.modules)"
    )
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert shown.split() == ["False", "False"]
