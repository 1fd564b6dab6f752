# SPDX-License-Identifier: Apache-2.0
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from diffusers import DDIMScheduler, DDPMScheduler, UNet2DModel
from safetensors.torch import load_file, save_file
from testing_utils import FIXTURES

from diffsketching_pipeline import DiffSketchingPipeline
from diffsketching_pipeline.converters.guided_diffusion import (
    convert_classifier_checkpoint,
    convert_guided_diffusion,
    convert_unet_checkpoint,
    networks_of_preset,
)
from diffsketching_pipeline.converters.guided_diffusion_flags import PRESETS
from diffsketching_pipeline.converters.reading import read_checkpoint
from diffsketching_pipeline.files import staged_folder
from diffsketching_pipeline.unet_surgery import expand_unet_for_sketch


ADM_MINI = FIXTURES / "adm_mini"
NUM_CLASSES = 7


class AdmReference:
    """
    guided-diffusion's two networks as plain functions of its parameter names, written from the papers' description
    ("Improved denoising diffusion probabilistic models", "Diffusion models beat GANs on image synthesis"). A parameter
    is drawn when it is first used, so that running a network also makes the file it would be loaded from.
    """

    def __init__(self, flags, prefix=""):
        def flag(name, default):
            return flags.get(name, flags.get(prefix + name, default))

        is_unet = not prefix
        self.width = flag("num_channels" if is_unet else "width", 32)
        self.depth = flag("num_res_blocks" if is_unet else "depth", 1)
        self.mults = [float(mult) for mult in flag("channel_mult", "1,2").split(",")]
        sides = flag("attention_resolutions", "8").split(",")
        self.attention_factors = [flags["image_size"] // int(side) for side in sides]
        self.num_heads = flag("num_heads", 4)
        self.num_heads_upsample = flag("num_heads_upsample", -1)
        self.num_head_channels = flag("num_head_channels", -1 if is_unet else 64)
        self.new_order = flag("use_new_attention_order", False)
        self.scale_shift = flag("use_scale_shift_norm", True)
        self.updown = flag("resblock_updown", not is_unet)
        self.class_cond = flag("class_cond", False)
        self.out_channels = 6 if flag("learn_sigma", False) else 3
        self.generator = torch.Generator().manual_seed(0)
        self.state_dict = {}

    def parameter(self, name, *shape, scale, offset=0.0):
        if name not in self.state_dict:
            self.state_dict[name] = offset + scale * torch.randn(*shape, generator=self.generator)
        return self.state_dict[name]

    def linear(self, x, name, channels, kernel=()):
        fan_in = x.shape[1] * math.prod(kernel)
        weight = self.parameter(f"{name}.weight", channels, x.shape[1], *kernel, scale=fan_in**-0.5)
        return weight, self.parameter(f"{name}.bias", channels, scale=0.1)

    def conv(self, x, name, channels, kernel=3, stride=1):
        weight, bias = self.linear(x, name, channels, (kernel, kernel))
        return F.conv2d(x, weight, bias, stride=stride, padding=kernel // 2)

    def norm(self, x, name):
        weight = self.parameter(f"{name}.weight", x.shape[1], scale=0.1, offset=1.0)
        return F.group_norm(x, 32, weight, self.parameter(f"{name}.bias", x.shape[1], scale=0.1))

    def resblock(self, x, emb, name, channels, resample=lambda x: x):
        h = resample(F.silu(self.norm(x, f"{name}.in_layers.0")))
        x = resample(x)
        h = self.conv(h, f"{name}.in_layers.2", channels)
        shift = F.linear(F.silu(emb), *self.linear(emb, f"{name}.emb_layers.1", (1 + self.scale_shift) * channels))[
            :, :, None, None
        ]
        if self.scale_shift:
            scale, shift = shift.chunk(2, dim=1)
            h = self.norm(h, f"{name}.out_layers.0") * (1 + scale) + shift
        else:
            h = self.norm(h + shift, f"{name}.out_layers.0")
        h = self.conv(F.silu(h), f"{name}.out_layers.3", channels)
        return h + (x if x.shape[1] == channels else self.conv(x, f"{name}.skip_connection", channels, kernel=1))

    def scores(self, qkv, heads, new_order):
        dim = qkv.shape[1] // (3 * heads)
        if new_order:
            q, k, v = qkv.reshape(len(qkv), 3, heads, dim, -1).unbind(1)
        else:
            q, k, v = qkv.reshape(len(qkv), heads, 3, dim, -1).unbind(2)
        weight = torch.softmax(q.transpose(-1, -2) @ k / math.sqrt(dim), dim=-1)
        return (v @ weight.transpose(-1, -2)).flatten(1, 2)

    def attention(self, x, name, num_heads):
        channels = x.shape[1]
        heads = num_heads if self.num_head_channels == -1 else channels // self.num_head_channels
        qkv = F.conv1d(self.norm(x, f"{name}.norm").flatten(2), *self.linear(x, f"{name}.qkv", 3 * channels, (1,)))
        h = self.scores(qkv, heads, self.new_order)
        h = F.conv1d(h, *self.linear(h, f"{name}.proj_out", channels, (1,)))
        return x + h.reshape(x.shape)

    def embed(self, timesteps):
        angles = timesteps[:, None].float() * torch.exp(
            -math.log(10000) * torch.arange(self.width // 2) / (self.width // 2)
        )
        emb = torch.cat([angles.cos(), angles.sin()], dim=1)
        emb = F.silu(F.linear(emb, *self.linear(emb, "time_embed.0", 4 * self.width)))
        return F.linear(emb, *self.linear(emb, "time_embed.2", 4 * self.width))

    def encode(self, x, emb):
        skips = [self.conv(x, "input_blocks.0.0", int(self.mults[0] * self.width))]
        for level, mult in enumerate(self.mults):
            for _ in range(self.depth):
                name = f"input_blocks.{len(skips)}"
                h = self.resblock(skips[-1], emb, f"{name}.0", int(mult * self.width))
                skips.append(self.attention(h, f"{name}.1", self.num_heads) if self.attends(level) else h)
            if level < len(self.mults) - 1:
                name, h = f"input_blocks.{len(skips)}.0", skips[-1]
                if self.updown:
                    skips.append(self.resblock(h, emb, name, h.shape[1], lambda x: F.avg_pool2d(x, 2)))
                else:
                    skips.append(self.conv(h, f"{name}.op", h.shape[1], stride=2))
        h = self.resblock(skips[-1], emb, "middle_block.0", skips[-1].shape[1])
        h = self.attention(h, "middle_block.1", self.num_heads)
        return self.resblock(h, emb, "middle_block.2", h.shape[1]), skips

    def attends(self, level):
        return 2**level in self.attention_factors

    def unet(self, x, timesteps, class_labels):
        emb = self.embed(timesteps)
        if self.class_cond:
            emb = emb + self.parameter("label_emb.weight", NUM_CLASSES, emb.shape[1], scale=1.0)[class_labels]
        h, skips = self.encode(x, emb)
        index = 0
        num_heads = self.num_heads if self.num_heads_upsample == -1 else self.num_heads_upsample
        for level, mult in reversed(list(enumerate(self.mults))):
            for layer in range(self.depth + 1):
                part = 0
                name = f"output_blocks.{index}"
                h = self.resblock(torch.cat([h, skips.pop()], dim=1), emb, f"{name}.0", int(mult * self.width))
                if self.attends(level):
                    part += 1
                    h = self.attention(h, f"{name}.{part}", num_heads)
                if level > 0 and layer == self.depth:
                    part += 1
                    if self.updown:
                        h = self.resblock(h, emb, f"{name}.{part}", h.shape[1], self.double)
                    else:
                        h = self.conv(self.double(h), f"{name}.{part}.conv", h.shape[1])
                index += 1
        return self.conv(F.silu(self.norm(h, "out.0")), "out.2", self.out_channels)

    def classifier(self, x, timesteps):
        h, _ = self.encode(x, self.embed(timesteps))
        h = F.silu(self.norm(h, "out.0")).flatten(2)
        h = torch.cat([h.mean(dim=2, keepdim=True), h], dim=2)
        h = h + self.parameter("out.2.positional_embedding", *h.shape[1:], scale=0.1)
        qkv = F.conv1d(h, *self.linear(h, "out.2.qkv_proj", 3 * h.shape[1], (1,)))
        h = self.scores(qkv, h.shape[1] // self.num_head_channels, new_order=True)
        return F.conv1d(h, *self.linear(h, "out.2.c_proj", NUM_CLASSES, (1,)))[:, :, 0]

    @staticmethod
    def double(x):
        return x.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)


MINI_FLAGS = {
    "image_size": 16,
    "num_channels": 32,
    "num_res_blocks": 1,
    "channel_mult": "1,2",
    "attention_resolutions": "8",
    "num_head_channels": 16,
    "class_cond": True,
    "learn_sigma": True,
    "resblock_updown": True,
}
UNET_CASES = {
    "legacy_order": {},
    "new_order": {"use_new_attention_order": True},
    "convolutional_resampling": {"resblock_updown": False},
    "added_timestep": {"use_scale_shift_norm": False, "resblock_updown": False, "use_new_attention_order": True},
    "unconditional_fixed_variance": {"class_cond": False, "learn_sigma": False},
    "attention_at_every_level": {"attention_resolutions": "16,8", "channel_mult": "1,2,2", "num_res_blocks": 2},
    "attention_in_the_middle_only": {"attention_resolutions": "32", "resblock_updown": False, "num_res_blocks": 3},
    "one_head_over_several_widths": {"num_head_channels": -1, "num_heads": 1, "attention_resolutions": "16,8"},
    "four_heads_over_one_width": {"num_head_channels": -1, "num_heads": 4},
    "heads_upsample_unused": {"num_head_channels": -1, "num_heads_upsample": 2, "attention_resolutions": "32"},
    "heads_upsample_ignored": {"num_head_channels": 32, "num_heads_upsample": 1, "attention_resolutions": "16,8"},
    "four_heads_over_one_width_of_levels": {
        "num_head_channels": -1, "channel_mult": "1,1,1", "attention_resolutions": "16,8,4",
    },
}  # fmt: skip
CLASSIFIER_FLAGS = {
    "image_size": 16,
    "classifier_width": 32,
    "classifier_depth": 1,
    "classifier_channel_mult": "1,2",
    "classifier_attention_resolutions": "8",
}
CLASSIFIER_CASES = {
    "residual_resampling": {},
    "convolutional_resampling": {"classifier_resblock_updown": False},
    "added_timestep": {"classifier_use_scale_shift_norm": False},
    "deeper": {"classifier_depth": 3, "classifier_channel_mult": "1,2,4", "classifier_attention_resolutions": "4"},
    "half_width_first_level": {"classifier_width": 64, "classifier_channel_mult": "0.5,1"},
}


def make_inputs(size=16, seed=1):
    sample = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(seed))
    return sample, torch.tensor([3, 871]), torch.tensor([1, NUM_CLASSES - 1])


def make_unet_reference(**changes):
    flags = MINI_FLAGS | changes
    reference = AdmReference(flags)
    return flags, reference, reference.unet(*make_inputs())


@pytest.fixture(scope="module")
def expected():
    return load_file(ADM_MINI / "expected.safetensors")


@pytest.fixture(scope="module")
def flags():
    return json.loads((ADM_MINI / "flags.json").read_text())


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """The two checkpoints as guided-diffusion writes them."""
    folder = tmp_path_factory.mktemp("adm_mini")
    for name in ("diffusion", "classifier"):
        torch.save(load_file(ADM_MINI / f"{name}.safetensors"), folder / f"{name}.pt")
    return folder / "diffusion.pt", folder / "classifier.pt"


@pytest.fixture(scope="module")
def pipeline_dir(checkpoints, flags, tmp_path_factory):
    return convert_guided_diffusion(*checkpoints, flags=flags, output_dir=tmp_path_factory.mktemp("out") / "adm_mini")


@torch.no_grad()
def test_unet_matches_guided_diffusion(checkpoints, flags, expected):
    unet = convert_unet_checkpoint(read_checkpoint(checkpoints[0], "unet_checkpoint"), flags["model_flags"])
    noise_pred = unet(expected["sample"], expected["timesteps"], expected["class_labels"]).sample
    torch.testing.assert_close(noise_pred, expected["model_output"], rtol=0, atol=1e-4)


def test_classifier_and_its_gradient_match_guided_diffusion(checkpoints, flags, expected):
    state_dict = read_checkpoint(checkpoints[1], "classifier_checkpoint")
    classifier = convert_classifier_checkpoint(state_dict, flags["classifier_flags"])
    sample = expected["sample"].clone().requires_grad_(True)
    logits = classifier(sample, expected["timesteps"]).logits
    log_prob = logits.log_softmax(dim=-1).gather(1, expected["class_labels"][:, None]).sum()
    torch.testing.assert_close(logits, expected["classifier_logits"], rtol=0, atol=1e-4)
    gradient = torch.autograd.grad(log_prob, sample)[0]
    # The gradient is itself of size 4e-3, so an absolute 1e-4 alone would let much pass.
    torch.testing.assert_close(gradient, expected["classifier_log_prob_grad"], rtol=0, atol=1e-6)


def test_guided_ddim_sample_matches_guided_diffusion(pipeline_dir, expected):
    pipe = DiffSketchingPipeline.from_pretrained(pipeline_dir)
    pipe.set_progress_bar_config(disable=True)
    images = pipe(
        class_labels=expected["class_labels"].tolist(),
        num_images_per_sketch=1,
        latents=expected["sample"],
        output_type="latent",
    ).images
    torch.testing.assert_close(images, expected["ddim5_guided_scale2"], rtol=0, atol=1e-3)


def test_pipeline_folder(pipeline_dir, flags):
    pipe = DiffSketchingPipeline.from_pretrained(pipeline_dir)
    assert pipe.recommended == {"classifier_guidance_scale": 2.0, "num_inference_steps": 5}
    assert pipe.num_classes == 1000 and pipe.null_class is None and not pipe.id2label
    assert {parameter.dtype for parameter in pipe.unet.parameters()} == {torch.float32}
    pipe.scheduler.set_timesteps(5)
    assert pipe.scheduler.timesteps.tolist() == flags["ddim_timesteps"][::-1]
    index = json.loads((pipeline_dir / "model_index.json").read_text())
    assert index["classifier"] == ["diffsketching_pipeline", "NoisyImageClassifier"]
    assert index["scheduler"] == ["diffusers", "DDIMScheduler"]


@pytest.mark.parametrize("case", UNET_CASES)
@torch.no_grad()
def test_every_kind_of_unet_computes_the_same(case):
    flags, reference, noise_pred = make_unet_reference(**UNET_CASES[case])
    unet = convert_unet_checkpoint(reference.state_dict, flags)
    sample, timesteps, class_labels = make_inputs()
    class_labels = class_labels if flags["class_cond"] else None
    torch.testing.assert_close(unet(sample, timesteps, class_labels).sample, noise_pred, rtol=0, atol=1e-4)
    assert unet.config.num_class_embeds == (NUM_CLASSES if flags["class_cond"] else None)


@pytest.mark.parametrize("case", CLASSIFIER_CASES)
@torch.no_grad()
def test_every_kind_of_classifier_computes_the_same(case):
    flags = CLASSIFIER_FLAGS | CLASSIFIER_CASES[case]
    reference = AdmReference(flags, prefix="classifier_")
    sample, timesteps, _ = make_inputs()
    logits = reference.classifier(sample, timesteps)
    for given in (flags, {name.removeprefix("classifier_"): value for name, value in flags.items()}):
        classifier = convert_classifier_checkpoint(reference.state_dict, given)
        torch.testing.assert_close(classifier(sample, timesteps).logits, logits, rtol=0, atol=1e-4)
    assert classifier.config.num_classes == NUM_CLASSES


@torch.no_grad()
def test_qkv_order_is_not_interchangeable():
    flags, reference, noise_pred = make_unet_reference()
    unet = convert_unet_checkpoint(reference.state_dict, flags | {"use_new_attention_order": True})
    assert (unet(*make_inputs()).sample - noise_pred).abs().max() > 1e-2


def test_flags_as_command_line_strings():
    flags, reference, _ = make_unet_reference()
    strings = {name: str(value) for name, value in flags.items()}
    unet = convert_unet_checkpoint(reference.state_dict, strings)
    assert unet.config == convert_unet_checkpoint(reference.state_dict, flags).config


def test_converted_weights_do_not_share_memory_with_the_file():
    flags, reference, _ = make_unet_reference(use_new_attention_order=True)
    before = {name: tensor.clone() for name, tensor in reference.state_dict.items()}
    unet = convert_unet_checkpoint(reference.state_dict, flags)
    with torch.no_grad():
        for parameter in unet.parameters():
            parameter.add_(1.0)
    assert all(torch.equal(reference.state_dict[name], before[name]) for name in before)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"num_channels": 64}, "time_embed.0.weight.*`num_channels`"),
        ({"class_cond": False}, "also has `label_emb.weight`.*`class_cond`"),
        ({"learn_sigma": False}, r"`out.2.weight` of shape \(6, 32, 3, 3\).*`learn_sigma`"),
        ({"attention_resolutions": "16,8"}, "has no `input_blocks.1.1.*`attention_resolutions`"),
        ({"attention_resolutions": "32"}, "also has `input_blocks.3.1.*`attention_resolutions`"),
        ({"resblock_updown": False}, "`resblock_updown`"),
        ({"use_scale_shift_norm": False}, "emb_layers.*`use_scale_shift_norm`"),
        ({"num_res_blocks": 2}, "`num_res_blocks` and `channel_mult`"),
        ({"channel_mult": "1,3"}, "`channel_mult`"),
    ],
)
def test_flags_that_do_not_fit_the_file(changes, message):
    flags, reference, _ = make_unet_reference()
    with pytest.raises(ValueError, match=f"do not fit the UNet checkpoint.*{message}"):
        convert_unet_checkpoint(reference.state_dict, flags | changes)


