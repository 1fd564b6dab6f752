# SPDX-License-Identifier: Apache-2.0
import json

import draw_contours
import numpy as np
import pytest
from draw_contours import ContourArguments
from PIL import Image

from diffsketching_pipeline.evaluation import free_hand_gap
from diffsketching_pipeline.evaluation.image_sets import read_drawings
from diffsketching_pipeline.evaluation.measurements import Measurement
from diffsketching_pipeline.evaluation.run import main
from diffsketching_pipeline.images.contours import CONTOUR_NAMES, photo_to_contours
from diffsketching_pipeline.splits import in_first_half


# Each draws contours and scores.
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def contours_dir(photos_dir, drawings_dir, tmp_path_factory):
    folder = tmp_path_factory.mktemp("contours")
    draw_contours.main(ContourArguments(str(photos_dir / "validation"), str(drawings_dir), str(folder)))
    return folder


@pytest.mark.slow
def test_contours_are_those_of_the_photos_as_many_as_drawings_in_each_half(contours_dir, photos_dir, drawings_dir):
    def halves(folder):
        drawings = read_drawings(folder)
        return sorted((d.label, in_first_half(d.name)) for d in drawings)

    assert halves(contours_dir) == halves(drawings_dir)
    for drawing in read_drawings(contours_dir):
        photo = Image.open(photos_dir / "validation" / drawing.label / f"{drawing.name}.png")
        expected = photo_to_contours(photo)[CONTOUR_NAMES.index("object")]
        assert expected.any() and np.array_equal(np.asarray(Image.open(drawing.path)) == 0, expected)


def test_contours_are_made_once_and_not_mixed(contours_dir, photos_dir, drawings_dir):
    stamps = {path: path.stat().st_mtime_ns for path in contours_dir.glob("*/*.png")}
    gone = sorted(stamps)[3]
    content = gone.read_bytes()
    gone.unlink()
    args = ContourArguments(str(photos_dir / "validation"), str(drawings_dir), str(contours_dir))
    assert draw_contours.main(args) == 12
    assert {path for path in stamps if path.stat().st_mtime_ns != stamps[path]} == {gone}
    assert gone.read_bytes() == content
    args.contour = "fine"
    with pytest.raises(ValueError, match="`output_dir` holds contours made with another contour: take another folder"):
        draw_contours.main(args)


def test_a_photo_without_edges_makes_room_for_the_next(tmp_path, photos_dir, drawings_dir):
    for path in (photos_dir / "validation" / "disc").glob("*.png"):
        (tmp_path / "photos" / "disc").mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (64, 64), "white").save(tmp_path / "photos" / "disc" / path.name)
    kept = sorted((photos_dir / "validation" / "disc").glob("*.png"))[:20]
    for path in kept:
        (tmp_path / "photos" / "disc" / path.name).write_bytes(path.read_bytes())
    args = ContourArguments(str(tmp_path / "photos"), str(drawings_dir), str(tmp_path / "out"))
    assert draw_contours.main(args) == 6
    assert {path.name for path in (tmp_path / "out" / "disc").iterdir()} <= {path.name for path in kept}


def test_command_line_says_what_is_wrong(tmp_path, drawings_dir, monkeypatch, capsys):
    output = ["--output_dir", str(tmp_path / "contours")]
    monkeypatch.setattr("sys.argv", ["x", "--reference", "nowhere", "--like", str(drawings_dir), *output])
    with pytest.raises(SystemExit) as exit:
        draw_contours.run()
    error = capsys.readouterr().err.strip()
    assert (
        exit.value.code == 2
        and error == "draw_contours.py: error: `reference` must be a folder, but 'nowhere' is none."
    )
    assert not (tmp_path / "contours").exists()


def test_interval_of_a_difference_covers_as_often_as_it_says():
    rng = np.random.default_rng(0)
    hits, trials = 0, 2000
    for a, b in zip(rng.normal(1, 0.3, trials), rng.normal(-2, 0.4, trials), strict=True):
        low, high = free_hand_gap.difference_interval(a, (a - 0.588, a + 0.588), b, (b - 0.784, b + 0.784))
        hits += low < 3 < high
    assert hits / trials == pytest.approx(0.95, abs=0.015)
    # Skewed estimates: what is long below is long below.
    assert free_hand_gap.difference_interval(5, (2, 6), 1, (1, 1)) == (1, 5)
    assert free_hand_gap.difference_interval(5, (5, 5), 1, (0, 4)) == (1, 5)


