"""Wait for a condition, with a deadline and a reason."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

T = TypeVar("T")
PATIENCE = float(os.environ.get("OVERLAY_TEST_PATIENCE", "2"))
"""Every deadline so many times as long as a quick machine needs: 2 for one of two cores that runs four tests at a time,
more where it is emulated. What is there in time costs no more by it."""


@contextmanager
def meanwhile(act: Callable[[int], object], pause_s: float = 0.0) -> Iterator[list[int]]:
    """Something is done again and again in a thread, given how often it was before; how often, in the end."""
    ending, done = threading.Event(), [0]

    def run() -> None:
        while not ending.wait(pause_s):
            act(done[0])
            done[0] += 1

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield done
    finally:
        ending.set()
        thread.join()


def until(what: str, check: Callable[[], T], seconds: float = 20.0, pause_s: float = 0.03) -> T:
    """The first true value of `check`; its last value stands in the failure."""
    seconds *= PATIENCE
    end = time.monotonic() + seconds
    while True:
        try:
            found: object = check()
        except (OSError, AssertionError, LookupError, TypeError, ValueError, AttributeError) as error:
            found, last = False, repr(error)
        else:
            last = repr(found)
        if found:
            return found  # type: ignore[return-value]
        if time.monotonic() > end:
            raise AssertionError(f"not within {seconds:.0f} s: {what}; last: {last[:2000]}")
        time.sleep(pause_s)
