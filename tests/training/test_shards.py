# SPDX-License-Identifier: Apache-2.0
import io
import itertools
import json
import logging
import tarfile
from collections import Counter

import numpy as np
import pytest
import torch
from finetune_diffsketching import check_finetune_arguments, main
from PIL import Image, ImageDraw
from safetensors.torch import load_file
from test_finetune_diffsketching import TINY, pretrained_dir, tiny_args  # noqa: F401 (a fixture)
from torch.utils.data import DataLoader

from diffsketching_pipeline.splits import in_validation
from diffsketching_pipeline.training.chain import FinetuneArguments
from diffsketching_pipeline.training.chain_data import ShardedChainData
from diffsketching_pipeline.training.shards import UNREADABLE, ShardStream, list_shards, read_shard, validation_pairs


NAMES = ["disc", "square"]


def png(seed, mode="RGB"):
    rng = np.random.default_rng(seed)
    picture = Image.new(mode, (24, 24), "white")
    left = int(rng.integers(2, 8))
    ImageDraw.Draw(picture).rectangle((left, left, 20, 20), outline="black", fill=None if mode == "L" else "red")
    content = io.BytesIO()
    picture.save(content, "PNG")
    return content.getvalue()


def write_tar(path, files):
    with tarfile.open(path, "w") as tar:
        for name, content in files:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return str(path)


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    """Five shards of 12, 10, 8, 6 and 4 pairs, `p000` to `p039`; the class is in the name."""
    folder, numbers = tmp_path_factory.mktemp("shards"), iter(range(40))
    for i, count in enumerate((12, 10, 8, 6, 4)):
        files = []
        for number in itertools.islice(numbers, count):
            name = f"p{number:03d}"
            files += [(f"{name}.png", png(number)), (f"{name}.sketch.png", png(number, "L"))]
            files.append((f"{name}.cls", NAMES[number % 2].encode() if number % 3 else str(number % 2).encode()))
        write_tar(folder / f"pairs-{i:03d}.tar", files)
    return str(folder / "pairs-{000..004}.tar")


# ---- one shard ------------------------------------------------------------------------------------------------------


def test_pairs_of_a_shard(tmp_path):
    a, b = png(1), png(2)
    files = [("dog/1.png", a), ("dog/1.sketch-2.png", b), ("dog/1.sketch-1.png", a), ("dog/1.cls", b"dog\n")]
    files += [("dog/2.jpg", b), ("dog/2.sketch.png", b), ("3.webp", a), ("3.sketch.png", a), ("3.cls", b"1")]
    files += [("4.png", a), ("5.sketch.png", a), ("6.png", a), ("6.jpg", a), ("6.sketch.png", a)]
    files += [("dog/1.png", b), ("dog/1.sketch.png", b), ("7.png", a), ("7.sketch.png", b)]
    problems = {}
    pairs = list(read_shard(write_tar(tmp_path / "a.tar", files), ["cat", "dog"], problems))
    assert [(pair.stem, pair.label) for pair in pairs] == [
        ("dog/1", "dog"),
        ("dog/2", None),
        ("3", "dog"),
        ("7", None),
    ]
    assert [pair.photo() for pair in pairs] == [a, b, a, a]
    assert [[read() for read in pair.sketches] for pair in pairs] == [[a, b], [b], [a], [b]]
    assert problems == {
        "photos have no drawing": ["4"],
        "pairs have no photo or several": ["5", "6"],
        "pairs share their name with another": ["dog/1"],
    }


def test_what_a_mac_puts_into_a_tar_is_no_pair(tmp_path):
    names = (
        "dog/._17.png",
        "dog/17.png",
        "dog/._17.sketch.png",
        "dog/17.sketch.png",
        "__MACOSX/dog/._17.png",
        "dog/.DS_Store",
    )
    files = [(name, b"\0\5\26\7" if "/." in name else png(1)) for name in names]
    files += [("cafe\u0301.png", png(2)), ("caf\u00e9.sketch.png", png(3)), ("cafe\u0301.cls", "cafe\u0301".encode())]
    problems = {}
    pairs = list(read_shard(write_tar(tmp_path / "mac.tar", files), ["caf\u00e9"], problems))
    assert [(pair.stem, pair.label) for pair in pairs] == [
        ("dog/17", None),
        ("caf\u00e9", "caf\u00e9"),
    ] and not problems


