# SPDX-License-Identifier: Apache-2.0
"""The service of the drawing page, without looks: one model that reads drawings and makes photos for everybody who asks."""

import base64
import io
import json
import queue
import re
import threading
import time
import zipfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from diffusers.utils.torch_utils import randn_tensor
from PIL import Image

from diffsketching_pipeline.conditioning import class_entropy
from diffsketching_pipeline.deprecation import renamed_attributes
from diffsketching_pipeline.images.sketch_processor import SketchProcessor
from diffsketching_pipeline.pipeline_diffsketching import DiffSketchingPipeline
from diffsketching_pipeline.pipeline_diffsketching_edit import DiffSketchingEditPipeline
from diffsketching_pipeline.pipeline_diffsketching_interpolation import DiffSketchingInterpolationPipeline
from diffsketching_pipeline.results import class_record, metadata, model_record, png, sampling_record, sketch_image
from diffsketching_pipeline.schedulers import sampling_scheduler


# What one request may ask of a model that others wait for.
MAX_IMAGES = 8
MAX_FRAMES = 16
MAX_STEPS = 100
MAX_SEED = 2**32 - 1
# The arguments of the pipeline's call that a record keeps and a variation repeats.
CALL_SETTINGS = (
    "num_inference_steps",
    "sketch_guidance_scale",
    "classifier_guidance_scale",
    "perceptual_guidance_scale",
    "sketch_abstraction",
    "guidance_start",
    "guidance_end",
    "strength",
    "eta",
    "clip_sample",
)
_CALLBACK_TENSOR_INPUTS = ("latents", "pred_original_sample")
# A photo like another one is sampled anew in this share of the steps.
VARIATION_STRENGTH = 0.6
# Pictures of x̂_0 are sent after every so many steps; in between only the progress is.
PREVIEW_STEPS = 3
# Pixels of the page's square canvas, and of the lines that an uploaded drawing is redrawn with.
CANVAS_SIZE = 512
# The browser keeps about 5 MB a site, encrypted and with two bytes a character.
MAX_HISTORY_BYTES = 1_000_000
# Photos are of the model's size, drawings of the canvas's; one that came by the API may be larger.
MAX_PICTURE_SIDE = 4096

# The slider from "follow the drawing" (0) to "look real" (1), linear between its rows. Both scales are multiples of what
# the checkpoint recommends, that of sketch guidance of its distance from 1.0, which is off. The ends are where the sweep in
# model_card.md still trades one for the other: beyond them both get worse.
#   position, sketch guidance, classifier guidance, guidance_start, guidance_end
_REALISM = np.array(
    [
        (0.0, 2.0, 0.5, 0.0, 1.0),
        (0.5, 1.0, 1.0, 0.0, 1.0),
        (1.0, 0.0, 1.0, 0.0, 1.0),
    ]
)
# For a checkpoint that recommends nothing.
_DEFAULT_SCALES = {"sketch_guidance_scale": 2.0, "classifier_guidance_scale": 1.0}


@dataclass(frozen=True)
class Variation:
    """Other noise, that of `seed`, from the last `strength` of the steps on, in (0, 1]: a photo like the one it is of."""

    seed: int
    strength: float


@dataclass(frozen=True)
class PhotoRequest:
    """
    A request for photos: photo k of `drawing` uses seed + k. With `variations`, each of the one before, all share
    `seed` and photo k uses the last variation's seed + k.

    `realism` is the slider's position in [0, 1]; `settings` are arguments of the pipeline's call that overrule it.
    """

    drawing: Image.Image
    class_label: str | None = None
    num_images: int = 4
    seed: int = 0
    realism: float = 0.5
    settings: dict[str, Any] = field(default_factory=dict)
    variations: tuple[Variation, ...] = ()


@dataclass(frozen=True)
class Progress:
    """After `step` of `num_steps` steps; `images` are x̂_0 at some steps and `None` at the others."""

    step: int
    num_steps: int
    seconds_left: float
    images: list[Image.Image] | None = None


@dataclass(frozen=True, eq=False)
class Photos:
    """A finished request: each image with its record, which makes it again from the `sources`, pictures by name."""

    sources: dict[str, Image.Image]
    images: list[Image.Image]
    records: list[dict[str, Any]]


class _StoppedError(Exception):
    """Ends a call whose owner has stopped it."""


