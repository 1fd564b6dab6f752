# SPDX-License-Identifier: Apache-2.0
import dataclasses
import hashlib
import json
import subprocess
import sys
from pathlib import Path

import lpips
import numpy as np
import pytest
import torch
import torchvision
from accelerate import Accelerator
from PIL import Image, ImageDraw
from scipy import ndimage
from testing_utils import TRAINING
from transformers import RegNetForImageClassification, ResNetConfig, ResNetForImageClassification

from diffsketching_pipeline import DiffSketchingPipeline, SketchProcessor
from diffsketching_pipeline import files as diffsketching_files
from diffsketching_pipeline.evaluation import image_sets, metrics, perceptual, scoring
from diffsketching_pipeline.evaluation import report as evaluation_report
from diffsketching_pipeline.evaluation import run as evaluate
from diffsketching_pipeline.evaluation.extractors import Evaluator
from diffsketching_pipeline.evaluation.report import Tile
from diffsketching_pipeline.evaluation.run import main
from diffsketching_pipeline.images import patches


# Each reads and scores sets of photos.
pytestmark = pytest.mark.slow


LABELS = ["disc", "square"]
SIZE = 32


def save(image, path):
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path)
    return path


def outlined_photos(drawings_dir, folder, color=(200, 60, 60), resolution=64):
    """The shapes of the drawings, where and as large as the model sees them, filled with a color."""
    for path in sorted(drawings_dir.glob("*/*.png")):
        strokes = SketchProcessor(resolution).preprocess(str(path))[0, 0].numpy() < 0
        photo = np.full((resolution, resolution, 3), 235, dtype=np.uint8)
        photo[ndimage.binary_fill_holes(strokes)] = color
        save(Image.fromarray(photo), folder / path.parent.name / f"{path.stem}_0.png")
    return folder


def load(path):
    return json.loads(Path(path).read_text())


# -- files --


def test_a_threshold_holds_for_the_model_and_for_the_judge(arguments, model_dir, drawings_dir, tmp_path):
    for path in drawings_dir.glob("*/*.png"):
        for name, level in (("pale", 170), ("dark", 0)):
            page = Image.open(path).convert("L")
            ImageDraw.Draw(page).line((50, 50, 70, 70), fill=level, width=3)
            save(page, tmp_path / name / path.parent.name / path.name)
    found, given, expected = (
        evaluate.prepare(
            arguments(
                sketches=str(tmp_path / name), output_dir=str(tmp_path / f"{name}{threshold}"), threshold=threshold,
                model=str(model_dir), num_images_per_sketch=1,
            ),
            Accelerator(),
        )
        for name, threshold in (("pale", None), ("pale", 0.8), ("dark", None))
    )  # fmt: skip
    missed = [float(((expected.sketches < 0) & (i.sketches > 0)).float().mean()) for i in (found, given)]
    assert missed[1] < 0.1 * missed[0], missed
    path = str(given.drawings[0].path)
    seen = given.plans[0].pipeline.prepare_sketches(path)[0]
    assert torch.equal(seen, SketchProcessor(16, threshold=0.8).preprocess(path))
    assert not torch.equal(seen, SketchProcessor(16).preprocess(path))
    settings = [load(tmp_path / name / "images" / "generation.json") for name in ("pale0.8", "darkNone")]
    assert [content["threshold"] for content in settings] == [0.8, None]
    with pytest.raises(ValueError, match="`threshold`.* 1.5"):
        evaluate.prepare(arguments(threshold=1.5, model=str(model_dir)), Accelerator())


def test_a_second_evaluation_in_one_folder_is_told_so(arguments, tmp_path, monkeypatch):
    monkeypatch.setattr(diffsketching_files, "_LOCK_SECONDS", 0.1)
    code = "import sys; from pathlib import Path; from diffsketching_pipeline.files import lock_folder\n"
    code += "lock = lock_folder(Path(sys.argv[1])); print(flush=True); input()"
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", code, str(tmp_path / "out")], **pipes) as other:
        other.stdout.readline()
        with pytest.raises(ValueError, match="`output_dir` .*out is in use by another run"):
            main(arguments(images=[str(tmp_path)]))
        assert [path.name for path in (tmp_path / "out").iterdir()] == [".lock"]
        other.stdin.close()


