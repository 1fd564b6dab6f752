# SPDX-License-Identifier: Apache-2.0
import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from diffsketching_pipeline.training.optimizers import Muon, orthogonalized, split_parameters


def small_network():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 12, 3), nn.GroupNorm(2, 12), nn.Conv2d(12, 3, 3)
    )


@pytest.mark.parametrize("shape", [(12, 40), (40, 12)])
def test_orthogonalized_keeps_the_directions_and_evens_out_the_singular_values(shape):
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    left, _, right = torch.linalg.svd(matrix, full_matrices=False)
    result = left.T @ orthogonalized(matrix) @ right.T
    values = result.diag()
    assert values.min() > 0.6 and values.max() < 1.3
    assert (result - values.diag()).abs().max() < 1e-4


@pytest.mark.parametrize("shape", [(12, 108), (40, 12)])
def test_orthogonalized_is_the_newton_schulz_iteration(shape):
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    expected = matrix.double() / matrix.double().norm()
    for _ in range(5):
        gram = expected @ expected.T
        expected = 3.4445 * expected + (-4.7750 * gram + 2.0315 * gram @ gram) @ expected
    torch.testing.assert_close(orthogonalized(matrix).double(), expected, atol=1e-4, rtol=0)


def test_hidden_kernels_are_matrices_and_all_else_is_not():
    network = small_network()
    network[0].weight.requires_grad_(False)
    matrices, others = split_parameters(network)
    assert [id(p) for p in matrices] == [id(network[2].weight)]
    # Biases, the norm's two, and the kernel of the layer that makes three channels.
    assert len(others) == 6 and any(p is network[4].weight for p in others)


def test_a_kernel_moves_by_the_orthogonalized_momentum_at_adamws_size():
    network = small_network()
    before = network[2].weight.detach().clone()
    optimizer = Muon(network, lr=0.01, momentum=0.9)
    gradient = torch.randn(before.shape, generator=torch.Generator().manual_seed(1))
    network[2].weight.grad = gradient.clone()
    optimizer.step()
    # First step: momentum is 0.1 g, and Nesterov's look ahead 0.1 g + 0.9 * 0.1 g points along g.
    expected = before - 0.01 * 0.2 * 144**0.5 * orthogonalized(gradient.flatten(1)).reshape(before.shape)
    torch.testing.assert_close(network[2].weight.detach(), expected)
    root_mean_square = (network[2].weight.detach() - before).square().mean().sqrt() / 0.01
    assert float(root_mean_square) == pytest.approx(0.2, rel=0.2)


def test_the_other_parameters_move_as_with_adamw():
    ours, theirs = small_network(), small_network()
    optimizer = Muon(ours, lr=0.01, betas=(0.8, 0.95), weight_decay=0.1)
    others = [p for p in theirs.parameters() if p is not theirs[0].weight and p is not theirs[2].weight]
    reference = torch.optim.AdamW(others, lr=0.01, betas=(0.8, 0.95), weight_decay=0.1)
    x = torch.randn(2, 3, 12, 12, generator=torch.Generator().manual_seed(2))
    for _ in range(3):
        # The same gradients for both, whatever their hidden kernels have become.
        theirs[0].weight.data.copy_(ours[0].weight.data)
        theirs[2].weight.data.copy_(ours[2].weight.data)
        for network, step in ((theirs, reference), (ours, optimizer)):
            network.zero_grad()
            F.mse_loss(network(x), torch.ones(2, 3, 6, 6)).backward()
            step.step()
    for i, name in ((0, "bias"), (3, "weight"), (3, "bias"), (4, "weight"), (4, "bias")):
        torch.testing.assert_close(getattr(ours[i], name), getattr(theirs[i], name))


def test_a_restored_state_goes_on_to_the_bit():
    def run(network, optimizer, seeds):
        for seed in seeds:
            x = torch.randn(2, 3, 12, 12, generator=torch.Generator().manual_seed(seed))
            optimizer.zero_grad()
            network(x).square().mean().backward()
            optimizer.step()

    straight = small_network()
    run(straight, Muon(straight, lr=0.01), range(4))
    first = small_network()
    stopped = Muon(first, lr=0.01)
    run(first, stopped, range(2))
    resumed = copy.deepcopy(first)
    optimizer = Muon(resumed, lr=0.5)
    optimizer.load_state_dict(stopped.state_dict())
    run(resumed, optimizer, range(2, 4))
    for ours, theirs in zip(resumed.parameters(), straight.parameters(), strict=True):
        assert torch.equal(ours, theirs)