class DemoService:
    """
    One model for everybody: calls run one after another, each with its own seeds, and can be stopped by their owner alone.

    Args:
        pipe ([`DiffSketchingPipeline`]): on its device, and used by nobody else.
        model (`str`, *optional*): folder or hub id, for the records; `None` is the bundled model.
    """

    def __init__(self, pipe: DiffSketchingPipeline, model: str | None = None):
        self.pipe = pipe
        self.model_record = model_record(pipe, model)
        self._edit_pipe = DiffSketchingEditPipeline.from_pipe(pipe)
        self._interpolation_pipe = DiffSketchingInterpolationPipeline.from_pipe(pipe)
        for each in (pipe, self._edit_pipe, self._interpolation_pipe):
            each.set_progress_bar_config(disable=True)
        # Enlarged afterwards, which nobody sees and takes a quarter of the time.
        self._canvas_processor = SketchProcessor(CANVAS_SIZE // 2)
        # The one thread that samples: a pipeline keeps what belongs to its current call.
        self._executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix="sampling")
        self._running: list[tuple[str, threading.Event]] = []

    @property
    def class_names(self) -> list[str]:
        """The classes that a request may name."""
        return [str(self.pipe.id2label.get(index, index)) for index in range(self.pipe.num_classes)]

    def _class_of(self, label: str | int | None) -> str | int | None:
        """The class as the pipeline takes it: where it has numbers only, they are numbers."""
        if isinstance(label, str) and label.isdigit() and not self.pipe.id2label:
            return int(label)
        return label

    def read_drawing(self, path: str | Path, threshold: float | None = None) -> Image.Image:
        """
        The lines of an uploaded drawing, or photo of one, in black on transparent, `CANVAS_SIZE` pixels square. What is ink
        is found, or darker than a share `threshold` of its paper.

        Raises:
            ValueError: naming the file, if it cannot be read, is too large or holds no drawing.
        """
        try:
            sketch = self._canvas_processor.preprocess(str(path), threshold=threshold, max_drawings=1)[0, 0]
        except ValueError as error:
            # Where an upload was put is nobody's business, and it is the only one.
            message = str(error).removeprefix("sketch 0 ").replace(f"({str(path)!r})", str(path))
            raise ValueError(message.replace(str(path), Path(path).name)) from error
        lines = Image.fromarray(np.rint((1 - sketch.numpy()) * 127.5).astype(np.uint8))
        layer = Image.new("RGBA", (CANVAS_SIZE, CANVAS_SIZE), "black")
        layer.putalpha(lines.resize(layer.size, Image.Resampling.BICUBIC))
        return layer

    def preview_drawing(self, drawing: Image.Image) -> tuple[Image.Image, dict[str, float]]:
        """
        The drawing as the model sees it, and the probability of each class where the model can guess.

        Raises:
            ValueError: if it holds no drawing.
        """
        groups = self.pipe.prepare_sketches(drawing)
        assert groups is not None
        seen = sketch_image(groups[0].cpu())
        if self.pipe.sketch_encoder is None or self.pipe.num_classes == 0:
            return seen, {}
        probabilities = self.pipe.predict_class_probabilities(groups[0])
        return seen, dict(zip(self.class_names, probabilities.tolist(), strict=True))

    def is_unfamiliar(self, probabilities: dict[str, float]) -> bool:
        """Return whether a guess is as uncertain as of a drawing of none of the classes, by the checkpoint's own limit."""
        limit = self.pipe.recommended.get("max_class_entropy")
        return (
            bool(probabilities)
            and limit is not None
            and bool(class_entropy(torch.tensor(list(probabilities.values()))) > limit)
        )

    def call_settings(self, realism: float) -> dict[str, float]:
        """
        Arguments of the call for a position of the slider; 0.5 is what the checkpoint recommends.

        Raises:
            ValueError: for a position outside [0, 1].
        """
        if not 0.0 <= realism <= 1.0:
            raise ValueError(f"`realism` has to be in [0, 1] but is {realism}.")
        sketch, classifier, start, end = (float(np.interp(realism, _REALISM[:, 0], row)) for row in _REALISM.T[1:])
        settings = {"guidance_start": start, "guidance_end": end}
        scales = {**_DEFAULT_SCALES, **self.pipe.recommended}
        if self.pipe.takes_sketch:
            settings["sketch_guidance_scale"] = 1.0 + sketch * (scales["sketch_guidance_scale"] - 1.0)
        if self.pipe.classifier is not None:
            settings["classifier_guidance_scale"] = classifier * scales["classifier_guidance_scale"]
        return settings

    def make_photos(self, request: PhotoRequest, owner: str) -> Iterator[Progress | Photos]:
        """
        Progress after each step and the photos at last, unless `stop(owner)` came before.

        Raises:
            ValueError: for a request that is out of bounds or that the pipeline refuses.
        """
        settings = self.call_settings(request.realism) | {k: v for k, v in request.settings.items() if v is not None}
        _check_request(request, settings)
        seeds = [request.seed + (0 if request.variations else k) for k in range(request.num_images)]
        generators = [torch.Generator("cpu").manual_seed(seed) for seed in seeds]

        def sample(on_step_end: Callable) -> Photos:
            out = self.pipe(
                request.drawing,
                class_labels=self._class_of(request.class_label),
                num_images_per_sketch=request.num_images,
                generator=generators,
                callback_on_step_end=on_step_end,
                callback_on_step_end_tensor_inputs=_CALLBACK_TENSOR_INPUTS,
                **settings,
            )
            common = class_record(request.class_label, out) | sampling_record(self.pipe, settings)
            records = []
            for k, seed in enumerate(seeds):
                variations = [asdict(variation) for variation in request.variations]
                if variations:
                    variations[-1]["seed"] += k
                name = "_".join(str(number) for number in (seed, *(v["seed"] for v in variations)))
                records.append({"file": f"photo_{name}.png", "seed": seed, "variations": variations, **common})
            return Photos({"drawing": request.drawing}, out.images, records)

        return self._run(sample, owner, self._change_noise(request.variations, settings, generators))

    def edit_photo(
        self,
        photo: Image.Image,
        strokes: Image.Image,
        class_label: str | None,
        num_images: int,
        seed: int,
        strength: float,
        owner: str,
    ) -> Iterator[Progress | Photos]:
        """
        Yield the same as `make_photos`, but with photos changed where `strokes`, on the photo's page, have been drawn.

        Raises:
            ValueError: as [`DiffSketchingEditPipeline`] does, or for a request that is out of bounds.
        """
        _check_counts(num_images, seed)
        settings: dict[str, Any] = {"strength": strength}

        def sample(on_step_end: Callable) -> Photos:
            out = self._edit_pipe(
                photo,
                sketch=strokes,
                class_labels=self._class_of(class_label),
                num_images_per_sketch=num_images,
                generator=[torch.Generator("cpu").manual_seed(seed + k) for k in range(num_images)],
                callback_on_step_end=on_step_end,
                callback_on_step_end_tensor_inputs=_CALLBACK_TENSOR_INPUTS,
                **settings,
            )
            common = class_record(class_label, out) | sampling_record(self._edit_pipe, settings)
            records = [{"file": f"edit_{seed + k}.png", "seed": seed + k, **common} for k in range(num_images)]
            return Photos({"photo": photo, "drawing": strokes}, out.images, records)

        return self._run(sample, owner)

    def interpolate(
        self, drawings: list[Image.Image], class_label: str | None, num_frames: int, seed: int, owner: str
    ) -> Iterator[Progress | Photos]:
        """
        Yield the same as `make_photos`, but with the frames from the first drawing to the last, all with the same noise.

        Raises:
            ValueError: as [`DiffSketchingInterpolationPipeline`] does, or for a request that is out of bounds.
        """
        _check_counts(1, seed)
        if not 2 <= num_frames <= MAX_FRAMES:
            raise ValueError(f"`num_frames` has to be between 2 and {MAX_FRAMES} but is {num_frames}.")

        def sample(on_step_end: Callable) -> Photos:
            out = self._interpolation_pipe(
                drawings,
                class_labels=self._class_of(class_label),
                num_frames=num_frames,
                # One for each drawing, so that the frames on them are the photos of that seed.
                generator=[torch.Generator("cpu").manual_seed(seed) for _ in drawings],
                callback_on_step_end=on_step_end,
                callback_on_step_end_tensor_inputs=_CALLBACK_TENSOR_INPUTS,
            )
            common = class_record(class_label, out) | sampling_record(self._interpolation_pipe, {})
            records = [{"file": f"frame_{k:02d}.png", "seed": seed, **common} for k in range(num_frames)]
            return Photos({f"drawing_{k}": drawing for k, drawing in enumerate(drawings)}, out.images, records)

        return self._run(sample, owner)

    def stop(self, owner: str) -> None:
        """Ends what this owner has running before the network's next step, and nothing else."""
        for name, stopped in list(self._running):
            if name == owner:
                stopped.set()

    def _run(
        self,
        sample: Callable,
        owner: str,
        change_latents: Callable = lambda step_index, callback_kwargs: callback_kwargs,
    ) -> Iterator[Progress | Photos]:
        """
        Runs `sample(callback_on_step_end)` in the sampling thread. Closing the iterator stops it, too: that is what
        happens to somebody who leaves.
        """
        updates: queue.SimpleQueue[Progress | None] = queue.SimpleQueue()
        stopped = threading.Event()
        step, began = 0, 0.0

        def before_network(unet, args):
            nonlocal began
            if stopped.is_set():
                raise _StoppedError
            if step == 0:
                began = time.perf_counter()

        def on_step_end(pipe, step_index, timestep, callback_kwargs):
            nonlocal step
            step, num_steps = step_index + 1, pipe.num_timesteps
            seconds_left = (time.perf_counter() - began) / step * (num_steps - step)
            images = None
            if step_index % PREVIEW_STEPS == 0 and step < num_steps:
                images = pipe.decode_latents(callback_kwargs["pred_original_sample"], "pil")
            updates.put(Progress(step, num_steps, seconds_left, images))
            return change_latents(step_index, callback_kwargs)

        def work():
            # The network is watched, and not only the steps: an edit inverts its photo before the first of them.
            with self.pipe.unet.register_forward_pre_hook(before_network):
                return sample(on_step_end)

        self._running.append((owner, stopped))
        future = self._executor.submit(work)
        future.add_done_callback(lambda _: updates.put(None))
        try:
            while (update := updates.get()) is not None:
                yield update
            result = future.result()
            if not stopped.is_set():
                yield result
        except _StoppedError:
            pass
        finally:
            stopped.set()
            self._running.remove((owner, stopped))

    def _change_noise(
        self, variations: tuple[Variation, ...], settings: dict[str, Any], generators: list[torch.Generator]
    ) -> Callable[[int, dict[str, Any]], dict[str, Any]]:
        """A change of latents that noises x̂_0 anew where a variation begins; its seed rules from there on."""
        steps = self.pipe.resolve_num_inference_steps(settings.get("num_inference_steps"))
        scheduler = sampling_scheduler(self.pipe.scheduler, steps, self.pipe.device)
        timesteps = scheduler.timesteps
        last = len(timesteps) - 1
        begins = {min(max(round((1 - v.strength) * len(timesteps)), 1), last): v for v in variations}

        def change(step_index: int, callback_kwargs: dict[str, Any]) -> dict[str, Any]:
            next_step = step_index + 1
            if next_step not in begins:
                return callback_kwargs
            variation = begins[next_step]
            for k, generator in enumerate(generators):
                generator.manual_seed(variation.seed + (k if variation is variations[-1] else 0))
            estimate = callback_kwargs["pred_original_sample"]
            noise = randn_tensor(estimate.shape, generator=generators, device=estimate.device, dtype=estimate.dtype)
            return {"latents": scheduler.add_noise(estimate, noise, timesteps[next_step : next_step + 1])}

        return change

    def archive(self, photos: Photos) -> bytes:
        """A zip file of the images and their sources as PNG, and the metadata.json that makes them again."""
        file = io.BytesIO()
        with zipfile.ZipFile(file, "w") as archive:
            for name, source in photos.sources.items():
                archive.writestr(f"{name}.png", png(source))
            for image, record in zip(photos.images, photos.records, strict=True):
                archive.writestr(record["file"], png(image))
            archive.writestr("metadata.json", metadata(self.model_record, photos.records))
        return file.getvalue()


