# SPDX-License-Identifier: Apache-2.0
"""The drawing page: what is on it, and which part of it calls what in `service.py`."""

import functools
import html
import json
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gradio as gr
from gradio.processing_utils import hash_bytes
from gradio.utils import LRUCache, get_upload_folder
from gradio_client.utils import is_http_url_like
from PIL import Image, ImageOps

from diffsketching_pipeline.demo.service import (
    CANVAS_SIZE,
    MAX_FRAMES,
    MAX_HISTORY_BYTES,
    MAX_IMAGES,
    MAX_SEED,
    MAX_STEPS,
    DemoService,
    PhotoRequest,
    Photos,
    Progress,
    example_drawings,
    more_like_this,
    recall,
    remember,
)
from diffsketching_pipeline.files import write_file
from diffsketching_pipeline.messages import brief
from diffsketching_pipeline.results import png


# Requests that may wait; whoever comes then is told that the queue is full.
MAX_WAITING = 16
# Pictures that were shown are deleted after an hour; every ten minutes it is looked for them.
DELETE_CACHE = (600, 3600)
# Whatever samples takes turns; looking at a drawing does not wait for it.
_SAMPLING: dict[str, Any] = {"concurrency_id": "sampling", "concurrency_limit": 1}
# These take their turns in the service, where those that wait can be stopped, too.
_LIVE: dict[str, Any] = {"concurrency_id": "live", "concurrency_limit": 4}
_PRIVATE: dict[str, Any] = {"api_visibility": "private"}
_GUESS = "let it guess"
_DOUBT = "This may be none of the things that it knows. If it is one, choose which below."
_UPLOADS = ("image", ".svg", ".ndjson")
_COPY = "canvas => canvas"
_HAND_OVER = f"(canvas, seed, keep) => [canvas, keep ? seed : Math.floor(Math.random() * {MAX_SEED})]"
CSS = """
/* Scroll bars and fields that are the browser's own. */
.dark { color-scheme: dark; }
/* Each pixel that the model sees is to be told apart. */
.seen img { image-rendering: pixelated; width: 100%; height: 100%; padding-top: 28px; object-fit: contain; }
/* One colour is all there is to draw with. */
button[aria-label="Color"] { display: none; }
/* A row of small pictures, however few they are. */
#earlier .grid-container { grid-template-columns: repeat(auto-fill, 120px); }
.status progress { width: 100%; height: 8px; appearance: none; border: 0; background: var(--border-color-primary); }
.status progress::-webkit-progress-bar { background: var(--border-color-primary); }
.status progress::-webkit-progress-value { background: var(--color-accent); }
.status progress::-moz-progress-bar { background: var(--color-accent); }
"""


@contextmanager
def _told_to_user() -> Iterator[None]:
    """Show on the page what the library refuses; the log is for what nobody expected."""
    try:
        yield
    except ValueError as error:
        raise gr.Error(str(error), print_exception=False) from error


