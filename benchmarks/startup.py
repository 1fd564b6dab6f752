# SPDX-License-Identifier: Apache-2.0
"""From the shell to the photos: where the time of one `diffsketching generate` goes.

    python benchmarks/startup.py [--drawing FILE] [--num_images 4] [--runs 3]

Runs the command itself for the total, and the same stages in one fresh process each time for the breakdown; prints
medians and each stage's share of the staged total.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path


DRAWING = Path(__file__).parent.parent / "examples" / "drawings" / "t-shirt.png"
STAGES = r"""
import json, sys, time
drawing, num_images = sys.argv[1], int(sys.argv[2])
marks = [("start", time.perf_counter())]
mark = lambda name: marks.append((name, time.perf_counter()))
import torch
mark("import torch")
from diffsketching_pipeline import DiffSketchingPipeline, bundled_checkpoint
mark("import diffusers, transformers and the pipeline")
pipe = DiffSketchingPipeline.from_pretrained(bundled_checkpoint())
pipe.set_progress_bar_config(disable=True)
mark("load the checkpoint")
sketch = pipe.sketch_processor.preprocess(drawing)
mark("read the drawing")
generator = [torch.Generator().manual_seed(k) for k in range(num_images)]
out = pipe(sketch, num_images_per_sketch=num_images, generator=generator)
mark("sample")
print(json.dumps({name: now - before for (_, before), (name, now) in zip(marks, marks[1:])}))
"""


def command_seconds(drawing: Path, num_images: int) -> float:
    """Wall time of the whole command in a fresh process."""
    with tempfile.TemporaryDirectory() as folder:
        command = ["-m", "diffsketching_pipeline.cli", "generate", str(drawing), "--num-images", str(num_images)]
        start = time.perf_counter()
        subprocess.run([sys.executable, *command, "--output-dir", folder], check=True, capture_output=True)
        return time.perf_counter() - start


def stage_seconds(drawing: Path, num_images: int) -> dict[str, float]:
    """Seconds of each stage in a fresh process, and its start and end as the rest of its wall time."""
    start = time.perf_counter()
    command = [sys.executable, "-c", STAGES, str(drawing), str(num_images)]
    shown = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    total = time.perf_counter() - start
    stages: dict[str, float] = json.loads(shown.strip().splitlines()[-1])
    return {**stages, "interpreter start and exit": total - sum(stages.values())}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--drawing", type=Path, default=DRAWING)
    parser.add_argument("--num_images", type=int, default=4)
    parser.add_argument("--runs", type=int, default=3)
    args = parser.parse_args()
    totals = [command_seconds(args.drawing, args.num_images) for _ in range(args.runs)]
    runs = [stage_seconds(args.drawing, args.num_images) for _ in range(args.runs)]
    stages = {name: statistics.median(run[name] for run in runs) for name in runs[0]}
    whole = sum(stages.values())
    print(
        f"diffsketching generate, {args.num_images} photos: {statistics.median(totals):.1f} s (median of {args.runs})"
    )
    for name, seconds in stages.items():
        print(f"  {name:<50} {seconds:6.2f} s  {seconds / whole:5.1%}")


if __name__ == "__main__":
    main()
