# SPDX-License-Identifier: Apache-2.0
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import train_encoders
from PIL import Image, ImageDraw
from torch import nn
from train_encoders import (
    NO_CLASS,
    EncoderArguments,
    FreeHandDataset,
    check_encoder_arguments,
    fit_to_page,
    make_model,
    smoothed_cross_entropy,
)
from transformers import MobileNetV2ForImageClassification, RegNetForImageClassification, ResNetForImageClassification

from diffsketching_pipeline.evaluation import image_sets
from diffsketching_pipeline.evaluation.extractors import Evaluator
from diffsketching_pipeline.images.free_hand import half_size
from diffsketching_pipeline.splits import in_first_half
from diffsketching_pipeline.training.dataset import PhotoSketchDataset
from diffsketching_pipeline.training.doodles import DOODLES


SCRIPT = Path(train_encoders.__file__)
CONFIGS = SCRIPT.parent / "configs"
TINY = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "groups_width": 8, "resolution": 32}
TINY |= {"train_batch_size": 4, "max_train_steps": 3, "lr_warmup_steps": 1, "logging_steps": 1, "validation_steps": 2}
TINY |= {"checkpointing_steps": 2, "report_to": "none"}


def words(**arguments):
    result = []
    for name, value in arguments.items():
        result += [f"--{name}", *(map(str, value) if isinstance(value, list) else [str(value)])]
    return result


def test_script_trains_resumes_and_measures_the_sketch_encoder(shapes_dir, cache_dir, tmp_path, script_env):
    for i, name in enumerate(["disc", "square"] * 2):
        drawing = Image.new("L", (100, 80), 255)
        shape = ImageDraw.Draw(drawing).ellipse if name == "disc" else ImageDraw.Draw(drawing).rectangle
        shape((20, 10, 60 + i, 50), outline=0, width=3)
        path = tmp_path / "drawings" / name / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        drawing.save(path)
    paths = {"train_data_dir": shapes_dir, "cache_dir": cache_dir, "output_dir": tmp_path / "out"}
    command = [sys.executable, str(SCRIPT), *words(**TINY, **paths, validation_drawings_dir=tmp_path / "drawings")]
    for extra in ([], ["--resume_from_checkpoint", "latest", "--max_train_steps", "4"]):
        result = subprocess.run(command + extra, env=script_env, capture_output=True, text=True)
        assert result.returncode == 0, result.stderr
    assert "resuming from" in result.stderr

    model = ResNetForImageClassification.from_pretrained(tmp_path / "out" / "sketch_encoder")
    assert model.config.id2label == {0: "disc", 1: "square"} and model.config.num_channels == 1
    report = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert report.keys() >= {"validation", "drawings_tune", "drawings_report"}
    validation = PhotoSketchDataset(
        shapes_dir, "validation", 32, train=False, cache_dir=cache_dir, contours="none", color_jitter=0.3
    )
    samples = [FreeHandDataset(validation, 1.0, train=False).sample(i) for i in range(8)]
    with torch.no_grad():
        logits = model(torch.stack([s["pixel_values"] for s in samples])).logits
    right = [int(logit.argmax()) == s["class_label"] for logit, s in zip(logits, samples, strict=True)]
    assert report["validation"]["accuracy"] == pytest.approx(np.mean(right))
    assert (tmp_path / "out" / "samples" / "validation-000004.png").is_file()