def test_gap_is_the_difference_or_says_why_there_is_none():
    human = {
        "retrieval_at_1": Measurement("R@1", 0.6, 40, (0.5, 0.7), {"drawings": "all"}),
        "recall": Measurement("recall", None, 12, reason="fewer than 32 images"),
        "seconds_per_image": Measurement("seconds", 4.0, 40),
        "pairwise_lpips": Measurement("LPIPS", 0.4, 40),
    }
    contours = {
        "retrieval_at_1": {"value": 0.9, "n": 38, "interval": [0.9, 0.9], "reason": None},
        "recall": {"value": 0.5, "n": 40, "interval": None, "reason": None},
        "seconds_per_image": {"value": 5.0, "n": 40, "interval": None, "reason": None},
    }
    gap = free_hand_gap.free_hand_gap(human, contours)
    assert gap.keys() == {"retrieval_at_1", "recall"}
    assert gap["retrieval_at_1"].value == pytest.approx(-0.3)
    assert gap["retrieval_at_1"].interval == pytest.approx((-0.4, -0.2))
    assert "human drawings minus contours [drawings: all; contours: 38 images; N: 40]" in gap["retrieval_at_1"].name
    assert gap["recall"].value is None and gap["recall"].reason == "none on human drawings: fewer than 32 images"


@pytest.mark.slow
def test_gap_is_in_the_report(arguments, model_dir, contours_dir, drawings_dir, tmp_path):
    common = {"model": str(model_dir), "num_images_per_sketch": 1, "num_inference_steps": 1}
    main(arguments(**common, sketches=str(contours_dir), output_dir=str(tmp_path / "contours")))
    metrics = str(tmp_path / "contours" / "metrics.json")
    main(arguments(**common, contour_metrics=metrics))
    saved, other = (json.loads((tmp_path / name / "metrics.json").read_text()) for name in ("out", "contours"))
    for key in ("contour_distance", "class_agreement", "near_copy_share"):
        ours, theirs = (content["systems"]["generated"][key]["value"] for content in (saved, other))
        assert saved["free_hand_gap"]["generated"][key]["value"] == pytest.approx(ours - theirs)
    gap = saved["free_hand_gap"]["generated"]["contour_distance"]
    assert gap["value"] != 0 and gap["interval"][0] < gap["value"] < gap["interval"][1]
    assert "## Free-hand gap" in (tmp_path / "out" / "metrics.md").read_text()
    for change in ({"fingerprint": "another"}, {"features": {"extractor": "inception"}}):
        judge = saved["settings"]["evaluator"] | change
        (tmp_path / "other.json").write_text(json.dumps({**other, "settings": {"evaluator": judge}}))
        with pytest.raises(ValueError, match="`contour_metrics` has numbers of another evaluation network"):
            main(arguments(**common, contour_metrics=str(tmp_path / "other.json")))
    with pytest.raises(ValueError, match="`contour_metrics` must be a `metrics.json`"):
        main(arguments(**common, contour_metrics=str(drawings_dir)))


def test_a_second_judge_has_a_gap_of_its_own():
    human = {
        key: Measurement("title", value, 40, (value - 0.1, value + 0.1), {"extractor": judge})
        for key, value, judge in (("class_agreement", 0.5, "a"), ("class_agreement (b)", 0.7, "b"))
    }
    contours = {key: {"value": 0.4, "n": 10, "interval": None, "reason": None} for key in human}
    gaps = free_hand_gap.free_hand_gap(human, contours)
    assert {key: gap.value for key, gap in gaps.items()} == {
        "class_agreement": pytest.approx(0.1),
        "class_agreement (b)": pytest.approx(0.3),
    }
    assert gaps["class_agreement (b)"].name.startswith("class agreement, human drawings minus contours [extractor: b")
