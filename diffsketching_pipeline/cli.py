# Copyright 2026 The DiffSketching Pipeline Authors. All rights reserved.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""The `diffsketching` command. An error is one line on stderr and exit code 2, before any work is done."""

import importlib.util
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Optional

import typer

from diffsketching_pipeline import __version__, cli_applications
from diffsketching_pipeline.cli_utils import (
    BUNDLED_SIZE,
    BatchSize,
    ClassifierScale,
    ColourHint,
    Device,
    Dtype,
    DtypeName,
    Eta,
    Invert,
    Model,
    NegativeClass,
    OutputDir,
    Overwrite,
    PerceptualScale,
    SketchAbstraction,
    SketchScale,
    Steps,
    UserError,
    caption,
    check_counts,
    check_labels,
    check_output,
    class_record,
    contact_sheet,
    file_record,
    generate_images,
    labels_for_each,
    load_pipeline,
    model_record,
    numbered_names,
    parse_negative_label,
    png,
    progress,
    read_colour_hint,
    read_metadata,
    sampling_record,
    sketch_fit,
    sketch_image,
    unique_names,
    user_errors,
    write_atomically,
    write_metadata,
)


if TYPE_CHECKING:
    from diffsketching_pipeline.pipeline_diffsketching import DiffSketchingPipeline

