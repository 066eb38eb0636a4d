"""Which steps of a run's folder count, where several processes wrote them: in the folders of their Stores. Writes none.

The Store of process 1 of 4 stands in the folder process-00001-of-00004 of the run's, and that of a single process in
the run's folder itself. There is no manifest: a step counts when the files of all processes of a set are there, and
were written by one run of the program. The hard thing: a run that dies leaves steps that only some of its processes
have written, and the next run may write the same ones, perhaps with another number of processes.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from typing import Any

import tricomp
from tricomp import storage
from tricomp.chain import nearest
from tricomp.errors import MissingStep, TricompError
from tricomp_jax.files import notes_of

RUN = "run"
"""The note of the run of the program that wrote a file; a later one sorts after an earlier one."""
_log = logging.getLogger("tricomp")
_FOLDER = re.compile(r"process-(\d{5,9})-of-(\d{5,9})")
_OPTIONS = ("storage_options", "cache", "cache_bytes", "lease", "threads", "backend")


def folder_of(number: int, n_processes: int) -> str:
    """The name of a process's folder in the run's; "": it is the run's."""
    return f"process-{number:05d}-of-{n_processes:05d}" if n_processes > 1 else ""


class Sets:
    """The steps in a run's folder, by the number of processes that wrote them."""

    def __init__(self, url: str, options: Mapping[str, Any]) -> None:
        """options: of tricomp.Store; those that matter to a reader are used. Raises InvalidArgument."""
        self.options = {name: value for name, value in options.items() if name in _OPTIONS}
        self.url = url
        self._stores: dict[str, tricomp.Store] = {}

    def at(self, folder: str) -> str:
        """Where a folder of the run's is."""
        return f"{self.url.rstrip('/')}/{folder}" if folder else self.url

    def store(self, folder: str) -> tricomp.Store:
        """A Store to read with."""
        if folder not in self._stores:
            self._stores[folder] = tricomp.Store(self.at(folder), **self.options)
        return self._stores[folder]

    def folders(self) -> dict[int, list[str]]:
        """By number of processes: the folders of their Stores, those that are there. Of one process always."""
        found: dict[int, list[str]] = {1: [""]}
        for name in storage.at(self.url, self.options.get("storage_options")).folders():
            if named := _FOLDER.fullmatch(name):
                found.setdefault(int(named[2]), []).append(name)
        return found

    def listed(self) -> dict[int, set[int]]:
        """By number of processes: the steps of which the files of all are there, whole or not."""
        found: dict[int, set[int]] = {}
        for n, names in self.folders().items():
            steps = [set(self.store(name).steps()) for name in names]
            if len(names) == n and (common := set.intersection(*steps)):
                found[n] = common
        return found

    def is_whole(self, n: int, step: int) -> bool:
        """Whether the files of n processes of a step are there and were written by one run."""
        runs = {self._run_of(folder_of(i, n), step) for i in range(n)}
        return len(runs) == 1 and None not in runs

    def whole(self) -> list[int]:
        """The steps that count, ascending, of any number of processes."""
        return sorted({step for n, steps in self.listed().items() for step in steps if self.is_whole(n, step)})

    def last_whole(self, listed: Mapping[int, set[int]]) -> int | None:
        """The highest step that counts, of those listed."""
        known = sorted({step for steps in listed.values() for step in steps}, reverse=True)
        return next((one for one in known if any(one in listed[n] and self.is_whole(n, one) for n in listed)), None)

    def find(self, step: int | None) -> tuple[int, int] | None:
        """Number of processes, and step: the highest that counts, or the one asked for. None: none was asked for or is.

        Of several sets that have it, the one written last. Raises MissingStep, saying what is lacking.
        """
        listed = self.listed()
        if step is None:
            step = self.last_whole(listed)
            highest = max((store.latest() or 0 for store in self._stores.values()), default=0)
            if highest > (step or 0):
                _log.warning("%s: %s", self.url, self._lack(highest))
            if step is None:
                return None
        whole = [n for n, steps in listed.items() if step in steps and self.is_whole(n, step)]
        if not whole:
            other = nearest(self.whole(), step)
            advice = "There is none that does." if other is None else f"The nearest that does is step {other}."
            raise MissingStep(f"{self.url}: {self._lack(step)} {advice}")
        return max(whole, key=lambda n: self._run_of(folder_of(0, n), step) or ""), step

    def _run_of(self, folder: str, step: int) -> str | None:
        """The run that wrote a file, "" if it does not say; None: the file is not there, or cannot be read."""
        try:
            return str(notes_of(self.store(folder).metadata(step)).get(RUN, ""))
        except TricompError:
            return None

    def _lack(self, step: int) -> str:
        """Why a step does not count."""
        for n, names in self.folders().items():
            expected = [folder_of(i, n) for i in range(n)]
            there = [name for name in expected if name in names and step in self.store(name).steps()]
            without = [name for name in expected if name not in there]
            if there and without:
                return f"step {step} does not count: there is no file of it in {', '.join(without)}."
            broken = [self.at(name) for name in there if self._run_of(name, step) is None]
            if broken:
                return f"step {step} does not count: its file in {', '.join(broken)} is damaged. Run tricomp verify."
            if there:
                return f"step {step} does not count: some of its files are of one run of the program, some of another."
        return f"step {step} is not there."
