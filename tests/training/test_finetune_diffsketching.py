# SPDX-License-Identifier: Apache-2.0
"""Fine-tuning: the chain and its gradients, the cache of inverted photos, and the script as it is launched."""

import dataclasses
import json
import logging
import shutil
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import datasets
import finetune_diffsketching
import pytest
import torch
import yaml
from finetune_diffsketching import FinetuneValidation, check_finetune_arguments, check_pipeline, main
from PIL import Image
from safetensors.torch import load_file
from testing_utils import SIZE, kill_when, make_resnet, make_scheduler, make_unet, randn

from diffsketching_pipeline import DiffSketchingPipeline, SketchPerceptualLoss, load_lora
from diffsketching_pipeline.lora import LORA_WEIGHTS_NAME
from diffsketching_pipeline.losses import LPIPSFeatureMaps
from diffsketching_pipeline.schedulers import sampling_scheduler
from diffsketching_pipeline.training import chain
from diffsketching_pipeline.training.chain import FinetuneArguments, run_chain
from diffsketching_pipeline.training.chain_data import (
    ChainDataset,
    NoiseCache,
    fill_noise_cache,
    in_groups,
    invert_photos,
    weights_fingerprint,
)
from diffsketching_pipeline.training.dataset import PhotoSketchDataset
from diffsketching_pipeline.training.keyed import KeyedBatchSampler
from diffsketching_pipeline.training.trainer import Trainer


SCRIPT = str(Path(finetune_diffsketching.__file__))
ID2LABEL = {0: "disc", 1: "square"}
TINY = {
    "resolution": 16,
    "train_batch_size": 2,
    "num_train_inference_steps": 3,
    "num_fixed_point_iterations": 1,
    "learning_rate": 1e-3,
    "lr_warmup_steps": 0,
    "num_validation_samples": 4,
    "num_validation_images": 2,
    "ddpm_num_inference_steps": 2,
    "validation_steps": 0,
    "report_to": "none",
}


def tiny_args(**kwargs):
    return FinetuneArguments(**(TINY | kwargs))


@pytest.fixture(scope="session")
def pretrained_dir(tmp_path_factory, tiny_pipeline_factory):
    """The tiny pipeline with the two classes of the shapes."""
    folder = tmp_path_factory.mktemp("pretrained")
    components = ("sketcher", "sketch_encoder", "image_encoder")
    pipeline = tiny_pipeline_factory(components=components, id2label=ID2LABEL, num_class_embeds=3)
    torch.manual_seed(5)
    pipeline.register_modules(sketch_encoder=make_resnet(1, len(ID2LABEL)).eval())
    with torch.no_grad():
        pipeline.unet.conv_out.weight *= 0.2  # random weights are rougher than any trained network
    pipeline.save_pretrained(folder)
    return str(folder)


@pytest.fixture
def chain_batch():
    latents = randn(2, 3, SIZE, SIZE, seed=1)
    sketch = torch.ones(2, 1, SIZE, SIZE)
    sketch[0, :, 4:12, 5] = sketch[1, :, 8, 2:14] = -1
    return {
        "latents": latents,
        "pixel_values": randn(2, 3, SIZE, SIZE, seed=2).tanh(),
        "sketch": sketch,
        "class_label": torch.tensor([1, 0]),
        "chain_step": torch.tensor([2, 0]),
    }


@pytest.fixture
def unet():
    torch.manual_seed(0)
    return make_unet(num_class_embeds=3).train()


def gradients(unet, batch, args, **kwargs):
    unet.zero_grad()
    pred = run_chain(unet, unet.config, make_scheduler(prediction_type="v_prediction"), batch, args, **kwargs)
    (pred - batch["pixel_values"]).square().mean().backward()
    return pred.detach(), {name: p.grad.clone() for name, p in unet.named_parameters()}


# ---- the chain --------------------------------------------------------------------------------------------------------


def plain_chain(unet, batch, steps):
    """DDIM (eq. 3) with v-prediction, written out."""
    scheduler = make_scheduler()
    x, stride = batch["latents"], 1000 // steps
    states = []
    for t in range((steps - 1) * stride, -1, -stride):
        alpha = scheduler.alphas_cumprod[t]
        alpha_prev = scheduler.alphas_cumprod[t - stride] if t >= stride else torch.tensor(1.0)
        v = unet(torch.cat([x, batch["sketch"]], dim=1), t, batch["class_label"]).sample
        eps = alpha.sqrt() * v + (1 - alpha).sqrt() * x
        photo = alpha.sqrt() * x - (1 - alpha).sqrt() * v
        states.append((x, photo))
        x = alpha_prev.sqrt() * photo + (1 - alpha_prev).sqrt() * eps
    return x, states


def test_the_chain_is_ddim_and_its_gradient_that_of_the_written_out_chain(unet, chain_batch):
    found, grads = gradients(unet, chain_batch, tiny_args())
    unet.zero_grad()
    expected, _ = plain_chain(unet, chain_batch, 3)
    torch.testing.assert_close(found, expected.detach(), atol=1e-5, rtol=1e-4)
    (expected - chain_batch["pixel_values"]).square().mean().backward()
    for name, parameter in unet.named_parameters():
        torch.testing.assert_close(grads[name], parameter.grad, atol=1e-6, rtol=1e-3)


