# SPDX-License-Identifier: Apache-2.0
"""Trains the baseline without diffusion, a conditional GAN from drawing to photo, and renders drawings with it.

    python training/train_gan_baseline.py training/configs/gan_baseline_garments64.yaml --train_data_dir DIR \\
        --output_dir gan --render_sketches DRAWINGS
    python training/evaluate.py --images gan=gan/images --sketches DRAWINGS ...

It is pix2pix (Isola et al., 2017) with the generator and discriminator of `train_sketcher.py` turned around, on the photos
and contours that the diffusion model is trained on. As there, dropout is the only noise, so it stays on when drawings are
rendered. The result is `output_dir/generator` and, with `--render_sketches`, `output_dir/images/<class>/<sketch>_<n>.png`;
`--render_only true` leaves the training out.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from accelerate import PartialState
from PIL import Image
from torch import Tensor, nn
from tqdm.auto import tqdm

from diffsketching_pipeline import PhotoSketcher, SketchProcessor
from diffsketching_pipeline.command_line import argument
from diffsketching_pipeline.evaluation.cost import CostMeter
from diffsketching_pipeline.evaluation.image_sets import check_settings, file_digest, read_drawings, save_png
from diffsketching_pipeline.stopping import stoppable
from diffsketching_pipeline.training.arguments import parse_args
from diffsketching_pipeline.training.image_to_image import SketcherArguments, minimum_l1, train
from diffsketching_pipeline.training.modules import load_pretrained


@dataclass
class GanBaselineArguments(SketcherArguments):
    direction: Literal["photo_to_sketch", "sketch_to_photo"] = argument("sketch_to_photo", "the only one here")
    dropout: float = argument(0.5, "dropout in the generator's residual blocks, the noise that varies the photos")
    discriminator_layers: int = argument(3, "halvings of the discriminator; 2 look at patches of 34 pixels, 3 at 70")
    render_sketches: str | None = argument(None, "drawings, `<class>/<sketch>.png`, to make photos of in the end")
    render_dir: str | None = argument(None, "where they are written; `images` inside `output_dir` when left out")
    render_only: bool = argument(False, "do not train: render with the generator that `output_dir` holds")
    num_images_per_sketch: int = argument(4, "photos of each drawing")


def check_render_arguments(args: GanBaselineArguments) -> None:
    """Raises `ValueError` for what cannot be rendered, before anything is trained."""
    if args.direction != "sketch_to_photo":
        raise ValueError(f"`direction` must be sketch_to_photo, but is {args.direction}: see train_sketcher.py.")
    if args.num_images_per_sketch < 1:
        raise ValueError(f"`num_images_per_sketch` must be at least 1, but got {args.num_images_per_sketch}.")
    if args.render_sketches is not None:
        if not Path(args.render_sketches).is_dir():
            raise ValueError(f"`render_sketches` must be a folder, but {args.render_sketches!r} is none.")
        read_drawings(Path(args.render_sketches))
    if args.render_only:
        if args.render_sketches is None:
            raise ValueError("`render_only` needs `render_sketches`.")
        if not (Path(args.output_dir) / "generator" / "config.json").is_file():
            raise ValueError(f"`render_only` needs a trained `generator`, but {args.output_dir!r} holds none.")


def photo_metrics(result: Tensor, targets: Tensor) -> dict[str, float]:
    """
    Measure how near photos [N, 3, H, W] are to the real ones [N, 1, 3, H, W]. The mean of all photos that might be has a low
    L1 distance too; its differences between neighboring pixels are smaller than real photos'.
    """

    def detail(photos: Tensor) -> float:
        return photos.diff(dim=-1).abs().mean().item()

    return {"l1": minimum_l1(result, targets).item(), "detail": detail(result), "target_detail": detail(targets)}


def with_dropout(model: nn.Module) -> nn.Module:
    """The model in eval mode but for its dropout, the noise of pix2pix."""
    model.eval()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.train()
    return model


@torch.no_grad()
def render(generator: nn.Module, sketch: Tensor, seed: int) -> Image.Image:
    """A photo of one drawing [1, 1, H, W]; on one machine it depends on the drawing and the seed alone."""
    with torch.random.fork_rng(devices=[sketch.device] if sketch.device.type == "cuda" else []):
        torch.manual_seed(seed)
        photo = generator(sketch)[0].float().clamp(-1, 1)
    return Image.fromarray(((photo + 1) * 127.5).round().byte().permute(1, 2, 0).cpu().numpy())


def render_all(args: GanBaselineArguments) -> Path:
    """
    Renders the drawings that are not rendered yet, as `<class>/<sketch>_<n>.png`; each file says its seed and cost.

    The seeds are those of `evaluate.py`: image n of drawing i of D has `seed + n * D + i`.
    """
    weights = Path(args.output_dir) / "generator"
    device = PartialState().device
    generator = with_dropout(load_pretrained(PhotoSketcher, str(weights), "generator")).to(device)
    drawings = read_drawings(Path(str(args.render_sketches)))
    folder = Path(args.render_dir or Path(args.output_dir) / "images")
    settings = {
        "weights": file_digest(sorted(weights.glob("*.safetensors"))),
        "sketches": file_digest([drawing.path for drawing in drawings]),
        "seed": args.seed,
    }
    check_settings(settings, folder / "generation.json", "`render_dir` holds images generated")
    processor = SketchProcessor(args.resolution)
    for drawing in tqdm(drawings, desc="Rendering", unit="drawing"):
        sketch = processor.preprocess(str(drawing.path)).to(device)
        for n in range(args.num_images_per_sketch):
            path = folder / drawing.label / f"{drawing.name}_{n}.png"
            if not path.is_file():
                _render_file(generator, sketch, args.seed + n * len(drawings) + drawing.position, path)
    return folder


def _render_file(generator: nn.Module, sketch: Tensor, seed: int, path: Path) -> None:
    with CostMeter({"generator": generator}, 1, sketch.device) as meter:
        image = render(generator, sketch, seed)
    save_png(image, path, {"seed": str(seed), "cost": json.dumps(meter.cost)})


def main() -> None:
    args = parse_args(GanBaselineArguments, description=__doc__)
    check_render_arguments(args)
    if not args.render_only:
        train(args, "generator", photo_metrics)
    if args.render_sketches is not None and PartialState().is_main_process:
        print(render_all(args))


if __name__ == "__main__":
    with stoppable(__file__):
        main()
