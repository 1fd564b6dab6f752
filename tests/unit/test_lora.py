# SPDX-License-Identifier: Apache-2.0
import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from testing_utils import SIZE, make_unet, randn

from diffsketching_pipeline import add_lora, fuse_lora, load_lora, save_lora, unload_lora
from diffsketching_pipeline.lora import LORA_WEIGHTS_NAME, has_lora


ARGUMENTS = randn(2, 4, SIZE, SIZE), 300, torch.tensor([0, 1])


def tiny_unet(**options):
    torch.manual_seed(0)
    return make_unet(**options).eval()


def output(unet):
    sample, *others = ARGUMENTS
    with torch.no_grad():
        return unet(sample.to(unet.dtype), *others).sample


def trained(unet):
    """Make the adapter as after training: no part of it is zero."""
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in unet.named_parameters():
            if ".lora_" in name:
                parameter.normal_(0, 0.1)
    return unet


def test_a_fresh_adapter_changes_nothing_and_is_all_that_learns():
    unet, plain = tiny_unet(), output(tiny_unet())
    assert add_lora(unet, 2) is unet and has_lora(unet) and torch.equal(output(unet), plain)
    learning = [name for name, parameter in unet.named_parameters() if parameter.requires_grad]
    assert learning and all(".lora_" in name for name in learning)
    unet(*ARGUMENTS).sample.sum().backward()
    assert all(p.grad is None for n, p in unet.named_parameters() if ".lora_" not in n)


@pytest.mark.parametrize("alpha", [None, 1.0])
def test_fused_weights_are_those_of_the_paper(alpha):
    plain, unet = tiny_unet(), trained(add_lora(tiny_unet(), 4, alpha))
    fused = fuse_lora(unet)
    assert not has_lora(fused) and fused.state_dict().keys() == plain.state_dict().keys()
    torch.testing.assert_close(output(fused), output(unet), atol=1e-5, rtol=1e-4)
    assert (output(fused) - output(plain)).abs().max() > 1e-2
    state = unet.state_dict()
    for name in ("mid_block.attentions.0.to_q", "mid_block.attentions.0.to_out.0"):
        down, up = (state[f"{name}.lora_{part}.default.weight"] for part in "AB")
        expected = plain.state_dict()[f"{name}.weight"] + (1.0 if alpha is None else alpha / 4) * up @ down
        torch.testing.assert_close(fused.state_dict()[f"{name}.weight"], expected)
    half = fuse_lora(unet, scale=0.5).state_dict()
    for name, value in plain.state_dict().items():
        torch.testing.assert_close(half[name], (value + fused.state_dict()[name]) / 2, atol=1e-6, rtol=1e-5)


def test_an_adapter_travels_alone(tmp_path):
    unet = trained(add_lora(tiny_unet(), 3, 6.0))
    save_lora(unet, tmp_path)
    assert all(".lora_" in name for name in load_file(tmp_path / LORA_WEIGHTS_NAME))
    loaded = tiny_unet()
    assert load_lora(loaded, tmp_path) is loaded
    torch.testing.assert_close(output(loaded), output(unet), atol=1e-6, rtol=1e-5)
    save_lora(loaded, tmp_path / "again")
    again = load_file(tmp_path / "again" / LORA_WEIGHTS_NAME)
    assert all(torch.equal(value, again[name]) for name, value in load_file(tmp_path / LORA_WEIGHTS_NAME).items())


def test_a_file_of_the_first_version_loads(tmp_path):
    """Names, settings and values as `save_lora` wrote them before it asked peft for them."""
    torch.manual_seed(0)
    names = ["mid_block.attentions.0.to_q", "mid_block.attentions.0.to_out.0"]
    state = {}
    for name in names:
        state[f"{name}.lora_A.weight"], state[f"{name}.lora_B.weight"] = torch.randn(2, 16), torch.randn(16, 2)
    save_file(state, tmp_path / LORA_WEIGHTS_NAME, metadata={"format": "pt"})
    (tmp_path / "lora_config.json").write_text(json.dumps({"rank": 2, "alpha": 3.0, "target_modules": names}))
    fused, plain = fuse_lora(load_lora(tiny_unet(), tmp_path)).state_dict(), tiny_unet().state_dict()
    for name in names:
        change = 1.5 * state[f"{name}.lora_B.weight"] @ state[f"{name}.lora_A.weight"]
        torch.testing.assert_close(fused[f"{name}.weight"], plain[f"{name}.weight"] + change)
    # And what is written now is read by the first version.
    save_lora(load_lora(tiny_unet(), tmp_path), tmp_path / "again")
    assert (tmp_path / "again" / LORA_WEIGHTS_NAME).read_bytes() == (tmp_path / LORA_WEIGHTS_NAME).read_bytes()


def test_an_adapter_comes_off():
    plain, unet = tiny_unet(), trained(add_lora(tiny_unet(), 2))
    assert unload_lora(unet) is unet and not has_lora(unet)
    assert torch.equal(output(unet), output(plain)) and unet.state_dict().keys() == plain.state_dict().keys()
    assert all(parameter.requires_grad for parameter in unet.parameters())
    add_lora(unet, 1)
    assert torch.equal(output(unet), output(plain))


def test_half_precision(tmp_path):
    unet = trained(add_lora(tiny_unet().bfloat16(), 2))
    fused = fuse_lora(unet)
    assert fused.dtype == torch.bfloat16
    torch.testing.assert_close(output(fused), output(unet), atol=0.05, rtol=0.05)


def test_what_does_not_fit_is_refused(tmp_path):
    unet = tiny_unet()
    for rank in (0, 1.5, True):
        with pytest.raises(ValueError, match=f"`rank` has to be an integer of at least 1 but is {rank}"):
            add_lora(unet, rank)
    with pytest.raises(ValueError, match="names no layer of this UNet"):
        add_lora(unet, 2, target_modules=["to_nowhere"])
    for call in (lambda: fuse_lora(unet), lambda: save_lora(unet, tmp_path / "none")):
        with pytest.raises(ValueError, match="`unet` has no adapter"):
            call()
    assert not (tmp_path / "none").exists()
    add_lora(unet, 2)
    with pytest.raises(ValueError, match="`unet`.*already"):
        add_lora(unet, 2)
    save_lora(unet, tmp_path / "adapter")
    with pytest.raises(ValueError, match="`folder`.*nowhere.*pytorch_lora_weights.safetensors"):
        load_lora(tiny_unet(), tmp_path / "nowhere")
    other = tiny_unet(in_channels=3)
    other.down_blocks[0].resnets[0].conv1 = torch.nn.Conv2d(8, 12, 3)
    before = {name: value.clone() for name, value in other.state_dict().items()}
    with pytest.raises(
        ValueError, match="the adapter was made for another UNet: 1 of its .* do not fit, 'down_blocks.0"
    ):
        load_lora(other, tmp_path / "adapter")
    assert not has_lora(other) and other.state_dict().keys() == before.keys()
