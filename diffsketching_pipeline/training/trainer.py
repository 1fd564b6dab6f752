# SPDX-License-Identifier: Apache-2.0
"""What the training scripts share: arguments, keyed randomness, and a loop that can be killed at any step.

A script builds its modules, says how one sample is prepared and what the loss of one batch is, and hands both to
[`Trainer`]:

    args = parse_args(TrainingArguments, description=__doc__)
    trainer = Trainer(args, {"unet": unet}, dataset, transform=add_noise)
    finished = trainer.train(compute_loss, validate)
    averaged = trainer.ema_copy("unet")
    if averaged is not None:
        with write_folder(Path(args.output_dir) / "unet") as folder:
            averaged.save_pretrained(folder)

Nothing random depends on the order in which things happen to run. The n-th draw of a run (n counts the samples of all
processes from the first step on) decides which sample is taken, and (seed, n) decides its augmentation, noise and
dropped conditions. So a run that was killed and resumed, or spread over several processes or data workers, sees
exactly the samples of one that was not. (A dataset that is streamed depends on who reads it, see `shards.py`.)
"""

import json
import logging
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from accelerate import Accelerator
from accelerate.logging import get_logger
from accelerate.utils import DistributedType, ProjectConfiguration, send_to_device
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from diffsketching_pipeline import DiffSketchingPipeline, push_pipeline
from diffsketching_pipeline.files import commit_folder
from diffsketching_pipeline.hub.push import create_repo, push_component
from diffsketching_pipeline.lora import LORA_WEIGHTS_NAME, fuse_lora, has_lora, load_lora_state_dict
from diffsketching_pipeline.training.arguments import TrainingArguments, check_arguments, public_arguments
from diffsketching_pipeline.training.keyed import (
    LAYER_STREAM,
    KeyedBatchSampler,
    KeyedDataset,
    SampleTransform,
    keyed_seed,
)
from diffsketching_pipeline.training.modules import empty_clone, load_pretrained, save_module
from diffsketching_pipeline.training.optimizers import Muon
from diffsketching_pipeline.training.pictures import save_png
from diffsketching_pipeline.training.run_folder import remove_folder


logger = get_logger(__name__)

LossFunction = Callable[[dict[str, Any]], dict[str, Tensor]]
ValidationFunction = Callable[[], tuple[dict[str, float], dict[str, Tensor]]]


def learning_rate_factor(args: TrainingArguments, max_train_steps: int) -> Callable[[int], float]:
    """Factor of the learning rate at each optimizer step (counted from 0), from diffusers' `get_scheduler`.

    A function of the step alone has no state to save, and a resumed run may change the schedule.

    Raises:
        ValueError: `lr_scheduler` is not a name that `get_scheduler` knows.
    """
    # get_scheduler wants an optimizer to schedule; only the factor it computes is used.
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=args.learning_rate)

    def factor(name: str, warmup_steps: int, steps: int) -> Callable[[int], float]:
        schedule = get_scheduler(
            name,
            optimizer,
            num_warmup_steps=warmup_steps,
            num_training_steps=steps,
            num_cycles=args.lr_num_cycles,
            power=args.lr_power,
        )
        return schedule.lr_lambdas[0]

    if args.lr_decay_steps is None:
        return factor(args.lr_scheduler, args.lr_warmup_steps, max_train_steps)
    warmup = factor("constant_with_warmup", args.lr_warmup_steps, max_train_steps)
    decay = factor(args.lr_scheduler, 0, args.lr_decay_steps)
    decay_start = max_train_steps - args.lr_decay_steps
    return lambda step: warmup(step) * decay(max(0, step - decay_start))


