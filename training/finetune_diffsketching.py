# SPDX-License-Identifier: Apache-2.0
"""Fine-tunes the reverse process of a DiffSketching pipeline with the paper's constraints (eqs. 5-7, section 4).

    accelerate launch training/finetune_diffsketching.py training/configs/finetune_garments64.yaml \
        --pretrained_model_name_or_path garments-64 --train_data_dir garments

For each photo x_0 and a drawing s_0 of it: x_0 is inverted to x_T with the frozen network (once: it is kept on disk), the
network that learns makes x̂_0 from x_T with s_0 as its drawing, and the gradient of
L = λ L_i(x_0, x̂_0) + (1-λ) L_p(P(x̂_0), s_0) runs back through the chain of sampling steps. The result is
`output_dir/pipeline`: the pipeline that was given, with the fine-tuned UNet in it.

The data is one of: a folder with `train` and `validation`, each with photos in class folders (the drawings are then contours
of the photos, redrawn as an unskilled hand would); a folder with `photo` and `sketch`, matched by name; a dataset with a
column of photos and one of drawings (`--conditioning_image_column`), see `diffsketching_pipeline/training/pairs.py` for these
two; webdataset shards of pairs (`--train_shards`), streamed, see `shards.py` there: nothing of them is kept on disk, so x_T
is made anew in each step.

Memory: `--gradient_checkpointing` keeps one step's activations however long the chain is, `--truncate_backprop_steps K`
goes back through the last K steps only, and `--backprop per_step` through one step, drawn at random.
"""

import dataclasses
import itertools
import logging
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from diffusers import DDIMScheduler
from torch import Tensor, nn
from tqdm.auto import tqdm

from diffsketching_pipeline import (
    DiffSketchingLoss,
    DiffSketchingPipeline,
    add_lora,
    save_lora,
)
from diffsketching_pipeline.images.free_hand import check_free_hand
from diffsketching_pipeline.images.photo_files import list_images
from diffsketching_pipeline.losses import DiffSketchingLosses
from diffsketching_pipeline.pipeline_options import SamplingOptions, check_abstraction
from diffsketching_pipeline.registry import find_checkpoint
from diffsketching_pipeline.schedulers import check_scheduler
from diffsketching_pipeline.stopping import stoppable
from diffsketching_pipeline.training.arguments import check_dataset_name, num_readers, parse_args, resolve_data_dir
from diffsketching_pipeline.training.chain import FinetuneArguments, decoded, make_loss, run_chain
from diffsketching_pipeline.training.chain_data import (
    ChainDataset,
    NoiseCache,
    ShardedChainData,
    fill_noise_cache,
    in_groups,
    invert_photos,
)
from diffsketching_pipeline.training.dataset import PhotoSketchDataset
from diffsketching_pipeline.training.keyed import class_balanced_weights
from diffsketching_pipeline.training.pairs import (
    PairedPhotoDataset,
    find_pairs,
    load_dataset_pairs,
    split_pairs,
)
from diffsketching_pipeline.training.pictures import image_grid
from diffsketching_pipeline.training.run_folder import write_folder
from diffsketching_pipeline.training.starts import add_classes, class_names_of
from diffsketching_pipeline.training.trainer import Trainer


logger = logging.getLogger(__name__)