@pytest.mark.parametrize("truncate_backprop_steps", [None, 2])
def test_checkpointing_changes_memory_and_not_the_gradient(truncate_backprop_steps, unet, chain_batch):
    forwards, kept = [], {}
    unet.register_forward_pre_hook(lambda *_: forwards.append(torch.is_grad_enabled()))

    def measure(args):
        """Gradients; what the graph keeps for its backward pass is added up in `kept`."""
        key = (args.num_train_inference_steps, args.gradient_checkpointing)

        def pack(tensor):
            kept[key] = kept.get(key, 0) + tensor.numel()
            return tensor

        forwards.clear()
        # Inside a checkpointed step its own hooks are on, so that only what outlives the step is counted.
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            result = gradients(unet, chain_batch, args)
        recorded = args.truncate_backprop_steps or args.num_train_inference_steps
        assert sum(forwards) == recorded * (2 if args.gradient_checkpointing else 1)
        return result

    for steps in (3, 6):
        options = {"num_train_inference_steps": steps, "truncate_backprop_steps": truncate_backprop_steps}
        plain, expected = measure(tiny_args(**options))
        found, grads = measure(tiny_args(**options, gradient_checkpointing=True))
        torch.testing.assert_close(found, plain, atol=1e-6, rtol=1e-5)
        for name in grads:
            difference = (grads[name] - expected[name]).norm() / expected[name].norm().clamp(min=1e-12)
            assert difference < 1e-5, name
        assert kept[steps, True] < 0.2 * kept[steps, False]
    assert (
        kept[6, False] > 1.9 * kept[3, False] if truncate_backprop_steps is None else kept[6, False] == kept[3, False]
    )


def test_truncation_keeps_the_value_and_the_last_steps_of_the_gradient(unet, chain_batch):
    whole, grads = gradients(unet, chain_batch, tiny_args())
    found, truncated = gradients(unet, chain_batch, tiny_args(truncate_backprop_steps=1))
    assert torch.equal(found, whole)
    unet.zero_grad()
    with torch.no_grad():
        _, states = plain_chain(unet, chain_batch, 3)
    latents, _ = states[-1]
    expected, _ = plain_chain(unet, {**chain_batch, "latents": latents}, 1)  # the step from t = 0
    (expected - chain_batch["pixel_values"]).square().mean().backward()
    name = "conv_out.weight"
    torch.testing.assert_close(truncated[name], unet.conv_out.weight.grad, atol=1e-6, rtol=1e-3)
    assert (truncated[name] - grads[name]).norm() > 0.1 * grads[name].norm()


def test_per_step_is_x0_as_predicted_at_each_photos_own_step(unet, chain_batch):
    found, grads = gradients(unet, chain_batch, tiny_args(backprop="per_step"))
    unet.zero_grad()
    with torch.no_grad():
        _, states = plain_chain(unet, chain_batch, 3)
    scheduler = make_scheduler()
    steps, rows = chain_batch["chain_step"], torch.arange(2)
    latents = torch.stack([x for x, _ in states])[steps, rows]
    timesteps = sampling_scheduler(scheduler, 3).timesteps[steps]
    v = unet(torch.cat([latents, chain_batch["sketch"]], 1), timesteps, chain_batch["class_label"]).sample
    alpha = scheduler.alphas_cumprod[timesteps].reshape(-1, 1, 1, 1)
    expected = alpha.sqrt() * latents - (1 - alpha).sqrt() * v
    torch.testing.assert_close(found, expected.detach(), atol=1e-5, rtol=1e-4)
    (expected - chain_batch["pixel_values"]).square().mean().backward()
    torch.testing.assert_close(grads["conv_in.weight"], unet.conv_in.weight.grad, atol=1e-6, rtol=1e-3)


