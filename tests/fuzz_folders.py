# SPDX-License-Identifier: Apache-2.0
"""
Mutated pipeline folders and checkpoints to convert: each is read or refused in one clear error, at little cost, and nothing of
it is run.

    python tests/fuzz_folders.py 600            # 600 folders and 300 checkpoints; prints what each kind came to
    python tests/fuzz_folders.py folder 123     # one case again

`test_fuzz_folders.py` runs a slice of the same cases.
"""

import collections
import copy
import io
import json
import os
import pickle
import random
import shutil
import sys
import tempfile
import time
import zipfile
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from testing_utils import COMPONENTS, ID2LABEL, LATENT_COMPONENTS, LATENT_UNET, make_scheduler, make_unet

from diffsketching_pipeline import DiffSketchingPipeline
from diffsketching_pipeline.converters.guided_diffusion import convert_guided_diffusion
from diffsketching_pipeline.converters.photosketch import convert_photosketch
from diffsketching_pipeline.manifest import MANIFEST_NAME, sha256_of


FIXTURES = Path(__file__).parent / "fixtures"
MAX_SECONDS, MAX_MEGABYTES, MAX_MESSAGE = 2.0, 300, 1200
# A program that is started, a name that a pickle asks for, a connection: none of them is ever part of reading a folder.
FORBIDDEN = ("os.system", "os.exec", "os.posix_spawn", "os.fork", "subprocess.Popen", "pickle.find_class")
FORBIDDEN += ("socket.connect", "socket.sendto", "socket.getaddrinfo", "socket.gethostbyname", "socket.bind")
_happened: list[str] | None = None


def _watch(event, arguments):
    if _happened is not None and event in FORBIDDEN:
        _happened.append(event)


sys.addaudithook(_watch)