def test_a_shard_that_breaks_off_ends_there(tmp_path):
    files = [(f"{i}.{kind}", png(i) * 30) for i in range(4) for kind in ("png", "sketch.png")]
    path = tmp_path / "a.tar"
    write_tar(path, files)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    problems = {}
    pairs = list(read_shard(str(path), [], problems))
    assert 1 <= len(pairs) < 4 and [pair.stem for pair in pairs] == [str(i) for i in range(len(pairs))]
    assert list(problems) == [UNREADABLE] and problems[UNREADABLE][0].startswith(str(path))


def test_classes_by_name_and_by_index(tmp_path):
    files = [(f"{i}.{kind}", png(i)) for i in range(3) for kind in ("png", "sketch.png")]
    files += [("0.cls", b"10"), ("1.cls", b"1"), ("2.cls", "\u00b2".encode())]
    path = write_tar(tmp_path / "a.tar", sorted(files))
    # Names that are numbers, as folders of ImageNet's indices are, and that another order than theirs.
    labels = [pair.label for pair in read_shard(path, ["1", "10", "2"], {})]
    assert labels == ["10", "1", "\u00b2"]
    assert next(read_shard(path, [f"class {i}" for i in range(11)], {})).label == "class 10"


def test_shards_are_found(shards, tmp_path):
    assert [path[-13:] for path in list_shards(shards)] == [f"pairs-{i:03d}.tar" for i in range(5)]
    with pytest.raises(ValueError, match=r"names 1 file\(s\) of 6 that do not exist, the first one .*pairs-005.tar"):
        list_shards(shards.replace("004", "005"))


# ---- the stream -----------------------------------------------------------------------------------------------------


def make_sample(pair, rng):
    if pair.stem == TORN:
        raise ValueError("its photo is torn")
    return {"id": pair.stem, "value": int(rng.integers(1 << 30))}


def stream(shards, batch_size=1, state=None, process_index=0, num_processes=1, num_workers=0, **kwargs):
    readers = (process_index, num_processes, num_workers)
    return ShardStream(list_shards(shards), NAMES, make_sample, batch_size, 0, *readers, state, **kwargs)


def run(stream, num_workers, count):
    """(id, value) of `count` batches, and the state after each."""
    seen, states = [], []
    for streamed in itertools.islice(DataLoader(stream, batch_size=None, num_workers=num_workers), count):
        seen.append(list(zip(streamed.batch["id"], streamed.batch["value"].tolist(), strict=True)))
        states.append(json.loads(json.dumps(stream.next_state(streamed))))
    return seen, states


TRAINED = {f"p{i:03d}" for i in range(40) if not in_validation(f"p{i:03d}")}
TORN = max(TRAINED)
TRAINED.remove(TORN)


def test_each_epoch_has_every_training_pair_once_in_another_order(shards, caplog):
    with caplog.at_level(logging.WARNING):
        seen, _ = run(stream(shards), 0, 2 * len(TRAINED))
    names = [name for batch in seen for name, _ in batch]
    epochs = names[: len(TRAINED)], names[len(TRAINED) :]
    assert sorted(epochs[0]) == sorted(epochs[1]) == sorted(TRAINED)
    assert epochs[0] != epochs[1] and epochs[0] != sorted(epochs[0])
    first, second = (dict(b[0] for b in part) for part in (seen[: len(TRAINED)], seen[len(TRAINED) :]))
    assert all(first[name] != second[name] for name in TRAINED)  # augmented anew
    # What is left out is said once, and why.
    assert caplog.text.count("left out") == 1 and f"{TORN} (its photo is torn)" in caplog.text


