# SPDX-License-Identifier: Apache-2.0
import re
import subprocess
import sys

import pytest
import torch
from diffusers import AutoencoderKL, AutoencoderTiny
from PIL import Image
from safetensors.torch import load_file
from testing_utils import TRAINING, kill_when
from train_autoencoder import (
    AutoencoderArguments,
    TrainableAutoencoder,
    autoencoder_losses,
    check_autoencoder_arguments,
    main,
    make_models,
    measure_latents,
)

from diffsketching_pipeline.autoencoding import decode_latents, encode_photos, get_scale_factor
from diffsketching_pipeline.training.reconstruction import PhotoDataset, reconstruction_metrics
from diffsketching_pipeline.training.trainer import Trainer


SCRIPT = str(TRAINING / "train_autoencoder.py")
TINY = {
    "resolution": 32,
    "validation_resolution": 64,
    "latent_channels": 4,
    "block_out_channels": [8, 8, 8],
    "num_encoder_blocks": [0, 1, 1],
    "num_decoder_blocks": [1, 1, 0],
    "train_batch_size": 4,
    "learning_rate": 3e-3,
    "lr_warmup_steps": 2,
    "num_validation_photos": 4,
    "num_validation_images": 2,
    "ndf": 8,
    "discriminator_layers": 2,
    "validation_steps": 0,
    "report_to": "none",
}


def tiny_args(**kwargs):
    return AutoencoderArguments(**(TINY | {key: str(v) if key.endswith("dir") else v for key, v in kwargs.items()}))


def words(**kwargs):
    line = []
    for name, value in (TINY | kwargs).items():
        line += [f"--{name}", *(map(str, value) if isinstance(value, list) else [str(value)])]
    return line


def weights(folder):
    return load_file(folder / "diffusion_pytorch_model.safetensors")


@pytest.mark.slow
def test_trains_an_autoencoder_whose_latents_have_unit_variance(shapes_dir, tmp_path, capsys):
    options = {"max_train_steps": 80, "optimizer": "muon", "ema_max_decay": 0.8, "learning_rate": 1e-2}
    main(tiny_args(train_data_dir=shapes_dir, output_dir=tmp_path / "out", **options))
    printed = capsys.readouterr().out
    vae = AutoencoderTiny.from_pretrained(tmp_path / "out" / "vae")
    assert type(vae) is AutoencoderTiny and vae.config.latent_channels == 4 and get_scale_factor(vae) == 4

    held_out = PhotoDataset(shapes_dir, "validation", 64, train=False)
    photos = torch.stack([held_out.sample(i)["pixel_values"] for i in range(len(held_out))])
    seen = PhotoDataset(shapes_dir, "train", 64, train=False)
    with torch.no_grad():
        latents = encode_photos(vae, torch.stack([seen.sample(i)["pixel_values"] for i in range(len(seen))]))
        result = decode_latents(vae, encode_photos(vae, photos)).clamp(-1, 1)
    assert latents.shape[1:] == (4, 16, 16)
    assert abs(float(latents.mean())) < 0.02 and float(latents.var()) == pytest.approx(1, abs=0.05)
    # What is printed is what the folder does; an untrained one is near 6 dB.
    metrics = reconstruction_metrics(result, photos)
    found = re.search(r"psnr ([\d.]+), patch_distance ([\d.]+) \(N = 8\)", printed)
    assert metrics["psnr"] > 14
    assert [float(found[1]), float(found[2])] == pytest.approx(list(metrics.values()), rel=1e-3)
    # Two rows of two pictures of 64 pixels.
    assert Image.open(next((tmp_path / "out" / "samples").iterdir())).size == (2 * 66 + 2, 2 * 66 + 2)


