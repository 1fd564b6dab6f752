# SPDX-License-Identifier: Apache-2.0
"""The cross-domain constraints of the paper as small callable modules."""

import warnings
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn


def check_pair(name: str, pred: torch.Tensor, value: torch.Tensor, channels: int) -> None:
    """
    [`check_range`] of `pred_{name}` and `name`, which have to have one shape.

    Raises:
        ValueError: naming the argument, and what it was.
    """
    check_range(f"pred_{name}", pred, channels, stacklevel=4)
    check_range(name, value, channels, stacklevel=4)
    if pred.shape != value.shape:
        raise ValueError(
            f"`pred_{name}` and `{name}` have to have one shape but have {tuple(pred.shape)} and {tuple(value.shape)}."
        )


def check_range(name: str, value: torch.Tensor, channels: int, stacklevel: int = 3) -> None:
    """
    Refuse what is not a float batch `[batch_size, channels, height, width]` in [-1, 1], and warn of one that looks like
    [0, 1].

    Raises:
        ValueError: naming the argument, and what it was.
    """
    if not torch.is_tensor(value) or not value.is_floating_point():
        kind = value.dtype if torch.is_tensor(value) else type(value).__name__
        raise ValueError(f"`{name}` has to be a float tensor in [-1, 1] but is {kind}.")
    if value.ndim != 4 or value.shape[1] != channels or value.numel() == 0:
        raise ValueError(
            f"`{name}` has to have shape [batch, {channels}, height, width] but has {tuple(value.shape)}."
        )
    low, high = (float(bound) for bound in value.detach().aminmax())
    if not (low >= -1.001 and high <= 1.001):
        raise ValueError(f"`{name}` has to be in [-1, 1] but is in [{low:.4g}, {high:.4g}]: scale or clamp it first.")
    # Blank paper, all of it near 1, is in [-1, 1]; black at 0 is not.
    if 0.0 <= low < 0.1:
        warnings.warn(
            f"`{name}` has to be in [-1, 1] but looks like [0, 1]: its smallest value is {low:.4g}.",
            stacklevel=stacklevel,
        )


def normalize_features(maps: Sequence[torch.Tensor], eps: float = 1e-10) -> list[torch.Tensor]:
    """
    Return feature maps `[batch_size, channels_l, H_l, W_l]` with each feature vector scaled to unit length, as LPIPS does.

    Args:
        eps: keeps the gradient finite at a zero feature vector, which blank paper has.
    """
    return [x / (x.square().sum(dim=1, keepdim=True) + eps).sqrt() for x in maps]


def feature_distance(
    pred_features: Sequence[torch.Tensor], features: Sequence[torch.Tensor], weights: Sequence[torch.Tensor] = ()
) -> torch.Tensor:
    """
    Return L_p of eq. 5, `[batch_size]`, of two sketches with the unit-length feature maps `pred_features` and `features`.

    Args:
        weights: w_l, `[1, channels_l, 1, 1]` for each l; 1 if empty.
    """
    loss = features[0].new_zeros(len(features[0]))
    for index, (ours, theirs) in enumerate(zip(pred_features, features, strict=True)):
        difference = ours - theirs
        if weights:
            difference = difference * weights[index]
        loss = loss + difference.square().sum(dim=1).mean(dim=(1, 2))
    return loss


class SketchFeatureMaps(nn.Module):
    """
    The feature maps of F_s that eq. 5 compares, finest first: after the stem's convolution, the stem, and each stage.

    Args:
        sketch_encoder (`transformers.ResNetForImageClassification`): F_s, one input channel.
    """

    sketch_encoder: Any

    def __init__(self, sketch_encoder: nn.Module):
        super().__init__()
        self.sketch_encoder = sketch_encoder

    def forward(self, sketch: torch.Tensor) -> list[torch.Tensor]:
        """`[batch_size, channels_l, H_l, W_l]` for each l, of sketches `[batch_size, 1, height, width]` in [-1, 1]."""
        resnet = self.sketch_encoder.resnet
        # The stem's convolution halves the size and its pooling halves it again: without the map in between nothing of
        # a stroke finer than four pixels would be seen.
        fine = resnet.embedder.embedder(sketch)
        stages = resnet.encoder(resnet.embedder.pooler(fine), output_hidden_states=True).hidden_states
        return [fine, *stages]