class _Handlers:
    """Handlers of the page's events, each from the values of its inputs to those of its outputs."""

    def __init__(self, service: DemoService):
        self.service = service

    def read_upload(self, path: str | None, threshold: float) -> Any:
        if path is None:
            return gr.skip()
        with _told_to_user():
            return _on_canvas(self.service.read_drawing(path, threshold or None))

    def read_example(self, index: int) -> dict[str, Any]:
        return _on_canvas(self.service.read_drawing(example_drawings()[index]))

    def preview_drawing(self, drawing) -> tuple[Any, Any, str]:
        """The drawing as the model sees it, its guess, and a sentence if it may be of none of the classes."""
        try:
            seen, probabilities = self.service.preview_drawing(_drawing(drawing))
        except ValueError:
            # Mostly blank: no reason to alarm somebody who has not asked for photos yet.
            return None, None, ""
        return seen, probabilities or None, _DOUBT if self.service.is_unfamiliar(probabilities) else ""

    def make_photos(
        self,
        request: gr.Request,
        drawing,
        class_label=_GUESS,
        num_images=4,
        realism=0.5,
        seed=0,
        num_inference_steps=None,
        sketch_guidance_scale=None,
        classifier_guidance_scale=None,
        perceptual_guidance_scale=None,
        guidance_start=None,
        guidance_end=None,
        strength=None,
        eta=None,
        clip_sample=None,
    ):
        """Photos of a drawing; what is None is the slider's (`realism`), or the checkpoint's recommendation."""
        written = {
            "num_inference_steps": num_inference_steps,
            "sketch_guidance_scale": sketch_guidance_scale,
            "classifier_guidance_scale": classifier_guidance_scale,
            "perceptual_guidance_scale": perceptual_guidance_scale,
            "guidance_start": guidance_start,
            "guidance_end": guidance_end,
            "strength": strength,
            "eta": eta,
        }
        with _told_to_user():
            label = _label(class_label)
            settings: dict[str, Any] = {name: _number(name, text) for name, text in written.items()}
            settings["clip_sample"] = _CLIP.get(clip_sample)
            wish = PhotoRequest(_drawing(drawing), label, int(num_images), int(seed), realism, settings)
            yield from _show(self.service.make_photos(wish, str(request.session_hash)))

    def stop_live(self, request: gr.Request, live: bool) -> None:
        """Gives up the photos of the strokes before."""
        if live:
            self.service.stop(str(request.session_hash))

    def make_photos_live(self, request: gr.Request, live: bool, *values):
        if live:
            yield from self.make_photos(request, *values)
        else:
            yield gr.skip(), gr.skip(), gr.skip()

    def more_like_this(self, request: gr.Request, photos: Photos | None, selected: int):
        with _told_to_user():
            if photos is None:
                raise ValueError("There is no photo yet: make some, and choose one.")
            wish = more_like_this(photos, selected, secrets.randbelow(MAX_SEED))
            yield from _show(self.service.make_photos(wish, str(request.session_hash)))

    def start_edit(self, photos: Photos | None, selected: int) -> tuple[Any, Any, Any]:
        """The chosen photo on the canvas of the other tab, large enough to draw on, its class, and that tab."""
        with _told_to_user():
            if photos is None:
                raise ValueError("There is no photo yet: make some, and choose one.")
        photo = ImageOps.contain(photos.images[selected], (CANVAS_SIZE, CANVAS_SIZE))
        canvas = {"background": photo, "layers": [], "composite": photo}
        label = photos.records[selected]["class_label"]
        return canvas, _GUESS if label is None else str(label), gr.Tabs(selected="edit")

    def edit_photo(self, request: gr.Request, photo, class_label=_GUESS, num_images=2, strength=0.9, seed=0):
        """Photos that have changed where the canvas's layer was drawn on."""
        with _told_to_user():
            if photo is None or photo["background"] is None or not photo["layers"]:
                raise ValueError(
                    "There is nothing to edit yet: upload a photo or start from one you made, and draw on it."
                )
            background, strokes = photo["background"].convert("RGB"), _stacked(None, photo["layers"]).convert("RGB")
            label, owner = _label(class_label), str(request.session_hash)
            yield from _show(
                self.service.edit_photo(background, strokes, label, int(num_images), int(seed), strength, owner)
            )

    def interpolate(self, request: gr.Request, first, last, class_label=_GUESS, num_frames=8, seed=0):
        """Frames from one drawing to another."""
        with _told_to_user():
            drawings = [_drawing(first), _drawing(last)]
            owner = str(request.session_hash)
            yield from _show(
                self.service.interpolate(drawings, _label(class_label), int(num_frames), int(seed), owner)
            )

    def stop(self, request: gr.Request) -> str:
        self.service.stop(str(request.session_hash))
        return "Stopped."

    def keep(self, photos: Photos | None, history: Any) -> Any:
        return gr.skip() if photos is None else remember(_entries(history), photos)

    def pack(self, photos: Photos | None) -> Any:
        """The button that downloads them."""
        if photos is None:
            return gr.skip()
        name = f"photos_{photos.records[0]['seed']}.zip"
        path = _cached(self.service.archive(photos), name)
        return gr.DownloadButton(value=path, interactive=True)

    def reopen(self, history: Any, event: gr.SelectData):
        """Values of the gallery, the photos and the seed, of one entry of the history."""
        with _told_to_user():
            entries = _entries(history)
            if not (isinstance(event.index, int) and 0 <= event.index < len(entries)):
                raise ValueError("There is no such entry of the history.")
            photos = recall(entries[event.index])
        return _captioned(photos), photos, photos.records[0]["seed"]


