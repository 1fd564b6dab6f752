# SPDX-License-Identifier: Apache-2.0
"""Measure one step of fine-tuning through the chain: memory over the length of the chain, time beyond the networks.

    python benchmarks/finetuning.py [--model DIR] [--steps 10 40] [--train_batch_size 1]

Memory is `torch.cuda.max_memory_allocated` on a GPU, else the peak resident size of a fresh process minus its size once
everything is loaded; glibc is told to give back what is freed, or the gaps between what a long chain keeps would count. Time
outside of the networks is 1 - (time in their forwards and in the backward pass) / total, median over the runs. Everything is
compared inside one run: the figures of one line mean little elsewhere.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from contextlib import contextmanager
from typing import Any

import torch

from diffsketching_pipeline import DiffSketchingPipeline
from diffsketching_pipeline.registry import find_checkpoint
from diffsketching_pipeline.training.chain import FinetuneArguments, decoded, make_loss, run_chain


MEBIBYTE = 2**20
# Blocks of 64 KiB and more are mapped each on its own; slow, so for the measurement of memory only.
GIVE_BACK = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0"}


def resident_bytes() -> int:
    """Peak resident size of this process."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


@contextmanager
def timed(seconds: list[float]) -> Any:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    start = time.perf_counter()
    yield
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    seconds.append(time.perf_counter() - start)


def one_setting(args: argparse.Namespace, options: dict[str, Any]) -> dict[str, float]:
    """Memory and time of training steps with these options, in this process."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    pipe = DiffSketchingPipeline.from_pretrained(find_checkpoint(args.model))
    pipe.to(device)
    finetune_args = FinetuneArguments(identity_weight=0.0, **options)
    loss = make_loss(pipe, finetune_args)
    for name, component in pipe.components.items():
        if isinstance(component, torch.nn.Module):
            component.requires_grad_(name == "unet")
    torch.manual_seed(0)
    shape = (args.train_batch_size, 3, pipe.height, pipe.width)
    batch = {
        "latents": torch.randn(args.train_batch_size, pipe.sample_channels, *pipe.sample_size),
        "pixel_values": torch.rand(shape) * 2 - 1,
        "sketch": torch.rand(shape)[:, :1].gt(0.1).float() * 2 - 1,
        "class_label": torch.zeros(args.train_batch_size, dtype=torch.long),
        "chain_step": torch.zeros(args.train_batch_size, dtype=torch.long),
    }
    batch = {name: value.to(device) for name, value in batch.items()}

    networks: list[float] = []
    starts: list[float] = []
    if not args.memory:
        decoder = [] if pipe.vae is None else [pipe.vae.decoder]
        for module in (pipe.unet, pipe.sketcher, pipe.sketch_encoder, *decoder):
            module.register_forward_pre_hook(lambda *_: starts.append(time.perf_counter()))
            module.register_forward_hook(lambda *_: networks.append(time.perf_counter() - starts.pop()))

    def step() -> tuple[float, float]:
        """Seconds of the whole step, and of its networks."""
        networks.clear()
        whole: list[float] = []
        backward: list[float] = []
        with timed(whole):
            pred = run_chain(
                pipe.unet,
                pipe.unet.config,
                pipe.scheduler,
                batch,
                finetune_args,
                pipe.components,
                pipe.null_class,
            )
            value = loss(decoded(pipe, pred), batch["pixel_values"], batch["sketch"]).loss.mean()
            forwards = sum(networks)  # what is recomputed in the backward pass is part of it
            with timed(backward):
                value.backward()
            pipe.unet.zero_grad(set_to_none=True)
        return whole[0], forwards + backward[0]

    if args.memory:
        # Gradients and whatever the libraries set up on first use are there before the measurement.
        for parameter in pipe.unet.parameters():
            parameter.grad = torch.zeros_like(parameter)
        before = resident_bytes()
        step()
        peak = torch.cuda.max_memory_allocated() if device == "cuda" else resident_bytes() - before
        return {"mebibytes": peak / MEBIBYTE}
    step()
    times = [step() for _ in range(args.runs)]
    outside = statistics.median(1 - inside / whole for whole, inside in times)
    return {"seconds": statistics.median(whole for whole, _ in times), "outside": outside}


def in_fresh_process(args: argparse.Namespace, options: dict[str, Any], memory: bool) -> dict[str, float]:
    command = [sys.executable, __file__, "--options", json.dumps(options), "--runs", str(args.runs)]
    command += ["--train_batch_size", str(args.train_batch_size)]
    command += ["--model", args.model] if args.model is not None else []
    command += ["--memory"] if memory else []
    env = {**os.environ, **(GIVE_BACK if memory else {})}
    shown = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=env).stdout
    return json.loads(shown.strip().splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=None, help="pipeline folder or Hub id; the bundled one when left out")
    parser.add_argument("--steps", type=int, nargs="+", default=[10, 40], help="lengths of the chain")
    parser.add_argument("--train_batch_size", type=int, default=1)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--options", type=json.loads, default=None, help=argparse.SUPPRESS)
    parser.add_argument("--memory", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.options is not None:
        print(json.dumps(one_setting(args, args.options)))
        return

    modes: dict[str, dict[str, Any]] = {
        "checkpointed": {"gradient_checkpointing": True},
        "last step only": {"truncate_backprop_steps": 1},
        "per step": {"backprop": "per_step"},
        "plain": {},
    }
    print("| mode | chain | memory MiB | over the shortest chain | s per training step | outside of networks |")
    print("| --- | --- | --- | --- | --- | --- |")
    for name, mode in modes.items():
        # Without checkpointing a long chain may not fit, which is the point of the others.
        first = None
        for steps in args.steps if name != "plain" else args.steps[:1]:
            options = {**mode, "num_train_inference_steps": steps}
            memory = in_fresh_process(args, options, memory=True)["mebibytes"]
            cost = in_fresh_process(args, options, memory=False)
            first = first if first is not None else memory
            print(
                f"| {name} | {steps} | {memory:.0f} | {memory / first:.2f}x | {cost['seconds']:.1f} | "
                f"{cost['outside']:.1%} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
