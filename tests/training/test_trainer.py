# SPDX-License-Identifier: Apache-2.0
import dataclasses
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import yaml
from accelerate.tracking import GeneralTracker
from accelerate.utils import DistributedType
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from PIL import Image
from safetensors.torch import load_file
from testing_utils import TRAINING

from diffsketching_pipeline.command_line import argument
from diffsketching_pipeline.training.arguments import TrainingArguments, parse_args, resolve_data_dir
from diffsketching_pipeline.training.keyed import (
    KeyedBatchSampler,
    KeyedDataset,
    class_balanced_weights,
    keyed_generator,
)
from diffsketching_pipeline.training.modules import load_pretrained
from diffsketching_pipeline.training.pictures import image_grid, save_png
from diffsketching_pipeline.training.run_folder import write_folder
from diffsketching_pipeline.training.strategy import check_strategy
from diffsketching_pipeline.training.trainer import Trainer, learning_rate_factor


class TinyNet(ModelMixin, ConfigMixin):
    """A regression network with dropout, so that layers have a random state, too."""

    @register_to_config
    def __init__(self, channels: int = 3, width: int = 8, dropout: float = 0.2):
        super().__init__()
        self.hidden = torch.nn.Linear(channels, width)
        self.drop = torch.nn.Dropout(dropout)
        self.out = torch.nn.Linear(width, channels)

    def forward(self, x):
        return self.out(self.drop(torch.tanh(self.hidden(x))))


class Points:
    """Eleven points in three dimensions, moved a little in a way that is keyed by (index, epoch)."""

    def __init__(self, delay: float = 0.0, bad_index: int | None = None):
        self.delay, self.bad_index = delay, bad_index

    def __len__(self):
        return 11

    def sample(self, index, epoch):
        time.sleep(self.delay)
        values = torch.full((3,), index / 11) + 0.1 * torch.randn(3, generator=keyed_generator(index, epoch))
        return {"x": values * math.nan if index == self.bad_index else values, "id": f"point-{index}"}


def add_target(sample, generator):
    return sample | {"target": torch.randn(3, generator=generator)}


def make_trainer(output_dir, dataset=None, **kwargs):
    defaults = {"train_batch_size": 3, "max_train_steps": 8, "learning_rate": 1e-2, "lr_warmup_steps": 2}
    defaults["report_to"] = "none"
    args = TrainingArguments(output_dir=str(output_dir), **(defaults | kwargs))
    torch.manual_seed(0)
    return Trainer(args, {"net": TinyNet()}, dataset or Points(), transform=add_target)


def train(trainer, validate=None):
    def compute_loss(batch):
        return {"loss": F.mse_loss(trainer.modules["net"](batch["x"]), batch["target"])}

    return trainer.train(compute_loss, validate)


def assert_same_checkpoint(one, other):
    """Weights, averages, optimizer and counters agree to the bit."""
    for name in ("net", "net_ema"):
        a, b = (load_file(folder / name / "diffusion_pytorch_model.safetensors") for folder in (one, other))
        assert a.keys() == b.keys()
        assert all(torch.equal(a[key], b[key]) for key in a)
    a, b = (torch.load(folder / "optimizer.bin", weights_only=True)["state"] for folder in (one, other))
    assert all(torch.equal(a[i][key], b[i][key]) for i in a for key in a[i])
    a, b = (json.loads((folder / "trainer_state.json").read_text()) for folder in (one, other))
    assert {**a, "elapsed_seconds": 0} == {**b, "elapsed_seconds": 0}


# -- arguments --


@dataclasses.dataclass
class ScriptArguments(TrainingArguments):
    """Adds a list, as the scripts do."""

    block_out_channels: list[int] = argument([8, 16], "widths")


def test_command_line_overrides_config_overrides_default(tmp_path):
    config = tmp_path / "config.yaml"
    config.write_text(
        "learning_rate: 1e-3\nblock_out_channels: [4, 8, 12]\nuse_ema: false\nmax_train_steps: 7\nsnr: null\n".replace(
            "snr: null\n", "max_train_minutes: null\nlr_scheduler: cosine\n"
        )
    )
    for words in ([str(config), "--max_train_steps", "9"], ["--max_train_steps=9", "--config", str(config)]):
        args = parse_args(ScriptArguments, words)
        assert (args.learning_rate, args.block_out_channels, args.use_ema) == (1e-3, [4, 8, 12], False)
        assert (args.max_train_steps, args.max_train_minutes, args.lr_scheduler) == (9, None, "cosine")
        assert args.train_batch_size == TrainingArguments().train_batch_size
    assert ScriptArguments().block_out_channels == [8, 16]


