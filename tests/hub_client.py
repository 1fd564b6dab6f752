# SPDX-License-Identifier: Apache-2.0
"""
The other side of `hub_server.py`: a fresh process that does what a JSON file says and writes down what came of it.

    python hub_client.py tasks.json results.json [--without-package]

Its own process, because huggingface_hub reads the address of its hub, and whether there is one, when it is imported.
"""

import hashlib
import json
import os
import sys
import traceback


class _NotInstalled:
    """Makes an installed package look as if it were not."""

    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "diffsketching_pipeline":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


def find_class(name):
    """A class of diffusers, transformers or, where it may be imported, this package."""
    import diffusers
    import transformers

    for library in (diffusers, transformers):
        if hasattr(library, name):
            return getattr(library, name)
    import diffsketching_pipeline

    return getattr(diffsketching_pipeline, name)


def load(task):
    import torch

    kwargs = dict(task.get("kwargs", {}))
    if "torch_dtype" in kwargs:
        kwargs["torch_dtype"] = getattr(torch, kwargs["torch_dtype"])
    source = task["source"]
    if task.get("from_cache"):
        from huggingface_hub import hf_hub_download

        index = hf_hub_download(
            source, "model_index.json", revision=kwargs.pop("revision", None), local_files_only=True
        )
        source = kwargs["custom_pipeline"] = os.path.dirname(index)
    return find_class(task["class"]).from_pretrained(source, **kwargs)


def describe(loaded, run):
    import torch

    components = getattr(loaded, "components", {"": loaded})
    modules = {name: part for name, part in components.items() if isinstance(part, torch.nn.Module)}
    result = {
        "module": type(loaded).__module__,
        "components": sorted(
            name for name, part in components.items() if part is not None and not isinstance(part, dict)
        ),
        "modules": {name: type(part).__module__ for name, part in modules.items()},
        "dtypes": sorted({str(part.dtype) for part in modules.values()}),
        "devices": sorted({str(next(part.parameters()).device) for part in modules.values()}),
        "weights": weights_sha256(modules),
    }
    if run:
        result["pixels"] = pixels_sha256(loaded)
    return result


def weights_sha256(modules):
    import torch

    digest = hashlib.sha256()
    for name, part in sorted(modules.items()):
        for key, value in sorted(part.state_dict().items()):
            digest.update(f"{name}.{key}".encode() + value.detach().to("cpu", torch.float32).numpy().tobytes())
    return digest.hexdigest()


def pixels_sha256(pipe):
    """The SHA-256 of the float pixels of two images of one drawing, two steps, with whatever guidance the components allow."""
    import torch

    size = pipe.height
    sketch = torch.ones(1, 1, size, size)
    sketch[..., 4:12, 5] = -1
    scales = {"sketch_guidance_scale": 1.5}
    if pipe.classifier is not None:
        scales["classifier_guidance_scale"] = 2.0
    if pipe.sketcher is not None and pipe.sketch_encoder is not None:
        scales["perceptual_guidance_scale"] = 0.1
    pipe.set_progress_bar_config(disable=True)
    images = pipe(
        sketch,
        class_labels="b",
        num_images_per_sketch=2,
        num_inference_steps=2,
        generator=torch.Generator().manual_seed(7),
        output_type="pt",
        **scales,
    ).images
    return hashlib.sha256(images.float().numpy().tobytes()).hexdigest()


def push_pipeline(task):
    from diffsketching_pipeline import DiffSketchingPipeline
    from diffsketching_pipeline import push_pipeline as push

    pipe = DiffSketchingPipeline.from_pretrained(task["source"])
    return push(pipe, task["repo_id"], **task.get("kwargs", {}))


def push_folder(task):
    from diffsketching_pipeline import push_folder as push

    return push(task["source"], task["repo_id"], **task.get("kwargs", {}))


def push_component(task):
    from diffsketching_pipeline.hub.push import push_component as push

    return push(task["source"], task["repo_id"], **task.get("kwargs", {}))


def fetch_manifest(task):
    from diffsketching_pipeline.verification import fetch_manifest as fetch

    return fetch(task["source"], task["folder"], **task.get("kwargs", {}))


def start(task):
    """The UNet that training would start from, and the kind of its noise schedule."""
    from diffsketching_pipeline.training.starts import Start

    found = Start.read(task["source"])
    unet = found.unet({0: "a", 1: "b"}, 3, 1, abstraction_plane=False)
    schedule = found.scheduler().config.beta_schedule
    return {"in_channels": unet.config.in_channels, "schedule": schedule, "weights": weights_sha256({"unet": unet})}


def command(task):
    """Exit code and output of the `diffsketching` command."""
    import contextlib
    import io

    from diffsketching_pipeline import cli

    out, err = io.StringIO(), io.StringIO()
    sys.argv = ["diffsketching", *task["arguments"]]
    code = None
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            cli.main()
        except SystemExit as stop:
            code = stop.code
    return {"code": code, "out": out.getvalue(), "err": err.getvalue()}


def execute(task):
    """Runs a piece of code, and describes the pipeline it leaves under a name."""
    names = {}
    exec(compile(task["code"], "snippet", "exec"), names)
    return describe(names[task["name"]], run=False)


def download(task):
    """The sha256 sum of a file as huggingface_hub brings it, and what it left in its cache besides."""
    from huggingface_hub import hf_hub_download

    path = hf_hub_download(task["source"], task["filename"], cache_dir=task["cache_dir"])
    with open(path, "rb") as file:
        return hashlib.sha256(file.read()).hexdigest()


def at_once(task):
    """Several tasks in threads, as they wait for the hub most of the time."""
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(len(task["tasks"])) as pool:
        return list(pool.map(perform, task["tasks"]))


def perform(task):
    try:
        kind = task["do"]
        if kind == "load":
            return {"result": describe(load(task), task.get("run", False))}
        return {"result": globals()[kind](task)}
    except Exception as error:
        return {"error": type(error).__name__, "message": str(error), "traceback": traceback.format_exc()}


def main(tasks_path, results_path, *options):
    if "--without-package" in options:
        sys.meta_path.insert(0, _NotInstalled())
    with open(tasks_path) as file:
        tasks = json.load(file)
    results = {}
    for name, task in tasks.items():
        revision = task.get("kwargs", {}).get("revision")
        if isinstance(revision, dict):  # the commit that an earlier task made
            task["kwargs"]["revision"] = results[revision["of"]]["result"].rsplit("/")[-1]
        results[name] = perform(task)
    with open(results_path, "w") as file:
        json.dump(results, file)


if __name__ == "__main__":
    main(*sys.argv[1:])
