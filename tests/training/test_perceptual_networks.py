# SPDX-License-Identifier: Apache-2.0
import os
import pickle

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from transformers import ResNetConfig, ResNetModel, ViTConfig, ViTModel

from diffsketching_pipeline.training.perceptual_networks import (
    SqueezeNetFeatures,
    load_perceptual_network,
    perceptual_distance,
    read_array_pickle,
)


def squeezenet_weights():
    rng = np.random.default_rng(0)
    shapes, channels = {"conv1": (3, 3, 3, 64)}, 64
    for number, (squeezed, expanded) in SqueezeNetFeatures.fires.items():
        shapes[f"fire{number}/squeeze1x1"] = (1, 1, channels, squeezed)
        shapes[f"fire{number}/expand1x1"] = (1, 1, squeezed, expanded)
        shapes[f"fire{number}/expand3x3"] = (3, 3, squeezed, expanded)
        channels = 2 * expanded
    return {
        name: [rng.normal(0, (2 / np.prod(s[:3])) ** 0.5, s).astype("f4"), rng.normal(0, 0.1, s[3]).astype("f4")]
        for name, s in shapes.items()
    }


def photos(seed=0, count=2):
    return torch.rand(count, 3, 48, 48, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def test_squeezenet_reads_keras_kernels_and_caffes_blue_green_red():
    weights = squeezenet_weights()
    maps = SqueezeNetFeatures(weights)(photos())
    assert [tuple(x.shape[1:]) for x in maps] == [
        (64, 24, 24),
        (128, 12, 12),
        (256, 6, 6),
        (384, 3, 3),
        (512, 3, 3),
    ]
    # The first convolution by hand at one place: patch rows and columns 9 to 11 around (10, 10).
    patch = ((photos()[0] + 1) * 127.5).flip(0)[:, 9:12, 9:12].numpy() - np.array([103.939, 116.779, 123.68])[
        :, None, None
    ]
    kernel, bias = weights["conv1"]
    expected = np.maximum(np.einsum("chw,hwco->o", patch, kernel) + bias, 0)
    np.testing.assert_allclose(maps[0][0, :, 5, 5].detach().numpy(), expected, rtol=1e-3, atol=1e-2)


def test_squeezenet_says_which_layer_does_not_fit():
    weights = squeezenet_weights()
    weights["fire4/expand3x3"][0] = weights["fire4/expand3x3"][0][:1]
    with pytest.raises(ValueError, match=r"fire4/expand3x3.*\(3, 3, 32, 128\)"):
        SqueezeNetFeatures(weights)


def test_a_pickle_of_arrays_is_read_and_any_other_is_not(tmp_path):
    weights = squeezenet_weights()
    (tmp_path / "arrays.pkl").write_bytes(pickle.dumps(weights))
    read = read_array_pickle(tmp_path / "arrays.pkl")
    np.testing.assert_array_equal(read["conv1"][0], weights["conv1"][0])

    class Attack:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "made"),)

    (tmp_path / "attack.pkl").write_bytes(pickle.dumps(Attack()))
    with pytest.raises(ValueError, match="attack.pkl.*mkdir"):
        read_array_pickle(tmp_path / "attack.pkl")
    assert not (tmp_path / "made").exists()
    (tmp_path / "cut.pkl").write_bytes(pickle.dumps(weights)[:-100])
    with pytest.raises(ValueError, match="cut.pkl"):
        read_array_pickle(tmp_path / "cut.pkl")


def test_networks_are_chosen_by_name(tmp_path):
    (tmp_path / "weights.pkl").write_bytes(pickle.dumps(squeezenet_weights()))
    assert load_perceptual_network("none") is None
    torch.manual_seed(0)
    config = ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic")
    ResNetModel(config).save_pretrained(tmp_path / "resnet")
    for name, count in ((f"squeezenet:{tmp_path / 'weights.pkl'}", 5), (str(tmp_path / "resnet"), 3)):
        loss = load_perceptual_network(name)
        assert len(loss.features(photos())) == count
        assert not any(parameter.requires_grad for parameter in loss.parameters())
    # ImageNet's normalization: a mid-gray of 0.485, 0.456, 0.406 is 0 to the network.
    gray = torch.tensor([0.485, 0.456, 0.406]).reshape(1, 3, 1, 1).expand(1, 3, 32, 32) * 2 - 1
    seen = loss.feature_maps(gray)[0]
    torch.testing.assert_close(seen, loss.feature_maps.model.embedder(torch.zeros(1, 3, 32, 32)), atol=1e-5, rtol=1e-5)

    small = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    ViTModel(ViTConfig(**small, image_size=64, patch_size=32)).save_pretrained(tmp_path / "vit")
    for name, message in (
        ("alex", "alex"),
        ("lpips:resnet", "lpips:resnet"),
        (str(tmp_path / "vit"), "feature maps"),
        (str(tmp_path), "no image model"),
    ):
        with pytest.raises(ValueError, match=f"perceptual_network.*{message}"):
            load_perceptual_network(name)


def test_distance_is_of_unit_vectors_and_teaches_its_first_argument(tmp_path):
    (tmp_path / "weights.pkl").write_bytes(pickle.dumps(squeezenet_weights()))
    loss = load_perceptual_network(f"squeezenet:{tmp_path / 'weights.pkl'}")
    ours, theirs = photos(0).requires_grad_(), photos(1).requires_grad_()
    distance = perceptual_distance(loss, ours, theirs)
    expected = sum(
        (F.normalize(a, dim=1) - F.normalize(b, dim=1)).square().sum(1).mean((1, 2))
        for a, b in zip(loss.feature_maps(ours), loss.feature_maps(theirs), strict=True)
    )
    torch.testing.assert_close(distance, expected, rtol=1e-4, atol=1e-5)
    distance.sum().backward()
    assert ours.grad.abs().sum() > 0 and theirs.grad is None