def test_killed_run_resumes_to_the_bit(shapes_dir, tmp_path, script_env):
    options = {"train_data_dir": shapes_dir, "max_train_steps": 16, "checkpointing_steps": 4, "gan_weight": 0.1}
    options |= {"gan_start_step": 2, "latent_noise": 0.1}
    command = [sys.executable, SCRIPT, *words(**options), "--resume_from_checkpoint", "latest"]
    straight, killed = tmp_path / "straight", tmp_path / "killed"
    kill_when(lambda: (killed / "checkpoint-8").is_dir(), [*command, "--output_dir", str(killed)], script_env)
    for out in (straight, killed):
        run = subprocess.run([*command, "--output_dir", str(out)], env=script_env, capture_output=True, text=True)
        assert run.returncode == 0, run.stderr
    ours, theirs = weights(killed / "vae"), weights(straight / "vae")
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.slow
def test_second_phase_changes_the_decoder_alone(shapes_dir, tmp_path):
    first = {"train_data_dir": shapes_dir, "max_train_steps": 3, "gan_weight": 0.1}
    main(tiny_args(**first, output_dir=tmp_path / "first"))
    second = {"freeze_encoder": True, "pretrained_model_name_or_path": str(tmp_path / "first" / "vae")}
    second |= {"discriminator_name_or_path": str(tmp_path / "first" / "checkpoint-3" / "discriminator")}
    started = make_models(tiny_args(**first | second))["discriminator"].state_dict()
    kept = weights(tmp_path / "first" / "checkpoint-3" / "discriminator")
    assert all(torch.equal(started[name], value) for name, value in kept.items())
    main(tiny_args(**first, **second, output_dir=tmp_path / "second"))
    before, after = (AutoencoderTiny.from_pretrained(tmp_path / name / "vae") for name in ("first", "second"))
    for name, value in before.state_dict().items():
        assert torch.equal(value, after.state_dict()[name]) == name.startswith("encoder."), name
    assert before.config["scaling_factor"] == after.config["scaling_factor"] != 1
    assert before.config["shift_factor"] == after.config["shift_factor"] != 0


def test_the_discriminator_counts_from_its_first_step_on_and_is_eased_in(shapes_dir, tmp_path):
    args = tiny_args(gan_weight=0.5, gan_start_step=10, latent_noise=0.0, latent_weight=0.0)
    args.output_dir = str(tmp_path)
    dataset = PhotoDataset(shapes_dir, "train", 32)
    trainer = Trainer(args, make_models(args), dataset)
    losses = autoencoder_losses(trainer, args)
    assert list(losses) == ["discriminator", "vae"]
    batch = {"pixel_values": torch.stack([dataset.sample(i)["pixel_values"] for i in range(4)])}
    assert float(losses["discriminator"](batch)["loss"]) == 0
    assert "adversarial" not in losses["vae"](batch)
    trainer.global_step = 510  # half of the ramp
    outputs = losses["vae"](batch)
    assert float(outputs["loss"]) == pytest.approx(float(outputs["l1"] + 0.5 * 0.5 * outputs["adversarial"]), rel=1e-5)
    fake = trainer.modules["vae"](batch["pixel_values"])[0]
    scores = [trainer.modules["discriminator"](x) for x in (batch["pixel_values"], fake)]
    expected = 0.5 * ((scores[0] - 1).square().mean() + scores[1].square().mean())
    assert float(losses["discriminator"](batch)["loss"]) == pytest.approx(float(expected), rel=1e-5)


def test_the_latents_loss_and_noise_are_what_they_say(shapes_dir, tmp_path):
    args = tiny_args(latent_weight=2.0, latent_noise=0.0)
    args.output_dir = str(tmp_path)
    dataset = PhotoDataset(shapes_dir, "train", 32)
    trainer = Trainer(args, make_models(args), dataset)
    outputs = autoencoder_losses(trainer, args)["vae"]({"pixel_values": dataset.sample(0)["pixel_values"][None]})
    photo = dataset.sample(0)["pixel_values"][None]
    result, latents = trainer.modules["vae"](photo)
    expected = (result - photo).abs().mean() + 2 * latents.square().mean()
    assert float(outputs["loss"]) == pytest.approx(float(expected), rel=1e-5)
    assert not torch.equal(trainer.modules["vae"](photo, 0.5)[0], result)


