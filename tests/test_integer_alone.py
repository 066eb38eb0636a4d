"""What nodes do alone: measured over what was kept of the float run, and the same as by whole runs; progress."""

import logging
from typing import Any

import pytest

pytest.importorskip("torch")
pytest.importorskip("sklearn")

import torch
from torch import nn
from tricomp_torch import integers
from tricomp_torch.integers import Budget
from tricomp_torch.integers.alone import Alone
from tricomp_torch.integers.effect import Examples
from tricomp_torch.integers.examples import batches_of, run
from tricomp_torch.integers.ladders import options, units_of
from tricomp_torch.integers.progress import Progress
from tricomp_torch.integers.replay import Replay
from tricomp_torch.integers.trials import Trials

from tests import integer_models as models

make_plan: Any = integers.plan


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class Counted(nn.Module):
    """A layer that counts its calls, and can do what its output does not show."""

    def __init__(self, secret=""):
        super().__init__()
        self.layer, self.secret, self.n_calls = nn.Linear(32, 32), secret, 0

    def forward(self, x):
        self.n_calls += 1
        y = self.layer(x).tanh()
        if self.secret == "random":
            torch.rand(3)
        if self.secret == "writes":
            x.mul_(0.5)
        return {"y": [y, 1]} if self.secret == "nested" else y


class Chain(nn.Module):
    """Layers one after another, of which some are not what they seem."""

    def __init__(self, secrets):
        super().__init__()
        torch.manual_seed(3)
        self.parts = nn.ModuleList(Counted(secret) for secret in secrets)
        self.again, self.never = nn.Linear(32, 32), nn.Linear(32, 32)

    def forward(self, x):
        for part in self.parts:
            y = part(x)
            x = x * 0.7 + (y["y"][0] if isinstance(y, dict) else y)
        x = self.again(self.again(x).relu() + torch.rand(32) * 0.1)
        return x, self.parts[0](x)


def prepared(model, batches, **arguments):
    plan = make_plan(model, batches, **arguments)
    return integers.prepare(model, plan), plan.nodes


def measured(model, nodes, batches, is_traced):
    """Units with the effect of two rungs each, and how often each part ran."""
    trials, budget = Trials(model), Budget()
    units = units_of(nodes, options("int8", None, "auto", has_examples=True), trials)
    alone = Alone(trials, Examples(model, batches_of(batches), budget), Progress(), is_traced=is_traced)
    found = alone.measured(units, {i: [0, 1] for i in range(len(units))})
    return [[(node.error, node.cosine, node.top1) for node in nodes] for unit in found for nodes in unit.rungs[:2]]


def assert_same(found, wanted):
    assert len(found) == len(wanted)
    for ours, theirs in zip(found, wanted, strict=True):
        for one, other in zip(ours, theirs, strict=True):
            assert one == pytest.approx(other, rel=1e-3, abs=1e-9)


@pytest.mark.parametrize("secret", ["", "nested", "random", "writes"])
def test_what_is_kept_changes_no_result(secret):
    model = Chain(["", "", secret, "", ""]).eval()
    batches = [torch.randn(9, 32), torch.randn(4, 32)]
    made, nodes = prepared(model, batches)
    n_calls = {}
    for is_traced in (True, False):
        for part in made.parts:
            part.n_calls = 0
        before = {name: set(vars(module)) for name, module in made.named_modules()}
        n_calls[is_traced] = (measured(made, nodes, batches, is_traced), [part.n_calls for part in made.parts])
        assert {name: set(vars(module)) for name, module in made.named_modules()} == before
    assert_same(n_calls[True][0], n_calls[False][0])
    ours, theirs = n_calls[True][1], n_calls[False][1]
    if secret in ("", "nested"):
        assert ours[1] < ours[2] < ours[3] < theirs[3]
        assert ours[1] < 0.7 * theirs[1]
    else:  # it was noticed, and all was measured again
        assert all(one > other for one, other in zip(ours, theirs, strict=True))


def test_whole_models_are_measured_the_same():
    digits, text = models.trained_digits(), models.trained_text()
    cases: list[Any] = [
        (digits, [models.digits()[0][:33].contiguous(), models.digits()[0][40:47].contiguous()]),
        (text, models.text_batches(2, seed=5)),
    ]
    for model, batches in cases:
        made, nodes = prepared(model, batches, bits=8)
        assert_same(measured(made, nodes, batches, True), measured(made, nodes, batches, False))


