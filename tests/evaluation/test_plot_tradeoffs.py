# SPDX-License-Identifier: Apache-2.0
import json

import numpy as np
import plot_tradeoffs
import pytest
from PIL import Image
from plot_tradeoffs import PlotArguments


PLAIN = {
    "scheduler": "DDIMScheduler",
    "timestep_spacing": "leading",
    "num_inference_steps": 25,
    "eta": 1.0,
    "sketch_guidance_scale": 2.0,
    "classifier_guidance_scale": 6.0,
    "perceptual_guidance_scale": 0.0,
    "strength": 1.0,
    "withhold": [],
}


def score(value, spread=0.1):
    interval = None if value is None or spread is None else [value - spread, value + 2 * spread]
    return {"value": value, "interval": interval, "n": 49}


def write_metrics(path, systems, evaluator="judge", drawings=("disc/disc0",)):
    """`{name: (changes of settings or None, contour distance, Fréchet distance)}` as evaluate.py writes it."""
    settings = {name: PLAIN | changes for name, (changes, *_) in systems.items() if changes is not None}
    content = {
        "settings": {
            "evaluator": {"fingerprint": evaluator},
            "drawings": list(drawings),
            "arguments": {"num_images_per_sketch": 1},
            "systems": settings,
        },
        "systems": {
            name: {"contour_distance": score(contour, 0.001), "frechet_distance": score(frechet)}
            for name, (_, contour, frechet) in systems.items()
        },
    }
    path.write_text(json.dumps(content))
    return str(path)


@pytest.fixture
def sweep(tmp_path):
    return write_metrics(
        tmp_path / "metrics.json",
        {
            "sketch-3": ({"sketch_guidance_scale": 3.0}, 0.010, 20.0),
            "sketch-1": ({"sketch_guidance_scale": 1.0}, 0.030, 12.0),
            "full": ({}, 0.020, 14.0),
            "unipc-10": ({"scheduler": "UniPC", "num_inference_steps": 10}, 0.022, 19.0),
            "unipc-5": ({"scheduler": "UniPC", "num_inference_steps": 5}, 0.024, 29.0),
            "gan": (None, 0.015, 33.0),
            "training_photos": (None, None, 6.0),
        },
    )


def lines(axes):
    """The data of each line of error bars by its label."""
    return {
        container.get_label(): (container[0].get_xdata(), container[0].get_ydata()) for container in axes.containers
    }


def test_systems_that_differ_in_one_setting_are_joined_in_its_order(sweep):
    points = plot_tradeoffs.read_points([sweep], ["contour_distance", "frechet_distance"])
    assert "training_photos" not in [point.name for point in points]
    series = plot_tradeoffs.find_series(points, plot_tradeoffs.GUIDANCE_SETTINGS)
    names = {entry.setting: [point.name for point in entry.points] for entry in series if entry.setting}
    assert names == {"sketch_guidance_scale": ["sketch-1", "full", "sketch-3"]}
    assert [entry.points[0].name for entry in series if entry.setting is None] == ["unipc-10", "unipc-5", "gan"]


def test_a_line_says_what_is_withheld(tmp_path):
    blind = {"withhold": ["class", "sketch"]}
    path = write_metrics(
        tmp_path / "metrics.json",
        {"floor": (blind, 0.06, 30.0), "sdedit": (blind | {"strength": 0.7}, 0.02, 40.0), "full": ({}, 0.02, 14.0)},
    )
    points = plot_tradeoffs.read_points([path], ["contour_distance", "frechet_distance"])
    series = plot_tradeoffs.find_series(points, plot_tradeoffs.GUIDANCE_SETTINGS)
    assert [entry.label for entry in series] == ["strength, without sketch and class", "full"]
    assert [point.name for point in series[0].points] == ["sdedit", "floor"]


def test_plots_show_the_numbers_with_better_up_and_right(sweep):
    points = plot_tradeoffs.read_points([sweep], ["contour_distance", "frechet_distance"])
    (axes,) = plot_tradeoffs.plot_faithfulness_realism(points, "contour_distance", "frechet_distance").axes
    x, y = lines(axes)["sketch_guidance_scale"]
    assert x.tolist() == [12.0, 14.0, 20.0] and y.tolist() == [0.030, 0.020, 0.010]
    assert lines(axes)["gan"][0].tolist() == [33.0]
    assert axes.xaxis_inverted() and axes.yaxis_inverted()
    assert [text.get_text() for text in axes.texts][:3] == ["1", "2", "3"]
    low, high = axes.containers[0][2][1].get_segments()[0][:, 1]
    assert (low, high) == pytest.approx((0.029, 0.032))

    (axes,) = plot_tradeoffs.plot_quality_steps(points, "frechet_distance").axes
    (x, y) = lines(axes)["UniPC, leading"]
    assert x.tolist() == [5, 10] and y.tolist() == [29.0, 19.0] and len(axes.containers) == 1
    assert axes.yaxis_inverted() and not axes.xaxis_inverted()


@pytest.mark.slow
def test_files_are_joined_and_pictures_written(sweep, tmp_path, monkeypatch, capsys):
    more = {"full": ({}, 0.020, 14.0), "sketch-5": ({"sketch_guidance_scale": 5.0}, 0.009, 31.0)}
    second = write_metrics(tmp_path / "more.json", more)
    points = plot_tradeoffs.read_points([sweep, second], ["contour_distance", "frechet_distance"])
    series = plot_tradeoffs.find_series(points, ["sketch_guidance_scale"])[0]
    assert [point.name for point in series.points] == ["sketch-1", "full", "sketch-3", "sketch-5"]
    monkeypatch.setattr("sys.argv", ["plot_tradeoffs.py", sweep, second, "--output_dir", str(tmp_path / "plots")])
    plot_tradeoffs.run()
    written = [tmp_path / "plots" / name for name in ("faithfulness_realism.png", "quality_steps.png")]
    assert capsys.readouterr().out.split() == [str(path) for path in written]
    for path in written:
        assert np.unique(np.asarray(Image.open(path).convert("RGB")).reshape(-1, 3), axis=0).shape[0] > 50
    only = plot_tradeoffs.main(PlotArguments([second], str(tmp_path / "second")))
    assert [path.name for path in only] == ["faithfulness_realism.png"]


def test_what_cannot_be_compared_is_not_plotted(sweep, tmp_path):
    other = write_metrics(tmp_path / "other.json", {"full": ({}, 0.020, 14.0)}, evaluator="another")
    with pytest.raises(ValueError, match="other.json', which differ in evaluator"):
        plot_tradeoffs.main(PlotArguments([sweep, other], str(tmp_path / "plots")))
    half = write_metrics(tmp_path / "half.json", {"full": ({}, 0.020, 14.0)}, drawings=["disc/disc1"])
    with pytest.raises(ValueError, match="which differ in drawings"):
        plot_tradeoffs.main(PlotArguments([sweep, half], str(tmp_path / "plots")))
    with pytest.raises(ValueError, match="no system with a value of recall and frechet_distance"):
        plot_tradeoffs.main(PlotArguments([sweep], str(tmp_path / "plots"), faithfulness="recall"))
    with pytest.raises(ValueError, match="`realism`.* 'fid'"):
        plot_tradeoffs.main(PlotArguments([sweep], str(tmp_path / "plots"), realism="fid"))
    with pytest.raises(ValueError, match="`metrics` must be files of evaluate.py, but 'nowhere' is none"):
        plot_tradeoffs.main(PlotArguments(["nowhere"], str(tmp_path / "plots")))
    assert not (tmp_path / "plots").exists()
