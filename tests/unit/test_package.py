# SPDX-License-Identifier: Apache-2.0
import copy
import re
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
from testing_utils import ROOT

import diffsketching_pipeline
from diffsketching_pipeline import registry


def run(code):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()


def test_importing_the_package_imports_nothing_heavy():
    code = "import sys, diffsketching_pipeline as d; d.__version__, dir(d)\n"
    code += "print(*sorted({'torch', 'diffusers', 'transformers', 'numpy'} & set(sys.modules)), 'end')"
    assert run(code) == ["end"]


def test_every_public_name_is_there():
    for name in diffsketching_pipeline.__all__:
        assert getattr(diffsketching_pipeline, name) is getattr(diffsketching_pipeline, name)
    assert set(diffsketching_pipeline.__all__) <= set(dir(diffsketching_pipeline))
    assert {
        "ClassifierGuidanceCallback",
        "DiffSketchingPipeline",
        "DiffSketchingPipelineOutput",
        "NoisyImageClassifier",
        "PhotoSketcher",
        "SketchGuidanceCallback",
        "SketchPerceptualLoss",
        "SketchProcessor",
        "bundled_checkpoint",
        "expand_unet_for_sketch",
    } <= set(diffsketching_pipeline.__all__)
    with pytest.raises(AttributeError, match="module 'diffsketching_pipeline' has no attribute 'Pipeline'"):
        diffsketching_pipeline.Pipeline  # noqa: B018


@pytest.mark.slow
def test_an_installed_package_has_the_weights_and_their_card(tmp_path):
    build = [
        sys.executable,
        "setup.py",
        "--quiet",
        "build",
        "--build-base",
        tmp_path / "base",
        "--build-lib",
        tmp_path,
    ]
    subprocess.run(build, cwd=ROOT, check=True, capture_output=True)
    source, installed = (root / "diffsketching_pipeline" / "checkpoints" / "garments-64" for root in (ROOT, tmp_path))
    assert (installed / "README.md").read_text() == (ROOT / "model_card.md").read_text()
    expected = {path.relative_to(source) for path in source.rglob("*") if path.is_file()}
    assert {path.relative_to(installed) for path in installed.rglob("*") if path.is_file()} == expected | {
        Path("README.md")
    }


def test_registering_again_changes_nothing():
    import diffusers.pipelines
    from diffusers.pipelines import pipeline_loading_utils

    assert set(pipeline_loading_utils.LOADABLE_CLASSES["diffsketching_pipeline"]) == {
        "FoldedPixels",
        "NoisyImageClassifier",
        "PhotoSketcher",
    }
    before = copy.deepcopy((pipeline_loading_utils.LOADABLE_CLASSES, pipeline_loading_utils.ALL_IMPORTABLE_CLASSES))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        registry.register()
    assert before == (pipeline_loading_utils.LOADABLE_CLASSES, pipeline_loading_utils.ALL_IMPORTABLE_CLASSES)
    assert diffusers.pipelines.diffsketching_pipeline is diffsketching_pipeline


def test_a_diffusers_without_these_registries_is_warned_of(monkeypatch):
    from diffusers.pipelines import pipeline_loading_utils

    monkeypatch.delattr(pipeline_loading_utils, "LOADABLE_CLASSES")
    with pytest.warns(UserWarning, match="This diffusers keeps its registries elsewhere"):
        registry.register()


def test_an_unknown_bundled_checkpoint_is_refused():
    with pytest.raises(ValueError, match=r"`name`.* 'trousers-9'"):
        registry.bundled_checkpoint("trousers-9")


def test_a_bundled_model_is_found_by_its_name_unless_a_folder_has_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    bundled = registry.bundled_checkpoint()
    assert registry.find_checkpoint("garments-64") == registry.find_checkpoint(None) == bundled
    for other in (
        "ana/garments-64",
        "./garments-64",
        f"../{Path(bundled).parent.name}/garments-64",
        "garments-65",
        "",
    ):
        assert registry.find_checkpoint(other) == other
    (tmp_path / "garments-64").mkdir()
    assert registry.find_checkpoint("garments-64") == "garments-64"


def test_every_script_takes_bundled_models_by_their_names():
    # What a command line was given goes to no loader unless `find_checkpoint` has seen it.
    given = re.compile(r"(from_pretrained|measure_memory)\((str\()?args\.(model|pretrained_model_name_or_path)\b")
    folders = ("diffsketching_pipeline", "training", "examples", "benchmarks")
    paths = [path for folder in folders for path in (ROOT / folder).rglob("*.py")]
    found = {path.name: line for path in paths for line in path.read_text().splitlines() if given.search(line)}
    assert not found