def test_a_run_is_left_as_it_was_found():
    model: Any = Chain(["", ""]).eval()
    seen: list[int] = []
    forward = model.parts[1].forward

    def replaced(x):
        seen.append(len(x))
        return forward(x)

    model.parts[1].forward = replaced
    own = vars(model.parts[1])["forward"]
    batch = batches_of(torch.randn(5, 32))[0]
    replay = Replay(model, lambda: run(model, batch, "batch"))

    def fails():
        with replay.patched([model.parts[1], model.again, model.never]) as order:
            assert order == [model.parts[1], model.again]
            assert replay.advance(model.again) is None
            assert len(seen) == 2
            assert replay.is_true()
            assert len(seen) == 2  # it was passed over
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fails()
    assert vars(model.parts[1])["forward"] is own
    assert "forward" not in vars(model.again)


def test_a_search_stops_where_the_budget_cannot_hold():
    class Shifted(nn.Module):
        def __init__(self):
            super().__init__()
            self.shift, self.n_calls = 0.0, 0

        def forward(self, x):
            self.n_calls += 1
            return x + self.shift * x.flip(-1)

    batches = batches_of([torch.randn(16, 10) for _ in range(5)])
    for budget in (Budget(max_error=0.01), Budget(top1=0.9)):
        model = Shifted()
        examples = Examples(model, batches, budget)
        for shift, n_calls in ((0.0, 5), (1e-6, 5), (3.0, 1)):
            model.shift, model.n_calls = shift, 0
            broken = examples.effect(model, until_broken=True)
            assert model.n_calls == n_calls
            whole = examples.effect(model)
            if n_calls == 5:
                assert broken == whole
            else:
                assert broken.max_error > 0.01
                assert broken.top1 is not None
                assert broken.top1 < 0.9
            assert (whole.top1 == 1.0) == (n_calls == 5)


def test_cosines_are_told_finely():
    torch.manual_seed(0)
    wanted = torch.randn(1000, 37) * 1e3

    class Fixed(nn.Module):
        def __init__(self, value):
            super().__init__()
            self.value = value

        def forward(self, x):
            return self.value

    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        examples = Examples(Fixed(wanted.to(dtype)), batches_of(torch.ones(1)), Budget())
        for size in (1.0, 1e-2, 3e-4):
            got = (wanted + size * torch.randn_like(wanted) * 1e3).to(dtype)
            a, b = wanted.to(dtype).double().flatten(), got.double().flatten()
            lost = 1 - float(a @ b / (a.norm() * b.norm()))
            assert 1 - examples.effect(Fixed(got)).cosine == pytest.approx(lost, rel=1e-2, abs=2e-15)
        assert examples.effect(Fixed(-wanted.to(dtype))).cosine == pytest.approx(-1.0)
        assert examples.effect(Fixed(wanted.to(dtype) * 0)).cosine == 0.0
    huge = torch.tensor([[-3e38, 1.0, 2.0]])
    assert Examples(Fixed(huge), batches_of(torch.ones(1)), Budget()).effect(Fixed(huge)).cosine == 1.0


def test_progress_is_told_to_who_asks(caplog, capfd):
    model, batches = Chain(["", "", ""]).eval(), [torch.randn(5, 32), torch.randn(3, 32)]
    told: list[tuple[int, int]] = []
    with caplog.at_level(logging.INFO, "tricomp"):
        make_plan(model, batches, on_progress=lambda done, total: told.append((done, total)))
    assert told[-1][0] == told[-1][1] == 5 * 2 + 2
    assert [done for done, _ in told[:-1]] == list(range(1, 11))
    assert all(done <= total for done, total in told)
    assert [line.partition(",")[0] for line in caplog.messages] == ["plan: 5 nodes", "plan: 5 of 5 nodes in integers"]
    assert capfd.readouterr() == ("", "")


def test_long_work_has_a_line_every_few_seconds(caplog, monkeypatch):
    now = [0.0]
    monkeypatch.setattr("tricomp_torch.integers.progress.time.monotonic", lambda: now[0])
    progress = Progress()
    progress.expect(40)
    with caplog.at_level(logging.INFO, "tricomp"):
        for _ in range(40):
            now[0] += 0.8
            progress.step()
    assert [line.split()[1] for line in caplog.messages] == ["13", "26", "39"]
