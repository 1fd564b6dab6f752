# SPDX-License-Identifier: Apache-2.0
"""The parts that the training scripts share: arguments, keyed randomness, and a loop that can be killed at any step.

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
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.logging import get_logger
from accelerate.utils import ProjectConfiguration, send_to_device
from diffusers.optimization import get_scheduler
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from diffsketching_pipeline.stopping import Stopped, TermRequest, ignore_signals
from diffsketching_pipeline.training.arguments import TrainingArguments, check_arguments, public_arguments
from diffsketching_pipeline.training.keyed import (
    LAYER_STREAM,
    KeyedBatchSampler,
    KeyedDataset,
    SampleTransform,
    keyed_seed,
)
from diffsketching_pipeline.training.modules import TrainedModules
from diffsketching_pipeline.training.optimizers import Muon
from diffsketching_pipeline.training.pictures import save_png
from diffsketching_pipeline.training.publishing import HubRepository
from diffsketching_pipeline.training.run_folder import RunFolder
from diffsketching_pipeline.training.strategy import check_strategy


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
        self.folder = RunFolder(args.output_dir)
        self.dataset, self.transform, self.sample_weights = dataset, transform, sample_weights
        self.accelerator = self._make_accelerator()
        if self.accelerator.is_main_process:
            self.folder.lock()
        self.resume_folder = self.folder.find_checkpoint(args.resume_from_checkpoint, args.overwrite_output_dir)
        self._term = TermRequest()

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

        self.trained = self._make_trained(modules, modules if ema_modules is None else ema_modules)
        self.modules = self.trained.prepared
        self.repository = HubRepository(
            str(args.hub_model_id), args.hub_token, args.hub_private_repo, self.trained.save_dtype
        )

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
        logging_dir = self.folder.path / args.logging_dir
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

    def _make_trained(self, modules: Mapping[str, nn.Module], ema_modules: Iterable[str]) -> TrainedModules:
        args = self.args
        return TrainedModules(
            self.accelerator,
            modules,
            self._prepare,
            is_sharded=check_strategy(self.accelerator, args, modules),
            ema_modules=tuple(ema_modules),
            ema_max_decays=(args.ema_max_decay, *(args.further_ema_max_decays or ())) if args.use_ema else (),
            ema_inv_gamma=args.ema_inv_gamma,
            ema_power=args.ema_power,
            save_dtype=getattr(torch, args.save_dtype),
        )

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

    # What scripts and losses ask of the modules.

    def unwrap(self, name: str) -> Any:
        """Return a module without the wrapper for several processes, see [`~modules.TrainedModules.unwrap`]."""
        return self.trained.unwrap(name)

    def ema_weights(self, max_decay: float | None = None) -> AbstractContextManager[None]:
        """Put averages into the modules within a block, see [`~modules.TrainedModules.ema_weights`]."""
        return self.trained.ema_weights(max_decay)

    def ema_copy(self, name: str, dtype: torch.dtype | None = None, max_decay: float | None = None) -> Any:
        """Return a copy of a module with the averaged weights, see [`~modules.TrainedModules.ema_copy`]."""
        return self.trained.ema_copy(name, dtype, max_decay)

    # -- checkpoints --

    def _save_modules(self, models: list[nn.Module], weights: list[dict], output_dir: str) -> None:
        """Writes the modules and their averages as `save_pretrained` folders in the place of accelerate's files."""
        weights.clear()
        if self.is_streamed:
            path = Path(output_dir, f"stream_{self.accelerator.process_index}.json")
            path.write_text(json.dumps(self.stream_state) + "\n")
        self.trained.save(output_dir)
        if not self.accelerator.is_main_process:
            return
        state = {
            "global_step": self.global_step,
            "samples_seen": self.samples_seen,
            "num_samples": self.num_samples,
            "elapsed_seconds": self.elapsed_seconds + time.monotonic() - self.started,
            "ema_steps": {name: ema.optimization_step for name, ema in self.trained.ema.items()},
        }
        Path(output_dir, "trainer_state.json").write_text(json.dumps(state, indent=2) + "\n")

    def _load_modules(self, models: list[nn.Module], input_dir: str) -> None:
        models.clear()
        state = json.loads(Path(input_dir, "trainer_state.json").read_text())
        self.trained.load(input_dir, state["ema_steps"])
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

    def _load_stream_state(self, input_dir: str) -> Any:
        """Read where this process was in its shards; raises `ValueError` if it was not part of the run."""
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
        # accelerator.save_state writes in place from all processes, so the folder is only renamed when all are done.
        temporary = self.folder.temporary(self.global_step)
        if self.accelerator.is_main_process:
            shutil.rmtree(temporary, ignore_errors=True)
        self.accelerator.wait_for_everyone()
        self.accelerator.save_state(str(temporary))
        self.accelerator.wait_for_everyone()
        if self.accelerator.is_main_process:
            self.folder.commit(self.global_step, self.args.checkpoints_total_limit)
        self.accelerator.wait_for_everyone()
        self._last_checkpoint_step = self.global_step
        if self.args.push_to_hub and self.args.hub_strategy == "every_save":
            self._push_checkpoint()

    def _prepare_output_dir(self) -> None:
        """Empties or resumes `output_dir`, and records the arguments in it as a config for the next call."""
        if self.accelerator.is_main_process:
            if self.args.push_to_hub:
                self.repository.create()
            self.folder.prepare(public_arguments(self.args), keep_checkpoints=self.resume_folder is not None)
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
            worker_init_fn=ignore_signals,
        )
        for batch in loader:
            yield send_to_device(batch, self.accelerator.device, non_blocking=True)

    def _streamed_batches(self) -> Iterator[dict[str, Any]]:
        """Batches as a stream has them; with each, `stream_state` moves on to where the stream is after it."""
        index, count = self.accelerator.process_index, self.accelerator.num_processes
        stream = self.dataset.stream(index, count, self.args.dataloader_num_workers, self.stream_state)
        workers, pinned = self.args.dataloader_num_workers, self.accelerator.device.type != "cpu"
        options = {"num_workers": workers, "pin_memory": pinned, "worker_init_fn": ignore_signals}
        for streamed in DataLoader(stream, batch_size=None, **options):  # type: ignore[arg-type]
            self.stream_state = stream.next_state(streamed)
            yield send_to_device(streamed.batch, self.accelerator.device, non_blocking=True)

    def _raise_if_not_finite(self, value: Tensor, what: str, batch: Mapping[str, Any]) -> None:
        if torch.isfinite(value).all():
            return
        last = self.folder.checkpoints()
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
        optimizer = self.trained.optimizers[name]
        if self.accelerator.sync_gradients:
            grad_norm = self.accelerator.clip_grad_norm_(self.trained.trainable[name], self.args.max_grad_norm)
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
        for optimizer in self.trained.optimizers.values():
            for group in optimizer.param_groups:
                group["lr"] = learning_rate
        for pass_index in range(self.args.gradient_accumulation_steps):
            batch = next(batches)
            key = (self.global_step, pass_index, self.accelerator.process_index)
            torch.manual_seed(keyed_seed(self.args.seed, LAYER_STREAM, *key))
            with self.accelerator.accumulate(*self.modules.values()):
                for name, compute_loss in losses.items():
                    with self.trained.only_trainable(name):
                        self._update(name, compute_loss, batch)
        self.trained.step_averages()
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
        print(self.repository.push(folder))

    def _push_checkpoint(self) -> None:
        """
        Uploads the averaged weights as they are now. Not the checkpoint itself, whose optimizer state is a pickle that nobody
        should load from a hub. Training goes on where that fails: the weights are on the disk.
        """
        name = next(iter(self.trained.ema or self.modules))
        self.trained.gather_averages()
        averaged = self.ema_copy(name)
        if averaged is not None:
            self.repository.push_step(averaged, name, self.global_step)

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
            Stopped: a SIGTERM came; the step was finished and its checkpoint written. The process ends with exit code 143.
        """
        if not isinstance(losses, Mapping):
            losses = dict.fromkeys(self.modules, losses)
        self._prepare_output_dir()
        for module in self.modules.values():
            module.train()
        batches = self.batches()
        with self._term, self._progress_bar() as progress:
            while self.global_step < self.max_train_steps and not self._any(self.time_is_up() or self._term.is_set):
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
            if self._last_validation_step != self.global_step and not self._any(self._term.is_set):
                self._validate(validate)
            is_terminated = self._any(self._term.is_set)
        self.trained.gather_averages()
        self.accelerator.end_training()
        finished = self.global_step >= self.max_train_steps
        logger.info(f"{'finished' if finished else 'stopped'} at step {self.global_step} of {self.max_train_steps}")
        if is_terminated:
            raise Stopped(signal.SIGTERM)
        return finished

    def time_is_up(self) -> bool:
        """Return whether `max_train_minutes` have passed since the trainer was made, by the clock of this process."""
        limit = self.args.max_train_minutes
        return limit is not None and time.monotonic() - self.started >= 60 * limit

    def _any(self, is_so: bool) -> bool:
        """Return whether it is so in any process: the first decides for all, or some would wait for gradients forever."""
        if self.accelerator.num_processes == 1:
            return is_so
        return bool(self.accelerator.gather(torch.tensor(is_so, device=self.accelerator.device)).any())

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
        if self.trained.is_sharded or (is_main and validate is not None):
            with self.trained.validating():
                measured = self._term.run(validate) if is_main and validate is not None else None
                if measured is not None:
                    self._log_validation(*measured)
        self.accelerator.wait_for_everyone()
        self._window_start, self._window_samples = time.monotonic(), self.samples_seen

    def _log_validation(self, metrics: dict[str, float], pictures: dict[str, Tensor]) -> None:
        metrics = {f"validation/{name}": value for name, value in metrics.items()}
        self.accelerator.log(metrics, step=self.global_step)
        logger.info(f"step {self.global_step}: " + ", ".join(f"{k} {v:.4g}" for k, v in metrics.items()))
        for name, picture in pictures.items():
            save_png(picture, self.folder.path / "samples" / f"{name}-{self.global_step:06d}.png")
            self._log_picture(name, picture)

    def _log_picture(self, name: str, picture: Tensor) -> None:
        pixels = ((picture + 1) * 127.5).round().clamp(0, 255).byte().permute(1, 2, 0).cpu().numpy()
        for tracker in self.accelerator.trackers:
            if tracker.name == "tensorboard":
                tracker.writer.add_image(name, pixels, global_step=self.global_step, dataformats="HWC")
            elif hasattr(tracker, "log_images"):
                tracker.log_images({name: [pixels]}, step=self.global_step)
