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
"""The drawing page under load, and how long one waits for a photo.

    python benchmarks/demo.py load [--model DIR] [--clients 20] [--seconds 120]
    python benchmarks/demo.py wait [--model DIR] [--runs 3] [--num_images 4]

`load`: clients that ask for photos again and again, each for its own seeds, whose pictures are compared with those that
the pipeline makes alone; prints what was answered and the process's memory as time goes by. `wait`: seconds from the
end of a stroke, which is when the page sends the drawing, to the first preview and to the photos, and the share of
them outside of the networks.
"""

import argparse
import statistics
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import gradio_client
import numpy as np
import torch
from guidance import NetworkClock
from PIL import Image

from diffsketching_pipeline import DiffSketchingPipeline, bundled_checkpoint
from diffsketching_pipeline.demo import Studio
from diffsketching_pipeline.demo_page import launch


DRAWING = Path(__file__).parent.parent / "examples" / "drawings" / "t-shirt.png"


def request(seed: int, num_images: int) -> dict[str, Any]:
    """Arguments of the page's endpoint `/make_photos`."""
    canvas = {"background": gradio_client.handle_file(DRAWING), "layers": [], "composite": None}
    return {"drawing": canvas, "num_images": num_images, "seed": seed, "api_name": "/make_photos"}


def resident_mebibytes() -> float:
    """Memory of this process, of which the server is a thread."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096 / 2**20


def ask_until(deadline: float, address: str, number: int, outcomes: Counter, expected: dict[int, np.ndarray]) -> None:
    """One client: photos of its own two seeds in turn, until time is up."""
    client = gradio_client.Client(address, verbose=False)
    turn = 0
    while time.monotonic() < deadline:
        seed = 2 * number + turn % 2
        turn += 1
        try:
            gallery = client.predict(**request(seed, 1))[0]
        except Exception as error:
            outcomes["queue is full" if "queue is full" in str(error).lower() else f"failed: {error}"] += 1
            time.sleep(1)
            continue
        photo = np.asarray(Image.open(gallery[0]["image"]).convert("RGB"), dtype=int)
        outcomes["its own photo" if np.abs(photo - expected[seed]).max() <= 2 else "another's photo"] += 1


def load(studio: Studio, clients: int, seconds: float) -> None:
    """Prints the outcomes of requests, and the memory every tenth of the time."""
    settings = studio.call_settings(0.5)
    expected = {}
    for seed in range(2 * clients):
        generator = [torch.Generator().manual_seed(seed)]
        photo = studio.pipe(str(DRAWING), num_images_per_sketch=1, generator=generator, **settings).images[0]
        expected[seed] = np.asarray(photo, dtype=int)
    page = launch(studio)
    outcomes: Counter = Counter()
    deadline = time.monotonic() + seconds
    arguments = [(deadline, page.local_url, number, outcomes, expected) for number in range(clients)]
    threads = [threading.Thread(target=ask_until, args=a) for a in arguments]
    for thread in threads:
        thread.start()
    while time.monotonic() < deadline:
        time.sleep(seconds / 10)
        print(f"{seconds - max(0, deadline - time.monotonic()):5.0f} s  {resident_mebibytes():6.0f} MiB", flush=True)
    for thread in threads:
        thread.join()
    page.close()
    for outcome, count in outcomes.most_common():
        print(f"{count:6d}  {outcome}")


def wait(studio: Studio, runs: int, num_images: int) -> None:
    """Prints medians of what somebody waits for."""
    clock = NetworkClock(studio.pipe)
    page = launch(studio)
    client = gradio_client.Client(page.local_url, verbose=False)
    rows = []
    for run in range(runs + 1):
        clock.seconds, start = 0.0, time.perf_counter()
        job = client.submit(**request(run, num_images))
        while not job.outputs():
            time.sleep(0.005)
        first = time.perf_counter() - start
        job.result()
        total = time.perf_counter() - start
        rows.append((first, total, 1 - clock.seconds / total))
    page.close()
    first, total, outside = (statistics.median(column) for column in zip(*rows[1:], strict=True))
    print(f"{num_images} photos, median of {runs}: first preview after {first:.1f} s, photos after {total:.1f} s")
    print(f"outside of the networks: {outside:.1%}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("load", "wait"))
    parser.add_argument("--model", default=None)
    parser.add_argument("--clients", type=int, default=20)
    parser.add_argument("--seconds", type=float, default=120)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--num_images", type=int, default=4)
    args = parser.parse_args()
    pipe = DiffSketchingPipeline.from_pretrained(args.model or bundled_checkpoint())
    studio = Studio(pipe, args.model)
    if args.what == "load":
        load(studio, args.clients, args.seconds)
    else:
        wait(studio, args.runs, args.num_images)


if __name__ == "__main__":
    main()