def check_finetune_arguments(args: FinetuneArguments) -> None:
    """Raises `ValueError` for a value out of range, or two that exclude each other."""
    if args.pretrained_model_name_or_path is None:
        raise ValueError("`pretrained_model_name_or_path` is needed: the pipeline (folder or Hub id) to fine-tune.")
    if not 0 <= args.identity_weight <= 1:
        raise ValueError(f"`identity_weight` must be in [0, 1], but got {args.identity_weight}.")
    if args.free_hand_strength is not None:
        check_free_hand(strength=args.free_hand_strength)
    check_abstraction(args.sketch_abstraction, has_sketch=True)
    at_least = {"num_train_inference_steps": 1, "num_fixed_point_iterations": 0, "inversion_batch_size": 1}
    at_least |= {"num_validation_samples": 1, "num_validation_images": 1}
    at_least |= {"ddpm_num_inference_steps": 1, "lora_rank": 1, "shuffle_buffer": 1}
    for name, minimum in at_least.items():
        value = getattr(args, name)
        if value is not None and value < minimum:
            raise ValueError(f"`{name}` must be at least {minimum}, but got {value}.")
    kept = args.truncate_backprop_steps
    if kept is not None and not 1 <= kept <= args.num_train_inference_steps:
        raise ValueError(
            "`truncate_backprop_steps` must be between 1 and `num_train_inference_steps`, "
            f"{args.num_train_inference_steps}, but got {kept}."
        )
    if kept is not None and args.backprop == "per_step":
        raise ValueError("`truncate_backprop_steps` is for `--backprop chain`: per_step goes back through one step.")
    if args.train_shards is not None:
        for name in ("train_data_dir", "dataset_name", "max_train_samples"):
            if getattr(args, name) is not None:
                raise ValueError(f"`{name}` and `train_shards` cannot both be given: the shards are the data.")
        if args.max_train_steps is None:
            raise ValueError("`max_train_steps` is needed with `train_shards`: how long an epoch is, is not known.")


def check_pipeline(pipeline: DiffSketchingPipeline, args: FinetuneArguments) -> None:
    """Raises `ValueError` for a component that the constraints need and the pipeline lacks, or another resolution."""
    weight, scale = args.identity_weight, args.classifier_guidance_scale
    perceptual_scale = args.perceptual_guidance_scale
    guided = f"`perceptual_guidance_scale` other than 0 (it is {perceptual_scale})"
    needs = [
        ("sketcher", weight < 1, f"`identity_weight` below 1 (it is {weight})"),
        (
            "sketch_encoder",
            weight < 1 and args.perceptual_net == "sketch_encoder",
            f"`identity_weight` below 1 (it is {weight})",
        ),
        (
            "image_encoder",
            weight > 0 and args.image_encoder_name_or_path is None,
            f"`identity_weight` above 0 (it is {weight})",
        ),
        ("classifier", scale != 0, f"`classifier_guidance_scale` other than 0 (it is {scale})"),
        ("sketcher", perceptual_scale != 0, guided),
        ("sketch_encoder", perceptual_scale != 0, guided),
    ]
    for name, is_needed, reason in needs:
        if is_needed and getattr(pipeline, name) is None:
            raise ValueError(
                f"{reason} needs the component `{name}`, which {args.pretrained_model_name_or_path!r} does not have: "
                "train it and join it with assemble.py."
            )
    if not pipeline.takes_sketch:
        raise ValueError(
            f"the UNet must take the drawing as its {pipeline.sample_channels + 1}th input channel, but {args.pretrained_model_name_or_path!r} has "
            f"{pipeline.unet.config.in_channels}: add it with `diffsketching_pipeline.expand_unet_for_sketch`."
        )
    if not isinstance(pipeline.scheduler, DDIMScheduler):
        raise ValueError(f"the chain is DDIM's, but the pipeline has a {type(pipeline.scheduler).__name__}.")
    for name in ("num_train_inference_steps", "ddpm_num_inference_steps"):
        try:
            check_scheduler(pipeline.scheduler, getattr(args, name))
        except ValueError as error:
            raise ValueError(
                f"`{name}={getattr(args, name)}` does not fit the pipeline's scheduler: {error}"
            ) from error
    if (args.resolution, args.resolution) != (pipeline.height, pipeline.width):
        raise ValueError(
            f"`resolution` must be the pipeline's, {pipeline.height} x {pipeline.width}, but got {args.resolution}."
        )


