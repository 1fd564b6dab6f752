# SPDX-License-Identifier: Apache-2.0
"""Checkpoints that are damaged, hostile or both: refused before a file of weights is read or a network is built."""

import json
import os
import pickle
import re
import shutil
import struct

import pytest
import torch
from safetensors import safe_open

from diffsketching_pipeline import DiffSketchingPipeline
from diffsketching_pipeline.manifest import MANIFEST_NAME, parse_manifest, read_manifest, sha256_of, write_manifest
from diffsketching_pipeline.verification import check_checkpoint


@pytest.fixture(scope="module")
def saved(tiny_pipeline_factory, tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved") / "tiny"
    tiny_pipeline_factory().save_pretrained(folder)
    return folder


@pytest.fixture
def checkpoint(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / "tiny")


def edit_json(path, **changes):
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def refused(folder, message, monkeypatch, **kwargs):
    """`from_pretrained` says this, and diffusers' own, which would load something, is never reached."""
    with monkeypatch.context() as patch:
        patch.setattr(
            "diffusers.DiffusionPipeline.from_pretrained", lambda *_, **__: pytest.fail("something was loaded")
        )
        with pytest.raises(ValueError, match=message):
            DiffSketchingPipeline.from_pretrained(folder, **kwargs)


def test_a_saved_checkpoint_lists_the_sums_of_all_its_files(saved):
    sums = read_manifest(saved, "it")
    files = {p.relative_to(saved).as_posix() for p in saved.rglob("*") if p.is_file()}
    assert set(sums) == files - {MANIFEST_NAME}
    assert all(sha256_of(saved / name) == expected for name, expected in sums.items())
    assert not any("_name_or_path" in p.read_text() for p in saved.rglob("*.json"))
    check_checkpoint(saved)


def test_every_single_flipped_bit_is_noticed(checkpoint, monkeypatch):
    for path in sorted(p for p in checkpoint.rglob("*") if p.is_file() and p.name != MANIFEST_NAME):
        content = path.read_bytes()
        # In the last byte, where a weight or a closing brace is.
        path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        refused(checkpoint, "was damaged or changed|is not JSON", monkeypatch)
        path.write_bytes(content)
    DiffSketchingPipeline.from_pretrained(checkpoint)


def test_without_a_manifest_a_flipped_bit_passes_and_a_lost_byte_does_not(checkpoint, monkeypatch):
    (checkpoint / MANIFEST_NAME).unlink()
    path = checkpoint / "unet" / "diffusion_pytorch_model.safetensors"
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    check_checkpoint(checkpoint)
    size = len(content)
    damaged = r"diffusion_pytorch_model.safetensors` is truncated, too long or damaged in its header \(.*: "
    for part in (size - 1, size // 2):
        path.write_bytes(content[:part])
        refused(checkpoint, damaged + "incomplete metadata, file not fully covered", monkeypatch)
    for part in (0, 7, 100):
        path.write_bytes(content[:part])
        refused(checkpoint, "is no safetensors file, or its beginning is lost", monkeypatch)
    path.write_bytes(content + b"\0")
    refused(checkpoint, damaged + "incomplete metadata, file not fully covered", monkeypatch)
    for header in (
        b"this is no JSON at all",
        b"[" * 10**5,
        b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 8]}}',
    ):
        path.write_bytes(struct.pack("<Q", len(header)) + header + bytes(8))
        refused(checkpoint, damaged + "invalid", monkeypatch)


def test_a_header_beyond_its_limits_is_refused_before_it_is_opened(checkpoint, monkeypatch):
    (checkpoint / MANIFEST_NAME).unlink()
    path = checkpoint / "unet" / "diffusion_pytorch_model.safetensors"

    def open_another(name, **options):
        assert name != path
        return safe_open(name, **options)

    monkeypatch.setattr("diffsketching_pipeline.verification.safe_open", open_another)
    for header_size, size in ((10**8 + 1, 10**8 + 9), (2**63, 100), (93, 100), (1, 100)):
        with open(path, "wb") as file:
            file.write(struct.pack("<Q", header_size))
            file.truncate(size)  # of a sparse file
        refused(checkpoint, "has a header of more than|is no safetensors file, or its beginning is lost", monkeypatch)