def _on_canvas(lines: Image.Image) -> dict[str, Any]:
    """A value of the canvas: `lines` are a layer, not the background, so that the eraser works on them."""
    page = Image.new("RGBA", lines.size, "white")
    return {"background": None, "layers": [lines], "composite": Image.alpha_composite(page, lines)}


def _progress_bar(progress: Progress) -> str:
    # Gradio's own bar is hidden by what a generator yields.
    text = f"step {progress.step} of {progress.num_steps}, {progress.seconds_left:.0f} s left"
    return f'<label>{text} <progress value="{progress.step}" max="{progress.num_steps}"></progress></label>'


def _index_of(event: gr.SelectData) -> int:
    return event.index


def _show(updates: Iterator[Progress | Photos]) -> Iterator[tuple[Any, Any, Any]]:
    """Values of the gallery, of the line below it and of the photos, as they form."""
    previews: Any = gr.skip()
    for update in updates:
        if isinstance(update, Photos):
            yield _captioned(update), "", update
            return
        # They are sent again until there are new ones: for what is skipped, Gradio makes a new component each time and
        # keeps it for as long as the session lasts.
        if update.images:
            previews = [_cached(png(image), "preview.png") for image in update.images]
        yield previews, _progress_bar(update), gr.skip()
    yield previews, "Stopped.", None


def _label(choice: str) -> str | None:
    return None if choice == _GUESS else choice


def _drawing(canvas: dict[str, Any] | None) -> Image.Image:
    """Return the picture that a canvas shows; a program may leave the composite to us."""
    canvas = canvas or {}
    layers = canvas.get("layers") or []
    shown = canvas.get("composite") or (None if layers else canvas.get("background"))
    if shown is None and not layers:
        raise ValueError("There is no drawing yet: draw, upload or choose one.")
    return shown or _stacked(canvas.get("background"), layers)


def _stacked(page: Image.Image | None, layers: list[Image.Image]) -> Image.Image:
    """The layers of a canvas over its background, a white page when left out."""
    parts = [part.convert("RGBA") for part in (page or Image.new("RGBA", layers[0].size, "white"), *layers)]
    if len(sizes := {part.size for part in parts}) > 1:
        raise ValueError(f"The background and layers of a drawing must have one size, but have {sorted(sizes)}.")
    return functools.reduce(Image.alpha_composite, parts)


def _cached(content: bytes, name: str) -> str:
    """
    A file in Gradio's cache. Gradio would write it in place, and a browser may be reading the same picture of another
    request. Only the last part of the name counts: a history that a browser kept may say anything.
    """
    path = Path(get_upload_folder()) / hash_bytes(content) / Path(name).name
    path.parent.mkdir(parents=True, exist_ok=True)
    write_file(path, content)
    return str(path)


def _captioned(photos: Photos) -> list[tuple[str, str]]:
    files = [_cached(png(image), "photo.png") for image in photos.images]
    names = [record["file"].removesuffix(".png").split("_", 1)[1] for record in photos.records]
    label = photos.records[0]["class_label"]
    return [(file, name if label is None else f"{label} {name}") for file, name in zip(files, names, strict=True)]