class Payload:
    """An object whose pickle makes a folder when it is read."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


@dataclass
class Outcome:
    """The outcome of a case: `read`, `refused`, or what is wrong with how it ended."""

    case: str
    what: str
    seconds: float
    megabytes: float
    message: str


def _peak_megabytes():
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return lambda: 0.0  # only Linux tells

    def read(name):
        [line] = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name)]
        return int(line.split()[1]) / 1024

    base = read("VmRSS")
    return lambda: read("VmHWM") - base


def run_case(case, mutate, load, seed, base, folder):
    """The [`Outcome`] of `load` for what `mutate` makes of `base` with a seed, in the empty `folder`."""
    global _happened
    marker = folder / "was-here"
    target = folder / "case"
    shutil.copytree(base, target)
    mutations = mutate(target, random.Random(f"{case} {seed}"), marker)
    megabytes, start, what, message = _peak_megabytes(), time.process_time(), "read", ""
    _happened = []
    try:
        load(target, folder / "out", random.Random(seed))
    except (ValueError, OSError) as error:
        what, message = "refused", str(error)
        if len(message) > MAX_MESSAGE or not message.replace("\n", "").isprintable() or not message.strip():
            what = "a message that is empty, too long or not printable"
    except Exception as error:
        what, message = f"{type(error).__name__}", str(error)[:300]
    events, _happened = _happened, None
    seconds, megabytes = time.process_time() - start, megabytes()
    if events or marker.exists():
        what = f"ran {events or 'a program'}"
    elif seconds > MAX_SECONDS:
        what = f"took {seconds:.1f} s"
    elif megabytes > MAX_MEGABYTES:
        what = f"took {megabytes:.0f} MB"
    return Outcome(f"{case} {seed}: {'; '.join(mutations)}", what, seconds, megabytes, message)


# ---- values --------------------------------------------------------------------------------------------------------


def odd_value(rng, old=None):
    """Draw a value that a setting should not have; some are near what it was."""
    deep = []
    for _ in range(rng.choice([20, 900])):
        deep = [deep]
    values = [
        None,
        True,
        -1,
        0,
        1,
        1.5,
        2**31,
        10**9,
        10**30,
        -(10**9),
        float("nan"),
        float("inf"),
        "",
        "a",
        "1",
        "../x",
    ]
    values += [
        "x" * 100_000,
        "\x1b[2J\x07",
        "\u202e",
        "[bold]",
        "{}",
        "__class__",
        "os.system",
        [],
        [None],
        [[]],
        {},
        {"a": 1},
    ]
    values += [
        [10**9] * 3,
        list(range(2000)),
        deep,
        ["transformers", "DetrForObjectDetection"],
        ["os", "system"],
        [1, 2],
    ]
    values += [
        ["diffusers", "StableDiffusionPipeline"],
        ["diffusers", "UNet2DModel"],
        "float64",
        {"quant_method": "gptq"},
    ]
    if isinstance(old, (int, float)) and not isinstance(old, bool):
        values += [old + 1, old * 2, -old, str(old), [old], float(old), old * 1000]
    if isinstance(old, list):
        values += [old * 2, old[:-1], old[::-1], old * 500, {str(i): item for i, item in enumerate(old)}]
    return rng.choice(values)


NEW_KEYS = [
    "quantization_config",
    "configuration_files",
    "transformers_weights",
    "attn_implementation",
    "auto_map",
    "dtype",
]
NEW_KEYS += [
    "torch_dtype",
    "_class_name",
    "_use_default_values",
    "num_labels",
    "__init__",
    "x" * 5000,
    "\x1b[1m",
    "trained_betas",
]
NEW_KEYS += [
    "fusion_config",
    "use_timm_backbone",
    "backbone",
    "_name_or_path",
    "unet",
    "text_encoder",
    "id2label",
    "recommended",
]


def mutate_json(path, rng):
    """One change of a JSON file; returns what was done."""
    if rng.random() < 0.2:
        raw = [
            b"",
            b"null",
            b"[]",
            b"3",
            b"{",
            b"[" * 50_000,
            b'{"a":' * 5000,
            b"\xff\xfe{}",
            b" " * 2**22,
            b"[[]," * 10**6,
        ]
        content = rng.choice(
            [*raw, path.read_bytes()[: rng.randrange(1, 200)], path.read_bytes().replace(b"\n", b"\r\n")]
        )
        path.write_bytes(content)
        return f"{path.name} is {content[:12]!r} ..."
    content = json.loads(path.read_text())
    places, stack = [], [content]
    while stack:
        item = stack.pop()
        for key in list(item) if isinstance(item, dict) else range(len(item)):
            places.append((item, key))
            if isinstance(item[key], (dict, list)):
                stack.append(item[key])
    if rng.random() < 0.2 or not places:
        key = rng.choice(NEW_KEYS)
        content[key] = odd_value(rng)
        done = f"{key[:30]!r} new: {str(content[key])[:30]!r}"
    else:
        item, key = rng.choice(places)
        if rng.random() < 0.2:
            del item[key]
            done = f"{key!r} left out"
        else:
            item[key] = odd_value(rng, item[key])
            done = f"{key!r}: {str(item[key])[:30]!r}"
    path.write_text(json.dumps(content))
    return f"{path.parent.name}/{path.name} {done}"


def mutate_safetensors(path, rng):
    """One change of a safetensors file; returns what was done."""
    content = bytearray(path.read_bytes())
    size = int.from_bytes(content[:8], "little")
    kind = rng.choice(["bytes", "cut", "longer", "length", "header", "many", "header", "header"])
    if kind == "bytes":
        for _ in range(rng.choice([1, 100])):
            content[rng.randrange(len(content) if rng.random() < 0.3 else 8 + size)] = rng.randrange(256)
    elif kind == "cut":
        del content[rng.choice([0, 5, 8, rng.randrange(len(content)), len(content) - 1]) :]
    elif kind == "longer":
        content += bytes(rng.choice([1, 10**6]))
    elif kind == "length":
        content[:8] = rng.choice([0, 1, 2**63, 10**8, 2**24, size - 1, size + 1]).to_bytes(8, "little")
    else:
        header = json.loads(content[8 : 8 + size])
        data = content[8 + size :]
        if kind == "many":
            shape = rng.choice([[0], [0, 10**12], []])
            end = len(data)
            header |= {f"t{i}": {"dtype": "F32", "shape": shape, "data_offsets": [end, end]} for i in range(10**4)}
        else:
            entry = header[rng.choice([name for name in header if name != "__metadata__"])]
            key = rng.choice(["shape", "dtype", "data_offsets"])
            new = [
                [],
                [0],
                [10**9, 10**9],
                [-1],
                [float("inf")],
                ["a"],
                5,
                None,
                "F64",
                "I8",
                "BF16",
                "F8_E4M3",
                "x" * 10**5,
            ]
            entry[key] = rng.choice([*new, [2**64], [0, 2**62], [0, 0], entry["shape"][::-1], [[1]]])
        text = json.dumps(header).encode()
        content = len(text).to_bytes(8, "little") + text + data
    path.write_bytes(content)
    return f"{path.parent.name}/{path.name} {kind}"


def _pickle(marker):
    return pickle.dumps(Payload(marker))


# ---- folders -------------------------------------------------------------------------------------------------------

CODE = "import os\nos.mkdir({!r})\nfrom diffsketching_pipeline import DiffSketchingPipeline\nclass A(DiffSketchingPipeline):\n    pass\n"


def mutate_files(folder, rng, marker):
    """One change of which files there are; returns what was done."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    path = rng.choice(files)
    components = [path for path in folder.iterdir() if path.is_dir()]
    component = rng.choice(components) if components else folder
    kind = rng.choice(
        ["gone", "folder", "pipe", "nowhere", "outside", "loop", "renamed", "new", "new", "new", "swapped"]
    )
    name = path.relative_to(folder).as_posix()
    if kind == "new":
        new = ["adapter_config.json", "adapter_model.safetensors", "model.safetensors", "diffusion_pytorch_model.bin"]
        new += ["shard-00001-model-00001-of-00001.safetensors", "config.4.0.0.json", "model.safetensors.index.json"]
        new += [
            "diffusion_pytorch_model.safetensors.index.json",
            "pytorch_model.bin",
            "unet.py",
            "generation_config.json",
        ]
        new += [
            "../None.py",
            "../pipeline.py",
            "../DiffSketchingPipeline.py",
            "README",
            ".metadata",
            "model.fp16.safetensors",
        ]
        path = component / rng.choice(new)
        if path.suffix == ".py":
            path.write_text(CODE.format(str(marker)))
        elif path.suffix == ".json":
            index = {"weight_map": {"a": rng.choice(["../../x.safetensors", "a.bin", 3, "model.safetensors"])}}
            adapter = {"peft_type": "LORA", "base_model_name_or_path": "ana/evil", "r": 8}
            path.write_text(json.dumps(rng.choice([index, adapter, {}])))
        elif path.suffix == ".safetensors":
            save_file({"a": torch.zeros(3)}, path)
        else:
            path.write_bytes(_pickle(marker))
        return f"new {component.name}/{path.name}"
    if kind == "swapped":
        other = rng.choice(files)
        one, two = path.read_bytes(), other.read_bytes()
        path.write_bytes(two), other.write_bytes(one)
        return f"{name} and {other.relative_to(folder)} swapped"
    content = path.read_bytes()
    path.unlink()
    if kind == "folder":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind in ("nowhere", "loop"):
        path.symlink_to("nowhere" if kind == "nowhere" else path.name)
    elif kind == "outside":
        (folder.parent / "elsewhere").write_bytes(content)
        path.symlink_to(folder.parent / "elsewhere")
    elif kind == "renamed":
        path.with_name(rng.choice(["model.safetensors", "pytorch_model.bin", "config.json", "x"])).write_bytes(content)
    return f"{name} {kind}"


