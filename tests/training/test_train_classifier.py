# SPDX-License-Identifier: Apache-2.0
import subprocess
import sys

import pytest
import torch
import yaml
from diffusers import DDIMScheduler, UNet2DModel
from PIL import Image
from testing_utils import TRAINING, make_vae
from train_classifier import (
    ClassifierTrainingArguments,
    ClassifierValidation,
    check_classifier_arguments,
    main,
    make_classifier,
    make_scheduler,
    with_captions,
)

from diffsketching_pipeline import NoisyImageClassifier
from diffsketching_pipeline.training.dataset import PhotoSketchDataset
from diffsketching_pipeline.training.latents import LatentDataset


ID2LABEL = {0: "disc", 1: "square"}
TINY = {
    "resolution": 16,
    "block_out_channels": [16, 32],
    "down_block_types": ["ResnetDownsampleBlock2D", "AttnDownBlock2D"],
    "attention_head_dim": 8,
    "norm_num_groups": 4,
    "dropout": 0.0,
    "train_batch_size": 8,
    "learning_rate": 3e-3,
    "lr_warmup_steps": 5,
    "ema_max_decay": 0.9,
    "validation_steps": 0,
    "num_validation_samples": 8,
    "num_validation_images": 3,
    "report_to": "none",
}


def tiny_args(**kwargs):
    return ClassifierTrainingArguments(**(TINY | kwargs))