def _entries(history: Any) -> list[Any]:
    """The history that a browser kept, none where it was changed into something else, and no more than fits into it."""
    entries, size = [], 0
    for entry in history if isinstance(history, list) else []:
        size += len(json.dumps(entry))
        if size > MAX_HISTORY_BYTES:
            break
        entries.append(entry)
    return entries


def _show_history(history: Any) -> list[tuple[str, str]]:
    """The first photo of each entry; what cannot be read any more is left out with all that is older."""
    shown = []
    for entry in _entries(history):
        try:
            shown.append(_captioned(recall(entry))[0])
        except ValueError:
            break
    return shown


# Of each argument of the call that takes a number, in the order of `_Handlers.make_photos`. They are fields of text
# because Gradio's fields of numbers cannot be empty: they become 0 as soon as they are shown.
_SLIDERS, _MODELS = {"placeholder": "the slider's"}, {"placeholder": "the model's"}
_EXPERT_FIELDS: dict[str, dict[str, Any]] = {
    "num_inference_steps": {"label": "Steps", "info": f"1 to {MAX_STEPS}", **_MODELS},
    "sketch_guidance_scale": {"label": "Sketch guidance", "info": "1 is off", **_SLIDERS},
    "classifier_guidance_scale": {"label": "Classifier guidance", "info": "0 is off", **_SLIDERS},
    "perceptual_guidance_scale": {"label": "Perceptual guidance", "info": "0 is off", **_MODELS},
    "guidance_start": {"label": "Guidance from", "info": "0 to 1 of the steps", **_SLIDERS},
    "guidance_end": {"label": "Guidance until", "info": "0 to 1 of the steps", **_SLIDERS},
    "strength": {"label": "Strength", "info": "below 1 from the drawing", **_MODELS},
    "eta": {"label": "Eta", "info": "0 to 1 of fresh noise", **_MODELS},
}
_CLIP = {"the scheduler's": None, "yes": True, "no": False}


def _number(name: str, text: str | None) -> float | None:
    """Return the number written into a field of the drawer, `None` if it is empty."""
    if text is None or not text.strip():
        return None
    try:
        number = float(text)
    except ValueError as error:
        label = _EXPERT_FIELDS[name]["label"]
        raise ValueError(f'"{label}" has to be a number, or empty, but is {text!r}.') from error
    return int(number) if number.is_integer() else number


def _expert_drawer() -> list[gr.components.Component]:
    with gr.Accordion("Expert", open=False, elem_id="expert"):
        gr.Markdown("What is left empty is the slider's, or the model's own.")
        with gr.Row():
            fields = [
                gr.Textbox(max_lines=1, min_width=140, elem_id=name, **options)
                for name, options in _EXPERT_FIELDS.items()
            ]
            clip = gr.Dropdown([*_CLIP], label="Clip", info="x̂_0 to [-1, 1] in each step", min_width=140)
    return [*fields, clip]


def _canvas(name: str, label: str, **options: Any) -> gr.ImageEditor:
    options = {
        # An empty layer, because without one the brush has to be chosen first.
        "value": _on_canvas(Image.new("RGBA", (CANVAS_SIZE, CANVAS_SIZE))),
        "sources": (),
        "fixed_canvas": True,
        **options,
    }
    canvas = gr.ImageEditor(
        label=label,
        height=f"min({CANVAS_SIZE + 80}px, 90vw)",
        format="png",
        transforms=(),
        layers=False,
        buttons=[],
        brush=gr.Brush(default_size=6, colors=["#000000"], color_mode="fixed"),
        eraser=gr.Eraser(default_size=24),
        canvas_size=(CANVAS_SIZE, CANVAS_SIZE),
        elem_id=f"{name}-canvas",
        **options,
    )
    # A drawing waits here until its request is read, which never happens where the queue is full.
    canvas.blob_storage = LRUCache(4 * MAX_WAITING)
    return canvas