def test_classifier_guidance_steers_the_chain_and_is_not_differentiated(unet, chain_batch, tiny_pipeline_factory):
    classifier = tiny_pipeline_factory().classifier.requires_grad_(False)
    args = tiny_args(classifier_guidance_scale=5.0)
    plain, _ = gradients(unet, chain_batch, tiny_args())
    guided, grads = gradients(unet, chain_batch, args, components={"classifier": classifier})
    off, _ = gradients(unet, chain_batch, tiny_args(), components={"classifier": classifier})
    assert torch.equal(off, plain) and (guided - plain).abs().max() > 1e-3
    checked, rechecked = gradients(
        unet,
        chain_batch,
        dataclasses.replace(args, gradient_checkpointing=True),
        components={"classifier": classifier},
    )
    torch.testing.assert_close(checked, guided, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(rechecked["conv_in.weight"], grads["conv_in.weight"], atol=1e-7, rtol=1e-4)


def test_the_chain_guides_as_sampling_does(chain_batch, pretrained_dir):
    pipeline = DiffSketchingPipeline.from_pretrained(pretrained_dir)
    found = {}
    for scale in (1.0, 2.5):
        args = tiny_args(sketch_guidance_scale=scale)
        with torch.no_grad():
            found[scale] = run_chain(
                pipeline.unet,
                pipeline.unet.config,
                pipeline.scheduler,
                chain_batch,
                args,
                null_class=pipeline.null_class,
            )
        expected = pipeline(
            chain_batch["sketch"],
            chain_batch["class_label"],
            1,
            args.num_train_inference_steps,
            sketch_guidance_scale=scale,
            latents=chain_batch["latents"],
            clip_sample=False,
            output_type="latent",
        ).images
        torch.testing.assert_close(found[scale], expected, atol=1e-5, rtol=1e-4)
    assert (found[1.0] - found[2.5]).abs().max() > 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("factory", ["tiny_pipeline_factory", "latent_pipeline_factory"])
def test_the_chain_has_every_guidance_that_sampling_has(factory, request):
    pipeline, steps = request.getfixturevalue(factory)(), 4
    latents = randn(2, pipeline.sample_channels, *pipeline.sample_size, seed=1)
    sketch = torch.ones(2, 1, pipeline.height, pipeline.width)
    sketch[0, :, 4:12, 5] = sketch[1, :, 8, 2:14] = -1
    labels = torch.tensor([1, 0])
    batch = {"latents": latents, "sketch": sketch, "class_label": labels}
    scales = {"sketch_guidance_scale": 2.0, "classifier_guidance_scale": 1.5, "perceptual_guidance_scale": 0.2}
    found = {}
    for name in ("none", *scales, "all"):
        on = {key: scale for key, scale in scales.items() if name in (key, "all")}
        args = tiny_args(num_train_inference_steps=steps, resolution=pipeline.height, **on)
        given = (pipeline.unet, pipeline.unet.config, pipeline.scheduler, batch, args)
        with torch.no_grad():
            found[name] = run_chain(*given, pipeline.components, pipeline.null_class)
        expected = pipeline(
            *(sketch, labels, 1, steps), latents=latents, clip_sample=False, output_type="latent", **on
        ).images
        torch.testing.assert_close(found[name], expected, atol=1e-5, rtol=1e-4)
        recorded = run_chain(*given, pipeline.components, pipeline.null_class)
        torch.testing.assert_close(recorded.detach(), expected, atol=1e-5, rtol=1e-4)
        pipeline.unet.zero_grad()
        recorded.square().mean().backward()
        assert pipeline.unet.conv_in.weight.grad.abs().max() > 0
    assert all((found[name] - found["none"]).abs().max() > 1e-3 for name in (*scales, "all"))


@pytest.mark.slow
def test_the_chain_is_told_the_abstraction_that_a_call_is_told(latent_pipeline, latent_dir, shapes_dir, tmp_path):
    latents = randn(2, latent_pipeline.sample_channels, *latent_pipeline.sample_size, seed=1)
    sketch, labels = torch.ones(2, 1, 32, 32), torch.tensor([1, 0])
    sketch[:, :, 8:24, 8] = -1
    batch = {"latents": latents, "sketch": sketch, "class_label": labels}
    found = {}
    for value in (0.0, 0.75):
        args = tiny_args(num_train_inference_steps=4, resolution=32, sketch_abstraction=value)
        with torch.no_grad():
            found[value] = run_chain(
                latent_pipeline.unet, latent_pipeline.unet.config, latent_pipeline.scheduler, batch, args
            )
        expected = latent_pipeline(
            *(sketch, labels, 1, 4), latents=latents, sketch_abstraction=value, output_type="latent"
        ).images
        torch.testing.assert_close(found[value], expected, atol=1e-5, rtol=1e-4)
    assert (found[0.0] - found[0.75]).abs().max() > 1e-3

    # Left out, it is what the pipeline recommends.
    pipeline = DiffSketchingPipeline.from_pretrained(latent_dir)
    pipeline.register_to_config(recommended={"sketch_abstraction": 0.25})
    pipeline.save_pretrained(tmp_path / "recommending")
    options = {"train_data_dir": str(shapes_dir), "cache_dir": str(tmp_path / "cache"), "max_train_samples": 2}
    options |= {"resolution": 32, "num_train_inference_steps": 2, "max_train_steps": 1}
    options |= {"pretrained_model_name_or_path": str(tmp_path / "recommending")}
    main(tiny_args(**options, output_dir=str(tmp_path / "out")))
    told = yaml.safe_load((tmp_path / "out" / "training_args.yaml").read_text())
    assert told["sketch_abstraction"] == 0.25
    with pytest.raises(ValueError, match=r"`sketch_abstraction` must be in \[0, 1\] or None, but got 1.5"):
        main(tiny_args(**options, output_dir=str(tmp_path / "out"), sketch_abstraction=1.5))


# ---- the cache of inverted photos -------------------------------------------------------------------------------------


@pytest.fixture
def photos(shapes_dir, cache_dir):
    return PhotoSketchDataset(shapes_dir, "train", 16, train=False, cache_dir=cache_dir)


@pytest.mark.slow
def test_each_photo_is_inverted_once_and_sampling_returns_it(shapes_dir, cache_dir, pretrained_dir, tmp_path):
    pipeline, args = DiffSketchingPipeline.from_pretrained(pretrained_dir), tiny_args(num_fixed_point_iterations=15)
    cache = NoiseCache(tmp_path, pipeline.unet, pipeline.scheduler, args)
    photos = PhotoSketchDataset(shapes_dir, "train", 16, train=False, cache_dir=cache_dir, max_samples=5)
    dataset = ChainDataset(photos, cache, args)
    fill = (pipeline.unet, pipeline.scheduler, args, torch.device("cpu"))
    with pytest.raises(FileNotFoundError, match="missing or damaged"):
        dataset.sample(0)
    keys = dataset.keys()
    assert len(keys) == 10
    assert fill_noise_cache(cache, in_groups(dataset.views(keys), 4), *fill) == 10
    assert fill_noise_cache(cache, in_groups(dataset.views(keys), 4), *fill) == 0
    seen = set()
    for epoch in range(8):
        sample = dataset.sample(1, epoch)
        seen.add(sample["pixel_values"].numpy().tobytes())
        label = [sample["class_label"]]
        back = pipeline(
            *(None, label, 1, 3), latents=sample["latents"][None], clip_sample=False, output_type="latent"
        ).images[0]
        torch.testing.assert_close(back, sample["pixel_values"], atol=2e-3, rtol=0)
    assert len(seen) == 2  # as it is, and flipped

    # A file cut short, as by a full disk, is made again.
    file = cache.path(*next(dataset.views(keys)))
    file.write_bytes(file.read_bytes()[:100])
    assert fill_noise_cache(cache, in_groups(dataset.views(keys), 4), *fill) == 1


def test_what_a_run_will_see_is_inverted_and_nothing_else(photos, pretrained_dir, tmp_path):
    pipeline, args = DiffSketchingPipeline.from_pretrained(pretrained_dir), tiny_args(max_train_steps=3)
    cache = NoiseCache(tmp_path, pipeline.unet, pipeline.scheduler, args)
    dataset = ChainDataset(photos, cache, args)
    trainer = Trainer(
        dataclasses.replace(args, output_dir=str(tmp_path / "out")), {"unet": pipeline.unet}, dataset, None, None
    )
    draws = trainer.all_draws()
    sampler = iter(KeyedBatchSampler(len(dataset), args.train_batch_size, args.seed))
    assert draws == [draw for _ in range(3) for draw in next(sampler)]
    keys = dataset.keys(draws)
    assert 1 < len(keys) <= len(draws) < len(dataset.keys()) and {flip for _, flip in keys} == {False, True}
    fill_noise_cache(
        cache, in_groups(dataset.views(keys), 4), pipeline.unet, pipeline.scheduler, args, torch.device("cpu")
    )
    assert len(list(tmp_path.glob("*/*.safetensors"))) == len(keys)
    for index, epoch in draws:
        dataset.sample(index, epoch)
    with pytest.raises(FileNotFoundError):
        for epoch in range(100, 200):
            dataset.sample(draws[0][0] ^ 1, epoch)


def test_the_cache_is_keyed_by_all_that_changes_the_noise(pretrained_dir, tmp_path):
    pipeline, args = DiffSketchingPipeline.from_pretrained(pretrained_dir), tiny_args()
    pixels = randn(3, 16, 16).tanh()

    def name(pixels=pixels, label=0, scheduler=pipeline.scheduler, **changes):
        return NoiseCache(tmp_path, pipeline.unet, scheduler, dataclasses.replace(args, **changes)).path(pixels, label)

    other = type(pipeline.scheduler).from_config(pipeline.scheduler.config, beta_schedule="linear")
    names = [name(), name(pixels.flip(-1)), name(label=1), name(scheduler=other), name(num_train_inference_steps=4)]
    names.append(name(num_fixed_point_iterations=2))
    before = weights_fingerprint(pipeline.unet)
    assert name() == names[0] == name(learning_rate=1.0, identity_weight=0.1)
    with torch.no_grad():
        pipeline.unet.conv_in.bias[0] += 1e-6
    assert weights_fingerprint(pipeline.unet) != before
    names.append(name())
    assert len(set(names)) == len(names)


def test_samples_are_keyed_and_drawn_by_hand(photos, shapes_dir, cache_dir, pretrained_dir, tmp_path):
    pipeline, args = DiffSketchingPipeline.from_pretrained(pretrained_dir), tiny_args(free_hand_strength=1.0)
    cache = NoiseCache(tmp_path, pipeline.unet, pipeline.scheduler, args)
    one, other = ChainDataset(photos, cache, args), ChainDataset(photos, cache, args)
    fill_noise_cache(
        cache, in_groups(one.views(one.keys()), 8), pipeline.unet, pipeline.scheduler, args, torch.device("cpu")
    )
    for epoch in range(6):
        samples = [dataset.sample(3, epoch) for dataset in (one, other)]
        assert torch.equal(samples[0]["sketch"], samples[1]["sketch"])
        assert samples[0]["sketch"].min() < 0.5 and samples[0]["id"] == photos.ids[3]
        assert 0 <= samples[0]["chain_step"] < 3
    drawings = torch.stack([one.sample(3, epoch)["sketch"] for epoch in range(6)])
    assert len({drawing.numpy().tobytes() for drawing in drawings}) == 6
    fixed = ChainDataset(photos, cache, args, train=False)
    assert torch.equal(fixed.sample(0)["pixel_values"], photos.view(0)[0])
    four, eight = (
        PhotoSketchDataset(shapes_dir, "train", 16, train=False, cache_dir=cache_dir, max_samples=count)
        for count in (4, 8)
    )
    assert len(ChainDataset(four, cache, args)) == 4 and set(four.ids) < set(eight.ids)


# ---- the script -------------------------------------------------------------------------------------------------------


def write_config(path, **kwargs):
    path.write_text(yaml.safe_dump(TINY | {key: str(v) if isinstance(v, Path) else v for key, v in kwargs.items()}))
    return str(path)


def weights(folder):
    return load_file(folder / "diffusion_pytorch_model.safetensors")


def test_accelerate_launch_fine_tunes_a_pipeline(shapes_dir, cache_dir, pretrained_dir, tmp_path, script_env):
    config = write_config(
        tmp_path / "config.yaml",
        train_data_dir=shapes_dir,
        cache_dir=cache_dir,
        pretrained_model_name_or_path=pretrained_dir,
        max_train_steps=3,
        gradient_checkpointing=True,
    )
    out = tmp_path / "out"
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "1", "--num_machines", "1"]
    launch += ["--mixed_precision", "no", "--dynamo_backend", "no", "--cpu", SCRIPT, config]
    run = subprocess.run(
        [*launch, "--output_dir", str(out), "--mixed_precision", "bf16"],
        env=script_env,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.strip() == str(out / "pipeline") and "Inverting photos" in run.stderr
    for term in ("loss", "identity_loss", "perceptual_loss", "perceptual_loss_swapped"):
        assert f"validation/{term} " in run.stderr
    assert (out / "samples" / "sketch_before_after-000003.png").is_file()

    before, after = (DiffSketchingPipeline.from_pretrained(folder) for folder in (pretrained_dir, out / "pipeline"))
    assert after.id2label == ID2LABEL
    moved = {n: (p - after.unet.get_parameter(n)).abs().max().item() for n, p in before.unet.named_parameters()}
    assert sum(value > 0 for value in moved.values()) > 0.8 * len(moved)
    for name in ("sketcher", "sketch_encoder", "image_encoder"):
        frozen = getattr(after, name).state_dict()
        assert all(torch.equal(value, frozen[key]) for key, value in getattr(before, name).state_dict().items())


def test_a_run_killed_anywhere_resumes_to_the_bit(shapes_dir, pretrained_dir, tmp_path, script_env):
    options = {
        "max_train_steps": 12,
        "checkpointing_steps": 2,
        "inversion_batch_size": 3,
        "lr_scheduler": "cosine",
        "max_train_samples": 6,
    }
    options |= {"train_data_dir": str(shapes_dir), "pretrained_model_name_or_path": pretrained_dir}
    config = write_config(tmp_path / "config.yaml", **options)
    cut = tmp_path / "cut"
    command = [sys.executable, SCRIPT, config, "--output_dir", str(cut), "--resume_from_checkpoint", "latest"]
    kill_when(lambda: list(cut.glob("inverted/*/*.safetensors")), command, script_env)
    kill_when(lambda: list(cut.glob(".checkpoint-*.tmp/*")), command, script_env)
    kill_when(lambda: list(cut.glob("checkpoint-[2-9]")), command, script_env)

    # A step after the next checkpoint comes a validation that takes seconds.
    done = max(int(path.name[11:]) for path in cut.glob("checkpoint-*"))
    started = []

    def is_validating():
        if not started and (cut / "training_args.yaml").read_text().count("ddpm_num_inference_steps: 900"):
            started.append(time.monotonic())
        if (cut / f"checkpoint-{done + 2}").exists() and len(started) == 1:
            started.append(time.monotonic())
        return len(started) == 2 and time.monotonic() > started[1] + 1

    slow = ["--ddpm_num_inference_steps", "900", "--validation_steps", str(done + 3), "--num_validation_samples", "2"]
    kill_when(is_validating, [*command, *slow], script_env)
    assert not (cut / "pipeline").exists() and not (cut / f"checkpoint-{done + 4}").exists()
    assert not list((cut / "samples").glob("*"))
    main(tiny_args(**options, output_dir=str(cut), resume_from_checkpoint="latest"))
    main(tiny_args(**options, output_dir=str(tmp_path / "whole")))
    for name in ("unet", "unet_ema"):
        one, other = (weights(root / "checkpoint-12" / name) for root in (cut, tmp_path / "whole"))
        assert all(torch.equal(one[key], other[key]) for key in one)
    files = [sorted(p.name for p in (root / "inverted").rglob("*.safetensors")) for root in (cut, tmp_path / "whole")]
    assert files[0] == files[1] and 6 + 4 < len(files[0]) <= 2 * 6 + 4


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["folders", "dataset", "no classes"])
def test_drawings_by_people_are_used_as_they_are(layout, shapes_dir, pretrained_dir, tmp_path):
    root, table = tmp_path / "pairs", {"image": [], "sketch": [], "label": []}
    for photo in sorted((shapes_dir / "train").rglob("*.png")):
        label = "" if layout == "no classes" else photo.parent.name
        for folder in ("photo", "sketch"):
            (root / folder / label).mkdir(parents=True, exist_ok=True)
        shutil.copy(photo, root / "photo" / label)
        sketch = root / "sketch" / label / f"{photo.stem}-1.png"
        Image.open(photo).convert("L").point(lambda value: 0 if value < 150 else 255).save(sketch)
        for column, value in zip(table, (str(photo), str(sketch), label), strict=True):
            table[column].append(value)
    options = {"train_data_dir": str(root)}
    if layout == "dataset":
        features = datasets.Features(image=datasets.Image(), sketch=datasets.Image(), label=datasets.Value("string"))
        (tmp_path / "set").mkdir()
        datasets.Dataset.from_dict(table, features=features).to_parquet(tmp_path / "set" / "train.parquet")
        options = {"dataset_name": str(tmp_path / "set"), "conditioning_image_column": "sketch"}
    args = tiny_args(
        **options,
        pretrained_model_name_or_path=pretrained_dir,
        output_dir=str(tmp_path / "out"),
        cache_dir=str(tmp_path / "cache"),
        max_train_steps=1,
    )
    pipeline = finetune_diffsketching.load_frozen_pipeline(args)
    photos, grown = finetune_diffsketching.load_photos(args, pipeline)
    assert grown is pipeline
    assert {split: len(dataset) for split, dataset in photos.items()}.keys() == {"train", "validation"}
    assert len(photos["train"]) + len(photos["validation"]) == 16
    assert set(photos["train"].class_labels) == ({2} if layout == "no classes" else {0, 1})
    cache = NoiseCache(tmp_path, pipeline.unet, pipeline.scheduler, args)
    assert ChainDataset(photos["train"], cache, args).strength == 0.0
    main(args)
    assert (tmp_path / "out" / "pipeline" / "model_index.json").is_file()


