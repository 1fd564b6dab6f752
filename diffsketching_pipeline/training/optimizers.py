# SPDX-License-Identifier: Apache-2.0
"""Optimizers that torch does not have for convolutional networks."""

from typing import Any

import torch
from torch import Tensor, nn


SMALLEST_MATRIX_SIDE = 8
"""Weights with fewer rows or columns, of a layer that makes the three channels of a photo say, are no hidden matrices."""


def orthogonalized(matrix: Tensor, steps: int = 5) -> Tensor:
    """
    About the orthogonal matrix nearest to `matrix` `[rows, columns]`: its singular values brought to around 1 by the quintic
    Newton-Schulz iteration of Jordan et al., "Muon" (2024).
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    x = matrix / (matrix.norm() + 1e-7)
    is_tall = x.shape[0] > x.shape[1]
    x = x.T if is_tall else x
    if x.shape[1] < 1.5 * x.shape[0]:
        for _ in range(steps):
            gram = x @ x.T
            x = a * x + (b * gram + c * gram @ gram) @ x
        return x.T if is_tall else x
    # Each iteration multiplies x by a polynomial of its Gram matrix, so they all commute: the product is built from small
    # square matrices, and the long side, nine times as long for a kernel of 3 x 3, is passed over twice instead of ten times.
    gram = x @ x.T
    product = identity = torch.eye(len(gram), dtype=x.dtype, device=x.device)
    for _ in range(steps):
        polynomial = a * identity + b * gram + c * gram @ gram
        product = polynomial @ product
        gram = polynomial @ gram @ polynomial
    x = product @ x
    return x.T if is_tall else x


class Muon(torch.optim.Optimizer):
    """
    Muon for the hidden matrices of a network, kernels of convolutions flattened to matrices, and AdamW for all else.

    A matrix moves along its orthogonalized Nesterov momentum, scaled to the root mean square of AdamW's steps (0.2, Liu et
    al., "Muon is Scalable for LLM Training", 2025), so that one learning rate serves both.

    Args:
        module: the network; its parameters that need gradients are trained.
        lr: the learning rate.
        momentum: decay of Muon's momentum.
        betas, eps: AdamW's, for embeddings, biases, norms and small layers.
        weight_decay: decoupled weight decay of all.
    """

    def __init__(
        self,
        module: nn.Module,
        lr: float = 1e-3,
        momentum: float = 0.95,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ):
        matrices, others = split_parameters(module)
        groups: list[dict[str, Any]] = [
            {"params": matrices, "is_matrix": True},
            {"params": others, "is_matrix": False},
        ]
        defaults = {"lr": lr, "momentum": momentum, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__([group for group in groups if group["params"]], defaults)

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """Moves every parameter that has a gradient."""
        loss = None if closure is None else torch.enable_grad()(closure)()
        for group in self.param_groups:
            compute_update = self._muon_update if group["is_matrix"] else self._adamw_update
            for parameter in group["params"]:
                if parameter.grad is not None:
                    parameter.mul_(1 - group["lr"] * group["weight_decay"])
                    parameter.sub_(group["lr"] * compute_update(parameter, parameter.grad, group))
        return loss

    def _muon_update(self, parameter: nn.Parameter, gradient: Tensor, group: dict[str, Any]) -> Tensor:
        momentum = self.state[parameter].setdefault("momentum_buffer", torch.zeros_like(parameter))
        momentum.lerp_(gradient, 1 - group["momentum"])
        matrix = torch.lerp(gradient, momentum, group["momentum"]).flatten(1)
        update = orthogonalized(matrix) * (0.2 * max(matrix.shape) ** 0.5)
        return update.reshape(parameter.shape)

    def _adamw_update(self, parameter: nn.Parameter, gradient: Tensor, group: dict[str, Any]) -> Tensor:
        state = self.state[parameter]
        if not state:
            state["step"] = torch.zeros(())
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(parameter), torch.zeros_like(parameter)
        state["step"] += 1
        beta1, beta2 = group["betas"]
        state["exp_avg"].lerp_(gradient, 1 - beta1)
        state["exp_avg_sq"].mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
        step = float(state["step"])
        denominator = (state["exp_avg_sq"] / (1 - beta2**step)).sqrt_().add_(group["eps"])
        return state["exp_avg"] / (1 - beta1**step) / denominator


def split_parameters(module: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """The hidden matrices of a network, which Muon is for, and its other parameters; those without gradients left out."""
    weights = {id(m.weight) for m in module.modules() if isinstance(m, (nn.Linear, nn.Conv2d))}
    matrices: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    for parameter in module.parameters():
        if not parameter.requires_grad:
            continue
        is_matrix = id(parameter) in weights and min(parameter.flatten(1).shape) >= SMALLEST_MATRIX_SIDE
        (matrices if is_matrix else others).append(parameter)
    return matrices, others