def test_unet_and_classifier_files_mixed_up(checkpoints, flags, tmp_path):
    with pytest.raises(ValueError, match="UNet.*has no `output_blocks"):
        convert_mini(checkpoints[::-1], tmp_path, flags)
    with pytest.raises(ValueError, match="classifier.*also has `output_blocks"):
        convert_mini(checkpoints[:1] * 2, tmp_path, flags)


def test_one_missing_or_additional_tensor_is_refused():
    flags, reference, _ = make_unet_reference()
    for changed in (
        {name: tensor for name, tensor in reference.state_dict.items() if name != "middle_block.1.norm.bias"},
        reference.state_dict | {"middle_block.3.weight": torch.zeros(1)},
    ):
        with pytest.raises(ValueError, match="do not fit.*`middle_block"):
            convert_unet_checkpoint(changed, flags)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"num_head_channels": -1, "num_heads": 4, "attention_resolutions": "16,8"}, "heads of 8, 16 channels"),
        (
            {"num_head_channels": -1, "num_heads": 4, "num_heads_upsample": 2},
            "`UNet2DModel` has one head width.*heads of 16, 32 channels",
        ),
        ({"num_head_channels": 48}, "whole heads"),
        ({"channel_mult": "2,2"}, "sinusoidal embedding of 32.* 64"),
        ({"channel_mult": ""}, "must name `channel_mult`"),
        ({"channel_mult": "1,x"}, "`channel_mult`.*'1,x'"),
        ({"channel_mult": "1,1.5"}, "multiple of 32"),
        ({"image_size": 15}, "`image_size` of 15"),
        ({"attention_resolutions": "0"}, "`attention_resolutions`.*'0'"),
        ({"num_channels": "many"}, "`num_channels`.* 'many'"),
        ({"num_res_blocks": 0}, "0 residual blocks"),
        ({"class_cond": "maybe"}, "`class_cond`.*'maybe'"),
        ({"dropout": "high"}, "`dropout`.*'high'"),
        ({"num_chanels": 32}, "`num_chanels`.*did you mean `num_channels`"),
        ({"large_size": 256}, "the flag `large_size`"),
    ],
)
def test_flags_that_cannot_be_expressed(changes, message):
    flags, reference, _ = make_unet_reference()
    with pytest.raises(ValueError, match=message):
        convert_unet_checkpoint(reference.state_dict, flags | changes)


