# SPDX-License-Identifier: Apache-2.0
"""Starts of training: what is kept of a pretrained model, what is new, and that nothing is computed otherwise before training."""

import numpy as np
import pytest
import torch
from diffusers import DDIMPipeline, DDPMPipeline, DDPMScheduler, PNDMScheduler, UNet2DModel
from PIL import Image
from testing_utils import randn
from train_unet import UNetTrainingArguments, diffusion_loss
from train_unet import main as train_unet

from diffsketching_pipeline import DiffSketchingPipeline
from diffsketching_pipeline.denoising import join_unet_inputs
from diffsketching_pipeline.images.photo_files import list_images
from diffsketching_pipeline.training import dataset
from diffsketching_pipeline.training.dataset import PhotoSketchDataset
from diffsketching_pipeline.training.starts import (
    ClassMatch,
    Start,
    add_classes,
    find_start,
    with_classes,
    with_unet_classes,
)


ABC = {0: "a", 1: "b", 2: "c"}


def plain_unet(**options):
    torch.manual_seed(3)
    shape = {"sample_size": 16, "block_out_channels": (8, 16), "layers_per_block": 1, "norm_num_groups": 4}
    blocks = {"down_block_types": ("DownBlock2D", "AttnDownBlock2D"), "up_block_types": ("AttnUpBlock2D", "UpBlock2D")}
    return UNet2DModel(**{**shape, **blocks, "attention_head_dim": 8, **options}).eval()


@pytest.fixture
def ddpm_dir(tmp_path):
    """An unconditional pipeline as diffusers saves it, with the schedule of the first of them."""
    scheduler = DDPMScheduler(beta_schedule="linear", num_train_timesteps=1000)
    DDPMPipeline(plain_unet(), scheduler).save_pretrained(tmp_path / "ddpm")
    return str(tmp_path / "ddpm")


# ---- classes ----------------------------------------------------------------------------------------------------------


def test_rows_of_known_names_are_kept_and_new_ones_are_the_mean():
    weight = torch.tensor([[1.0, 0.0], [3.0, 0.0], [8.0, 3.0]])
    match = ClassMatch(ABC, {0: "c", 1: "new", 2: "a"})
    assert match.sources == [2, None, 0]
    assert match.rows(weight).tolist() == [[8.0, 3.0], [4.0, 1.0], [1.0, 0.0]]
    assert str(match) == "kept: c, a; new, begin from the mean of the known ones: new; left out: b"


def test_a_pipeline_of_other_classes_says_the_same_of_those_it_knows(tiny_pipeline):
    wanted = {0: "new", 1: "c", 2: "a"}
    changed = with_classes(tiny_pipeline, wanted)
    assert changed.id2label == wanted and changed.null_class == 3
    x, t = randn(2, 3, 16, 16), torch.tensor([10, 700])
    sketch = torch.zeros(2, 1, 16, 16)
    for new, old in ((1, 2), (2, 0), (changed.null_class, tiny_pipeline.null_class)):
        before, after = (
            unet(torch.cat([x, sketch], 1), t, class_labels=torch.full((2,), label)).sample
            for unet, label in ((tiny_pipeline.unet, old), (changed.unet, new))
        )
        assert torch.equal(before, after)
    logits, more = tiny_pipeline.classifier(x, t).logits, changed.classifier(x, t).logits
    torch.testing.assert_close(more, torch.stack([logits.mean(1), logits[:, 2], logits[:, 0]], 1))
    logits, more = (pipe.sketch_encoder(sketch).logits for pipe in (tiny_pipeline, changed))
    torch.testing.assert_close(more, torch.stack([logits.mean(1), logits[:, 2], logits[:, 0]], 1))
    assert changed.sketch_encoder.config.id2label == wanted
    assert changed.sketcher is tiny_pipeline.sketcher
    # The one it comes from is as it was.
    assert tiny_pipeline.id2label == ABC and tiny_pipeline.unet.config.num_class_embeds == 4


def test_classes_are_added_after_those_there_are(tiny_pipeline):
    assert add_classes(tiny_pipeline, ["b", "a"]) is tiny_pipeline
    assert add_classes(tiny_pipeline, ["z", "b", "y"]).id2label == {**ABC, 3: "y", 4: "z"}


def test_a_unet_with_classes_but_without_no_class_gets_one():
    unet = plain_unet(num_class_embeds=3)
    grown = with_unet_classes(unet, ClassMatch(ABC, {**ABC, 3: "d"}))
    weight, mean = unet.class_embedding.weight, unet.class_embedding.weight.mean(0)
    torch.testing.assert_close(grown.class_embedding.weight, torch.stack([*weight, mean, mean]))