def test_squash_crops_the_middle_to_four_by_three():
    ramp = np.repeat(np.repeat(np.arange(0, 240, 2, dtype=np.uint8)[None, :, None], 60, axis=0), 3, axis=2)
    columns = 20 + (np.arange(30) + 0.5) * 80 / 30  # of the middle 80 x 60 pixels
    expected = 2 * (columns - 0.5)
    squashed = np.asarray(image_sets.squash(Image.fromarray(ramp), 30)).astype(float)
    assert np.abs(squashed - expected[None, :, None]).max() < 1
    tall = Image.fromarray(np.ascontiguousarray(ramp.transpose(1, 0, 2)))
    assert np.abs(np.asarray(image_sets.squash(tall, 30)).astype(float) - expected[:, None, None]).max() < 1
    square = Image.fromarray(np.random.default_rng(0).integers(0, 255, (24, 24, 3), dtype=np.uint8))
    assert np.array_equal(np.asarray(image_sets.squash(square, 24)), np.asarray(square))


def test_halves_split_drawings_by_hash(drawings_dir):
    drawings = image_sets.read_drawings(drawings_dir)
    assert [d.position for d in drawings] == list(range(12)) and drawings[
        7
    ].path == drawings_dir / "square/square1.png"
    tune, report = (image_sets.select_drawings(drawings, split) for split in ("tune", "report"))
    assert sorted(tune + report) == sorted(drawings) == sorted(image_sets.select_drawings(drawings, "all"))
    for drawing in drawings:
        even = int(hashlib.sha256(drawing.name.encode()).hexdigest()[:8], 16) % 2 == 0
        assert (drawing in tune) == even
    with pytest.raises(ValueError, match="`split` 'tune' has none of the"):
        image_sets.select_drawings(report, "tune")


def test_images_are_found_flat_or_in_class_folders(drawings_dir, tmp_path):
    drawings = image_sets.read_drawings(drawings_dir)
    page = Image.new("RGB", (8, 8))
    for drawing in drawings:
        for n in (0, 1, 10):
            save(page, tmp_path / "flat" / f"{drawing.name}_{n}.png")
            save(page, tmp_path / "folders" / drawing.label / f"{drawing.name}_{n}.jpg")
    for kind in ("flat", "folders"):
        found = image_sets.match_images(tmp_path / kind, drawings, drawings[3:5])
        assert [drawing.position for drawing, _ in found] == [3] * 3 + [4] * 3
        assert [path.stem.rpartition("_")[2] for _, path in found] == ["0", "1", "10"] * 2


def test_unfitting_image_names_are_errors(drawings_dir, tmp_path):
    drawings = image_sets.read_drawings(drawings_dir)
    page = Image.new("RGB", (8, 8))
    save(page, tmp_path / "one" / "disc0_0.png")
    with pytest.raises(ValueError, match="no image of 11 of 12 drawings, for example disc/disc1_0.png"):
        image_sets.match_images(tmp_path / "one", drawings, drawings)
    save(page, tmp_path / "one" / "square" / "disc0_0.png")
    with pytest.raises(ValueError, match="not named `<sketch>_<n>` after any drawing of the class 'square'"):
        image_sets.match_images(tmp_path / "one", drawings, drawings[:1])
    save(page, tmp_path / "two" / "disc0.png")
    with pytest.raises(ValueError, match="disc0.png, which is not named `<sketch>_<n>`"):
        image_sets.match_images(tmp_path / "two", drawings, drawings[:1])
    twins = [image_sets.Drawing("a", label, tmp_path, i) for i, label in enumerate(LABELS)]
    save(page, tmp_path / "three" / "a_0.png")
    with pytest.raises(ValueError, match="may be of 2 drawings: put images into folders"):
        image_sets.match_images(tmp_path / "three", twins, twins)


def test_images_of_several_sizes_or_broken_or_alone_are_errors(drawings_dir, tmp_path):
    drawing = image_sets.read_drawings(drawings_dir)[0]
    paths = [save(Image.new("RGB", (size, 8)), tmp_path / f"{size}.png") for size in (8, 9)]
    with pytest.raises(ValueError, match=r"one size, but there are 8 x 8 \(.*8.png\) and 9 x 8 \(.*9.png\)"):
        image_sets.read_system("gan", [(drawing, path) for path in paths], SIZE)
    with pytest.raises(ValueError, match="'gan' has 1 image: at least 2 are needed"):
        image_sets.read_system("gan", [(drawing, paths[0])], SIZE)
    paths[1].write_bytes(paths[1].read_bytes()[:40])
    with pytest.raises(ValueError, match="9.png cannot be read as an image"):
        image_sets.read_photos([("disc", paths[1])], "photos", SIZE)


