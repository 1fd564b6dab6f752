# SPDX-License-Identifier: Apache-2.0
"""Compute what fine-tuning through the chain costs from the architectures alone: no weights, no GPU.

    python benchmarks/cost.py --preset 256 [--tflops 312 --utilization 0.35] [--num_samples 50000]
    python benchmarks/cost.py --model DIR

Operations are counted by torch's FlopCounterMode (a multiplication and an addition are two) and activations by what
autograd keeps, both on the device "meta", with bfloat16 activations. They are exact for the networks. Hours are an
estimate: operations divided by `--tflops`, the peak of a GPU in bfloat16 (312: A100, 990: H100), and by the share of it
that is reached, `--utilization`. Memory leaves out what libraries take and how memory is cut up.
"""

import argparse
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from diffusers import UNet2DModel
from torch.utils.flop_counter import FlopCounterMode
from torchvision.models import vgg16
from transformers import ResNetConfig, ResNetForImageClassification

from diffsketching_pipeline import NoisyImageClassifier, PhotoSketcher, expand_unet_for_sketch
from diffsketching_pipeline.autoencoding import get_scale_factor
from diffsketching_pipeline.converters.guided_diffusion import networks_of_preset
from diffsketching_pipeline.registry import find_checkpoint


GIBIBYTE = 2**30
ADAM_BYTES, WEIGHT_BYTES, AUTOCAST_BYTES = 8, 4, 2


@dataclass
class NetworkCost:
    """The cost of one network, per sample: operations of a forward pass, bytes kept for its backward pass, and parameters."""

    name: str
    flops: float
    activations: int
    parameters: int


def measure(name: str, module: torch.nn.Module, call: Callable[[torch.nn.Module], Any]) -> NetworkCost:
    """Costs of `call(module)`, `module` being on the device "meta"."""
    parameters = sum(parameter.numel() for parameter in module.parameters())
    kept: dict[int, int] = {}
    held = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        kept[storage._cdata] = storage.nbytes()
        held.append(storage)  # its address is not to be used again
        return tensor

    torch.nn.Module.to(module, torch.bfloat16)  # without the advice of ModelMixin.to
    counter = FlopCounterMode(display=False)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), counter:
        call(module)
    weights = {parameter.untyped_storage()._cdata for parameter in module.parameters()}
    activations = sum(size for address, size in kept.items() if address not in weights)
    return NetworkCost(name, float(counter.get_total_flops()), activations, parameters)


def on_meta(build: Callable[[], torch.nn.Module]) -> torch.nn.Module:
    with torch.device("meta"):
        return build()


def costs_of(
    unet: UNet2DModel, classifier: NoisyImageClassifier | None, scale_factor: int = 1
) -> dict[str, NetworkCost]:
    """
    Costs of the networks of the paper's stage at the size of `unet`, times `scale_factor` for those that see photos: with
    Photo-Sketching, VGG-LPIPS, ResNet-50.
    """
    side = unet.config.sample_size

    def zeros(channels: int, side: int) -> torch.Tensor:
        return torch.zeros(1, channels, side, side, device="meta", dtype=torch.bfloat16, requires_grad=True)

    images, inputs = zeros(3, scale_factor * side), zeros(unet.config.in_channels, side)
    labels = None if unet.config.num_class_embeds is None else torch.zeros(1, device="meta", dtype=torch.long)
    timestep = torch.zeros(1, device="meta")
    photos = torch.zeros(1, 3, 224, 224, device="meta", dtype=torch.bfloat16, requires_grad=True)
    networks = {
        "unet": measure("UNet", unet, lambda net: net(inputs, timestep, class_labels=labels)),
        "sketcher": measure("P (Photo-Sketching)", on_meta(PhotoSketcher), lambda net: net(images)),
        "perceptual": measure(
            "F_s (VGG-16 of LPIPS)", on_meta(lambda: vgg16().features[:30]), lambda net: net(images)
        ),
        "identity": measure(
            "F_i (ResNet-50, 224x224)",
            on_meta(lambda: ResNetForImageClassification(ResNetConfig())),
            lambda net: net(photos),
        ),
    }
    if classifier is not None:
        noisy = zeros(classifier.config.in_channels, side)
        networks["classifier"] = measure("classifier", classifier, lambda net: net(noisy, timestep))
    return networks


