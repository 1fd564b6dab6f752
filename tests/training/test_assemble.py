# SPDX-License-Identifier: Apache-2.0
import copy
import json

import assemble
import pytest
import torch

from diffsketching_pipeline import DiffSketchingPipeline


@pytest.fixture
def parts(tiny_pipeline_factory, tmp_path):
    """Folders of a tiny UNet pipeline and of the components that go with it, as the training scripts write them."""
    pipe = tiny_pipeline_factory()
    pipe.sketch_encoder.config.id2label = dict(pipe.id2label)
    tiny_pipeline_factory(components=()).save_pretrained(tmp_path / "unet")
    for name in ("classifier", "sketcher", "sketch_encoder"):
        getattr(pipe, name).save_pretrained(tmp_path / name)
    return {name: str(tmp_path / name) for name in ("unet", "classifier", "sketcher", "sketch_encoder")}


def test_assembled_pipeline_is_its_parts_in_float16(parts, tiny_pipeline_factory, tmp_path):
    output_dir = tmp_path / "assembled"
    assemble.main(
        assemble.AssembleArguments(
            **parts, output_dir=str(output_dir), num_inference_steps=7, sketch_guidance_scale=3.0, eta=0.5
        )
    )
    pipe, source = DiffSketchingPipeline.from_pretrained(output_dir), tiny_pipeline_factory()
    assert pipe.recommended["num_inference_steps"] == 7 and pipe.recommended["sketch_guidance_scale"] == 3.0
    assert pipe.recommended["eta"] == 0.5
    assert pipe.image_encoder is None
    for name in ("unet", "classifier", "sketcher", "sketch_encoder"):
        expected = getattr(source, name).state_dict()
        for key, value in getattr(pipe, name).state_dict().items():
            if value.is_floating_point():
                assert torch.equal(value, expected[key].half().float()), (name, key)
    texts = [path.read_text() for path in output_dir.rglob("*.json")]
    assert len(texts) == 6 and not any(str(tmp_path) in text for text in texts)


def test_an_existing_folder_and_other_classes_are_refused(parts, tmp_path):
    (tmp_path / "there").mkdir()
    with pytest.raises(ValueError, match="`output_dir` .* exists"):
        assemble.main(assemble.AssembleArguments(**parts, output_dir=str(tmp_path / "there")))
    config = tmp_path / "sketch_encoder" / "config.json"
    content = json.loads(config.read_text())
    content["id2label"] = {"0": "x", "1": "y", "2": "z"}
    config.write_text(json.dumps(content))
    with pytest.raises(ValueError, match="`sketch_encoder` has the classes"):
        assemble.main(assemble.AssembleArguments(**parts, output_dir=str(tmp_path / "new")))
    assert not (tmp_path / "new").exists()


@pytest.mark.slow
def test_a_latent_pipeline_may_be_given_another_decoder_and_no_other_encoder(latent_pipeline_factory, tmp_path):
    pipe = latent_pipeline_factory()
    pipe.save_pretrained(tmp_path / "unet")
    newer = copy.deepcopy(pipe.vae)
    torch.nn.init.zeros_(next(newer.decoder.parameters()))
    newer.save_pretrained(tmp_path / "newer")
    options = {"unet": str(tmp_path / "unet"), "output_dir": str(tmp_path / "new"), "save_dtype": "float32"}
    options |= {"sketch_abstraction": 0.25, "class_mixture": 0.5}
    made = assemble.assemble(assemble.AssembleArguments(**options, vae=str(tmp_path / "newer")))
    assert not next(made.vae.decoder.parameters()).any()
    assert made.recommended["sketch_abstraction"] == 0.25 and made.recommended["class_mixture"] == 0.5
    kept = assemble.assemble(assemble.AssembleArguments(**options))
    assert torch.equal(next(kept.vae.decoder.parameters()), next(pipe.vae.decoder.parameters()))

    torch.nn.init.zeros_(next(newer.encoder.parameters()))
    newer.save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match="`vae` .*other.* must have the encoder"):
        assemble.assemble(assemble.AssembleArguments(**options, vae=str(tmp_path / "other")))