# -- LPIPS --


@pytest.mark.slow
def test_lpips_needs_its_backbone_and_equals_the_lpips_package(evaluator_dir, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    name = "squeezenet1_1-b8a52dc0.pth"
    assert perceptual.load_lpips("squeeze") == (
        None,
        f"no backbone weights: {name} is not in `checkpoints` of the torch hub folder",
    )
    (tmp_path / "hub" / "checkpoints").mkdir(parents=True)
    torch.manual_seed(0)
    torch.save(torchvision.models.squeezenet1_1().state_dict(), tmp_path / "hub" / "checkpoints" / name)
    network, reason = perceptual.load_lpips("squeeze")
    assert reason is None
    pixels = torch.randint(0, 256, (4, 3, SIZE, SIZE), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    images = image_sets.ImageSet("x", pixels, ["disc"] * 4, np.array([0, 0, 0, 1]), [])
    means = perceptual.lpips_means(network, images, "cpu")
    package = lpips.LPIPS(net="squeeze", verbose=False)
    inputs = pixels / 127.5 - 1
    with torch.no_grad():
        expected = [float(package(inputs[i : i + 1], inputs[k : k + 1])) for i, k in ((0, 1), (0, 2), (1, 2))]
    assert means == {0: pytest.approx(np.mean(expected), rel=1e-4)}


def as_option(name, value):
    """An argument as the command line takes it."""
    if value is None:
        return []
    return [f"--{name}", *(map(str, value) if isinstance(value, list | tuple) else [str(value)])]


# -- the whole script --


def test_two_processes_generate_and_one_scores(arguments, model_dir, tmp_path, script_env):
    args = arguments(
        model=str(model_dir), num_images_per_sketch=2, eval_batch_size=4, output_dir=str(tmp_path / "two")
    )
    options = [part for key, value in dataclasses.asdict(args).items() for part in as_option(key, value)]
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    run = subprocess.run(
        [*launch, str(TRAINING / "evaluate.py"), *options],
        env={**script_env, "ACCELERATE_USE_CPU": "true"},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.strip() == str(tmp_path / "two" / "metrics.md")
    main(arguments(model=str(model_dir), num_images_per_sketch=2, eval_batch_size=4, output_dir=str(tmp_path / "one")))
    one, two = (load(tmp_path / name / "metrics.json")["systems"]["generated"] for name in ("one", "two"))
    for name in ("class_agreement", "retrieval_at_1", "pairwise_distance"):
        assert two[name]["value"] == pytest.approx(one[name]["value"], rel=0.02, abs=1e-3)


@pytest.mark.slow
def test_generates_resumes_and_scores(arguments, model_dir, drawings_dir, photos_dir, evaluator_dir, tmp_path):
    args = arguments(model=str(model_dir), num_images_per_sketch=3, eval_batch_size=8)
    main(args)
    out = tmp_path / "out"
    files = sorted((out / "images").glob("*/*.png"))
    assert len(files) == 36

    # 1. An image is what the pipeline gives for the drawing and the seed that the file names.
    file = out / "images" / "square" / "square4_2.png"
    with Image.open(file) as image:
        seed, label = int(image.info["seed"]), image.info["class_label"]
        pixels = np.asarray(image).astype(int)
    assert seed == 2 * 12 + 10
    pipeline = DiffSketchingPipeline.from_pretrained(model_dir)
    generator = torch.Generator().manual_seed(seed)
    output = pipeline(str(drawings_dir / "square/square4.png"), num_images_per_sketch=1, generator=[generator])
    assert np.abs(np.asarray(output.images[0]).astype(int) - pixels).max() <= 2 and output.class_labels == [label]

    # 2. The numbers are those of the files.
    scores = load(out / "metrics.json")["systems"]
    system = scores["generated"]
    with torch.no_grad():
        model = RegNetForImageClassification.from_pretrained(evaluator_dir, dtype=torch.float32).eval()
        stack = [np.asarray(Image.open(f).resize((SIZE, SIZE), Image.Resampling.BICUBIC)) for f in files]
        inputs = torch.from_numpy(np.stack(stack)).permute(0, 3, 1, 2) / 127.5 - 1
        predicted = model(inputs).logits.argmax(-1)
        features = model.regnet(inputs).pooler_output.flatten(1).double()
    agrees = np.array([LABELS[i] == f.parent.name for i, f in zip(predicted, files, strict=True)])
    assert system["class_agreement"]["value"] == pytest.approx(agrees.mean())
    given = [Image.open(f).info["class_label"] for f in files]
    right = [label == f.parent.name for label, f in zip(given, files, strict=True)]
    assert system["conditioning_class_accuracy"]["value"] == pytest.approx(np.mean(right))
    seen = [LABELS[i] == label for i, label in zip(predicted, given, strict=True)]
    assert system["conditioning_class_agreement"]["value"] == pytest.approx(np.mean(seen))
    unit = features / features.norm(dim=1, keepdim=True)
    distances = [torch.pdist(unit[i : i + 3]).mean() for i in range(0, 36, 3)]
    assert system["pairwise_distance"]["value"] == pytest.approx(float(np.mean(distances)), rel=1e-4)
    labels = np.array([f.parent.name for f in files])
    same = torch.from_numpy(labels[:, None] == labels[None, :]).triu(1)
    expected = float(torch.cdist(unit, unit)[same].mean())
    assert system["pairwise_distance_same_class"]["value"] == pytest.approx(expected, rel=1e-4)
    photos = image_sets.list_class_folders(photos_dir / "validation", "reference")
    real = (
        Evaluator(str(evaluator_dir), SIZE)
        .extract_features(image_sets.read_photos(photos, "photos", SIZE), 32)
        .features
    )
    assert system["precision"]["value"] == pytest.approx(metrics.precision(features, real), abs=1 / 36 + 1e-9)
    assert system["recall"]["value"] == pytest.approx(metrics.recall(features, real), abs=1 / 72 + 1e-9)
    assert scores["training_photos"]["precision"]["value"] > 0.5 and scores["reference_photos"]["recall"]["n"] == 36
    assert scores["noise"]["recall"]["value"] < scores["training_photos"]["recall"]["value"]
    assert system["frechet_distance"]["value"] > scores["reference_photos"]["frechet_distance"]["value"]
    assert system["frechet_distance"]["n"] == 36 and scores["training_photos"]["frechet_distance"]["n"] >= 32
    assert system["pairwise_lpips"]["value"] is None and "backbone weights" in system["pairwise_lpips"]["reason"]
    for condition in (
        "extractor: regnet-",
        "resize: squash4:3-bicubic-32px",
        "reference: 72 validation photos",
        "N: 36",
    ):
        assert condition in system["frechet_distance"]["name"]
    assert "seeds: 36 in 0-35" in system["class_agreement"]["name"]
    assert (
        "sampling: DDIMScheduler, timestep_spacing=leading, num_inference_steps=2, eta=0.0, sketch_guidance_scale=1.5,"
        " classifier_guidance_scale=0.0, perceptual_guidance_scale=0.0, class predicted"
        in system["retrieval_at_1"]["name"]
    )

    # 3. A second call makes only what is missing.
    stamps = {f: f.stat().st_mtime_ns for f in files}
    file.unlink()
    main(args)
    assert {f for f in files if f.stat().st_mtime_ns != stamps[f]} == {file}
    assert np.abs(np.asarray(Image.open(file)).astype(int) - pixels).max() <= 2
    assert load(out / "metrics.json")["systems"]["generated"].keys() == system.keys()

    # 4. Images of other settings are not taken for those asked for.
    with pytest.raises(ValueError, match="generated with another seed, num_inference_steps"):
        main(arguments(model=str(model_dir), num_inference_steps=3, seed=1))
    with torch.no_grad():
        pipeline.unet.conv_in.bias.add_(1)
    pipeline.save_pretrained(tmp_path / "pipeline")
    with pytest.raises(ValueError, match="generated with another weights: take another folder"):
        main(arguments(model=str(tmp_path / "pipeline")))
    sheets = {path.name for path in (out / "sheets" / "generated").iterdir()}
    assert sheets == {"disc.png", "square.png", "all.png", "nearest_training_photos.png"}


@pytest.mark.slow
def test_redrawn_copies_are_what_the_model_is_given(arguments, model_dir, drawings_dir, tmp_path):
    args = arguments(model=str(model_dir), num_images_per_sketch=1, free_hand_strength=1.0, split="all")
    main(args)
    out = tmp_path / "out"
    copies = {f.relative_to(out / "redrawn"): np.asarray(Image.open(f)) for f in (out / "redrawn").glob("*/*.png")}
    assert len(copies) == 12 and all(set(np.unique(copy)) == {0, 255} for copy in copies.values())

    # 1. An image is that of the copy, and the drawing's contour is not quite the copy's.
    name = Path("square") / "square4.png"
    with Image.open(out / "images" / "square" / "square4_0.png") as image:
        seed, pixels = int(image.info["seed"]), np.asarray(image).astype(int)
    pipeline = DiffSketchingPipeline.from_pretrained(model_dir)
    images = {}
    for key, path in {"copy": out / "redrawn" / name, "drawing": drawings_dir / name}.items():
        generator = [torch.Generator().manual_seed(seed)]
        images[key] = np.asarray(pipeline(str(path), num_images_per_sketch=1, generator=generator).images[0])
    assert np.abs(images["copy"].astype(int) - pixels).max() <= 2 < np.abs(images["drawing"] - pixels).max()
    seen = SketchProcessor(64).preprocess([str(out / "redrawn" / name), str(drawings_dir / name)])
    assert 0.01 < (seen[0] - seen[1]).abs().mean() < 0.5

    # 2. Copies are keyed by the drawing alone: half of them are the same files.
    half = dataclasses.replace(args, split="report", output_dir=str(tmp_path / "half"))
    main(half)
    others = list((tmp_path / "half" / "redrawn").glob("*/*.png"))
    assert 0 < len(others) < 12
    for file in others:
        assert np.array_equal(np.asarray(Image.open(file)), copies[file.relative_to(tmp_path / "half" / "redrawn")])

    # 3. Weights of another type make other images, if only slightly, and the numbers say so.
    coarse = dataclasses.replace(half, output_dir=str(tmp_path / "coarse"), dtype="bfloat16")
    main(coarse)
    name = others[0].relative_to(tmp_path / "half" / "redrawn").with_name(f"{others[0].stem}_0.png")
    exact, found = (np.asarray(Image.open(tmp_path / run / "images" / name)).astype(int) for run in ("half", "coarse"))
    assert 0 < np.abs(exact - found).mean() < 8
    system = load(tmp_path / "coarse" / "metrics.json")["systems"]["generated"]
    assert "dtype=bfloat16" in system["class_agreement"]["name"]

    # 4. So they do of the copies, and images of the drawings as they are are not mixed in.
    system = load(out / "metrics.json")["systems"]["generated"]
    assert "given: the drawings redrawn at strength 1" in system["class_agreement"]["name"]
    with pytest.raises(ValueError, match="generated with another free_hand_strength"):
        main(dataclasses.replace(args, free_hand_strength=0.0))


@pytest.mark.slow
def test_filled_outlines_retrieve_their_drawings_and_blank_images_none(arguments, drawings_dir, tmp_path):
    filled = outlined_photos(drawings_dir, tmp_path / "filled")
    for path in sorted(filled.glob("*/*_0.png")):
        save(Image.open(path), path.with_name(path.name.replace("_0", "_1")))
        save(Image.new("RGB", (64, 64), "white"), tmp_path / "blank" / path.name)
    scores = main(arguments(images=[str(filled), f"empty={tmp_path / 'blank'}"]))
    assert list(scores) == [
        "filled",
        "empty",
        "training_photos",
        "reference_photos",
        "reference_photos_drawn_classes",
        "noise",
    ]
    assert scores["filled"]["retrieval_at_1"].value == scores["filled"]["retrieval_at_5"].value == 1
    assert scores["empty"]["retrieval_at_1"].value == scores["empty"]["retrieval_at_5"].value == 0
    assert scores["filled"]["contour_distance"].value < 0.02
    assert scores["empty"]["contour_distance"].value == pytest.approx(metrics.CHAMFER_CAP)
    assert scores["filled"]["pairwise_distance"].value == pytest.approx(0, abs=1e-6)
    assert scores["filled"]["pairwise_distance"].interval == pytest.approx((0, 0), abs=1e-6)
    table = (tmp_path / "out" / "metrics.md").read_text()
    assert "| nearest-drawing retrieval R@1 ↑ | 1 [1, 1] (N=24) | 0 [0, 0] (N=12) |" in table

    # What is null says why.
    assert scores["empty"]["pairwise_distance"].reason == "no drawing has two images"
    assert "fewer than 32 images: 24 against 72" in scores["filled"]["frechet_distance"].reason
    assert "- filled: Fréchet distance [" in table and "none, fewer than 32 images" in table


def sized_judge(source, folder, side, scale):
    """A copy of a judge that takes photos of `side` pixels, with other weights."""
    model = RegNetForImageClassification.from_pretrained(source)
    with torch.no_grad():
        model.classifier[-1].weight.mul_(scale)
    model.save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps({"size": {"height": side, "width": side}}))
    return str(folder)


@pytest.mark.slow
def test_several_judges_each_at_its_own_side(arguments, drawings_dir, evaluator_dir, photos_dir, tmp_path):
    filled = outlined_photos(drawings_dir, tmp_path / "filled", resolution=96)
    for path in sorted(filled.glob("*/*_0.png")):
        for n in (1, 2):
            save(Image.open(path), path.with_name(path.name.replace("_0", f"_{n}")))
    folders = [sized_judge(evaluator_dir, tmp_path / f"judge{n}", side, n) for n, side in ((1, 32), (-1, 48))]
    common = {"images": [str(filled)], "resolution": 96, "num_bootstrap_samples": 3}
    both, second = (
        main(arguments(**common, evaluator=evaluator, output_dir=str(tmp_path / name)))
        for name, evaluator in (("both", folders), ("second", folders[1]))
    )
    names = [Evaluator(folder).classifier.name for folder in folders]

    # 1. The first judge's numbers have plain names, the second's are what they are alone, under its name.
    ours, alone = both["filled"], second["filled"]
    for key in ("class_agreement", "frechet_distance", "recall", "pairwise_distance", "near_copy_share"):
        other = ours[f"{key} ({names[1]})"]
        assert (other.value, other.interval, other.name) == (alone[key].value, alone[key].interval, alone[key].name)
        assert ours[key].conditions["extractor"] == names[0] and ours[key].conditions["resize"].endswith("-32px")
        assert other.conditions["resize"].endswith("-48px")
    assert f"class_agreement_reweighted ({names[1]})" in both["reference_photos"]
    assert ours["class_agreement"].value == pytest.approx(1 - ours[f"class_agreement ({names[1]})"].value, abs=0.35)

    # 2. Colors and textures are compared at both sides, and at the one that was asked for, of files of that side.
    assert [key for key in ours if key.startswith("patch")] == [
        "patch_distance",
        "patch_distance (96 px)",
        "patch_distance (48 px)",
    ]
    assert ours["patch_distance (48 px)"].value == alone["patch_distance"].value
    assert ours["patch_distance (96 px)"].value == alone["patch_distance (96 px)"].value
    files = image_sets.list_class_folders(photos_dir / "validation", "reference")
    large = [
        patches.patch_projections(image_sets.read_photos(chosen, "x", 96).pixels)
        for chosen in (image_sets.list_class_folders(filled, "images"), files)
    ]
    expected = patches.patch_distance(large[0], patches.patch_quantiles(large[1]))
    assert ours["patch_distance (96 px)"].value == pytest.approx(expected, rel=1e-6)
    assert "(96 px) [" in ours["patch_distance (96 px)"].name
    for column in ("reference_photos", "training_photos", "noise"):
        assert both[column]["patch_distance (96 px)"].value is not None

    # 3. What depends on no judge is there once, and every row and number names its own.
    assert [key for key in ours if key.startswith(("retrieval", "contour", "nearest_training_pixel"))] == [
        "nearest_training_pixel_distance",
        "retrieval_at_1",
        "retrieval_at_5",
        "contour_distance",
    ]
    table = (tmp_path / "both" / "metrics.md").read_text()
    rows = [line.split(" ↑")[0] for line in table.splitlines() if line.startswith("| class agreement (")]
    assert rows == [f"| class agreement ({name})" for name in names]
    assert "| distance of colours and textures (sliced Wasserstein) (96 px) ↓ |" in table
    saved = load(tmp_path / "both" / "metrics.json")
    assert saved["settings"]["evaluator"]["extractor"] == names[0]
    assert [judge["extractor"] for judge in saved["settings"]["more_evaluators"]] == names[1:]
    assert saved["systems"]["filled"][f"class_agreement ({names[1]})"]["better"] == "higher"
    assert "more_evaluators" not in load(tmp_path / "second" / "metrics.json")["settings"]
    with pytest.raises(ValueError, match=f"`evaluator` must name different networks, but got {names[0]}, {names[0]}"):
        main(arguments(images=[str(filled)], evaluator=[folders[0]] * 2))


def test_images_of_other_drawings_retrieve_near_chance(drawings_dir):
    drawings = image_sets.read_drawings(drawings_dir)
    strokes = (
        SketchProcessor(metrics.CONTOUR_RESOLUTION).preprocess([str(d.path) for d in drawings])[:, 0] < 0
    ).numpy()
    distances = metrics.contour_distances(strokes, strokes)
    assert (metrics.retrieval_ranks(distances, np.arange(12)) == 0).all()
    hits = [
        (metrics.retrieval_ranks(distances, np.random.default_rng(seed).permutation(12)) == 0).mean()
        for seed in range(200)
    ]
    assert np.mean(hits) == pytest.approx(1 / 12, abs=0.02)


@pytest.mark.slow
def test_planted_copies_are_flagged_even_mirrored(arguments, drawings_dir, photos_dir, tmp_path):
    rng = np.random.default_rng(0)
    photos = {label: sorted((photos_dir / "train" / label).iterdir()) for label in LABELS}
    for path in sorted(drawings_dir.glob("*/*.png")):
        for n in range(2):
            photo = Image.open(photos[path.parent.name][rng.integers(40)])
            copy = image_sets.squash(photo, SIZE)
            save(
                copy.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if n else copy,
                tmp_path / "copies" / f"{path.stem}_{n}.png",
            )
    # By the features of another network than the one that names classes.
    torch.manual_seed(1)
    config = ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic")
    ResNetForImageClassification(config).save_pretrained(tmp_path / "resnet")
    scores = main(arguments(images=[str(tmp_path / "copies")], extractor=str(tmp_path / "resnet")))
    copies, real = scores["copies"], scores["reference_photos"]
    judges = {key: measured.conditions.get("extractor", "")[:7] for key, measured in copies.items()}
    assert judges["class_agreement"] == "regnet-" and judges["patch_distance"] == ""
    for key in ("frechet_distance", "precision", "pairwise_distance", "nearest_training_distance", "near_copy_share"):
        assert judges[key] == "resnet-"
    assert copies["near_copy_share"].value == 1
    assert copies["nearest_training_distance"].value == pytest.approx(0, abs=1e-5)
    assert copies["nearest_training_pixel_distance"].value == pytest.approx(0, abs=1e-5)
    assert real["near_copy_share"].value == pytest.approx(0.05, abs=0.02)
    assert real["nearest_training_pixel_distance"].value > 0.05
    assert not scores["noise"]["near_copy_share"].value


def test_agreement_is_relative_to_photos_with_the_drawings_classes(photos_dir, evaluator_dir, drawings_dir):
    evaluator = Evaluator(str(evaluator_dir), SIZE)
    files = image_sets.list_class_folders(photos_dir / "validation", "reference")
    # Three times as many squares as discs among the drawings, as many among the photos.
    drawings = image_sets.read_drawings(drawings_dir)
    selected = drawings[:2] + drawings[6:12]
    reference = evaluator.extract_features(image_sets.read_photos(files, "photos", SIZE), 32)
    scorer = scoring.Scorer(
        evaluator,
        drawings,
        np.ones((12, 4, 4), dtype=bool),
        selected,
        reference,
        reference,
        num_bootstrap_samples=0,
    )
    predicted = reference.probabilities.argmax(-1).numpy()
    truth = np.array([LABELS.index(label) for label in reference.labels])
    share = [(predicted == truth)[truth == i].mean() for i in range(2)]
    assert share[0] != share[1]
    ceiling = (2 * share[0] + 6 * share[1]) / 8
    assert scorer.reweighted_agreement(reference)["class_agreement_reweighted"].value == pytest.approx(ceiling)
    relative = scorer.relative_agreement(reference)["class_agreement_relative"]
    assert relative.value == pytest.approx((predicted == truth).mean() / ceiling) and relative.interval is None


# -- pictures --


def test_sheet_places_rows_in_columns():
    colors = ["red", "green", "blue", "gold", "black"]
    rows = [[Tile(Image.new("RGB", (8, 8), color)), Tile(Image.new("RGB", (8, 8), "gray"))] for color in colors]
    sheet = evaluation_report.draw_sheet(rows, num_columns=2)
    width, height = sheet.width // 2, sheet.height // 3
    for i, color in enumerate(colors):
        corner = ((i // 3) * width + 20, (i % 3) * height + 20)
        assert sheet.getpixel(corner) == Image.new("RGB", (1, 1), color).getpixel((0, 0))


# -- the command line --


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({}, "give `model` to generate images, `images` to score folders"),
        ({"images": ["nowhere"]}, "`images` must be folders, but 'nowhere' is none"),
        ({"model": "nowhere", "reference": "nowhere"}, "`reference` must be a folder, but 'nowhere' is none"),
        ({"model": "nowhere", "num_images_per_sketch": 0}, "`num_images_per_sketch` must be at least 1, but got 0"),
        ({"model": "nowhere", "extractor": "vgg"}, "must be `evaluator`, `inception` or a folder, but got 'vgg'"),
        ({"model": "nowhere", "free_hand_strength": -1.0}, "`free_hand_strength` must not be negative, but got -1.0"),
        ({"model": "{tmp_path}"}, "cannot be loaded"),
        (
            {"model": "{model_dir}", "split": "all", "train": "{model_dir}"},
            "`train` must hold images in one folder per",
        ),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(changes, message, arguments, model_dir, tmp_path, monkeypatch, capsys):
    def fill(value):
        return value.format(tmp_path=tmp_path, model_dir=model_dir) if isinstance(value, str) else value

    args = arguments(**{name: fill(value) for name, value in changes.items()})
    command = ["evaluate.py"]
    for name, value in vars(args).items():
        if value is not None:
            command += [f"--{name}", *(value if isinstance(value, list) else [str(value)])]
    monkeypatch.setattr("sys.argv", command)
    with pytest.raises(SystemExit) as exit:
        evaluate.run()
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert exit.value.code == 2 and error.startswith("evaluate.py: error: ") and message in error
    assert not (tmp_path / "out").exists()


def test_broken_training_photos_are_found_before_images_are_generated(arguments, model_dir, photos_dir, tmp_path):
    for label in LABELS:
        source = next((photos_dir / "train" / label).iterdir())
        for i in range(2):
            save(Image.open(source), tmp_path / "train" / label / f"{i}.png")
    broken = tmp_path / "train" / "disc" / "1.png"
    broken.write_bytes(broken.read_bytes()[:100])
    with pytest.raises(ValueError, match="1.png cannot be read as an image"):
        main(arguments(model=str(model_dir), train=str(tmp_path / "train")))
    assert not (tmp_path / "out").exists()


def test_help_names_arguments_and_defaults(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["evaluate.py", "--help"])
    with pytest.raises(SystemExit) as exit:
        evaluate.run()
    text = capsys.readouterr().out
    assert exit.value.code == 0 and "--num_images_per_sketch" in text and "(default: 4)" in text
    monkeypatch.setattr(
        "sys.argv", ["evaluate.py", *"--sketches a --reference b --train c --evaluator d --ref e".split()]
    )
    with pytest.raises(SystemExit) as exit:
        evaluate.run()
    assert exit.value.code == 2 and "--ref" in capsys.readouterr().err


@pytest.mark.slow
def test_the_judge_may_not_be_part_of_the_model(arguments, model_dir, tmp_path):
    pipeline = DiffSketchingPipeline.from_pretrained(model_dir)
    torch.manual_seed(1)
    config = ResNetConfig(embedding_size=8, hidden_sizes=[8], depths=[1], layer_type="basic", num_labels=2)
    config.id2label, config.label2id = dict(enumerate(LABELS)), {label: i for i, label in enumerate(LABELS)}
    pipeline.register_modules(image_encoder=ResNetForImageClassification(config))
    pipeline.save_pretrained(tmp_path / "pipeline")
    for judge in ("evaluator", "extractor"):
        args = arguments(model=str(tmp_path / "pipeline"), **{judge: str(tmp_path / "pipeline" / "image_encoder")})
        with pytest.raises(ValueError, match=f"`{judge}` is the `image_encoder` of `model`"):
            main(args)


def test_unknown_classes_are_named_and_need_no_evaluator(arguments, drawings_dir, tmp_path):
    save(Image.open(drawings_dir / "disc" / "disc0.png"), tmp_path / "drawings" / "kite" / "a.png")
    for n, color in enumerate(("red", "blue")):
        save(Image.new("RGB", (8, 8), color), tmp_path / "images" / f"a_{n}.png")
    given = {"sketches": str(tmp_path / "drawings"), "images": [str(tmp_path / "images")]}
    with pytest.raises(
        ValueError, match="`sketches` has the classes kite, which the `evaluator` does not know: disc, square"
    ):
        main(arguments(**given))
    config = ResNetConfig(embedding_size=8, hidden_sizes=[8], depths=[1], layer_type="basic")
    ResNetForImageClassification(config).save_pretrained(tmp_path / "resnet")
    scores = main(arguments(**given, evaluator=None, extractor=str(tmp_path / "resnet")))
    agreement, distance = (scores["images"][key] for key in ("class_agreement", "pairwise_distance"))
    assert agreement.value is None and agreement.reason == "no `evaluator` names classes"
    assert distance.value > 0 and distance.conditions["extractor"].startswith("resnet-")