def test_pickles_are_never_loaded(checkpoint, tmp_path, monkeypatch):
    class Payload:
        def __reduce__(self):
            return (open, (str(tmp_path / "was-here"), "w"))

    write = pickle.dumps(Payload())
    for name in ("diffusion_pytorch_model.bin", "diffusion_pytorch_model.pt"):
        shutil.rmtree(checkpoint / "classifier")
        shutil.copytree(checkpoint / "unet", checkpoint / "classifier")
        (checkpoint / "classifier" / "diffusion_pytorch_model.safetensors").rename(checkpoint / "classifier" / name)
        (checkpoint / "classifier" / name).write_bytes(write)
        refused(checkpoint, rf"`classifier/{name}` may be a pickle, which can run any program", monkeypatch)
    refused(
        checkpoint, "`use_safetensors` has to be True or left out but is False", monkeypatch, use_safetensors=False
    )
    assert not (tmp_path / "was-here").exists()


def test_a_pickle_beside_the_weights_is_not_touched(checkpoint):
    (checkpoint / "unet" / "diffusion_pytorch_model.bin").write_bytes(b"not even a pickle")
    write_manifest(checkpoint)
    DiffSketchingPipeline.from_pretrained(checkpoint)


@pytest.mark.parametrize(
    "name", ["unet/diffusion_pytorch_model.bin", "image_encoder/generation_config.json", "unet/a/b.json", "None.py"]
)
def test_a_file_that_came_later_and_that_a_loader_might_find_is_refused(checkpoint, name, monkeypatch):
    (checkpoint / name).parent.mkdir(exist_ok=True)
    (checkpoint / name).write_text("{}")
    refused(checkpoint, f"`{name}` is not in SHA256SUMS, so it was added later", monkeypatch)
    # Files of the desktop, and what is written about a checkpoint, are nobody's to load.
    (checkpoint / name).unlink()
    for other in ("unet/.DS_Store", "unet/._config.json", "README.md", ".gitattributes", "sheet.png"):
        (checkpoint / other).write_text("x")
    check_checkpoint(checkpoint)


@pytest.mark.parametrize("has_manifest", [True, False])
@pytest.mark.parametrize("component", ["sketch_encoder", "unet"])
@pytest.mark.parametrize(
    "name",
    [
        "adapter_config.json",
        "shard-00001-model-00001-of-00001.safetensors",
        "diffusion_pytorch_model.safetensors.ema.index.json",
    ],
)
def test_what_makes_other_weights_be_loaded_is_refused_listed_or_not(
    checkpoint, component, name, has_manifest, monkeypatch
):
    (checkpoint / component / name).write_text(json.dumps({"peft_type": "LORA", "base_model_name_or_path": "ana/x"}))
    write_manifest(checkpoint) if has_manifest else (checkpoint / MANIFEST_NAME).unlink()
    refused(checkpoint, f"`{component}/{name}` would make other weights be loaded", monkeypatch)


def test_the_weights_that_are_checked_are_those_of_the_library_that_loads_them(checkpoint, monkeypatch):
    (checkpoint / MANIFEST_NAME).unlink()
    # Of a fitting file by the other library's name nothing is read.
    weights = checkpoint / "image_encoder" / "model.safetensors"
    weights.rename(weights.with_name("diffusion_pytorch_model.safetensors"))
    refused(checkpoint, "`image_encoder` has no safetensors weights", monkeypatch)


@pytest.mark.parametrize(
    "entry",
    [
        ["os", "system"],
        ["transformers", "DetrForObjectDetection"],
        ["diffusers", "UNet2DModel"],
        ["diffusers", "NoisyImageClassifier"],
        ["antigravity", "fly"],
        ["diffusers", "DiffusionPipeline"],
        ["diffsketching_pipeline", "cli"],
    ],
)
def test_an_index_that_names_another_class_is_refused_and_nothing_imported(checkpoint, entry, monkeypatch):
    import sys

    edit_json(checkpoint / "model_index.json", classifier=entry)
    write_manifest(checkpoint)
    refused(
        checkpoint,
        rf"`classifier` has to be .*, but is {re.escape(repr(entry))}, and nothing is imported",
        monkeypatch,
    )
    # Also when the component is passed in, as older versions of diffusers import it even then.
    refused(
        checkpoint,
        rf"`classifier` has to be .*, but is {re.escape(repr(entry))}, and nothing is imported",
        monkeypatch,
        classifier=None,
    )
    assert "antigravity" not in sys.modules


@pytest.mark.parametrize("name", ["../unet", "a\\b", ""])
def test_an_index_that_names_a_folder_outside_is_refused(checkpoint, name, monkeypatch):
    edit_json(checkpoint / "model_index.json", **{name: ["diffusers", "UNet2DModel"]})
    write_manifest(checkpoint)
    refused(checkpoint, f"has the component .{re.escape(name)}., but there are only unet, scheduler, vae", monkeypatch)


