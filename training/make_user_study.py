# SPDX-License-Identifier: Apache-2.0
"""Makes a study for human judges: one HTML page that shows a drawing and two photos of it, and asks which is better.

    python training/make_user_study.py --images ours=DIR gan=DIR --sketches DRAWINGS --output study/study.html
    python training/analyze_user_study.py --key study/study.key.json --answers answers/*.json

The page is blind: names of systems stand only in the key beside it, which stays with whoever runs the study. Each judge sees
the comparisons in another order with left and right drawn anew, and between them attention checks, in which one photo is
noise. Everything is inside the page, nothing is loaded or sent: a judge saves the answers as a file and hands that in.
"""

import base64
import hashlib
import html
import io
import itertools
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from PIL import Image

from diffsketching_pipeline.command_line import argument, parse_arguments, required, user_errors
from diffsketching_pipeline.evaluation.arguments import parse_images
from diffsketching_pipeline.evaluation.image_sets import (
    Drawing,
    match_images,
    open_image,
    read_drawings,
    select_drawings,
    write_text,
)
from diffsketching_pipeline.stopping import stoppable


QUESTIONS = {
    "faithfulness": "Which photo follows the drawing better?",
    "realism": "Which photo looks more like a real photo?",
}
PAGE_PATH = Path(__file__).with_name("user_study_page.html")


@dataclass
class StudyArguments:
    """Arguments for the systems that are compared, on which drawings, and how often."""

    images: list[str] = required("two or more folders of images `<sketch>_<n>.png`, each as DIR or NAME=DIR")
    sketches: str = required("drawings, `<class>/<sketch>.png`")
    output: str = argument("study/study.html", "the page; the key is written beside it")
    split: Literal["tune", "report", "all"] = argument("report", "half of the drawings, by hash of the name")
    num_comparisons: int = argument(30, "comparisons that each judge makes, shared evenly among the pairs of systems")
    num_attention_checks: int = argument(
        4, "comparisons with noise among them; 0 = none, and no way to tell who clicks"
    )
    title: str = argument("Which photo is better?", "heading of the page")
    seed: int = argument(0, "which drawings and images are compared")


class Comparison(NamedTuple):
    """Two photos of a drawing; an attention check has noise in the place of the second."""

    drawing: Drawing
    systems: tuple[str, str | None]
    images: tuple[Image.Image, Image.Image]


def check_study_arguments(args: StudyArguments) -> None:
    """Raises `ValueError` for what makes no study, before anything is read."""
    if len(args.images) < 2:
        raise ValueError(f"`images` must be at least two folders, but there is {len(args.images)}.")
    for name, minimum in {"num_comparisons": 1, "num_attention_checks": 0, "seed": 0}.items():
        if getattr(args, name) < minimum:
            raise ValueError(f"`{name}` must be at least {minimum}, but got {getattr(args, name)}.")
    if not Path(args.sketches).is_dir():
        raise ValueError(f"`sketches` must be a folder, but {args.sketches!r} is none.")
    if Path(args.output).suffix != ".html":
        raise ValueError(f"`output` must be an HTML file, but is {args.output!r}.")


def choose_comparisons(args: StudyArguments) -> list[Comparison]:
    """Comparisons spread evenly over pairs of systems, then over drawings, then the attention checks."""
    rng = np.random.default_rng(args.seed)
    drawings = read_drawings(Path(args.sketches))
    selected = select_drawings(drawings, args.split)
    files: dict[str, dict[int, list[Path]]] = {}
    for name, folder in parse_images(args.images).items():
        files[name] = {}
        for drawing, path in match_images(folder, drawings, selected):
            files[name].setdefault(drawing.position, []).append(path)
    pairs = itertools.cycle(itertools.combinations(files, 2))
    num_pairs = len(files) * (len(files) - 1) // 2
    # Every pair goes through the drawings in one order, so that all systems are judged on the same ones.
    order = rng.permutation(len(selected))

    def picture(system: str, drawing: Drawing) -> Image.Image:
        choices = files[system][drawing.position]
        return open_image(choices[rng.integers(len(choices))])

    comparisons = []
    for k in range(args.num_comparisons):
        pair, drawing = next(pairs), selected[order[(k // num_pairs) % len(selected)]]
        comparisons.append(Comparison(drawing, pair, (picture(pair[0], drawing), picture(pair[1], drawing))))
    for k in range(args.num_attention_checks):
        system, drawing = list(files)[k % len(files)], selected[rng.integers(len(selected))]
        shown = picture(system, drawing)
        noise = Image.fromarray(rng.integers(0, 256, (shown.height, shown.width, 3), dtype=np.uint8))
        comparisons.append(Comparison(drawing, (system, None), (shown, noise)))
    return comparisons


def data_url(image: Image.Image) -> str:
    """The picture alone as a data URL: what else its file says could tell where it comes from."""
    stripped = Image.fromarray(np.asarray(image.convert("RGB")))
    buffer = io.BytesIO()
    stripped.save(buffer, format="PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def make_study(comparisons: list[Comparison], seed: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """
    Make what the page shows, and the key to it.

    Returns:
        `tuple[dict, dict]`: the page's data, in which comparisons and photos have numbers in random order; the key, which
        says for each comparison which system made which photo (null = noise).
    """
    rng = np.random.default_rng([seed, 1])
    shown, key = [], {}
    for number, index in enumerate(rng.permutation(len(comparisons)).tolist()):
        drawing, systems, images = comparisons[index]
        first = int(rng.integers(2))
        order = (first, 1 - first)
        photos = [data_url(images[i]) for i in order]
        shown.append({"comparison": number, "drawing": data_url(open_image(drawing.path)), "photos": photos})
        key[str(number)] = {
            "systems": [systems[i] for i in order],
            "drawing": f"{drawing.label}/{drawing.name}",
            "is_check": None in systems,
        }
    study = hashlib.sha256(json.dumps([shown, key], sort_keys=True).encode()).hexdigest()[:16]
    return {"study": study, "questions": QUESTIONS, "comparisons": shown}, {"study": study, "comparisons": key}


def make_page(data: dict[str, Any], title: str) -> str:
    """The page as one HTML text."""
    # Inside a script element only "<" could end it.
    content = json.dumps(data).replace("<", "\\u003c")
    template = PAGE_PATH.read_text(encoding="utf-8")
    return template.replace("{{title}}", html.escape(title)).replace("{{data}}", content)


def main(args: StudyArguments) -> tuple[Path, Path]:
    """Writes the page and its key; returns where."""
    check_study_arguments(args)
    data, key = make_study(choose_comparisons(args), args.seed)
    page_path = Path(args.output)
    key_path = page_path.with_suffix(".key.json")
    write_text(json.dumps(key, indent=2) + "\n", key_path)
    write_text(make_page(data, args.title), page_path)
    return page_path, key_path


def run() -> None:
    """The command line: what is wrong with the input is one line on stderr and exit code 2."""
    with user_errors(__file__):
        page_path, key_path = main(parse_arguments(StudyArguments, __doc__))
    print(f"{page_path} for the judges, {key_path} for you")


if __name__ == "__main__":
    with stoppable(__file__):
        run()
