"""Which of several ways is taken on a GPU: by a clock of our own, no GPU is needed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from tricomp_torch.integers import fastest  # noqa: E402

from tricomp.errors import BackendError  # noqa: E402

GPU = torch.device("cuda", 0)


class Clock:
    """Ways that take so long, and events that say when they were."""

    def __init__(self) -> None:
        self.now = 0.0
        self.calls: list[str] = []

    def way(self, name: str, seconds: float, error: Exception | None = None) -> Callable[[], Any]:
        def call() -> Any:
            self.calls.append(name)
            if error is not None:
                raise error
            self.now += seconds
            return torch.tensor([len(name)])

        return call

    def event(self, enable_timing: bool) -> Any:
        clock = self

        class Event:
            def record(self) -> None:
                self.at = clock.now

            def elapsed_time(self, other: Any) -> float:
                return other.at - self.at

        assert enable_timing
        return Event()

    def synchronize(self) -> None:
        self.calls.append("wait")


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """A GPU whose time is our own, where nothing was chosen before."""
    made = Clock()
    monkeypatch.setattr(fastest, "_chosen", {})
    monkeypatch.setattr(torch.cuda, "Event", made.event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: made)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(torch.cuda, "device", lambda device: torch.no_grad())
    return made


def test_the_fastest_is_taken_from_then_on(clock: Clock) -> None:
    ways = {"one": clock.way("one", 3), "three": clock.way("three", 1), "fives": clock.way("fives", 2)}
    assert fastest.run(("a",), ways, clock.way("", 0), GPU).item() == 5
    assert clock.calls.count("wait") == 1
    clock.calls.clear()
    assert fastest.run(("a",), ways, clock.way("", 0), GPU).item() == 5
    assert clock.calls == ["three"]
    assert fastest.chosen() == {(GPU, "a"): "three"}
    del ways["three"]  # which a call with other strides, say, does not have
    assert fastest.run(("a",), ways, clock.way("", 0), GPU).item() == 3
    fastest.run(("b",), {"one": ways["one"]}, clock.way("", 0), GPU)  # one way needs no clock
    assert clock.calls.count("wait") == 0
    assert fastest.chosen()[GPU, "b"] == "one"


def test_what_does_not_run_is_left_out(clock: Clock) -> None:
    bad = {
        "kernel": clock.way("kernel", 0, BackendError("no compiler")),
        "torch": clock.way("torch", 0, RuntimeError("CUBLAS_STATUS_NOT_SUPPORTED")),
    }
    assert fastest.run((1,), {**bad, "four": clock.way("four", 9)}, clock.way("", 0), GPU).item() == 4
    assert fastest.chosen() == {(GPU, 1): "four"}
    assert fastest.run((2,), bad, clock.way("other", 0), GPU).item() == 5
    assert fastest.run((2,), bad, clock.way("other", 0), GPU).item() == 5
    assert clock.calls.count("kernel") == 2
    full = {"first": clock.way("first", 0, torch.OutOfMemoryError("full")), "four": clock.way("four", 9)}
    with pytest.raises(torch.OutOfMemoryError, match="full"):
        fastest.run((3,), full, clock.way("", 0), GPU)
    assert (GPU, 3) not in fastest.chosen()


@pytest.mark.parametrize("why", ["captured", "deterministic", "no GPU"])
def test_no_clock_decides_where_none_may(clock: Clock, why: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first way that runs is taken, and nothing is kept."""
    device = torch.device("cpu") if why == "no GPU" else GPU
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: why == "captured")
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: why == "deterministic")
    ways = {"kernel": clock.way("kernel", 0, BackendError("no")), "slow": clock.way("slow", 9), "x": clock.way("x", 1)}
    for _ in range(2):
        assert fastest.run((1,), ways, clock.way("", 0), device).item() == 4
        assert fastest.run((1,), {}, clock.way("other", 0), device).item() == 5
    assert "x" not in clock.calls
    assert fastest.chosen() == {}