def example_drawings() -> list[Path]:
    """The drawings that come with the package; in a checkout they lie beside it."""
    here = Path(__file__).parents[1]
    folders = (here / "drawings", here.parent / "examples" / "drawings")
    return next((drawings for folder in folders if (drawings := sorted(folder.glob("*.png")))), [])


def _check_request(request: PhotoRequest, settings: dict[str, Any]) -> None:
    """Check what the pipeline leaves open because it has its caller's machine to itself."""
    _check_counts(request.num_images, request.seed)
    steps = settings.get("num_inference_steps")
    if steps is not None and not 1 <= steps <= MAX_STEPS:
        raise ValueError(f"`num_inference_steps` has to be between 1 and {MAX_STEPS} here but is {steps}.")
    for variation in request.variations:
        if not (0.0 < variation.strength <= 1.0 and 0 <= variation.seed <= MAX_SEED):
            raise ValueError(
                f"`variations` have to have a strength in (0, 1] and a seed up to {MAX_SEED}: {variation}."
            )


def _check_counts(num_images: int, seed: int) -> None:
    if not 1 <= num_images <= MAX_IMAGES:
        raise ValueError(f"`num_images` has to be between 1 and {MAX_IMAGES} but is {num_images}.")
    if not 0 <= seed <= MAX_SEED:
        raise ValueError(f"`seed` has to be between 0 and {MAX_SEED} but is {seed}.")


