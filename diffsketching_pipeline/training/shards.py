# SPDX-License-Identifier: Apache-2.0
"""Pairs of photo and drawing in webdataset shards, read as they arrive, for sets that do not fit a disk.

A shard is a tar file. The files of a pair stand next to each other and share their name up to the first dot:

    dog/17.jpg, dog/17.sketch.png            a photo and its drawing
    dog/17.sketch-1.png, dog/17.sketch-2.png  several drawings of it
    dog/17.cls                                optional: the class, by name or by index

Every data worker of every process is a reader of its own: in each epoch the shards are shuffled and dealt out to the
readers, and a reader shuffles the pairs within a shard. Where it is, is three numbers (epoch, shard, pair), which travel
with the batches into the checkpoint; a resumed run opens the shard it was in, skips to the pair, and goes on.
"""

import hashlib
import itertools
import json
import logging
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from torch.utils.data import IterableDataset, default_collate, get_worker_info

from diffsketching_pipeline.images.photo_files import IMAGE_ERRORS, IMAGE_SUFFIXES
from diffsketching_pipeline.splits import in_validation, normalize_name
from diffsketching_pipeline.training.keyed import Sample, keyed_seed
from diffsketching_pipeline.training.pairs import PhotoSketchPair


logger = logging.getLogger(__name__)

SHARD_STREAM = 3
"""Keys the order of shards and pairs apart from everything else that is drawn from the seed."""

UNREADABLE = "shards break off or cannot be opened"


class Position(NamedTuple):
    """A reader's position: its epoch, how many of its shards of that epoch are behind it, and how many pairs of the next."""

    epoch: int = 0
    shard: int = 0
    pair: int = 0


class StreamedBatch(NamedTuple):
    """A batch, the data worker whose turn it was, and where that worker's reader is after it."""

    batch: dict[str, Any]
    worker: int
    position: Position


def list_shards(pattern: str) -> list[str]:
    """
    The shards of a pattern like `pairs-{000000..000099}.tar`, a path or whatever else webdataset opens.

    Raises:
        ValueError: there is no such file.
    """
    from webdataset.shardlists import expand_urls

    shards = expand_urls(pattern)
    missing = [shard for shard in shards if ":" not in shard and not Path(shard).is_file()]
    if missing or not shards:
        raise ValueError(
            f"`train_shards` names {len(missing)} file(s) of {len(shards)} that do not exist, the first one "
            f"{missing[0] if missing else pattern!r}. A range is written as `pairs-{{000000..000099}}.tar`."
        )
    return shards


def _class_of(content: bytes | None, class_names: Sequence[str]) -> str | None:
    if content is None:
        return None
    text = content.decode("utf-8", "replace").strip()
    text = normalize_name(text)
    if text in class_names or not text.isdecimal() or int(text) >= len(class_names):
        return text
    return class_names[int(text)]


def _holding(content: bytes) -> Callable[[], bytes]:
    return lambda: content


def read_shard(shard: str, class_names: Sequence[str], problems: dict[str, list[str]]) -> Iterator[PhotoSketchPair]:
    """
    The pairs of one shard in its order.

    Args:
        shard: what webdataset opens.
        class_names: the classes that `.cls` files count through.
        problems: gets the names of what is left out, by reason. A tar file that breaks off ends the shard.
    """
    import webdataset as wds

    def broken(error: Exception) -> bool:
        logger.debug("%s: %s", shard, error)
        is_double = isinstance(error, ValueError) and "duplicate file name" in str(error)
        problems.setdefault("pairs have a file twice" if is_double else UNREADABLE, []).append(f"{shard} ({error})")
        return is_double  # anything else is the tar file's end

    names: set[str] = set()
    # macOS puts a `._` file with what it knows of it beside each file.
    read = wds.tarfile_to_samples(broken, lambda name: not name.split("/")[-1].startswith("."), normalize_name)
    for files in wds.DataPipeline(wds.SimpleShardList([shard]), read):
        name = files["__key__"]
        drawings = sorted(key for key in files if key.split(".")[0].split("-")[0] == "sketch")
        photos = [key for key in files if f".{key}" in IMAGE_SUFFIXES]
        reason = None
        if len(photos) != 1:
            reason = "pairs have no photo or several"
        elif not drawings:
            reason = "photos have no drawing"
        elif name in names:
            reason = "pairs share their name with another"
        if reason is not None:
            problems.setdefault(reason, []).append(name)
            continue
        names.add(name)
        label = _class_of(files.get("cls"), class_names)
        sketches = tuple(_holding(files[drawing]) for drawing in drawings)
        yield PhotoSketchPair(name, label, _holding(files[photos[0]]), sketches)


