# SPDX-License-Identifier: Apache-2.0
"""The place of each parameter of openai/guided-diffusion's networks in our models."""

import re
from collections.abc import Mapping
from typing import Any

import torch

from diffsketching_pipeline.converters.guided_diffusion_flags import Architecture


# (kind, prefix of the names in the file, prefix of the names in our model); the kinds are those of `_RENAMES`.
Layout = list[tuple[str, str, str]]


def encoder_layout(architecture: Architecture) -> Layout:
    layout = [
        ("same", "time_embed.0", "time_embedding.linear_1"),
        ("same", "time_embed.2", "time_embedding.linear_2"),
        ("same", "input_blocks.0.0", "conv_in"),
    ]
    index = 0
    last_level = len(architecture.block_out_channels) - 1
    for level, has_attention in enumerate(architecture.attention_levels):
        for layer in range(architecture.layers_per_block):
            index += 1
            layout.append(("resnet", f"input_blocks.{index}.0", f"down_blocks.{level}.resnets.{layer}"))
            if has_attention:
                layout.append(("attention", f"input_blocks.{index}.1", f"down_blocks.{level}.attentions.{layer}"))
        if level < last_level:
            index += 1
            target = f"down_blocks.{level}.downsamplers.0"
            if architecture.resblock_updown:
                layout.append(("resnet", f"input_blocks.{index}.0", target))
            else:
                layout.append(("same", f"input_blocks.{index}.0.op", f"{target}.conv"))
    return layout + [
        ("resnet", "middle_block.0", "mid_block.resnets.0"),
        ("attention", "middle_block.1", "mid_block.attentions.0"),
        ("resnet", "middle_block.2", "mid_block.resnets.1"),
        ("same", "out.0", "conv_norm_out"),
    ]


def decoder_layout(architecture: Architecture) -> Layout:
    layout = []
    index = 0
    last_block = len(architecture.block_out_channels) - 1
    for block, has_attention in enumerate(reversed(architecture.attention_levels)):
        for layer in range(architecture.layers_per_block + 1):
            source = f"output_blocks.{index}"
            layout.append(("resnet", f"{source}.0", f"up_blocks.{block}.resnets.{layer}"))
            if has_attention:
                layout.append(("attention", f"{source}.1", f"up_blocks.{block}.attentions.{layer}"))
            if block < last_block and layer == architecture.layers_per_block:
                upsampler, target = f"{source}.{2 if has_attention else 1}", f"up_blocks.{block}.upsamplers.0"
                if architecture.resblock_updown:
                    layout.append(("resnet", upsampler, target))
                else:
                    layout.append(("same", f"{upsampler}.conv", f"{target}.conv"))
            index += 1
    return layout


_RENAMES: dict[str, dict[str, tuple[str, ...]]] = {
    "same": {"": ("",)},
    "resnet": {
        ".in_layers.0": (".norm1",),
        ".in_layers.2": (".conv1",),
        ".emb_layers.1": (".time_emb_proj",),
        ".out_layers.0": (".norm2",),
        ".out_layers.3": (".conv2",),
        ".skip_connection": (".conv_shortcut",),
    },
    "attention": {
        ".norm": (".group_norm",),
        ".qkv": (".to_q", ".to_k", ".to_v"),
        ".proj_out": (".to_out.0",),
    },
    "pool": {
        ".positional_embedding": (".positional_embedding",),
        ".qkv_proj": (".to_q", ".to_k", ".to_v"),
        ".c_proj": (".to_out",),
    },
}


def _renamed(layout: Layout, expected: Mapping[str, torch.Tensor]) -> dict[str, tuple[str, ...]]:
    """Parameter in the file -> the parameters of our model (three for a fused QKV) that `expected` has of it."""
    return {
        f"{source}{old}{parameter}": tuple(f"{target}{new}{parameter}" for new in news)
        for kind, source, target in layout
        for old, news in _RENAMES[kind].items()
        for parameter in (".weight", ".bias", "")
        if f"{target}{news[0]}{parameter}" in expected
    }


