# SPDX-License-Identifier: Apache-2.0
"""The arguments that every training script has."""

import dataclasses
import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

from accelerate.tracking import get_available_trackers

from diffsketching_pipeline.command_line import argument, parse_arguments
from diffsketching_pipeline.files import check_writable


ArgumentsT = TypeVar("ArgumentsT", bound="TrainingArguments")


@dataclass
class TrainingArguments:
    """Arguments every script has, named as in diffusers' `train_unconditional.py` and `train_controlnet.py`.

    A script subclasses this to add its own and to change defaults.
    """

    train_data_dir: str | None = argument(
        None,
        "photos in one folder per class, below `train` and `validation`, below `photo` (Sketchy's layout) or alone; without "
        "`validation` they are split by the hash of their names",
    )
    dataset_name: str | None = argument(
        None, "instead of `train_data_dir`: the id of a dataset repository on the Hub with the same folders"
    )
    max_train_samples: int | None = argument(
        None, "train on this many photos only, chosen by the hash of their names before any is read"
    )
    cache_dir: str | None = argument(None, "where the dataset and what is computed from it are cached")
    output_dir: str = argument("output", "where checkpoints, samples, logs and the final weights are written")
    overwrite_output_dir: bool = argument(False, "delete the checkpoints that `output_dir` already holds")
    pretrained_model_name_or_path: str | None = argument(
        None,
        "start from these weights (the name of a bundled model, a pipeline folder, a model folder or a Hub id) with a fresh "
        "optimizer",
    )
    seed: int = argument(0, "the seed of everything random, at least 0")
    resolution: int = argument(64, "side of the training images in pixels")

    train_batch_size: int = argument(16, "samples per process and forward pass")
    max_train_steps: int | None = argument(None, "optimizer steps; overrides `num_train_epochs`")
    num_train_epochs: int = argument(100, "passes over the data")
    max_train_minutes: float | None = argument(
        None, "stop with a checkpoint after this much wall time; resume with `--resume_from_checkpoint latest`"
    )
    gradient_accumulation_steps: int = argument(1, "forward passes per optimizer step")
    preprocessing_num_workers: int | None = argument(
        None, "processes that read and draw photos before training, if there are many; left out: one per core"
    )
    dataloader_num_workers: int = argument(0, "worker processes that prepare samples; 0 = the main process does")

    learning_rate: float = argument(1e-4, "the learning rate after the warm-up")
    scale_lr: bool = argument(False, "multiply it by processes x accumulation steps x batch size")
    lr_scheduler: str = argument(
        "constant_with_warmup", "linear, cosine, cosine_with_restarts, polynomial, constant or constant_with_warmup"
    )
    lr_warmup_steps: int = argument(500, "steps over which the learning rate rises from 0")
    lr_num_cycles: int = argument(1, "hard restarts of `cosine_with_restarts`")
    lr_power: float = argument(1.0, "power of `polynomial`")
    lr_decay_steps: int | None = argument(
        None, "keep the rate constant and apply `lr_scheduler` to this many last steps only"
    )
    optimizer: Literal["adamw", "muon"] = argument(
        "adamw", "muon orthogonalizes the steps of hidden matrices and flattened kernels, see optimizers.py"
    )
    adam_beta1: float = argument(0.9, "AdamW's beta 1")
    adam_beta2: float = argument(0.999, "AdamW's beta 2")
    adam_weight_decay: float = argument(1e-3, "AdamW's weight decay")
    adam_epsilon: float = argument(1e-8, "AdamW's epsilon")
    max_grad_norm: float = argument(1.0, "the gradient is scaled down to this norm")
    mixed_precision: Literal["no", "fp16", "bf16"] | None = argument(
        None, "autocast the forward passes; the weights stay float32. Left out: what `accelerate config` says"
    )
    allow_tf32: bool = argument(False, "let float32 matrix products use TensorFloat-32 where a GPU has it")

    use_ema: bool = argument(True, "publish and validate an exponential moving average of the weights")
    ema_inv_gamma: float = argument(1.0, "the decay at step n is 1 - (1 + n / inv_gamma) ** -power")
    ema_power: float = argument(3 / 4, "see `ema_inv_gamma`")
    ema_max_decay: float = argument(0.9999, "upper bound of the decay")
    further_ema_max_decays: list[float] | None = argument(
        None, "further averages with these upper bounds, kept in each checkpoint to choose from afterwards"
    )

    checkpointing_steps: int = argument(500, "steps between two checkpoints")
    checkpoints_total_limit: int | None = argument(None, "checkpoints to keep, the oldest are deleted first")
    resume_from_checkpoint: str | None = argument(
        None, "a checkpoint folder, or `latest`: the newest in `output_dir`, from the start if there is none"
    )
    validation_steps: int = argument(500, "steps between two validations; 0 = only at the end")
    logging_steps: int = argument(10, "steps over which the logged values are averaged")
    logging_dir: str = argument("logs", "tracker directory inside `output_dir`")
    report_to: str = argument("tensorboard", "`tensorboard`, any other tracker accelerate knows, `all` or `none`")
    save_dtype: Literal["float32", "float16", "bfloat16"] = argument("float32", "type of the final weights")

    push_to_hub: bool = argument(False, "upload the final weights to the Hub")
    hub_model_id: str | None = argument(None, "repository to upload to, user/name; made if there is none")
    hub_private_repo: bool = argument(False, "make a new repository private")
    hub_strategy: Literal["end", "every_save"] = argument(
        "end",
        "every_save also uploads the averaged weights of each checkpoint, as branch `step-<n>` of the repository",
    )
    # Not in the text of the arguments either, which errors and logs may show.
    hub_token: str | None = field(
        default=None,
        repr=False,
        metadata={"help": "token to upload with, instead of that of `hf auth login` or HF_TOKEN"},
    )


