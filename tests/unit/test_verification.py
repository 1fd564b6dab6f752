# SPDX-License-Identifier: Apache-2.0
"""Checkpoints that are damaged, hostile or both: refused before a file of weights is read or a network is built."""

import json
import pickle
import shutil
import struct

import pytest
import torch

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
    for part in (size - 1, size // 2):
        path.write_bytes(content[:part])
        refused(checkpoint, rf"is truncated: it has {part} bytes and its header describes {size}", monkeypatch)
    for part in (0, 7, 100):
        path.write_bytes(content[:part])
        refused(checkpoint, "is no safetensors file, or its beginning is lost", monkeypatch)
    path.write_bytes(content + b"\0")
    refused(checkpoint, "is too long", monkeypatch)
    path.write_bytes(struct.pack("<Q", 20) + b"this is no JSON at all")
    refused(checkpoint, "has a header that cannot be read", monkeypatch)


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
    DiffSketchingPipeline.from_pretrained(checkpoint)


@pytest.mark.parametrize(
    "entry",
    [
        ["antigravity", "fly"],
        ["diffusers", "DiffusionPipeline"],
        ["diffsketching_pipeline", "cli"],
    ],
)
def test_an_index_that_names_another_class_is_refused_and_nothing_imported(checkpoint, entry, monkeypatch):
    import sys

    edit_json(checkpoint / "model_index.json", classifier=entry)
    write_manifest(checkpoint)
    refused(checkpoint, r"`classifier` in `model_index.json` is .*nothing is imported", monkeypatch)
    # Also when the component is passed in, as older versions of diffusers import it even then.
    refused(checkpoint, r"`classifier` in `model_index.json` is .*nothing is imported", monkeypatch, classifier=None)
    assert "antigravity" not in sys.modules


@pytest.mark.parametrize("name", ["../unet", "a\\b", ""])
def test_an_index_that_names_a_folder_outside_is_refused(checkpoint, name, monkeypatch):
    edit_json(checkpoint / "model_index.json", **{name: ["diffusers", "UNet2DModel"]})
    write_manifest(checkpoint)
    refused(checkpoint, "which is no name of a folder in it", monkeypatch)


@pytest.mark.parametrize("entry", [["diffusers"], ["diffusers", 3], [1, "UNet2DModel"]])
def test_an_entry_of_another_form_is_refused(checkpoint, entry, monkeypatch):
    edit_json(checkpoint / "model_index.json", unet=entry)
    write_manifest(checkpoint)
    refused(checkpoint, r"`unet` in `model_index.json` has to be \[library, class\]", monkeypatch)


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