def test_script_trains_a_classifier_on_the_schedule_of_a_pipeline(shapes_dir, tmp_path, script_env):
    scheduler = DDIMScheduler(num_train_timesteps=200, beta_schedule="linear", prediction_type="v_prediction")
    scheduler.save_pretrained(tmp_path / "pipeline" / "scheduler")
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump(TINY | {"train_data_dir": str(shapes_dir), "max_train_steps": 2}))
    out = tmp_path / "out"
    options = ["--scheduler_name_or_path", str(tmp_path / "pipeline"), "--output_dir", str(out)]
    command = [sys.executable, str(TRAINING / "train_classifier.py"), "--config", str(config), *options]
    run = subprocess.run(command, env=script_env, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert run.stdout.strip() == str(out / "classifier")
    classifier = NoisyImageClassifier.from_pretrained(out / "classifier")
    assert (classifier.config.num_classes, classifier.config.sample_size) == (2, 16)
    assert all(f"accuracy_quarter_{i}" in run.stderr for i in (1, 2, 3, 4))
    # Four noise levels of three photos, each enlarged to 128 pixels.
    assert Image.open(out / "samples" / "noisy_predicted-000002.png").size == (3 * 130 + 2, 4 * 130 + 2)


@pytest.mark.slow
def test_training_learns_classes_from_noisy_photos(shapes_dir, tmp_path):
    main(tiny_args(train_data_dir=str(shapes_dir), max_train_steps=60, output_dir=str(tmp_path)))
    classifier = NoisyImageClassifier.from_pretrained(tmp_path / "classifier")
    dataset = PhotoSketchDataset(shapes_dir, "validation", 16, train=False, contours="none")
    args = tiny_args()
    validation = ClassifierValidation(args, dataset, make_scheduler(args))
    with torch.no_grad():
        trained, _ = validation(classifier.eval())
        untrained, _ = validation(make_classifier(args, ID2LABEL).eval())
    assert trained["accuracy_quarter_1"] == trained["accuracy_quarter_2"] == 1.0
    assert trained["loss_quarter_1"] < 0.2 * untrained["loss_quarter_1"]
    # Almost nothing of a photo is left in the last quarter.
    assert trained["loss_quarter_1"] < trained["loss_quarter_4"]


def test_validation_timesteps_cover_their_quarter(shapes_dir):
    dataset = PhotoSketchDataset(shapes_dir, "validation", 16, train=False, contours="none")
    args = tiny_args(ddpm_num_steps=1000)
    validation = ClassifierValidation(args, dataset, make_scheduler(args))
    for quarter in range(4):
        timesteps = validation.timesteps(quarter)
        assert timesteps.min() >= 250 * quarter and timesteps.max() < 250 * (quarter + 1)
        # Eight points, none of two eighths of the quarter left out.
        gaps = torch.cat([timesteps, torch.tensor([250 * quarter, 250 * (quarter + 1)])]).sort().values.diff()
        assert gaps.max() <= 250 / 4


def test_schedule_is_that_of_the_arguments_or_of_the_pipeline(tmp_path):
    DDIMScheduler(num_train_timesteps=200, beta_schedule="linear").save_pretrained(tmp_path / "scheduler")
    betas = torch.linspace(0.0001, 0.02, 200)
    scheduler = make_scheduler(tiny_args(scheduler_name_or_path=str(tmp_path)))
    torch.testing.assert_close(scheduler.alphas_cumprod, torch.cumprod(1 - betas, dim=0))
    assert len(make_scheduler(tiny_args(ddpm_num_steps=50)).alphas_cumprod) == 50


def test_pretrained_classifier_is_loaded_or_refused(tmp_path):
    classifier = make_classifier(tiny_args(seed=5), ID2LABEL)
    classifier.save_pretrained(tmp_path / "pipeline" / "classifier")
    for path in (tmp_path / "pipeline", tmp_path / "pipeline" / "classifier"):
        loaded = make_classifier(tiny_args(pretrained_model_name_or_path=str(path)), ID2LABEL)
        assert all(torch.equal(value, classifier.state_dict()[key]) for key, value in loaded.state_dict().items())
    args = tiny_args(pretrained_model_name_or_path=str(tmp_path / "pipeline"))
    args.resolution = 32
    with pytest.raises(ValueError, match="must have sample_size 32, but .* has 16"):
        make_classifier(args, ID2LABEL)


def test_unusable_arguments_are_refused():
    with pytest.raises(ValueError, match=r"`label_smoothing`.* 1.0"):
        check_classifier_arguments(tiny_args(label_smoothing=1.0))
    with pytest.raises(ValueError, match="`num_validation_samples`.* 0"):
        check_classifier_arguments(tiny_args(num_validation_samples=0))


def test_captions_are_written_on_enlarged_pictures():
    pictures = torch.full((2, 3, 16, 16), 0.5)
    captioned = with_captions(pictures, ["disc (square)", "x"])
    assert captioned.shape == (2, 3, 128, 128)
    torch.testing.assert_close(captioned[:, :, 32:], torch.full((2, 3, 96, 128), 191 / 127.5 - 1))
    # White letters with smoothed edges on a black box that is as wide as the text.
    assert captioned[0, :, :16].min() == -1 and captioned[0, :, :16].max() > 0.9
    widths = [int((picture[0] == -1).any(dim=0).sum()) for picture in captioned]
    assert 5 * widths[1] < widths[0] < 128


def save_unet(folder, **kwargs):
    config = {"sample_size": 16, "in_channels": 4, "num_class_embeds": 3, "block_out_channels": (16, 32)}
    config |= {
        "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
        "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
    }
    config |= {"layers_per_block": 1, "norm_num_groups": 8, "resnet_time_scale_shift": "scale_shift"}
    unet = UNet2DModel(**(config | kwargs))
    unet.save_pretrained(folder / "unet")
    return unet


def test_a_classifier_can_start_as_half_of_the_unet(tmp_path):
    unet = save_unet(tmp_path)
    args = tiny_args(unet_name_or_path=str(tmp_path), dropout=0.25)
    classifier = make_classifier(args, ID2LABEL)
    assert torch.equal(classifier.conv_in.weight, unet.conv_in.weight[:, :3])
    # Told "no class", which is the index after the classes.
    expected = unet.time_embedding.linear_2.bias + unet.class_embedding.weight[2]
    torch.testing.assert_close(classifier.time_embedding.linear_2.bias, expected)
    assert classifier.config.num_classes == 2 and classifier.config.dropout == 0.25
    torch.manual_seed(1)
    again = make_classifier(args, ID2LABEL)
    assert torch.equal(again.pool.to_out.weight, classifier.pool.to_out.weight)  # the script's seed, not the process's


@pytest.mark.parametrize("config, found", [({"sample_size": 32}, "32 and 3"), ({"num_class_embeds": 7}, "16 and 7")])
def test_a_unet_of_other_data_is_refused(tmp_path, config, found):
    save_unet(tmp_path, **config)
    with pytest.raises(ValueError, match=f"sample_size 16 and no classes or 3 .* has {found}"):
        make_classifier(tiny_args(unet_name_or_path=str(tmp_path)), ID2LABEL)


def test_two_networks_to_start_from_are_refused():
    with pytest.raises(ValueError, match="cannot both be given"):
        check_classifier_arguments(tiny_args(unet_name_or_path="a", pretrained_model_name_or_path="b"))


@pytest.mark.slow
def test_classifies_the_latents_of_an_autoencoder(shapes_dir, cache_dir, tmp_path):
    torch.manual_seed(0)
    vae = make_vae()
    vae.save_pretrained(tmp_path / "vae")
    options = {"train_data_dir": str(shapes_dir), "cache_dir": str(cache_dir), "resolution": 32}
    options |= {"pretrained_vae_model_name_or_path": str(tmp_path / "vae"), "crops_per_photo": 1}
    main(tiny_args(**options, max_train_steps=60, output_dir=str(tmp_path / "out")))
    classifier = NoisyImageClassifier.from_pretrained(tmp_path / "out" / "classifier")
    assert classifier.config.in_channels == 4 and classifier.config.sample_size == 8
    dataset = LatentDataset(shapes_dir, "validation", vae, 32, train=False, cache_dir=cache_dir, contours="none")
    samples = [dataset.sample(i) for i in range(len(dataset))]
    assert samples[0].keys() == {"latents", "class_label", "id"}
    with torch.no_grad():
        logits = classifier(torch.stack([sample["latents"] for sample in samples]), 0).logits
    assert (logits.argmax(1) == torch.tensor([sample["class_label"] for sample in samples])).float().mean() >= 0.75
    # A row per quarter of the schedule, of decoded photos 4 x 32 pixels wide.
    (picture,) = (tmp_path / "out" / "samples").iterdir()
    assert Image.open(picture).size == (3 * 130 + 2, 4 * 130 + 2)

    # It may start as half of a UNet of the same latents, and no other.
    unet = UNet2DModel(
        sample_size=8,
        in_channels=4 + 16,
        out_channels=4,
        block_out_channels=(8, 16),
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=8,
        norm_num_groups=4,
        num_class_embeds=3,
    )
    unet.save_pretrained(tmp_path / "unet")
    started = make_classifier(tiny_args(**options, unet_name_or_path=str(tmp_path / "unet")), ID2LABEL, vae)
    assert started.config.in_channels == 4
    assert torch.equal(started.conv_in.weight, unet.conv_in.weight[:, :4])
    with pytest.raises(ValueError, match="must have sample_size 32"):
        make_classifier(tiny_args(unet_name_or_path=str(tmp_path / "unet"), resolution=32), ID2LABEL)
