# SPDX-License-Identifier: Apache-2.0
"""
Every way a checkpoint may be loaded: from a folder, a hub, a commit of it, and its cache without a hub; with this package
and without it. `.ci/run` runs this file with the lowest supported versions too.
"""

import copy
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import hub_client
import pytest
import torch
from hub_server import READ_TOKEN, WRITE_TOKEN, HubServer
from testing_utils import ROOT

from diffsketching_pipeline import export_pipeline


REPO, PLAIN, LATENT = "ana/tiny", "ana/plain", "ana/latent"
CODE = {"trust_remote_code": True, "custom_pipeline": REPO}
COMPONENTS = ["classifier", "image_encoder", "scheduler", "sketch_encoder", "sketcher", "unet"]


def run_client(hub, tasks, folder, home, *options, **env):
    """Return what came of each task in a fresh process."""
    folder.mkdir(parents=True, exist_ok=True)
    tasks_path, results_path = folder / "tasks.json", folder / "results.json"
    tasks_path.write_text(json.dumps(tasks))
    script = Path(hub_client.__file__)
    path = os.pathsep.join(filter(None, [str(script.parents[1]), os.environ.get("PYTHONPATH")]))
    env = {**os.environ, "PYTHONPATH": path, "HF_TOKEN": WRITE_TOKEN, **hub.client_env(home), **env}
    command = [sys.executable, str(script), str(tasks_path), str(results_path), *options]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(results_path.read_text())


@pytest.fixture(scope="module")
def hub():
    with HubServer() as hub:
        yield hub


@pytest.fixture(scope="module")
def pipelines(tiny_pipeline_factory, latent_pipeline_factory):
    """
    The pipeline of the repository's first commit, that of its second, one in float16, one of two components, and one that
    works on latents.
    """
    old, new = tiny_pipeline_factory(), tiny_pipeline_factory()
    plain = tiny_pipeline_factory(components=())
    with torch.no_grad():
        new.unet.conv_out.bias.add_(0.5)
    half = copy.deepcopy(new)
    for component in half.components.values():
        if isinstance(component, torch.nn.Module):
            component.half().float()
    return {"old": old, "new": new, "half": half, "plain": plain, "latent": latent_pipeline_factory()}


@pytest.fixture(scope="module")
def expected(pipelines):
    """Pixels and weights of the pipelines in memory, which never saw a file."""
    return {name: hub_client.describe(pipe, run=True) for name, pipe in pipelines.items()}


@pytest.fixture(scope="module")
def folders(pipelines, tmp_path_factory):
    root = tmp_path_factory.mktemp("exported")
    for name in ("old", "new", "plain", "latent"):
        export_pipeline(pipelines[name], root / name, fp16_variant=name == "new", repo_id=REPO, license="apache-2.0")
    return root


def load(source, kind="DiffSketchingPipeline", **kwargs):
    return {"do": "load", "class": kind, "source": str(source), "run": kind.endswith("Pipeline"), "kwargs": kwargs}


def ways(place, source, plain, latent, **where):
    """The columns of the matrix for one row: a place to load from."""
    return {
        f"{place}: pipeline": load(source, **where),
        f"{place}: component": load(source, "NoisyImageClassifier", subfolder="classifier", **where),
        f"{place}: bfloat16": load(source, torch_dtype="bfloat16", **where) | {"run": False},
        f"{place}: device map": load(source, device_map="cpu", **where),
        f"{place}: plain": load(plain),
        f"{place}: latent": load(latent),
        f"{place}: edit": load(source, "DiffSketchingEditPipeline", **where) | {"run": False},
        f"{place}: interpolation": load(source, "DiffSketchingInterpolationPipeline", **where) | {"run": False},
    }