@pytest.mark.slow
@pytest.mark.parametrize(
    "task, folder, model_class",
    [
        ("image", "image_encoder", ResNetForImageClassification),
        ("evaluation", "evaluation", RegNetForImageClassification),
    ],
)
def test_photo_tasks(shapes_dir, cache_dir, tmp_path, monkeypatch, task, folder, model_class):
    arguments = words(
        **TINY,
        task=task,
        train_data_dir=shapes_dir,
        cache_dir=cache_dir,
        output_dir=tmp_path,
        mixup_alpha=0.2,
        random_erasing=0.5,
    )
    monkeypatch.setattr(sys, "argv", ["train_encoders.py", *arguments])
    train_encoders.main()
    model = model_class.from_pretrained(tmp_path / folder)
    assert model(torch.zeros(1, 3, 32, 32)).logits.shape == (1, 2)
    args = EncoderArguments(task=task, pretrained_model_name_or_path=str(tmp_path / folder))
    continued = make_model(args, {0: "disc", 1: "square"})
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), continued.parameters(), strict=True))
    assert continued.config.image_size == args.resolution == 64  # and not 32
    other = make_model(args, {0: "hat", 1: "disc"})
    assert other.config.id2label == {0: "hat", 1: "disc"} and other.config.label2id["hat"] == 0
    assert torch.equal(other.classifier[-1].weight[1], model.classifier[-1].weight[0])
    torch.testing.assert_close(other.classifier[-1].weight[0], model.classifier[-1].weight.mean(0))
    assert 0 <= json.loads((tmp_path / "metrics.json").read_text())["validation"]["accuracy"] <= 1


def test_evaluation_encoder_sees_one_half_of_the_training_photos(shapes_dir, cache_dir):
    args = EncoderArguments(task="evaluation", cache_dir=str(cache_dir), resolution=32)
    ids = train_encoders.make_dataset(args, shapes_dir, "train").ids
    assert ids == [
        i for i in PhotoSketchDataset(shapes_dir, cache_dir=cache_dir, resolution=32).ids if in_first_half(i)
    ]
    assert 0 < len(ids) < 16
    assert len(train_encoders.make_dataset(args, shapes_dir, "validation")) == 8


@pytest.mark.slow
@pytest.mark.parametrize("family", ["regnet", "mobilenet_v2"])
def test_evaluation_network_of_any_family_grows_to_its_side(shapes_dir, tmp_path, monkeypatch, family):
    paths = {"train_data_dir": shapes_dir, "output_dir": tmp_path}
    more = {"evaluation_model": family, "depth_multiplier": 0.1, "start_resolution": 16, "object_crops": "false"}
    arguments = words(**TINY | {"max_train_steps": 6, "save_dtype": "float16"}, **paths, task="evaluation", **more)
    monkeypatch.setattr(sys, "argv", ["train_encoders.py", *arguments])
    sides = []
    family_class = {"regnet": RegNetForImageClassification, "mobilenet_v2": MobileNetV2ForImageClassification}[family]

    def note(model, inputs):
        if isinstance(model, family_class) and model.training and torch.is_grad_enabled():
            sides.append(inputs[0].shape[-1])

    handle = nn.modules.module.register_module_forward_pre_hook(note)
    train_encoders.main()
    handle.remove()
    assert sides == [16, 20, 24, 28, 32, 32]
    # `evaluate.py` takes it at that side, and sees what was measured.
    evaluator = Evaluator(str(tmp_path / "evaluation"), 200)
    assert evaluator.resolution == 32 and evaluator.classifier.model.config.model_type == family
    files = image_sets.list_class_folders(shapes_dir / "validation", "reference")
    photos = image_sets.read_photos(files, "photos", 32)
    truth = torch.tensor([evaluator.labels.index(label) for label in photos.labels])
    right = (evaluator(photos.pixels, 8)[0].argmax(-1) == truth).float().mean().item()
    assert json.loads((tmp_path / "metrics.json").read_text())["validation"]["accuracy"] == pytest.approx(right)


