# SPDX-License-Identifier: Apache-2.0
"""Tests of what an exported folder holds, and of what cannot be exported."""

import ast
import builtins
import dis
import importlib.metadata
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch
from diffusers.utils import dynamic_modules_utils
from hub_client import describe
from hub_server import metadata_errors
from huggingface_hub import ModelCard
from testing_utils import ROOT

import diffsketching_pipeline
from diffsketching_pipeline import (
    DiffSketchingEditPipeline,
    DiffSketchingPipeline,
    DiffSketchingPipelineOutput,
    add_lora,
    bundled_checkpoint,
    cli,
    export_pipeline,
    fuse_lora,
)
from diffsketching_pipeline.hub.flatten import flatten_modules
from diffsketching_pipeline.hub.push import push_component, push_folder
from diffsketching_pipeline.manifest import read_manifest, write_manifest


# Each writes or loads an export.
pytestmark = pytest.mark.slow


def measurement(title, value, interval=None, reason=None):
    conditions = {"model": "tiny-1", "drawings": "all 3 of 3", "sampling": "default", "seeds": "0-2"}
    conditions["extractor"] = "regnet-1"
    return {"title": title, "value": value, "interval": interval, "reason": reason, "conditions": conditions}


@pytest.fixture
def metrics(tmp_path):
    systems = {
        "generated": {
            "a": measurement("class agreement", 0.43, [0.35, 0.5]),
            "b": measurement("LPIPS diversity", None, reason="no weights"),
        },
        "noise": {"a": measurement("class agreement", 0.056)},
    }
    path = tmp_path / "metrics.json"
    settings = {"arguments": {"sketches": "/home/somebody/doodles"}, "systems": {"generated": {}}}
    path.write_text(json.dumps({"settings": settings, "systems": systems}))
    return path


def test_an_export_holds_what_it_needs_to_load_anywhere(tiny_pipeline, metrics, tmp_path):
    out = export_pipeline(
        tiny_pipeline,
        tmp_path / "tiny-garments",
        max_shard_size="100KB",
        fp16_variant=True,
        metrics=metrics,
        license="cc0-1.0",
        notices=["The sketcher was converted from somebody's."],
        repo_id="ana/tiny-garments",
    )
    names = {path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file()}
    models = {f"{name}/diffsketching_pipeline.py" for name in ("classifier", "sketcher")}
    assert {"pipeline.py", "README.md", "NOTICE", "SHA256SUMS", "model_index.json", *models} <= names
    assert {name for name in names if name.endswith(".py")} == {"pipeline.py", *models}
    # diffusers copies them under one name.
    assert len({(out / name).read_text() for name in models}) == 1
    assert set(read_manifest(out, "it")) == names - {"README.md", "SHA256SUMS"}
    assert len(list((out / "unet").glob("*-of-*.safetensors"))) == 2
    assert all(path.stat().st_size < 110_000 for path in out.rglob("*.safetensors"))
    index = json.loads((out / "model_index.json").read_text())
    assert index["_class_name"] == "DiffSketchingPipeline"
    assert index["classifier"] == ["diffsketching_pipeline", "NoisyImageClassifier"]
    assert "somebody's" in (out / "NOTICE").read_text()

    card = (out / "README.md").read_text()
    assert metadata_errors(card) == ([], []) and "license: cc0-1.0" in card and "# tiny-garments\n" in card
    parameters = sum(p.numel() for p in tiny_pipeline.unet.parameters())
    assert f"| `unet` | `UNet2DModel` | {parameters:,} |" in card and "Classes: a, b, c." in card
    assert "| class agreement (regnet-1) | 0.43 [0.35, 0.5] | 0.056 |" in card
    assert "| LPIPS diversity (regnet-1) | not measured: no weights |  |" in card
    assert 'from_pretrained("ana/tiny-garments")' in card and "/home/somebody" not in card
    (result,) = ModelCard(card).data.eval_results
    assert (result.metric_type, result.metric_value, result.metric_name) == ("a", 0.43, "class agreement (regnet-1)")
    assert (result.dataset_type, result.dataset_name) == ("doodles", "doodles, all 3 of 3 drawings")

    original = describe(tiny_pipeline, run=True)
    assert describe(DiffSketchingPipeline.from_pretrained(out), run=True)["pixels"] == original["pixels"]
    half = DiffSketchingPipeline.from_pretrained(out, variant="fp16", torch_dtype=torch.float16)
    assert torch.equal(half.unet.conv_in.weight, tiny_pipeline.unet.conv_in.weight.half())
    assert torch.equal(
        half.sketch_encoder.classifier[1].weight, tiny_pipeline.sketch_encoder.classifier[1].weight.half()
    )
    assert tiny_pipeline.unet.dtype == torch.float32