@pytest.mark.slow
def test_lora_trains_an_adapter_and_resumes(shapes_dir, cache_dir, pretrained_dir, tmp_path):
    options = {
        "train_data_dir": str(shapes_dir),
        "cache_dir": str(cache_dir),
        "lora_rank": 2,
        "checkpointing_steps": 2,
    }
    options |= {"pretrained_model_name_or_path": pretrained_dir, "gradient_checkpointing": True, "ema_max_decay": 0.5}
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    main(tiny_args(**options, output_dir=str(whole), max_train_steps=4))
    main(tiny_args(**options, output_dir=str(cut), max_train_steps=2))
    main(tiny_args(**options, output_dir=str(cut), max_train_steps=4, resume_from_checkpoint="latest"))
    for name in ("unet", "unet_ema"):
        one, other = (load_file(root / "checkpoint-4" / name / LORA_WEIGHTS_NAME) for root in (whole, cut))
        assert one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)
        assert all(".lora_" in key for key in one)
        assert max(value.abs().max() for key, value in one.items() if ".lora_B." in key) > 1e-4

    # The pipeline has the adapter fused; added to the pretrained UNet it is the same network.
    fused = DiffSketchingPipeline.from_pretrained(whole / "pipeline").unet
    pretrained = DiffSketchingPipeline.from_pretrained(pretrained_dir).unet
    adapted = load_lora(DiffSketchingPipeline.from_pretrained(pretrained_dir).unet, whole / "lora")
    arguments = randn(2, 4, SIZE, SIZE), 300, torch.tensor([0, 1])
    with torch.no_grad():
        torch.testing.assert_close(adapted(*arguments).sample, fused(*arguments).sample, atol=1e-5, rtol=1e-4)
        assert (fused(*arguments).sample - pretrained(*arguments).sample).abs().max() > 1e-4


