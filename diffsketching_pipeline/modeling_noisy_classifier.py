# SPDX-License-Identifier: Apache-2.0
"""The noisy image classifier p(y | x_t, t) of classifier guidance (Dhariwal and Nichol, 2021, section 4)."""

from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.embeddings import TimestepEmbedding, Timesteps
from diffusers.models.modeling_utils import ModelMixin
from diffusers.models.unets.unet_2d import UNet2DModel
from diffusers.models.unets.unet_2d_blocks import UNetMidBlock2D, get_down_block
from diffusers.utils import BaseOutput


DOWN_BLOCK_TYPES = ("DownBlock2D", "AttnDownBlock2D", "ResnetDownsampleBlock2D")


@dataclass
class NoisyImageClassifierOutput(BaseOutput):
    """
    The output of [`NoisyImageClassifier`].

    Args:
        logits (`torch.Tensor` of shape `(batch_size, num_classes)`): Unnormalized log p(y | x_t, t).
    """

    logits: torch.Tensor


class AttentionPool2D(nn.Module):
    """
    Pools `[B, C, H, W]` to `[B, num_classes]`: the mean feature attends to itself and to every position.

    Args:
        spatial_size (`int`): Side of the feature map.
        channels (`int`): Channels of the feature map.
        head_dim (`int`): Channels of one attention head.
        num_classes (`int`): Channels of the result.
    """

    def __init__(self, spatial_size: int, channels: int, head_dim: int, num_classes: int):
        super().__init__()
        self.head_dim = head_dim
        self.positional_embedding = nn.Parameter(torch.randn(spatial_size**2 + 1, channels) / channels**0.5)
        self.to_q = nn.Linear(channels, channels)
        self.to_k = nn.Linear(channels, channels)
        self.to_v = nn.Linear(channels, channels)
        self.to_out = nn.Linear(channels, num_classes)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        tokens = hidden_states.flatten(2).transpose(1, 2)
        tokens = torch.cat([tokens.mean(dim=1, keepdim=True), tokens], dim=1)
        tokens = tokens + self.positional_embedding.to(tokens.dtype)

        # Only the mean token's row of the attention is ever read, so it is the only query.
        query, key, value = (
            states.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
            for states in (self.to_q(tokens[:, :1]), self.to_k(tokens), self.to_v(tokens))
        )
        pooled = F.scaled_dot_product_attention(query, key, value)
        return self.to_out(pooled.flatten(1))