@pytest.mark.slow
def test_the_bundled_checkpoint_keeps_its_card(tmp_path):
    pipe = DiffSketchingPipeline.from_pretrained(bundled_checkpoint(), classifier=None)
    out = export_pipeline(pipe, tmp_path / "garments")
    card = (out / "README.md").read_text()
    assert "# garments-64" in card and "## Results" in card and card.count("## Load") == 1
    assert metadata_errors(card) == ([], [])
    assert json.loads((out / "model_index.json").read_text())["classifier"] == [None, None]
    # It is kept from export to export.
    again = export_pipeline(DiffSketchingPipeline.from_pretrained(out), tmp_path / "again")
    assert (again / "README.md").read_text() == card


MODULES = {
    "pipeline_diffsketching": "DiffSketchingPipeline",
    "pipeline_diffsketching_edit": "DiffSketchingEditPipeline",
    "pipeline_diffsketching_interpolation": "DiffSketchingInterpolationPipeline",
}


@pytest.mark.slow
def test_the_generated_code_needs_nothing_of_the_package(tmp_path):
    code = "import importlib, sys\nsys.modules['diffsketching_pipeline'] = None\n"
    code += "import diffusers.utils.dynamic_modules_utils as m\n"
    for index, module in enumerate(MODULES):
        (tmp_path / f"code{index}.py").write_text(flatten_modules([module], "A pipeline."))
        code += f"print(m.find_pipeline_class(importlib.import_module('code{index}')).__name__)\n"
    env = {**os.environ, "PYTHONPATH": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.stdout.split() == list(MODULES.values()), done.stderr


def import_flat(module, tmp_path):
    path = tmp_path / f"flat_{module}.py"
    path.write_text(flatten_modules([module], "A pipeline."))
    spec = importlib.util.spec_from_file_location(path.stem, path)
    found = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(found)
    return found


def global_names(code):
    """Yield the names that compiled code, and all that is compiled inside of it, looks up in its module."""
    yield from (step.argval for step in dis.get_instructions(code) if step.opname in ("LOAD_GLOBAL", "LOAD_NAME"))
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from global_names(constant)


@pytest.mark.slow
@pytest.mark.parametrize("module", MODULES)
def test_the_generated_code_is_short_and_whole(module, tmp_path):
    found = import_flat(module, tmp_path)
    source = Path(found.__file__).read_text()
    # The photo that is edited, and its mask, are further code.
    assert len(source.splitlines()) < (3_700 if module.endswith("edit") else 3_500)
    # None of the names that some function will look up was left out; those of a class are its own.
    own = {name for each in vars(found).values() if isinstance(each, type) for name in vars(each)}
    missing = (
        set(global_names(compile(source, found.__file__, "exec"))) - vars(found).keys() - set(dir(builtins)) - own
    )
    assert not missing - {"__module__", "__qualname__"}
    # What users read is there.
    pipeline = getattr(found, MODULES[module])
    original = getattr(diffsketching_pipeline, MODULES[module])
    for name in ("__call__", "invert", "from_pretrained", "prepare_latents"):
        assert getattr(pipeline, name).__doc__ == getattr(original, name).__doc__ != None  # noqa: E711
    assert found.SketchProcessor.__doc__ == diffsketching_pipeline.SketchProcessor.__doc__
    assert "_check_space(pipe: " in source and found._check_space.__doc__ is None


def test_the_generated_code_asks_for_the_package_where_it_needs_it(tiny_pipeline, tmp_path, monkeypatch):
    found = import_flat("pipeline_diffsketching", tmp_path)
    pipe = found.DiffSketchingPipeline(**tiny_pipeline.components)
    pipe.set_progress_bar_config(disable=True)
    drawing = tmp_path / "line.svg"
    drawing.write_text('<svg viewBox="0 0 9 9"><path d="M1 1 8 8" fill="none" stroke="black"/></svg>')
    call = {"num_images_per_sketch": 1, "num_inference_steps": 1, "output_type": "pt"}
    drawn, expected = (
        each(str(drawing), generator=torch.Generator().manual_seed(0), **call).images for each in (pipe, tiny_pipeline)
    )
    assert torch.equal(drawn, expected)
    for name in ("", ".images.vector_sketch", ".pipeline_loading"):
        monkeypatch.setitem(sys.modules, f"diffsketching_pipeline{name}", None)
    # diffusers, which looks for imports before it runs the file, does not ask for the package.
    warnings = []
    monkeypatch.setattr(dynamic_modules_utils.logger, "warning", warnings.append)
    assert dynamic_modules_utils.check_imports(found.__file__) == [] and not warnings
    with pytest.raises(ImportError, match="Install diffsketching_pipeline to read drawings as vectors"):
        pipe(str(drawing), **call)
    with pytest.raises(ImportError, match="Install diffsketching_pipeline to load and save pipelines with checks"):
        pipe.save_pretrained(tmp_path / "saved")
    assert not (tmp_path / "saved").exists()


@pytest.mark.slow
def test_the_card_and_the_readme_name_what_the_generated_code_imports(tiny_pipeline, tmp_path):
    folder = export_pipeline(tiny_pipeline, tmp_path / "tiny", license="apache-2.0")
    distributions = importlib.metadata.packages_distributions()
    imported = set()
    for path in folder.rglob("*.py"):
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, (ast.Import, ast.ImportFrom)):
                names = [node.module] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
                imported |= {name.split(".")[0] for name in names} - sys.stdlib_module_names
    needed = {distributions[name][0].lower() for name in imported}
    assert {"diffusers", "pillow", "scikit-image", "torch"} <= needed
    for path in (folder / "README.md", ROOT / "README.md"):
        (command,) = re.findall(r"pip install (diffusers [\w -]+)", path.read_text(encoding="utf-8"))
        assert set(command.split()) == needed, path