def mutate_folder(folder, rng, marker):
    """One to three changes of a pipeline folder, whose manifest is then left out, of before, or up to date."""
    done = []
    for _ in range(rng.choice([1, 1, 1, 2, 3])):
        files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
        configs = [path for path in files if path.suffix == ".json"]
        weights = [path for path in files if path.suffix == ".safetensors"]
        kind = rng.choice(["json", "json", "json", "weights", "files"])
        try:
            if kind == "json" and configs:
                index = [path for path in configs if path.name == "model_index.json"]
                done.append(mutate_json(rng.choice(index if index and rng.random() < 0.3 else configs), rng))
            elif kind == "weights" and weights:
                done.append(mutate_safetensors(rng.choice(weights), rng))
            else:
                done.append(mutate_files(folder, rng, marker))
        except (ValueError, TypeError, KeyError, IndexError, RecursionError, AttributeError, OSError):
            done.append(f"{kind} cannot be changed again")
    manifest, state = folder / MANIFEST_NAME, rng.choice(["none", "none", "new", "new", "old"])
    if manifest.is_file() and state == "none":
        manifest.unlink()
    elif manifest.is_file() and state == "new":
        names = [p for p in sorted(folder.rglob("*")) if p.is_file() and p != manifest]
        manifest.write_text("".join(f"{sha256_of(p)}  {p.relative_to(folder).as_posix()}\n" for p in names))
    return [*done, f"manifest {state}"]


