# SPDX-License-Identifier: Apache-2.0
import pytest
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from accelerate.utils.launch import prepare_multi_gpu_env
from diffusers.models.attention_processor import Attention
from diffusers.models.resnet import ResnetBlock2D
from testing_utils import TRAINING, make_unet


CONFIGS = TRAINING / "configs" / "accelerate"
KINDS = {
    "one_gpu": DistributedType.NO,
    "eight_gpus": DistributedType.MULTI_GPU,
    "fsdp": DistributedType.FSDP,
    "deepspeed_zero2": DistributedType.DEEPSPEED,
}


def test_every_config_is_tested():
    assert sorted(path.stem for path in CONFIGS.glob("*.yaml")) == sorted(KINDS)


@pytest.mark.parametrize("name", KINDS)
def test_accelerate_reads_a_config(name):
    config = load_config_from_file(str(CONFIGS / f"{name}.yaml"))  # refuses keys that it does not know
    assert config.distributed_type == KINDS[name]
    assert config.num_processes == (1 if name == "one_gpu" else 8)
    assert config.mixed_precision == ("no" if name == "deepspeed_zero2" else "bf16")


def test_what_the_sharding_config_tells_the_processes():
    """The environment that `accelerate launch` makes of it: an option that is misspelt would be the default there."""
    args = launch_command_parser().parse_args(["--config_file", str(CONFIGS / "fsdp.yaml"), "script.py"])
    args = _validate_launch_command(args)[0]
    assert args.use_fsdp and args.num_processes == 8
    environment = prepare_multi_gpu_env(args)
    assert environment["ACCELERATE_MIXED_PRECISION"] == "bf16"
    assert environment["ACCELERATE_USE_FSDP"] == "true" and environment["FSDP_VERSION"] == "2"
    assert environment["FSDP_AUTO_WRAP_POLICY"] == "TRANSFORMER_BASED_WRAP"
    assert environment["FSDP_RESHARD_AFTER_FORWARD"] == "true"
    assert environment["FSDP_CPU_RAM_EFFICIENT_LOADING"] == "false"


def test_the_sharded_blocks_are_those_of_the_unet():
    settings = yaml.safe_load((CONFIGS / "fsdp.yaml").read_text())["fsdp_config"]
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=settings["fsdp_version"],
        auto_wrap_policy=settings["fsdp_auto_wrap_policy"].lower(),
        transformer_cls_names_to_wrap=settings["fsdp_transformer_layer_cls_to_wrap"].split(","),
        state_dict_type=settings["fsdp_state_dict_type"],
        reshard_after_forward=settings["fsdp_reshard_after_forward"],
    )
    unet = make_unet(in_channels=4)
    plugin.set_auto_wrap_policy(unet)
    wrapped = plugin.auto_wrap_policy.keywords["transformer_layer_cls"]
    assert wrapped == {ResnetBlock2D, Attention}
    assert all(any(isinstance(module, kind) for module in unet.modules()) for kind in wrapped)