def test_an_export_brings_the_code_of_the_pipeline_that_was_exported(tiny_pipeline, tmp_path):
    edit = DiffSketchingEditPipeline.from_pipe(tiny_pipeline)
    folder = export_pipeline(edit, tmp_path / "edit", license="apache-2.0")
    code = (folder / "pipeline.py").read_text()
    assert "class DiffSketchingEditPipeline(" in code and "class DiffSketchingPipeline(" not in code
    assert json.loads((folder / "model_index.json").read_text())["_class_name"] == "DiffSketchingEditPipeline"
    # Whatever was exported, each pipeline loads from it.
    assert DiffSketchingPipeline.from_pretrained(folder).id2label == edit.id2label


def test_modules_that_do_not_fit_into_one_file_are_refused(tmp_path, monkeypatch):
    from diffsketching_pipeline.hub import flatten

    sources = {
        "one": "import math\nimport os\n\nSIZE = math.inf\n",
        "same": "SIZE = math.inf\n",
        "other": "from diffsketching_pipeline.one import SIZE\n\n\ndef SIZE():\n    pass\n",
        "imports": "from os import path as math\n",
        "renames": "from diffsketching_pipeline.one import SIZE as size\n",
        "uses": "from diffsketching_pipeline.registry import register\n\nagain = register\n",
        "inside": "def find():\n    from diffsketching_pipeline.files import write_file\n\n    return write_file\n",
        "calls": '"""Text."""\n\nfrom diffsketching_pipeline.registry import register\n\nregister()\nDONE = True\n',
    }
    monkeypatch.setattr(flatten, "_read", sources.__getitem__)
    assert (
        flatten_modules(["one", "same"], "Joined.")
        == flatten._LICENSE + '"""Joined."""\n\nimport math\n\n\nSIZE = math.inf\n'
    )
    assert flatten_modules(["calls"], "Joined.").endswith("\nDONE = True\n")
    for name, message in {
        "other": "`other` defines another `SIZE`",
        "imports": "`imports` imports another `math`",
        "renames": "`renames` renames what it imports from `one`",
        "uses": "`uses` uses `register`, which one file cannot have",
        "inside": "`inside` imports `files` where it is needed",
    }.items():
        with pytest.raises(ValueError, match=message):
            flatten_modules(["one", name], "Joined.")


def test_what_others_could_not_load_is_refused_and_leaves_nothing(tiny_pipeline, metrics, tmp_path):
    class MyUNet(type(tiny_pipeline.unet)):
        pass

    out = tmp_path / "out"
    with pytest.raises(ValueError, match="`pipe`.*Output"):
        export_pipeline(DiffSketchingPipelineOutput([], [], None), out)
    with pytest.raises(ValueError, match="`metrics`.*missing.json"):
        export_pipeline(tiny_pipeline, out, metrics=tmp_path / "missing.json")
    with pytest.raises(ValueError, match="`model_card`.*missing.md"):
        export_pipeline(tiny_pipeline, out, model_card=tmp_path / "missing.md")
    with pytest.raises(ValueError, match="`output_dir` must not exist or be an empty folder"):
        export_pipeline(tiny_pipeline, tmp_path)
    add_lora(tiny_pipeline.unet, 2)
    with pytest.raises(ValueError, match="`pipe.unet` carries an adapter: call `fuse_lora`"):
        export_pipeline(tiny_pipeline, out)
    tiny_pipeline.register_modules(unet=MyUNet.from_config(fuse_lora(tiny_pipeline.unet).config))
    with pytest.raises(ValueError, match="`pipe.unet` is a MyUNet of 'test_hub_export', which others could not load"):
        export_pipeline(tiny_pipeline, out)
    assert sorted(os.listdir(tmp_path)) == ["metrics.json"]