def test_other_pooling_is_refused():
    with pytest.raises(ValueError, match="`classifier_pool` is 'spatial'"):
        convert_classifier_checkpoint({}, CLASSIFIER_FLAGS | {"classifier_pool": "spatial"})


def test_classifier_of_another_image_size_is_refused():
    reference = AdmReference(CLASSIFIER_FLAGS, prefix="classifier_")
    reference.classifier(*make_inputs()[:2])
    flags = CLASSIFIER_FLAGS | {"image_size": 32, "classifier_attention_resolutions": "16"}
    with pytest.raises(ValueError, match=r"do not fit the classifier.*positional_embedding.*\(64, 65\).*`image_size`"):
        convert_classifier_checkpoint(reference.state_dict, flags)


def convert_mini(checkpoints, tmp_path, flags=None, classifier=True, **kwargs):
    unet_checkpoint, classifier_checkpoint = checkpoints
    return convert_guided_diffusion(
        unet_checkpoint,
        classifier_checkpoint if classifier else None,
        flags=flags,
        output_dir=tmp_path / "out",
        **kwargs,
    )


def with_model_flags(flags, **changes):
    return flags | {"model_flags": flags["model_flags"] | changes}


def load_scheduler(folder):
    return DDIMScheduler.from_pretrained(folder, subfolder="scheduler")


