# SPDX-License-Identifier: Apache-2.0
import re

import pytest
import torch
import torch.nn.functional as F
from diffusers import UNet2DModel

from diffsketching_pipeline import modeling_noisy_classifier
from diffsketching_pipeline.modeling_noisy_classifier import AttentionPool2D, NoisyImageClassifier


def make_classifier(**kwargs):
    torch.manual_seed(0)
    config = {
        "sample_size": 16,
        "num_classes": 5,
        "down_block_types": ("ResnetDownsampleBlock2D", "AttnDownBlock2D"),
        "block_out_channels": (16, 32),
        "layers_per_block": 1,
        "attention_head_dim": 16,
        "norm_num_groups": 8,
    }
    return NoisyImageClassifier(**(config | kwargs))


def make_sample(batch_size=2, size=16):
    return torch.randn(batch_size, 3, size, size, generator=torch.Generator().manual_seed(1))


def log_prob_gradient(classifier, sample, timestep=100):
    sample = sample.clone().requires_grad_(True)
    log_prob = classifier(sample, timestep).logits.log_softmax(dim=-1)[:, 1].sum()
    return torch.autograd.grad(log_prob, sample)[0]


@torch.no_grad()
def test_output_forms():
    classifier, sample = make_classifier().eval(), make_sample()
    logits = classifier(sample, 100).logits
    assert logits.shape == (2, 5)
    assert torch.equal(classifier(sample, 100, return_dict=False)[0], logits)
    for timestep in (torch.tensor(100), torch.tensor([100]), torch.tensor([100, 100]), 100.0):
        torch.testing.assert_close(classifier(sample, timestep).logits, logits)
    mixed = classifier(sample, torch.tensor([100, 900])).logits
    torch.testing.assert_close(mixed[0], logits[0])
    assert (mixed[1] - logits[1]).abs().max() > 1e-3


@pytest.mark.parametrize(
    "config",
    [
        {"downsample_type": "conv", "down_block_types": ("AttnDownBlock2D", "DownBlock2D")},
        {"resnet_time_scale_shift": "default", "attention_head_dim": None},
        {"time_proj_dim": 64, "block_out_channels": (16, 16, 32), "down_block_types": ("DownBlock2D",) * 3},
    ],
)
def test_save_and_load(config, tmp_path):
    classifier, sample = make_classifier(**config).eval(), make_sample()
    classifier.save_pretrained(tmp_path)
    assert (tmp_path / "diffusion_pytorch_model.safetensors").is_file()
    loaded = NoisyImageClassifier.from_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.equal(loaded(sample, 7).logits, classifier(sample, 7).logits)


