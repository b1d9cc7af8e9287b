"""The training loop: one go or many kills, the same end; steps of several batches; early ends."""

import copy
import math
from collections.abc import Iterator, Sequence
from dataclasses import replace

import pytest
import torch
from torch import nn

from moclip.errors import RunError
from moclip.pipeline.learn import fit as fitting
from moclip.pipeline.learn.fit import Batch, EpochRow, Fitted, Snapshot, State, fit, seeded
from moclip.pipeline.learn.training import Training

CONFIG = Training("1", epochs=6, lr=0.05, lr_drops=(0.5,), batch=8)


class Kept:
    """A run in memory."""

    def __init__(self) -> None:
        self.state: State = {}
        self.history: list[EpochRow] = []
        self.snapshot: Snapshot | None = None

    def keep(self, state: State, history: Sequence[EpochRow]) -> None:
        self.state, self.history = state, list(history)

    def save(self, snapshot: Snapshot) -> None:
        self.snapshot = copy.deepcopy(snapshot)

    def saved(self) -> Snapshot | None:
        return copy.deepcopy(self.snapshot)


class Killed(Exception):
    pass


def batches(epoch: int, size: int = 8) -> Iterator[Batch]:
    inputs = torch.randn(32, 5, generator=torch.Generator().manual_seed(epoch))
    yield from zip(inputs.split(size), (inputs[:, 0] > 0).long().split(size), strict=True)


def train(keeper: Kept, config: Training = CONFIG, die_after: int | None = None, size: int = 8) -> Fitted:
    def on_epoch(row: EpochRow) -> None:
        if row.epoch == die_after:
            raise Killed

    with seeded(3):
        model = nn.Sequential(nn.Linear(5, 16), nn.ReLU(), nn.Dropout(0.5), nn.Linear(16, 2))
        return fit(
            model,
            torch.optim.Adam(model.parameters(), lr=config.lr),
            config,
            train=lambda epoch: batches(epoch, size),
            val=lambda: batches(1000),
            keeper=keeper,
            on_epoch=on_epoch,
        )


def told(history: Sequence[EpochRow]) -> list[EpochRow]:
    return [replace(row, seconds=0.0) for row in history]


def test_killed_after_every_epoch_it_ends_as_if_it_never_was(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fitting, "CHECKPOINT_SECONDS", 0.0)
    undisturbed, killed = Kept(), Kept()
    train(undisturbed)
    for epoch in range(1, CONFIG.epochs + 1):
        with pytest.raises(Killed):
            train(killed, die_after=epoch)
    fitted = train(killed)
    assert told(killed.history) == told(undisturbed.history) == told(fitted.history)
    assert [row.lr for row in killed.history] == pytest.approx([0.05] * 3 + [0.005] * 3)
    assert all(torch.equal(killed.state[name], value) for name, value in undisturbed.state.items())


def test_steps_are_told() -> None:
    model, told = nn.Linear(5, 2), []
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    config = replace(CONFIG, epochs=2, accumulate=3, val_fraction=0.0)
    fit(model, optimizer, config, train=batches, val=None, keeper=Kept(), on_step=lambda *step: told.append(step))
    assert [(epoch, said.split(" · ")[0]) for epoch, said in told] == [
        (1, "24 clips"), (1, "32 clips"), (2, "24 clips"), (2, "32 clips"),
    ]  # fmt: skip


def test_quick_epochs_are_not_saved_one_by_one_and_trained_again_instead() -> None:
    undisturbed, killed = Kept(), Kept()
    train(undisturbed)
    with pytest.raises(Killed):
        train(killed, die_after=4)
    assert killed.snapshot is None
    train(killed)
    assert told(killed.history) == told(undisturbed.history)


def test_a_step_of_four_small_batches_is_one_of_a_large_one() -> None:
    states = []
    for size, accumulate in ((32, 1), (8, 4), (12, 3)):
        torch.manual_seed(0)
        model, kept = nn.Linear(5, 2), Kept()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        config = replace(CONFIG, accumulate=accumulate, val_fraction=0.0)
        fit(model, optimizer, config, train=lambda epoch, size=size: batches(epoch, size), val=None, keeper=kept)
        states.append(kept.state)
    for state in states[1:]:
        for name, value in state.items():
            torch.testing.assert_close(value, states[0][name])


def test_it_ends_early_when_nothing_gets_better() -> None:
    config = replace(CONFIG, epochs=40, patience=2)
    history = train(Kept(), config).history
    best = max(history, key=lambda row: (row.val_top1 or 0, -(row.val_loss or 0)))
    assert len(history) == min(40, best.epoch + 2) < 40
    with pytest.raises(RunError, match="patience needs a held-out part"):
        replace(config, val_fraction=0.0)


def test_mixed_precision_learns_too() -> None:
    best = train(Kept(), replace(CONFIG, bfloat16=True, epochs=20)).best
    assert best.val_top1 is not None
    assert best.val_top1 > 0.8


def test_a_loss_that_is_no_number_stops_and_leaves_the_last_good_model() -> None:
    model, kept = nn.Linear(2, 2), Kept()
    good = (torch.ones(2, 2), torch.tensor([0, 1]))
    bad = (torch.full((2, 2), float("nan")), torch.tensor([0, 1]))

    def some(epoch: int) -> Iterator[Batch]:
        yield good
        yield bad if epoch == 2 else good

    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(RunError, match=r"batch 2, the loss \(nan\) is no number; the model of epoch 1 is kept"):
        fit(model, optimizer, CONFIG, train=some, val=lambda: [good], keeper=kept)
    with pytest.raises(RunError, match=r"epoch 2, batch 2, the loss"):  # batches, not steps
        fit(model, optimizer, replace(CONFIG, accumulate=2), train=some, val=None, keeper=Kept())
    assert len(kept.history) == 1
    assert all(value.isfinite().all() for value in kept.state.values())


def test_weights_that_are_no_numbers_are_not_kept() -> None:
    """The last step of the second epoch breaks them: its loss was still a number."""
    model, kept = nn.Linear(2, 2), Kept()
    good = (torch.ones(2, 2), torch.tensor([0, 1]))

    def some(epoch: int) -> Iterator[Batch]:
        if epoch == 2:
            optimizer.param_groups[0]["lr"] = math.inf
        yield good

    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(RunError, match=r"after epoch 2 the weights.* no number; the model of epoch 1 is kept"):
        fit(model, optimizer, replace(CONFIG, val_fraction=0.0), train=some, val=None, keeper=kept)
    assert len(kept.history) == 1
    assert all(value.isfinite().all() for value in kept.state.values())


def test_a_checkpoint_of_another_network_is_refused() -> None:
    kept = Kept()
    train(kept)
    other = nn.Linear(5, 2)
    with pytest.raises(RunError, match="not of this training; remove it"):
        fit(other, torch.optim.Adam(other.parameters()), CONFIG, train=batches, val=None, keeper=kept)
