# SPDX-License-Identifier: Apache-2.0
"""`--push_to_hub` of the training scripts, against a hub on loopback."""

import subprocess
import sys

import pytest
import yaml
from hub_server import READ_TOKEN, WRITE_TOKEN, HubServer
from test_train_unet import TINY
from testing_utils import TRAINING

from diffsketching_pipeline.training.arguments import TrainingArguments, check_arguments, public_arguments


@pytest.fixture
def hub():
    with HubServer() as hub:
        yield hub


def train(hub, shapes_dir, tmp_path, script_env, token, *options):
    """Trains for a step with the token in the config file; what was printed, and the exit code."""
    config = tmp_path / "config.yaml"
    arguments = {
        "train_data_dir": str(shapes_dir),
        "max_train_steps": 1,
        "report_to": "tensorboard",
        "hub_token": token,
    }
    config.write_text(yaml.safe_dump({**TINY, **arguments}))
    command = [sys.executable, str(TRAINING / "train_unet.py"), str(config), "--output_dir", str(tmp_path / "out")]
    command += ["--push_to_hub", "--hub_model_id", "ana/trained", "--hub_private_repo", *options]
    env = {**script_env, **hub.client_env(tmp_path / "home")}
    return subprocess.run(command, env=env, capture_output=True, text=True)


def test_a_finished_run_is_pushed_and_the_token_stays_with_its_owner(hub, shapes_dir, tmp_path, script_env):
    run = train(hub, shapes_dir, tmp_path, script_env, WRITE_TOKEN)
    assert run.returncode == 0, run.stderr
    repo = hub.repos["ana/trained"]
    assert repo.private and len(repo.commits) == 2
    assert run.stdout.splitlines() == [
        str(tmp_path / "out" / "pipeline"),
        f"{hub.endpoint}/ana/trained/commit/{repo.refs['main']}",
    ]
    pushed, written = repo.files(), tmp_path / "out" / "pipeline" / "unet" / "diffusion_pytorch_model.safetensors"
    assert pushed["unet/diffusion_pytorch_model.safetensors"] == written.read_bytes()
    assert {"model_index.json", "pipeline.py", "README.md", "SHA256SUMS"} <= pushed.keys()

    token = WRITE_TOKEN.encode()
    assert token not in run.stdout.encode() + run.stderr.encode() and not any(token in c for c in pushed.values())
    out = [path for path in (tmp_path / "out").rglob("*") if path.is_file()]
    assert len(out) > 5 and not [path for path in out if token in path.read_bytes()]
    saved = yaml.safe_load((tmp_path / "out" / "training_args.yaml").read_text())
    assert saved["hub_model_id"] == "ana/trained" and "hub_token" not in saved


def test_checkpoints_are_pushed_as_branches_and_training_outlives_a_hub_that_refuses_one(
    hub, shapes_dir, tmp_path, script_env
):
    hub.faults.append(["POST", "/branch/step-2", 403, 1])
    options = ["--max_train_steps", "3", "--checkpointing_steps", "1", "--hub_strategy", "every_save"]
    run = train(hub, shapes_dir, tmp_path, script_env, WRITE_TOKEN, *options)
    assert run.returncode == 0, run.stderr
    repo = hub.repos["ana/trained"]
    assert set(repo.refs) == {"main", "step-1", "step-3"} and "step-2 is not on the Hub" in run.stderr
    name = "diffusion_pytorch_model.safetensors"
    first, last = (repo.files(f"step-{step}") for step in (1, 3))
    assert set(first) - {".gitattributes"} == {"config.json", "README.md", "SHA256SUMS", name}
    assert first[name] != last[name] == repo.files()[f"unet/{name}"]


def test_a_token_that_may_not_write_is_an_error_before_training(hub, shapes_dir, tmp_path, script_env):
    run = train(hub, shapes_dir, tmp_path, script_env, READ_TOKEN)
    assert run.returncode != 0
    assert "`ana/trained` cannot be pushed to" in run.stderr and READ_TOKEN not in run.stderr
    assert not list((tmp_path / "out").glob("checkpoint-*"))


def test_arguments_of_a_push():
    with pytest.raises(ValueError, match="`push_to_hub` needs `hub_model_id`"):
        check_arguments(TrainingArguments(push_to_hub=True))
    args = TrainingArguments(push_to_hub=True, hub_model_id="ana/a", hub_token="hf_secret")
    check_arguments(args)
    assert "hf_secret" not in repr(args) and "hf_secret" not in str(public_arguments(args))
    assert public_arguments(args)["hub_model_id"] == "ana/a"