def test_photos_are_cropped_in_range_and_by_key(shapes_dir):
    dataset = PhotoDataset(shapes_dir, "train", 24, seed=3)
    first, again, other = dataset.sample(1, 5), dataset.sample(1, 5), dataset.sample(1, 6)
    assert first["pixel_values"].shape == (3, 24, 24) and first["id"] == dataset.files[1].stem
    assert torch.equal(first["pixel_values"], again["pixel_values"])
    assert not torch.equal(first["pixel_values"], other["pixel_values"])
    whole = PhotoDataset(shapes_dir, "validation", 64, train=False).sample(0)["pixel_values"]
    with Image.open(PhotoDataset(shapes_dir, "validation", 64, train=False).files[0]) as photo:
        assert (whole[:, 0, 0] + 1).mul(127.5).round().tolist() == list(photo.getpixel((0, 0)))


def test_metrics_are_those_of_8_bit_photos():
    photos = torch.zeros(3, 3, 32, 32)
    shifted = photos + 10 / 127.5
    # 127.5 rounds to 128 and 137.5 to 138: ten levels apart.
    assert reconstruction_metrics(shifted, photos)["psnr"] == pytest.approx(10 * torch.tensor(650.25).log10().item())
    noise = torch.rand(16, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    assert reconstruction_metrics(noise, noise)["patch_distance"] == pytest.approx(0, abs=1e-6)
    assert reconstruction_metrics(noise / 2, noise)["patch_distance"] > 0.2


def test_kl_autoencoders_encode_to_their_mode():
    torch.manual_seed(0)
    vae = AutoencoderKL(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=4,
        latent_channels=4,
        scaling_factor=0.5,
        shift_factor=0.25,
    ).eval()
    assert get_scale_factor(vae) == 2 and get_scale_factor(None) == 1
    photos = torch.rand(2, 3, 16, 16) * 2 - 1
    with torch.no_grad():
        latents = encode_photos(vae, photos)
        distribution = vae.encode(photos).latent_dist
        torch.testing.assert_close(latents, (distribution.mean - 0.25) * 0.5)
        torch.testing.assert_close(decode_latents(vae, latents), vae.decode(distribution.mean).sample)


def test_factors_are_measured_over_all_latents(shapes_dir):
    torch.manual_seed(0)
    vae = TrainableAutoencoder(
        encoder_block_out_channels=(8, 8),
        decoder_block_out_channels=(8, 8),
        num_encoder_blocks=(0, 1),
        num_decoder_blocks=(1, 0),
    )
    dataset = PhotoDataset(shapes_dir, "validation", 64, train=False)
    shift, scale = measure_latents(vae, dataset, batch_size=3)
    with torch.no_grad():
        latents = vae.encode(torch.stack([dataset.sample(i)["pixel_values"] for i in range(len(dataset))])).latents
    assert shift == pytest.approx(float(latents.mean()), rel=1e-4)
    assert scale == pytest.approx(1 / float(latents.std(correction=0)), rel=1e-4)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"block_out_channels": [8, 16, 8]}, r"block_out_channels.*\[8, 16, 8\]"),
        ({"num_encoder_blocks": [1, 1]}, r"num_encoder_blocks.*3 entries.*\[1, 1\]"),
        ({"resolution": 30}, "resolution.*multiple of 4.*30"),
        ({"gan_weight": -1.0}, "gan_weight.*-1"),
        ({"freeze_encoder": True}, "freeze_encoder.*pretrained_model_name_or_path"),
    ],
)
def test_wrong_arguments_are_one_error(changes, message):
    with pytest.raises(ValueError, match=message):
        check_autoencoder_arguments(tiny_args(**changes))


def test_a_pretrained_autoencoder_of_another_shape_is_refused(tmp_path):
    models = make_models(tiny_args())
    models["vae"].plain().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"pretrained_model_name_or_path.*\(8, 4\).*\(4, 4\)"):
        make_models(tiny_args(pretrained_model_name_or_path=str(tmp_path), latent_channels=8))
