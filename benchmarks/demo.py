# SPDX-License-Identifier: Apache-2.0
"""The drawing page under load, and how long one waits for a photo.

    python benchmarks/demo.py load [--model DIR] [--clients 20] [--seconds 120]
    python benchmarks/demo.py wait [--model DIR] [--runs 3] [--num_images 4] [--dtype bfloat16]

`load`: clients in another process ask for photos again and again, each for its own seeds, and their pictures are
compared with those that the pipeline makes alone; prints what was answered, and the server's memory as time goes by.
The C library may keep what was freed: leave `MALLOC_TRIM_THRESHOLD_` and its like unset. `wait`: seconds from the end
of a stroke, which is when the page sends the drawing, to the first preview and to the photos, and the share of them
outside of the networks.
"""

import argparse
import multiprocessing
import statistics
import threading
import time
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import gradio_client
import numpy as np
import torch
from guidance import NetworkClock
from PIL import Image

from diffsketching_pipeline import DiffSketchingPipeline
from diffsketching_pipeline.demo.service import DemoService
from diffsketching_pipeline.demo.serving import launch
from diffsketching_pipeline.registry import find_checkpoint


# Memory is read this often while there is load.
NUM_SAMPLES = 40
DRAWING = Path(__file__).parent.parent / "examples" / "drawings" / "t-shirt.png"


def request(seed: int, num_images: int) -> dict[str, Any]:
    """Arguments of the page's endpoint `/make_photos`."""
    canvas = {"background": gradio_client.handle_file(DRAWING), "layers": [], "composite": None}
    return {"drawing": canvas, "num_images": num_images, "seed": seed, "api_name": "/make_photos"}


def resident_mebibytes() -> float:
    """Memory of this process, which is the server's."""
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


def run_clients(address: str, clients: int, seconds: float, expected: dict[int, np.ndarray]) -> Counter:
    """Count what all clients got."""
    outcomes: Counter = Counter()
    deadline = time.monotonic() + seconds
    arguments = [(deadline, address, number, outcomes, expected) for number in range(clients)]
    threads = [threading.Thread(target=ask_until, args=a) for a in arguments]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return outcomes


def photos_alone(service: DemoService, count: int) -> dict[int, np.ndarray]:
    """By seed, what the page is to answer."""
    settings = service.call_settings(0.5)
    photos = {}
    for seed in range(count):
        generator = [torch.Generator().manual_seed(seed)]
        photo = service.pipe(str(DRAWING), num_images_per_sketch=1, generator=generator, **settings).images[0]
        photos[seed] = np.asarray(photo, dtype=int)
    return photos


def load(service: DemoService, clients: int, seconds: float) -> None:
    """Prints the outcomes of requests, the memory every tenth of the time, and by how much it grew."""
    expected = photos_alone(service, 2 * clients)
    page = launch(service)
    mebibytes: list[float] = []
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as executor:
        executor.submit(int).result()  # it has started, and imported all this
        start = time.monotonic()
        outcomes = executor.submit(run_clients, page.local_url, clients, seconds, expected)
        while len(mebibytes) < NUM_SAMPLES:
            time.sleep(max(0.0, start + (len(mebibytes) + 1) * seconds / NUM_SAMPLES - time.monotonic()))
            mebibytes.append(resident_mebibytes())
            if len(mebibytes) % (NUM_SAMPLES // 10) == 0:
                print(f"{time.monotonic() - start:5.0f} s  {mebibytes[-1]:6.0f} MiB", flush=True)
        counts = outcomes.result().most_common()
    page.close()
    second, last = (statistics.mean(quarter) for quarter in np.split(np.array(mebibytes), 4)[1::2])
    print(f"from the second quarter to the last: {last - second:+.1f} MiB")
    for outcome, count in counts:
        print(f"{count:6d}  {outcome}")


def wait(service: DemoService, runs: int, num_images: int) -> None:
    """Prints medians of what somebody waits for."""
    clock = NetworkClock(service.pipe)
    page = launch(service)
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
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32")
    parser.add_argument("--clients", type=int, default=20)
    parser.add_argument("--seconds", type=float, default=120)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--num_images", type=int, default=4)
    args = parser.parse_args()
    pipe = DiffSketchingPipeline.from_pretrained(find_checkpoint(args.model)).to(getattr(torch, args.dtype))
    service = DemoService(pipe, args.model)
    if args.what == "load":
        load(service, args.clients, args.seconds)
    else:
        wait(service, args.runs, args.num_images)


if __name__ == "__main__":
    main()