class Trainer:
    """Trains one or several modules, with EMA, exact checkpoints, validation pictures and trackers.

    Args:
        args: see [`TrainingArguments`].
        modules: what is trained, by name; models with `save_pretrained` (diffusers' or transformers'), in float32.
            Each has its own AdamW. Frozen networks that the losses use are the script's business and stay untouched.
        dataset: has `__len__` and `sample(index, epoch) -> dict` whose result depends on both numbers only. Tensors
            are stacked to batches on the accelerator's device, strings become lists; `"id"` names samples in errors.
            Or it has `stream(process_index, num_processes, num_workers, state)`, which returns a
            [`~shards.ShardStream`] of batches; `max_train_steps` is then needed, and `transform` and `sample_weights`
            do not apply.
        transform: `(sample, generator) -> sample`, run in the data workers: the place for noise, timesteps and dropped
            conditions, drawn from the generator.
        sample_weights: `[len(dataset)]`, see [`KeyedBatchSampler`].
        ema_modules: names of the modules that get an EMA, all of them when left out. Buffers are not averaged.

    Attributes:
        accelerator: the `accelerate.Accelerator`; it owns the device and the precision.
        modules: the prepared modules (wrapped for several processes), to be called in losses.
        global_step: optimizer steps done.
        samples_seen: draws of all processes so far.
    """

    def __init__(
        self,
        args: TrainingArguments,
        modules: Mapping[str, nn.Module],
        dataset: Any,
        transform: SampleTransform | None = None,
        sample_weights: np.ndarray | None = None,
        ema_modules: Iterable[str] | None = None,
    ):
        check_arguments(args)
        self.started = time.monotonic()
        self.args = args
        self.output_dir = Path(args.output_dir)
        self.dataset, self.transform, self.sample_weights = dataset, transform, sample_weights
        self.resume_folder = self._find_resume_folder()
        self.accelerator = self._make_accelerator()

        self.samples_per_step = (
            args.train_batch_size * args.gradient_accumulation_steps * self.accelerator.num_processes
        )
        self.is_streamed = hasattr(dataset, "stream")
        self.stream_state: dict[str, Any] | None = None
        self.num_samples = None if self.is_streamed else len(dataset)
        if args.max_train_steps is not None:
            self.max_train_steps = args.max_train_steps
        else:
            self.max_train_steps = -(-args.num_train_epochs * len(dataset) // self.samples_per_step)
        self.learning_rate = args.learning_rate * (self.samples_per_step if args.scale_lr else 1)
        self.learning_rate_factor = learning_rate_factor(args, self.max_train_steps)

        self.is_sharded = self._check_strategy(modules)
        self.modules: dict[str, nn.Module] = {}
        self.optimizers: dict[str, Any] = {}
        self._whole_copies: dict[str, Any] = {}
        self._last_copies: dict[str, Any] = {}
        for name, module in modules.items():
            self.modules[name], self.optimizers[name] = self._prepare(module)
        self._trainable = {n: [p for p in m.parameters() if p.requires_grad] for n, m in self.modules.items()}
        averaged = modules if ema_modules is None else ema_modules
        self.ema = {name: self._make_ema(name, args.ema_max_decay) for name in averaged} if args.use_ema else {}
        self.further_ema = {
            decay: {name: self._make_ema(name, decay) for name in self.ema}
            for decay in args.further_ema_max_decays or ()
        }

        self.global_step = 0
        self.samples_seen = 0
        self.elapsed_seconds = 0.0
        self._metrics: dict[str, list[float]] = {}
        self._last_checkpoint_step = self._last_validation_step = -1

    # -- set-up --

    def _make_accelerator(self) -> Accelerator:
        args = self.args
        logging.basicConfig(format="%(asctime)s %(levelname)s %(name)s: %(message)s", level=logging.INFO)
        logging.getLogger("accelerate").setLevel(logging.WARNING)
        logging_dir = self.output_dir / args.logging_dir
        accelerator = Accelerator(
            gradient_accumulation_steps=args.gradient_accumulation_steps,
            mixed_precision=args.mixed_precision,
            log_with=None if args.report_to == "none" else args.report_to,
            project_config=ProjectConfiguration(project_dir=args.output_dir, logging_dir=str(logging_dir)),
        )
        if args.mixed_precision == "fp16" and not accelerator.native_amp:
            raise ValueError("`mixed_precision` fp16 needs an accelerator, but there is none: use bf16 or no.")
        if args.allow_tf32:
            torch.set_float32_matmul_precision("high")
        accelerator.register_save_state_pre_hook(self._save_modules)
        accelerator.register_load_state_pre_hook(self._load_modules)
        return accelerator

    def _check_strategy(self, modules: Mapping[str, nn.Module]) -> bool:
        """Whether each process will hold a part of the weights only; `ValueError` for what does not work that way."""
        kind = self.accelerator.distributed_type
        if kind not in (DistributedType.FSDP, DistributedType.DEEPSPEED):
            return False
        if len(modules) > 1:
            raise ValueError(f"{kind.value} trains one network per run, and this script has {', '.join(modules)}.")
        if kind == DistributedType.DEEPSPEED:
            plugin = self.accelerator.state.deepspeed_plugin
            if plugin.zero_stage > 2:
                raise ValueError(f"DeepSpeed's ZeRO stage must be at most 2, but is {plugin.zero_stage}: use FSDP.")
            if self.accelerator.mixed_precision != "no":
                raise ValueError(
                    "`mixed_precision` must be no with DeepSpeed, which would train half-precision weights, but is "
                    f"{self.accelerator.mixed_precision}: speed it up by `--allow_tf32 true`, or use FSDP."
                )
            passes = self.args.gradient_accumulation_steps
            if self.accelerator.gradient_accumulation_steps != passes:
                raise ValueError(
                    f"`gradient_accumulation_steps` is {passes}, but {self.accelerator.gradient_accumulation_steps} in "
                    "accelerate's DeepSpeed config, which wins: write it there, too."
                )
            plugin.deepspeed_config["gradient_clipping"] = self.args.max_grad_norm
            # accelerate reads it off a data loader that it prepares, and this trainer's is not.
            plugin.deepspeed_config["train_micro_batch_size_per_gpu"] = self.args.train_batch_size
            return False
        if not self.accelerator.is_fsdp2:
            raise ValueError("`fsdp_version` must be 2 in accelerate's config, see configs/accelerate/fsdp.yaml.")
        if any(has_lora(module) for module in modules.values()):
            raise ValueError("adapters are too small to be worth sharding: train them without FSDP.")
        return True

    def _prepare(self, module: nn.Module) -> tuple[nn.Module, Any]:
        """A module as it is called in losses, and its optimizer."""
        return self.accelerator.prepare(module, self._make_optimizer(module))

    def _make_optimizer(self, module: nn.Module) -> torch.optim.Optimizer:
        args = self.args
        if args.optimizer == "muon":
            return Muon(
                module,
                lr=self.learning_rate,
                betas=(args.adam_beta1, args.adam_beta2),
                weight_decay=args.adam_weight_decay,
                eps=args.adam_epsilon,
            )
        return torch.optim.AdamW(
            [p for p in module.parameters() if p.requires_grad],
            lr=self.learning_rate,
            betas=(args.adam_beta1, args.adam_beta2),
            weight_decay=args.adam_weight_decay,
            eps=args.adam_epsilon,
        )

    def _make_ema(self, name: str, max_decay: float) -> EMAModel:
        return EMAModel(
            self._averaged_parameters(name),
            decay=max_decay,
            use_ema_warmup=True,
            inv_gamma=self.args.ema_inv_gamma,
            power=self.args.ema_power,
            foreach=not self.is_sharded,  # not all of its operations know sharded tensors
        )

    def _averaged_parameters(self, name: str) -> list[nn.Parameter]:
        """Of an adapted network the adapter alone: the rest does not change."""
        module = self.unwrap(name)
        adapted = has_lora(module)
        return [p for p in module.parameters() if p.requires_grad or not adapted]

    def unwrap(self, name: str) -> Any:
        """
        The module itself, without the wrapper for several processes; its forward still autocasts. In validation, one that
        is sharded is replaced by a copy with all its weights, in float32.
        """
        if name in self._whole_copies:
            return self._whole_copies[name]
        return self.accelerator.unwrap_model(self.modules[name])

    def whole(self, name: str) -> Any:
        """
        A module with all its weights: itself or, if it is sharded, a copy on the CPU of the main process and None on the
        others. Every process has to call it.
        """
        module = self.accelerator.unwrap_model(self.modules[name])
        if not self.is_sharded:
            return module
        state = get_model_state_dict(module, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
        if not self.accelerator.is_main_process:
            return None
        clone = empty_clone(module)
        clone.load_state_dict(state)
        return clone

    def _averages(self) -> list[tuple[str, dict[str, EMAModel]]]:
        """Every kind of average with what its folder in a checkpoint ends in: `_ema`, and `_ema_<max decay>` of the others."""
        return [("_ema", self.ema), *((f"_ema_{decay:g}", ema) for decay, ema in self.further_ema.items())]

    @contextmanager
    def ema_weights(self, max_decay: float | None = None) -> Iterator[None]:
        """Within the block the modules hold their averaged weights, or those of one of `further_ema_max_decays`."""
        averages = self.ema if max_decay is None else self.further_ema[max_decay]
        for name, ema in averages.items():
            ema.store(self._averaged_parameters(name))
            ema.copy_to(self._averaged_parameters(name))
        try:
            yield
        finally:
            for name, ema in averages.items():
                ema.restore(self._averaged_parameters(name))

    def ema_copy(self, name: str, dtype: torch.dtype | None = None, max_decay: float | None = None) -> Any:
        """
        A plain copy of a module with the averaged weights, on the CPU, in eval mode, in `save_dtype` or `dtype`; an adapter
        is fused. `max_decay` chooses one of `further_ema_max_decays`. The main process gets the copy, the others None. Of a
        sharded module it is the state when its parts last came together, at the end of `train` or where a checkpoint is
        pushed, while all processes are there; the further averages of one are in its checkpoints only.

        Raises:
            ValueError: `max_decay` is asked of a sharded module.
        """
        if max_decay is not None and self.is_sharded:
            raise ValueError("`max_decay` must be None for a sharded module: take the average from a checkpoint.")
        averages = self.ema if max_decay is None else self.further_ema[max_decay]
        if not self.accelerator.is_main_process:
            return None
        module = self.unwrap(name)
        if self.is_sharded:
            clone = self._last_copies[name]
        elif has_lora(module):
            with self.ema_weights(max_decay):
                clone = fuse_lora(module).cpu()
        else:
            clone = empty_clone(module)
            clone.load_state_dict(module.state_dict())
            if name in averages:
                averages[name].copy_to(clone.parameters())
        dtype = dtype or getattr(torch, self.args.save_dtype)
        return clone.eval() if dtype == clone.dtype else clone.to(dtype=dtype).eval()

    def _gather_averages(self) -> None:
        """Brings the parts of sharded modules together for [`Trainer.ema_copy`]. Every process has to call it."""
        if self.is_sharded:
            with self.ema_weights():
                self._last_copies = {name: self.whole(name) for name in self.modules}

    # -- checkpoints --

    def checkpoints(self) -> list[Path]:
        """Complete checkpoints in `output_dir`, oldest first."""
        folders = [path for path in self.output_dir.glob("checkpoint-*") if path.name[11:].isdigit()]
        return sorted(folders, key=lambda path: int(path.name[11:]))

    def _find_resume_folder(self) -> Path | None:
        """The checkpoint to go on from; raises `ValueError` where going on would mix two runs in one folder."""
        wanted, existing = self.args.resume_from_checkpoint, self.checkpoints()
        if wanted == "latest":
            return existing[-1] if existing else None
        if wanted is None:
            if existing and not self.args.overwrite_output_dir:
                raise ValueError(
                    f"`output_dir` already holds {existing[-1].name} of another run: go on from it with "
                    "`--resume_from_checkpoint latest`, give another `--output_dir`, or `--overwrite_output_dir`."
                )
            return None
        folder = Path(wanted) if Path(wanted).is_dir() else self.output_dir / wanted
        if not (folder / "trainer_state.json").is_file():
            raise ValueError(f"`resume_from_checkpoint` must be `latest` or a checkpoint folder, but got {wanted!r}.")
        is_own = folder.resolve().parent == self.output_dir.resolve()
        step = int(folder.name[11:]) if is_own else -1
        later = [path for path in existing if int(path.name[11:]) > step]
        if later:
            raise ValueError(
                f"`output_dir` holds {later[-1].name}, which is not part of the run resumed from {folder.name}: "
                "delete it or give another `--output_dir`."
            )
        return folder

    def _save_modules(self, models: list[nn.Module], weights: list[dict], output_dir: str) -> None:
        """Writes the modules and their averages as `save_pretrained` folders in the place of accelerate's files."""
        weights.clear()
        if self.is_streamed:
            path = Path(output_dir, f"stream_{self.accelerator.process_index}.json")
            path.write_text(json.dumps(self.stream_state) + "\n")
        is_main = self.accelerator.is_main_process
        for name in self.modules:
            module = self.whole(name)
            if is_main:
                save_module(module, os.path.join(output_dir, name))
        for max_decay, (suffix, averages) in zip((None, *self.further_ema), self._averages(), strict=True):
            with self.ema_weights(max_decay):
                for name in averages:
                    module = self.whole(name)
                    if is_main:
                        save_module(module, os.path.join(output_dir, name + suffix))
        if not is_main:
            return
        state = {
            "global_step": self.global_step,
            "samples_seen": self.samples_seen,
            "num_samples": self.num_samples,
            "elapsed_seconds": self.elapsed_seconds + time.monotonic() - self.started,
            "ema_steps": {name: ema.optimization_step for name, ema in self.ema.items()},
        }
        Path(output_dir, "trainer_state.json").write_text(json.dumps(state, indent=2) + "\n")

    def _load_modules(self, models: list[nn.Module], input_dir: str) -> None:
        models.clear()
        state = json.loads(Path(input_dir, "trainer_state.json").read_text())
        for suffix, averages in self._averages():
            for name, ema in averages.items():
                folder = os.path.join(input_dir, name + suffix)
                if not os.path.isdir(folder) and suffix != "_ema":
                    logger.warning(f"{input_dir} holds no {name + suffix}: this average begins from {name}_ema.")
                    folder = os.path.join(input_dir, f"{name}_ema")
                if not os.path.isdir(folder):
                    raise ValueError(f"`use_ema` needs {name}_ema, which the checkpoint {input_dir} does not hold.")
                self._load_module(name, folder)
                for shadow, parameter in zip(ema.shadow_params, self._averaged_parameters(name), strict=True):
                    shadow.copy_(parameter.detach())
                ema.optimization_step = state["ema_steps"][name]
        for name in self.modules:
            self._load_module(name, os.path.join(input_dir, name))
        self.global_step = self._last_checkpoint_step = state["global_step"]
        self.samples_seen = state["samples_seen"]
        self.elapsed_seconds = state["elapsed_seconds"]
        if self.is_streamed:
            self.stream_state = self._load_stream_state(input_dir)
        elif state["num_samples"] != self.num_samples:
            logger.warning(
                f"the checkpoint was trained on {state['num_samples']} samples, the dataset now has "
                f"{self.num_samples}: the order of the samples is no longer that of the uninterrupted run."
            )

    def _load_module(self, name: str, folder: str) -> None:
        """Puts what `save_module` wrote into a module, each process its part."""
        module = self.unwrap(name)
        if has_lora(module):
            load_lora_state_dict(module, load_file(os.path.join(folder, LORA_WEIGHTS_NAME)))
            return
        state = load_pretrained(type(module), folder, "").state_dict()
        if self.is_sharded:
            set_model_state_dict(module, state, options=StateDictOptions(full_state_dict=True))
        else:
            module.load_state_dict(state)

    def _load_stream_state(self, input_dir: str) -> Any:
        """Where this process was in its shards; raises `ValueError` where it was not part of the run."""
        index, count = self.accelerator.process_index, self.accelerator.num_processes
        path = Path(input_dir, f"stream_{index}.json")
        if not path.is_file():
            found = len(list(Path(input_dir).glob("stream_*.json")))
            raise ValueError(
                f"the checkpoint {input_dir} was read by {found} process(es), each of which knows where it was, and not "
                f"by {count}: start as many, or a new `output_dir`."
            )
        return json.loads(path.read_text())

    def save_checkpoint(self) -> None:
        """Writes `checkpoint-{global_step}`; a kill at any moment leaves it complete or absent."""
        folder = self.output_dir / f"checkpoint-{self.global_step}"
        # accelerator.save_state writes in place from all processes, so the folder is only renamed when all are done.
        temporary = self.output_dir / f".{folder.name}.tmp"
        if self.accelerator.is_main_process:
            shutil.rmtree(temporary, ignore_errors=True)
        self.accelerator.wait_for_everyone()
        self.accelerator.save_state(str(temporary))
        self.accelerator.wait_for_everyone()
        if self.accelerator.is_main_process:
            commit_folder(temporary, folder)
            limit = self.args.checkpoints_total_limit
            for old in self.checkpoints()[:-limit] if limit else []:
                remove_folder(old)
        self.accelerator.wait_for_everyone()
        self._last_checkpoint_step = self.global_step
        if self.args.push_to_hub and self.args.hub_strategy == "every_save":
            self._push_checkpoint()

    def _prepare_output_dir(self) -> None:
        """Empties or resumes `output_dir`, and records the arguments in it as a config for the next call."""
        if self.accelerator.is_main_process:
            self.output_dir.mkdir(parents=True, exist_ok=True)
            for leftover in self.output_dir.glob(".checkpoint-*"):
                shutil.rmtree(leftover)
            if self.resume_folder is None:
                for old in self.checkpoints():
                    remove_folder(old)
            if self.args.push_to_hub:
                # Now rather than after days of training: a wrong name or token is an error.
                create_repo(str(self.args.hub_model_id), **self._hub_options())
            config = yaml.safe_dump(public_arguments(self.args), sort_keys=False)
            (self.output_dir / "training_args.yaml").write_text(config)
        self.accelerator.wait_for_everyone()
        if self.resume_folder is not None:
            self.accelerator.load_state(str(self.resume_folder))
            # Checkpoints lie between two optimizer steps, also if the number of passes per step has changed since.
            self.accelerator.step = 0
            logger.info(f"resuming from {self.resume_folder} at step {self.global_step}")
        scalars = {k: v for k, v in public_arguments(self.args).items() if isinstance(v, (bool, int, float, str))}
        self.accelerator.init_trackers(Path(sys.argv[0]).stem or "training", config=scalars)

    # -- one step --

    def all_draws(self) -> list[tuple[int, int]]:
        """`(index, draw)` of every sample of the whole run, of all processes, those seen before a resume included."""
        draws = self.max_train_steps * self.samples_per_step
        sampler = KeyedBatchSampler(len(self.dataset), draws, self.args.seed, sample_weights=self.sample_weights)
        return next(iter(sampler))

    def batches(self) -> Iterator[dict[str, Any]]:
        """Batches of this process on its device, from the first draw that was not trained on yet, without end."""
        if self.is_streamed:
            yield from self._streamed_batches()
            return
        sampler = KeyedBatchSampler(
            len(self.dataset),
            self.args.train_batch_size,
            self.args.seed,
            start=self.samples_seen,
            process_index=self.accelerator.process_index,
            num_processes=self.accelerator.num_processes,
            sample_weights=self.sample_weights,
        )
        loader: DataLoader = DataLoader(
            KeyedDataset(self.dataset, self.args.seed, self.transform),
            batch_sampler=sampler,  # type: ignore[arg-type]
            num_workers=self.args.dataloader_num_workers,
            pin_memory=self.accelerator.device.type != "cpu",
        )
        for batch in loader:
            yield send_to_device(batch, self.accelerator.device, non_blocking=True)

    def _streamed_batches(self) -> Iterator[dict[str, Any]]:
        """Batches as a stream has them; with each, `stream_state` moves on to where the stream is after it."""
        index, count = self.accelerator.process_index, self.accelerator.num_processes
        stream = self.dataset.stream(index, count, self.args.dataloader_num_workers, self.stream_state)
        workers, pinned = self.args.dataloader_num_workers, self.accelerator.device.type != "cpu"
        for streamed in DataLoader(stream, batch_size=None, num_workers=workers, pin_memory=pinned):
            self.stream_state = stream.next_state(streamed)
            yield send_to_device(streamed.batch, self.accelerator.device, non_blocking=True)

    @contextmanager
    def _only_trainable(self, name: str) -> Iterator[None]:
        """Within the block gradients flow through the other modules but do not accumulate in them."""
        others = [p for other, parameters in self._trainable.items() if other != name for p in parameters]
        for parameter in others:
            parameter.requires_grad_(False)
        try:
            yield
        finally:
            for parameter in others:
                parameter.requires_grad_(True)

    def _raise_if_not_finite(self, value: Tensor, what: str, batch: Mapping[str, Any]) -> None:
        if torch.isfinite(value).all():
            return
        last = self.checkpoints()
        kept = f"{last[-1]} is the last good checkpoint" if last else "no checkpoint was written yet"
        raise FloatingPointError(
            f"the {what} is {value.detach().float().mean().item()} at step {self.global_step + 1}, samples "
            f"{', '.join(map(str, batch.get('id', ['(no ids)'])))}; {kept}. Look at these samples, lower "
            "`--learning_rate`, or use `--mixed_precision no`."
        )

    def _update(self, name: str, compute_loss: LossFunction, batch: dict[str, Any]) -> None:
        """One forward and backward pass for one module and, when enough of them are accumulated, one step of it."""
        outputs = compute_loss(batch)
        prefix = f"{name}/" if len(self.modules) > 1 else ""
        self._raise_if_not_finite(outputs["loss"], f"{prefix}loss", batch)
        self.accelerator.backward(outputs["loss"])
        optimizer = self.optimizers[name]
        if self.accelerator.sync_gradients:
            grad_norm = self.accelerator.clip_grad_norm_(self._trainable[name], self.args.max_grad_norm)
            if grad_norm is not None:  # DeepSpeed clips on its own, and may not tell
                grad_norm = torch.as_tensor(grad_norm)
                # A float16 run skips the step and lowers its loss scale when the gradient overflows.
                if self.accelerator.scaler is None:
                    self._raise_if_not_finite(grad_norm, f"{prefix}gradient", batch)
                outputs = outputs | {"grad_norm": grad_norm}
        optimizer.step()
        optimizer.zero_grad()
        for key, value in outputs.items():
            self._metrics.setdefault(prefix + key, []).append(float(value.detach()))

    def training_step(self, batches: Iterator[dict[str, Any]], losses: Mapping[str, LossFunction]) -> None:
        """One optimizer step of every module that has a loss, in the order of `losses`."""
        learning_rate = self.learning_rate * self.learning_rate_factor(self.global_step)
        for optimizer in self.optimizers.values():
            for group in optimizer.param_groups:
                group["lr"] = learning_rate
        for pass_index in range(self.args.gradient_accumulation_steps):
            batch = next(batches)
            key = (self.global_step, pass_index, self.accelerator.process_index)
            torch.manual_seed(keyed_seed(self.args.seed, LAYER_STREAM, *key))
            with self.accelerator.accumulate(*self.modules.values()):
                for name, compute_loss in losses.items():
                    with self._only_trainable(name):
                        self._update(name, compute_loss, batch)
        for _, averages in self._averages():
            for name, ema in averages.items():
                ema.step(self._averaged_parameters(name))
        self.global_step += 1
        self.samples_seen += self.samples_per_step
        self._metrics.setdefault("lr", []).append(learning_rate)

    # -- the run --

    def push(self, folder: Path) -> None:
        """
        Uploads the pipeline or the model in a folder if `push_to_hub` is set and the run is finished, from the main process.

        Raises:
            OSError: the hub refuses or cannot be reached; the folder stays, to be pushed by `diffsketching push`.
        """
        if (
            not self.args.push_to_hub
            or not self.accelerator.is_main_process
            or self.global_step < self.max_train_steps
        ):
            return
        repo_id, options = str(self.args.hub_model_id), self._hub_options()
        if (folder / "model_index.json").is_file():
            dtype = getattr(torch, self.args.save_dtype)
            pipeline = DiffSketchingPipeline.from_pretrained(folder, torch_dtype=dtype)
            print(push_pipeline(pipeline, repo_id, **options))
        else:
            print(push_component(folder, repo_id, **options))

    def _hub_options(self) -> dict[str, Any]:
        return {"token": self.args.hub_token, "private": self.args.hub_private_repo or None}

    def _push_checkpoint(self) -> None:
        """
        Uploads the averaged weights as they are now. Not the checkpoint itself, whose optimizer state is a pickle that nobody
        should load from a hub. Training goes on where that fails: the weights are on the disk.
        """
        name = next(iter(self.ema or self.modules))
        self._gather_averages()
        averaged = self.ema_copy(name)
        if averaged is None:
            return
        revision = f"step-{self.global_step}"
        options = {"revision": revision, "commit_message": f"Step {self.global_step}", **self._hub_options()}
        with tempfile.TemporaryDirectory() as temporary:
            averaged.save_pretrained(Path(temporary) / name)
            try:
                push_component(Path(temporary) / name, str(self.args.hub_model_id), **options)
            except OSError as error:
                logger.warning(f"{revision} is not on the Hub: {error}")

    def train(
        self, losses: LossFunction | Mapping[str, LossFunction], validate: ValidationFunction | None = None
    ) -> bool:
        """Trains to `max_train_steps`, or for `max_train_minutes`.

        Args:
            losses: `batch -> {"loss": scalar, ...}`; the other entries are logged. With several modules, one function
                per module name: each step updates them in this order on one batch, and while one is updated the
                parameters of the others are frozen (call those through [`Trainer.unwrap`]).
            validate: `() -> ({name: value}, {name: picture [3, H, W] in [-1, 1]})`. Runs on the main process only,
                without gradients, modules in eval mode with averaged weights; call them through [`Trainer.unwrap`].

        Returns:
            `True` if `max_train_steps` is reached, `False` if the time was up before.

        Raises:
            FloatingPointError: a loss or gradient is not finite; names the step and the samples. Checkpoints stay.
        """
        if not isinstance(losses, Mapping):
            losses = dict.fromkeys(self.modules, losses)
        self._prepare_output_dir()
        for module in self.modules.values():
            module.train()
        batches = self.batches()
        with self._progress_bar() as progress:
            while self.global_step < self.max_train_steps and not self._any_time_is_up():
                self.training_step(batches, losses)
                progress.update()
                if self.global_step % self.args.logging_steps == 0:
                    self._log_metrics(progress)
                if self.args.validation_steps and self.global_step % self.args.validation_steps == 0:
                    self._validate(validate)
                if self.global_step % self.args.checkpointing_steps == 0:
                    self.save_checkpoint()
        if self._last_checkpoint_step != self.global_step:
            self.save_checkpoint()
        if self._last_validation_step != self.global_step:
            self._validate(validate)
        self._gather_averages()
        self.accelerator.end_training()
        finished = self.global_step >= self.max_train_steps
        logger.info(f"{'finished' if finished else 'stopped'} at step {self.global_step} of {self.max_train_steps}")
        return finished

    def time_is_up(self) -> bool:
        """Whether `max_train_minutes` have passed since the trainer was made, by the clock of this process."""
        limit = self.args.max_train_minutes
        return limit is not None and time.monotonic() - self.started >= 60 * limit

    def _any_time_is_up(self) -> bool:
        if self.args.max_train_minutes is None:
            return False
        # The slowest process decides for all, or some would wait for gradients that never come.
        return bool(self.accelerator.gather(torch.tensor(self.time_is_up(), device=self.accelerator.device)).any())

    def _progress_bar(self) -> tqdm:
        self._window_start, self._window_samples = time.monotonic(), self.samples_seen
        return tqdm(
            total=self.max_train_steps,
            initial=self.global_step,
            unit="step",
            disable=not self.accelerator.is_local_main_process,
            mininterval=0.5 if sys.stderr.isatty() else 10,
        )

    def _log_metrics(self, progress: tqdm) -> None:
        """Logs the mean over processes and over the steps since the last call, and the speed in between."""
        means = torch.tensor([float(np.mean(v)) for v in self._metrics.values()], device=self.accelerator.device)
        means = self.accelerator.reduce(means, reduction="mean")
        metrics = dict(zip(self._metrics, means.tolist(), strict=True))
        self._metrics = {}
        now = time.monotonic()
        speed = (self.samples_seen - self._window_samples) / (now - self._window_start)
        self._window_start, self._window_samples = now, self.samples_seen
        shown = {key: f"{value:.3g}" for key, value in metrics.items() if key.endswith("loss") or key == "lr"}
        progress.set_postfix({**shown, "img/s": f"{speed:.1f}"}, refresh=False)
        self.accelerator.log({**metrics, "images_per_second": speed}, step=self.global_step)

    def _validate(self, validate: ValidationFunction | None) -> None:
        self._last_validation_step = self.global_step
        is_main = self.accelerator.is_main_process
        # The parts of a sharded module come together on the main process, which validates, so all of them take part.
        if self.is_sharded or (is_main and validate is not None):
            with ExitStack() as stack:
                stack.enter_context(torch.no_grad())
                stack.enter_context(self.ema_weights())
                if self.is_sharded:
                    copies = {name: self.whole(name) for name in self.modules}
                    stack.callback(self._whole_copies.clear)  # before the modules get their own weights back
                    if is_main:
                        self._whole_copies.update((n, c.to(self.accelerator.device)) for n, c in copies.items())
                if is_main and validate is not None:
                    for module in [self.unwrap(name) for name in self.modules]:
                        module.eval()
                        stack.callback(module.train)
                    self._log_validation(*validate())
        self.accelerator.wait_for_everyone()
        self._window_start, self._window_samples = time.monotonic(), self.samples_seen

    def _log_validation(self, metrics: dict[str, float], pictures: dict[str, Tensor]) -> None:
        metrics = {f"validation/{name}": value for name, value in metrics.items()}
        self.accelerator.log(metrics, step=self.global_step)
        logger.info(f"step {self.global_step}: " + ", ".join(f"{k} {v:.4g}" for k, v in metrics.items()))
        for name, picture in pictures.items():
            save_png(picture, self.output_dir / "samples" / f"{name}-{self.global_step:06d}.png")
            self._log_picture(name, picture)

    def _log_picture(self, name: str, picture: Tensor) -> None:
        for tracker in self.accelerator.trackers:
            if tracker.name == "tensorboard":
                tracker.writer.add_image(name, (picture + 1) / 2, global_step=self.global_step)