def more_like_this(photos: Photos, index: int, seed: int, num_images: int = 4) -> PhotoRequest:
    """
    Return a request for photos like the one at `index`, closer to it than it was to its own where it is a variation.

    Raises:
        ValueError: if there is no such photo.
    """
    if not 0 <= index < len(photos.records):
        raise ValueError(f"`index` has to be between 0 and {len(photos.records) - 1} but is {index}.")
    record = photos.records[index]
    before = tuple(Variation(**variation) for variation in record["variations"])
    strength = VARIATION_STRENGTH * (before[-1].strength if before else 1.0)
    return PhotoRequest(
        photos.sources["drawing"],
        record["class_label"],
        num_images,
        record["seed"],
        settings={name: record[name] for name in CALL_SETTINGS if name in record},
        variations=(*before, Variation(seed, strength)),
    )


# What a browser keeps: the server forgets everybody's drawings and photos.


def remember(history: list[dict[str, Any]], photos: Photos) -> list[dict[str, Any]]:
    """`history` with `photos` in front, as JSON values; the oldest are dropped beyond `MAX_HISTORY_BYTES`."""
    pictures = [base64.b64encode(png(image)).decode() for image in (photos.sources["drawing"], *photos.images)]
    kept: list[dict[str, Any]] = []
    size = 0
    for entry in [{"pictures": pictures, "records": photos.records}, *history]:
        size += len(json.dumps(entry))
        if size > MAX_HISTORY_BYTES:
            break
        kept.append(entry)
    return kept


