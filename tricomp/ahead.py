"""Work done ahead in a thread: an iterator that is a step or more before its taker. Imports nothing of tricomp.

So frames are encoded while others are written, and pieces decoded while others are written. The hard thing is the end:
whatever is raised on one side reaches the other, the thread is gone when the taker is, and at no time is more held than
was agreed.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Generator, Iterable, Iterator
from dataclasses import dataclass
from queue import SimpleQueue
from typing import TypeVar

Item = TypeVar("Item")


@dataclass
class _End:
    """Comes after the last item. error: what ended them."""

    error: BaseException | None


def ahead(
    items: Iterable[Item], most: int = 1, size_of: Callable[[Item], int] = lambda _: 1
) -> Generator[Item, None, None]:
    """The items, taken from their iterator in a thread of its own, before they are asked for here.

    The next one is begun when those that wait are fewer than most, or less, by size_of, together. Close it, or take
    all: afterwards no thread is left, and items is closed if it can be. What items raises is raised here. At the end of
    the interpreter, when no thread can be started, items are taken here.
    """
    ready: SimpleQueue[tuple[Item, int] | _End] = SimpleQueue()
    source = iter(items)
    change = threading.Condition()
    waiting = 0
    is_stopped = False

    def take() -> None:
        nonlocal waiting
        try:
            while True:
                with change:
                    while waiting >= most and not is_stopped:
                        change.wait()
                if is_stopped:
                    break
                try:
                    item = next(source)
                except StopIteration:
                    break
                size = size_of(item)
                with change:
                    waiting += size
                ready.put((item, size))
                del item  # or this thread would hold it until the next one
            _close(source)
            ready.put(_End(None))
        except BaseException as error:
            ready.put(_End(error))

    thread = threading.Thread(target=take, name="tricomp-ahead")
    try:
        try:
            thread.start()
        except RuntimeError:
            yield from source
            return
        while True:
            found = ready.get()
            if isinstance(found, _End):
                try:
                    if found.error is not None:
                        raise found.error
                    return
                finally:
                    del found  # the error holds this frame, which must not hold the error
            box, size = [found[0]], found[1]
            del found  # the taker alone holds it
            with change:
                waiting -= size
                change.notify()
            yield box.pop()
    finally:
        with change:
            is_stopped = True
            change.notify()
        if thread.ident is None:
            _close(source)
        else:
            thread.join()


def _close(source: Iterator[object]) -> None:
    close = getattr(source, "close", None)
    if close is not None:
        close()