def _relay_of(canvas: gr.ImageEditor, **options: Any) -> gr.ImageEditor:
    """
    Return the input of the events, which hands the canvas over: the browser copies the canvas's value to it.

    Gradio 6.21 to 6.31 reads a component that was an event's input anew, and uploads it, with each message about any event
    thereafter; that of a canvas costs a tenth of a second without a graphics card.
    """
    relay = gr.ImageEditor(**{"type": "pil", "image_mode": "RGB", "label": "drawing", "visible": False, **options})
    relay.blob_storage = canvas.blob_storage
    return relay


def _seed(name: str) -> tuple[gr.Number, gr.Checkbox]:
    with gr.Row():
        seed = gr.Number(
            0, label="Seed", precision=0, minimum=0, maximum=MAX_SEED, min_width=120, elem_id=f"{name}-seed"
        )
        return seed, gr.Checkbox(label="Keep this seed", min_width=120, elem_id=f"{name}-keep-seed")


def _class(handlers: _Handlers) -> gr.Dropdown:
    return gr.Dropdown([_GUESS, *handlers.service.class_names], value=_GUESS, label="What it is")


@dataclass
class _Results:
    """The components that show the images of a tab."""

    gallery: gr.Gallery
    status: gr.HTML
    photos: gr.State
    make: gr.Button
    stop: gr.Button
    download: gr.DownloadButton

    @classmethod
    def place(cls, name: str, label: str, columns: int = 2) -> "_Results":
        with gr.Row():
            make = gr.Button(f"Make {label.lower()}", variant="primary", elem_id=f"{name}-make", min_width=120)
            stop = gr.Button("Stop", elem_id=f"{name}-stop", min_width=120)
        status = gr.HTML(elem_id=f"{name}-status", elem_classes="status", min_height=40)
        gallery = gr.Gallery(
            label=label,
            columns=columns,
            height="auto",
            format="png",
            buttons=["download", "fullscreen"],
            interactive=False,
            elem_id=f"{name}-photos",
        )
        download = gr.DownloadButton("Download all", interactive=False, elem_id=f"{name}-download")
        return cls(gallery, status, gr.State(), make, stop, download)

    @property
    def shown(self) -> dict[str, Any]:
        """Arguments of an event whose images are shown here."""
        return {
            "outputs": [self.gallery, self.status, self.photos],
            "show_progress_on": self.status,
            **_SAMPLING,
        }

    def end(self, handlers: _Handlers, events: list[Any]) -> None:
        """Connect what follows `events` whose images are shown here, and what stops them."""
        stopped = self.stop.click(handlers.stop, None, self.status, cancels=events, queue=False, **_PRIVATE)
        # Said twice, because the step that was on its way may arrive after the first time.
        stopped.then(lambda: "Stopped.", None, self.status, queue=False, show_progress="hidden", **_PRIVATE)
        self.photos.change(handlers.pack, self.photos, self.download, show_progress="hidden", **_PRIVATE)


def build_page(service: DemoService) -> gr.Blocks:
    """The page over `service`, to be launched with [`launch`]."""
    # Gradio keeps ten thousand events and draws up statistics of them with each new one, also where nobody may see them.
    os.environ.setdefault("GRADIO_ANALYTICS_MAX_EVENTS", "1")
    os.environ.setdefault("GRADIO_ANALYTICS_CACHE_FREQUENCY", "1000")
    handlers = _Handlers(service)
    with gr.Blocks(title="DiffSketching", analytics_enabled=False, delete_cache=DELETE_CACHE) as page:
        gr.Markdown("# DiffSketching\nDraw a shape, and watch photos of it appear.")
        if service.class_names:
            # Names come from a file, and Markdown would do what they say.
            names = ", ".join(brief(name) for name in service.class_names)
            gr.HTML(f"<p>It knows {len(service.class_names)} things: {html.escape(names)}.</p>", elem_id="classes")
        with gr.Tabs() as tabs:
            with gr.Tab("Draw", id="draw"):
                canvas, results, selected, start_edit = _draw_tab(handlers, page)
            with gr.Tab("Edit a photo", id="edit"):
                photo, class_label = _edit_tab(handlers)
            with gr.Tab("In between", id="between"):
                _interpolation_tab(handlers, canvas)
        start_edit.click(
            handlers.start_edit,
            [results.photos, selected],
            [photo, class_label, tabs],
            show_progress_on=tabs,
            **_PRIVATE,
        )
    for block in page.blocks.values():
        if isinstance(block, gr.components.Component):
            _take_no_addresses(block)
    page.queue(max_size=MAX_WAITING)
    return page


