"""The run of a float model on one batch, up to where a node begins: what is before it is computed once. Imports torch.

Nodes are measured alone in the order in which they run, each by a run whose modules before it give what they gave in
floats. Between two of them, `advance` runs in floats what lies between, so a module that keeps something for others
has last seen floats whenever it is passed over. The hard thing: a module may do what its output does not show (it
draws random numbers, or writes to its input); so it is tried whether a run over what was kept gives what the model
gives, and who asks must not lean on this if not.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

_CLOSE = 1e-5  # of the largest output: what float rounding may differ from run to run


class _Reached(BaseException):
    """The module that a run was to stop at begins. No Exception, lest the model handles it."""


class Replay:
    """A float model, patched while in use. Modules run as they are until `advance` has kept what they give."""

    def __init__(self, model: nn.Module, run: Callable[[], dict[str, torch.Tensor]]) -> None:
        """run: the model on its batch, in floats."""
        self._model, self._run = model, run
        self._kept: dict[int, list[Any]] = {}  # outputs of a module's calls, but for those inside of kept ones
        self._n_calls: dict[int, int] = {}
        self._log: list[tuple[int, Any]] | None = None
        self._order: dict[int, nn.Module] | None = None
        self._stop: nn.Module | None = None
        self._wanted: dict[str, torch.Tensor] = {}

    @contextmanager
    def patched(self, starts: Sequence[nn.Module]) -> Iterator[list[nn.Module]]:
        """Those of the modules that the model calls, in the order of their first calls."""
        inside = {id(part) for part in starts}
        followed = [
            module
            for module in self._model.modules()
            if module is not self._model
            and not isinstance(module, torch.jit.ScriptModule)
            and any(id(part) in inside for part in module.modules())
        ]
        before = {id(module): vars(module).get("forward") for module in followed}
        for module in followed:
            module.forward = self._follow(module, module.forward, id(module) in inside)
        try:
            self._order = {}
            self._wanted = self._run()
            order, self._order = list(self._order.values()), None
            yield order
        finally:
            for module in followed:
                held = before[id(module)]
                if held is None:
                    del module.forward
                else:
                    module.forward = held

    def rewind(self) -> None:
        """To be called before each run of the model: it starts again, over what is kept."""
        self._n_calls = {}

    def advance(self, stop: nn.Module | None) -> dict[str, torch.Tensor] | None:
        """Keep what is computed before the first call of a module; None: all, and give the outputs."""
        self._stop, self._log = stop, []
        try:
            self.rewind()
            outputs = self._run()
        except _Reached:
            outputs = None
        finally:
            log, self._stop, self._log = self._log, None, None
        self._kept = {}
        for key, output in log:
            self._kept.setdefault(key, []).append(output)
        return outputs

    def is_true(self) -> bool:
        """Whether a run over all that is kept gives what the model gives."""
        found = self.advance(None)
        return found is not None and all(
            name in found
            and found[name].shape == tensor.shape
            and torch.allclose(found[name], tensor, rtol=0, atol=_CLOSE * _largest(tensor), equal_nan=True)
            for name, tensor in self._wanted.items()
        )

    def _follow(self, module: nn.Module, forward: Callable[..., Any], is_start: bool) -> Callable[..., Any]:
        key = id(module)

        def followed(*args: Any, **kwargs: Any) -> Any:
            if is_start and self._order is not None:
                self._order.setdefault(key, module)
            number = self._n_calls.get(key, 0)
            self._n_calls[key] = number + 1
            kept = self._kept.get(key, ())
            if number < len(kept):
                if self._log is not None:
                    self._log.append((key, kept[number]))
                return _copied(kept[number])
            if module is self._stop:
                raise _Reached
            n_before = len(self._log) if self._log is not None else 0
            output = forward(*args, **kwargs)
            if self._log is not None and _is_plain(output):
                self._log[n_before:] = [(key, _copied(output))]  # in the place of what its parts gave
            return output

        return followed


def _is_plain(value: Any) -> bool:
    """Whether a value can be kept: tensors, in lists, tuples and dicts. Others may be written to by who gets them."""
    if type(value) in (tuple, list):
        return all(map(_is_plain, value))
    if type(value) is dict:
        return all(map(_is_plain, value.values()))
    return value is None or type(value) in (torch.Tensor, bool, int, float, str)


def _copied(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.detach().clone()
    if type(value) is dict:
        return {key: _copied(held) for key, held in value.items()}
    return type(value)(map(_copied, value)) if type(value) in (tuple, list) else value


def _largest(tensor: torch.Tensor) -> float:
    found = tensor[tensor.isfinite()]
    return float(found.abs().max()) if found.numel() else 0.0
