# SPDX-License-Identifier: Apache-2.0
import json
import pickle

import pytest
import torch
import torch.nn.functional as F
import torchvision
from testing_utils import TRAINING
from torchmetrics.image.fid import NoTrainInceptionV3
from transformers import (
    BertConfig,
    BertModel,
    RegNetForImageClassification,
    ResNetConfig,
    ResNetForImageClassification,
    ViTConfig,
    ViTForImageClassification,
)

from diffsketching_pipeline.evaluation import extractors as evaluation_network
from diffsketching_pipeline.evaluation import image_sets
from diffsketching_pipeline.evaluation.extractors import INCEPTION_WEIGHTS, Evaluator


SIZE = 32


def random_pixels(count, size=SIZE):
    return torch.randint(0, 256, (count, 3, size, size), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def test_evaluator_gives_the_networks_own_probabilities_and_pooled_features(evaluator_dir):
    evaluator = Evaluator(str(evaluator_dir), SIZE)
    pixels = random_pixels(5)
    probabilities, features = evaluator(pixels, batch_size=2)
    model = RegNetForImageClassification.from_pretrained(evaluator_dir, dtype=torch.float32).eval()
    with torch.no_grad():
        inputs = pixels / 127.5 - 1
        torch.testing.assert_close(features, model.regnet(inputs).pooler_output.flatten(1))
        torch.testing.assert_close(probabilities, model(inputs).logits.softmax(-1))
    assert features.shape == (5, 16) and not torch.allclose(features[0], features[1])
    assert evaluator.conditions["extractor"].startswith("regnet-")
    assert evaluator.conditions["resize"] == f"squash4:3-bicubic-{SIZE}px"


def test_evaluator_follows_a_preprocessor(evaluator_dir, tmp_path):
    settings = {"size": {"shortest_edge": 40}, "image_mean": [0.1, 0.2, 0.3], "image_std": [0.5, 0.6, 0.7]}
    for file in evaluator_dir.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(settings))
    evaluator, plain = Evaluator(str(tmp_path)), Evaluator(str(evaluator_dir))
    assert evaluator.resolution == 40 and plain.resolution == 64
    image = torch.tensor([0.1, 0.2, 0.3]).view(1, 3, 1, 1).expand(1, 3, 40, 40)
    white = image + torch.tensor([0.5, 0.6, 0.7]).view(1, 3, 1, 1)
    features = [evaluator((value * 255).round().byte(), 1)[1] for value in (image, white)]
    expected = [plain(torch.full((1, 3, 40, 40), value, dtype=torch.uint8), 1)[1] for value in (128, 255)]
    # Mean and mean + std must come out as 0 and 1, up to rounding to 8 bits.
    for one, other in zip(features, expected, strict=True):
        torch.testing.assert_close(one, other, atol=0.02, rtol=0.02)


def test_a_size_of_its_own_is_an_evaluators_input_at_any_resolution(evaluator_dir, tmp_path):
    for file in evaluator_dir.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({"size": {"height": 48, "width": 48}}))
    assert [Evaluator(str(folder), 96).resolution for folder in (tmp_path, evaluator_dir)] == [48, 96]
    assert Evaluator(str(tmp_path), 96).conditions["resize"] == "squash4:3-bicubic-48px"


@pytest.mark.parametrize("folder", sorted((TRAINING / "evaluators").iterdir()))
def test_published_judges_name_their_side(folder):
    evaluator = Evaluator(str(folder), 256)
    assert folder.name == f"garments-{evaluator.resolution}" and len(evaluator.labels) == 15
    probabilities, features = evaluator(random_pixels(2, evaluator.resolution), 2)
    assert probabilities.shape == (2, 15) and features.isfinite().all()
    # No loss has used its family.
    assert evaluator.classifier.model.config.model_type in ("regnet", "mobilenet_v2")
    assert sum(file.stat().st_size for file in folder.iterdir()) < 8 * 2**20