app = typer.Typer(
    name="diffsketching",
    help="Photos from drawings (DiffSketching, BMVC 2022).",
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


def main() -> None:
    """Entry point: turns what the user got wrong into one line on stderr and exit code 2."""
    try:
        code = app(standalone_mode=False)
    except UserError as error:
        sys.exit(_fail(str(error)))
    except KeyboardInterrupt:
        print("diffsketching: stopped; finished files are complete.", file=sys.stderr)
        sys.exit(130)
    except Exception as error:
        # typer ships its own click or uses the installed one, depending on its version; both have this method.
        if not hasattr(error, "format_message"):
            raise
        sys.exit(_fail(error.format_message() or "see `diffsketching --help`"))
    sys.exit(code if isinstance(code, int) else 0)


def _fail(message: str) -> int:
    print("diffsketching: error: " + " ".join(message.split()), file=sys.stderr)
    return 2


def _version(value: bool) -> None:
    if value:
        print(f"diffsketching {__version__}")
        raise typer.Exit()


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    pass


@app.command()
def generate(
    drawings: Annotated[
        list[Path],
        typer.Argument(help="Drawings: PNG, JPEG, ... dark strokes on light paper; SVG; ndjson of Quick, Draw!"),
    ],
    class_label: Annotated[
        Optional[list[str]],
        typer.Option(
            help="Class by name or number, or a mixture like shirt=0.7,dress=0.3: once for all drawings, or once per"
            " drawing. Guessed if not given."
        ),
    ] = None,
    num_images: Annotated[int, typer.Option(help="Photos per drawing.")] = 4,
    steps: Steps = None,
    seed: Annotated[int, typer.Option(help="Photo k of each drawing uses seed + k.")] = 0,
    model: Model = None,
    output_dir: OutputDir = Path("outputs"),
    sketch_guidance_scale: SketchScale = None,
    classifier_guidance_scale: ClassifierScale = None,
    perceptual_guidance_scale: PerceptualScale = None,
    sketch_abstraction: SketchAbstraction = None,
    eta: Eta = None,
    strength: Annotated[float, typer.Option(help="1.0 starts from noise, less from the noised drawing.")] = 1.0,
    negative_class_label: NegativeClass = None,
    colour_hint: ColourHint = None,
    invert: Invert = None,
    batch_size: BatchSize = 8,
    device: Device = "auto",
    dtype: Dtype = DtypeName.float32,
    overwrite: Overwrite = False,
) -> None:
    """Photos of each drawing: PNGs, a contact sheet per drawing, and metadata.json to reproduce each of them."""
    check_counts(num_images, batch_size, seed)
    negative = parse_negative_label(negative_class_label)

    from diffsketching_pipeline.images.sketch_processor import SketchProcessor

    with user_errors():
        # Every drawing is read before the model is loaded: a bad one is an error at once.
        counts = [len(SketchProcessor(BUNDLED_SIZE).preprocess(path, invert=invert)) for path in drawings]
    names = numbered_names(unique_names(drawings), counts)
    labels = labels_for_each(class_label, len(names), "drawings")
    files = {name: [output_dir / f"{name}_{seed + k}.png" for k in range(num_images)] for name in names}
    sheets = {name: output_dir / f"{name}_sheet.png" for name in names}
    check_output(output_dir, [*(path for paths in files.values() for path in paths), *sheets.values()], overwrite)
    metadata_path = output_dir / "metadata.json"
    earlier = read_metadata(metadata_path)

    hint = read_colour_hint(colour_hint)
    pipe = load_pipeline(model, device, dtype=dtype)
    check_labels(pipe, labels, negative)
    options = {"invert": invert, "fit": sketch_fit(hint)}
    with user_errors():
        sketches = [
            (path, index, sketch)
            for path in drawings
            for index, sketch in enumerate(
                pipe.sketch_processor.preprocess(path, pipe.height, pipe.width, **options).split(1)
            )
        ]

    settings = {
        "num_inference_steps": steps,
        "sketch_guidance_scale": sketch_guidance_scale,
        "classifier_guidance_scale": classifier_guidance_scale,
        "perceptual_guidance_scale": perceptual_guidance_scale,
        "sketch_abstraction": sketch_abstraction,
        "eta": eta,
        "strength": strength,
        "negative_class_labels": negative,
        "colour_hint": hint,
    }
    weights = model_record(pipe, model)
    records: list[dict[str, Any]] = []
    seeds = range(seed, seed + num_images)
    with progress(len(names) * num_images) as advance:
        for (drawing, index, sketch), name, label in zip(sketches, names, labels, strict=True):
            with user_errors():
                images, out = generate_images(
                    pipe, seeds, batch_size, advance, sketch=sketch, class_labels=label, **settings
                )
            record = {
                **file_record("drawing", drawing),
                "drawing_index": index,
                "invert": invert,
                **class_record(label, out),
                **sampling_record(pipe, settings),
            }
            for image, path, used_seed in zip(images, files[name], seeds, strict=True):
                write_atomically(path, png(image))
                records.append({"file": path.name, "seed": used_seed, **record})
            tiles = [(sketch_image(sketch), "drawing")]
            tiles += [(image, f"seed {used_seed}") for image, used_seed in zip(images, seeds, strict=True)]
            write_atomically(sheets[name], png(contact_sheet(tiles, caption(drawing.name, record))))
            write_metadata(metadata_path, earlier, records, weights)
    for sheet_path in sheets.values():
        print(sheet_path)


for _command in (
    cli_applications.edit,
    cli_applications.interpolate,
    cli_applications.matrix,
    cli_applications.invert,
):
    app.command()(_command)


@app.command()
def info(
    model: Annotated[
        Optional[str], typer.Argument(help="Folder or hub id. [default: the bundled garments-64]")
    ] = None,
) -> None:
    """A checkpoint's components, sizes, classes and recommended settings."""
    from rich.console import Console
    from rich.table import Table

    from diffsketching_pipeline.hub.model_card import input_names

    pipe = load_pipeline(model, "cpu")
    console = Console()
    table = Table(title=model or "garments-64 (bundled)", title_justify="left")
    for column in ("component", "class", "parameters"):
        table.add_column(column, justify="right" if column == "parameters" else "left", no_wrap=True)
    for name, component in pipe.components.items():
        parameters = getattr(component, "parameters", None)
        count = f"{sum(p.numel() for p in parameters()):,}" if parameters else ""
        table.add_row(name, "not in this checkpoint" if component is None else type(component).__name__, count)
    console.print(table)
    prediction_type = pipe.scheduler.config.prediction_type
    inputs = input_names(pipe)
    kind = " + ".join(inputs) if len(inputs) > 1 else f"{inputs[0]} only"
    size = f"{pipe.height}x{pipe.width}"
    if pipe.vae is not None:
        size += f" (latents {pipe.sample_size[0]}x{pipe.sample_size[1]}, {pipe.sample_channels} channels)"
    console.print(f"size: {size}   input: {kind}   predicts: {prediction_type}", highlight=False)
    console.print(f"classes ({pipe.num_classes}): {', '.join(pipe.id2label.values()) or 'integers'}", highlight=False)
    recommended = "   ".join(f"{key}={value}" for key, value in pipe.recommended.items()) or "none"
    console.print(f"recommended: {recommended}", highlight=False)


@app.command()
def demo(
    model: Model = None,
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0 lets other machines in.")] = "127.0.0.1",
    port: Annotated[Optional[int], typer.Option(help="[default: the first free one from 7860]")] = None,
    share: Annotated[bool, typer.Option("--share", help="Also at a public address, by Gradio's servers.")] = False,
    device: Device = "auto",
    dtype: Dtype = DtypeName.float32,
) -> None:
    """A page to draw on, and to watch photos of the drawing appear; needs the extra `demo`."""
    if importlib.util.find_spec("gradio") is None:
        raise UserError("this needs Gradio: `pip install 'diffsketching_pipeline[demo]'`.")
    print(f"Loading {model or 'garments-64'} ...", flush=True)
    pipe = load_pipeline(model, device, dtype=dtype)
    from diffsketching_pipeline.demo import Studio
    from diffsketching_pipeline.demo_page import launch

    with user_errors((OSError,)):
        page = launch(Studio(pipe, model), host, port, share)
    print(f"Draw at {page.share_url or page.local_url}; Ctrl+C ends it.", flush=True)
    page.block_thread()


_MODEL_ARGUMENT = typer.Argument(help="Pipeline folder or hub id; `garments-64` is the bundled one.")
_CARD_OPTION = typer.Option(help="Markdown file for README.md. [default: the model's own]")
_METRICS_OPTION = typer.Option(help="metrics.json of training/evaluate.py, to be added to README.md.")
_LICENSE_OPTION = typer.Option(help="Licence of the weights for a new README.md, e.g. apache-2.0.")
_SHARD_OPTION = typer.Option(help="Largest weight file, e.g. 15MB.")
_DTYPE_OPTION = typer.Option(help="Type of the saved weights.")
_FP16_OPTION = typer.Option("--fp16-variant", help='Also write float16 weights, for `variant="fp16"`.')


@app.command()
def export(
    model: Annotated[str, _MODEL_ARGUMENT],
    output_dir: Annotated[Path, typer.Argument(help="New folder.")],
    save_dtype: Annotated[DtypeName, _DTYPE_OPTION] = DtypeName.float32,
    fp16_variant: Annotated[bool, _FP16_OPTION] = False,
    max_shard_size: Annotated[str, _SHARD_OPTION] = "10GB",
    model_card: Annotated[Optional[Path], _CARD_OPTION] = None,
    metrics: Annotated[Optional[Path], _METRICS_OPTION] = None,
    license: Annotated[Optional[str], _LICENSE_OPTION] = None,
) -> None:
    """Write a folder that loads anywhere: with this package, or with its own code where that is not installed."""
    from diffsketching_pipeline import export_pipeline
    from diffsketching_pipeline.files import check_output_dir

    with user_errors((ValueError, OSError)):
        check_output_dir(output_dir)
        export_pipeline(
            _load_to_save(model, save_dtype),
            output_dir,
            fp16_variant=fp16_variant,
            max_shard_size=max_shard_size,
            model_card=model_card,
            metrics=metrics,
            license=license,
        )
    print(output_dir)


@app.command()
def push(
    model: Annotated[str, _MODEL_ARGUMENT],
    repo_id: Annotated[str, typer.Argument(help="Repository, user/name; made if there is none.")],
    private: Annotated[
        Optional[bool], typer.Option("--private/--public", help="For a new repository. [default: the account's]")
    ] = None,
    revision: Annotated[Optional[str], typer.Option(help="Branch; made if there is none. [default: main]")] = None,
    create_pr: Annotated[bool, typer.Option("--create-pr", help="Propose a pull request to main instead.")] = False,
    commit_message: Annotated[Optional[str], typer.Option(help="First line of the commit.")] = None,
    save_dtype: Annotated[DtypeName, _DTYPE_OPTION] = DtypeName.float32,
    fp16_variant: Annotated[bool, _FP16_OPTION] = False,
    max_shard_size: Annotated[str, _SHARD_OPTION] = "10GB",
    model_card: Annotated[Optional[Path], _CARD_OPTION] = None,
    metrics: Annotated[Optional[Path], _METRICS_OPTION] = None,
    license: Annotated[Optional[str], _LICENSE_OPTION] = None,
) -> None:
    """Export a model and upload it as one commit, with the token of `hf auth login` or HF_TOKEN."""
    from diffsketching_pipeline import push_pipeline

    with user_errors((ValueError, OSError)):
        address = push_pipeline(
            _load_to_save(model, save_dtype),
            repo_id,
            private=private,
            revision=revision,
            create_pr=create_pr,
            commit_message=commit_message,
            fp16_variant=fp16_variant,
            max_shard_size=max_shard_size,
            model_card=model_card,
            metrics=metrics,
            license=license,
        )
    print(address)


@app.command(
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []},
    add_help_option=False,
)
def evaluate(context: typer.Context) -> None:
    """Score a model, or folders of images; --help lists the options."""
    script = Path(__file__).parents[1] / "training" / "evaluate.py"
    if not script.is_file():
        raise UserError(
            "the evaluation is a script of the source tree, which is not installed: clone it and install it with"
            ' `pip install -e ".[train]"`.'
        )
    raise typer.Exit(subprocess.call([sys.executable, str(script), *context.args]))