def test_a_sketch_channel_can_be_added_on_the_way(checkpoints, flags, tmp_path):
    plain = convert_mini(checkpoints, tmp_path, flags, classifier=False)
    expanded = convert_guided_diffusion(
        checkpoints[0], flags=flags, output_dir=tmp_path / "sketch", sketch_channel=True
    )
    plain, expanded = (DiffSketchingPipeline.from_pretrained(folder).unet for folder in (plain, expanded))
    assert (plain.config.in_channels, expanded.config.in_channels) == (3, 4)
    assert torch.equal(expanded.conv_in.weight[:, :3], plain.conv_in.weight)
    assert not expanded.conv_in.weight[:, 3].any()


def test_networks_of_a_preset_are_the_published_ones():
    unet, classifier = networks_of_preset("256")
    # The 553.8 M and 54.1 M parameters of the published checkpoints' sizes.
    assert sum(p.numel() for p in unet.parameters()) == 553_838_086
    assert sum(p.numel() for p in classifier.parameters()) == 54_096_360
    assert {p.device.type for p in [*unet.parameters(), *classifier.parameters()]} == {"meta"}
    assert networks_of_preset("256-uncond")[0].config.num_class_embeds is None
    with pytest.raises(ValueError, match="`preset` must be one of"):
        networks_of_preset("1024")


