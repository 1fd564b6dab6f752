# SPDX-License-Identifier: Apache-2.0
"""
Measure what guidance costs beyond the networks that it runs, as ratios inside one run.

    python benchmarks/guidance.py [--model FOLDER] [--num_images 4] [--num_inference_steps 10] [--runs 5]

Overhead is 1 - (time inside the networks' forwards and backwards, recomputation included) / total of the same call.
Batched guidance is one forward of 2N rows against two of N. Each figure is the median of the runs, which alternate.
"""

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from diffusers import DDIMScheduler, UNet2DModel
from transformers import ResNetConfig, ResNetForImageClassification

from diffsketching_pipeline import DiffSketchingPipeline, NoisyImageClassifier, PhotoSketcher, bundled_checkpoint
from diffsketching_pipeline.conditioning import Conditioning
from diffsketching_pipeline.files import write_file
from diffsketching_pipeline.guidance import GuidedPredictor
from diffsketching_pipeline.registry import find_checkpoint


CALLS: dict[str, dict[str, float]] = {
    "unguided": {},
    "sketch": {"sketch_guidance_scale": 2.0},
    "sketch + classifier": {"sketch_guidance_scale": 2.0, "classifier_guidance_scale": 1.0},
    "sketch + perceptual": {"sketch_guidance_scale": 2.0, "perceptual_guidance_scale": 0.1},
    "sketch + classifier + perceptual": {
        "sketch_guidance_scale": 2.0,
        "classifier_guidance_scale": 1.0,
        "perceptual_guidance_scale": 0.1,
    },
}
OFF = {"sketch_guidance_scale": 1.0, "classifier_guidance_scale": 0.0, "perceptual_guidance_scale": 0.0}


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="pipeline folder; default: the bundled one, or random weights of its size")
    parser.add_argument("--num_images", type=int, default=4)
    parser.add_argument("--num_inference_steps", type=int, default=10)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--output_json", type=Path, help="also write the figures to this file")
    args = parser.parse_args()
    for name in ("num_images", "num_inference_steps", "runs"):
        if getattr(args, name) < 1:
            parser.error(f"`--{name}` has to be at least 1 but is {getattr(args, name)}.")
    return args