def test_gradient_is_that_of_finite_differences():
    classifier, sample = make_classifier().eval().double(), make_sample(1).double()
    gradient = log_prob_gradient(classifier, sample)
    direction = torch.randn(sample.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    step = 1e-5
    with torch.no_grad():
        ahead, behind = (
            classifier(sample + sign * step * direction, 100).logits.log_softmax(dim=-1)[0, 1] for sign in (1, -1)
        )
    slope = ((ahead - behind) / (2 * step)).item()
    assert (gradient * direction).sum().item() == pytest.approx(slope, rel=1e-5)


def test_gradient_checkpointing_changes_nothing():
    classifier, sample = make_classifier().eval(), make_sample()
    before = log_prob_gradient(classifier, sample)
    calls = []
    handle = classifier.down_blocks[0].resnets[0].register_forward_pre_hook(lambda *args: calls.append(1))
    classifier.enable_gradient_checkpointing()
    torch.testing.assert_close(log_prob_gradient(classifier, sample), before, rtol=0, atol=1e-6)
    handle.remove()
    assert len(calls) == 2, "the block was not computed again"


@torch.no_grad()
def test_attention_pooling_is_torch_multi_head_attention_read_at_the_mean():
    torch.manual_seed(0)
    pool = AttentionPool2D(spatial_size=4, channels=32, head_dim=8, num_classes=5)
    reference = torch.nn.MultiheadAttention(32, num_heads=4, batch_first=True)
    projections = (pool.to_q, pool.to_k, pool.to_v)
    reference.in_proj_weight.copy_(torch.cat([projection.weight for projection in projections]))
    reference.in_proj_bias.copy_(torch.cat([projection.bias for projection in projections]))
    reference.out_proj.weight.copy_(torch.eye(32))
    reference.out_proj.bias.zero_()

    features = torch.randn(2, 32, 4, 4)
    tokens = torch.cat([features.mean(dim=(2, 3))[:, None], features.reshape(2, 32, 16).mT], dim=1)
    tokens = tokens + pool.positional_embedding
    attended, _ = reference(tokens, tokens, tokens)
    torch.testing.assert_close(pool(features), pool.to_out(attended[:, 0]), rtol=0, atol=1e-5)


def test_half_precision():
    classifier, sample = make_classifier().eval(), make_sample()
    with torch.no_grad():
        exact = classifier(sample, 100).logits
        rounded = classifier.to(torch.bfloat16)(sample.to(torch.bfloat16), 100).logits
    assert rounded.dtype == torch.bfloat16
    torch.testing.assert_close(rounded.float(), exact, rtol=0, atol=0.05)


@pytest.mark.slow
def test_learns_to_tell_noisy_images_apart():
    classifier = make_classifier(num_classes=2)
    optimizer = torch.optim.AdamW(classifier.parameters(), lr=1e-3)
    labels = torch.arange(16) % 2
    generator = torch.Generator().manual_seed(0)
    for _ in range(25):
        sample = torch.randn(16, 3, 16, 16, generator=generator)
        # Class 1 is a bright left half under the noise.
        sample[1::2, :, :, :8] += 1.0
        loss = F.cross_entropy(classifier(sample, torch.randint(0, 1000, (16,), generator=generator)).logits, labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.2


@pytest.mark.parametrize(
    "config, message",
    [
        ({"block_out_channels": (16, 32, 64)}, "`block_out_channels`.*`down_block_types`"),
        ({"down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D")}, "has 'CrossAttnDownBlock2D'"),
        ({"sample_size": 17}, "`sample_size`.* 17"),
        ({"attention_head_dim": 24}, "`attention_head_dim`.* 24"),
    ],
)
def test_config_errors(config, message):
    with pytest.raises(ValueError, match=message):
        make_classifier(**config)


@pytest.mark.parametrize("shape", [(2, 4, 16, 16), (2, 3, 8, 16), (3, 16, 16)])
def test_wrong_shapes_are_refused(shape):
    with pytest.raises(ValueError, match=rf"`sample`.* 3, 16, 16\].*{re.escape(str(shape))}"):
        make_classifier()(torch.zeros(shape), 0)


def test_module_offers_the_name_by_which_diffusers_finds_component_classes():
    assert hasattr(modeling_noisy_classifier, "ModelMixin")


def make_unet(**kwargs):
    torch.manual_seed(3)
    config = {
        "sample_size": 16,
        "in_channels": 4,
        "num_class_embeds": 6,
        "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
        "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
        "block_out_channels": (16, 32),
        "layers_per_block": 1,
        "attention_head_dim": 16,
        "norm_num_groups": 8,
        "resnet_time_scale_shift": "scale_shift",
    }
    return UNet2DModel(**(config | kwargs)).eval()


@torch.no_grad()
@pytest.mark.parametrize(
    "config, class_label",
    [
        ({}, 5),
        ({"in_channels": 3, "num_class_embeds": None, "resnet_time_scale_shift": "default"}, None),
        ({"attn_norm_num_groups": 8}, 5),
        ({"freq_shift": 1, "flip_sin_to_cos": False, "attention_head_dim": None, "norm_eps": 1e-3}, 0),
        ({"time_embedding_dim": 24, "downsample_type": "resnet", "act_fn": "relu"}, 2),
    ],
    ids=["sketch", "photo", "middle", "embedding", "blocks"],
)
def test_from_unet_reads_noisy_images_as_the_unet_does_without_a_sketch(config, class_label):
    unet = make_unet(**config)
    classifier = NoisyImageClassifier.from_unet(unet, 3, class_label=class_label).eval()
    before_middle, after_middle = [], []
    for model in (unet, classifier):
        model.mid_block.register_forward_pre_hook(lambda module, inputs: before_middle.append(inputs[:2]))
        model.mid_block.register_forward_hook(lambda module, inputs, output: after_middle.append(output))
    sample, timestep = make_sample(), torch.tensor([7, 700])
    no_sketch = torch.zeros(2, unet.config.in_channels - 3, 16, 16)
    labels = None if class_label is None else torch.full((2,), class_label)
    unet(torch.cat([sample, no_sketch], dim=1), timestep, class_labels=labels)
    logits = classifier(sample, timestep).logits
    assert logits.shape == (2, 3)
    for ours, theirs in zip(before_middle[1], before_middle[0], strict=True):
        torch.testing.assert_close(ours, theirs)
    if unet.mid_block.attentions[0].group_norm is not None:
        torch.testing.assert_close(after_middle[1], after_middle[0])
    for name, value in unet.mid_block.state_dict().items():
        assert torch.equal(value, classifier.mid_block.state_dict()[name])


def test_from_unet_takes_weights_of_half_precision_and_a_dropout():
    classifier = NoisyImageClassifier.from_unet(make_unet().half(), 3, class_label=5, dropout=0.5)
    assert classifier.dtype == torch.float32 and classifier.training
    assert classifier.down_blocks[0].resnets[0].dropout.p == 0.5


@pytest.mark.parametrize(
    "config, class_label, message",
    [
        ({}, None, r"`class_label`.* None"),
        ({}, 6, r"`class_label`.* 6"),
        ({"num_class_embeds": None}, 1, "`class_label`.*`unet`.* 1"),
        ({"time_embedding_type": "fourier"}, 5, "time_embedding_type 'positional' but has 'fourier'"),
        ({"add_attention": False}, 5, "add_attention True but has False"),
        ({"attn_norm_num_groups": 4}, 5, "attn_norm_num_groups None or 8 but has 4"),
        ({"mid_block_type": None}, 5, "mid_block_type 'UNetMidBlock2D' but has None"),
        ({"sample_size": (16, 32)}, 5, "one sample_size for both sides"),
        ({"down_block_types": ("SkipDownBlock2D", "DownBlock2D")}, 5, "must be among .* but has 'SkipDownBlock2D'"),
    ],
)
def test_from_unet_refuses_what_a_classifier_cannot_be(config, class_label, message):
    with pytest.raises(ValueError, match=message):
        NoisyImageClassifier.from_unet(make_unet(**config), 3, class_label=class_label)