def test_unknown_arguments_name_the_closest_ones(tmp_path):
    config = tmp_path / "config.yaml"
    config.write_text("learning_rat: 1\n")
    with pytest.raises(ValueError, match=r"`learning_rat` on .*config.yaml .* did you mean `learning_rate`"):
        parse_args(TrainingArguments, [str(config)])
    with pytest.raises(ValueError, match=r"`max-train-step` on the command line .* did you mean `max_train_steps`"):
        parse_args(TrainingArguments, ["--max-train-step", "3"])
    with pytest.raises(ValueError, match="`qqqq` on the command line .* `--help` lists"):
        parse_args(TrainingArguments, ["--qqqq"])


def test_unusable_configs_are_refused(tmp_path):
    with pytest.raises(ValueError, match="`config`.*'nowhere.yaml'"):
        parse_args(TrainingArguments, ["nowhere.yaml"])
    with pytest.raises(ValueError, match="`config` must be a YAML file"):
        parse_args(TrainingArguments, ["--config"])
    config = tmp_path / "config.yaml"
    config.write_text("- 1\n- 2\n")
    with pytest.raises(ValueError, match="holds a list"):
        parse_args(TrainingArguments, [str(config)])


@pytest.mark.parametrize(
    "words, message",
    [
        (["--train_batch_size", "0"], "`train_batch_size`.* 0"),
        (["--learning_rate", "nan"], "`learning_rate`.* nan"),
        (["--ema_max_decay", "1"], r"`ema_max_decay`.* 1.0"),
        (["--further_ema_max_decays", "0.9", "-1"], r"`further_ema_max_decays`.* -1.0"),
        (["--further_ema_max_decays", "0.9", "--use_ema", "false"], "`further_ema_max_decays` needs `use_ema`"),
    ],
)
def test_values_out_of_range_are_refused(words, message):
    with pytest.raises(ValueError, match=message):
        parse_args(TrainingArguments, words)


def test_data_dir_comes_from_exactly_one_argument(tmp_path):
    with pytest.raises(ValueError, match="exactly one"):
        resolve_data_dir(TrainingArguments())
    with pytest.raises(ValueError, match="exactly one"):
        resolve_data_dir(TrainingArguments(train_data_dir="a", dataset_name="b"))
    with pytest.raises(ValueError, match="`train_data_dir` .* but .*nothing is none"):
        resolve_data_dir(TrainingArguments(train_data_dir=str(tmp_path / "nothing")))
    assert resolve_data_dir(TrainingArguments(train_data_dir=str(tmp_path))) == tmp_path