def summary(problems: dict[str, list[str]], shown: int = 10) -> str:
    """Summarize in one line what was left out and why."""
    most_first = sorted(problems.items(), key=lambda item: -len(item[1]))
    return "; ".join(f"{len(names)} {reason}: {', '.join(names[:shown])}" for reason, names in most_first)


def validation_pairs(
    shards: Sequence[str], class_names: Sequence[str], count: int, needs_class: bool = False
) -> list[PhotoSketchPair]:
    """
    The first `count` pairs that validate (8 of 100, by the hash of their names), read from the first shards.

    Args:
        shards, class_names: see [`read_shard`]; pairs of other classes are left out.
        count: how many at most.
        needs_class: leave out pairs without a class, too.

    Raises:
        ValueError: there is none.
    """
    problems: dict[str, list[str]] = {}
    usable = set(class_names) if needs_class else {*class_names, None}
    pairs = itertools.chain.from_iterable(read_shard(shard, class_names, problems) for shard in shards)
    validating = (pair for pair in pairs if in_validation(pair.stem) and pair.label in usable)
    chosen = list(itertools.islice(validating, count))
    if not chosen:
        raise ValueError(
            f"`train_shards` has no pair to validate with in {len(shards)} shard(s): of 100 pairs 8 are kept back by the "
            f"hash of their names. Left out: {summary(problems) or 'none'}."
        )
    return chosen


