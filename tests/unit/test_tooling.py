# SPDX-License-Identifier: Apache-2.0
"""Tests of the project's settings for its tools, and of the form of its docstrings."""

import ast
import re
import shutil
import subprocess
import sys

import pytest
from testing_utils import ROOT

from diffsketching_pipeline.manifest import parse_manifest


SNIPPET = """
from diffsketching_pipeline.images.contours import bounding_box
from diffsketching_pipeline import DiffSketchingEditPipeline, DiffSketchingPipeline

pipe = DiffSketchingPipeline.from_pretrained("x")
pipe.prepare_sketches(3)
pipe.prepare_sketchez(3)  # refused: "DiffSketchingPipeline" has no attribute "prepare_sketchez"
pipe.to("cpu").prepare_sketchez(3)  # refused: "DiffSketchingPipeline" has no attribute "prepare_sketchez"
edit = DiffSketchingEditPipeline.from_pipe(pipe)
edit.prepare_region(None, None, 0.5)  # refused: Argument 2 to "prepare_region" of "DiffSketchingEditPipeline"
edit.prepare_sketchez(3)  # refused: "DiffSketchingEditPipeline" has no attribute "prepare_sketchez"
edit.enable_model_cpu_offload()
edit.unet.forward, edit.config["id2label"]
bounding_box(3)  # refused: Argument 1 to "bounding_box" has incompatible type "int"
"""


@pytest.mark.slow
def test_mypy_refuses_what_the_pipelines_and_the_training_files_do_not_have(tmp_path):
    path = tmp_path / "snippet.py"
    path.write_text(SNIPPET)
    command = [sys.executable, "-m", "mypy", "--config-file", "pyproject.toml", str(path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    found = dict(re.findall(r"snippet\.py:(\d+): error: (.*)", done.stdout))
    refused = {
        str(n): line.split("refused: ")[1] for n, line in enumerate(SNIPPET.splitlines(), 1) if "refused" in line
    }
    assert found.keys() == refused.keys(), done.stdout + done.stderr
    for number, message in refused.items():
        assert found[number].startswith(message)


@pytest.mark.skipif(not (ROOT / ".git").exists() or shutil.which("git") is None, reason="this is no clone")
def test_git_for_windows_keeps_the_bytes_of_checkpoints_and_the_line_ends_of_scripts():
    manifests = list(ROOT.glob("*/checkpoints/*/SHA256SUMS"))
    listed = [m.parent / name for m in manifests for name in parse_manifest(m.read_text(), "it")]
    scripts = [*ROOT.glob("training/recipes/*.sh"), ROOT / ".ci" / "run"]
    for paths, attribute, wanted in (([*manifests, *listed], "text", "unset"), (scripts, "eol", "lf")):
        command = ["git", "check-attr", attribute, "--", *map(str, paths)]
        shown = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
        assert len(shown) == len(paths) > 1 and all(line.endswith(f"{attribute}: {wanted}") for line in shown)


def test_docstrings_begin_with_a_verb_or_a_noun():
    files = [
        path
        for folder in ("diffsketching_pipeline", "training", "benchmarks", "examples", "tests")
        for path in (ROOT / folder).rglob("*.py")
    ]
    begun = {}
    for path in files:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
                words = re.findall(r"\w+", ast.get_docstring(node) or "")
                begun[f"{path.relative_to(ROOT)}:{getattr(node, 'lineno', 1)}"] = words[0] if words else ""
    questions = "What Where How Of Who Whoever Whether Which Whose That If When As".split()
    assert len(set(begun.values())) > 100
    assert {place: word for place, word in begun.items() if word in questions} == {}