def _take_no_addresses(block: gr.components.Component) -> None:
    """Refuse the address of a file, which Gradio would download for whoever asks."""
    move = block.async_move_resource_to_block_cache

    async def move_local(path: Any) -> Any:
        if is_http_url_like(str(path)):
            raise gr.Error("The drawing is an address, not a file: download it first.", print_exception=False)
        return await move(path)

    block.async_move_resource_to_block_cache = move_local  # type: ignore[method-assign,assignment]


def _draw_tab(handlers: _Handlers, page: gr.Blocks) -> tuple[gr.ImageEditor, _Results, gr.State, gr.Button]:
    history = gr.BrowserState([], storage_key="diffsketching-history", secret="diffsketching")
    selected = gr.State(0)
    # Two rows, so that on a phone, where columns follow each other, the button and the photos come soon after the canvas.
    with gr.Row():
        with gr.Column():
            canvas = _canvas("draw", "Your drawing")
            upload = gr.UploadButton("Upload a drawing, or a photo of one", file_types=[*_UPLOADS], elem_id="upload")
            threshold = gr.Slider(
                0, 0.95, 0, step=0.05, label="Ink of an upload: darker than this share of the paper (0: found)",
                elem_id="threshold",
            )  # fmt: skip
            with gr.Row():
                seen = gr.Image(
                    label="The model sees",
                    interactive=False,
                    buttons=[],
                    height=180,
                    elem_classes="seen",
                    min_width=140,
                )
                guess = gr.Label(label="It takes it for", num_top_classes=3, min_width=140)
            doubt = gr.Markdown(elem_id="doubt")
        with gr.Column():
            results = _Results.place("draw", "Photos")
            with gr.Row():
                more = gr.Button("More like the chosen one", elem_id="more", min_width=120)
                start_edit = gr.Button("Edit the chosen one", elem_id="start-edit", min_width=120)
    with gr.Row():
        with gr.Column():
            examples = gr.Dataset(
                label="Examples",
                components=[gr.Image(visible=False)],
                samples=[[str(path)] for path in example_drawings()],
                type="index",
            )
        with gr.Column():
            class_label = _class(handlers)
            realism = gr.Slider(0, 1, 0.5, step=0.05, label="Follow the drawing (0) or look real (1)")
            num_images = gr.Slider(1, MAX_IMAGES, 4, step=1, label="Number of photos", elem_id="num-images")
            seed, keep_seed = _seed("draw")
            live = gr.Checkbox(label="Live: photos after each stroke, with this seed", elem_id="live")
            expert = _expert_drawer()

    earlier = gr.Gallery(
        label="Earlier",
        columns=8,
        height=160,
        format="png",
        allow_preview=False,
        buttons=[],
        interactive=False,
        elem_id="earlier",
    )

    drawing, live_drawing = _relay_of(canvas), _relay_of(canvas)
    wishes = [class_label, num_images, realism, seed, *expert]
    made = results.make.click(None, [canvas, seed, keep_seed], [drawing, seed], js=_HAND_OVER).then(
        handlers.make_photos, [drawing, *wishes], api_name="make_photos", **results.shown
    )
    varied = more.click(handlers.more_like_this, [results.photos, selected], **results.shown, **_PRIVATE)
    looked = canvas.change(None, canvas, drawing, js=_COPY).then(
        handlers.preview_drawing,
        drawing,
        [seen, guess, doubt],
        api_name="preview_drawing",
        show_progress="hidden",
        concurrency_limit=4,
        trigger_mode="always_last",
    )
    # What is handed over can be read once: photos that had to wait for those before would find nothing. So each stroke
    # hands its own drawing over, and ends what is in its way.
    drawn = (
        looked.then(handlers.stop_live, live, None, queue=False, **_PRIVATE)
        .then(None, canvas, live_drawing, js=_COPY)
        .then(
            handlers.make_photos_live,
            [live, live_drawing, *wishes],
            trigger_mode="multiple",
            **(results.shown | _LIVE),
            **_PRIVATE,
        )
    )
    results.end(handlers, [made, varied, drawn])
    for event in (made, varied):
        event.success(handlers.keep, [results.photos, history], history, show_progress="hidden", **_PRIVATE)
    reading: dict[str, Any] = {"show_progress_on": seen, **_PRIVATE}
    upload.upload(handlers.read_upload, [upload, threshold], canvas, **reading)
    threshold.release(handlers.read_upload, [upload, threshold], canvas, **reading)
    examples.click(handlers.read_example, examples, canvas, show_progress_on=seen, **_PRIVATE)
    results.gallery.select(_index_of, None, selected, **_PRIVATE)
    results.photos.change(lambda: 0, None, selected, show_progress="hidden", **_PRIVATE)
    earlier.select(handlers.reopen, history, [results.gallery, results.photos, seed], **_PRIVATE)
    gr.on([page.load, history.change], _show_history, history, earlier, show_progress="hidden", **_PRIVATE)
    return canvas, results, selected, start_edit