def test_dataset_name_is_a_repository_of_the_hub(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    repository = tmp_path / "datasets--someone--clothes"
    snapshot = repository / "snapshots" / ("0" * 40)
    (snapshot / "train" / "hat").mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0" * 40)
    args = TrainingArguments(dataset_name="someone/clothes", cache_dir=str(tmp_path))
    assert resolve_data_dir(args) == snapshot


# -- keyed randomness --


def first_batches(sampler, count):
    return [batch for batch, _ in zip(sampler, range(count), strict=False)]


def test_epochs_are_different_permutations():
    draws = [key for batch in first_batches(KeyedBatchSampler(10, 4, seed=3), 10) for key in batch]
    assert [draw for _, draw in draws] == list(range(40))
    epochs = np.array([index for index, _ in draws]).reshape(4, 10)
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 4


def test_order_does_not_depend_on_processes_or_on_the_start():
    whole = first_batches(KeyedBatchSampler(10, 6, seed=3), 8)
    parts = [first_batches(KeyedBatchSampler(10, 2, 3, process_index=p, num_processes=3), 8) for p in range(3)]
    assert [sum(step, []) for step in zip(*parts, strict=True)] == whole
    assert first_batches(KeyedBatchSampler(10, 6, seed=3, start=12), 6) == whole[2:]


def test_class_balanced_epochs_draw_each_sample_its_share():
    labels = [0] * 64 + [1] * 16 + [2] * 4
    weights = class_balanced_weights(labels, 0.5)
    expected = len(labels) * weights / weights.sum()
    np.testing.assert_allclose([expected[:64].sum(), expected[64:80].sum(), expected[80:].sum()], [48, 24, 12])
    sampler = KeyedBatchSampler(len(labels), 1, seed=0, sample_weights=weights)
    counts = np.stack([np.bincount(sampler.epoch_order(e), minlength=len(labels)) for e in range(400)])
    assert (counts >= np.floor(expected)).all() and (counts <= np.ceil(expected)).all()
    # Rounding up or down at random has a standard deviation of at most 1/2 per epoch.
    assert np.abs(counts.mean(axis=0) - expected).max() < 5 * 0.5 / math.sqrt(400)


def test_balancing_power_zero_keeps_the_frequencies():
    sampler = KeyedBatchSampler(6, 1, seed=0, sample_weights=class_balanced_weights([0, 0, 0, 0, 1, 1], 0.0))
    assert all(sorted(sampler.epoch_order(epoch)) == list(range(6)) for epoch in range(50))


def test_empty_dataset_and_wrong_weights_are_refused():
    with pytest.raises(ValueError, match="`num_samples`"):
        KeyedBatchSampler(0, 1, seed=0)
    with pytest.raises(ValueError, match="`sample_weights`.* 3.* 2"):
        KeyedBatchSampler(3, 1, seed=0, sample_weights=np.ones(2))


def test_samples_are_keyed_by_the_draw():
    dataset = KeyedDataset(Points(), seed=1, transform=add_target)
    first, again, later = dataset[4, 7], dataset[4, 7], dataset[4, 18]
    assert torch.equal(first["x"], again["x"]) and torch.equal(first["target"], again["target"])
    assert not torch.equal(first["x"], later["x"]) and not torch.equal(first["target"], later["target"])
    assert not torch.equal(first["target"], KeyedDataset(Points(), seed=2, transform=add_target)[4, 7]["target"])


def test_batches_do_not_depend_on_the_number_of_workers(tmp_path):
    in_process = make_trainer(tmp_path / "0").batches()
    in_workers = make_trainer(tmp_path / "2", dataloader_num_workers=2).batches()
    for _ in range(5):
        one, other = next(in_process), next(in_workers)
        assert one["id"] == other["id"]
        assert torch.equal(one["x"], other["x"]) and torch.equal(one["target"], other["target"])


# -- learning rate --


def test_learning_rate_schedules():
    args = TrainingArguments(lr_scheduler="cosine", lr_warmup_steps=10)
    factor = learning_rate_factor(args, 110)
    assert factor(5) == pytest.approx(0.5)
    assert factor(60) == pytest.approx(0.5 * (1 + math.cos(math.pi * 0.5)))
    assert factor(85) == pytest.approx(0.5 * (1 + math.cos(math.pi * 0.75)))

    factor = learning_rate_factor(dataclasses.replace(args, lr_decay_steps=20), 110)
    assert factor(5) == pytest.approx(0.5)
    assert factor(50) == factor(90) == 1.0
    assert factor(95) == pytest.approx(0.5 * (1 + math.cos(math.pi * 0.25)))

    factor = learning_rate_factor(dataclasses.replace(args, lr_scheduler="linear", lr_decay_steps=20), 110)
    assert factor(105) == pytest.approx(0.25)
    with pytest.raises(ValueError, match="sideways"):
        learning_rate_factor(TrainingArguments(lr_scheduler="sideways"), 10)


# -- training and resuming --


def test_one_step_is_adamw_on_the_keyed_batch(tmp_path):
    trainer = make_trainer(
        tmp_path, max_train_steps=2, lr_scheduler="constant", gradient_accumulation_steps=2, max_grad_norm=0.5
    )
    trainer.unwrap("net").drop.p = 0.0
    reference = TinyNet(dropout=0.0)
    reference.load_state_dict(trainer.unwrap("net").state_dict())
    optimizer = torch.optim.AdamW(reference.parameters(), lr=1e-2, weight_decay=1e-3)
    keys = [key for batch in first_batches(KeyedBatchSampler(11, 3, seed=0), 4) for key in batch]
    samples = [KeyedDataset(Points(), 0, add_target)[key] for key in keys]
    for step in range(2):
        x, target = (torch.stack([s[name] for s in samples[6 * step : 6 * step + 6]]) for name in ("x", "target"))
        optimizer.zero_grad()
        F.mse_loss(reference(x), target).backward()
        norm = torch.nn.utils.clip_grad_norm_(reference.parameters(), 0.5)
        assert norm > 0.5
        optimizer.step()
    assert train(trainer)
    for name, value in trainer.unwrap("net").state_dict().items():
        torch.testing.assert_close(value, reference.state_dict()[name], rtol=0, atol=1e-6)


def test_averaged_weights_follow_the_documented_decay(tmp_path):
    trainer = make_trainer(tmp_path, checkpointing_steps=1, max_train_steps=6, ema_max_decay=0.6, ema_power=0.75)
    averaged = {name: value.clone() for name, value in trainer.unwrap("net").state_dict().items()}
    train(trainer)
    for step in range(1, 7):
        live = load_file(tmp_path / f"checkpoint-{step}" / "net" / "diffusion_pytorch_model.safetensors")
        decay = min(1 - step**-0.75, 0.6) if step > 1 else 0.0
        averaged = {name: decay * averaged[name] + (1 - decay) * live[name] for name in averaged}
    for name, value in trainer.ema_copy("net").state_dict().items():
        torch.testing.assert_close(value, averaged[name], rtol=0, atol=1e-6)
        assert not torch.allclose(value, live[name], atol=1e-4)
    assert trainer.ema_copy("net", torch.float16).dtype == torch.float16


def test_further_averages_are_kept_with_their_own_decay(tmp_path):
    options = {"ema_power": 2.0, "ema_max_decay": 0.5, "further_ema_max_decays": [0.25, 0.9]}
    trainer = make_trainer(tmp_path / "run", **options)
    expected = {decay: trainer.unwrap("net").out.weight.detach().clone() for decay in (0.5, 0.25, 0.9)}
    losses = {"net": lambda batch: {"loss": F.mse_loss(trainer.modules["net"](batch["x"]), batch["target"])}}
    batches = trainer.batches()
    for step in range(4):
        trainer.training_step(batches, losses)
        for decay, average in expected.items():
            # diffusers counts the first step as one without an average.
            now = min(decay, 1 - (1 + step) ** -2.0)
            average.mul_(now).add_(trainer.unwrap("net").out.weight.detach(), alpha=1 - now)
    trainer.save_checkpoint()
    for decay, folder in ((None, "net_ema"), (0.25, "net_ema_0.25"), (0.9, "net_ema_0.9")):
        copied = trainer.ema_copy("net", max_decay=decay).out.weight
        torch.testing.assert_close(copied, expected[decay or 0.5])
        saved = load_file(tmp_path / "run" / "checkpoint-4" / folder / "diffusion_pytorch_model.safetensors")
        assert torch.equal(saved["out.weight"], copied)
    assert len({tuple(average.flatten().tolist()) for average in expected.values()}) == 3


def test_further_averages_resume_exactly_and_a_new_one_begins_from_the_first(tmp_path, caplog):
    options = {"checkpointing_steps": 4, "further_ema_max_decays": [0.25]}
    train(make_trainer(tmp_path / "whole", **options))
    train(make_trainer(tmp_path / "cut", **options, max_train_minutes=1e-9, max_train_steps=4))
    shutil.rmtree(tmp_path / "cut")
    shutil.copytree(tmp_path / "whole" / "checkpoint-4", tmp_path / "cut" / "checkpoint-4")
    train(make_trainer(tmp_path / "cut", **options, resume_from_checkpoint="latest"))
    whole, cut = (
        load_file(tmp_path / run / "checkpoint-8" / "net_ema_0.25" / "diffusion_pytorch_model.safetensors")
        for run in ("whole", "cut")
    )
    assert all(torch.equal(whole[key], cut[key]) for key in whole)

    shutil.rmtree(tmp_path / "cut" / "checkpoint-8")
    options["further_ema_max_decays"] = [0.125]
    trainer = make_trainer(tmp_path / "cut", **options, max_train_steps=4, resume_from_checkpoint="latest")
    train(trainer)
    assert "net_ema_0.125" in caplog.text
    for ours, theirs in zip(
        trainer.ema_copy("net", max_decay=0.125).parameters(), trainer.ema_copy("net").parameters(), strict=True
    ):
        assert torch.equal(ours, theirs)


def test_muon_is_chosen_by_its_name_and_resumes_exactly(tmp_path):
    options = {"optimizer": "muon", "checkpointing_steps": 4}
    trainer = make_trainer(tmp_path / "whole", **options)
    assert [group["is_matrix"] for group in trainer.trained.optimizers["net"].param_groups] == [
        False
    ]  # 8 x 3 is too narrow
    train(trainer)
    shutil.copytree(tmp_path / "whole" / "checkpoint-4", tmp_path / "cut" / "checkpoint-4")
    train(make_trainer(tmp_path / "cut", **options, resume_from_checkpoint="latest"))
    assert_same_checkpoint(tmp_path / "whole" / "checkpoint-8", tmp_path / "cut" / "checkpoint-8")


def test_resumed_run_equals_uninterrupted_run(tmp_path):
    options = {"gradient_accumulation_steps": 2, "lr_scheduler": "cosine"}
    train(make_trainer(tmp_path / "whole", checkpointing_steps=3, **options))
    shutil.copytree(tmp_path / "whole" / "checkpoint-3", tmp_path / "cut" / "checkpoint-3")
    # What a kill in the middle of the next checkpoint leaves behind.
    (tmp_path / "cut" / ".checkpoint-6.tmp" / "net").mkdir(parents=True)

    resumed = make_trainer(tmp_path / "cut", resume_from_checkpoint="latest", dataloader_num_workers=1, **options)
    assert train(resumed)
    assert_same_checkpoint(tmp_path / "whole" / "checkpoint-8", tmp_path / "cut" / "checkpoint-8")
    assert not (tmp_path / "cut" / ".checkpoint-6.tmp").exists()


def test_validation_does_not_change_training(tmp_path):
    def validate():
        torch.randn(100)
        assert not trainer.unwrap("net").training and not torch.is_grad_enabled()
        averaged = trainer.unwrap("net").state_dict()
        assert all(torch.equal(averaged[name], value) for name, value in trainer.ema_copy("net").state_dict().items())
        return {"metric": 0.5}, {"picture": torch.zeros(3, 4, 6)}

    train(make_trainer(tmp_path / "without"))
    trainer = make_trainer(tmp_path / "with", validation_steps=3)
    train(trainer, validate)
    assert_same_checkpoint(tmp_path / "without" / "checkpoint-8", tmp_path / "with" / "checkpoint-8")
    assert sorted(os.listdir(tmp_path / "with" / "samples")) == [f"picture-00000{i}.png" for i in (3, 6, 8)]


@pytest.mark.slow
def test_time_limit_stops_with_a_checkpoint_from_which_the_run_goes_on(tmp_path):
    options = {"max_train_steps": 60, "checkpointing_steps": 1000}
    assert train(make_trainer(tmp_path / "whole", **options))
    slow = Points(delay=0.02)
    assert not train(make_trainer(tmp_path / "cut", slow, max_train_minutes=1 / 60, **options))
    (stopped,) = (int(path.name[11:]) for path in (tmp_path / "cut").glob("checkpoint-*"))
    assert 0 < stopped < 60
    assert train(make_trainer(tmp_path / "cut", resume_from_checkpoint="latest", **options))
    assert_same_checkpoint(tmp_path / "whole" / "checkpoint-60", tmp_path / "cut" / "checkpoint-60")


@pytest.mark.slow
@pytest.mark.parametrize("moment", ["step", "validation", "checkpoint", "last validation"])
def test_sigterm_saves_a_checkpoint_from_which_the_run_goes_on(moment, tmp_path):
    class Watched(Points):
        def sample(self, index, epoch):
            if moment == "step" and epoch == 10:  # in the fourth step of three draws each
                os.kill(os.getpid(), signal.SIGTERM)
            return super().sample(index, epoch)

    def validate():
        validated.append(trainer.global_step)
        if moment == "validation" or (moment == "last validation" and trainer.global_step == 8):
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(1)
            raise AssertionError("SIGTERM ends a validation at once")
        return {}, {}

    def terminate(*args):
        (tmp_path / "reached").touch()
        os.kill(os.getpid(), signal.SIGTERM)

    before, validated = signal.getsignal(signal.SIGTERM), []
    options = {"checkpointing_steps": 2 if moment == "checkpoint" else 1000, "validation_steps": 3}
    assert train(make_trainer(tmp_path / "whole", **options))
    trainer = make_trainer(tmp_path / "cut", Watched(), **options)
    if moment == "checkpoint":
        trainer.accelerator.register_save_state_pre_hook(terminate)
    with pytest.raises(SystemExit) as stopped:
        train(trainer, validate)
    assert stopped.value.code == 143 and signal.getsignal(signal.SIGTERM) is before
    step = {"step": 4, "validation": 3, "checkpoint": 2, "last validation": 8}[moment]
    assert [path.name for path in (tmp_path / "cut").glob("checkpoint-*")] == [f"checkpoint-{step}"]
    assert validated == {"step": [3], "validation": [3], "checkpoint": [], "last validation": [3, 6, 8]}[moment]
    assert train(make_trainer(tmp_path / "cut", resume_from_checkpoint="latest", **options))
    assert_same_checkpoint(tmp_path / "whole" / "checkpoint-8", tmp_path / "cut" / "checkpoint-8")


def test_a_second_run_in_one_folder_is_told_so_before_it_writes(tmp_path, monkeypatch):
    from diffsketching_pipeline import files

    monkeypatch.setattr(files, "_LOCK_SECONDS", 0.1)
    code = "import sys, time; from pathlib import Path; from diffsketching_pipeline.files import lock_folder\n"
    code += "lock = lock_folder(Path(sys.argv[1])); print(flush=True); time.sleep(60)"
    command = [sys.executable, "-c", code, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as other:
        other.stdout.readline()
        with pytest.raises(ValueError, match=f"`output_dir` {tmp_path} is in use by another run"):
            make_trainer(tmp_path, overwrite_output_dir=True)
        other.kill()
    assert os.listdir(tmp_path) == [".lock"]
    assert train(make_trainer(tmp_path))


def test_non_finite_loss_stops_and_keeps_the_last_checkpoint(tmp_path):
    order = KeyedBatchSampler(11, 3, seed=0).epoch_order(0).tolist()
    bad_index, good = order[7], order[6]
    trainer = make_trainer(tmp_path, Points(bad_index=bad_index), checkpointing_steps=1)
    with pytest.raises(
        FloatingPointError, match=f"loss is nan at step 3, samples point-{good}, point-{bad_index},"
    ) as e:
        train(trainer)
    assert str(tmp_path / "checkpoint-2") in str(e.value)
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == ["checkpoint-1", "checkpoint-2"]
    weights = load_file(tmp_path / "checkpoint-2" / "net" / "diffusion_pytorch_model.safetensors")
    assert all(torch.isfinite(value).all() for value in weights.values())


def test_non_finite_gradient_stops_before_the_weights_change(tmp_path):
    trainer = make_trainer(tmp_path)
    before = {name: value.clone() for name, value in trainer.unwrap("net").state_dict().items()}

    def compute_loss(batch):
        # Finite, but the derivative of a square root at 0 is infinite.
        return {"loss": (trainer.modules["net"](batch["x"]) * 0).sum().sqrt()}

    with pytest.raises(FloatingPointError, match="gradient is nan at step 1, samples point-"):
        trainer.train(compute_loss)
    assert all(torch.equal(before[name], value) for name, value in trainer.unwrap("net").state_dict().items())


def test_old_checkpoints_are_deleted_and_runs_are_not_mixed(tmp_path):
    train(make_trainer(tmp_path, checkpointing_steps=2, checkpoints_total_limit=2))
    assert sorted(path.name for path in tmp_path.glob("*checkpoint*")) == ["checkpoint-6", "checkpoint-8"]
    with pytest.raises(ValueError, match="`output_dir` already holds checkpoint-8 .* `--overwrite_output_dir`"):
        make_trainer(tmp_path)
    with pytest.raises(ValueError, match="`output_dir` holds checkpoint-8, .* resumed from checkpoint-6"):
        make_trainer(tmp_path, resume_from_checkpoint="checkpoint-6")
    with pytest.raises(ValueError, match="must be `latest` or a checkpoint folder, but got 'elsewhere'"):
        make_trainer(tmp_path, resume_from_checkpoint="elsewhere")
    assert make_trainer(tmp_path, resume_from_checkpoint="checkpoint-8").resume_folder == tmp_path / "checkpoint-8"
    train(make_trainer(tmp_path, overwrite_output_dir=True, max_train_steps=1))
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-1"]


def test_recorded_arguments_are_a_config(tmp_path):
    trainer = make_trainer(tmp_path, max_train_steps=1, learning_rate=3e-4)
    train(trainer)
    words = [str(tmp_path / "training_args.yaml"), "--resume_from_checkpoint", "latest"]
    assert parse_args(TrainingArguments, words) == dataclasses.replace(trainer.args, resume_from_checkpoint="latest")
    assert yaml.safe_load((tmp_path / "training_args.yaml").read_text())["learning_rate"] == 3e-4


def test_two_modules_are_updated_in_turn_each_by_its_own_loss(tmp_path):
    """A small adversarial pair against the same pair trained by hand."""
    torch.manual_seed(1)
    generator, discriminator = TinyNet(dropout=0.0), TinyNet(dropout=0.0)
    by_hand = TinyNet(dropout=0.0), TinyNet(dropout=0.0)
    by_hand[0].load_state_dict(generator.state_dict())
    by_hand[1].load_state_dict(discriminator.state_dict())

    def losses(batch, generator, discriminator, frozen_discriminator):
        def discriminator_loss():
            fake = generator(batch["x"]).detach()
            return (discriminator(fake) ** 2).mean() + ((discriminator(batch["target"]) - 1) ** 2).mean()

        def generator_loss():
            return ((frozen_discriminator(generator(batch["x"])) - 1) ** 2).mean()

        return discriminator_loss, generator_loss

    args = TrainingArguments(
        output_dir=str(tmp_path), report_to="none", train_batch_size=3, max_train_steps=3, lr_scheduler="constant"
    )
    modules = {"generator": generator, "discriminator": discriminator}
    trainer = Trainer(args, modules, Points(), add_target, ema_modules=["generator"])

    def loss_of(position):
        def compute_loss(batch):
            prepared = trainer.modules["generator"], trainer.modules["discriminator"], trainer.unwrap("discriminator")
            return {"loss": losses(batch, *prepared)[position]()}

        return compute_loss

    trainer.train({"discriminator": loss_of(0), "generator": loss_of(1)})

    optimizers = [torch.optim.AdamW(net.parameters(), lr=1e-4, weight_decay=1e-3) for net in by_hand]
    dataset = KeyedDataset(Points(), 0, add_target)
    for keys in first_batches(KeyedBatchSampler(11, 3, seed=0), 3):
        samples = [dataset[key] for key in keys]
        batch = {name: torch.stack([sample[name] for sample in samples]) for name in ("x", "target")}
        for position, optimizer in ((0, optimizers[1]), (1, optimizers[0])):
            for net in by_hand:
                net.zero_grad()
            losses(batch, by_hand[0], by_hand[1], by_hand[1])[position]().backward()
            torch.nn.utils.clip_grad_norm_(by_hand[1 - position].parameters(), 1.0)
            optimizer.step()
    for net, reference in zip((generator, discriminator), by_hand, strict=True):
        for name, value in net.state_dict().items():
            torch.testing.assert_close(value, reference.state_dict()[name], rtol=0, atol=1e-7)
    folders = {path.name for path in (tmp_path / "checkpoint-3").iterdir() if path.is_dir()}
    assert folders == {"generator", "generator_ema", "discriminator"}
    assert all(parameter.requires_grad for net in modules.values() for parameter in net.parameters())


# -- files --


def test_write_folder_replaces_all_or_nothing(tmp_path):
    target = tmp_path / "model"
    with write_folder(target) as folder:
        (folder / "old.txt").write_text("old")
    with pytest.raises(KeyError), write_folder(target) as folder:
        (folder / "new.txt").write_text("new")
        raise KeyError
    assert [path.name for path in tmp_path.rglob("*")] == ["model", "old.txt"]
    with write_folder(target) as folder:
        (folder / "new.txt").write_text("new")
    assert [path.name for path in tmp_path.rglob("*")] == ["model", "new.txt"]


def test_image_grid_and_png(tmp_path):
    sketches, photos = torch.full((2, 1, 4, 4), -1.0), torch.full((2, 3, 4, 4), 0.5)
    grid = image_grid([sketches, photos], scale=2)
    # Two pictures of 8 pixels and three paddings of 2 in each direction.
    assert grid.shape == (3, 22, 22)
    assert (grid[:, 2:10, 2:10] == -1).all() and (grid[:, 12:20, 12:20] == 0.5).all() and (grid[:, :2] == 1).all()
    save_png(grid, tmp_path / "samples" / "grid.png")
    pixels = np.asarray(Image.open(tmp_path / "samples" / "grid.png"))
    assert pixels.shape == (22, 22, 3) and pixels[5, 5, 0] == 0 and pixels[15, 15, 0] == 191 and pixels[0, 0, 0] == 255
    assert os.listdir(tmp_path / "samples") == ["grid.png"]


def test_load_pretrained_finds_a_component_or_a_model_folder_and_gives_float32(tmp_path):
    net = TinyNet()
    net.half().save_pretrained(tmp_path / "pipeline" / "net")
    for path in (tmp_path / "pipeline", tmp_path / "pipeline" / "net"):
        loaded = load_pretrained(TinyNet, str(path), "net")
        assert loaded.dtype == torch.float32
        assert torch.equal(loaded.out.weight, net.out.weight.float())


def test_sharded_weights_are_saved_averaged_and_validated_whole(tmp_path, script_env):
    script = Path(__file__).with_name("sharded_run.py")
    path = os.pathsep.join(
        [script_env.get("PYTHONPATH", ""), str(TRAINING), str(script.parent), str(script.parent.parent)]
    )
    found = {}
    for kind in ("plain", "sharded"):
        out = tmp_path / kind
        launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
        run = subprocess.run(
            [*launch, str(script), kind, str(out)],
            env={**script_env, "ACCELERATE_USE_CPU": "true", "PYTHONPATH": path},
            capture_output=True,
            text=True,
        )
        assert run.returncode == 0, run.stderr
        found[kind] = json.loads((out / "seen.json").read_text())
    parameters = sum(p.numel() for p in TinyNet().parameters())
    assert found["plain"]["local"] == parameters and found["sharded"]["local"] < 0.6 * parameters
    for folder in ("checkpoint-3/net", "checkpoint-6/net", "checkpoint-6/net_ema", "averaged"):
        one, other = (load_file(tmp_path / k / folder / "diffusion_pytorch_model.safetensors") for k in found)
        assert one.keys() == other.keys()
        for key in one:
            torch.testing.assert_close(one[key], other[key], atol=1e-6, rtol=1e-5)
    assert len(found["plain"]["outputs"]) == 2
    torch.testing.assert_close(torch.tensor(found["sharded"]["outputs"]), torch.tensor(found["plain"]["outputs"]))


def strategy(trainer, monkeypatch, kind, zero_stage=2, mixed_precision="no", passes=1, is_fsdp2=True):
    """`check_strategy` with an accelerator of another kind; its DeepSpeed config."""
    plugin = SimpleNamespace(zero_stage=zero_stage, deepspeed_config={})
    accelerator = SimpleNamespace(
        distributed_type=DistributedType[kind],
        state=SimpleNamespace(deepspeed_plugin=plugin),
        mixed_precision=mixed_precision,
        gradient_accumulation_steps=passes,
        is_fsdp2=is_fsdp2,
    )
    monkeypatch.setattr(trainer, "accelerator", accelerator)
    monkeypatch.setattr("diffsketching_pipeline.training.strategy.has_lora", lambda module: module == "lora")
    return plugin


@pytest.mark.parametrize(
    "options, modules, message",
    [
        ({"kind": "FSDP"}, ("a", "b"), "FSDP trains one network per run, and this script has a, b"),
        ({"kind": "FSDP", "is_fsdp2": False}, ("a",), "`fsdp_version` must be 2"),
        ({"kind": "FSDP"}, ("lora",), "train them without FSDP"),
        ({"kind": "DEEPSPEED", "zero_stage": 3}, ("a",), "ZeRO.* 2.* 3"),
        ({"kind": "DEEPSPEED", "mixed_precision": "bf16"}, ("a",), "`mixed_precision`.* bf16"),
        ({"kind": "DEEPSPEED", "passes": 4}, ("a",), "`gradient_accumulation_steps`.* 1.* 4 "),
    ],
)
def test_what_cannot_be_sharded_is_refused(options, modules, message, tmp_path, monkeypatch):
    trainer = make_trainer(tmp_path)
    strategy(trainer, monkeypatch, **options)
    with pytest.raises(ValueError, match=message):
        check_strategy(trainer.accelerator, trainer.args, {name: name for name in modules})


def test_deepspeed_is_told_what_it_cannot_see(tmp_path, monkeypatch):
    trainer = make_trainer(tmp_path, max_grad_norm=0.7)
    plugin = strategy(trainer, monkeypatch, "DEEPSPEED")
    assert check_strategy(trainer.accelerator, trainer.args, {"a": "a"}) is False  # every process has all weights
    assert plugin.deepspeed_config == {"train_micro_batch_size_per_gpu": 3, "gradient_clipping": 0.7}
    strategy(trainer, monkeypatch, "FSDP")
    assert check_strategy(trainer.accelerator, trainer.args, {"a": "a"}) is True


@pytest.mark.parametrize("norm", [None, 2.5, torch.tensor(2.5)])
def test_the_gradient_norm_may_come_as_a_number_or_not_at_all(norm, tmp_path, monkeypatch):
    trainer = make_trainer(tmp_path, max_train_steps=1)
    monkeypatch.setattr(trainer.accelerator, "clip_grad_norm_", lambda *args: norm)
    logged = []
    monkeypatch.setattr(trainer, "_log_metrics", lambda progress: logged.append(dict(trainer._metrics)))
    trainer.args.logging_steps = 1
    train(trainer)
    assert logged[0].get("grad_norm") == (None if norm is None else [2.5])


# -- trackers --


def test_a_tracker_that_is_not_there_is_an_error():
    for name in ("clearml", "tensorbord"):  # one that accelerate knows, and none
        with pytest.raises(
            ValueError, match=f"`report_to` must be none, all or one of .*tensorboard.*, but got '{name}'"
        ):
            parse_args(TrainingArguments, ["--report_to", name])
    assert parse_args(TrainingArguments, ["--report_to", "none"]).report_to == "none"


def test_pictures_go_to_every_tracker(tmp_path):
    class Album(GeneralTracker):
        name, requires_logging_directory, tracker, pages = "album", False, None, []

        def log(self, values, step, **kwargs):
            pass

        def store_init_configuration(self, values):
            pass

        def log_images(self, values, step):
            self.pages.append((step, values))

    trainer = make_trainer(tmp_path, max_train_steps=1)
    trainer.accelerator.trackers = [Album(_blank=True)]
    trainer._log_picture("sheet", torch.tensor([-1.0, 0.0, 1.0]).reshape(3, 1, 1).expand(3, 4, 5))
    ((step, values),) = Album.pages
    (pixels,) = values["sheet"]
    assert step == 0 and pixels.shape == (4, 5, 3) and pixels.dtype == np.uint8
    assert pixels[0, 0].tolist() == [0, 128, 255]


@pytest.mark.slow
def test_wandb_gets_the_pictures_offline(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    trainer = make_trainer(tmp_path / "out", max_train_steps=1, report_to="wandb")
    train(trainer, validate=lambda: ({"loss": 1.0}, {"sheet": torch.zeros(3, 4, 5)}))
    assert list((tmp_path / "wandb").rglob("media/images/sheet_*.png"))