def test_photos_without_contours_are_seen_as_evaluation_sees_them(shapes_dir, tmp_path):
    rng = np.random.default_rng(0)
    for split in ("train", "validation"):
        path = tmp_path / split / "disc" / "wide.png"
        path.parent.mkdir(parents=True)
        Image.fromarray(rng.integers(0, 256, (64, 128, 3), dtype=np.uint8)).save(path)
    args = EncoderArguments(task="evaluation", resolution=32, object_crops=False)
    pixels = train_encoders.make_dataset(args, tmp_path, "validation").sample(0)["pixel_values"]
    expected = np.asarray(image_sets.squash(Image.open(tmp_path / "validation/disc/wide.png"), 32))
    np.testing.assert_allclose((pixels.permute(1, 2, 0).numpy() + 1) * 127.5, expected, atol=1)
    train = train_encoders.PlainPhotoDataset(tmp_path, "train", 32)
    boxes = np.array([train._crop_box(train.photo(0), np.random.default_rng(i)) for i in range(200)])
    widths, heights = boxes[:, 2] - boxes[:, 0], boxes[:, 3] - boxes[:, 1]
    # Of 2:1, at most 4:3, and more than half of the height, around the middle.
    assert widths.max() <= 2 / 3 + 1e-9 and heights.max() <= 1
    assert 0.5 < heights.min() < 0.7 and 0.9 < heights.max() and 0.25 < widths.min() < 0.4 and 0.6 < widths.max()
    assert (boxes[:, :2] <= 0.5).all() and (boxes[:, 2:] >= 0.5).all() and boxes.min() >= 0 and boxes.max() <= 1


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"start_resolution": 8}, "`start_resolution`.* 16 .* 64.* 8"),
        ({"start_resolution": 128}, "`start_resolution`.* 16 .* 64.* 128"),
        ({"task": "sketch", "object_crops": False}, "`object_crops`.*`task` sketch"),
    ],
)
def test_arguments_that_cannot_be_are_errors(changes, message):
    args = EncoderArguments(**{"task": "evaluation"} | changes)
    with pytest.raises(ValueError, match=message):
        train_encoders.check_encoder_arguments(args)


def test_published_judge_of_128_pixels_has_the_intended_shape():
    from diffsketching_pipeline.training.arguments import parse_args

    args = parse_args(EncoderArguments, [str(CONFIGS / "evaluation_garments128.yaml")])
    model = make_model(args, {i: str(i) for i in range(15)}).eval()
    maps = model(torch.zeros(1, 3, 128, 128), output_hidden_states=True).hidden_states
    assert [m.shape[-1] for m in maps] == [64, 32, 16, 8, 4] and sum(p.numel() for p in model.parameters()) < 4e6
    sides = [train_encoders.side_at(step, args, 2000) for step in (0, 333, 334, 1333, 1334, 1999)]
    assert sides == [64, 64, 80, 112, 128, 128]
    # Other weights and another shape than the 64 px judge's: the two must not fail alike.
    small = parse_args(EncoderArguments, [str(CONFIGS / "evaluation_garments64.yaml")])
    assert args.seed != small.seed and args.hidden_sizes != small.hidden_sizes


@pytest.mark.parametrize("name", ["sketch_encoder", "image_encoder", "evaluation"])
def test_published_configs_have_the_intended_shapes(name):
    from diffsketching_pipeline.training.arguments import parse_args

    args = parse_args(EncoderArguments, [str(CONFIGS / f"{name}_garments64.yaml")])
    model = make_model(args, {i: str(i) for i in range(15)}).eval()
    channels = 1 if name == "sketch_encoder" else 3
    maps = model(torch.zeros(1, channels, 64, 64), output_hidden_states=True).hidden_states
    assert [m.shape[-1] for m in maps] == ([32, 16, 8, 4, 2] if name == "evaluation" else [16, 16, 8, 4])
    assert 0.5e6 < sum(p.numel() for p in model.parameters()) < 4e6
    assert train_encoders.COMPONENT_NAMES[args.task] == name


# ---- drawings --------------------------------------------------------------------------------------------------------