def _edit_tab(handlers: _Handlers) -> tuple[gr.ImageEditor, gr.Dropdown]:
    gr.Markdown("Start from a photo that you made, or upload one, and draw the lines that are new in it.")
    with gr.Row():
        with gr.Column():
            # The canvas takes on the photo's size, so that the result has it, too.
            photo = _canvas(
                "edit",
                "Your photo",
                value=None,
                sources=("upload",),
                fixed_canvas=False,
            )
        with gr.Column():
            results = _Results.place("edit", "Edits")
            class_label = _class(handlers)
            num_images = gr.Slider(1, MAX_IMAGES, 2, step=1, label="Number of photos")
            strength = gr.Slider(0.1, 1, 0.9, step=0.05, label="Small change (0.1) or something new (1)")
            seed, keep_seed = _seed("edit")
    relay = _relay_of(photo, image_mode="RGBA", label="photo")
    edited = results.make.click(None, [photo, seed, keep_seed], [relay, seed], js=_HAND_OVER).then(
        handlers.edit_photo, [relay, class_label, num_images, strength, seed], api_name="edit_photo", **results.shown
    )
    results.end(handlers, [edited])
    return photo, class_label


def _interpolation_tab(handlers: _Handlers, first: gr.ImageEditor) -> None:
    gr.Markdown("Frames that lead from the drawing on the first tab to the one on this tab.")
    with gr.Row():
        with gr.Column():
            last = _canvas("between", "Where it leads")
        with gr.Column():
            results = _Results.place("between", "Frames", columns=4)
            class_label = _class(handlers)
            num_frames = gr.Slider(3, MAX_FRAMES, 8, step=1, label="Number of frames", elem_id="num-frames")
            seed, keep_seed = _seed("between")
    relays = [_relay_of(first, label="first"), _relay_of(last, label="last")]
    made = (
        results.make.click(None, [last, seed, keep_seed], [relays[1], seed], js=_HAND_OVER)
        .then(None, first, relays[0], js=_COPY)
        .then(handlers.interpolate, [*relays, class_label, num_frames, seed], api_name="interpolate", **results.shown)
    )
    results.end(handlers, [made])