class NoisyImageClassifier(ModelMixin, ConfigMixin):
    r"""
    The downsampling half of a `UNet2DModel` with attention pooling: the class of a *noisy* image, given its timestep.
    With the default arguments' kind of blocks it is the classifier of "Diffusion Models Beat GANs on Image Synthesis"
    (Dhariwal and Nichol, 2021). The arguments shared with [`~diffusers.UNet2DModel`] mean what they mean there.

    Parameters:
        sample_size (`int`, *optional*, defaults to 64):
            Side of the images in pixels, a multiple of `2 ** (len(block_out_channels) - 1)`. No other size is
            accepted, because the pooling has one learned position per feature.
        in_channels (`int`, *optional*, defaults to 3): Channels of the images.
        num_classes (`int`, *optional*, defaults to 1000): Number of classes.
        time_proj_dim (`int`, *optional*): Width of the sinusoidal embedding; `block_out_channels[0]` if `None`.
        time_embedding_dim (`int`, *optional*): Width of the timestep embedding; `4 * time_proj_dim` if `None`.
        freq_shift (`int`, *optional*, defaults to 0): Frequency shift of the sinusoidal embedding.
        flip_sin_to_cos (`bool`, *optional*, defaults to `True`): Whether the cosines come first in it.
        down_block_types (`tuple[str, ...]`, *optional*):
            One of `"DownBlock2D"`, `"ResnetDownsampleBlock2D"` and `"AttnDownBlock2D"` per level.
        block_out_channels (`tuple[int, ...]`, *optional*, defaults to `(128, 256, 384, 512)`): Channels per level.
        layers_per_block (`int`, *optional*, defaults to 2): Residual blocks per level.
        downsample_padding (`int`, *optional*, defaults to 1): Padding of convolutional downsampling.
        downsample_type (`str`, *optional*, defaults to `"resnet"`):
            Downsampling of `"AttnDownBlock2D"` levels, `"conv"` or `"resnet"`; of the others the type says it.
        dropout (`float`, *optional*, defaults to 0.0): Dropout inside the residual blocks.
        act_fn (`str`, *optional*, defaults to `"silu"`): Activation function of the residual blocks.
        attention_head_dim (`int`, *optional*, defaults to 64):
            Channels of one attention head; `None` for a single head everywhere.
        norm_num_groups (`int`, *optional*, defaults to 32): Groups of the group normalizations.
        norm_eps (`float`, *optional*, defaults to 1e-5): Epsilon of the group normalizations.
        resnet_time_scale_shift (`str`, *optional*, defaults to `"scale_shift"`):
            How the timestep enters the residual blocks, `"default"` (added) or `"scale_shift"`.
    """

    _supports_gradient_checkpointing = True
    _skip_layerwise_casting_patterns = ["norm"]

    @register_to_config
    def __init__(
        self,
        sample_size: int = 64,
        in_channels: int = 3,
        num_classes: int = 1000,
        time_proj_dim: int | None = None,
        time_embedding_dim: int | None = None,
        freq_shift: int = 0,
        flip_sin_to_cos: bool = True,
        down_block_types: tuple[str, ...] = (
            "ResnetDownsampleBlock2D",
            "AttnDownBlock2D",
            "AttnDownBlock2D",
            "AttnDownBlock2D",
        ),
        block_out_channels: tuple[int, ...] = (128, 256, 384, 512),
        layers_per_block: int = 2,
        downsample_padding: int = 1,
        downsample_type: str = "resnet",
        dropout: float = 0.0,
        act_fn: str = "silu",
        attention_head_dim: int | None = 64,
        norm_num_groups: int = 32,
        norm_eps: float = 1e-5,
        resnet_time_scale_shift: str = "scale_shift",
    ):
        super().__init__()
        self._check_config(sample_size, down_block_types, block_out_channels, attention_head_dim)

        time_proj_dim = time_proj_dim or block_out_channels[0]
        time_embedding_dim = time_embedding_dim or 4 * time_proj_dim
        self.time_proj = Timesteps(time_proj_dim, flip_sin_to_cos, freq_shift)
        self.time_embedding = TimestepEmbedding(time_proj_dim, time_embedding_dim)

        self.conv_in = nn.Conv2d(in_channels, block_out_channels[0], kernel_size=3, padding=1)
        self.down_blocks = nn.ModuleList()
        input_channels = (block_out_channels[0], *block_out_channels[:-1])
        for i, down_block_type in enumerate(down_block_types):
            down_block = get_down_block(
                down_block_type,
                num_layers=layers_per_block,
                in_channels=input_channels[i],
                out_channels=block_out_channels[i],
                temb_channels=time_embedding_dim,
                add_downsample=i < len(block_out_channels) - 1,
                resnet_eps=norm_eps,
                resnet_act_fn=act_fn,
                resnet_groups=norm_num_groups,
                attention_head_dim=attention_head_dim or block_out_channels[i],
                downsample_padding=downsample_padding,
                resnet_time_scale_shift=resnet_time_scale_shift,
                downsample_type=downsample_type,
                dropout=dropout,
            )
            self.down_blocks.append(down_block)

        channels = block_out_channels[-1]
        self.mid_block = UNetMidBlock2D(
            in_channels=channels,
            temb_channels=time_embedding_dim,
            dropout=dropout,
            resnet_eps=norm_eps,
            resnet_act_fn=act_fn,
            resnet_time_scale_shift=resnet_time_scale_shift,
            attention_head_dim=attention_head_dim or channels,
            resnet_groups=norm_num_groups,
            # Left at None, the block would drop this normalization in "scale_shift" mode.
            attn_groups=norm_num_groups,
        )

        self.conv_norm_out = nn.GroupNorm(norm_num_groups, channels, eps=norm_eps)
        self.pool = AttentionPool2D(
            spatial_size=sample_size // 2 ** (len(block_out_channels) - 1),
            channels=channels,
            head_dim=attention_head_dim or channels,
            num_classes=num_classes,
        )

    @classmethod
    def from_unet(
        cls,
        unet: UNet2DModel,
        num_classes: int,
        class_label: int | None = None,
        dropout: float = 0.0,
        in_channels: int = 3,
    ) -> "NoisyImageClassifier":
        """
        A classifier that starts as the downsampling half of a UNet and reads noisy images as the UNet does. New are the
        pooling, the normalization before it and, where the UNet has none, that of the attention in the middle block.

        Channels of `unet` beyond those of x_t (a sketch) are left out, which is the same as their being zero, "no sketch". Its
        class embedding is a constant added to the timestep's.

        Args:
            unet (`UNet2DModel`): unchanged.
            num_classes (`int`): number of classes of the result.
            class_label (`int`, *optional*):
                The class the UNet is told, if it is told one; the index of "no class" for one trained with it.
            dropout (`float`, *optional*, defaults to 0.0): Dropout inside the residual blocks of the result.
            in_channels (`int`, *optional*, defaults to 3): Channels of x_t: 3 for photos, or those of the latents.

        Returns:
            [`NoisyImageClassifier`] in float32, in training mode, on the CPU.

        Raises:
            ValueError: if a classifier cannot have the blocks of `unet`, or `class_label` is not one of its classes, or
                is missing where it has classes.
        """
        config = unet.config
        _check_unet(unet, class_label)
        sides = config.sample_size
        same = "freq_shift flip_sin_to_cos block_out_channels down_block_types layers_per_block downsample_padding"
        same += " downsample_type act_fn attention_head_dim norm_num_groups norm_eps"
        classifier = cls(
            sample_size=sides if isinstance(sides, int) else sides[0],
            in_channels=in_channels,
            num_classes=num_classes,
            time_embedding_dim=unet.time_embedding.linear_2.out_features,
            resnet_time_scale_shift=config.resnet_time_scale_shift,
            dropout=dropout,
            **{name: config[name] for name in same.split()},
        )

        state = classifier.state_dict()
        # Not the output's normalization: the UNet's is that of its last, widest feature map.
        taken = {
            name: value.float().cpu()
            for name, value in unet.state_dict().items()
            if name in state and not name.startswith("conv_norm_out.")
        }
        taken["conv_in.weight"] = taken["conv_in.weight"][:, : classifier.config.in_channels]
        if class_label is not None:
            embedding = unet.class_embedding.weight[class_label].detach().float().cpu()
            taken["time_embedding.linear_2.bias"] = taken["time_embedding.linear_2.bias"] + embedding
        classifier.load_state_dict(state | taken)
        return classifier

    @staticmethod
    def _check_config(
        sample_size: int,
        down_block_types: tuple[str, ...],
        block_out_channels: tuple[int, ...],
        attention_head_dim: int | None,
    ) -> None:
        if len(block_out_channels) != len(down_block_types):
            raise ValueError(
                f"Must provide the same number of `block_out_channels` as `down_block_types`. `block_out_channels`: "
                f"{block_out_channels}. `down_block_types`: {down_block_types}."
            )
        unknown = [block for block in down_block_types if block not in DOWN_BLOCK_TYPES]
        if unknown:
            raise ValueError(f"`down_block_types` must be among {DOWN_BLOCK_TYPES} but has {unknown[0]!r}.")
        factor = 2 ** (len(block_out_channels) - 1)
        if sample_size % factor:
            raise ValueError(f"`sample_size` must be a multiple of {factor} but is {sample_size}.")
        if attention_head_dim is not None and block_out_channels[-1] % attention_head_dim:
            raise ValueError(
                f"`attention_head_dim` must divide the last of `block_out_channels`, {block_out_channels[-1]}, but is "
                f"{attention_head_dim}."
            )

    def forward(
        self, sample: torch.Tensor, timestep: torch.Tensor | float | int, return_dict: bool = True
    ) -> NoisyImageClassifierOutput | tuple[torch.Tensor]:
        r"""
        Args:
            sample (`torch.Tensor` of shape `(batch_size, in_channels, sample_size, sample_size)`):
                Noisy images x_t, scaled as the scheduler's `add_noise` scales them.
            timestep (`torch.Tensor` of shape `(batch_size,)`, or a number): Timesteps t of the training schedule.
            return_dict (`bool`, *optional*, defaults to `True`): Whether to return an output class or a tuple.

        Returns:
            [`NoisyImageClassifierOutput`], or a tuple with the logits of shape `(batch_size, num_classes)`.

        Raises:
            ValueError: if `sample` has another shape than `(batch_size, in_channels, sample_size, sample_size)`.
        """
        expected = tuple(self.config[name] for name in ("in_channels", "sample_size", "sample_size"))
        if tuple(sample.shape[1:]) != expected:
            raise ValueError(f"`sample` must be [batch, {str(expected)[1:-1]}] but has shape {tuple(sample.shape)}.")

        timesteps = torch.as_tensor(timestep, device=sample.device).expand(sample.shape[0])
        # The sinusoids are always float32, but the layers after them may be in half precision.
        emb = self.time_embedding(self.time_proj(timesteps).to(self.dtype))

        sample = self.conv_in(sample)
        for down_block in self.down_blocks:
            sample, _ = down_block(hidden_states=sample, temb=emb)
        sample = self.mid_block(sample, emb)

        logits = self.pool(F.silu(self.conv_norm_out(sample)))
        if not return_dict:
            return (logits,)
        return NoisyImageClassifierOutput(logits=logits)