def _load_to_save(model: str, save_dtype: DtypeName) -> "DiffSketchingPipeline":
    """A pipeline on the CPU, in the type it is to be saved in."""
    bundled = model == "garments-64" and not Path(model).exists()
    return load_pipeline(None if bundled else model, "cpu", dtype=save_dtype)


@app.command("convert-guided-diffusion")
def convert_guided_diffusion_command(
    unet_checkpoint: Annotated[Path, typer.Option(help="Diffusion model: state dict, .pt or .safetensors.")],
    output_dir: Annotated[Path, typer.Option(help="New pipeline folder.")],
    classifier_checkpoint: Annotated[
        Optional[Path], typer.Option(help="Noisy classifier of the same project.")
    ] = None,
    flags: Annotated[Optional[Path], typer.Option(help="JSON file with the flags that built the checkpoints.")] = None,
    preset: Annotated[Optional[str], typer.Option(help="64 | 128 | 256 | 512 | 256-uncond: published flags.")] = None,
    sketch_channel: Annotated[
        bool, typer.Option(help="Add an input channel for the drawing, to be fine-tuned.")
    ] = False,
) -> None:
    """Convert checkpoints of openai/guided-diffusion (ADM) to a pipeline folder."""
    if (flags is None) == (preset is None):
        raise UserError("give either `--flags` or `--preset`.")
    from diffsketching_pipeline.converters.guided_diffusion import convert_guided_diffusion

    with user_errors((ValueError, OSError)):
        convert_guided_diffusion(
            unet_checkpoint,
            classifier_checkpoint,
            flags=flags,
            preset=preset,
            sketch_channel=sketch_channel,
            output_dir=output_dir,
        )
    print(output_dir)


@app.command("convert-photosketch")
def convert_photosketch_command(
    checkpoint: Annotated[Path, typer.Argument(help="Generator of mtli/PhotoSketch: latest_net_G.pth.")],
    output_dir: Annotated[Path, typer.Option(help="New folder for `PhotoSketcher.from_pretrained`.")],
    statistics: Annotated[
        str, typer.Option(help="per_sample (how the published tool runs) or running.")
    ] = "per_sample",
) -> None:
    """Convert a Photo-Sketching generator to a PhotoSketcher folder."""
    from diffsketching_pipeline.converters.photosketch import convert_photosketch

    with user_errors((ValueError, OSError)):
        convert_photosketch(checkpoint, output_dir, statistics=statistics)
    print(output_dir)


if __name__ == "__main__":
    main()