class ShardStream(IterableDataset):
    """
    Batches of one process, without end; see the head of this file.

    Args:
        shards: all shards, the same list in every process.
        class_names: see [`read_shard`].
        make_sample:
            `(pair, rng) -> sample`; a pair for which it raises what a damaged image does (`IMAGE_ERRORS`) is left out.
        batch_size: samples per batch.
        seed: keys all that is random.
        process_index, num_processes: this process among all.
        num_workers: data workers of this process; 0 reads in the process itself.
        state: of the run to go on with, see [`ShardStream.next_state`].
        shuffle_buffer: pairs of a shard that are held in memory and shuffled together.

    Raises:
        ValueError: there are fewer shards than readers, or `state` is that of a run with other readers, shards or another
            seed or buffer.
    """

    def __init__(
        self,
        shards: Sequence[str],
        class_names: Sequence[str],
        make_sample: Callable[[PhotoSketchPair, np.random.Generator], Sample],
        batch_size: int,
        seed: int,
        process_index: int = 0,
        num_processes: int = 1,
        num_workers: int = 0,
        state: dict[str, Any] | None = None,
        shuffle_buffer: int = 256,
    ):
        self.shards, self.class_names, self.make_sample = list(shards), list(class_names), make_sample
        self.batch_size, self.seed, self.shuffle_buffer = batch_size, seed, shuffle_buffer
        self.process_index, self.num_processes = process_index, num_processes
        self.num_workers = max(num_workers, 1)
        num_readers = num_processes * self.num_workers
        if len(self.shards) < num_readers:
            raise ValueError(
                f"`train_shards` has {len(self.shards)} shard(s), but {num_processes} process(es) with "
                f"`dataloader_num_workers` {num_workers} need {num_readers}, one for each reader: lower it, or write "
                "smaller shards."
            )
        # By name: a folder may have moved.
        settings = json.dumps([[shard.rsplit("/", 1)[-1] for shard in self.shards], seed, shuffle_buffer])
        self.order = hashlib.sha256(settings.encode()).hexdigest()[:16]
        self.positions, self.turn = [Position()] * self.num_workers, 0
        if state is not None:
            if (state["num_processes"], len(state["positions"])) != (num_processes, self.num_workers):
                raise ValueError(
                    f"the checkpoint was read by {state['num_processes']} process(es) with {len(state['positions'])} "
                    f"data worker(s) each, which know where they were; now there are {num_processes} with "
                    f"{self.num_workers}: start as many, or a new `output_dir`."
                )
            if state["order"] != self.order:
                raise ValueError(
                    "the checkpoint is in the middle of shards that were read in another order: `train_shards`, `seed` "
                    "and `shuffle_buffer` have to be those of the run that wrote it."
                )
            self.positions = [Position(*position) for position in state["positions"]]
            self.turn = state["turn"]

    def next_state(self, batch: StreamedBatch) -> dict[str, Any]:
        """Return what is to be saved after `batch` was trained on; plain lists and numbers."""
        self.positions[batch.worker] = batch.position
        self.turn = (batch.worker + 1) % self.num_workers
        return {
            "num_processes": self.num_processes,
            "order": self.order,
            "turn": self.turn,
            "positions": [list(position) for position in self.positions],
        }

    def __iter__(self) -> Iterator[StreamedBatch]:
        info = get_worker_info()
        # Batches are taken from the workers in turn, from the first one on, so a resumed run renames them.
        worker = ((info.id if info is not None else 0) + self.turn) % self.num_workers
        batch: list[Sample] = []
        for sample, position in self._samples(worker):
            batch.append(sample)
            if len(batch) == self.batch_size:
                yield StreamedBatch(default_collate(batch), worker, position)
                batch = []

    def _samples(self, worker: int) -> Iterator[tuple[Sample, Position]]:
        """Samples of one reader from its position on, each with the position after it."""
        reader, num_readers = self.process_index * self.num_workers + worker, self.num_processes * self.num_workers
        start, empty = self.positions[worker], 0
        for epoch in itertools.count(start.epoch):
            rng = np.random.default_rng(keyed_seed(self.seed, SHARD_STREAM, epoch))
            mine = rng.permutation(len(self.shards))[reader::num_readers]
            for number in range(start.shard, len(mine)):
                problems: dict[str, list[str]] = {}
                count = start.pair
                pairs = self._shuffled(int(mine[number]), epoch, problems)
                for k, pair in enumerate(itertools.islice(pairs, start.pair, None), start.pair):
                    sample = self._make(pair, epoch, problems)
                    if sample is not None:
                        count += 1
                        yield sample, Position(epoch, number, k + 1)
                start = Position(epoch, number + 1)
                # Once is enough, but not of what was there before and is not now.
                if problems and (epoch == 0 or UNREADABLE in problems):
                    logger.warning("%s: left out %s", self.shards[mine[number]], summary(problems))
                empty = 0 if count else empty + 1
                if empty > 2 * len(self.shards):  # any reader gets other shards in other epochs
                    raise ValueError(
                        f"`train_shards`: the last {empty} shards that were read have no pair to train on; of the last one "
                        f"was left out: {summary(problems) or 'nothing'}."
                    )
            start = Position(epoch + 1)

    def _shuffled(self, shard: int, epoch: int, problems: dict[str, list[str]]) -> Iterator[PhotoSketchPair]:
        """The pairs of a shard that do not validate, shuffled `shuffle_buffer` at a time."""
        rng = np.random.default_rng(keyed_seed(self.seed, SHARD_STREAM, epoch, shard))
        pairs = (
            pair for pair in read_shard(self.shards[shard], self.class_names, problems) if not in_validation(pair.stem)
        )
        while held := list(itertools.islice(pairs, self.shuffle_buffer)):
            for i in rng.permutation(len(held)):
                yield held[i]

    def _make(self, pair: PhotoSketchPair, epoch: int, problems: dict[str, list[str]]) -> Sample | None:
        # Keyed by the name and not by the place in the shard, which another shuffle would change.
        key = int.from_bytes(hashlib.sha256(pair.stem.encode()).digest()[:8], "big")
        try:
            return self.make_sample(pair, np.random.default_rng([self.seed, epoch, key]))
        except IMAGE_ERRORS as error:
            problems.setdefault("pairs cannot be used", []).append(f"{pair.stem} ({error})")
            return None