class LPIPSFeatureMaps(nn.Module):
    """
    The feature maps that LPIPS compares (Zhang et al., 2018), of sketches instead of photos.

    Args:
        lpips (`lpips.LPIPS`): its backbone and its input scaling are used, with the sketch in all three channels.
    """

    lpips: Any

    def __init__(self, lpips: nn.Module):
        super().__init__()
        self.lpips = lpips

    def forward(self, sketch: torch.Tensor) -> list[torch.Tensor]:
        """`[batch_size, channels_l, H_l, W_l]` for each l, of sketches `[batch_size, 1, height, width]` in [-1, 1]."""
        return list(self.lpips.net(self.lpips.scaling_layer(sketch.expand(-1, 3, -1, -1))))


class SketchPerceptualLoss(nn.Module):
    """
    Perceptual distance of two sketches (eq. 5): L_p = Σ_l 1/(H_l W_l) Σ_{h,w} ‖ w_l ⊙ (F̂(ŝ)^l_{hw} - F̂(s)^l_{hw}) ‖².

    F̂^l are the feature maps of `sketch_encoder`, each feature vector scaled to unit length over its channels as LPIPS
    does (Zhang et al., 2018), and w_l are per-channel weights. Unlike a pixel distance it tolerates the spatial
    distortion of free-hand strokes.

    Args:
        sketch_encoder (`transformers.ResNetForImageClassification`): F_s, one input channel; used as it is, frozen or
            not. Its maps are those of [`SketchFeatureMaps`]; any other callable from a sketch to a list of feature maps
            will do, too.
        weights (`list[torch.Tensor]`, *optional*): w_l, one `[channels_l]` tensor per feature map; 1 if not given.
        eps: see [`normalize_features`].
    """

    def __init__(self, sketch_encoder: Any, weights: list[torch.Tensor] | None = None, eps: float = 1e-10):
        super().__init__()
        self.feature_maps = SketchFeatureMaps(sketch_encoder) if hasattr(sketch_encoder, "resnet") else sketch_encoder
        self.eps = eps
        self.num_weights = 0 if weights is None else len(weights)
        for index, weight in enumerate(weights or []):
            self.register_buffer(f"weight_{index}", weight.reshape(1, -1, 1, 1))

    @classmethod
    def from_lpips(
        cls, net: Literal["alex", "vgg", "squeeze"] = "vgg", pretrained_backbone: bool = True
    ) -> "SketchPerceptualLoss":
        """
        L_p on a public network with the weights w_l that LPIPS learned from human judgements: equal to `lpips.LPIPS`.

        Args:
            net: the backbone; its weights are downloaded by torchvision on first use.
            pretrained_backbone: `False` leaves the backbone random, to try things out without a download. The value is
                then no LPIPS.

        Raises:
            ImportError: `lpips` is not installed.
        """
        import lpips

        model = lpips.LPIPS(net=net, pnet_rand=not pretrained_backbone, verbose=False).eval().requires_grad_(False)
        # LPIPS weighs squared differences, eq. 5 squares weighted ones.
        weights = [lin.model[-1].weight.detach().clamp(min=0).sqrt().flatten() for lin in model.lins]
        return cls(LPIPSFeatureMaps(model), weights)

    def features(self, sketch: torch.Tensor) -> list[torch.Tensor]:
        """Unit-length feature maps `[batch_size, channels_l, H_l, W_l]` of a sketch batch, finest first."""
        return normalize_features(self.feature_maps(sketch), self.eps)

    def forward(self, pred_sketch: torch.Tensor, sketch: torch.Tensor) -> torch.Tensor:
        """
        L_p of each pair, `[batch_size]`.

        Args:
            pred_sketch (`torch.Tensor` of shape `[batch_size, 1, height, width]`): ŝ in [-1, 1].
            sketch (`torch.Tensor` of shape `[batch_size, 1, height, width]`): s in [-1, 1].

        Raises:
            ValueError: for another dtype, shape or range.
        """
        check_pair("sketch", pred_sketch, sketch, channels=1)
        return self.distance(self.features(pred_sketch), self.features(sketch))

    def distance(self, pred_features: list[torch.Tensor], features: list[torch.Tensor]) -> torch.Tensor:
        """L_p, `[batch_size]`, of two sketches whose [`~SketchPerceptualLoss.features`] are known."""
        if self.num_weights not in (0, len(features)):
            raise ValueError(f"`weights` has {self.num_weights} entries for {len(features)} feature maps.")
        weights = [getattr(self, f"weight_{index}") for index in range(self.num_weights)]
        return feature_distance(pred_features, features, weights)


