# SPDX-License-Identifier: Apache-2.0
"""The ways accelerate shares a training among processes, as far as they work here."""

from collections.abc import Mapping

from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import nn

from diffsketching_pipeline.lora import has_lora
from diffsketching_pipeline.training.arguments import TrainingArguments


def check_strategy(accelerator: Accelerator, args: TrainingArguments, modules: Mapping[str, nn.Module]) -> bool:
    """
    Check that accelerate shares the work in a way that these modules can be trained in, and tell DeepSpeed what it cannot see.

    Returns:
        `bool`: whether each process will hold a part of the weights only.

    Raises:
        ValueError: for what does not work that way.
    """
    kind = accelerator.distributed_type
    if kind not in (DistributedType.FSDP, DistributedType.DEEPSPEED):
        return False
    if len(modules) > 1:
        raise ValueError(f"{kind.value} trains one network per run, and this script has {', '.join(modules)}.")
    if kind == DistributedType.DEEPSPEED:
        plugin = accelerator.state.deepspeed_plugin
        if plugin.zero_stage > 2:
            raise ValueError(f"DeepSpeed's ZeRO stage must be at most 2, but is {plugin.zero_stage}: use FSDP.")
        if accelerator.mixed_precision != "no":
            raise ValueError(
                "`mixed_precision` must be no with DeepSpeed, which would train half-precision weights, but is "
                f"{accelerator.mixed_precision}: speed it up by `--allow_tf32 true`, or use FSDP."
            )
        passes = args.gradient_accumulation_steps
        if accelerator.gradient_accumulation_steps != passes:
            raise ValueError(
                f"`gradient_accumulation_steps` is {passes}, but {accelerator.gradient_accumulation_steps} in "
                "accelerate's DeepSpeed config, which wins: write it there, too."
            )
        plugin.deepspeed_config["gradient_clipping"] = args.max_grad_norm
        # accelerate reads it off a data loader that it prepares, and this trainer's is not.
        plugin.deepspeed_config["train_micro_batch_size_per_gpu"] = args.train_batch_size
        return False
    if not accelerator.is_fsdp2:
        raise ValueError("`fsdp_version` must be 2 in accelerate's config, see configs/accelerate/fsdp.yaml.")
    if any(has_lora(module) for module in modules.values()):
        raise ValueError("adapters are too small to be worth sharding: train them without FSDP.")
    return True