# ---- starts -----------------------------------------------------------------------------------------------------------


def test_a_plain_pipeline_computes_what_it_did_before_training(ddpm_dir):
    plain = DDPMPipeline.from_pretrained(ddpm_dir)
    start = Start.read(ddpm_dir)
    unet = start.unet(ABC, sample_channels=3, factor=1, abstraction_plane=False).eval()
    assert unet.config.in_channels == 4 and unet.config.num_class_embeds == 4
    x, t = randn(2, 3, 16, 16, seed=1), torch.tensor([3, 900])
    sketch = torch.ones(2, 1, 16, 16)
    sketch[:, :, 4:12, 8] = -1
    with torch.no_grad():
        expected = plain.unet(x, t).sample
        told = join_unet_inputs(x, 4, sketch)
        assert torch.equal(unet(told, t, class_labels=torch.tensor([0, 3])).sample, expected)

    # Its samples, by the same schedule, are those of diffusers.
    scheduler = start.scheduler()
    assert torch.equal(scheduler.alphas_cumprod, plain.scheduler.alphas_cumprod)
    assert scheduler.config.prediction_type == "epsilon"
    pipe = DiffSketchingPipeline(unet=unet, scheduler=scheduler, id2label=ABC)
    theirs = DDIMPipeline(plain.unet, start.scheduler())
    for each in (pipe, theirs):
        each.set_progress_bar_config(disable=True)
    noise = torch.randn(1, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    found = pipe(sketch[:1], class_labels="b", num_images_per_sketch=1, num_inference_steps=10, latents=noise).images
    expected = theirs(
        num_inference_steps=10, use_clipped_model_output=True, generator=torch.Generator().manual_seed(0)
    ).images
    difference = np.abs(np.asarray(found[0]).astype(int) - np.asarray(expected[0]).astype(int))
    assert difference.max() <= 2 and np.asarray(found[0]).std() > 1


@pytest.mark.slow
def test_a_plain_pipeline_learns_to_follow_drawings_of_classes(ddpm_dir, shapes_dir, tmp_path):
    args = UNetTrainingArguments(
        train_data_dir=str(shapes_dir),
        cache_dir=str(tmp_path / "cache"),
        pretrained_model_name_or_path=ddpm_dir,
        resolution=16,
        max_train_steps=3,
        max_train_samples=8,
        train_batch_size=4,
        learning_rate=1e-3,
        lr_warmup_steps=0,
        num_validation_samples=4,
        num_validation_images=2,
        ddpm_num_inference_steps=2,
        report_to="none",
        output_dir=str(tmp_path / "out"),
    )
    train_unet(args)
    trained = DiffSketchingPipeline.from_pretrained(tmp_path / "out" / "pipeline")
    assert trained.id2label == {0: "disc", 1: "square"} and trained.takes_sketch
    assert trained.scheduler.config.beta_schedule == "linear" and trained.scheduler.config.prediction_type == "epsilon"
    # What was zero has learned.
    assert trained.unet.conv_in.weight[:, 3].abs().max() > 0 and trained.unet.class_embedding.weight.abs().max() > 0


def test_a_learned_variance_is_left_as_it_is(tmp_path, shapes_dir):
    unet = plain_unet(in_channels=4, out_channels=6, num_class_embeds=3)
    pipe = DiffSketchingPipeline(unet=unet, scheduler=DDPMScheduler(), id2label={0: "disc", 1: "square"})
    pipe.save_pretrained(tmp_path / "adm")
    start = Start.read(str(tmp_path / "adm"))
    batch = {
        "pixel_values": randn(2, 3, 16, 16),
        "noise": randn(2, 3, 16, 16, seed=1),
        "sketch": torch.ones(2, 1, 16, 16),
    }
    batch |= {"timestep": torch.tensor([5, 800]), "class_label": torch.tensor([0, 2])}
    unet = start.unet({0: "disc", 1: "square"}, 3, 1, False)
    diffusion_loss(unet, start.scheduler(), batch).mean().backward()
    assert unet.conv_out.bias.grad[:3].abs().min() > 0 and unet.conv_out.bias.grad[3:].abs().max() == 0


def test_the_start_brings_its_autoencoder_and_its_plane(latent_pipeline, tmp_path):
    latent_pipeline.save_pretrained(tmp_path / "latent")
    start = Start.read(str(tmp_path / "latent"))
    assert start.has("vae") and start.id2label == ABC
    unet = start.unet(ABC, 4, 4, abstraction_plane=False)
    assert all(
        torch.equal(value, latent_pipeline.unet.state_dict()[name]) for name, value in unet.state_dict().items()
    )
    with pytest.raises(ValueError, match="must denoise 3 channels, but .* predicts 4"):
        start.unet(ABC, 3, 1, abstraction_plane=False)


def test_starts_are_found_by_name(tmp_path):
    assert Start.read("garments-64").id2label[0] == "blazer"
    assert find_start(str(tmp_path)) == str(tmp_path)
    for name in ("garments-63", "./nothing", str(tmp_path / "nothing")):
        with pytest.raises(
            ValueError, match="must be the name of a bundled model, a folder, or user/name on the Hub, but got '"
        ):
            find_start(name)


def test_what_cannot_be_a_start_is_refused(ddpm_dir, tmp_path):
    DDPMPipeline(plain_unet(), DDPMScheduler()).save_pretrained(tmp_path / "pickled", safe_serialization=False)
    with pytest.raises(ValueError, match="Weights have to be safetensors"):
        Start.read(str(tmp_path / "pickled")).unet(ABC, 3, 1, False)
    PNDMScheduler().save_pretrained(f"{ddpm_dir}/scheduler")
    with pytest.raises(ValueError, match="DDIMScheduler or DDPMScheduler, but .* has a PNDMScheduler"):
        Start.read(ddpm_dir).scheduler()
    plain_unet(in_channels=6).save_pretrained(tmp_path / "six")
    with pytest.raises(ValueError, match="3 input channels, or 4 with those of the drawing, but .* has 6"):
        Start.read(str(tmp_path / "six")).unet(ABC, 3, 1, False)


def test_old_pipelines_have_their_parts_beside_the_index(ddpm_dir, tmp_path):
    flat = tmp_path / "flat"
    plain_unet().save_pretrained(flat)
    (flat / "model_index.json").write_text((tmp_path / "ddpm" / "model_index.json").read_text())
    DDPMScheduler(beta_schedule="linear").save_pretrained(flat)
    start = Start.read(str(flat))
    assert start.scheduler().config.beta_schedule == "linear"
    assert start.unet(ABC, 3, 1, False).config.num_class_embeds == 4


# ---- photos -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("below", ["", "photo"])
def test_photos_in_class_folders_alone_are_split_by_the_hash_of_their_names(below, tmp_path):
    for i in range(40):
        folder = tmp_path / below / "ab"[i % 2]
        folder.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8)).save(folder / f"{i}.png")
    (train, names), (validation, _) = (list_images(tmp_path, split) for split in ("train", "validation"))
    assert names == ["a", "b"] and len(train) + len(validation) == 40 and not set(train) & set(validation)
    assert 1 <= len(validation) <= 8
    for file in train[:-1]:
        file.unlink()
    (left, _), (again, _) = (list_images(tmp_path, split) for split in ("train", "validation"))
    assert left == train[-1:] and again == validation  # a photo does not change sides when others go