def parse_args(
    arguments_class: type[ArgumentsT], args: Sequence[str] | None = None, description: str | None = None
) -> ArgumentsT:
    """Reads `[config.yaml | --config config.yaml] [--name value ...]`; the command line wins over the file.

    Args:
        arguments_class: dataclass that lists the arguments.
        args: the command line without the program, `sys.argv[1:]` when left out.
        description: text of `--help`.

    Raises:
        ValueError: an argument that does not exist (with the closest ones that do), a config that is no mapping, or a
            value out of range.
    """
    # What is said before the trainer is there, and its logger that knows the processes apart, is said once.
    if _is_first_process():
        logging.basicConfig(format="%(asctime)s %(levelname)s %(name)s: %(message)s", level=logging.INFO)
    arguments = parse_arguments(arguments_class, description, args, takes_config=True)
    check_arguments(arguments)
    return arguments


def check_arguments(args: TrainingArguments) -> None:
    """Raises `ValueError` for a value that would only fail, or be silently wrong, after work has begun."""
    if _is_first_process():
        check_writable(args.output_dir)
    at_least: dict[str, float] = {"seed": 0, "validation_steps": 0, "lr_warmup_steps": 0, "dataloader_num_workers": 0}
    at_least |= dict.fromkeys(("train_batch_size", "gradient_accumulation_steps", "checkpointing_steps"), 1)
    at_least |= dict.fromkeys(("checkpoints_total_limit", "logging_steps", "resolution", "num_train_epochs"), 1)
    at_least |= {"preprocessing_num_workers": 1, "max_train_steps": 1, "max_train_samples": 1, "lr_decay_steps": 1}
    for name, minimum in at_least.items():
        value = getattr(args, name)
        if value is not None and value < minimum:
            raise ValueError(f"`{name}` must be at least {minimum}, but got {value}.")
    for name in ("learning_rate", "max_grad_norm", "max_train_minutes"):
        value = getattr(args, name)
        if value is not None and not value > 0:
            raise ValueError(f"`{name}` must be positive, but got {value}.")
    for name, decays in (
        ("ema_max_decay", [args.ema_max_decay]),
        ("further_ema_max_decays", args.further_ema_max_decays or []),
    ):
        for decay in decays:
            if not 0 <= decay < 1:
                raise ValueError(f"`{name}` must be in [0, 1), but got {decay}.")
    if args.further_ema_max_decays and not args.use_ema:
        raise ValueError("`further_ema_max_decays` needs `use_ema`, but got `use_ema` false.")
    check_trackers(args.report_to)
    if args.push_to_hub and not args.hub_model_id:
        raise ValueError("`push_to_hub` needs `hub_model_id`, the repository to upload to: user/name.")


def _is_first_process() -> bool:
    """Return whether this is the first of the processes that a launcher started, asked before accelerate is set up."""
    return int(os.environ.get("RANK", "0")) == 0


def num_readers(args: TrainingArguments) -> int:
    """Return how many processes read photos, of each of the processes that train on this machine."""
    beside = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return args.preprocessing_num_workers or max(1, (os.cpu_count() or 1) // beside)


def check_trackers(report_to: str) -> None:
    """Raises `ValueError` for a tracker that accelerate does not know, or whose package is not installed."""
    if report_to in ("all", "none"):
        return
    available = [str(getattr(tracker, "value", tracker)) for tracker in get_available_trackers()]
    if report_to not in available:
        raise ValueError(
            f"`report_to` must be none, all or one of {', '.join(available) or 'the trackers that are installed'}, but got "
            f"{report_to!r}: install its package, or choose another."
        )


def public_arguments(args: TrainingArguments) -> dict[str, Any]:
    """The arguments that may be written down: all but the token."""
    return {name: value for name, value in dataclasses.asdict(args).items() if name != "hub_token"}


def check_dataset_name(name: str, has_columns: bool = False) -> None:
    """
    Raises:
        ValueError: if `dataset_name` is a folder here of the kind that `train_data_dir` is for. With columns it may be a dataset.
    """
    root = Path(name)
    of_files = (root / "sketch").is_dir() or any(path.is_dir() for path in root.glob("train/*"))
    if root.is_dir() and (of_files or not has_columns):
        raise ValueError(
            f"`dataset_name` must be a dataset on the Hub, but {name!r} is a folder of photos here: give it as `--train_data_dir`."
        )


def resolve_data_dir(args: TrainingArguments) -> Path:
    """The imagefolder to train on: `train_data_dir`, or the downloaded snapshot of `dataset_name`.

    Raises:
        ValueError: neither or both are given, or there is no such folder.
    """
    if (args.train_data_dir is None) == (args.dataset_name is None):
        raise ValueError("give either `train_data_dir` or `dataset_name`: exactly one says what to train on.")
    if args.dataset_name is not None:
        from huggingface_hub import snapshot_download

        check_dataset_name(args.dataset_name)

        root = Path(snapshot_download(args.dataset_name, repo_type="dataset", cache_dir=args.cache_dir))
    else:
        root = Path(str(args.train_data_dir))
    if not root.is_dir():
        raise ValueError(f"`train_data_dir` must be a folder of photos in class folders, but {root} is none.")
    return root
