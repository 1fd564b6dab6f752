# SPDX-License-Identifier: Apache-2.0
"""Keyed randomness: what is drawn depends on a key, never on what was drawn before."""

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset


Sample = dict[str, Any]
SampleTransform = Callable[[Sample, torch.Generator], Sample]
ORDER_STREAM, SAMPLE_STREAM, LAYER_STREAM = range(3)


def keyed_seed(*key: int) -> int:
    """A well-mixed 63-bit seed for a key of non-negative integers."""
    return int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0] >> np.uint64(1))


def keyed_generator(*key: int) -> torch.Generator:
    """A CPU generator for a key of non-negative integers; the same key always gives the same numbers."""
    return torch.Generator().manual_seed(keyed_seed(*key))


def class_balanced_weights(labels: Sequence[int], power: float) -> np.ndarray:
    """Sampling weights `n_c ** -power` of samples with these class labels, `n_c` being the size of their class.

    Power 0 leaves the frequencies as they are, 1 shows every class equally often.
    """
    counts = np.bincount(np.asarray(labels))
    return counts[np.asarray(labels)] ** -float(power)


def clean_images(sample: Mapping[str, Any]) -> Tensor:
    """Return what is noised and denoised: the `latents` of a sample or batch where it has them, else its `pixel_values`."""
    return sample["latents"] if "latents" in sample else sample["pixel_values"]


def add_noise_and_timestep(sample: Sample, generator: torch.Generator, num_train_timesteps: int) -> Sample:
    """Completes a sample by `noise` ~ N(0, I), shaped as its [`clean_images`], and a uniform `timestep`."""
    noise = torch.randn(clean_images(sample).shape, generator=generator)
    timestep = int(torch.randint(num_train_timesteps, (), generator=generator))
    return sample | {"noise": noise, "timestep": timestep}


class KeyedBatchSampler:
    """Endless batches of `(index, draw)` for one process.

    Draw n belongs to epoch `n // num_samples`. Every epoch is a fresh permutation of the samples or, with
    `sample_weights`, a systematic sample of the same length in which sample i appears `num_samples * w_i / sum(w)`
    times, rounded up or down at random. Successive batches of `batch_size` go to the processes in turn, so that
    P processes see together what one process with P times the batch size sees.

    Args:
        num_samples: size of the dataset.
        batch_size: samples per process and batch.
        seed: keys the order of every epoch.
        start: the first draw, a resumed run goes on where the last one stopped.
        process_index, num_processes: this process among all.
        sample_weights: `[num_samples]`, positive, need not sum to 1.
    """

    def __init__(
        self,
        num_samples: int,
        batch_size: int,
        seed: int,
        start: int = 0,
        process_index: int = 0,
        num_processes: int = 1,
        sample_weights: np.ndarray | None = None,
    ):
        if num_samples < 1:
            raise ValueError("`num_samples` must be at least 1, but the dataset is empty.")
        if sample_weights is not None and len(sample_weights) != num_samples:
            raise ValueError(f"`sample_weights` must have {num_samples} entries, but got {len(sample_weights)}.")
        self.num_samples = num_samples
        self.batch_size = batch_size
        self.seed = seed
        self.first = start + process_index * batch_size
        self.stride = num_processes * batch_size
        self.sample_weights = sample_weights

    def epoch_order(self, epoch: int) -> np.ndarray:
        """Indices of the samples of one epoch, `[num_samples]`."""
        rng = np.random.default_rng(keyed_seed(self.seed, ORDER_STREAM, epoch))
        if self.sample_weights is None:
            return rng.permutation(self.num_samples)
        cumulative = np.cumsum(self.sample_weights) / np.sum(self.sample_weights)
        points = (np.arange(self.num_samples) + rng.random()) / self.num_samples
        indices = np.searchsorted(cumulative, points, side="right").clip(max=self.num_samples - 1)
        return rng.permutation(indices)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        order, order_epoch = np.empty(0, int), -1
        for first in itertools.count(self.first, self.stride):
            batch = []
            for draw in range(first, first + self.batch_size):
                epoch, position = divmod(draw, self.num_samples)
                if epoch != order_epoch:
                    order, order_epoch = self.epoch_order(epoch), epoch
                batch.append((int(order[position]), draw))
            yield batch


class KeyedDataset(Dataset):
    """Maps `(index, draw)` to `dataset.sample(index, draw)`, completed by `transform(sample, generator)`.

    The draw takes the place of the epoch number that keys the augmentation of the dataset, because a sample that is
    drawn twice in one epoch should not look the same twice. The generator is keyed by (seed, draw).
    """

    def __init__(self, dataset: Any, seed: int, transform: SampleTransform | None = None):
        self.dataset = dataset
        self.seed = seed
        self.transform = transform

    def __getitem__(self, key: tuple[int, int]) -> Sample:
        index, draw = key
        sample = self.dataset.sample(index, draw)
        if self.transform is not None:
            sample = self.transform(sample, keyed_generator(self.seed, SAMPLE_STREAM, draw))
        return sample