def clamp_straight_through(images: torch.Tensor, limit: float = 1.0) -> torch.Tensor:
    """`images` clamped to ± `limit`, with the gradient of the identity: a saturated pixel can still be pulled back."""
    return images + (images.clamp(-limit, limit) - images).detach()


class ImageIdentityLoss(nn.Module):
    """
    Measure how much of a photo's identity is lost (eq. 6): L_i = 1 - cos(F_i(x̂_0), F_i(x_0)).

    The paper prints the cosine and says that its distance is minimized; this is the distance, 0 for equal features and 2
    for opposite ones.

    Args:
        image_encoder (`transformers.ResNetForImageClassification`): F_i, three input channels; its pooled features are
            compared. Used as it is, frozen or not.
        image_mean, image_std (`Sequence[float]`, *optional*): if given, photos are shifted from [-1, 1] to [0, 1] and then
            normalized per channel, as a public ResNet-50 expects: 0.485, 0.456, 0.406 and 0.229, 0.224, 0.225.
        image_size (`int`, *optional*): if given, photos are resized to that side first.
    """

    image_encoder: Any
    image_mean: torch.Tensor | None
    image_std: torch.Tensor | None

    def __init__(
        self,
        image_encoder: nn.Module,
        image_mean: Sequence[float] | None = None,
        image_std: Sequence[float] | None = None,
        image_size: int | None = None,
    ):
        super().__init__()
        if (image_mean is None) != (image_std is None):
            raise ValueError("`image_mean` and `image_std` have to be given together, or neither.")
        self.image_encoder = image_encoder
        self.image_size = image_size
        for name, values in (("image_mean", image_mean), ("image_std", image_std)):
            self.register_buffer(name, None if values is None else torch.tensor(values).reshape(1, -1, 1, 1))

    def features(self, images: torch.Tensor) -> torch.Tensor:
        """Pooled features `[batch_size, dim]` of photos `[batch_size, 3, height, width]` in [-1, 1]."""
        if self.image_mean is not None and self.image_std is not None:
            images = ((images + 1) / 2 - self.image_mean) / self.image_std
        if self.image_size is not None:
            size = (self.image_size, self.image_size)
            images = F.interpolate(images, size=size, mode="bilinear", antialias=True, align_corners=False)
        return self.image_encoder.resnet(images).pooler_output.flatten(1)

    def forward(self, pred_images: torch.Tensor, images: torch.Tensor) -> torch.Tensor:
        """
        L_i of each pair, `[batch_size]`.

        Args:
            pred_images (`torch.Tensor` of shape `[batch_size, 3, height, width]`): x̂_0 in [-1, 1].
            images (`torch.Tensor` of shape `[batch_size, 3, height, width]`): x_0 in [-1, 1].

        Raises:
            ValueError: for another dtype, shape or range.
        """
        check_pair("images", pred_images, images, channels=3)
        return 1 - F.cosine_similarity(self.features(pred_images), self.features(images), dim=1)