def test_processes_and_workers_deal_the_shards_out(shards):
    read = []
    for process_index in range(2):
        state = stream(shards, process_index=process_index, num_processes=2, num_workers=2)
        seen, states = run(state, 2, 60)
        for batch, after in zip(seen, states, strict=True):
            # A reader's samples of its first epoch: no position of the batch's own worker is beyond epoch 0.
            worker = (after["turn"] - 1) % 2
            if after["positions"][worker][0] == 0:
                read.append(batch[0][0])
    assert Counter(read) == Counter(TRAINED)


@pytest.mark.parametrize("num_workers, shuffle_buffer", [(0, 256), pytest.param(2, 3, marks=pytest.mark.slow)])
def test_a_stream_goes_on_exactly_where_it_was(num_workers, shuffle_buffer, shards):
    options = {"batch_size": 3, "num_workers": num_workers, "shuffle_buffer": shuffle_buffer}
    whole, states = run(stream(shards, **options), num_workers, 30)
    assert any(position[0] >= 2 for position in states[-1]["positions"])
    for done in (1, 2, 5, 11, 24):
        rest, _ = run(stream(shards, state=states[done - 1], **options), num_workers, 30 - done)
        assert rest == whole[done:]


def test_the_shuffle_reaches_as_far_as_its_buffer(shards):
    orders = {}
    for size in (1, 4, 256):
        one_shard = shards.replace("{000..004}", "000")
        seen, _ = run(stream(one_shard, shuffle_buffer=size), 0, 9)
        orders[size] = [int(batch[0][0][1:]) for batch in seen]
    assert orders[1] == sorted(orders[1])
    assert orders[4] != sorted(orders[4]) and max(orders[4][:3]) <= 5
    assert orders[256] != orders[4]


def test_what_cannot_be_read_is_refused(shards, tmp_path):
    with pytest.raises(ValueError, match="5 shard.* 2 process.* `dataloader_num_workers` 3 need 6"):
        stream(shards, num_processes=2, num_workers=3)
    _, states = run(stream(shards), 0, 1)
    with pytest.raises(ValueError, match=r"read by 1 process\(es\) with 1 data worker.* now there are 1 with 2"):
        stream(shards, state=states[0], num_workers=2)
    for other in ({"shuffle_buffer": 2}, {"shards": shards.replace("004", "003")}):
        with pytest.raises(ValueError, match="another order: `train_shards`, `seed` and `shuffle_buffer`"):
            stream(**{"shards": shards, "state": states[0]} | other)
    empty = write_tar(tmp_path / "empty.tar", [("a.png", png(0))])
    with pytest.raises(ValueError, match="the last 3 shards .* left out: 1 photos have no drawing: a"):
        next(iter(ShardStream([empty], NAMES, make_sample, 1, 0)))
    with pytest.raises(ValueError, match="has no pair to validate with .* Left out: 1 photos have no drawing: a"):
        validation_pairs([empty], NAMES, 4)
    with pytest.raises(
        ValueError, match="no pair to validate with .* Left out: 1 shards break off or cannot be opened"
    ):
        validation_pairs(["nowhere://a.tar"], NAMES, 4)


def test_one_bad_shard_among_as_many_as_readers_is_not_fatal(shards, tmp_path, caplog):
    (tmp_path / "torn.tar").write_bytes(b"no tar file")
    files = [*list_shards(shards)[:1], str(tmp_path / "torn.tar")]
    for process_index in range(2):
        readers = ShardStream(files, NAMES, make_sample, 2, 0, process_index, num_processes=2)
        with caplog.at_level(logging.WARNING):
            seen, states = run(readers, 0, 20)
        assert {name for batch in seen for name, _ in batch} <= TRAINED
    assert "torn.tar: left out 1 shards break off or cannot be opened" in caplog.text


def test_validation_leaves_out_what_training_leaves_out(shards):
    files = list_shards(shards)
    everything = [pair.stem for pair in validation_pairs(files, NAMES, 99)]
    assert everything and all(in_validation(name) for name in everything)
    known = validation_pairs(files, ["disc"], 99)
    assert {pair.label for pair in known} <= {"disc"} and len(known) < len(everything)