def test_links_to_what_is_elsewhere_are_not_published(tiny_pipeline, tmp_path):
    (tmp_path / "secret").write_text("secret")
    folder = export_pipeline(tiny_pipeline, tmp_path / "out", license="apache-2.0")
    pipe = DiffSketchingPipeline.from_pretrained(folder)
    (folder / "again.md").symlink_to("README.md")  # within
    write_manifest(folder)
    for name, target in (("unet/x.json", "../../secret"), ("LICENSE", "nowhere"), ("vae", tmp_path)):
        (folder / name).symlink_to(target)
        for publish in (push_folder, push_component):
            with pytest.raises(ValueError, match=f"`{name}` is a link to what is no file of this folder"):
                publish(folder, "ana/tiny")
        with pytest.raises(ValueError, match=f"`{name}` is a link"):
            write_manifest(folder)
        (folder / name).unlink()
    # A card is taken along from where a pipeline came from.
    (folder / "README.md").unlink()
    (folder / "README.md").symlink_to(tmp_path / "secret")
    with pytest.raises(ValueError, match="`README.md` is a link"):
        export_pipeline(pipe, tmp_path / "again")
    assert not (tmp_path / "again").exists()


@pytest.mark.skipif(shutil.which("git") is None, reason="there is no git")
def test_an_export_loads_from_a_clone_of_git_for_windows(tiny_pipeline, tmp_path):
    folder = export_pipeline(tiny_pipeline, tmp_path / "out", license="apache-2.0")
    git = ["git", "-c", "user.name=ana", "-c", "user.email=ana@localhost"]
    for command in (["init", "-q"], ["add", "-A"], ["commit", "-q", "-m", "A checkpoint"]):
        subprocess.run([*git, *command], cwd=folder, check=True)
    clone = tmp_path / "clone"
    subprocess.run(["git", "clone", "-q", "-c", "core.autocrlf=true", str(folder), str(clone)], check=True)
    config = clone / "unet" / "config.json"
    assert b"\r\n" in config.read_bytes() and b"\r\n" in (clone / "SHA256SUMS").read_bytes()
    loaded = DiffSketchingPipeline.from_pretrained(clone)
    assert torch.equal(loaded.unet.conv_in.weight, tiny_pipeline.unet.conv_in.weight)
    config.write_bytes(config.read_bytes().replace(b'"layers_per_block": 1', b'"layers_per_block": 2'))
    with pytest.raises(ValueError, match="`unet/config.json` is not the file that SHA256SUMS lists"):
        DiffSketchingPipeline.from_pretrained(clone)


def run_command(arguments, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["diffsketching", *map(str, arguments)])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    return stop.value.code, *capsys.readouterr()


def test_the_export_command(tiny_pipeline, tmp_path, monkeypatch, capsys):
    tiny_pipeline.save_pretrained(tmp_path / "tiny")
    capsys.readouterr()
    command = ["export", tmp_path / "tiny", tmp_path / "out"]
    code, out, err = run_command([*command, "--save-dtype", "float16"], monkeypatch, capsys)
    assert code == 0 and out == f"{tmp_path / 'out'}\n", err
    kept = DiffSketchingPipeline.from_pretrained(tmp_path / "out", torch_dtype=torch.float16)
    assert torch.equal(kept.unet.conv_in.weight, tiny_pipeline.unet.conv_in.weight.half())
    for arguments, message in (
        (command, "`output_dir` must not exist"),
        (
            [*command[:2], tmp_path / "new", "--save-dtype", "int8"],
            "'int8' is not one of 'float32', 'float16', 'bfloat16'",
        ),
        (["export", tmp_path / "none/of/these", tmp_path / "new"], "none/of/these"),
    ):
        code, out, err = run_command(arguments, monkeypatch, capsys)
        assert code == 2 and out == "" and err.startswith("diffsketching: error: ") and message in err
        assert err.count("\n") == 1
    assert not (tmp_path / "new").exists()