class DiffSketchingLosses(NamedTuple):
    """
    The terms of eq. 7, each `[batch_size]`; a term whose weight is 0 is `None` where its networks are missing.

    Attributes:
        loss: L.
        perceptual: L_p(P(x̂_0), s_0).
        identity: L_i(x_0, x̂_0).
    """

    loss: torch.Tensor
    perceptual: torch.Tensor | None
    identity: torch.Tensor | None


class DiffSketchingLoss(nn.Module):
    """
    Compute what fine-tuning minimizes (eq. 7): L = λ L_i(x_0, x̂_0) + (1-λ) L_p(P(x̂_0), s_0).

    Args:
        sketcher ([`PhotoSketcher`], *optional*): P; may be left out, with `perceptual_loss`, if λ is 1.
        perceptual_loss ([`SketchPerceptualLoss`], *optional*): L_p.
        identity_loss ([`ImageIdentityLoss`], *optional*): L_i; may be left out if λ is 0.
        identity_weight (`float`): λ in [0, 1]: 1 keeps the photo, 0 follows the drawing.

    Raises:
        ValueError: λ is outside [0, 1], or a network that it needs is missing.
    """

    def __init__(
        self,
        sketcher: nn.Module | None,
        perceptual_loss: SketchPerceptualLoss | None,
        identity_loss: ImageIdentityLoss | None,
        identity_weight: float = 0.5,
    ):
        super().__init__()
        if not 0.0 <= identity_weight <= 1.0:
            raise ValueError(f"`identity_weight` has to be in [0, 1] but is {identity_weight}.")
        if identity_weight > 0.0 and identity_loss is None:
            raise ValueError(
                f"`identity_weight={identity_weight}` needs an `identity_loss`: give one, or set it to 0."
            )
        if identity_weight < 1.0 and (sketcher is None or perceptual_loss is None):
            raise ValueError(
                f"`identity_weight={identity_weight}` needs a `sketcher` and a `perceptual_loss`: give them, or set it to 1."
            )
        self.sketcher = sketcher
        self.perceptual_loss = perceptual_loss
        self.identity_loss = identity_loss
        self.identity_weight = identity_weight

    def forward(self, pred_images: torch.Tensor, images: torch.Tensor, sketch: torch.Tensor) -> DiffSketchingLosses:
        """
        L and its terms of each row.

        Args:
            pred_images (`torch.Tensor` of shape `[batch_size, 3, height, width]`): x̂_0 as the chain leaves it; what is
                outside [-1, 1] is clamped, straight-through.
            images (`torch.Tensor` of shape `[batch_size, 3, height, width]`): x_0 in [-1, 1].
            sketch (`torch.Tensor` of shape `[batch_size, 1, height, width]`): s_0 in [-1, 1].

        Raises:
            ValueError: for another dtype or shape, a NaN, or photos and sketches outside [-1, 1].
        """
        if torch.is_tensor(pred_images):
            pred_images = clamp_straight_through(pred_images)
        check_range("pred_images", pred_images, channels=3)
        check_range("images", images, channels=3)
        check_range("sketch", sketch, channels=1)
        perceptual = identity = None
        loss = torch.zeros(len(pred_images), device=pred_images.device)
        if self.perceptual_loss is not None and self.sketcher is not None:
            weight = 1 - self.identity_weight
            with _recording(weight != 0):
                perceptual = self.perceptual_loss(self.sketcher(pred_images), sketch)
            loss = loss + weight * perceptual
        if self.identity_loss is not None:
            weight = self.identity_weight
            with _recording(weight != 0):
                identity = self.identity_loss(pred_images, images)
            loss = loss + weight * identity
        return DiffSketchingLosses(loss, perceptual, identity)


def _recording(wanted: bool) -> Any:
    """Gradients are recorded inside if they are outside and it is wanted: a term without weight needs no memory."""
    return torch.set_grad_enabled(torch.is_grad_enabled() and wanted)
