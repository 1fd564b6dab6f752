# SPDX-License-Identifier: Apache-2.0
import dataclasses
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import train_unet
import yaml
from PIL import Image
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from testing_utils import TRAINING, kill_when, make_vae
from train_unet import (
    UNetTrainingArguments,
    UNetValidation,
    check_unet_arguments,
    diffusion_loss,
    drop_conditions,
    main,
    make_scheduler,
    make_unet,
)

from diffsketching_pipeline import DiffSketchingPipeline
from diffsketching_pipeline.training.arguments import parse_args
from diffsketching_pipeline.training.keyed import keyed_generator
from diffsketching_pipeline.training.latents import load_vae
from diffsketching_pipeline.training.starts import Start


ID2LABEL = {0: "disc", 1: "square"}
SCRIPT = str(TRAINING / "train_unet.py")
TINY = {
    "resolution": 16,
    "block_out_channels": [8, 16],
    "down_block_types": ["DownBlock2D", "AttnDownBlock2D"],
    "up_block_types": ["AttnUpBlock2D", "UpBlock2D"],
    "attention_head_dim": 8,
    "norm_num_groups": 4,
    "train_batch_size": 4,
    "lr_warmup_steps": 2,
    "learning_rate": 1e-3,
    "num_validation_samples": 4,
    "num_validation_images": 2,
    "ddpm_num_inference_steps": 2,
    "validation_steps": 0,
    "report_to": "none",
}


def tiny_args(**kwargs):
    return UNetTrainingArguments(**(TINY | kwargs))


def write_config(path, **kwargs):
    path.write_text(yaml.safe_dump(TINY | {key: str(v) if isinstance(v, Path) else v for key, v in kwargs.items()}))
    return str(path)


def weights(folder):
    return load_file(folder / "diffusion_pytorch_model.safetensors")


# -- the script as a user runs it --