@pytest.mark.parametrize(
    "entry",
    [
        [],
        ["diffusers"],
        ["diffusers", 3],
        ["diffusers", "UNet2DModel", "more"],
        [1, 2],
        5,
        None,
        [None, None],
        {},
        "a",
    ],
)
def test_an_entry_of_another_form_is_refused(checkpoint, entry, monkeypatch):
    edit_json(checkpoint / "model_index.json", unet=entry)
    write_manifest(checkpoint)
    refused(
        checkpoint, rf"`unet` has to be \['diffusers', 'UNet2DModel'\], but is {re.escape(repr(entry))}", monkeypatch
    )


@pytest.mark.parametrize("name", ["../../secret.safetensors", "..\\x.safetensors", 7])
def test_shards_outside_are_refused(checkpoint, name, monkeypatch):
    (checkpoint / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    index = checkpoint / "unet" / "diffusion_pytorch_model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"conv_in.weight": name}}))
    write_manifest(checkpoint)
    refused(checkpoint, "which is no file beside it", monkeypatch)


def test_a_manifest_that_leads_outside_is_refused(checkpoint, monkeypatch):
    manifest = checkpoint / MANIFEST_NAME
    text = manifest.read_text()
    for name in ("../x", "/etc/passwd", "a/../../b", "C:/x"):
        manifest.write_text(text + f"{'0' * 64}  {name}\n")
        refused(checkpoint, "which leads out of the folder", monkeypatch)
    for line in ("0" * 63 + "  a", "# nothing", text.splitlines()[0]):
        manifest.write_text(f"{text}{line}\n")
        refused(checkpoint, "is not a sum and the name of another file", monkeypatch)
    manifest.write_bytes(b"\xff\xfe")
    refused(checkpoint, "is not text", monkeypatch)
    assert parse_manifest(text, "it").keys() >= {"model_index.json", "unet/config.json"}


@pytest.mark.parametrize("kind", ["folder", "pipe", "link"])
def test_a_manifest_that_is_no_file_is_refused(checkpoint, kind, monkeypatch):
    manifest = checkpoint / MANIFEST_NAME
    manifest.unlink()
    make = {"folder": os.mkdir, "pipe": os.mkfifo, "link": lambda path: os.symlink("nowhere", path)}
    make[kind](manifest)
    refused(checkpoint, "SHA256SUMS is no file but a folder, a pipe or a link", monkeypatch)


def test_a_file_that_the_manifest_does_not_list_is_refused(checkpoint, monkeypatch):
    manifest = checkpoint / MANIFEST_NAME
    lines = [line for line in manifest.read_text().splitlines() if not line.endswith("sketcher/config.json")]
    manifest.write_text("\n".join(lines) + "\n")
    refused(checkpoint, "`sketcher/config.json` is not in SHA256SUMS, so it was added later", monkeypatch)
    # What is not loaded from the folder need not be in it.
    shutil.rmtree(checkpoint / "sketcher")
    assert DiffSketchingPipeline.from_pretrained(checkpoint, sketcher=None).sketcher is None


@pytest.mark.parametrize(
    "component, changes, message",
    [
        ("unet", {"block_out_channels": [10**9, 10**9]}, "has the block_out_channels 1000000000"),
        ("unet", {"layers_per_block": 10**4}, "has the layers_per_block 10000"),
        ("unet", {"sample_size": 10**6}, "has the sample_size 1000000; with these weights it can be 4096"),
        ("unet", {"block_out_channels": [8, 16] * 1000}, "has the length of block_out_channels 2000"),
        ("unet", {"block_out_channels": [16, 32]}, r"describes a network whose `.*` is \[.*\], but the weights have"),
        ("unet", {"layers_per_block": 2}, "describes a network with a `.*`, which the weights lack"),
        ("unet", {"down_block_types": ["Evil", "Evil"]}, "describes no UNet2DModel"),
        ("sketcher", {"n_blocks": 10**9}, "has the n_blocks 1000000000"),
        ("sketch_encoder", {"depths": [10**6, 10**6]}, "has the depths 1000000"),
        ("scheduler", {"num_train_timesteps": 10**12}, "has the num_train_timesteps 1000000000000"),
    ],
)
def test_absurd_sizes_are_refused_before_anything_is_allocated(checkpoint, component, changes, message, monkeypatch):
    config = checkpoint / component / ("scheduler_config.json" if component == "scheduler" else "config.json")
    edit_json(config, **changes)
    write_manifest(checkpoint)
    refused(checkpoint, rf"`{component}/{config.name}` {message}", monkeypatch)


@pytest.mark.parametrize(
    "name, changes, message",
    [
        ("model_index", {"_class_name": None}, "has to have the `_class_name` of a pipeline but has None"),
        ("model_index", {"_class_name": ["a", "b"]}, "has to have the `_class_name` of a pipeline but has .'a', 'b'."),
        (
            "model_index",
            {"id2label": ["a", "b", "c"]},
            r"`id2label` must be a dict of integers to names, but got \['a'",
        ),
        (
            "model_index",
            {"id2label": {"x": "a"}},
            "`id2label` must be a dict of integers to names, but got {'x': 'a'}",
        ),
        ("model_index", {"id2label": {"0": "a", "2": "b"}}, r"`id2label` must have the keys 0 ... n-1, but got"),
        ("model_index", {"id2label": {"0": "\x1b[31ma"}}, r"control characters: '\\x1b\[31ma'"),
        ("model_index", {"recommended": [1]}, r"`recommended` must be a dict of settings, but got \[1\]"),
        ("model_index", {"recommended": {"eta": "much"}}, r"must have a `eta` in \[0, 1\], but got 'much'"),
        ("model_index", {"recommended": {"num_inference_steps": 2.5}}, "num_inference_steps` has to be an integer of"),
        (
            "model_index",
            {"recommended": {"sketch_guidance_scale": True}},
            "finite `sketch_guidance_scale`, but got True",
        ),
        (
            "scheduler/scheduler_config",
            {"beta_start": "small", "beta_schedule": "linear"},
            "describes no DDIMScheduler",
        ),
        (
            "scheduler/scheduler_config",
            {"num_train_timesteps": 10.0},
            "describes no DDIMScheduler|num_train_timesteps 10.0",
        ),
        (
            "scheduler/scheduler_config",
            {"num_train_timesteps": -1},
            "describes no DDIMScheduler|num_train_timesteps -1",
        ),
        ("scheduler/scheduler_config", {"prediction_type": "\u202e"}, "holds a text that"),
        (
            "scheduler/scheduler_config",
            {"prediction_type": "noise"},
            "has the prediction_type 'noise', with which nothing",
        ),
        ("scheduler/scheduler_config", {"timestep_spacing": 1}, "has the timestep_spacing 1"),
        ("scheduler/scheduler_config", {"steps_offset": 10**4}, "has the steps_offset 10000"),
        ("scheduler/scheduler_config", {"trained_betas": [0.5] * 7}, "has the num_train_timesteps 1000"),
        ("scheduler/scheduler_config", {"beta_schedule": "linear", "beta_end": 7}, "has the beta_schedule 'linear'"),
        ("unet/config", {"quantization_config": {"quant_method": "bitsandbytes"}}, "has a `quantization_config`"),
        ("unet/config", {"sample_size": "x" * 10**5}, r"holds a text that is too long .*: 'x{30} ... x{30}'"),
        ("image_encoder/config", {"quantization_config": {"quant_method": "gptq"}}, "has a `quantization_config`"),
        (
            "image_encoder/config",
            {"transformers_weights": "other.safetensors"},
            r"it has no \['transformers_weights'\]",
        ),
        ("image_encoder/config", {"configuration_files": ["config.4.0.0.json"]}, r"has no \['configuration_files'\]"),
        ("image_encoder/config", {"attn_implementation": "ana/kernel"}, r"has no \['attn_implementation'\]"),
        ("image_encoder/config", {"dtype": "save"}, "its dtype has to be one of .* but is 'save'"),
        ("image_encoder/config", {"id2label": [5]}, "describes no ResNetForImageClassification"),
    ],
)
def test_settings_of_another_type_are_one_error(checkpoint, name, changes, message, monkeypatch):
    edit_json(checkpoint / f"{name}.json", **changes)
    write_manifest(checkpoint)
    refused(checkpoint, message, monkeypatch)


@pytest.mark.parametrize("number", ["Infinity", "-Infinity", "NaN", "1e999"])
def test_numbers_that_are_none_are_refused(checkpoint, number, monkeypatch):
    config = checkpoint / "unet" / "config.json"
    config.write_text(config.read_text().replace("{", f'{{"norm_eps": {number},', 1))
    (checkpoint / MANIFEST_NAME).unlink()
    refused(checkpoint, f"`config.json` is not JSON .{number} is no number", monkeypatch)


def write_header(path, header):
    content = json.dumps(header).encode()
    size = max((e["data_offsets"][1] for n, e in header.items() if n != "__metadata__"), default=0)
    path.write_bytes(struct.pack("<Q", len(content)) + content + bytes(size))


def test_the_check_of_a_header_costs_little(checkpoint, monkeypatch):
    (checkpoint / MANIFEST_NAME).unlink()
    weights = checkpoint / "unet" / "diffusion_pytorch_model.safetensors"
    for shape in ([float("inf")], [-1], [2**62, 2], [5], "x", [[1]]):
        write_header(weights, {"a": {"dtype": "F32", "shape": shape, "data_offsets": [0, 4]}})
        refused(checkpoint, "is truncated, too long or damaged in its header", monkeypatch)
    write_header(weights, {"__metadata__": {"a": "x" * 2**20}})
    refused(checkpoint, "has a header of more than 1048576 bytes", monkeypatch)
    # Tensors without elements cost nothing to write, so they say nothing about how many layers there may be.
    empty = {f"t{i}": {"dtype": "F32", "shape": [0, 10**9], "data_offsets": [0, 0]} for i in range(4000)}
    write_header(weights, empty)
    edit_json(checkpoint / "unet" / "config.json", layers_per_block=1000)
    refused(checkpoint, "has the layers_per_block 1000; with these weights it can be 1 at most", monkeypatch)
    # Nor do small ones about the product of two settings: the building stops by itself.
    full = {f"t{i}": {"dtype": "U8", "shape": [1], "data_offsets": [i, i + 1]} for i in range(1000)}
    write_header(weights, full)
    refused(checkpoint, "it has more than 2064 parameters, where the weights have far fewer tensors", monkeypatch)
    write_header(weights, {f"t{i}": {"dtype": "U8", "shape": [1], "data_offsets": [i, i + 1]} for i in range(5000)})
    refused(checkpoint, "stands beside weights of 5000 tensors; 4096 are the most", monkeypatch)


@pytest.mark.parametrize("content", ["[]", "{", "[" * 10**5])
def test_a_config_that_is_none_is_refused(checkpoint, content, monkeypatch):
    (checkpoint / "unet" / "config.json").write_text(content)
    write_manifest(checkpoint)
    refused(checkpoint, "`config.json` (is not JSON|has to hold an object)", monkeypatch)


def test_missing_files_are_named(checkpoint, monkeypatch):
    (checkpoint / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    refused(checkpoint, "`unet` has no safetensors weights", monkeypatch)
    (checkpoint / "unet" / "config.json").unlink()
    refused(checkpoint, "`unet/config.json` is missing", monkeypatch)


def test_shards_and_variants_load_and_are_checked(tiny_pipeline, tmp_path, monkeypatch):
    tiny_pipeline.save_pretrained(tmp_path / "shards", max_shard_size="40KB")
    shards = sorted((tmp_path / "shards" / "unet").glob("*-of-*.safetensors"))
    assert len(shards) > 2
    loaded = DiffSketchingPipeline.from_pretrained(tmp_path / "shards")
    assert torch.equal(loaded.unet.conv_out.weight, tiny_pipeline.unet.conv_out.weight)
    shards[1].unlink()
    refused(tmp_path / "shards", f"`unet/{shards[1].name}` is missing", monkeypatch)

    tiny_pipeline.save_pretrained(tmp_path / "variant", variant="ema")
    loaded = DiffSketchingPipeline.from_pretrained(tmp_path / "variant", variant="ema")
    assert torch.equal(loaded.unet.conv_out.weight, tiny_pipeline.unet.conv_out.weight)
    refused(tmp_path / "variant", "has no safetensors weights", monkeypatch)
    path = tmp_path / "variant" / "unet" / "diffusion_pytorch_model.ema.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    refused(tmp_path / "variant", "was damaged or changed", monkeypatch, variant="ema")


def test_saving_refuses_what_loading_would(tiny_pipeline, tmp_path):
    with pytest.raises(ValueError, match="`safe_serialization` has to be True"):
        tiny_pipeline.save_pretrained(tmp_path / "a", safe_serialization=False)
    with pytest.raises(ValueError, match="use `diffsketching_pipeline.push_pipeline`"):
        tiny_pipeline.save_pretrained(tmp_path / "a", push_to_hub=True)
    assert not (tmp_path / "a").exists()
