# SPDX-License-Identifier: Apache-2.0
"""Joins trained components into one pipeline folder, in float16, with the checkpoint's recommended settings.

    python training/assemble.py --unet unet-64/pipeline --classifier classifier/classifier --sketcher sketcher/sketcher \
        --sketch_encoder sketch_encoder/sketch_encoder --image_encoder image_encoder/image_encoder --output_dir garments-64
"""

import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import HfArgumentParser, ResNetForImageClassification

from diffsketching_pipeline import DiffSketchingPipeline, NoisyImageClassifier, PhotoSketcher
from diffsketching_pipeline.stopping import stoppable
from diffsketching_pipeline.training.latents import encoder_sha256, load_vae
from diffsketching_pipeline.training.run_folder import write_folder


COMPONENTS: dict[str, Any] = {
    "classifier": NoisyImageClassifier,
    "sketcher": PhotoSketcher,
    "sketch_encoder": ResNetForImageClassification,
    "image_encoder": ResNetForImageClassification,
}


@dataclass
class AssembleArguments:
    unet: str = field(metadata={"help": "the `pipeline` folder that train_unet.py wrote: UNet, scheduler, classes"})
    output_dir: str = field(metadata={"help": "the new pipeline folder"})
    classifier: str | None = field(default=None, metadata={"help": "NoisyImageClassifier folder"})
    sketcher: str | None = field(default=None, metadata={"help": "PhotoSketcher folder"})
    sketch_encoder: str | None = field(default=None, metadata={"help": "ResNetForImageClassification, 1 channel"})
    image_encoder: str | None = field(default=None, metadata={"help": "ResNetForImageClassification, 3 channels"})
    num_inference_steps: int = field(default=25, metadata={"help": "recommended steps"})
    eta: float = field(default=0.0, metadata={"help": "recommended share of fresh noise per step; 0.0 = off"})
    sketch_guidance_scale: float = field(default=1.0, metadata={"help": "recommended scale; 1.0 = off"})
    classifier_guidance_scale: float = field(default=0.0, metadata={"help": "recommended scale; 0.0 = off"})
    perceptual_guidance_scale: float = field(default=0.0, metadata={"help": "recommended scale; 0.0 = off"})
    vae: str | None = field(
        default=None,
        metadata={"help": "autoencoder with a newer decoder than that in `unet`; its encoder is the same"},
    )
    sketch_abstraction: float | None = field(
        default=None, metadata={"help": "recommended value in [0, 1], for a UNet that has a plane for it"}
    )
    class_mixture: float | None = field(
        default=None,
        metadata={
            "help": "mix the two classes guessed where the second is at least this share as probable as the first"
        },
    )
    max_class_entropy: float | None = field(
        default=None,
        metadata={
            "help": "say that a drawing may be of none of the classes where the entropy of the guess, as a share of the"
            " largest possible one, is above this; see benchmarks/class_entropy.py"
        },
    )
    save_dtype: str = field(default="float16", metadata={"help": "float16, bfloat16 or float32"})
    max_shard_size: str = field(default="10GB", metadata={"help": "largest weight file, e.g. 15MB"})
    overwrite_output_dir: bool = field(default=False, metadata={"help": "replace an existing folder"})


def load_decoder(path: str, trained_on: Any) -> Any:
    """
    The autoencoder in a folder, whose decoder may differ from that of the one a UNet was trained on.

    Raises:
        ValueError: the UNet was not trained on latents, or on those of another encoder or scaling.
    """
    vae = load_vae(path)
    if trained_on is None or encoder_sha256(vae) != encoder_sha256(trained_on):
        raise ValueError(
            f"`vae` {path!r} must have the encoder and scaling that the UNet was trained on, but has others."
        )
    return vae


def assemble(args: AssembleArguments) -> DiffSketchingPipeline:
    """
    The pipeline with all components given.

    Raises:
        ValueError: if classes of the components differ, or `save_dtype` is none of the three.
    """
    if args.save_dtype not in ("float16", "bfloat16", "float32"):
        raise ValueError(f"`save_dtype` has to be float16, bfloat16 or float32 but is {args.save_dtype!r}.")
    base = DiffSketchingPipeline.from_pretrained(args.unet)
    folders = {name: getattr(args, name) for name in COMPONENTS if getattr(args, name) is not None}
    parts = {name: COMPONENTS[name].from_pretrained(folder).float().eval() for name, folder in folders.items()}
    for name, part in parts.items():
        labels = getattr(part.config, "id2label", None)
        if labels is not None and {int(key): value for key, value in labels.items()} != base.id2label:
            raise ValueError(f"`{name}` has the classes {labels}, but the UNet has {base.id2label}.")
    recommended: dict[str, Any] = {
        "num_inference_steps": args.num_inference_steps,
        "eta": args.eta,
        "sketch_guidance_scale": args.sketch_guidance_scale,
        "classifier_guidance_scale": args.classifier_guidance_scale,
        "perceptual_guidance_scale": args.perceptual_guidance_scale,
    }
    for name in ("sketch_abstraction", "class_mixture", "max_class_entropy"):
        if getattr(args, name) is not None:
            recommended[name] = getattr(args, name)
    vae = base.vae if args.vae is None else load_decoder(args.vae, base.vae)
    pipe = DiffSketchingPipeline(
        unet=base.unet, scheduler=base.scheduler, vae=vae, **parts, id2label=base.id2label, recommended=recommended
    )
    return pipe.to(getattr(torch, args.save_dtype))


def main(args: AssembleArguments) -> None:
    output_dir = Path(args.output_dir)
    if output_dir.exists() and not args.overwrite_output_dir:
        raise ValueError(f"`output_dir` {args.output_dir!r} exists: choose another, or pass `--overwrite_output_dir`.")
    pipe = assemble(args)
    with write_folder(output_dir) as temporary:
        pipe.save_pretrained(temporary, max_shard_size=args.max_shard_size)
    size = sum(file.stat().st_size for file in output_dir.rglob("*.safetensors"))
    print(f"{args.output_dir}: {size / 2**20:.1f} MiB of weights")


if __name__ == "__main__":
    with stoppable(__file__):
        try:
            main(HfArgumentParser(AssembleArguments).parse_args_into_dataclasses()[0])  # type: ignore[arg-type]
        except ValueError as error:
            sys.exit(f"assemble.py: {error}")