def test_two_processes_equal_one_with_twice_the_batch(shapes_dir, cache_dir, pretrained_dir, tmp_path, script_env):
    options = {"max_train_steps": 5, "train_data_dir": str(shapes_dir), "cache_dir": str(cache_dir)}
    options |= {"pretrained_model_name_or_path": pretrained_dir, "mixed_precision": "no", "learning_rate": 1e-3}
    # Adam divides by the gradient's size, so that where the true gradient is zero it magnifies rounding errors to steps.
    options |= {"gradient_checkpointing": True, "num_validation_samples": 2, "adam_epsilon": 1e-3}
    config = write_config(tmp_path / "config.yaml", **options)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    two = tmp_path / "two"
    run = subprocess.run(
        [*launch, SCRIPT, config, "--output_dir", str(two)],
        env={**script_env, "ACCELERATE_USE_CPU": "true"},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    main(tiny_args(**options | {"train_batch_size": 4}, output_dir=str(tmp_path / "one")))
    one, other = (weights(tmp_path / name / "checkpoint-5" / "unet") for name in ("one", "two"))
    start = DiffSketchingPipeline.from_pretrained(pretrained_dir).unet.state_dict()
    assert max((one[key] - start[key]).abs().max() for key in one) > 1e-3
    for key in one:
        torch.testing.assert_close(one[key], other[key], atol=1e-5, rtol=0)


@pytest.mark.slow
def test_fine_tuning_lowers_the_loss_it_is_given(shapes_dir, cache_dir, pretrained_dir, tmp_path, monkeypatch):
    options = {"train_data_dir": str(shapes_dir), "cache_dir": str(cache_dir), "identity_weight": 0.0}
    options |= {"pretrained_model_name_or_path": pretrained_dir, "max_train_steps": 40, "ema_max_decay": 0.5}
    options |= {"learning_rate": 4e-3}
    found = []

    class Recorded(FinetuneValidation):
        def __init__(self, args, dataset, pipeline, *others):
            super().__init__(args, dataset, pipeline, *others)
            self(pipeline.unet)

        def __call__(self, unet):
            with torch.no_grad():
                metrics, pictures = super().__call__(unet)
            found.append(metrics)
            return metrics, pictures

    monkeypatch.setattr(finetune_diffsketching, "FinetuneValidation", Recorded)
    main(tiny_args(**options, output_dir=str(tmp_path)))
    before, after = found
    assert after["loss"] == pytest.approx(after["perceptual_loss"], rel=1e-5)
    assert after["loss"] < 0.995 * before["loss"]


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"pretrained_model_name_or_path": None}, "`pretrained_model_name_or_path` is needed"),
        ({"identity_weight": 1.2}, r"`identity_weight`.* 1.2"),
        ({"free_hand_strength": -1.0}, "`free_hand_strength`.* -1.0"),
        ({"num_train_inference_steps": 0}, "`num_train_inference_steps`.* 0"),
        ({"num_fixed_point_iterations": -1}, "`num_fixed_point_iterations`.* -1"),
        ({"truncate_backprop_steps": 4}, "`truncate_backprop_steps`.* 4"),
        ({"truncate_backprop_steps": 1, "backprop": "per_step"}, "is for `--backprop chain`"),
    ],
)
def test_unusable_arguments_are_refused(kwargs, message):
    with pytest.raises(ValueError, match=message):
        check_finetune_arguments(tiny_args(**{"pretrained_model_name_or_path": "somewhere", **kwargs}))