def _check_unet(unet: UNet2DModel, class_label: int | None) -> None:
    """
    Raises:
        ValueError: as [`~NoisyImageClassifier.from_unet`].
    """
    config = unet.config
    if config.attn_norm_num_groups not in (None, config.norm_num_groups):
        raise ValueError(
            f"`unet` must have the attn_norm_num_groups None or {config.norm_num_groups} but has "
            f"{config.attn_norm_num_groups}."
        )
    for name, supported in (
        ("time_embedding_type", "positional"),
        ("class_embed_type", None),
        ("mid_block_type", "UNetMidBlock2D"),
        ("mid_block_scale_factor", 1),
        ("add_attention", True),
        ("center_input_sample", False),
    ):
        if config[name] != supported:
            raise ValueError(f"`unet` must have the {name} {supported!r} but has {config[name]!r}.")
    if config.num_class_embeds is None:
        if class_label is not None:
            raise ValueError(f"`class_label` must be `None` for a `unet` without classes but is {class_label!r}.")
    elif class_label is None or not 0 <= class_label < config.num_class_embeds:
        raise ValueError(
            f"`class_label` must be in [0, {config.num_class_embeds}), the classes of `unet`, but is {class_label!r}."
        )
    size = config.sample_size
    if not isinstance(size, int) and (size is None or size[0] != size[1]):
        raise ValueError(f"`unet` must have one sample_size for both sides but has {size!r}.")
