# SPDX-License-Identifier: Apache-2.0
"""Measure how well the entropy of the guessed class tells drawings of the classes from drawings of other things.

    python benchmarks/class_entropy.py DRAWINGS OTHERS.ndjson [--model DIR] [--sketch_encoder DIR] [--warned 0.1]

DRAWINGS are `<class>/<sketch>.png`, OTHERS one drawing per line with its "word", as Quick, Draw! has them. The limit
(`max_class_entropy` of a checkpoint's `recommended`) is the one above which the share `--warned` of the drawings of half of the
names lies; printed are the shares above it among the other half of the drawings, and among the other things by half of
their words. Those of the first half chose nothing here and are printed to see how far halves differ.
"""

import argparse
import json
from pathlib import Path

import numpy as np
import torch
from transformers import ResNetForImageClassification

from diffsketching_pipeline import DiffSketchingPipeline
from diffsketching_pipeline.conditioning import class_entropy, classify_sketch
from diffsketching_pipeline.registry import find_checkpoint
from diffsketching_pipeline.splits import in_first_half


def choose_limit(entropies: np.ndarray, warned: float) -> float:
    """Return the least of the `entropies` above which the share `warned` of them lies at most."""
    return float(np.quantile(entropies, 1 - warned, method="higher"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("drawings", type=Path)
    parser.add_argument("others", type=Path)
    parser.add_argument("--model", default=None, help="pipeline folder or Hub id; the bundled one when left out")
    parser.add_argument("--sketch_encoder", default=None, help="folder of another encoder of the same classes")
    parser.add_argument("--warned", type=float, default=0.1, help="share of the drawings above the limit, at most")
    args = parser.parse_args()

    pipe = DiffSketchingPipeline.from_pretrained(find_checkpoint(args.model))
    if args.sketch_encoder is not None:
        pipe.sketch_encoder = ResNetForImageClassification.from_pretrained(args.sketch_encoder).float().eval()
    names = list(pipe.id2label.values())

    @torch.no_grad()
    def guess(sketch) -> tuple[float, int]:
        """Return the entropy of the guess in [0, 1] and the best class of one drawing."""
        size = (pipe.height, pipe.width)
        drawn = pipe.sketch_processor.preprocess(sketch, *size) if isinstance(sketch, Path) else sketch
        probabilities = classify_sketch(pipe.sketch_encoder, drawn, pipe.num_classes)
        return float(class_entropy(probabilities)), int(probabilities.argmax())

    paths = sorted(path for path in args.drawings.glob("*/*.png") if path.parent.name in names)
    guesses = [guess(path) for path in paths]
    drawn, tune = np.array([value for value, _ in guesses]), np.array([in_first_half(path.stem) for path in paths])
    right = np.array([names[best] == path.parent.name for (_, best), path in zip(guesses, paths, strict=True)])
    words = [json.loads(line)["word"] for line in args.others.read_text(encoding="utf-8").splitlines() if line.strip()]
    sketches = pipe.sketch_processor.preprocess(args.others, pipe.height, pipe.width).split(1)
    others, first = (
        np.array([guess(sketch)[0] for sketch in sketches]),
        np.array([in_first_half(word) for word in words]),
    )

    limit = choose_limit(drawn[tune], args.warned)
    print(f"max_class_entropy {limit:.3f}, above which is {np.mean(drawn[tune] > limit):.3f} of the tune half")
    print("| | warned about, tune half | report half |\n| --- | --- | --- |")
    for name, values, half in (("drawings", drawn, tune), ("other things", others, first)):
        cells = (f"{np.mean(values[rows] > limit):.3f} (N={rows.sum()})" for rows in (half, ~half))
        print(f"| {name} | {' | '.join(cells)} |")
    print(f"| class of drawings right | {np.mean(right[tune]):.3f} | {np.mean(right[~tune]):.3f} |")


if __name__ == "__main__":
    main()