def test_unusable_evaluators_are_errors(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="`evaluator` must be a folder with the weights"):
        Evaluator(str(tmp_path / "empty"))
    config = ResNetConfig(num_channels=1, embedding_size=8, hidden_sizes=[8], depths=[1], layer_type="basic")
    ResNetForImageClassification(config).save_pretrained(tmp_path / "gray")
    with pytest.raises(ValueError, match=r"`evaluator` must take photos, but .* takes 1 channel"):
        Evaluator(str(tmp_path / "gray"))


def test_cached_training_photos_are_those_read_afresh(photos_dir, evaluator_dir, tmp_path):
    evaluator = Evaluator(str(evaluator_dir), SIZE)
    files = image_sets.list_class_folders(photos_dir / "train", "train")
    fresh = evaluation_network.read_training_photos(files, evaluator, 16, None)
    assert torch.equal(
        evaluation_network.read_training_photos(files, evaluator, 16, str(tmp_path)).features, fresh.features
    )
    (cached,) = tmp_path.iterdir()
    stamp = cached.stat().st_mtime_ns
    again = evaluation_network.read_training_photos(files, evaluator, 16, str(tmp_path))
    assert cached.stat().st_mtime_ns == stamp
    for name in ("pixels", "features", "probabilities"):
        assert torch.equal(getattr(again, name), getattr(fresh, name))
    assert again.files == fresh.files and again.labels == fresh.labels
    evaluation_network.read_training_photos(files[1:], evaluator, 16, str(tmp_path))
    assert len(list(tmp_path.iterdir())) == 2


# -- features of another network --


