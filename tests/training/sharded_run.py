# SPDX-License-Identifier: Apache-2.0
"""Two processes train a network, each holding half of every weight (or, with `plain`, all of them): see test_trainer.py.

accelerate shards on accelerators only, so this shards as its FSDP does, with `fully_shard`, on two CPU processes.
"""

import json
import sys
from pathlib import Path

import torch
from test_trainer import Points, TinyNet, add_target, train
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from diffsketching_pipeline.training import trainer as trainer_module
from diffsketching_pipeline.training.arguments import TrainingArguments
from diffsketching_pipeline.training.trainer import Trainer


class ShardedTrainer(Trainer):
    def _prepare(self, module):
        fully_shard(module.hidden, mesh=init_device_mesh("cpu", (2,)))
        fully_shard(module, mesh=init_device_mesh("cpu", (2,)))
        optimizer = self.accelerator.prepare(self._make_optimizer(module))
        # Otherwise it is saved by one process, which has half of it.
        self.accelerator._optimizers.clear()
        return module, optimizer


def main(kind, output_dir):
    steps = 6
    args = TrainingArguments(
        output_dir=output_dir,
        train_batch_size=3,
        max_train_steps=steps,
        learning_rate=1e-2,
        checkpointing_steps=3,
        validation_steps=3,
        ema_max_decay=0.5,
        report_to="none",
    )
    if kind == "sharded":
        trainer_module.check_strategy = lambda *_: True
    trainer_class = {"sharded": ShardedTrainer, "plain": Trainer}[kind]

    def make_trainer():
        torch.manual_seed(0)
        return trainer_class(args, {"net": TinyNet()}, Points(), transform=add_target)

    trainer, again, seen = make_trainer(), make_trainer(), []
    end_training = trainer.accelerator.end_training
    trainer.accelerator.end_training = lambda: None  # the processes are still needed

    def validate():
        net = trainer.unwrap("net")
        assert not net.training and net.hidden.weight.shape == (8, 3)
        seen.append(net(torch.ones(1, 3)).tolist())
        return {"output": float(net(torch.ones(1, 3)).sum())}, {}

    train(trainer, validate if trainer.accelerator.is_main_process else None)
    trainer.accelerator.wait_for_everyone()
    local = sum(p.to_local().numel() if kind == "sharded" else p.numel() for p in trainer.trained.trainable["net"])
    averaged = trainer.ema_copy("net", torch.float32)
    assert (averaged is not None) == trainer.accelerator.is_main_process

    # A checkpoint goes back to where it came from: weights and averages, each process its part.
    again._load_modules([], str(Path(output_dir) / f"checkpoint-{steps}"))
    for one, other in zip(again.trained.trainable["net"], trainer.trained.trainable["net"], strict=True):
        assert torch.equal(*(p.to_local() if kind == "sharded" else p for p in (one, other)))
    for one, other in zip(
        again.trained.ema["net"].shadow_params, trainer.trained.ema["net"].shadow_params, strict=True
    ):
        assert torch.equal(*(p.to_local() if kind == "sharded" else p for p in (one, other)))
    end_training()
    if averaged is not None:
        averaged.save_pretrained(Path(output_dir) / "averaged")
        (Path(output_dir) / "seen.json").write_text(json.dumps({"outputs": seen, "local": local}))


if __name__ == "__main__":
    main(*sys.argv[1:])