@pytest.fixture(scope="module")
def online(hub, folders, tmp_path_factory):
    """Results of one process that has the package: it pushes twice, then loads from everywhere."""
    root = tmp_path_factory.mktemp("online")
    push = {"do": "push_pipeline", "source": str(folders / "old"), "repo_id": REPO, "kwargs": {"private": True}}
    tasks = {
        "push old": push,
        "push new": push | {"source": str(folders / "new"), "kwargs": {"fp16_variant": True}},
        "push plain": push | {"source": str(folders / "plain"), "repo_id": PLAIN, "kwargs": {}},
        "push latent": push | {"source": str(folders / "latent"), "repo_id": LATENT, "kwargs": {}},
        **ways("folder", folders / "new", folders / "plain", folders / "latent"),
        "folder: fp16": load(folders / "new", variant="fp16"),
        **ways("hub", REPO, PLAIN, LATENT),
        "hub: fp16": load(REPO, variant="fp16"),
        **ways("commit", REPO, PLAIN, LATENT, revision={"of": "push old"}),
        "hub: another's token": load(REPO, token="hf_WriteOfBob", cache_dir=str(root / "other")),
        "hub: no such revision": load(REPO, revision="no-such"),
        "hub: pickles by request": load(REPO, use_safetensors=False),
    }
    for name, files in hostile_files(folders / "new").items():
        hub.add_repo(f"ana/{name}", files)
        tasks[f"hostile: {name}"] = load(f"ana/{name}")
    command = ["push", str(folders / "new"), "ana/by-command", "--private"]
    tasks["command: push"] = {"do": "command", "arguments": command}
    tasks["command: pushed"] = load("ana/by-command")
    tasks["command: refused"] = {"do": "command", "arguments": ["push", str(folders / "new"), "bob/tiny"]}
    tasks["readme"] = {"do": "execute", "code": readme_block("snippet", "hub"), "name": "pipe"}
    tasks["commit: fp16"] = load(REPO, variant="fp16", revision={"of": "push old"})
    return run_client(hub, json.loads(json.dumps(tasks)), root, root / "home"), root / "home"


@pytest.fixture(scope="module")
def offline(hub, online, tmp_path_factory):
    commit = online[0]["push old"]["result"].rsplit("/")[-1]
    tasks = {**ways("cache", REPO, PLAIN, LATENT), "cache: fp16": load(REPO, variant="fp16")}
    tasks |= ways("cached commit", REPO, PLAIN, LATENT, revision=commit)
    tasks["cache: local files only"] = load(REPO, local_files_only=True)
    return run_client(hub, tasks, tmp_path_factory.mktemp("offline"), online[1], HF_HUB_OFFLINE="1", HF_TOKEN="")


def readme_block(kind, name):
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    return re.search(rf"<!-- {kind}: {name} -->\s*```\w+\n(.*?)```", readme, re.S)[1]