def load_converted(
    model: Any, state_dict: Mapping[str, torch.Tensor], layout: Layout, architecture: Architecture, owner: str
) -> Any:
    """Fills `model`, which is on the meta device, with every tensor of `state_dict`; strict in both directions."""
    expected = model.state_dict()
    renamed = _renamed(layout, expected)
    _check_fit(state_dict, renamed, expected, owner)
    converted: dict[str, torch.Tensor] = {}
    for source, targets in renamed.items():
        tensor = state_dict[source].to(torch.float32)
        if source.endswith("positional_embedding"):
            tensor = tensor.T
        parts: tuple[torch.Tensor, ...] = (tensor,)
        if len(targets) == 3:
            # guided-diffusion's pooling has the new order whatever the attention layers have.
            new_order = architecture.new_attention_order or source.startswith("out.")
            width = tensor.shape[0] // 3
            parts = _split_qkv(tensor, width // (architecture.attention_head_dim or width), new_order)
        for target, part in zip(targets, parts, strict=True):
            converted[target] = part.reshape(expected[target].shape).clone(memory_format=torch.contiguous_format)
    model.load_state_dict(converted, strict=True, assign=True)
    return model.eval()


def _split_qkv(tensor: torch.Tensor, heads: int, new_order: bool) -> tuple[torch.Tensor, ...]:
    """Rows of a fused projection, ordered (qkv, head, dim) if `new_order` else (head, qkv, dim) -> Q, K and V."""
    if new_order:
        return tensor.chunk(3)
    return tuple(part.flatten(0, 1) for part in tensor.unflatten(0, (heads, 3, -1)).unbind(1))


def _source_shape(source: str, targets: tuple[str, ...], expected: Mapping[str, torch.Tensor]) -> tuple[int, ...]:
    """The shape that a parameter has in a guided-diffusion file."""
    rows, *rest = expected[targets[0]].shape
    if source.endswith("positional_embedding"):
        return (*rest, rows)
    # Projections that are linear layers here are 1x1 convolutions over a sequence there.
    is_convolution = source.rpartition(".")[0].endswith(("qkv", "proj_out", "qkv_proj", "c_proj"))
    return (rows * len(targets), *rest, *([1] if is_convolution and rest else []))


def _check_fit(
    state_dict: Mapping[str, torch.Tensor],
    renamed: Mapping[str, tuple[str, ...]],
    expected: Mapping[str, torch.Tensor],
    owner: str,
) -> None:
    misfits = {source: f"also has `{source}`" for source in state_dict if source not in renamed}
    for source, targets in renamed.items():
        shape = _source_shape(source, targets, expected)
        if source not in state_dict:
            misfits[source] = f"has no `{source}`"
        elif tuple(state_dict[source].shape) != shape:
            misfits[source] = f"has `{source}` of shape {tuple(state_dict[source].shape)}, where {shape} is expected"
    if misfits:
        source, flag = _likely_cause(misfits, state_dict, renamed, owner)
        others = f", among {len(misfits)} differences" if len(misfits) > 1 else ""
        raise ValueError(
            f"The flags do not fit the {owner} checkpoint, which {misfits[source]}{others}; check {flag} first."
        )


def _likely_cause(
    misfits: Mapping[str, str], state_dict: Mapping[str, torch.Tensor], renamed: Mapping[str, Any], owner: str
) -> tuple[str, str]:
    """The difference that explains the most others, and the flag that decides it."""
    prefix, width, depth, head = "", "num_channels", "num_res_blocks", "learn_sigma"
    if owner == "classifier":
        prefix, width, depth, head = "classifier_", "classifier_width", "classifier_depth", "classifier_pool"
    causes = []
    if any(name.startswith("output_blocks.") for name in state_dict) != (owner == "UNet"):
        causes.append(("output_blocks", f"that this is the {owner} file"))
    causes += [("time_embed", f"`{width}`"), ("label_emb", "`class_cond`")]
    in_file, wanted = (
        {name.split(".")[1] for name in names if name.startswith("input_blocks.")} for names in (state_dict, renamed)
    )
    if in_file != wanted:
        causes.append(("input_blocks", f"`{depth}` and `{prefix}channel_mult`"))
    causes += [
        (r"\.op\.", f"`{prefix}resblock_updown`"),
        (r"input_blocks\.\d+\.0\.in_layers", f"`{prefix}channel_mult`"),
        (r"\.qkv\.", f"`{prefix}attention_resolutions`"),
        (r"\.emb_layers\.", f"`{prefix}use_scale_shift_norm`"),
        (r"positional_embedding", "`image_size`"),
        (r"^out\.", f"`{head}`"),
    ]
    for pattern, flag in causes:
        for source in misfits:
            if re.search(pattern, source):
                return source, flag
    return next(iter(misfits)), "that they belong to this file"