def load_folder(folder, out, rng):
    """Read a pipeline folder, now and then by its other names."""
    DiffSketchingPipeline.from_pretrained(folder, **rng.choice([{}, {}, {}, {"variant": "fp16"}, {"sketcher": None}]))


# ---- checkpoints ---------------------------------------------------------------------------------------------------


def mutate_tensors(state_dict, rng):
    """One change of the tensors of a state dict; returns what was done."""
    name = rng.choice(list(state_dict))
    old = state_dict[name]
    kind = rng.choice(
        ["shape", "dtype", "wide", "sparse", "meta", "none", "gone", "name", "many", "blocks", "quantized"]
    )
    if kind == "shape":
        state_dict[name] = rng.choice(
            [old.flatten(), old[None], old.reshape(-1)[:1], old.reshape(-1)[:0], torch.tensor(1.0)]
        )
    elif kind == "dtype":
        types = [torch.int8, torch.bool, torch.complex64, torch.float64, torch.bfloat16, torch.float8_e4m3fn]
        state_dict[name] = old.to(rng.choice(types))
    elif kind == "wide":
        state_dict[name] = torch.zeros(1).expand(rng.choice([[10**10], [10**5, 10**4, 3, 3], [*old.shape]]))
    elif kind == "sparse":
        state_dict[name] = old.to_sparse()
    elif kind == "meta":
        state_dict[name] = old.to("meta")
    elif kind == "quantized":
        state_dict[name] = torch.quantize_per_tensor(old.float(), 0.1, 0, torch.qint8)
    elif kind == "none":
        state_dict[name] = rng.choice([None, 3, "x", [old], {"a": old}])
    elif kind == "gone":
        del state_dict[name]
    elif kind == "name":
        new = rng.choice(
            ["x" * 10**5, "\x1b[2J", 3, "", "model.1.weight", "label_emb.weight", "model.99999.conv_block.1.weight"]
        )
        state_dict[new] = state_dict.pop(name)
    elif kind == "many":
        state_dict |= {f"input_blocks.{i}.0.in_layers.0.weight": torch.zeros(1) for i in range(20_000)}
    else:
        state_dict |= {f"model.{i}.conv_block.1.weight": torch.zeros(1) for i in range(10, 6000)}
    return f"{kind} {str(name)[:40]}"


def write_checkpoint(path, state_dict, rng, marker):
    """Write a state dict, or what only looks like one; returns what was done."""
    kind = rng.choice(
        ["as it is", "as it is", "as it is", "legacy", "nested", "list", "payload", "bytes", "bomb", "cut"]
    )
    if kind in ("nested", "list"):
        state_dict = {"state_dict": state_dict} if kind == "nested" else list(state_dict.items())
    elif kind == "payload":
        state_dict = {**state_dict, "x": Payload(marker)}
    torch.save(state_dict, path, _use_new_zipfile_serialization=kind != "legacy")
    content = bytearray(path.read_bytes())
    if kind == "bytes":
        for _ in range(rng.choice([1, 50])):
            content[rng.randrange(min(len(content), rng.choice([200, 10**5, 10**9])))] = rng.randrange(256)
    elif kind == "cut":
        del content[rng.randrange(len(content)) :]
    elif kind == "bomb":
        file = io.BytesIO()
        with (
            zipfile.ZipFile(io.BytesIO(bytes(content))) as old,
            zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as new,
        ):
            for entry in old.infolist():
                data = bytes(2**27) if entry.filename.endswith("/data/0") else old.read(entry)
                new.writestr(entry.filename, data, zipfile.ZIP_DEFLATED)
        content = file.getvalue()
    path.write_bytes(content)
    return kind


