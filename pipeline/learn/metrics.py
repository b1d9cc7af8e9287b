"""How good scores are: the numbers of an evaluation and the predictions behind them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import torch
from torchmetrics.functional.classification import (
    multiclass_calibration_error,
)

from moclip.errors import RunError
from moclip.pipeline.learn.clips import Clips


@dataclass(frozen=True)
class ClassScore:
    """How many clips of one class were tested, and the share that was right (None without clips)."""

    n: int
    accuracy: float | None


@dataclass(frozen=True)
class Metrics:
    """Accuracies are shares in [0, 1]. ``confusion[i][j]`` counts clips of class i called class j.

    ``mean_class_accuracy`` averages over the classes with clips, ``top5`` is top-k with k = min(5, classes).
    ``calibration_error`` is the expected one (arXiv 1706.04599, 15 bins): how far, on average, a prediction's
    probability is from the share of such predictions that are right. ``missing`` counts labelled clips without the
    features, by reason; they are in none of the numbers.
    """

    split: str
    protocol: str
    clips: int
    top1: float
    top5: float
    mean_class_accuracy: float
    calibration_error: float
    per_class: Mapping[str, ClassScore]
    confusion: tuple[tuple[int, ...], ...]
    missing: Mapping[str, int]

    def most_confused(self, most: int = 5) -> list[tuple[str, str, int]]:
        """Pairs of a class and the other one that its clips are called, with how many, the most first."""
        names = list(self.per_class)
        pairs = [
            (names[i], names[j], n) for i, row in enumerate(self.confusion) for j, n in enumerate(row) if n and i != j
        ]
        return sorted(pairs, key=lambda pair: (-pair[2], pair))[:most]


@dataclass(frozen=True)
class Evaluation:
    """Metrics, and a table of id, label, predicted and scores (softmax, one a class of the run, in its order)."""

    metrics: Metrics
    predictions: pa.Table


def score(
    logits: torch.Tensor,
    clips: Clips,
    classes: Sequence[str],
    *,
    split: str,
    protocol: str,
    missing: Mapping[str, int],
) -> Evaluation:
    """Logits (n, classes) of ``clips``, whose targets are positions in ``classes``, as an evaluation."""
    logits, targets = logits.detach().float().cpu(), torch.from_numpy(clips.targets)
    if not logits.isfinite().all():
        lost = int((~logits.isfinite().all(1)).sum())
        raise RunError(
            f"the model's scores of {lost} of {len(logits)} test clips are no numbers; "
            "if it was trained just now, lower the lr and give another --out, or remove this run"
        )
    count = len(classes)
    predicted = logits.argmax(1)
    confusion = torch.bincount(targets * count + predicted, minlength=count**2).view(count, count)
    tested = confusion.sum(1)
    accuracy = confusion.diagonal() / tested.clamp(min=1)
    metrics = Metrics(
        split=split,
        protocol=protocol,
        clips=len(clips),
        top1=float(confusion.trace() / len(clips)),
        top5=float((logits.topk(min(5, count)).indices == targets[:, None]).sum() / len(clips)),
        mean_class_accuracy=float(accuracy[tested > 0].mean()),
        calibration_error=_calibration_error(logits, targets),
        per_class={
            name: ClassScore(int(n), float(share) if n else None)
            for name, n, share in zip(classes, tested, accuracy, strict=True)
        },
        confusion=tuple(tuple(row) for row in confusion.tolist()),
        missing=missing,
    )
    table = pa.table(
        {
            "id": pa.array(clips.ids, pa.string()),
            "label": pa.array([classes[t] for t in clips.targets], pa.string()),
            "predicted": pa.array([classes[p] for p in predicted.tolist()], pa.string()),
            "scores": _lists(logits.softmax(1)),
        }
    )
    return Evaluation(metrics, table)


def by_name(clips: Clips, names: Sequence[str], classes: Sequence[str]) -> Clips:
    """Clips whose targets are positions in ``names``, with positions in a run's ``classes`` instead."""
    unknown = sorted(set(names) - set(classes))
    if unknown:
        raise RunError(f"the run knows no class {', '.join(unknown)}; its classes are: {', '.join(classes)}")
    position = np.array([list(classes).index(name) for name in names], np.int64)
    return Clips(clips.ids, position[clips.targets])


def _calibration_error(logits: torch.Tensor, targets: torch.Tensor) -> float:
    if logits.shape[1] == 1:  # the only class is certain, and right
        return 0.0
    found = multiclass_calibration_error(logits.softmax(1), targets, num_classes=logits.shape[1], n_bins=15, norm="l1")
    return float(found)


def _lists(rows: torch.Tensor) -> pa.Array:
    offsets = pa.array(np.arange(len(rows) + 1, dtype=np.int32) * rows.shape[1])
    return pa.ListArray.from_arrays(offsets, pa.array(rows.numpy().ravel(), pa.float32()))