@pytest.mark.parametrize(
    ("components", "kwargs", "message"),
    [
        ((), {}, r"`identity_weight`.* 0.5.*`sketcher`.*'x'"),
        (("sketcher", "sketch_encoder"), {}, "`identity_weight`.*`image_encoder`"),
        (("image_encoder",), {"identity_weight": 1.0, "classifier_guidance_scale": 2.0}, "component `classifier`"),
        (
            ("image_encoder",),
            {"identity_weight": 1.0, "resolution": 32},
            "`resolution`.* 16 x 16.* 32",
        ),
    ],
)
def test_a_pipeline_without_what_is_needed_is_refused(components, kwargs, message, tiny_pipeline_factory):
    pipeline = tiny_pipeline_factory(components=components)
    with pytest.raises(ValueError, match=message):
        check_pipeline(pipeline, tiny_args(pretrained_model_name_or_path="x", **kwargs))


def test_public_networks_take_the_place_of_the_pipelines(tiny_pipeline_factory, tmp_path, monkeypatch):
    encoder = make_resnet(3).eval()
    encoder.save_pretrained(tmp_path)
    settings = {"image_mean": [0.5, 0.4, 0.3], "image_std": [0.2, 0.2, 0.1], "crop_size": {"height": 24, "width": 24}}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(settings))
    monkeypatch.setattr(  # backbone weights would have to be downloaded
        SketchPerceptualLoss, "from_lpips", partial(SketchPerceptualLoss.from_lpips, pretrained_backbone=False)
    )
    pipeline = tiny_pipeline_factory(components=("sketcher",))
    args = tiny_args(
        pretrained_model_name_or_path="x", perceptual_net="alex", image_encoder_name_or_path=str(tmp_path)
    )
    check_pipeline(pipeline, args)
    loss = chain.make_loss(pipeline, args)
    assert loss.identity_loss.image_size == 24
    assert loss.identity_loss.image_mean.flatten().tolist() == pytest.approx(settings["image_mean"])
    assert isinstance(loss.perceptual_loss.feature_maps, LPIPSFeatureMaps)
    assert not any(parameter.requires_grad for parameter in loss.identity_loss.parameters())

    (tmp_path / "preprocessor_config.json").unlink()
    assert chain.load_identity_loss(str(tmp_path)).image_mean is None
    make_resnet(1).save_pretrained(tmp_path / "sketches")
    with pytest.raises(ValueError, match="`image_encoder_name_or_path`.* 1 channel"):
        chain.load_identity_loss(str(tmp_path / "sketches"))