class FinetuneValidation:
    """
    The constraints on fixed validation photos and drawings, and a picture: drawings, photos before, photos after.

    `perceptual_loss_swapped` is reached when each photo's noise is given the drawing of another photo, and is held against
    that: a network that ignores the drawing in favor of what the noise remembers cannot lower it.
    """

    def __init__(
        self,
        args: FinetuneArguments,
        dataset: ChainDataset,
        pipeline: DiffSketchingPipeline,
        loss: DiffSketchingLoss,
        autocast: Callable[[], AbstractContextManager] = nullcontext,
    ):
        # Before and after are to differ by training alone, not by precision.
        self.autocast = autocast
        self.args = dataclasses.replace(args, backprop="chain", truncate_backprop_steps=None)
        self.pipeline, self.loss = pipeline, loss
        samples = [dataset.sample(i) for i in range(len(dataset))]
        self.batch: dict[str, Tensor] = {
            name: torch.stack([torch.as_tensor(sample[name]) for sample in samples])
            for name in ("pixel_values", "latents", "sketch", "class_label", "chain_step")
        }
        drawn = [i for i, sample in enumerate(samples) if (sample["sketch"] < 0).any()]
        shown = min(args.num_validation_images, len(drawn))
        self.shown = [drawn[i * len(drawn) // shown] for i in range(shown)]
        self.before = self.pictures(pipeline.unet) if self.shown else None

    @torch.no_grad()
    def pictures(self, unet: Any) -> Tensor:
        """Photos of the shown drawings with fixed seeds, [N, 3, R, R] in [-1, 1]."""
        pretrained, null_class = self.pipeline.unet, self.pipeline.null_class
        labels = [None if label == null_class else label for label in self.batch["class_label"][self.shown].tolist()]
        self.pipeline.register_modules(unet=unet)
        try:
            with self.autocast():
                images = self.pipeline(
                    self.batch["sketch"][self.shown],
                    class_labels=labels,
                    num_images_per_sketch=1,
                    num_inference_steps=self.args.ddpm_num_inference_steps,
                    sketch_abstraction=self.args.sketch_abstraction,
                    generator=[torch.Generator().manual_seed(i) for i in range(len(self.shown))],
                    output_type="pt",
                ).images
        finally:
            self.pipeline.register_modules(unet=pretrained)
        return images.float().cpu() * 2 - 1

    def chain_losses(self, unet: Any, batch: dict[str, Tensor]) -> DiffSketchingLosses:
        """Eq. 7 of what the chain makes of a batch."""
        pipeline = self.pipeline
        pred = run_chain(
            unet, unet.config, pipeline.scheduler, batch, self.args, pipeline.components, pipeline.null_class
        )
        return self.loss(decoded(pipeline, pred), batch["pixel_values"], batch["sketch"])

    def __call__(self, unet: Any) -> tuple[dict[str, float], dict[str, Tensor]]:
        """The mean constraints and the picture of a UNet."""
        values: dict[str, list[Tensor]] = {}
        size = self.args.train_batch_size
        swapped = self.batch["sketch"].roll(1, dims=0)
        for first in range(0, len(swapped), size):
            part = slice(first, first + size)
            batch = {name: value[part].to(unet.device) for name, value in self.batch.items()}
            losses = self.chain_losses(unet, batch)
            found = {"loss": losses.loss, "identity_loss": losses.identity, "perceptual_loss": losses.perceptual}
            if losses.perceptual is not None and len(swapped) > 1:
                other = self.chain_losses(unet, batch | {"sketch": swapped[part].to(unet.device)})
                found["perceptual_loss_swapped"] = other.perceptual
            for name, value in found.items():
                if value is not None:
                    values.setdefault(name, []).append(value)
        metrics = {name: float(torch.cat(parts).mean()) for name, parts in values.items()}
        if self.before is None:
            return metrics, {}
        rows = [self.batch["sketch"][self.shown], self.before, self.pictures(unet)]
        return metrics, {"sketch_before_after": image_grid(rows, scale=2)}


def load_frozen_pipeline(args: FinetuneArguments) -> DiffSketchingPipeline:
    """The pretrained pipeline in float32, none of whose parameters learns."""
    pipeline = DiffSketchingPipeline.from_pretrained(find_checkpoint(args.pretrained_model_name_or_path))
    check_pipeline(pipeline, args)
    pipeline.set_progress_bar_config(disable=True)
    for component in pipeline.components.values():
        if isinstance(component, nn.Module):
            component.eval().requires_grad_(False)
    return pipeline


def load_photos(
    args: FinetuneArguments, pipeline: DiffSketchingPipeline
) -> tuple[dict[str, PhotoSketchDataset], DiffSketchingPipeline]:
    """
    Photos on disk of both splits, never augmented, with what can be drawn of them, see the head of this file for the layouts;
    and the pipeline with those of their classes that it does not know added to its own.

    Raises:
        ValueError: there are none, or new classes, of which an adapter can learn nothing.
    """
    if args.conditioning_image_column is not None and args.dataset_name is None:
        raise ValueError("`conditioning_image_column` is a column of `dataset_name`: give that, too.")
    pairs, root = None, Path()
    if args.dataset_name is not None and args.conditioning_image_column is not None:
        check_dataset_name(args.dataset_name, has_columns=True)
        columns = (args.image_column, args.conditioning_image_column, args.label_column)
        pairs = load_dataset_pairs(args.dataset_name, *columns, cache_dir=args.cache_dir)
    elif args.train_data_dir is not None and (Path(args.train_data_dir) / "sketch").is_dir():
        pairs = find_pairs(Path(args.train_data_dir) / "photo", Path(args.train_data_dir) / "sketch")
    if pairs is not None:
        found = sorted({pair.label for pair in pairs if pair.label is not None})
    else:
        root = resolve_data_dir(args)
        found = list_images(root, "train")[1]
    grown = add_classes(pipeline, found)
    if args.lora_rank is not None and grown is not pipeline:
        new = sorted(set(found) - set(pipeline.id2label.values()))
        raise ValueError(
            f"`lora_rank` must be left out where the photos have new classes ({', '.join(new)}): an adapter has no "
            "embedding of a class."
        )
    names = class_names_of(grown)
    counts = {"train": args.max_train_samples, "validation": args.num_validation_samples}
    parts = split_pairs(pairs) if pairs is not None else None
    photos: dict[str, PhotoSketchDataset] = {}
    for split, count in counts.items():
        shared: dict[str, Any] = {"train": False, "cache_dir": args.cache_dir, "max_samples": count}
        if parts is not None:
            photos[split] = PairedPhotoDataset(
                parts[split], names, args.resolution, args.seed, null_class=grown.null_class, split=split, **shared
            )
        else:
            photos[split] = PhotoSketchDataset(
                root, split, args.resolution, args.seed, class_names=names, num_readers=num_readers(args), **shared
            )
    return photos, grown


def main(args: FinetuneArguments) -> None:
    """Fine-tunes as the arguments say; the pipeline lies in `output_dir/pipeline` afterwards."""
    check_finetune_arguments(args)
    pipeline = load_frozen_pipeline(args)
    # What the chain is told is what a call that leaves it out will be told, or the pictures would be of something else.
    options = SamplingOptions(sketch_abstraction=args.sketch_abstraction)
    resolved = options.resolve(pipeline, has_sketch=True, has_class=pipeline.num_classes > 0)
    args = dataclasses.replace(args, sketch_abstraction=resolved.sketch_abstraction)
    streamed = ShardedChainData(pipeline, args) if args.train_shards is not None else None
    if streamed is not None:
        photos: dict[str, PhotoSketchDataset] = {"validation": streamed.validation_photos()}
    else:
        photos, pipeline = load_photos(args, pipeline)
    cache_folder = Path(args.cache_dir if args.cache_dir is not None else args.output_dir) / "inverted"
    cache = NoiseCache(cache_folder, pipeline.unet, pipeline.scheduler, args, pipeline.vae)
    validation_dataset = ChainDataset(photos["validation"], cache, args, train=False)
    weights = None
    dataset: Any = streamed
    if streamed is None:
        dataset = ChainDataset(photos["train"], cache, args)
        weights = class_balanced_weights(dataset.class_labels, args.class_balance_power)

    unet = type(pipeline.unet).from_config(pipeline.unet.config)
    unet.load_state_dict(pipeline.unet.state_dict())
    if args.lora_rank is not None:
        torch.manual_seed(args.seed)
        add_lora(unet, args.lora_rank, args.lora_alpha)
    trainer = Trainer(args, {"unet": unet}, dataset, sample_weights=weights)
    accelerator = trainer.accelerator
    pipeline.to(accelerator.device)

    # 1. Photos to noise, each process its share of those that this run will see
    inverted = [(validation_dataset, validation_dataset.keys())]
    if streamed is None:
        inverted.insert(0, (dataset, dataset.keys(trainer.all_draws())))
    progress = tqdm(
        itertools.chain.from_iterable(each.views(keys) for each, keys in inverted),
        desc="Inverting photos",
        total=sum(len(keys) for _, keys in inverted),
        unit="photo",
        disable=not accelerator.is_local_main_process,
        mininterval=0.5 if sys.stderr.isatty() else 10,
        leave=False,
    )
    groups = in_groups(progress, args.inversion_batch_size)
    mine = itertools.islice(groups, accelerator.process_index, None, accelerator.num_processes)
    fill_noise_cache(cache, mine, pipeline.unet, pipeline.scheduler, args, accelerator.device, trainer.time_is_up)
    # Every process waits here, and all of them go on or none.
    if accelerator.gather(torch.tensor(trainer.time_is_up(), device=accelerator.device)).any():
        logger.info("`max_train_minutes` are over before all photos were inverted: start again to go on from here")
        return

    # 2. Training
    loss = make_loss(pipeline, args)
    validation = None
    if accelerator.is_main_process:
        validation = FinetuneValidation(args, validation_dataset, pipeline, loss, accelerator.autocast)
    if streamed is None:
        pipeline.unet.to("cpu")  # nothing needs the frozen one any more

    def compute_loss(batch: dict[str, Any]) -> dict[str, Tensor]:
        if "latents" not in batch:
            frozen = (pipeline.unet, pipeline.scheduler, args, pipeline.vae)
            batch = batch | {"latents": invert_photos(batch["pixel_values"], batch["class_label"], *frozen)}
        pred = run_chain(
            trainer.modules["unet"],
            unet.config,
            pipeline.scheduler,
            batch,
            args,
            pipeline.components,
            pipeline.null_class,
        )
        losses = loss(decoded(pipeline, pred), batch["pixel_values"], batch["sketch"])
        terms = {"perceptual_loss": losses.perceptual, "identity_loss": losses.identity}
        logged = {name: term.detach().mean() for name, term in terms.items() if term is not None}
        return {"loss": losses.loss.mean(), **logged}

    # Only the main process calls it, and only there is a validation.
    trainer.train(compute_loss, (lambda: validation(trainer.unwrap("unet"))) if validation is not None else None)

    # 3. The pipeline with the averaged weights, all of it in one type
    averaged = trainer.ema_copy("unet")
    if averaged is not None:
        pipeline.register_modules(unet=averaged)
        pipeline.to("cpu", getattr(torch, args.save_dtype))
        with write_folder(Path(args.output_dir) / "pipeline") as folder:
            pipeline.save_pretrained(folder)
        if args.lora_rank is not None:
            with write_folder(Path(args.output_dir) / "lora") as folder, trainer.ema_weights():
                save_lora(trainer.unwrap("unet"), folder)
        print(Path(args.output_dir) / "pipeline")
        trainer.push(Path(args.output_dir) / "pipeline")


if __name__ == "__main__":
    with stoppable(__file__):
        main(parse_args(FinetuneArguments, sys.argv[1:], description=__doc__))
