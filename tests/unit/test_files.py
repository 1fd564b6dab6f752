# SPDX-License-Identifier: Apache-2.0
import os
import resource
import signal
import subprocess
import sys
from contextlib import contextmanager

import pytest

from diffsketching_pipeline import files
from diffsketching_pipeline.files import lock_folder, staged_file, staged_folder, write_file


@contextmanager
def running(code, *arguments):
    """A process that has said that it is ready; it is killed (-9) in the end."""
    process = subprocess.Popen([sys.executable, "-c", code, *map(str, arguments)], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout.readline() == "ready\n"
        yield process
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


WRITE = """
import sys, time
from diffsketching_pipeline.files import staged_file, staged_folder
with getattr(__import__("diffsketching_pipeline.files").files, sys.argv[1])(sys.argv[2]):
    print("ready", flush=True)
    time.sleep(60)
"""


@pytest.mark.parametrize("stage", [staged_file, staged_folder])
def test_the_next_writer_removes_what_a_killed_one_left_and_nothing_of_a_living_one(stage, tmp_path):
    def write(path):
        with stage(path) as temporary:
            (temporary if stage is staged_file else temporary / "value").write_text("new")

    for other in ("value-of-another", ".value-abc.tmp", ".value-0123456789.tmp"):
        (tmp_path / other).touch()
    others = set(os.listdir(tmp_path))
    with running(WRITE, stage.__name__, tmp_path / "value"):
        (temporary,) = set(os.listdir(tmp_path)) - others
        write(tmp_path / "value")
        assert set(os.listdir(tmp_path)) == others | {"value", temporary}
        if stage is staged_folder:
            (tmp_path / "value").rename(tmp_path / "moved")
            others.add("moved")
    write(tmp_path / "value")
    assert set(os.listdir(tmp_path)) == others | {"value"}


WATCH = """
import os, sys
print("ready", flush=True)
looks = misses = 0
while not os.path.exists(sys.argv[2]):
    looks += 1
    misses += not os.path.exists(sys.argv[1])
print(looks, misses)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="names change places in one step on Linux")
def test_a_folder_that_is_replaced_is_never_missing(tmp_path):
    def write(value):
        with staged_folder(tmp_path / "value", replace=True) as folder:
            (folder / "number").write_text(str(value))

    write(0)
    with running(WATCH, tmp_path / "value", tmp_path / "end") as watching:
        for value in range(1, 200):
            write(value)
        (tmp_path / "end").touch()
        looks, misses = map(int, watching.stdout.readline().split())
    assert looks > 200 and misses == 0
    assert (tmp_path / "value" / "number").read_text() == "199" and sorted(os.listdir(tmp_path)) == ["end", "value"]


def test_without_an_exchange_the_next_call_puts_back_what_a_kill_took_away(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "_exchange", lambda one, other: False)
    (tmp_path / ".value.old").mkdir()
    (tmp_path / ".value.old" / "number").write_text("1")
    with pytest.raises(ZeroDivisionError), staged_folder(tmp_path / "value", replace=True) as folder:
        raise ZeroDivisionError
    assert os.listdir(tmp_path) == ["value"] and (tmp_path / "value" / "number").read_text() == "1"
    with staged_folder(tmp_path / "value", replace=True) as folder:
        (folder / "number").write_text("2")
    assert os.listdir(tmp_path) == ["value"] and (tmp_path / "value" / "number").read_text() == "2"


def test_a_full_disk_keeps_the_older_file(tmp_path):
    write_file(tmp_path / "value", "whole")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            write_file(tmp_path / "value", 2000 * "x")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert os.listdir(tmp_path) == ["value"] and (tmp_path / "value").read_text() == "whole"


LOCK = """
import sys, time
from pathlib import Path
from diffsketching_pipeline.files import lock_folder
lock = lock_folder(Path(sys.argv[1]))
print("ready", flush=True)
time.sleep(60)
"""


def test_a_folder_belongs_to_one_process_until_that_ends_however_it_ends(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "_LOCK_SECONDS", 0.2)
    with running(LOCK, tmp_path / "run") as other:
        with pytest.raises(ValueError, match=f"`output_dir` {tmp_path / 'run'} is in use by another run"):
            lock_folder(tmp_path / "run")
        other.send_signal(signal.SIGKILL)
        other.wait()
        assert lock_folder(tmp_path / "run").is_locked
