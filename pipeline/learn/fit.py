"""The training loop, the same for every model, read from top to bottom."""

import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn.functional import cross_entropy

from moclip.errors import RunError

#: Inputs and targets, both on the model's device.
Batch = tuple[torch.Tensor, torch.Tensor]
State = dict[str, torch.Tensor]


@dataclass(frozen=True)
class EpochRow:
    """One line of a run's history. The validation columns are None where nothing is held out."""

    epoch: int
    train_loss: float
    val_loss: float | None
    val_top1: float | None
    seconds: float
    lr: float


OnEpoch = Callable[[EpochRow], None]


@dataclass(frozen=True)
class Fitted:
    """What a training came to: the model now holds the state of epoch ``best``."""

    history: tuple[EpochRow, ...]
    best: EpochRow


def fit(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    *,
    epochs: int,
    milestones: Sequence[int] = (),
    train: Callable[[int], Iterable[Batch]],
    val: Callable[[], Iterable[Batch]] | None,
    keep: Callable[[State], None],
    on_epoch: OnEpoch,
) -> Fitted:
    """Train by cross-entropy, and end with the epoch that does best on ``val``, or with the last one
    without it.

    ``train(epoch)`` and ``val()`` give batches. The learning rate is divided by ten after each epoch count of
    ``milestones``. ``keep`` gets every state that beats those before it, so a training that breaks off has
    left its last good one. :class:`RunError` at the first loss that is not a number.
    """
    schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, list(milestones), gamma=0.1)
    history: list[EpochRow] = []
    best: EpochRow | None = None
    best_state: State = {}
    for epoch in range(1, epochs + 1):
        started = time.perf_counter()
        lr = float(optimizer.param_groups[0]["lr"])
        model.train()
        total, seen = 0.0, 0
        for number, (inputs, targets) in enumerate(train(epoch), start=1):
            loss = cross_entropy(model(inputs), targets)
            value = float(loss.detach())
            if not math.isfinite(value):
                good = f"the model of epoch {best.epoch} is kept" if best else "no epoch was finished"
                raise RunError(f"the loss is {value} at epoch {epoch}, batch {number}; {good}; lower the lr ({lr:g})")
            optimizer.zero_grad(set_to_none=True)
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            total, seen = total + value * len(targets), seen + len(targets)
        schedule.step()

        val_loss, val_top1 = validate(model, val()) if val else (None, None)
        row = EpochRow(epoch, total / seen, val_loss, val_top1, time.perf_counter() - started, lr)
        if best is None or _beats(row, best):
            best = row
            best_state = {name: value.detach().cpu().clone() for name, value in model.state_dict().items()}
            keep(best_state)
        history.append(row)
        on_epoch(row)
    assert best is not None
    model.load_state_dict(best_state)
    model.eval()
    return Fitted(tuple(history), best)


def validate(model: nn.Module, batches: Iterable[Batch]) -> tuple[float, float]:
    """Mean loss and top-1 accuracy, in eval mode."""
    model.eval()
    total, right, seen = 0.0, 0, 0
    with torch.inference_mode():
        for inputs, targets in batches:
            logits = model(inputs)
            total += float(cross_entropy(logits, targets, reduction="sum"))
            right += int((logits.argmax(1) == targets).sum())
            seen += len(targets)
    return total / seen, right / seen


def _beats(row: EpochRow, best: EpochRow) -> bool:
    if row.val_loss is None or row.val_top1 is None or best.val_loss is None or best.val_top1 is None:
        return True
    return (row.val_top1, -row.val_loss) > (best.val_top1, -best.val_loss)


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """torch's random numbers start from ``seed`` inside, and are as they were afterwards."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        yield


@contextmanager
def one_thread() -> Iterator[None]:
    """For small networks: threads that wait for each other cost more than they bring, most of all on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