def test_accelerate_launch_trains_a_pipeline(shapes_dir, tmp_path, script_env):
    config = write_config(
        tmp_path / "config.yaml", train_data_dir=shapes_dir, max_train_steps=99, report_to="tensorboard"
    )
    out = tmp_path / "out"
    overrides = ["--max_train_steps", "6", "--resolution", "32", "--mixed_precision", "bf16", "--logging_steps", "2"]
    overrides += ["--validation_steps", "4", "--checkpointing_steps", "4", "--save_dtype", "float16"]
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "1", "--num_machines", "1"]
    launch += ["--mixed_precision", "no", "--dynamo_backend", "no", "--cpu"]
    run = subprocess.run(
        [*launch, SCRIPT, config, *overrides, "--output_dir", str(out)], env=script_env, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.strip() == str(out / "pipeline")
    assert "step/s" in run.stderr and "img/s" in run.stderr

    assert load_file(out / "pipeline" / "unet" / "diffusion_pytorch_model.safetensors")["conv_in.weight"].dtype == (
        torch.float16
    )
    pipeline = DiffSketchingPipeline.from_pretrained(out / "pipeline")
    assert pipeline.id2label == ID2LABEL and pipeline.null_class == 2 and pipeline.unet.config.sample_size == 32
    assert pipeline.scheduler.config.prediction_type == "v_prediction"
    assert pipeline(class_labels="disc", num_images_per_sketch=1, num_inference_steps=1).images[0].size == (32, 32)

    # Three rows (drawing, photo, generated) of two pictures of 64 pixels.
    names = ["sketch_photo_generated-000004.png", "sketch_photo_generated-000006.png"]
    assert sorted(path.name for path in (out / "samples").iterdir()) == names
    assert Image.open(out / "samples" / names[0]).size == (2 * 66 + 2, 3 * 66 + 2)
    events = EventAccumulator(str(out / "logs" / "train_unet"))
    events.Reload()
    assert [event.step for event in events.Scalars("loss")] == [2, 4, 6]
    for tag in ("validation/loss", "validation/loss_swapped_sketch", "validation/loss_no_sketch"):
        assert [event.step for event in events.Scalars(tag)] == [4, 6]
    assert [event.step for event in events.Images("sketch_photo_generated")] == [4, 6]
    assert weights(out / "checkpoint-4" / "unet")["conv_in.weight"].dtype == torch.float32


def test_killed_run_resumes_to_the_bit(shapes_dir, tmp_path, script_env):
    options = {"max_train_steps": 60, "checkpointing_steps": 4, "dropout": 0.1, "lr_scheduler": "cosine"}
    options |= {"train_data_dir": str(shapes_dir), "gradient_accumulation_steps": 2, "train_batch_size": 2}
    config = write_config(tmp_path / "config.yaml", **options)
    cut = tmp_path / "cut"
    command = [sys.executable, SCRIPT, config, "--output_dir", str(cut), "--dataloader_num_workers", "1"]
    kill_when((cut / "checkpoint-8").exists, command, script_env)
    assert not (cut / "pipeline").exists()

    main(tiny_args(**options, output_dir=str(cut), resume_from_checkpoint="latest"))
    main(tiny_args(**options, output_dir=str(tmp_path / "whole")))
    for name in ("unet", "unet_ema"):
        one, other = (weights(root / "checkpoint-60" / name) for root in (cut, tmp_path / "whole"))
        assert all(torch.equal(one[key], other[key]) for key in one)
    start = make_unet(tiny_args(dropout=0.1), ID2LABEL).state_dict()
    assert not torch.equal(one["conv_in.weight"], start["conv_in.weight"])
    one, other = (
        torch.load(root / "checkpoint-60" / "optimizer.bin", weights_only=True)["state"]
        for root in (cut, tmp_path / "whole")
    )
    assert one and all(torch.equal(one[i][key], other[i][key]) for i in one for key in one[i])
    one, other = (weights(root / "pipeline" / "unet") for root in (cut, tmp_path / "whole"))
    assert all(torch.equal(one[key], other[key]) for key in one)


def test_two_processes_equal_one_with_twice_the_batch(shapes_dir, tmp_path, script_env):
    # AdamW turns rounding errors of gradients that are 0 in theory (biases of attention keys) into steps of the size of
    # the learning rate, so the tolerance only makes sense beside a usual one.
    options = {"train_data_dir": str(shapes_dir), "max_train_steps": 5, "learning_rate": 1e-4, "lr_warmup_steps": 0}
    config = write_config(tmp_path / "config.yaml", **options, train_batch_size=2)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command = [*launch, SCRIPT, config, "--output_dir", str(tmp_path / "two")]
    run = subprocess.run(command, env=script_env | {"ACCELERATE_USE_CPU": "true"}, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr

    main(tiny_args(**options, train_batch_size=4, output_dir=str(tmp_path / "one")))
    state = json.loads((tmp_path / "two" / "checkpoint-5" / "trainer_state.json").read_text())
    assert state["samples_seen"] == 20
    assert (tmp_path / "two" / "checkpoint-5" / "random_states_1.pkl").exists()
    for name in ("unet", "unet_ema"):
        two, one = (weights(tmp_path / run / "checkpoint-5" / name) for run in ("two", "one"))
        for key, value in one.items():
            torch.testing.assert_close(two[key], value, rtol=0, atol=1e-5)
    start = make_unet(tiny_args(), ID2LABEL).state_dict()
    assert max((value - start[key]).abs().max() for key, value in one.items()) > 1e-4


def test_help_explains_the_script_and_every_argument(capsys):
    with pytest.raises(SystemExit) as exit_info:
        parse_args(UNetTrainingArguments, ["--help"], description=train_unet.__doc__)
    assert exit_info.value.code == 0
    text = capsys.readouterr().out
    assert "Trains the UNet of a DiffSketching pipeline" in text
    assert all(f"--{field.name}" in text for field in dataclasses.fields(UNetTrainingArguments))


# -- starting from trained weights --


@pytest.mark.slow
def test_higher_resolution_goes_on_from_the_averaged_weights_of_a_lower_one(shapes_dir, tmp_path):
    main(tiny_args(train_data_dir=str(shapes_dir), max_train_steps=3, output_dir=str(tmp_path / "low")))
    pipeline = str(tmp_path / "low" / "pipeline")
    averaged = weights(tmp_path / "low" / "checkpoint-3" / "unet_ema")
    for path in (pipeline, f"{pipeline}/unet"):
        unet = make_unet(tiny_args(resolution=32), ID2LABEL, start=Start.read(path))
        assert unet.config.sample_size == 32
        assert all(torch.equal(value, averaged[key]) for key, value in unet.state_dict().items())
    high = tiny_args(
        train_data_dir=str(shapes_dir),
        resolution=32,
        max_train_steps=2,
        pretrained_model_name_or_path=pipeline,
        output_dir=str(tmp_path / "high"),
    )
    main(high)
    assert DiffSketchingPipeline.from_pretrained(tmp_path / "high" / "pipeline").height == 32


@pytest.mark.parametrize(
    "kwargs, message",
    [
        ({"free_hand_share": -0.1}, r"`free_hand_share`.* -0.1"),
        ({"free_hand_strength": -1.0}, "`free_hand_strength`.* -1.0"),
        ({"proportion_empty_sketches": 1.5}, r"`proportion_empty_sketches`.* 1.5"),
        ({"snr_gamma": 0.0}, "`snr_gamma`.* 0.0"),
        ({"resolution": 15}, "`resolution`.* 15"),
        ({"num_validation_images": 0}, "`num_validation_images`.* 0"),
        ({"stroke_deletion_share": 2.0}, r"`stroke_deletion_share`.* 2.0"),
        ({"model_guidance_scale": -1.0}, "`model_guidance_scale`.* -1.0"),
        ({"publish_ema": "0.5"}, r"`publish_ema`.* '0.5'"),
    ],
)
def test_unusable_arguments_are_refused(kwargs, message):
    with pytest.raises(ValueError, match=message):
        check_unet_arguments(tiny_args(**kwargs))


# -- samples and losses --


def test_conditions_are_withheld_as_often_as_asked():
    sample = {"pixel_values": torch.zeros(3, 4, 4), "sketch": torch.ones(1, 4, 4), "class_label": 1}
    count = 3000
    drawn = [drop_conditions(sample, keyed_generator(0, i), 1000, 2, 0.1, 0.3, 0.2) for i in range(count)]
    no_class = torch.tensor([s["class_label"] == 2 for s in drawn]).float()
    no_sketch = torch.tensor([bool((s["sketch"] == 0).all()) for s in drawn]).float()
    # Within four standard deviations of the binomial mean; a fifth lose both, of the others 0.1, 0.3 and, by chance, 0.03.
    for share, p in ((no_class, 0.2 + 0.08), (no_sketch, 0.2 + 0.24), (no_class * no_sketch, 0.2 + 0.024)):
        assert abs(share.mean() - p) < 4 * (p * (1 - p) / count) ** 0.5
    assert {s["class_label"] for s in drawn} == {1, 2} and (sample["sketch"] == 1).all()
    timesteps = torch.tensor([s["timestep"] for s in drawn]).float()
    assert timesteps.min() >= 0 and timesteps.max() <= 999 and abs(timesteps.mean() - 499.5) < 4 * 289 / count**0.5
    noise = torch.stack([s["noise"] for s in drawn])
    assert abs(noise.mean()) < 4 / noise.numel() ** 0.5 and abs(noise.var() - 1) < 4 * (2 / noise.numel()) ** 0.5


def fixed_batch(size=6):
    generator = torch.Generator().manual_seed(0)
    return {
        "pixel_values": torch.rand(size, 3, 16, 16, generator=generator) * 2 - 1,
        "noise": torch.randn(size, 3, 16, 16, generator=generator),
        "sketch": torch.rand(size, 1, 16, 16, generator=generator) * 2 - 1,
        "class_label": torch.arange(size) % 3,
        "timestep": torch.tensor([0, 50, 300, 600, 900, 999])[:size],
    }


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
def test_loss_is_the_error_of_what_the_unet_predicts(prediction_type):
    args = tiny_args(prediction_type=prediction_type)
    scheduler, unet, batch = make_scheduler(args), make_unet(args, ID2LABEL).eval(), fixed_batch()
    # The cosine schedule of Nichol and Dhariwal (2021), eq. 17, with betas capped at 0.999.
    f = torch.cos((torch.arange(1001, dtype=torch.float64) / 1000 + 0.008) / 1.008 * torch.pi / 2) ** 2
    alphas_cumprod = torch.cumprod(1 - (1 - f[1:] / f[:-1]).clamp(max=0.999), dim=0)
    a = alphas_cumprod[batch["timestep"]].sqrt().float().view(-1, 1, 1, 1)
    s = (1 - alphas_cumprod[batch["timestep"]]).sqrt().float().view(-1, 1, 1, 1)
    x0, noise = batch["pixel_values"], batch["noise"]
    target = {"epsilon": noise, "v_prediction": a * noise - s * x0, "sample": x0}[prediction_type]
    with torch.no_grad():
        inputs = torch.cat([a * x0 + s * noise, batch["sketch"]], dim=1)
        prediction = unet(inputs, batch["timestep"], class_labels=batch["class_label"]).sample
        expected = ((prediction - target) ** 2).flatten(1).mean(1)
        torch.testing.assert_close(diffusion_loss(unet, scheduler, batch), expected, rtol=1e-4, atol=1e-5)


def test_min_snr_loss_is_the_same_error_of_x0_whatever_is_predicted():
    batch = fixed_batch()
    guess = batch["pixel_values"] + 0.3 * batch["noise"].flip(0)
    losses = {}
    for prediction_type in ("epsilon", "v_prediction", "sample"):
        scheduler = make_scheduler(tiny_args(prediction_type=prediction_type))
        alphas_cumprod = scheduler.alphas_cumprod[batch["timestep"]].view(-1, 1, 1, 1)
        a, s = alphas_cumprod.sqrt(), (1 - alphas_cumprod).sqrt()

        def predict(inputs, timestep, class_labels, a=a, s=s, prediction_type=prediction_type):
            """The network whose x_0 is `guess` at every timestep."""
            noise = (inputs[:, :3] - a * guess) / s
            sample = {"epsilon": noise, "v_prediction": a * noise - s * guess, "sample": guess}[prediction_type]
            return dataclasses.make_dataclass("Output", ["sample"])(sample)

        losses[prediction_type] = diffusion_loss(predict, scheduler, batch, snr_gamma=5.0)
    snr = (alphas_cumprod / (1 - alphas_cumprod)).flatten()
    error = ((guess - batch["pixel_values"]) ** 2).flatten(1).mean(1)
    for loss in losses.values():
        torch.testing.assert_close(loss, snr.clamp(max=5.0) * error, rtol=1e-2, atol=1e-4)


def latent_batch(size=4):
    generator = torch.Generator().manual_seed(0)
    return {
        "latents": torch.randn(size, 4, 8, 8, generator=generator),
        "noise": torch.randn(size, 4, 8, 8, generator=generator),
        "sketch": (torch.rand(size, 1, 32, 32, generator=generator) > 0.2) * 2.0 - 1,
        "sketch_abstraction": torch.tensor([0.0, 0.25, 0.5, 1.0])[:size],
        "class_label": torch.arange(size) % 3,
        "timestep": torch.tensor([0, 300, 600, 990])[:size],
    }


def test_loss_on_latents_folds_the_drawing_and_tells_how_far_it_may_be_off():
    args = tiny_args()
    scheduler, batch, seen = make_scheduler(args), latent_batch(), []

    def unet(inputs, timestep, class_labels):
        seen.append(inputs)
        return dataclasses.make_dataclass("Output", ["sample"])(torch.zeros_like(inputs[:, :4]))

    loss = diffusion_loss(unet, scheduler, batch, in_channels=4 + 16 + 1)
    (inputs,) = seen
    assert inputs.shape == (4, 21, 8, 8)
    torch.testing.assert_close(inputs[:, :4], scheduler.add_noise(batch["latents"], batch["noise"], batch["timestep"]))
    # Channel 4 * row + column of the folded drawing holds every fourth pixel from there on.
    for row, column in ((0, 0), (1, 3), (3, 2)):
        torch.testing.assert_close(inputs[:, 4 + 4 * row + column], batch["sketch"][:, 0, row::4, column::4])
    torch.testing.assert_close(inputs[:, 20], batch["sketch_abstraction"].reshape(4, 1, 1).expand(4, 8, 8))
    velocity = scheduler.get_velocity(batch["latents"], batch["noise"], batch["timestep"])
    torch.testing.assert_close(loss, velocity.square().mean((1, 2, 3)))
    batch["sketch"][2] = 0  # withheld: its abstraction goes, too
    diffusion_loss(unet, scheduler, batch, in_channels=4 + 16 + 1)
    assert (seen[1][2, 4:] == 0).all() and (seen[1][3, 20] == 1).all()
    diffusion_loss(unet, scheduler, batch)
    assert seen[2].shape[1] == 20


def test_model_guidance_moves_the_target_away_from_the_unconditional_prediction():
    args = tiny_args()
    scheduler, batch = make_scheduler(args), fixed_batch(4)
    batch["class_label"] = torch.tensor([0, 2, 2, 1])
    batch["sketch"][2] = 0  # neither class nor drawing: nothing to guide by
    weight = torch.nn.Parameter(torch.tensor(0.5))

    def unet(inputs, timestep, class_labels):
        prediction = weight * (inputs[:, :3] + inputs[:, 3:] + class_labels.reshape(-1, 1, 1, 1))
        return dataclasses.make_dataclass("Output", ["sample"])(prediction)

    guidance = train_unet.ModelGuidance(scale=1.5, null_class=2)
    loss = diffusion_loss(unet, scheduler, batch, model_guidance=guidance)
    noisy = scheduler.add_noise(batch["pixel_values"], batch["noise"], batch["timestep"])
    labels = batch["class_label"].reshape(-1, 1, 1, 1)
    conditional, unconditional = 0.5 * (noisy + batch["sketch"] + labels), 0.5 * (noisy + 2)
    target = scheduler.get_velocity(batch["pixel_values"], batch["noise"], batch["timestep"])
    guided = target + torch.tensor([1.5, 1.5, 0, 1.5]).reshape(-1, 1, 1, 1) * (conditional - unconditional)
    torch.testing.assert_close(loss, (conditional - guided).square().mean((1, 2, 3)))
    # The guided target is a constant to learn from, not a path for gradients.
    loss.sum().backward()
    expected = 2 * ((conditional - guided) * conditional / 0.5).mean((1, 2, 3)).sum()
    torch.testing.assert_close(weight.grad, expected.detach(), rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_a_latent_checkpoint_samples_with_its_autoencoder(shapes_dir, cache_dir, tmp_path, capsys):
    torch.manual_seed(0)
    vae = make_vae()
    vae.save_pretrained(tmp_path / "vae")
    options = {
        "train_data_dir": str(shapes_dir),
        "cache_dir": str(cache_dir),
        "resolution": 32,
        "pretrained_vae_model_name_or_path": str(tmp_path / "vae"),
        "crops_per_photo": 2,
        "abstraction_plane": True,
        "timestep_spacing": "trailing",
        "optimizer": "muon",
        "stroke_deletion_share": 0.3,
        "model_guidance_scale": 0.5,
        "model_guidance_start_step": 2,
        "further_ema_max_decays": [0.5],
        "publish_ema": "best",
    }
    main(tiny_args(**options, max_train_steps=4, output_dir=str(tmp_path / "out")))
    printed = capsys.readouterr().out
    losses = {
        float(decay): float(loss) for decay, loss in re.findall(r"up to ([\d.]+): validation loss ([\d.]+)", printed)
    }
    assert losses.keys() == {0.9999, 0.5}
    best = min(losses, key=losses.get)
    folder = "unet_ema" if best == 0.9999 else "unet_ema_0.5"
    published, kept = (
        weights(tmp_path / "out" / "pipeline" / "unet"),
        weights(tmp_path / "out" / "checkpoint-4" / folder),
    )
    assert all(torch.equal(published[key], kept[key]) for key in kept)

    pipeline = DiffSketchingPipeline.from_pretrained(tmp_path / "out" / "pipeline")
    assert pipeline.unet.config.in_channels == 4 + 16 + 1 and pipeline.unet.config.sample_size == 8
    assert pipeline.scheduler.config.timestep_spacing == "trailing" and not pipeline.scheduler.config.clip_sample
    photo = pipeline(class_labels="disc", num_images_per_sketch=1, num_inference_steps=1).images[0]
    assert photo.size == (32, 32)
    # Rows of drawings, decoded photos and generated ones, two of each, twice their size.
    (picture,) = (tmp_path / "out" / "samples").iterdir()
    assert Image.open(picture).size == (2 * 66 + 2, 3 * 66 + 2)

    # Later on it starts from a pipeline, with the autoencoder inside.
    path = str(tmp_path / "out" / "pipeline")
    unet = make_unet(tiny_args(**options), ID2LABEL, load_vae(path), Start.read(path))
    assert all(torch.equal(value, published[key]) for key, value in unet.state_dict().items())


def test_what_is_no_autoencoder_is_refused(tmp_path):
    make_unet(tiny_args(), ID2LABEL).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="pretrained_vae_model_name_or_path.*'UNet2DModel'"):
        load_vae(str(tmp_path))


@pytest.mark.slow
def test_swapped_sketch_loss_tells_a_network_that_ignores_drawings(shapes_dir):
    from diffsketching_pipeline.training.dataset import PhotoSketchDataset

    args = tiny_args(resolution=32)
    dataset = PhotoSketchDataset(shapes_dir, "validation", 32, train=False)
    validation = UNetValidation(args, dataset, make_scheduler(args))
    unet = make_unet(args, ID2LABEL).eval()
    with torch.no_grad():
        torch.nn.init.normal_(unet.conv_out.weight, std=0.1)
        unet.conv_in.weight[:, 3] = 0
        metrics, pictures = validation(unet)
        assert metrics["loss"] == metrics["loss_swapped_sketch"] == metrics["loss_no_sketch"]
        torch.nn.init.normal_(unet.conv_in.weight[:, 3])
        changed, _ = validation(unet)
    assert len({*changed.values()}) == 3
    assert pictures["sketch_photo_generated"].shape == (3, 3 * 66 + 2, 2 * 66 + 2)