@pytest.fixture
def hub_checkpoints(tmp_path, monkeypatch):
    """The empty folder where weights of the torch hub are looked for."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    folder = tmp_path / "torch" / "hub" / "checkpoints"
    folder.mkdir(parents=True)
    return folder


@pytest.mark.slow
def test_inception_gives_the_features_of_fid_and_leaves_classes_to_the_evaluator(evaluator_dir, hub_checkpoints):
    torch.manual_seed(0)
    # Of the same names and shapes as TensorFlow's, converted.
    network = torchvision.models.inception_v3(num_classes=1008, aux_logits=False, init_weights=False)
    torch.save(network.state_dict(), hub_checkpoints / INCEPTION_WEIGHTS)
    evaluator, plain = (Evaluator(str(evaluator_dir), SIZE, extractor=name) for name in ("inception", "evaluator"))
    pixels = random_pixels(2)
    probabilities, features = evaluator(pixels, batch_size=1)
    weights = str(hub_checkpoints / INCEPTION_WEIGHTS)
    torchmetrics_network = NoTrainInceptionV3("inception", ["2048"], weights, antialias=False)
    torch.testing.assert_close(features, torchmetrics_network(pixels))
    assert features.shape == (2, 2048) and not torch.allclose(features[0], features[1])
    torch.testing.assert_close(probabilities, plain(pixels, 2)[0])
    assert evaluator.conditions == plain.conditions == plain.feature_conditions
    assert evaluator.feature_conditions["extractor"].startswith("inception-v3-compat-")
    assert evaluator.feature_conditions["resize"] == "squash4:3-bicubic-32px, bilinear-299px of TensorFlow 1"
    assert (
        evaluator.settings["features"]["fingerprint"] != plain.settings["fingerprint"]
        and "features" not in plain.settings
    )


class Malicious:
    def __reduce__(self):
        return (pytest.fail, ("unpickled",))


def test_unusable_inception_weights_are_errors(evaluator_dir, hub_checkpoints):
    with pytest.raises(ValueError, match=f"needs .*{INCEPTION_WEIGHTS}: get it from the releases of toshas"):
        Evaluator(str(evaluator_dir), SIZE, extractor="inception")
    path = hub_checkpoints / INCEPTION_WEIGHTS
    for content in (b"", b"<html>", pickle.dumps({"fc.bias": Malicious()})):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=f"cannot use .*{INCEPTION_WEIGHTS} .*: get it anew"):
            Evaluator(str(evaluator_dir), SIZE, extractor="inception")
    torch.save({"fc.bias": torch.zeros(1000)}, path)
    with pytest.raises(ValueError, match=f"cannot use .*{INCEPTION_WEIGHTS} .*: get it anew"):
        Evaluator(str(evaluator_dir), SIZE, extractor="inception")


def test_an_image_model_of_transformers_gives_its_pooled_features(evaluator_dir, tmp_path):
    torch.manual_seed(1)
    config = ResNetConfig(embedding_size=8, hidden_sizes=[8, 12], depths=[1, 1], layer_type="basic")
    network = ResNetForImageClassification(config).eval()
    network.save_pretrained(tmp_path)
    settings = {"size": {"shortest_edge": 60}, "crop_size": {"height": 48, "width": 48}, "image_mean": [0.2, 0.3, 0.4]}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(settings))
    evaluator = Evaluator(str(evaluator_dir), SIZE, extractor=str(tmp_path))
    pixels = random_pixels(3)
    features = evaluator(pixels, batch_size=2)[1]
    resized = F.interpolate(pixels.float(), (48, 48), mode="bicubic", antialias=True).clamp(0, 255)
    inputs = (resized / 255 - torch.tensor([0.2, 0.3, 0.4]).view(1, 3, 1, 1)) / 0.5
    with torch.no_grad():
        torch.testing.assert_close(features, network.resnet(inputs).pooler_output.flatten(1))
    assert features.shape == (3, 12) and evaluator.feature_conditions["extractor"].startswith("resnet-")
    # Without a classifier, photos are as large as the extractor takes them; another input makes another judge.
    alone = Evaluator(None, extractor=str(tmp_path))
    assert alone.resolution == 48 and alone(pixels, 2)[0].shape == (3, 0) and alone.conditions == {}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({**settings, "do_normalize": False}))
    raw = Evaluator(None, extractor=str(tmp_path))
    assert raw.feature_conditions["extractor"] != alone.feature_conditions["extractor"]
    assert torch.equal(raw.extractor.preprocessor(pixels), pixels / 255)
    assert evaluator.feature_conditions["resize"] == "squash4:3-bicubic-32px, bicubic-48px"


def test_unusable_extractors_are_errors(evaluator_dir, tmp_path):
    with pytest.raises(ValueError, match="give an `evaluator`, or an `extractor`"):
        Evaluator(None)
    (tmp_path / "empty").mkdir()
    tiny = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8}
    ViTForImageClassification(ViTConfig(**tiny, image_size=32, patch_size=16)).save_pretrained(tmp_path / "headed")
    BertModel(BertConfig(**tiny, vocab_size=8)).save_pretrained(tmp_path / "text")
    for name, message in {
        "empty": "`extractor` must be `evaluator`, `inception` or a folder with an image model",
        # A classifier has no pooler: transformers would make a random one.
        "headed": "lacks weights, which would be random: pooler.",
        "text": "`extractor` must make one vector of a photo, but the bert in",
    }.items():
        with pytest.raises(ValueError, match=message):
            Evaluator(str(evaluator_dir), SIZE, extractor=str(tmp_path / name))


def test_cached_features_are_those_of_the_extractor(photos_dir, evaluator_dir, tmp_path):
    torch.manual_seed(1)
    config = ResNetConfig(embedding_size=8, hidden_sizes=[8], depths=[1], layer_type="basic")
    ResNetForImageClassification(config).save_pretrained(tmp_path / "resnet")
    files = image_sets.list_class_folders(photos_dir / "train", "train")[:4]
    cache = str(tmp_path / "cache")
    judges = [Evaluator(str(evaluator_dir), SIZE, extractor=e) for e in ("evaluator", str(tmp_path / "resnet"))]
    for _ in range(2):
        widths = [evaluation_network.read_training_photos(files, j, 4, cache).features.shape[1] for j in judges]
        assert widths == [16, 8]
