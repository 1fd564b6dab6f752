# SPDX-License-Identifier: Apache-2.0
"""
Measure how far converted networks are from the reference implementations, on one folder of reference values.

A folder holds checkpoints, the flags that build them (`flags.json`) and what the reference computed with them
(`expected.safetensors`); `tests/fixtures` has two, each with a description. Checkpoints may be `.pt`, `.pth` or
`.safetensors`.

    python benchmarks/parity.py --reference_dir tests/fixtures/adm_mini

Exit code 1 if a deviation is above its tolerance.
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path

import torch
from safetensors.torch import load_file

from diffsketching_pipeline import DiffSketchingPipeline, PhotoSketcher
from diffsketching_pipeline.converters.guided_diffusion import convert_guided_diffusion
from diffsketching_pipeline.converters.photosketch import convert_photosketch


# What float32 can promise: a single pass, and five steps with guidance.
PASS_TOLERANCE = 1e-4
SAMPLE_TOLERANCE = 1e-3


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--reference_dir", type=Path, required=True, help="folder of reference values")
    return parser.parse_args()


def find_checkpoint(reference_dir: Path, name: str) -> Path:
    paths = sorted(path for path in reference_dir.glob(f"{name}.*") if path.suffix in (".pt", ".pth", ".safetensors"))
    if not paths:
        raise SystemExit(f"`--reference_dir` {reference_dir} has no checkpoint named {name}.")
    return paths[0]


def guided_diffusion_deviations(reference_dir: Path, expected: dict[str, torch.Tensor], output_dir: Path):
    """Yields (what, result, reference, tolerance) for UNet, classifier, its gradient and guided DDIM."""
    checkpoints = (find_checkpoint(reference_dir, name) for name in ("diffusion", "classifier"))
    folder = convert_guided_diffusion(*checkpoints, flags=reference_dir / "flags.json", output_dir=output_dir)
    pipe = DiffSketchingPipeline.from_pretrained(folder)
    sample, timesteps, class_labels = (expected[name] for name in ("sample", "timesteps", "class_labels"))
    with torch.no_grad():
        noise_pred = pipe.unet(sample, timesteps, class_labels).sample
    yield "UNet output", noise_pred, expected["model_output"], PASS_TOLERANCE

    differentiable = sample.clone().requires_grad_(True)
    logits = pipe.classifier(differentiable, timesteps).logits
    log_prob = logits.log_softmax(dim=-1).gather(1, class_labels[:, None]).sum()
    gradient = torch.autograd.grad(log_prob, differentiable)[0]
    yield "classifier logits", logits.detach(), expected["classifier_logits"], PASS_TOLERANCE
    yield "classifier gradient", gradient, expected["classifier_log_prob_grad"], PASS_TOLERANCE

    # Steps and scale are the folder's recommendation, which comes from the flags.
    images = pipe(
        class_labels=class_labels.tolist(), num_images_per_sketch=1, latents=sample, output_type="latent"
    ).images
    steps, scale = pipe.recommended["num_inference_steps"], pipe.recommended["classifier_guidance_scale"]
    reference = expected[f"ddim{steps}_guided_scale{scale:g}"]
    yield f"{steps} steps of guided DDIM, scale {scale:g}", images, reference, SAMPLE_TOLERANCE


def photosketch_deviations(reference_dir: Path, expected: dict[str, torch.Tensor], output_dir: Path):
    """Yields (what, result, reference, tolerance) for both kinds of statistics."""
    folder = convert_photosketch(find_checkpoint(reference_dir, "latest_net_G"), output_dir)
    for statistics in ("per_sample", "running"):
        sketcher = PhotoSketcher.from_pretrained(folder, statistics=statistics)
        with torch.no_grad():
            sketch = sketcher(expected["image"])
        yield f"sketch, {statistics} statistics", sketch, expected[f"sketch_{statistics}_statistics"], PASS_TOLERANCE


def main() -> None:
    reference_dir = parse_args().reference_dir
    expected = load_file(reference_dir / "expected.safetensors")
    is_guided_diffusion = "model_flags" in json.loads((reference_dir / "flags.json").read_text())
    deviations = guided_diffusion_deviations if is_guided_diffusion else photosketch_deviations
    within = True
    print(f"{'':36}{'max |difference|':>18}{'max |reference|':>18}{'tolerance':>12}")
    with tempfile.TemporaryDirectory() as temporary:
        for what, result, reference, tolerance in deviations(reference_dir, expected, Path(temporary) / "converted"):
            difference = (result - reference).abs().max().item()
            # Written so that NaN fails.
            passed = difference <= tolerance
            within &= passed
            verdict = "" if passed else "  FAILED"
            print(f"{what:36}{difference:18.2e}{reference.abs().max().item():18.2e}{tolerance:12.0e}{verdict}")
    sys.exit(0 if within else 1)


if __name__ == "__main__":
    main()