# ---- fine-tuning ----------------------------------------------------------------------------------------------------


def finetune(shards, pretrained_dir, out, **kwargs):  # noqa: F811
    options = {"train_shards": shards, "pretrained_model_name_or_path": pretrained_dir, "checkpointing_steps": 2}
    options |= {"num_validation_samples": 2, "max_train_steps": 4, "output_dir": str(out)}
    main(tiny_args(**options | kwargs))


@pytest.mark.slow
@pytest.mark.parametrize("dataloader_num_workers", [0, 2])
def test_a_streamed_run_resumes_to_the_bit(dataloader_num_workers, shards, pretrained_dir, tmp_path):  # noqa: F811
    options = {"dataloader_num_workers": dataloader_num_workers}
    finetune(shards, pretrained_dir, tmp_path / "whole", **options)
    finetune(shards, pretrained_dir, tmp_path / "cut", max_train_steps=2, **options)
    options["resume_from_checkpoint"] = "latest"
    finetune(shards, pretrained_dir, tmp_path / "cut", **options)
    files = [tmp_path / name / "checkpoint-4" for name in ("whole", "cut")]
    one, other = (load_file(folder / "unet" / "diffusion_pytorch_model.safetensors") for folder in files)
    assert all(torch.equal(one[key], other[key]) for key in one)
    assert (files[0] / "stream_0.json").read_text() == (files[1] / "stream_0.json").read_text()
    # Nothing but the validation photos was kept on disk.
    assert len(list((tmp_path / "whole" / "inverted").rglob("*.safetensors"))) == 2
    (files[1] / "stream_0.json").unlink()
    with pytest.raises(ValueError, match=r"was read by 0 process\(es\)"):
        finetune(shards, pretrained_dir, tmp_path / "cut", **options | {"max_train_steps": 5})


def test_samples_of_shards_are_those_of_the_folder_layout(shards, tiny_pipeline_factory):
    pipeline = tiny_pipeline_factory(components=(), id2label=dict(enumerate(NAMES)), num_class_embeds=3)
    data = ShardedChainData(pipeline, tiny_args(train_shards=shards))
    pair = next(read_shard(list_shards(shards)[0], NAMES, {}))
    rng = np.random.default_rng(0)
    sample = data.make_sample(pair, rng)
    assert sample["id"] == "p000" and sample["class_label"] == 0
    assert sample["pixel_values"].shape == (3, 16, 16) and sample["sketch"].shape == (1, 16, 16)
    # The red square, and the outline that was drawn of it at the same place.
    red = sample["pixel_values"][0] - sample["pixel_values"][1] > 1
    ink = sample["sketch"][0] < 0.5  # a thin line is gray at this size
    rows, columns = (torch.where(red.any(dim=d))[0] for d in (1, 0))
    drawn_rows, drawn_columns = (torch.where(ink.any(dim=d))[0] for d in (1, 0))
    for found, expected in ((drawn_rows, rows), (drawn_columns, columns)):
        assert abs(int(found.min() - expected.min())) <= 1 and abs(int(found.max() - expected.max())) <= 1
    unknown = next(read_shard(list_shards(shards)[0], ["cat", "square"], {}))
    with pytest.raises(ValueError, match="lacks the class 'cat'"):
        data.make_sample(unknown, rng)


@pytest.mark.parametrize(
    "kwargs, message",
    [
        ({"train_data_dir": "x"}, "`train_data_dir`.*`train_shards`"),
        ({"max_train_samples": 3}, "`max_train_samples`.*`train_shards`"),
        ({"max_train_steps": None}, "`max_train_steps`.*`train_shards`"),
        ({"shuffle_buffer": 0}, "`shuffle_buffer`.* 0"),
    ],
)
def test_arguments_that_do_not_go_with_shards_are_refused(kwargs, message):
    options = TINY | {"train_shards": "a.tar", "pretrained_model_name_or_path": "p", "max_train_steps": 1}
    with pytest.raises(ValueError, match=message):
        check_finetune_arguments(FinetuneArguments(**options | kwargs))
