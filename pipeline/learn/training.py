"""What every training is told, whatever it trains."""

import math
from dataclasses import dataclass

from moclip.errors import RunError


@dataclass(frozen=True)
class Training:
    """The part of a configuration that all models share.

    ``val_fraction`` of train is held out to choose the epoch; with 0 the last one is taken. The rate is divided by
    ten when each of ``lr_drops``, shares of the epochs, is done. Gradients of ``accumulate`` batches make one step.
    ``bfloat16`` computes in mixed precision. A training stops when ``patience`` epochs in a row were no better on what
    is held out; 0 lets it go on. ``deterministic`` makes a GPU give the same numbers each time, at some cost; a CPU
    does so anyway. ``strict_reference`` repeats the defects of the published code that can move a result.
    """

    split: str
    batch: int = 64
    epochs: int = 100
    lr: float = 1e-4
    weight_decay: float = 1e-4
    lr_drops: tuple[float, ...] = ()
    accumulate: int = 1
    bfloat16: bool = False
    patience: int = 0
    deterministic: bool = False
    strict_reference: bool = False
    val_fraction: float = 0.15
    seed: int = 0
    device: str = "auto"

    def __post_init__(self) -> None:
        for name in ("batch", "epochs", "lr", "accumulate"):
            if not 0 < getattr(self, name) < math.inf:
                raise RunError(f"{name} is {getattr(self, name)}; it must be positive")
        if not all(0 < share < 1 for share in self.lr_drops):
            raise RunError(f"lr_drops is {self.lr_drops}; they are shares of the epochs, such as (0.4, 0.8)")
        for name in ("weight_decay", "patience", "seed"):
            if not 0 <= getattr(self, name) < math.inf:
                raise RunError(f"{name} is {getattr(self, name)}; it must not be negative")
        if not 0 <= self.val_fraction < 1:
            raise RunError(f"val_fraction is {self.val_fraction}; it must be at least 0 and below 1")
        if self.strict_reference and self.val_fraction:
            raise RunError("the published code chooses the epoch on test; strict_reference needs a val_fraction of 0")
        if self.patience and not (self.val_fraction or self.strict_reference):
            raise RunError("patience needs a held-out part to look at; give a val_fraction, or a patience of 0")

    @property
    def milestones(self) -> tuple[int, ...]:
        """The epochs after which the rate drops."""
        return tuple(round(share * self.epochs) for share in self.lr_drops)
