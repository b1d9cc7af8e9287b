"""The training loop, the same for every model, read from top to bottom."""

import math
import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from typing import Any, Protocol

import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.optim.lr_scheduler import LambdaLR

from moclip.errors import RunError
from moclip.pipeline.learn.training import Training

#: What a model takes, and targets, both on its device.
Batch = tuple[Any, torch.Tensor]
State = dict[str, torch.Tensor]

#: Seconds between checkpoints: epochs that take less are trained again after a kill, with the same result.
CHECKPOINT_SECONDS = 20.0


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
#: Told of each step: the epoch, and in words how far it is.
OnStep = Callable[[int, str], None]


@dataclass(frozen=True)
class Snapshot:
    """All that a training needs to go on after an epoch as if nothing had happened.

    Batches are functions of seed and epoch; ``random`` is the state of torch's own generators (dropout), that of the
    CPU and, if it trains on one, that of the GPU.
    """

    model: State
    optimizer: dict[str, object]
    random: list[torch.Tensor]
    history: list[EpochRow]
    best: int
    best_state: State


class Keeper(Protocol):
    """Where a training leaves what it comes to."""

    def keep(self, state: State, history: Sequence[EpochRow]) -> None:
        """The weights of the best epoch, and all epochs so far."""

    def save(self, snapshot: Snapshot) -> None:
        """What it takes to go on from here."""

    def saved(self) -> Snapshot | None:
        """What was saved last, by this training or by one before it that broke off."""


@dataclass(frozen=True)
class Fitted:
    """What a training came to: the model now holds the state of epoch ``best``."""

    history: tuple[EpochRow, ...]
    best: EpochRow


def fit(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    config: Training,
    *,
    train: Callable[[int], Iterable[Batch]],
    val: Callable[[], Iterable[Batch]] | None,
    keeper: Keeper,
    on_epoch: OnEpoch = lambda _: None,
    on_step: OnStep = lambda *_: None,
) -> Fitted:
    """Train by cross-entropy, and end with the epoch that does best on ``val``, or with the last one without it.

    ``train(epoch)`` and ``val()`` give batches. A training that was broken off goes on from ``keeper``'s snapshot,
    with the result that it would have had. :class:`RunError` at the first loss that is not a number; the best epoch
    before it is kept.
    """
    device = next(model.parameters()).device
    history: list[EpochRow] = []
    best: EpochRow | None = None
    best_state: State = {}
    if snapshot := keeper.saved():
        try:
            model.load_state_dict(snapshot.model)
            optimizer.load_state_dict(snapshot.optimizer)
            _set_random_state(snapshot.random, device)
            history, best_state = list(snapshot.history), snapshot.best_state
            best = history[snapshot.best]
        except (RuntimeError, ValueError, LookupError, TypeError) as error:
            raise RunError("checkpoint.pt is not of this training; remove it to train from the start") from error

    def no_number(what: str) -> RunError:
        """Keep what was good before."""
        if best:
            keeper.keep(best_state, history)
        good = f"the model of epoch {best.epoch} is kept, and can be evaluated" if best else "no epoch was finished"
        return RunError(f"{what} no number; {good}; lower the lr ({lr:g}) and give another --out, or remove this one")

    schedule = LambdaLR(optimizer, lambda done: 0.1 ** sum(done >= m for m in config.milestones), len(history) - 1)
    saved_at = time.monotonic()

    for epoch in range(len(history) + 1, config.epochs + 1):
        if best and config.patience and epoch - best.epoch > config.patience:
            break
        started = time.perf_counter()
        lr = float(optimizer.param_groups[0]["lr"])
        model.train()
        total, seen = 0.0, 0
        number = 0
        for batches in _groups(train(epoch), config.accumulate):
            clips = sum(len(targets) for _, targets in batches)
            optimizer.zero_grad(set_to_none=True)
            for inputs, targets in batches:
                number += 1
                with torch.autocast(device.type, torch.bfloat16, enabled=config.bfloat16):
                    logits = model(inputs)
                loss = cross_entropy(logits.float(), targets, reduction="sum") / clips
                value = float(loss.detach())
                if not math.isfinite(value):
                    raise no_number(f"at epoch {epoch}, batch {number}, the loss ({value}) is")
                loss.backward()  # type: ignore[no-untyped-call]
                total, seen = total + value * clips, seen + len(targets)
            optimizer.step()
            on_step(epoch, f"{seen} clips · loss {total / seen:.3f}")
        schedule.step()

        val_loss, val_top1 = validate(model, val()) if val else (None, None)
        if not _is_finite(model.state_dict()) or (val_loss is not None and not math.isfinite(val_loss)):
            raise no_number(f"after epoch {epoch} the weights, or the loss on what is held out, are")
        row = EpochRow(epoch, total / seen, val_loss, val_top1, time.perf_counter() - started, lr)
        history.append(row)
        if best is None or _beats(row, best, first_of_equals=config.strict_reference):
            best = row
            best_state = _copied(model.state_dict())
        if epoch == config.epochs or time.monotonic() - saved_at >= CHECKPOINT_SECONDS:
            state, chosen = _copied(model.state_dict()), history.index(best)
            random = _random_state(device)
            keeper.save(Snapshot(state, optimizer.state_dict(), random, history, chosen, best_state))
            saved_at = time.monotonic()
        on_epoch(row)
    assert best is not None
    keeper.keep(best_state, history)
    model.load_state_dict(best_state)
    model.eval()
    return Fitted(tuple(history), best)


def _is_finite(state: State) -> bool:
    return all(bool(value.isfinite().all()) for value in state.values() if value.is_floating_point())


def _groups(batches: Iterable[Batch], size: int) -> Iterator[list[Batch]]:
    """The batches of one step each."""
    left = iter(batches)
    while group := list(islice(left, size)):
        yield group


def _copied(state: State) -> State:
    return {name: value.detach().cpu().clone() for name, value in state.items()}


def _random_state(device: torch.device) -> list[torch.Tensor]:
    on_gpu = [torch.cuda.get_rng_state(device)] if device.type == "cuda" else []
    return [torch.get_rng_state(), *on_gpu]


def _set_random_state(states: list[torch.Tensor], device: torch.device) -> None:
    torch.set_rng_state(states[0])
    if device.type == "cuda" and len(states) > 1:
        torch.cuda.set_rng_state(states[1], device)


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


def _beats(row: EpochRow, best: EpochRow, *, first_of_equals: bool) -> bool:
    """Whether to choose ``row`` over ``best``: by accuracy, then by loss or (as published) by which came first."""
    if row.val_loss is None or row.val_top1 is None or best.val_loss is None or best.val_top1 is None:
        return True
    if first_of_equals:
        return row.val_top1 > best.val_top1
    return (row.val_top1, -row.val_loss) > (best.val_top1, -best.val_loss)


@contextmanager
def seeded(seed: int, *, deterministic: bool = False) -> Iterator[None]:
    """torch's random numbers start from ``seed`` inside, and are as they were afterwards.

    ``deterministic`` makes torch choose, inside, only algorithms that always give the same numbers.
    """
    before = torch.are_deterministic_algorithms_enabled()
    if deterministic:
        # cuBLAS reads this when it starts.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(deterministic or before)
    try:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            yield
    finally:
        torch.use_deterministic_algorithms(before)


@contextmanager
def one_thread() -> Iterator[None]:
    """For small networks: threads that wait for each other cost more than they bring, most of all on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