def test_linear_schedule_is_stretched_to_any_number_of_steps(checkpoints, flags, tmp_path):
    flags = with_model_flags(flags, diffusion_steps=250, predict_xstart=True) | {"clip_denoised": False}
    flags.pop("timestep_respacing")
    scheduler = load_scheduler(convert_mini(checkpoints, tmp_path, flags))
    betas = np.linspace(4 * 1e-4, 4 * 2e-2, 250)
    np.testing.assert_allclose(scheduler.alphas_cumprod.numpy(), np.cumprod(1 - betas), rtol=1e-4)
    config = scheduler.config
    assert (config.timestep_spacing, config.steps_offset, config.set_alpha_to_one) == ("leading", 0, True)
    assert config.prediction_type == "sample" and not config.clip_sample


def test_cosine_schedule(checkpoints, flags, tmp_path):
    folder = convert_mini(checkpoints, tmp_path, with_model_flags(flags, noise_schedule="cosine"))
    time = np.arange(1001) / 1000
    alphas = np.cos((time + 0.008) / 1.008 * np.pi / 2) ** 2
    betas = np.minimum(1 - alphas[1:] / alphas[:-1], 0.999)
    scheduler = load_scheduler(folder)
    np.testing.assert_allclose(scheduler.alphas_cumprod[:-1].numpy(), np.cumprod(1 - betas)[:-1], rtol=1e-3)
    assert scheduler.config.prediction_type == "epsilon" and scheduler.config.clip_sample