def mutate_checkpoint(folder, rng, marker):
    """One change or two of the three files that a conversion reads: a state dict in `.pt` or safetensors, and flags."""
    done = []
    if rng.random() < 0.3:
        done.append(mutate_json(folder / "flags.json", rng))
    path = rng.choice([path for path in sorted(folder.iterdir()) if path.suffix == ".safetensors"])
    if rng.random() < 0.25:
        return [*done, mutate_safetensors(path, rng)]
    state_dict = dict(load_file(path))
    if rng.random() < 0.6:
        done.append(mutate_tensors(state_dict, rng))
    new = path.with_suffix(".pt")
    done.append(f"{new.name} {write_checkpoint(new, state_dict, rng, marker)}")
    path.unlink()
    return done


def _weights(folder, name):
    return next(path for path in (folder / f"{name}.pt", folder / f"{name}.safetensors") if path.exists())


def convert_adm(folder, out, rng):
    weights = [_weights(folder, name) for name in ("diffusion", "classifier")]
    convert_guided_diffusion(*weights, flags=folder / "flags.json", output_dir=out)


def convert_generator(folder, out, rng):
    convert_photosketch(_weights(folder, "latest_net_G"), out)


# ---- all of it -----------------------------------------------------------------------------------------------------


def make_bases(root):
    """Write what is mutated, under `root`: two pipeline folders, and the checkpoints of two projects."""
    common = {
        "scheduler": make_scheduler(),
        "id2label": ID2LABEL,
        "recommended": {"num_inference_steps": 5, "eta": 0.5},
    }
    for name, unet, components in (("pixels", {}, COMPONENTS), ("latents", LATENT_UNET, LATENT_COMPONENTS)):
        modules = {component: build() for component, build in components.items()}
        pipe = DiffSketchingPipeline(unet=make_unet(**unet), **modules, **copy.deepcopy(common))
        pipe.save_pretrained(root / name)
    for name in ("adm_mini", "photosketch_mini"):
        (root / name).mkdir()
        for path in (FIXTURES / name).iterdir():
            if path.name != "expected.safetensors":
                shutil.copyfile(path, root / name / path.name)
    return root


KINDS = {
    "folder": [("pixels", mutate_folder, load_folder), ("latents", mutate_folder, load_folder)],
    "checkpoint": [
        ("adm_mini", mutate_checkpoint, convert_adm),
        ("photosketch_mini", mutate_checkpoint, convert_generator),
    ],
}


def run_kind(kind, seeds, root):
    """The outcome of each case of a kind, `root` being what [`make_bases`] filled."""
    for seed in seeds:
        base, mutate, load = KINDS[kind][seed % 2]
        with tempfile.TemporaryDirectory() as folder:
            yield run_case(kind, mutate, load, seed, root / base, Path(folder))


def main():
    with tempfile.TemporaryDirectory() as folder:
        root = make_bases(Path(folder))
        for kind in KINDS:
            for _ in run_kind(kind, range(4), root):
                pass  # what is imported at the first use is no part of what a case costs
        if len(sys.argv) == 3:
            print(*run_kind(sys.argv[1], [int(sys.argv[2])], root))
            return
        count = int(sys.argv[1])
        for kind, seeds in (("folder", range(count)), ("checkpoint", range(count // 2))):
            outcomes = list(run_kind(kind, seeds, root))
            for outcome in outcomes:
                if outcome.what not in ("read", "refused"):
                    print(f"{outcome.what}: {outcome.case}: {outcome.message}")
            counts = collections.Counter(outcome.what for outcome in outcomes)
            worst = [max(getattr(outcome, name) for outcome in outcomes) for name in ("seconds", "megabytes")]
            print(
                f"{len(outcomes)} of {kind}: {dict(counts)}; at most {worst[0]:.2f} s and {worst[1]:.0f} MB",
                flush=True,
            )


if __name__ == "__main__":
    main()
