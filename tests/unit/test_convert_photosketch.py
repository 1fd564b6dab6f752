# SPDX-License-Identifier: Apache-2.0

import pytest
import torch
import torch.nn as nn
from safetensors.torch import load_file, save_file
from testing_utils import FIXTURES

from diffsketching_pipeline.converters.photosketch import convert_photosketch, convert_photosketch_checkpoint
from diffsketching_pipeline.modeling_photo_sketcher import PhotoSketcher


PHOTOSKETCH_MINI = FIXTURES / "photosketch_mini"


class Residual(nn.Module):
    def __init__(self, channels, dropout, norm, bias):
        super().__init__()
        layers = [nn.ReflectionPad2d(1), nn.Conv2d(channels, channels, 3, bias=bias), norm(channels), nn.ReLU()]
        if dropout is not None:
            layers.append(nn.Dropout(dropout))
        layers += [nn.ReflectionPad2d(1), nn.Conv2d(channels, channels, 3, bias=bias), norm(channels)]
        self.conv_block = nn.Sequential(*layers)

    def forward(self, x):
        return x + self.conv_block(x)


class ResnetGeneratorReference(nn.Module):
    """The image translation generator, with layers where Photo-Sketching's files number them; random weights."""

    def __init__(self, ngf=8, n_blocks=2, dropout=0.0, in_channels=3, norm=nn.BatchNorm2d):
        super().__init__()
        torch.manual_seed(0)
        bias = norm is nn.InstanceNorm2d
        layers = [nn.ReflectionPad2d(3), nn.Conv2d(in_channels, ngf, 7, bias=bias), norm(ngf), nn.ReLU()]
        for width in (2 * ngf, 4 * ngf):
            layers += [nn.Conv2d(width // 2, width, 3, stride=2, padding=1, bias=bias), norm(width), nn.ReLU()]
        layers += [Residual(4 * ngf, dropout, norm, bias) for _ in range(n_blocks)]
        for width in (2 * ngf, ngf):
            up = nn.ConvTranspose2d(2 * width, width, 3, stride=2, padding=1, output_padding=1, bias=bias)
            layers += [up, norm(width), nn.ReLU()]
        layers += [nn.ReflectionPad2d(3), nn.Conv2d(ngf, 1, 7), nn.Tanh()]
        self.model = nn.Sequential(*layers)
        for module in self.modules():
            if isinstance(module, nn.BatchNorm2d):
                nn.init.normal_(module.weight, 1.0, 0.2)
                nn.init.normal_(module.bias, 0.0, 0.2)
                nn.init.normal_(module.running_mean, 0.0, 0.2)
                nn.init.uniform_(module.running_var, 0.5, 1.5)

    def forward(self, x):
        return self.model(x)


@pytest.fixture(scope="module")
def expected():
    return load_file(PHOTOSKETCH_MINI / "expected.safetensors")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """The checkpoint as Photo-Sketching writes it."""
    path = tmp_path_factory.mktemp("photosketch") / "latest_net_G.pth"
    torch.save(load_file(PHOTOSKETCH_MINI / "latest_net_G.safetensors"), path)
    return path


# In double precision, so that what is left is the rounding of the reference, which was computed in single precision: statistics
# of the whole set let it grow through random weights, on some processors beyond 1e-4 in single precision.
@pytest.mark.parametrize("statistics, tolerance", [("per_sample", 1e-5), ("running", 1.5e-4)])
@pytest.mark.parametrize("train", [False, True])
@torch.no_grad()
def test_matches_photosketch(checkpoint, expected, statistics, tolerance, train, tmp_path):
    folder = convert_photosketch(checkpoint, tmp_path / "sketcher", statistics=statistics)
    sketcher = PhotoSketcher.from_pretrained(folder).train(train).double()
    sketch = sketcher(expected["image"].double())
    reference = expected[f"sketch_{statistics}_statistics"].double()
    torch.testing.assert_close(sketch, reference, rtol=0, atol=tolerance)
    assert (sketcher.config.ngf, sketcher.config.n_blocks, sketcher.config.statistics) == (8, 9, statistics)


def test_default_is_how_the_published_tool_runs(checkpoint, tmp_path):
    folder = convert_photosketch(checkpoint, tmp_path / "sketcher")
    assert PhotoSketcher.from_pretrained(folder).config.statistics == "per_sample"


@pytest.mark.parametrize(
    "shape",
    [
        {"ngf": 4, "n_blocks": 6},
        {"dropout": None},
        {"dropout": 0.5, "n_blocks": 3},
        {"ngf": 16, "n_blocks": 1, "dropout": None, "in_channels": 1},
        {"n_blocks": 0},
    ],
)
@torch.no_grad()
def test_every_shape_computes_the_same(shape):
    reference = ResnetGeneratorReference(**shape).eval()
    photos = torch.rand(2, shape.get("in_channels", 3), 32, 32, generator=torch.Generator().manual_seed(1)) * 2 - 1
    running = convert_photosketch_checkpoint(reference.state_dict(), "running")
    torch.testing.assert_close(running(photos), reference(photos), rtol=0, atol=1e-5)

    per_sample = convert_photosketch_checkpoint(reference.state_dict(), "per_sample")
    for module in reference.modules():
        module.train(not isinstance(module, nn.Dropout))
    alone = torch.cat([reference(photo[None]) for photo in photos])
    torch.testing.assert_close(per_sample(photos), alone, rtol=0, atol=1e-5)


@torch.no_grad()
def test_old_files_do_not_count_batches_and_half_precision_is_upcast(expected, tmp_path):
    state_dict = load_file(PHOTOSKETCH_MINI / "latest_net_G.safetensors")
    state_dict = {name: tensor.half() for name, tensor in state_dict.items() if "num_batches_tracked" not in name}
    save_file(state_dict, tmp_path / "latest_net_G.safetensors")
    folder = convert_photosketch(tmp_path / "latest_net_G.safetensors", tmp_path / "sketcher", "running")
    sketcher = PhotoSketcher.from_pretrained(folder)
    assert {parameter.dtype for parameter in sketcher.parameters()} == {torch.float32}
    difference = (sketcher(expected["image"]) - expected["sketch_running_statistics"]).abs()
    assert 0 < difference.mean() < 1e-2


def test_other_checkpoints_are_refused(tmp_path):
    batch = ResnetGeneratorReference().state_dict()
    missing = {name: tensor for name, tensor in batch.items() if name != "model.11.conv_block.2.running_var"}
    state_dicts = {
        "instance": (ResnetGeneratorReference(norm=nn.InstanceNorm2d).state_dict(), "instance normalization"),
        "unet": ({"model.model.0.weight": torch.zeros(4, 3, 4, 4)}, "not a Photo-Sketching generator of the kind"),
        "missing": (missing, "has no `model.11.conv_block.2.running_var`"),
        "additional": (batch | {"model.30.weight": torch.zeros(1)}, "also has `model.30.weight`"),
        "shape": (batch | {"model.4.weight": torch.zeros(8, 8, 3, 3)}, r"`model.4.weight` of shape \(8, 8, 3, 3\)"),
        "zero_padding": (
            {name.replace("conv_block.1.", "conv_block.0."): tensor for name, tensor in batch.items()},
            "not a Photo-Sketching generator, because it also has `model.10.conv_block.0.weight`",
        ),
    }
    for name, (state_dict, message) in state_dicts.items():
        torch.save(state_dict, tmp_path / f"{name}.pth")
        with pytest.raises(ValueError, match=f"`checkpoint` is .*{message}"):
            convert_photosketch(tmp_path / f"{name}.pth", tmp_path / "out")
    (tmp_path / "garbage.pth").write_bytes(b"not a checkpoint")
    with pytest.raises(ValueError, match="`checkpoint` .* cannot be read"):
        convert_photosketch(tmp_path / "garbage.pth", tmp_path / "out")
    assert not any(path.is_dir() for path in tmp_path.iterdir())


def test_wrong_arguments_write_nothing(checkpoint, tmp_path):
    with pytest.raises(ValueError, match="`statistics`.*'batch'"):
        convert_photosketch(checkpoint, tmp_path / "out", statistics="batch")
    assert not list(tmp_path.iterdir())
    (tmp_path / "notes.txt").write_text("")
    with pytest.raises(ValueError, match="`output_dir` must not exist"):
        convert_photosketch(checkpoint, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "change, message",
    [
        ({"model.1.weight": torch.zeros(1).expand(10**6, 10**4)}, "unfolds to .* bytes from"),
        ({"model.1.weight": torch.zeros(4, 3, 7, 7).to_sparse()}, "has `model.1.weight`, which is no plain tensor"),
        ({"model.1.weight": torch.zeros(4, 3, 7, 7, dtype=torch.complex64)}, "which is no plain tensor of numbers"),
        ({"x" * 10**5: torch.zeros(1)}, r"also has `x+ \.\.\. x+`"),
        ({f"t{i}": torch.zeros(1) for i in range(10_001)}, "10000 are the most"),
        ({f"model.{i}.conv_block.1.weight": torch.zeros(1) for i in range(10, 100)}, "because it has 90 blocks"),
    ],
)
def test_tensors_that_grow_or_are_none_are_refused_before_they_are_copied(change, message, tmp_path):
    state_dict = load_file(PHOTOSKETCH_MINI / "latest_net_G.safetensors")
    torch.save({**state_dict, **change}, tmp_path / "net.pt")
    with pytest.raises(ValueError, match=message) as refused:
        convert_photosketch(tmp_path / "net.pt", tmp_path / "out")
    assert len(str(refused.value)) < 1200