def test_half_size_keeps_every_stroke():
    ink = np.random.default_rng(0).random((7, 10)) < 0.15
    expected = np.zeros((4, 5), bool)
    for y, x in zip(*np.nonzero(ink), strict=True):
        expected[y // 2, x // 2] = True
    np.testing.assert_array_equal(half_size(ink), expected)


def test_fit_to_page_centers_with_a_margin():
    ink = np.zeros((50, 90), bool)
    ink[5:25, 30:70] = True
    page = fit_to_page(ink, margin=0.1)
    rows, columns = np.flatnonzero(page.any(1)), np.flatnonzero(page.any(0))
    assert page.shape == (50, 50) and page.sum() == 20 * 40
    assert (columns[0], columns[-1] + 1, rows[0], rows[-1] + 1) == (5, 45, 15, 35)
    assert not fit_to_page(np.zeros((4, 4), bool), 0.1).any()


def test_free_hand_samples_are_keyed_and_drawn(shapes_dir, cache_dir):
    photos = PhotoSketchDataset(shapes_dir, resolution=64, cache_dir=cache_dir, contours="none")
    one, other = FreeHandDataset(photos, 1.0), FreeHandDataset(photos, 1.0)
    for draw in range(12):
        sample = one.sample(draw, draw)
        assert torch.equal(sample["pixel_values"], other.sample(draw, draw)["pixel_values"])
        assert sample["pixel_values"].shape == (1, 64, 64)
        ink = ((1 - sample["pixel_values"]) / 2).mean()
        assert 0.005 < ink < 0.4
    assert not torch.equal(one.sample(0, 0)["pixel_values"], one.sample(0, 1)["pixel_values"])


def test_doodles_take_the_place_of_contours_of_known_classes_in_training(shapes_dir, cache_dir, monkeypatch):
    photos = PhotoSketchDataset(shapes_dir, resolution=64, cache_dir=cache_dir, contours="none")
    drawn = []

    def vertical_line(rng):
        drawn.append("disc")
        return [[(0.0, 0.0), (0.0, 1.0)]]

    monkeypatch.setitem(DOODLES, "disc", vertical_line)
    for train, share, expected in ((True, 1.0, 40), (True, 0.5, 20), (True, 0.0, 0), (False, 1.0, 0)):
        drawn.clear()
        dataset = FreeHandDataset(photos, 1.0, train, doodle_share=share)
        discs = [i for i in range(len(photos)) if photos.class_labels[i] == photos.label2id["disc"]]
        squares = [i for i in range(len(photos)) if i not in discs]
        samples = [dataset.sample(discs[k % len(discs)], epoch=k) for k in range(40)]
        assert abs(len(drawn) - expected) <= (12 if share == 0.5 else 0)
        dataset.sample(squares[0])
        assert abs(len(drawn) - expected) <= (12 if share == 0.5 else 0)
        if share == 1.0 and train:  # a line, however badly drawn, is taller than wide
            for sample in samples:
                rows, columns = (
                    (sample["pixel_values"][0] < 0).any(1).sum(),
                    (sample["pixel_values"][0] < 0).any(0).sum(),
                )
                assert rows > columns


def test_a_share_of_the_training_drawings_lacks_strokes(shapes_dir, cache_dir, monkeypatch):
    photos = PhotoSketchDataset(shapes_dir, resolution=64, cache_dir=cache_dir, contours="none")
    shares = []

    def delete(ink, rng, share):
        shares.append(share)
        return ink

    monkeypatch.setattr(train_encoders, "delete_strokes", delete)
    for train, share, least, most in ((True, 1.0, 16, 16), (True, 0.5, 3, 13), (True, 0.0, 0, 0), (False, 1.0, 0, 0)):
        shares.clear()
        dataset = FreeHandDataset(photos, 0.0, train, stroke_deletion_share=share, max_stroke_deletion=0.4)
        for i in range(16):
            dataset.sample(i)
        assert least <= len(shares) <= most
        assert all(0 <= value <= 0.4 for value in shares)


def test_a_share_of_the_training_drawings_shows_other_things(shapes_dir, cache_dir):
    photos = PhotoSketchDataset(shapes_dir, resolution=64, cache_dir=cache_dir, contours="none")
    for train, share in ((True, 0.5), (False, 0.5)):
        dataset = FreeHandDataset(photos, 1.0, train, other_share=share)
        samples = [dataset.sample(i % 16, epoch=i // 16) for i in range(40)]
        others = [i for i, sample in enumerate(samples) if sample["class_label"] == NO_CLASS]
        assert 8 < len(others) < 32 if train else not others
        for i in set(range(40)) - set(others):
            assert samples[i]["class_label"] == photos.class_labels[i % 16]
        assert all((samples[i]["pixel_values"] < 0).any() for i in others)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [({"other_share": 1.0}, "`other_share` .*1.0"), ({"other_share": 0.2, "task": "image"}, "`other_share` .*image")],
)
def test_other_things_are_drawings_and_never_all_of_them(arguments, message):
    with pytest.raises(ValueError, match=message):
        check_encoder_arguments(EncoderArguments(**arguments))


def test_the_loss_wants_no_belief_in_any_class_for_other_things():
    logits = torch.randn(3, 4, generator=torch.Generator().manual_seed(0), requires_grad=True)
    labels = torch.tensor([2, NO_CLASS, 0])
    loss = smoothed_cross_entropy(logits, labels, 0.1)
    targets = torch.full((3, 4), 0.1 / 4)
    targets[0, 2] += 0.9
    targets[1] = 1 / 4
    targets[2, 0] += 0.9
    torch.testing.assert_close(loss, -(targets * logits.log_softmax(-1)).sum(-1).mean())
    loss.backward()
    assert torch.isfinite(logits.grad).all()


def test_contours_without_their_weights_are_refused(shapes_dir, monkeypatch):
    arguments = words(**TINY, train_data_dir=shapes_dir, contours="hed")
    monkeypatch.setattr(sys, "argv", ["train_encoders.py", *arguments])
    with pytest.raises(ValueError, match="`hed_weights`.* None"):
        train_encoders.main()


def test_halves_do_not_follow_the_split():
    ids = [f"photo-{i}" for i in range(1000)]
    assert 0.45 < np.mean([in_first_half(i) for i in ids]) < 0.55


def test_erased_rectangle_has_one_color():
    sample = {"pixel_values": torch.linspace(-1, 1, 3 * 32 * 32).view(3, 32, 32), "id": "a"}
    for seed in range(20):
        erased = train_encoders.erase_randomly(1.0)(sample, torch.Generator().manual_seed(seed))["pixel_values"]
        changed = (erased != sample["pixel_values"]).all(0)
        assert 0.02 < changed.float().mean() < 0.25
        assert all(len(erased[c][changed].unique()) == 1 and erased[c].abs().max() <= 1 for c in range(3))
    unchanged = train_encoders.erase_randomly(0.0)(sample, torch.Generator())
    assert torch.equal(unchanged["pixel_values"], sample["pixel_values"])


# ---- measuring -------------------------------------------------------------------------------------------------------


def test_recalibrated_statistics_are_those_of_the_batches():
    norm = nn.BatchNorm2d(3)
    norm.running_mean.fill_(9.0)

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = norm

        def forward(self, x):
            return self.norm(x)

    batches = [torch.randn(8, 3, 4, 4, generator=torch.Generator().manual_seed(i)) + i for i in range(5)]
    model = Model()
    train_encoders.recalibrate_batch_norm(model, iter({"pixel_values": b} for b in batches), num_batches=5)
    torch.testing.assert_close(norm.running_mean, torch.stack([b.mean((0, 2, 3)) for b in batches]).mean(0))
    torch.testing.assert_close(norm.running_var, torch.stack([b.var((0, 2, 3)) for b in batches]).mean(0))
    assert norm.momentum == 0.1 and not model.training


def test_accuracies_by_hand():
    probabilities = torch.tensor(
        [[0.7, 0.2, 0.1, 0.0], [0.1, 0.5, 0.4, 0.0], [0.6, 0.3, 0.1, 0.0], [0.3, 0.4, 0.2, 0.1], [0.2, 0.3, 0.4, 0.1]]
    )
    labels = torch.tensor([0, 1, 1, 3, 1])
    result = train_encoders.accuracies(probabilities, labels, dict(enumerate("abcd")))
    assert result == pytest.approx(
        {
            "accuracy": 2 / 5,
            "top3_accuracy": 4 / 5,
            "mean_class_accuracy": (1 + 1 / 3 + 0) / 3,
            "class/a": 1.0,
            "class/b": 1 / 3,
            "class/d": 0.0,
        }
    )


def test_folder_without_drawings_is_refused(tmp_path):
    with pytest.raises(ValueError, match="`validation_drawings_dir`"):
        train_encoders.load_drawings(tmp_path, {"hat": 0}, 64)