def training_step(
    costs: dict[str, NetworkCost], mode: str, steps: int, kept: int = 1, batch_size: int = 1
) -> tuple[float, float]:
    """
    Operations and kept bytes per photo of one training step.

    A backward pass with gradients of weights costs two forward passes, one that only passes through (the frozen networks)
    costs one. F_s sees two drawings and F_i two photos, of which one is the constant that is compared with. In the mode "per
    step" each photo has a random step of its own, and the whole batch is sampled up to the last of them.
    """
    # The expected maximum of `batch_size` numbers drawn evenly from 0 to steps - 1.
    sampled = (steps - 1) - sum((k / steps) ** batch_size for k in range(1, steps))

    unet = costs["unet"]
    losses = 2 * costs["sketcher"].flops + 3 * costs["perceptual"].flops + 3 * costs["identity"].flops
    losses_kept = sum(costs[name].activations for name in ("sketcher", "perceptual", "identity"))
    passes, kept_steps = {
        "plain": (3 * steps, steps),
        "checkpointed": (4 * steps, 1),
        "truncated": ((steps - kept) + 3 * kept, kept),
        "per step": (sampled + 3, 1),
    }[mode]
    return passes * unet.flops + losses, kept_steps * unet.activations + losses_kept


def fixed_bytes(costs: dict[str, NetworkCost]) -> float:
    """Weights (float32 and as autocast keeps them), gradients, Adam's moments and the average, and the frozen networks."""
    unet = costs["unet"].parameters
    trained = unet * (WEIGHT_BYTES + ADAM_BYTES + WEIGHT_BYTES)
    frozen = sum(cost.parameters for name, cost in costs.items() if name not in ("unet", "classifier"))
    return unet * (WEIGHT_BYTES + AUTOCAST_BYTES) + trained + frozen * WEIGHT_BYTES


def table(costs: dict[str, NetworkCost], args: argparse.Namespace) -> str:
    """Both tables in markdown."""
    lines = ["| network | parameters | GFLOP per forward pass | GiB kept for backward |", "| --- | --- | --- | --- |"]
    for cost in costs.values():
        lines.append(
            f"| {cost.name} | {cost.parameters / 1e6:.1f} M | {cost.flops / 1e9:.0f} | "
            f"{cost.activations / GIBIBYTE:.2f} |"
        )
    lines += ["", f"| mode | chain | TFLOP per photo | GiB, batch {args.train_batch_size} | GPU hours |"]
    lines.append("| --- | --- | --- | --- | --- |")
    for mode in ("plain", "checkpointed", "truncated", "per step"):
        for steps in args.steps:
            flops, kept = training_step(costs, mode, steps, batch_size=args.train_batch_size)
            memory = fixed_bytes(costs) + args.train_batch_size * kept
            hours = args.num_samples * flops / (args.tflops * 1e12 * args.utilization) / 3600
            name = "truncated to 1" if mode == "truncated" else mode
            lines.append(f"| {name} | {steps} | {flops / 1e12:.1f} | {memory / GIBIBYTE:.0f} | {hours:.0f} |")
    for steps in args.steps:
        flops = 2 * steps * (1 + args.num_fixed_point_iterations) * costs["unet"].flops
        hours = args.num_photos * flops / (args.tflops * 1e12 * args.utilization) / 3600
        lines.append(f"| inversion, once per photo and flip | {steps} | {flops / 1e12:.1f} | - | {hours:.0f} |")
    return "\n".join(lines)


def load(args: argparse.Namespace) -> tuple[UNet2DModel, NoisyImageClassifier | None, int]:
    """UNet, classifier, and the pixels per side of what the UNet denoises."""
    if args.preset is not None:
        unet, classifier = networks_of_preset(args.preset)
        return expand_unet_for_sketch(unet), classifier, 1
    folder = Path(find_checkpoint(args.model))
    unet = on_meta(lambda: UNet2DModel.from_config(json.loads((folder / "unet" / "config.json").read_text())))
    vae = folder / "vae" / "config.json"
    scale_factor = get_scale_factor(SimpleNamespace(config=json.loads(vae.read_text())) if vae.is_file() else None)
    return unet, None, scale_factor


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--preset", help="a published ADM checkpoint, with a sketch channel: 64, 256 or 256-uncond")
    which.add_argument("--model", help="pipeline folder")
    parser.add_argument("--steps", type=int, nargs="+", default=[10, 40], help="lengths of the chain")
    parser.add_argument("--train_batch_size", type=int, default=4)
    parser.add_argument("--num_fixed_point_iterations", type=int, default=3)
    parser.add_argument("--num_photos", type=int, default=12_500, help="photos that are inverted")
    parser.add_argument("--num_samples", type=int, default=50_000, help="photos times epochs that are trained on")
    parser.add_argument("--tflops", type=float, default=312.0, help="peak of the GPU in bfloat16")
    parser.add_argument("--utilization", type=float, default=0.35, help="share of the peak that is reached")
    args = parser.parse_args()
    print(table(costs_of(*load(args)), args))


if __name__ == "__main__":
    main()