def recall(entry: Any) -> Photos:
    """
    The photos of an entry of the history.

    Raises:
        ValueError: if it is not one that `remember` made; the browser's owner may have changed it.
    """
    try:
        pictures, records = entry["pictures"], entry["records"]
        if not 1 <= len(records) <= MAX_IMAGES or len(pictures) != len(records) + 1:
            raise ValueError("its photos and records differ in number, or are too many")
        if sum(map(len, pictures)) > MAX_HISTORY_BYTES:
            raise ValueError("its pictures are too large")
        for record in records:
            _check_record(record)
        drawing, *images = (_read_png(picture) for picture in pictures)
        return Photos({"drawing": drawing}, images, [dict(record) for record in records])
    except (ValueError, KeyError, TypeError, AttributeError, OSError, SyntaxError, MemoryError) as error:
        raise ValueError(f"this entry of the history cannot be read: {error}.") from error


def _check_record(record: Any) -> None:
    """Refuse a record that is of other types or beyond other bounds than those that are made here."""
    if not re.fullmatch(r"photo(_\d{1,10}){1,64}\.png", record["file"]):
        raise ValueError(f"its file is {record['file'][:60]!r}")
    variations = [Variation(**variation) for variation in record["variations"]]
    seeds, strengths = [record["seed"], *(v.seed for v in variations)], [v.strength for v in variations]
    settings = [record.get(name) for name in CALL_SETTINGS]
    if not all(type(value) is int and 0 <= value < MAX_SEED + MAX_IMAGES for value in seeds):
        raise ValueError("its seeds are out of range")
    if not all(type(value) in (int, float) and 0 < value <= 1 for value in strengths):
        raise ValueError("its strengths are out of range")
    if not all(value is None or (isinstance(value, (bool, int, float)) and abs(value) < 1e6) for value in settings):
        raise ValueError("its settings are out of range")
    if not isinstance(record["class_label"], (str, int, type(None))):
        raise ValueError("its class is none")


def _read_png(picture: str) -> Image.Image:
    image = Image.open(io.BytesIO(base64.b64decode(picture)), formats=["PNG"])
    if max(image.size) > MAX_PICTURE_SIDE:
        raise ValueError(f"a picture has {image.width} x {image.height} pixels")
    image.load()
    return image


# A type checker would take it for a module that has any name.
if not TYPE_CHECKING:
    __getattr__ = renamed_attributes(__name__, Studio="DemoService")
