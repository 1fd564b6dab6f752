# SPDX-License-Identifier: Apache-2.0
"""Uploads and downloads over a bad line, with a wrong token, and with files that a checkpoint does not have."""

import hashlib
import json
import os
import random
import re
import socket
import subprocess
import sys
from collections import Counter

import pytest
from diffusers import DDPMPipeline, DDPMScheduler
from hub_server import OTHER_TOKEN, READ_TOKEN, WRITE_TOKEN, HubServer
from safetensors.numpy import save
from test_hub_load_matrix import run_client
from testing_utils import ROOT, make_unet

from diffsketching_pipeline.manifest import write_manifest


CARD = "---\nlicense: apache-2.0\n---\n\n# Nothing\n"


@pytest.fixture
def hub():
    with HubServer() as hub:
        yield hub


def write_checkpoint(folder, seed, shards=2, size=100_000, card=CARD):
    """A folder of one component: nothing here reads its weights."""
    import numpy as np

    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    (folder / "config.json").write_text(json.dumps({"seed": seed}))
    for shard in range(shards):
        (folder / f"model-{shard}.safetensors").write_bytes(
            save({"weight": rng.integers(0, 255, size, dtype="uint8")})
        )
    (folder / "README.md").write_text(card)
    write_manifest(folder)
    return folder