def hostile_files(folder):
    """Repositories that somebody made to harm those who load them, from a good one."""
    files = {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    weights = "unet/diffusion_pytorch_model.safetensors"
    content = files[weights]
    index = json.loads(files["model_index.json"])
    no_list = {name: content for name, content in files.items() if name != "SHA256SUMS"}
    pickled = {name: content for name, content in no_list.items() if not name.startswith("unet/diff")}
    return {
        "pickle": {**pickled, "unet/diffusion_pytorch_model.bin": b"\x80\x04."},
        "flipped": {**files, weights: content[:-1] + bytes([content[-1] ^ 1])},
        "truncated": {**no_list, weights: content[:-1]},
        "module": {**no_list, "model_index.json": json.dumps({**index, "unet": ["antigravity", "fly"]}).encode()},
        "nameless": {**no_list, "model_index.json": json.dumps({**index, "_class_name": None}).encode()},
        "outside": {**no_list, "scheduler/../../../../evil.json": b"{}", "../evil.json": b"{}"},
    }


def without_package(source, **kwargs):
    return load(source, "DiffusionPipeline", **kwargs)


@pytest.fixture(scope="module")
def bare_online(hub, online, folders, tmp_path_factory):
    """The same in a machine that never saw this package, nor the checkpoint."""
    commit = online[0]["push old"]["result"].rsplit("/")[-1]
    here = str(folders / "new")
    tasks = {
        "folder: no package": without_package(here, trust_remote_code=True, custom_pipeline=here),
        "hub: no package": without_package(REPO, **CODE),
        "hub: no package, bfloat16": without_package(REPO, **CODE, torch_dtype="bfloat16") | {"run": False},
        "hub: no package, fp16": without_package(REPO, **CODE, variant="fp16"),
        "hub: no package, device map": without_package(REPO, **CODE, device_map="cpu"),
        "hub: no package, plain": without_package(PLAIN, trust_remote_code=True, custom_pipeline=PLAIN),
        "hub: no package, latent": without_package(LATENT, trust_remote_code=True, custom_pipeline=LATENT),
        "commit: no package": without_package(REPO, **CODE, revision=commit, custom_revision=commit),
        "hub: no package, component": load(REPO, "UNet2DModel", subfolder="unet"),
        "hub: no package, code not trusted": without_package(REPO, custom_pipeline=REPO),
        "folder: no package, code not trusted": without_package(here, custom_pipeline=here),
        "hub: no package, code not named": without_package(REPO, trust_remote_code=True),
        "import": load(REPO, "DiffSketchingPipeline"),
    }
    root = tmp_path_factory.mktemp("bare")
    results = run_client(hub, tasks, root, root / "home", "--without-package", HF_TOKEN=READ_TOKEN)
    return results, root / "home"


@pytest.fixture(scope="module")
def bare_offline(hub, online, bare_online, tmp_path_factory):
    commit = online[0]["push old"]["result"].rsplit("/")[-1]
    cached = without_package(REPO, trust_remote_code=True) | {"from_cache": True}
    tasks = {
        "cache: no package": cached,
        "cached commit: no package": cached | {"kwargs": {"trust_remote_code": True, "revision": commit}},
        "cache: no package, code by hub id": without_package(REPO, **CODE),
    }
    folder = tmp_path_factory.mktemp("bare-offline")
    return run_client(hub, tasks, folder, bare_online[1], "--without-package", HF_HUB_OFFLINE="1")


@pytest.fixture(scope="module")
def results(online, offline, bare_online, bare_offline):
    return {**online[0], **offline, **bare_online[0], **bare_offline}


PLACES = {"folder": "new", "hub": "new", "commit": "old", "cache": "new", "cached commit": "old"}


def result_of(results, name):
    assert "error" not in results[name], results[name]["traceback"]
    return results[name]["result"]


@pytest.mark.parametrize("place", PLACES)
def test_the_pipeline_gives_the_pixels_of_the_one_that_was_saved(results, expected, place):
    for way in ("pipeline", "device map"):
        result = result_of(results, f"{place}: {way}")
        assert result["pixels"] == expected[PLACES[place]]["pixels"]
        assert result["weights"] == expected[PLACES[place]]["weights"]
        assert result["module"] == "diffsketching_pipeline.pipeline_diffsketching"
        assert result["modules"]["classifier"] == "diffsketching_pipeline.modeling_noisy_classifier"
        assert result["components"] == COMPONENTS
        assert result["dtypes"] == ["torch.float32"] and result["devices"] == ["cpu"]
    assert expected["old"]["pixels"] != expected["new"]["pixels"]


@pytest.mark.parametrize("place", PLACES)
def test_the_other_pipelines_load_from_the_same_checkpoint(results, expected, place):
    for name in ("edit", "interpolation"):
        result = result_of(results, f"{place}: {name}")
        assert result["module"] == f"diffsketching_pipeline.pipeline_diffsketching_{name}"
        assert result["weights"] == expected[PLACES[place]]["weights"]
        assert result["components"] == COMPONENTS


@pytest.mark.parametrize("place", ["folder", "hub", "commit", "cache", "cached commit"])
def test_without_the_package_the_code_of_the_checkpoint_gives_the_same_pixels(results, expected, place):
    result = result_of(results, f"{place}: no package")
    assert result["pixels"] == expected[PLACES[place]]["pixels"]
    assert result["module"].startswith("diffusers_modules.")
    assert result["modules"]["classifier"].startswith("diffusers_modules.")
    assert result["modules"]["sketcher"].startswith("diffusers_modules.")
    assert result["components"] == COMPONENTS


def test_the_package_is_really_absent_there(results):
    assert results["import"]["error"] == "ModuleNotFoundError"
    assert "diffsketching_pipeline" in results["import"]["message"]


@pytest.mark.parametrize("place", PLACES)
def test_one_component(results, pipelines, place):
    result = result_of(results, f"{place}: component")
    assert result["weights"] == hub_client.weights_sha256({"": pipelines["old"].classifier})
    assert result["modules"] == {"": "diffsketching_pipeline.modeling_noisy_classifier"}
    unet = result_of(results, "hub: no package, component")
    assert unet["weights"] == hub_client.weights_sha256({"": pipelines["new"].unet})


@pytest.mark.parametrize("place", ["folder", "hub", "cache", "hub: no package, "])
def test_variant(results, expected, place):
    name = f"{place}: fp16" if place in PLACES else f"{place}fp16"
    assert result_of(results, name)["weights"] == expected["half"]["weights"] != expected["new"]["weights"]
    if place in PLACES:
        assert results[name]["result"]["pixels"] == expected["half"]["pixels"]


def test_a_variant_that_is_not_there_is_refused(results):
    assert results["commit: fp16"]["error"] in ("ValueError", "OSError")
    assert "variant=fp16" in results["commit: fp16"]["message"]


@pytest.mark.parametrize("place", [*PLACES, "hub: no package, "])
def test_dtype(results, place):
    name = f"{place}: bfloat16" if place in PLACES else f"{place}bfloat16"
    assert result_of(results, name)["dtypes"] == ["torch.bfloat16"]


@pytest.mark.parametrize("name", [*(f"{place}: plain" for place in PLACES), "hub: no package, plain"])
def test_a_checkpoint_of_two_components(results, expected, name):
    result = result_of(results, name)
    assert result["components"] == ["scheduler", "unet"]
    assert result["pixels"] == expected["plain"]["pixels"]


@pytest.mark.parametrize("name", [*(f"{place}: latent" for place in PLACES), "hub: no package, latent"])
def test_a_checkpoint_that_works_on_latents(results, expected, name):
    result = result_of(results, name)
    assert result["components"] == [*COMPONENTS, "vae"]
    assert result["modules"]["vae"] == "diffusers.models.autoencoders.autoencoder_tiny"
    for what in ("pixels", "weights"):
        assert result[what] == expected["latent"][what] != expected["new"][what]


def test_device_map_without_the_package(results, expected):
    assert result_of(results, "hub: no package, device map")["pixels"] == expected["new"]["pixels"]


def test_local_files_only(results, expected):
    assert result_of(results, "cache: local files only")["pixels"] == expected["new"]["pixels"]


@pytest.mark.parametrize(
    "name, error, message",
    [
        ("hub: no package, code not trusted", "ValueError", "trust_remote_code=True"),
        ("folder: no package, code not trusted", "ValueError", "trust_remote_code=True"),
        ("hub: no package, code not named", "AttributeError", "DiffSketchingPipeline"),
        ("hub: no such revision", "OSError", REPO),
        ("hub: pickles by request", "ValueError", "`use_safetensors` has to be True"),
        ("hub: another's token", "OSError", REPO),
        # diffusers asks the hub for the commit of the code; the cached folder, given as a path, needs no hub.
        ("cache: no package, code by hub id", "OfflineModeIsEnabled", "offline mode is enabled"),
    ],
)
def test_what_is_refused(results, name, error, message):
    assert results[name]["error"].endswith(error)
    assert message in results[name]["message"]


def test_a_push_is_one_commit_that_holds_everything(hub, online, folders):
    results = online[0]
    repo = hub.repos[REPO]
    assert repo.private and not hub.repos[PLAIN].private
    assert len(repo.commits) == 3  # that of the creation, and one per push
    assert results["push new"]["result"] == f"{hub.endpoint}/{REPO}/commit/{repo.refs['main']}"
    pushed = {name: content for name, content in repo.files().items() if name != ".gitattributes"}
    local = {
        p.relative_to(folders / "new").as_posix(): p.read_bytes() for p in (folders / "new").rglob("*") if p.is_file()
    }
    assert pushed.keys() == local.keys()
    for name in pushed.keys() - {"README.md", "SHA256SUMS"}:
        assert pushed[name] == local[name], name
    assert not any(WRITE_TOKEN.encode() in content for content in pushed.values())


@pytest.mark.parametrize(
    "name, message",
    [
        ("pickle", "Other files may be pickles, which can run any program when they are read"),
        ("flipped", "`unet/diffusion_pytorch_model.safetensors` is not the file that SHA256SUMS lists"),
        ("truncated", "`unet/diffusion_pytorch_model.safetensors` is truncated"),
        ("module", "antigravity"),
        ("nameless", "`model_index.json`"),
    ],
)
def test_hostile_repositories_are_refused(online, name, message):
    assert online[0][f"hostile: {name}"]["error"] == "ValueError"
    assert message in online[0][f"hostile: {name}"]["message"]


def test_a_file_name_that_leads_outside_writes_nothing_there(online):
    assert online[0]["hostile: outside"]["error"] == "ValueError"
    assert not list(online[1].parent.rglob("evil*"))


def test_the_command_exports_and_pushes(hub, online, expected):
    results = online[0]
    assert results["command: push"]["result"]["code"] == 0, results["command: push"]["result"]["err"]
    repo = hub.repos["ana/by-command"]
    assert repo.private and len(repo.commits) == 2
    assert results["command: push"]["result"]["out"] == f"{hub.endpoint}/ana/by-command/commit/{repo.refs['main']}\n"
    assert result_of(results, "command: pushed")["weights"] == expected["new"]["weights"]
    refusal = results["command: refused"]["result"]
    assert refusal["code"] == 2 and refusal["out"] == ""
    assert (
        refusal["err"].startswith("diffsketching: error: `bob/tiny` was not pushed to")
        and refusal["err"].count("\n") == 1
    )


def test_the_readme_snippet_pushes_and_loads(hub, online):
    result = result_of(online[0], "readme")
    assert "unet" in result["components"] and result["dtypes"] == ["torch.float32"]
    assert any("garments" in repo_id for repo_id in hub.repos)
