# SPDX-License-Identifier: Apache-2.0
"""Commands and scripts that are told to stop: Ctrl-C by a person, SIGTERM by a cluster."""

import ctypes
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any, TypeVar


T = TypeVar("T")
_PR_SET_PDEATHSIG = 1


class Stopped(SystemExit):
    """Ends the process with the exit code that shells give to a signal: 130 for Ctrl-C, 143 for SIGTERM."""

    def __init__(self, signum: int):
        super().__init__(128 + signum)


@contextmanager
def stoppable(program: str) -> Iterator[None]:
    """
    Turn Ctrl-C and SIGTERM within the block into one line on stderr and exit code 130 or 143, with temporary files removed.

    Args:
        program: the name, or `__file__`, of what is stopped.
    """
    previous: dict[int, Any] = {}
    if threading.current_thread() is threading.main_thread():
        # What is ignored stays so: a shell starts what runs in the background that way.
        signals = [s for s in (signal.SIGINT, signal.SIGTERM) if signal.getsignal(s) != signal.SIG_IGN]
        previous = {signum: signal.signal(signum, _stop) for signum in signals}
        _end_with_launcher()
    try:
        yield
    except (Stopped, KeyboardInterrupt) as stop:
        code = stop.code if isinstance(stop, Stopped) else 128 + signal.SIGINT
        print(f"{Path(program).name}: stopped; finished files are complete.", file=sys.stderr)
        raise SystemExit(code) from None
    finally:
        for signum, handler in previous.items():
            signal.signal(signum, handler)


def _stop(signum: int, frame: FrameType | None) -> None:
    # A cluster signals a launcher, which passes it on, and us; a person who presses twice means at once.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    raise Stopped(signum)


def _end_with_launcher() -> None:
    """Take the end of `accelerate launch` for a SIGTERM: with one process, it passes none on (Linux)."""
    if "ACCELERATE_MIXED_PRECISION" in os.environ and sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


class TermRequest:
    """
    A record of a SIGTERM within a `with` block, where it ends nothing but what [`TermRequest.run`] calls.

    Attributes:
        is_set (`bool`): one has come.
    """

    def __init__(self) -> None:
        self.is_set = self._may_cut = False
        self._previous: Any = None

    def __enter__(self) -> "TermRequest":
        if threading.current_thread() is threading.main_thread():
            self._previous = signal.signal(signal.SIGTERM, self._handle)
        return self

    def __exit__(self, *error: object) -> None:
        if self._previous is not None:
            signal.signal(signal.SIGTERM, self._previous)

    def _handle(self, signum: int, frame: FrameType | None) -> None:
        self.is_set = True
        if self._may_cut:
            self._may_cut = False
            raise Stopped(signum)

    def run(self, function: Callable[[], T]) -> T | None:
        """Call what may be left half done; `None` where a SIGTERM came before its end."""
        self._may_cut = True
        try:
            return None if self.is_set else function()
        except Stopped:
            return None
        finally:
            self._may_cut = False


def ignore_signals(worker_id: int = 0) -> None:
    """Leave it to the process that started this one to end it: a `worker_init_fn`, as clusters signal all processes of a job."""
    for signum in (signal.SIGINT, signal.SIGTERM):
        signal.signal(signum, signal.SIG_IGN)