def test_a_photo_only_unet_and_steps_that_do_not_fit_are_refused(tiny_pipeline_factory):
    args = tiny_args(pretrained_model_name_or_path="x")
    with pytest.raises(ValueError, match="UNet.* 4th .*'x' has 3"):
        check_pipeline(tiny_pipeline_factory(in_channels=3), args)
    pipeline = tiny_pipeline_factory(scheduler=make_scheduler(timestep_spacing="trailing"))
    with pytest.raises(ValueError, match="`num_train_inference_steps=3`.*scheduler"):
        check_pipeline(pipeline, args)


@pytest.mark.slow
def test_time_may_be_over_before_all_photos_are_inverted(shapes_dir, pretrained_dir, tmp_path, caplog):
    args = tiny_args(
        pretrained_model_name_or_path=pretrained_dir,
        train_data_dir=str(shapes_dir),
        output_dir=str(tmp_path),
        inversion_batch_size=4,
        max_train_minutes=1e-9,
    )
    with caplog.at_level(logging.INFO):
        main(args)
    assert "`max_train_minutes` are over before all photos were inverted" in caplog.text
    assert not (tmp_path / "pipeline").exists() and not list(tmp_path.glob("checkpoint-*"))


@pytest.mark.slow
def test_classes_of_the_photos_are_added_to_those_of_the_pipeline(shapes_dir, tmp_path, tiny_pipeline_factory):
    tiny_pipeline_factory().save_pretrained(tmp_path / "abc")
    options = {"pretrained_model_name_or_path": str(tmp_path / "abc"), "train_data_dir": str(shapes_dir)}
    options |= {"max_train_samples": 4, "max_train_steps": 1, "num_train_inference_steps": 2}
    with pytest.raises(ValueError, match=r"`lora_rank` must be left out where .* new classes \(disc, square\)"):
        main(tiny_args(**options, lora_rank=2, output_dir=str(tmp_path / "out")))
    assert not (tmp_path / "out").exists()
    main(tiny_args(**options, output_dir=str(tmp_path / "out")))
    before, after = (DiffSketchingPipeline.from_pretrained(tmp_path / name) for name in ("abc", "out/pipeline"))
    assert after.id2label == {**before.id2label, 3: "disc", 4: "square"}
    assert after.classifier.config.num_classes == after.sketch_encoder.config.num_labels == 5
    # One step, of photos of one class maybe, changed the embeddings of new classes and of no other.
    old, new = before.unet.class_embedding.weight, after.unet.class_embedding.weight
    assert torch.equal(new[:3], old[:3])
    assert torch.equal(new[5], old[3])
    assert (new[3:5] - old[:3].mean(0)).abs().max() > 0


