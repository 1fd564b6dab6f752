# SPDX-License-Identifier: Apache-2.0
"""The cost of an image: time, network evaluations and memory."""

import json
import multiprocessing
import re
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from diffsketching_pipeline import DiffSketchingPipeline
from diffsketching_pipeline.evaluation.image_sets import write_text
from diffsketching_pipeline.evaluation.systems import Job, System


MEMORY_STEPS = 3
"""Steps over which memory is measured: the solvers of higher order hold the predictions of up to three."""


@contextmanager
def count_evaluations(networks: dict[str, nn.Module]) -> Iterator[Counter]:
    """
    Counts the samples that each network is given inside the block, by name.

    A network is evaluated whenever its first convolution is: that also sees calls of a part of it, as the perceptual loss
    makes of F_s. Of an autoencoder, encoder and decoder count each, because sampling calls the second alone.
    """
    counts: Counter = Counter()

    def counter(name: str) -> Callable[..., None]:
        def count(module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
            counts[name] += len(inputs[0])

        return count

    handles = []
    for name, network in networks.items():
        parts: list[Any] = [network.encoder, network.decoder] if hasattr(network, "decode") else [network]
        for part in parts:
            first = next(module for module in part.modules() if isinstance(module, nn.Conv2d))
            handles.append(first.register_forward_pre_hook(counter(name)))
    try:
        yield counts
    finally:
        for handle in handles:
            handle.remove()


def describe_machine(device: torch.device) -> str:
    """Describe the machine that a time depends on, in words."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type}, {torch.get_num_threads()} thread(s)"


class CostMeter:
    """
    Seconds and network evaluations per image of what runs inside a `with` block; on a GPU also its peak memory.

    Args:
        networks: the networks whose evaluations count, by name.
        num_images: images that the block makes.
        device: where they are made.
    """

    def __init__(self, networks: dict[str, nn.Module], num_images: int, device: torch.device):
        self.networks, self.num_images, self.device = networks, num_images, device
        self.cost: dict[str, Any] = {}

    def __enter__(self) -> "CostMeter":
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        self._counting = count_evaluations(self.networks)
        self._counts, self._start = self._counting.__enter__(), time.perf_counter()
        return self

    def __exit__(self, *exception: Any) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        seconds = time.perf_counter() - self._start
        self._counting.__exit__(*exception)
        self.cost = {
            "seconds": seconds / self.num_images,
            "network_evaluations": {name: count / self.num_images for name, count in self._counts.items()},
            "batch_size": self.num_images,
            "machine": describe_machine(self.device),
        }
        if self.device.type == "cuda":
            self.cost["peak_memory"] = torch.cuda.max_memory_allocated(self.device)


def _resident(field: str) -> int:
    """`VmRSS` or `VmHWM` of this process in bytes."""
    status = Path("/proc/self/status").read_text()
    match = re.search(rf"^{field}:\s+(\d+) kB", status, re.M)
    if match is None:
        raise OSError(f"no {field} in /proc/self/status")
    return 1024 * int(match[1])


def _peak_memory(
    model: str,
    dtype: torch.dtype,
    system: System,
    jobs: list[Job],
    class_labels: list[str] | None,
    threshold: float | None,
    threads: int,
) -> int:
    """Measure the memory that one batch needs beyond the loaded model, in bytes; run in a process of its own."""
    torch.set_num_threads(threads)
    pipeline = system.build(DiffSketchingPipeline.from_pretrained(model, torch_dtype=dtype))
    if threshold is not None:
        pipeline.sketch_processor.register_to_config(threshold=threshold)
    # The high-water mark of loading is forgotten, so that only that of sampling is seen.
    Path("/proc/self/clear_refs").write_text("5")
    before = _resident("VmRSS")

    def stop(
        pipe: DiffSketchingPipeline, step_index: int, timestep: Any, callback_kwargs: dict[str, Any]
    ) -> dict[str, Any]:
        pipe._interrupt = step_index + 1 >= MEMORY_STEPS
        return {}

    system.sample(pipeline, jobs, class_labels, callback_on_step_end=stop)
    return _resident("VmHWM") - before


def measure_memory(
    model: str,
    dtype: torch.dtype,
    system: System,
    jobs: list[Job],
    class_labels: list[str] | None,
    folder: Path,
    threshold: float | None = None,
) -> dict[str, Any]:
    """
    Peak resident memory of one batch on the CPU in a fresh process, minus its level after loading; kept in
    `folder/memory.json`, so that a second call need not measure again.
    """
    path = folder / "memory.json"
    if path.is_file():
        return json.loads(path.read_text())
    memory: dict[str, Any] = {"batch_size": len(jobs), "peak_memory": None}
    try:
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
            arguments = (model, dtype, system, jobs, class_labels, threshold, torch.get_num_threads())
            memory["peak_memory"] = pool.submit(_peak_memory, *arguments).result()
    except OSError as error:
        memory["reason"] = f"the system does not tell ({error})"
    write_text(json.dumps(memory) + "\n", path)
    return memory