def random_pipeline() -> DiffSketchingPipeline:
    """Random weights, of the sizes of the bundled checkpoint."""
    torch.manual_seed(0)
    attention = {"layers_per_block": 1, "attention_head_dim": 32, "norm_num_groups": 16}
    unet = UNet2DModel(
        sample_size=64,
        in_channels=4,
        out_channels=3,
        block_out_channels=(48, 96, 192, 256),
        down_block_types=("DownBlock2D", "DownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "AttnUpBlock2D", "UpBlock2D", "UpBlock2D"),
        num_class_embeds=16,
        resnet_time_scale_shift="scale_shift",
        **attention,
    )
    classifier = NoisyImageClassifier(
        sample_size=64,
        num_classes=15,
        block_out_channels=(32, 64, 96, 160),
        down_block_types=("ResnetDownsampleBlock2D", "ResnetDownsampleBlock2D", "AttnDownBlock2D", "AttnDownBlock2D"),
        **attention,
    )
    encoder_config = ResNetConfig(
        num_channels=1,
        embedding_size=48,
        hidden_sizes=[48, 96, 192],
        depths=[2, 2, 2],
        layer_type="basic",
        downsample_in_first_stage=False,
        num_labels=15,
    )
    scheduler = DDIMScheduler(
        beta_schedule="squaredcos_cap_v2", prediction_type="v_prediction", timestep_spacing="leading"
    )
    return DiffSketchingPipeline(
        unet.eval(),
        scheduler,
        classifier=classifier.eval(),
        sketcher=PhotoSketcher(ngf=16, n_blocks=5).eval(),
        sketch_encoder=ResNetForImageClassification(encoder_config).eval(),
        id2label={i: f"class {i}" for i in range(15)},
    )


def load_pipeline(model: str | None) -> tuple[DiffSketchingPipeline, str]:
    if model is None:
        try:
            model = bundled_checkpoint()
        except ValueError:
            return random_pipeline(), "random weights"
    return DiffSketchingPipeline.from_pretrained(find_checkpoint(model)), model


def synchronized_time(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


class Mark(torch.autograd.Function):
    """Identity whose backward calls `note()`."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, note: Any) -> torch.Tensor:
        ctx.note = note
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        ctx.note()
        return grad[0], None


class NetworkClock:
    """Adds up the time inside the forwards and backwards of a pipeline's networks."""

    def __init__(self, pipe: DiffSketchingPipeline):
        self.device = pipe.unet.device
        self.seconds = 0.0
        for module in (pipe.unet, pipe.classifier, pipe.sketcher):
            if module is not None:
                self._hook(module)
        if pipe.sketch_encoder is not None:
            # Eq. 5 runs its parts, for the map in between.
            resnet = pipe.sketch_encoder.resnet
            for module in (resnet.embedder.embedder, resnet.embedder.pooler, resnet.encoder):
                self._hook(module)

    def _hook(self, module: torch.nn.Module) -> None:
        started: dict[str, float] = {}

        def begin_backward() -> None:
            started.setdefault("backward", synchronized_time(self.device))

        def end_backward() -> None:
            self.seconds += synchronized_time(self.device) - started.pop("backward")

        def before(module: Any, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
            if torch.is_grad_enabled() and args[0].requires_grad:
                args = (Mark.apply(args[0], end_backward), *args[1:])
            started["forward"] = synchronized_time(self.device)
            return args, kwargs

        def after(module: Any, args: tuple, kwargs: dict, output: Any) -> Any:
            self.seconds += synchronized_time(self.device) - started.pop("forward")
            return _mark(output, begin_backward)

        module.register_forward_pre_hook(before, with_kwargs=True)
        module.register_forward_hook(after, with_kwargs=True)


def _mark(output: Any, note: Any) -> Any:
    """Every tensor of a network's output that a backward can come through."""
    if torch.is_tensor(output):
        return Mark.apply(output, note) if output.requires_grad else output
    if isinstance(output, tuple):
        return tuple(_mark(value, note) for value in output)
    if isinstance(output, dict):
        for key, value in list(output.items()):
            output[key] = _mark(value, note)
    return output


def make_sketch(pipe: DiffSketchingPipeline) -> torch.Tensor:
    sketch = torch.ones(1, 1, pipe.height, pipe.width)
    top, left, bottom, right = (pipe.height // 5, pipe.width // 5, 4 * pipe.height // 5, 4 * pipe.width // 5)
    sketch[..., top:bottom, [left, right]] = sketch[..., [top, bottom], left:right] = -1
    return sketch


def measure_overhead(pipe: DiffSketchingPipeline, args: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Per call: its overhead, and its time as a multiple of the unguided call's."""
    clock, sketch = NetworkClock(pipe), make_sketch(pipe)
    calls: dict[str, dict[str, Any]] = {
        name: {**OFF, **scales} for name, scales in CALLS.items() if _supported(pipe, scales)
    }
    totals: dict[str, list[float]] = {name: [] for name in calls}
    overheads: dict[str, list[float]] = {name: [] for name in calls}
    for run in range(args.runs + 1):
        for name, scales in calls.items():
            clock.seconds, start = 0.0, synchronized_time(clock.device)
            pipe(
                sketch,
                class_labels=0 if pipe.num_classes else None,
                num_images_per_sketch=args.num_images,
                num_inference_steps=args.num_inference_steps,
                generator=torch.Generator().manual_seed(run),
                **scales,
            )
            total = synchronized_time(clock.device) - start
            # The first call of a process warms up allocators and kernels.
            if run > 0:
                totals[name].append(total)
                overheads[name].append(1 - clock.seconds / total)
    unguided = statistics.median(totals["unguided"])
    return {
        name: {
            "overhead": statistics.median(overheads[name]),
            "time_over_unguided": statistics.median(totals[name]) / unguided,
        }
        for name in calls
    }


def _supported(pipe: DiffSketchingPipeline, scales: dict[str, float]) -> bool:
    needed = {
        "sketch_guidance_scale": pipe.takes_sketch,
        "classifier_guidance_scale": pipe.classifier is not None,
        "perceptual_guidance_scale": pipe.sketcher is not None and pipe.sketch_encoder is not None,
    }
    return all(needed[name] for name in scales)


@torch.no_grad()
def measure_batched_guidance(pipe: DiffSketchingPipeline, args: argparse.Namespace) -> float | None:
    """Time of one batched guided prediction over that of two separate passes; `None` without a sketch channel."""
    if not pipe.takes_sketch:
        return None
    device = pipe.unet.device
    latents = torch.randn(args.num_images, pipe.sample_channels, *pipe.sample_size, device=device)
    labels = torch.zeros(args.num_images, dtype=torch.long, device=device)
    sketch = make_sketch(pipe).to(device).expand(args.num_images, -1, -1, -1)
    timestep = torch.tensor(500, device=device)

    def predict(sketch: torch.Tensor | None, scale: float = 1.0) -> torch.Tensor:
        conditioning = Conditioning(labels, sketch)
        told = (pipe.unet, pipe.unet.config, pipe.scheduler, conditioning)
        return GuidedPredictor(*told, sketch_guidance_scale=scale, clip_sample=True)(latents, timestep).noise_pred

    def separate() -> torch.Tensor:
        null = predict(None)
        return null + 2.0 * (predict(sketch) - null)

    seconds: dict[str, list[float]] = {"batched": [], "separate": []}
    for run in range(args.runs + 1):
        for name, call in (("batched", lambda: predict(sketch, 2.0)), ("separate", separate)):
            start = synchronized_time(device)
            for _ in range(args.num_inference_steps):
                call()
            if run > 0:
                seconds[name].append(synchronized_time(device) - start)
    return statistics.median(seconds["batched"]) / statistics.median(seconds["separate"])


def write_json(path: Path, figures: dict[str, Any]) -> None:
    write_file(path, json.dumps(figures, indent=2) + "\n")


def main() -> None:
    args = parse_args()
    pipe, model = load_pipeline(args.model)
    pipe.set_progress_bar_config(disable=True)
    pipe.to(args.device)
    # Before the clock's hooks are in place.
    batched = measure_batched_guidance(pipe, args)
    overhead = measure_overhead(pipe, args)

    print(f"{model} on {args.device}, {args.num_images} images, {args.num_inference_steps} steps, {args.runs} runs")
    print(f"{'guidance':<36}{'overhead':>10}{'time over unguided':>21}")
    for name, figures in overhead.items():
        print(f"{name:<36}{figures['overhead']:>10.1%}{figures['time_over_unguided']:>20.2f}x")
    if batched is not None:
        print(f"batched guidance over two separate passes: {batched:.2f}x")
    if args.output_json:
        settings = {name: str(value) if isinstance(value, Path) else value for name, value in vars(args).items()}
        write_json(
            args.output_json,
            {**settings, "model": model, "overhead": overhead, "batched_over_separate": batched},
        )


if __name__ == "__main__":
    main()