# -- on latents --


@pytest.fixture
def latent_dir(latent_pipeline_factory, tmp_path):
    """The tiny latent pipeline with the two classes of the shapes."""
    pipe = latent_pipeline_factory(id2label=ID2LABEL, num_class_embeds=3, components=("sketcher", "image_encoder"))
    pipe.register_modules(sketch_encoder=make_resnet(1, num_labels=2))
    pipe.save_pretrained(tmp_path / "latent")
    return str(tmp_path / "latent")


def test_the_chain_of_a_latent_pipeline_is_judged_by_its_photos(latent_dir):
    pipeline = DiffSketchingPipeline.from_pretrained(latent_dir)
    args = tiny_args(pretrained_model_name_or_path=latent_dir, resolution=32, num_train_inference_steps=2)
    check_pipeline(pipeline, args)
    photos = randn(2, 3, 32, 32, seed=1).clamp(-1, 1)
    labels = torch.tensor([0, 1])
    noise = invert_photos(photos, labels, pipeline.unet, pipeline.scheduler, args, pipeline.vae)
    assert noise.shape == (2, 4, 8, 8)
    batch = {"latents": noise, "sketch": torch.ones(2, 1, 32, 32), "class_label": labels}
    batch |= {"chain_step": torch.tensor([0, 1])}
    batch["sketch"][:, :, 8:24, 8] = -1
    for parameter in pipeline.unet.parameters():
        parameter.requires_grad_(True)
    pred = run_chain(pipeline.unet, pipeline.unet.config, pipeline.scheduler, batch, args)
    photos_made = chain.decoded(pipeline, pred)
    assert pred.shape == (2, 4, 8, 8) and photos_made.shape == (2, 3, 32, 32)
    losses = chain.make_loss(pipeline, args)(photos_made, photos, batch["sketch"])
    assert losses.loss.shape == (2,) and torch.isfinite(losses.loss).all()
    # Against finite differences, through the chain and the decoder; eq. 7 itself clamps straight-through.
    bias, step, made = pipeline.unet.conv_out.bias, 1e-3, []
    (gradient,) = torch.autograd.grad(photos_made.square().mean(), bias)
    for sign in (1, -1):
        with torch.no_grad():
            bias[0] += sign * step
            again = run_chain(pipeline.unet, pipeline.unet.config, pipeline.scheduler, batch, args)
            made.append(chain.decoded(pipeline, again).square().mean())
            bias[0] -= sign * step
    assert float(gradient[0]) == pytest.approx(float(made[0] - made[1]) / (2 * step), rel=0.1)


@pytest.mark.slow
def test_a_latent_pipeline_is_fine_tuned(latent_dir, shapes_dir, tmp_path):
    args = {
        "train_data_dir": str(shapes_dir),
        "cache_dir": str(tmp_path / "cache"),
        "pretrained_model_name_or_path": latent_dir,
    }
    args |= {"num_train_inference_steps": 2}  # trailing spacing takes what divides 1000
    main(tiny_args(**args, resolution=32, max_train_steps=2, max_train_samples=4, output_dir=str(tmp_path / "out")))
    before, after = (
        DiffSketchingPipeline.from_pretrained(path) for path in (latent_dir, tmp_path / "out" / "pipeline")
    )
    assert torch.equal(before.vae.decoder.layers[0].weight, after.vae.decoder.layers[0].weight)
    assert not torch.equal(before.unet.conv_out.weight, after.unet.conv_out.weight)
    kept = load_file(next((tmp_path / "cache" / "inverted").rglob("*.safetensors")))["latents"]
    assert kept.shape == (4, 8, 8)