@pytest.mark.parametrize("learn_sigma, variance_type", [(True, "learned_range"), (False, "fixed_large")])
def test_variance_survives_a_change_of_scheduler(learn_sigma, variance_type, tmp_path):
    flags, reference, _ = make_unet_reference(learn_sigma=learn_sigma)
    save_file(reference.state_dict, tmp_path / "unet.safetensors")
    folder = convert_guided_diffusion(tmp_path / "unet.safetensors", flags=flags, output_dir=tmp_path / "out")
    scheduler = DDPMScheduler.from_config(load_scheduler(folder).config)
    assert scheduler.config.variance_type == variance_type


def test_flat_flags_and_a_flags_file_mean_the_same_as_sections(tmp_path):
    flags, reference, _ = make_unet_reference()
    classifier = AdmReference(CLASSIFIER_FLAGS, prefix="classifier_")
    classifier.classifier(*make_inputs()[:2])
    torch.save(reference.state_dict, tmp_path / "unet.pt")
    torch.save(classifier.state_dict, tmp_path / "classifier.pt")
    sections = {"model_flags": flags, "classifier_flags": CLASSIFIER_FLAGS, "classifier_scale": 3.0}
    flat = flags | CLASSIFIER_FLAGS | {"classifier_scale": "3.0", "use_fp16": True, "num_samples": 4, "use_ddim": True}
    (tmp_path / "flags.json").write_text(json.dumps(flat))
    configs = []
    for name, given in (("sections", sections), ("flat", flat), ("file", tmp_path / "flags.json")):
        folder = convert_guided_diffusion(
            tmp_path / "unet.pt", tmp_path / "classifier.pt", flags=given, output_dir=tmp_path / name
        )
        configs.append([path.read_text() for path in sorted(folder.rglob("*.json"))])
        assert json.loads((folder / "model_index.json").read_text())["recommended"] == {
            "classifier_guidance_scale": 3.0
        }
    assert configs[0] == configs[1] == configs[2]