def content_of(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def push(folder, repo_id, **kwargs):
    return {"do": "push_folder", "source": str(folder), "repo_id": repo_id, "kwargs": kwargs}


def without_attributes(files):
    return {name: content for name, content in files.items() if name != ".gitattributes"}


def test_a_push_that_is_cut_anywhere_leaves_the_old_or_the_new_commit(hub, tmp_path):
    rng = random.Random(0)
    old = content_of(write_checkpoint(tmp_path / "old", seed=1000))
    new = {f"ana/cut-{i}": write_checkpoint(tmp_path / f"new-{i}", seed=2000 + i) for i in range(10)}
    whole = write_checkpoint(tmp_path / "whole", seed=3000)
    hub.add_repo("ana/whole", old)
    run_client(hub, {"whole": push(whole, "ana/whole")}, tmp_path / "1", tmp_path / "home")
    total = hub.received["ana/whole"]
    # Eight anywhere, one within the commit and one after it, when only its answer is lost.
    cuts = [*(rng.randrange(total) for _ in range(8)), total - 200, total - 1]
    for repo_id, cut in zip(new, cuts, strict=True):
        hub.add_repo(repo_id, old)
        hub.upload_budgets[repo_id] = cut
    tasks = {"do": "at_once", "tasks": [push(folder, repo_id) for repo_id, folder in new.items()]}
    results = run_client(hub, {"cut": tasks}, tmp_path / "2", tmp_path / "home")["cut"]["result"]

    for (repo_id, folder), cut, result in zip(new.items(), cuts, results, strict=True):
        assert result["error"] == "OSError" and "It holds the old files or the new ones" in result["message"]
        committed = cut == total - 1
        assert hub.repos[repo_id].files() == (content_of(folder) if committed else old), cut
        assert len(hub.repos[repo_id].commits) == 1 + committed

    hub.upload_budgets.clear()
    results = run_client(hub, {"again": tasks}, tmp_path / "3", tmp_path / "home")["again"]["result"]
    for (repo_id, folder), result in zip(new.items(), results, strict=True):
        assert result["result"].endswith(hub.repos[repo_id].refs["main"])
        assert hub.repos[repo_id].files() == content_of(folder)
        assert len(hub.repos[repo_id].commits) == 2
    received = [path for method, path, status in hub.log if method == "PUT" and status == 200]
    # What had arrived before a cut was not sent again.
    assert len(received) == len(set(received)) == 2 * len(new) + 2


def test_a_download_that_is_cut_anywhere_resumes_to_the_same_file(hub, tmp_path):
    rng = random.Random(1)
    content = rng.randbytes(21 * 2**20)
    names = [f"weights-{i}.safetensors" for i in range(10)]
    hub.add_repo("ana/large", dict.fromkeys(names, content))
    cuts = [rng.randrange(len(content)) for _ in names]
    # After every other cut the hub refuses the client, which gives up; a new one goes on.
    hub.cuts = {name: (cut, i % 2) for i, (name, cut) in enumerate(zip(names, cuts, strict=True))}

    def fetch(number):
        tasks = [
            {"do": "download", "source": "ana/large", "filename": name, "cache_dir": str(tmp_path / name)}
            for name in names
        ]
        tasks = {"all": {"do": "at_once", "tasks": tasks}}
        return run_client(hub, tasks, tmp_path / str(number), tmp_path / "home")["all"]["result"]

    first, second = fetch(1), fetch(2)
    assert not hub.cuts
    expected = hashlib.sha256(content).hexdigest()
    for i in range(10):
        assert ("error" in first[i]) == (i % 2 == 1), first[i]
        assert second[i] == {"result": expected}
    # The client writes blocks of 10 MB: after a cut beyond the first it asks for the rest alone. (One that gave up may
    # begin anew, depending on its version.)
    block = 10 * 2**20
    resumed = Counter(start for start in hub.ranges if start)
    assert Counter(cut // block * block for cut in cuts[::2] if cut >= block) <= resumed
    assert resumed


def test_a_push_replaces_its_own_files_and_no_others(hub, tmp_path):
    old, new = write_checkpoint(tmp_path / "old", 0, shards=3), write_checkpoint(tmp_path / "new", 1, shards=1)
    repo = hub.add_repo("ana/model", {**content_of(old), "samples/a.txt": b"by hand", ".gitattributes": b""})
    tasks = {
        "pull request": push(new, "ana/model", create_pr=True),
        "branch": push(new, "ana/model", revision="next", commit_message="Next"),
        "push": push(new, "ana/model"),
        "same again": push(new, "ana/model"),
        "private": push(new, "ana/secret", private=True),
        "both": push(new, "ana/model", create_pr=True, revision="next"),
    }
    # A hub that is busy at first: once too often asked, once broken.
    hub.faults += [["POST", "/preupload/", 500, 1], ["PUT", "/storage/", 429, 1]]
    results = run_client(hub, tasks, tmp_path / "run", tmp_path / "home")
    expected = {**content_of(new), "samples/a.txt": b"by hand", ".gitattributes": b""}
    assert repo.files("refs/pr/1") == repo.files("next") == repo.files("main") == expected
    assert len(repo.commits) == 4
    assert results["pull request"]["result"] == f"{hub.endpoint}/ana/model/discussions/1"
    assert results["same again"]["result"] == results["push"]["result"]
    assert hub.repos["ana/secret"].private
    assert results["both"]["error"] == "ValueError" and "`revision` has to be left out" in results["both"]["message"]
    assert [fault[3] for fault in hub.faults] == [0, 0]


def test_what_is_refused_is_refused_before_anything_is_sent(hub, tmp_path):
    folder = write_checkpoint(tmp_path / "good", 0)
    flipped = write_checkpoint(tmp_path / "flipped", 0)
    content = bytearray((flipped / "model-0.safetensors").read_bytes())
    content[-1] ^= 1
    (flipped / "model-0.safetensors").write_bytes(content)
    foreign = {name: write_checkpoint(tmp_path / name, 0) for name in ("optimizer.bin", "training_args.yaml")}
    for name, each in foreign.items():
        (each / name).write_bytes(b"x")
        write_manifest(each)
    (tmp_path / "empty").mkdir()
    card = write_checkpoint(tmp_path / "card", 0, card="---\nlicense: Apache 2\n---\n")
    tasks = {
        "flipped": push(flipped, "ana/a"),
        "empty": push(tmp_path / "empty", "ana/a"),
        "missing": push(tmp_path / "missing", "ana/a"),
        "name": push(folder, "ana/../a"),
        "card": push(card, "ana/a"),
        **{name: push(each, "ana/a") for name, each in foreign.items()},
        "read": push(folder, "ana/a", token=READ_TOKEN),
        "bob": push(folder, "ana/a", token=OTHER_TOKEN),
        "nobody": push(folder, "ana/a", token="hf_Nobody"),
        "none": push(folder, "ana/a", token=False),
    }
    results = run_client(hub, tasks, tmp_path / "run", tmp_path / "home")
    messages = {
        "flipped": r"`model-0.safetensors` is not the file that SHA256SUMS lists",
        "empty": "`folder` has to hold a config and safetensors weights",
        "missing": "`folder` has to be a checkpoint's folder but is .*missing",
        "name": "`repo_id` has to be like 'user/name' but is 'ana/../a'",
        "card": "Invalid metadata in README.md",
        "optimizer.bin": "`folder` holds 'optimizer.bin', which is not part of a checkpoint",
        "training_args.yaml": "`folder` holds 'training_args.yaml'",
        "read": "`ana/a` was not pushed to.*403",
        "bob": "`ana/a` was not pushed to.*403",
        "nobody": "`ana/a` was not pushed to.*401",
        "none": "`ana/a` was not pushed to.*401",
    }
    for name, message in messages.items():
        assert results[name]["error"] == ("OSError" if "not pushed" in message else "ValueError"), results[name]
        assert re.search(message, results[name]["message"], re.S), results[name]["message"]
        assert "hf_" not in results[name]["message"]
    assert not [path for method, path, _ in hub.log if method == "PUT" or "/commit/" in path]


def test_one_component_is_pushed_with_a_card(hub, tmp_path):
    folder = write_checkpoint(tmp_path / "classifier", 0)
    (folder / "config.json").write_text(
        json.dumps({"_class_name": "NoisyImageClassifier", "_name_or_path": "/home/me"})
    )
    before = content_of(folder)
    tasks = {"push": {"do": "push_component", "source": str(folder), "repo_id": "ana/classifier", "kwargs": {}}}
    results = run_client(hub, tasks, tmp_path / "run", tmp_path / "home")
    pushed = hub.repos["ana/classifier"].files()
    assert results["push"]["result"].endswith(hub.repos["ana/classifier"].refs["main"])
    assert json.loads(pushed["config.json"]) == {"_class_name": "NoisyImageClassifier"}
    assert b'NoisyImageClassifier.from_pretrained("ana/classifier")' in pushed["README.md"]
    assert pushed["model-0.safetensors"] == before["model-0.safetensors"]
    assert content_of(folder) == before


def test_of_several_processes_only_the_main_one_pushes(hub, tmp_path):
    folder = write_checkpoint(tmp_path / "model", 0)
    code = "import sys\nfrom accelerate import PartialState\nPartialState(cpu=True)\n"
    code += "from diffsketching_pipeline import push_folder\nprint(push_folder(sys.argv[1], 'ana/model'))"
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    env = {**os.environ, **hub.client_env(tmp_path / "home"), "HF_TOKEN": WRITE_TOKEN, "OMP_NUM_THREADS": "1"}
    env |= {"PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))}
    env |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "GLOO_SOCKET_IFNAME": "lo", "WORLD_SIZE": "2"}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", code, str(folder)],
            env={**env, "RANK": rank, "LOCAL_RANK": rank},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in ("0", "1")
    ]
    printed = [process.communicate(timeout=300) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], printed
    assert printed[0][0].strip().endswith(hub.repos["ana/model"].refs["main"])
    assert printed[1][0].strip() == "None"
    assert sum(method == "POST" and "/commit/" in path for method, path, _ in hub.log) == 1


def test_a_cached_checkpoint_without_a_manifest_loads_while_the_hub_is_down(hub, tmp_path):
    commit = hub.add_repo("ana/plain", {"config.json": b"{}"}).refs["main"]
    fetch = {"do": "fetch_manifest", "source": "ana/plain", "folder": commit, "kwargs": {}}
    down = {"endpoint": "http://127.0.0.1:9"}
    tasks = {
        "never seen": fetch | {"kwargs": down},
        "seen": fetch,
        "down": fetch | {"kwargs": down},
        "offline": fetch | {"kwargs": {"local_files_only": True}},
    }
    results = run_client(hub, tasks, tmp_path / "run", tmp_path / "home")
    assert results["never seen"]["error"] == "LocalEntryNotFoundError"
    assert results["seen"] == results["down"] == results["offline"] == {"result": None}
    assert hub.log == [("HEAD", f"/ana/plain/resolve/{commit}/SHA256SUMS", 404)]


def test_training_starts_from_a_plain_pipeline_of_the_hub(hub, tmp_path):
    unet = make_unet(in_channels=3, num_class_embeds=None)
    DDPMPipeline(unet, DDPMScheduler(beta_schedule="linear")).save_pretrained(tmp_path / "ddpm")
    files = {
        path.relative_to(tmp_path / "ddpm").as_posix(): path.read_bytes()
        for path in (tmp_path / "ddpm").rglob("*")
        if path.is_file()
    }
    hub.add_repo("somebody/ddpm", files)
    tasks = {
        "plain": {"do": "start", "source": "somebody/ddpm"},
        "local": {"do": "start", "source": str(tmp_path / "ddpm")},
    }
    tasks["missing"] = {"do": "start", "source": "somebody/else"}
    results = run_client(hub, tasks, tmp_path / "run", tmp_path / "home")
    assert results["plain"] == results["local"], results
    assert results["plain"]["result"]["in_channels"] == 4 and results["plain"]["result"]["schedule"] == "linear"
    assert "somebody/else" in results["missing"]["message"]