@pytest.mark.slow
def test_a_cut_is_made_before_anything_is_read(shapes_dir, monkeypatch):
    read, original = [], PhotoSketchDataset._read
    monkeypatch.setattr(PhotoSketchDataset, "_read", lambda self, file: read.append(file) or original(self, file))
    whole = PhotoSketchDataset(shapes_dir, "train", 16)
    read.clear()
    cut = PhotoSketchDataset(shapes_dir, "train", 16, max_samples=5)
    assert len(cut) == 5 == len(read) < len(whole) and set(cut.files) < set(whole.files)
    assert cut.id2label == whole.id2label


@pytest.mark.slow
def test_several_processes_read_what_one_would(shapes_dir, tmp_path, monkeypatch):
    (tmp_path / "one" / "a").mkdir(parents=True)
    for i, file in enumerate(sorted((shapes_dir / "train").glob("*/*"))[:6]):
        (tmp_path / "one" / "a" / f"{i}.png").write_bytes(file.read_bytes() if i != 4 else b"no photo")
    alone = dataset.PhotoSketchDataset(tmp_path / "one", "train", 16, cache_dir=tmp_path / "alone")
    monkeypatch.setattr(dataset, "_SECONDS_ALONE", -1.0)
    monkeypatch.setattr(dataset, "_SECONDS_WORTH_PROCESSES", -1.0)
    for cache_dir in (None, tmp_path / "together"):
        together = dataset.PhotoSketchDataset(tmp_path / "one", "train", 16, cache_dir=cache_dir, num_readers=2)
        assert together.files == alone.files and together.corrupt_files == alone.corrupt_files
        for i in range(len(alone)):
            for one, other in zip(alone.photo(i), together.photo(i), strict=True):
                np.testing.assert_array_equal(one, other)
    names = [sorted(path.name for path in (tmp_path / name).rglob("*.npz")) for name in ("alone", "together")]
    assert names[0] == names[1] and len(names[0]) == len(alone)