@pytest.mark.parametrize(
    "respacing, num_inference_steps",
    [
        ("", None),
        ("ddim50", 50),
        (1000, 1000),
        ("ddim6", None),
        ("250", None),
        ("10,20", None),
        ("x", None),
    ],
)
def test_only_exact_respacing_is_recommended(checkpoints, flags, tmp_path, respacing, num_inference_steps):
    flags = with_model_flags(flags, timestep_respacing=respacing) | {"classifier_scale": 1.0}
    flags.pop("timestep_respacing")
    folder = convert_mini(checkpoints, tmp_path, flags, classifier=False)
    recommended = json.loads((folder / "model_index.json").read_text())["recommended"]
    assert recommended.get("num_inference_steps") == num_inference_steps
    assert "classifier_guidance_scale" not in recommended


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"noise_schedule": "sqrt"}, "`noise_schedule`.* 'sqrt'"),
        ({"diffusion_steps": 20}, "`diffusion_steps`.* 20"),
        ({"diffusion_steps": 500, "rescale_timesteps": True}, "`rescale_timesteps` with `diffusion_steps` 500"),
        ({"image_size": 64}, "`image_size`.* 64 and 32"),
        ({"num_channels": 64}, "do not fit the UNet checkpoint"),
    ],
)
def test_refusals_write_nothing(checkpoints, flags, tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        convert_mini(checkpoints, tmp_path, with_model_flags(flags, **changes))
    assert not list(tmp_path.iterdir())


def test_classifier_of_other_classes_or_noise_is_refused(checkpoints, flags, tmp_path):
    with pytest.raises(ValueError, match="`noise_schedule`.*linear.*cosine"):
        other = flags["classifier_flags"] | {"noise_schedule": "cosine"}
        convert_mini(checkpoints, tmp_path, flags | {"classifier_flags": other})
    state_dict = load_file(ADM_MINI / "classifier.safetensors")
    for name in ("out.2.c_proj.weight", "out.2.c_proj.bias"):
        state_dict[name] = state_dict[name][:10].clone()
    save_file(state_dict, tmp_path / "ten.safetensors")
    with pytest.raises(ValueError, match=" 1000 .*`classifier_checkpoint` 10"):
        convert_mini((checkpoints[0], tmp_path / "ten.safetensors"), tmp_path, flags)
    assert [path.name for path in tmp_path.iterdir()] == ["ten.safetensors"]


def test_flags_and_preset_exclude_each_other(checkpoints, flags, tmp_path):
    for kwargs in ({}, {"flags": flags, "preset": "256"}):
        with pytest.raises(ValueError, match="`flags`.*`preset`"):
            convert_mini(checkpoints, tmp_path, **kwargs)
    with pytest.raises(ValueError, match="`preset`.* '1024'"):
        convert_mini(checkpoints, tmp_path, preset="1024")
    with pytest.raises(ValueError, match="`flags`.* list"):
        convert_mini(checkpoints, tmp_path, flags=[1])
    (tmp_path / "flags.json").write_text("{")
    for path in (tmp_path / "flags.json", tmp_path / "missing.json"):
        with pytest.raises(ValueError, match="`flags` .* cannot be read as a JSON file"):
            convert_mini(checkpoints, tmp_path, flags=path)


@pytest.mark.parametrize(
    "preset, message",
    [
        ("64", "do not fit the UNet checkpoint"),
        ("128", "cannot express attention heads of 128, 192, 256 channels"),
        ("512", "sinusoidal embedding of 256.* 128"),
    ],
)
def test_presets(checkpoints, tmp_path, preset, message):
    with pytest.raises(ValueError, match=message):
        convert_mini(checkpoints, tmp_path, preset=preset)
    assert set(PRESETS) == {"64", "128", "256", "512", "256-uncond"}


def test_unreadable_checkpoints(checkpoints, flags, tmp_path):
    (tmp_path / "garbage.pt").write_bytes(b"not a checkpoint")
    (tmp_path / "garbage.safetensors").write_bytes(b"not a checkpoint")
    (tmp_path / "truncated.pt").write_bytes(checkpoints[0].read_bytes()[:100_000])
    torch.save({"weights": Path("/")}, tmp_path / "code.pt")
    torch.save({"state_dict": {"a": torch.zeros(1)}}, tmp_path / "nested.pt")
    torch.save({}, tmp_path / "empty.pt")
    before = set(tmp_path.iterdir())
    for name, message in {
        "missing.pt": "must be a file but there is none",
        "garbage.pt": "cannot be read as a file of weights",
        "garbage.safetensors": "cannot be read as a file of weights",
        "truncated.pt": "cannot be read as a file of weights",
        "code.pt": "it is damaged or holds more than tensors",
        "nested.pt": "holds no state dict",
        "empty.pt": "holds no state dict",
    }.items():
        with pytest.raises(ValueError, match=f"`unet_checkpoint` .*{message}") as error:
            convert_mini((tmp_path / name, None), tmp_path, flags)
        assert len(str(error.value).splitlines()) == 1
    assert set(tmp_path.iterdir()) == before


def test_output_dir_must_be_free(checkpoints, flags, tmp_path):
    (tmp_path / "out").mkdir()
    assert convert_mini(checkpoints, tmp_path, flags, classifier=False) == tmp_path / "out"
    written = sorted(tmp_path.rglob("*"))
    with pytest.raises(ValueError, match="`output_dir` must not exist or be an empty folder"):
        convert_mini(checkpoints, tmp_path, flags, classifier=False)
    assert sorted(tmp_path.rglob("*")) == written
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    for path in (tmp_path / "out" / "model_index.json", tmp_path / "out" / "model_index.json" / "deeper"):
        with pytest.raises(ValueError, match="`output_dir`.*model_index.json"):
            convert_guided_diffusion(checkpoints[0], flags=flags, output_dir=path)


def test_staged_folder_appears_whole_or_not_at_all(tmp_path):
    with pytest.raises(RuntimeError), staged_folder(tmp_path / "a" / "b") as folder:
        (folder / "half").write_text("")
        raise RuntimeError
    assert list((tmp_path / "a").iterdir()) == []
    with staged_folder(tmp_path / "a" / "b") as folder:
        (folder / "whole").write_text("")
        assert not (tmp_path / "a" / "b").exists()
    assert [path.name for path in (tmp_path / "a").rglob("*")] == ["b", "whole"]
    assert (tmp_path / "a" / "b").stat().st_mode == (tmp_path / "a").stat().st_mode


@torch.no_grad()
def test_expanded_unet_ignores_the_sketch_until_it_is_trained(checkpoints, flags, expected):
    unet = convert_unet_checkpoint(read_checkpoint(checkpoints[0], "unet_checkpoint"), flags["model_flags"])
    expanded = expand_unet_for_sketch(unet)
    sample, timesteps, class_labels = expected["sample"], expected["timesteps"], expected["class_labels"]
    before = unet(sample, timesteps, class_labels).sample
    for sketch in (torch.zeros(2, 1, 32, 32), torch.ones(2, 1, 32, 32), make_inputs(32)[0][:, :1] * 100):
        after = expanded(torch.cat([sample, sketch], dim=1), timesteps, class_labels).sample
        torch.testing.assert_close(after, before, rtol=0, atol=1e-5)
    assert expanded.config.in_channels == 4 and unet.config.in_channels == 3
    assert not expanded.training and expand_unet_for_sketch(unet.train()).training
    expanded.conv_in.weight += 1.0
    assert not torch.equal(unet.conv_in.weight, expanded.conv_in.weight[:, :3])
    with pytest.raises(ValueError, match="`unet`.* 3.* 4"):
        expand_unet_for_sketch(expanded)


def test_a_unet_of_latents_is_expanded_by_the_folded_sketch():
    unet = UNet2DModel(
        sample_size=8, in_channels=4, out_channels=8, block_out_channels=(32, 32), layers_per_block=1,
        down_block_types=("DownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "UpBlock2D"),
    ).eval()  # fmt: skip
    sample = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    for abstraction, channels in ((False, 20), (True, 21)):
        expanded = expand_unet_for_sketch(unet, 4, sketch_abstraction=abstraction)
        assert expanded.config.in_channels == channels
        added = torch.ones(2, channels - 4, 8, 8)
        with torch.no_grad():
            after, before = expanded(torch.cat([sample, added], dim=1), 500).sample, unet(sample, 500).sample
        torch.testing.assert_close(after, before, rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match="`unet`.* `in_channels=21`"):
        expand_unet_for_sketch(expanded, 4)


def test_expanded_unet_learns_from_the_sketch(tmp_path):
    unet = UNet2DModel(
        sample_size=8, block_out_channels=(32, 32), layers_per_block=1,
        down_block_types=("DownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "UpBlock2D"),
    )  # fmt: skip
    expanded = expand_unet_for_sketch(unet)
    expanded(torch.randn(1, 4, 8, 8), 10).sample.square().sum().backward()
    assert expanded.conv_in.weight.grad[:, 3].abs().max() > 0
    expanded.save_pretrained(tmp_path)
    assert UNet2DModel.from_pretrained(tmp_path).config.in_channels == 4
