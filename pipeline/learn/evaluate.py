"""Testing a trained run: protocols, and one way in for every kind of run."""

import logging
import re
from dataclasses import astuple, dataclass
from pathlib import Path

from moclip.errors import RunError
from moclip.pipeline.learn.fusion import evaluate_head
from moclip.pipeline.learn.metrics import Evaluation
from moclip.pipeline.learn.run_writer import write_evaluation
from moclip.pipeline.learn.runs import Run, load_run
from moclip.pipeline.learn.tsn import evaluate_tsn
from moclip.pipeline.learn.views import CROPS
from moclip.pipeline.learn.zeroshot import evaluate_zeroshot
from moclip.store import open_store

log = logging.getLogger(__name__)

_EXPECTED = "expected SEGMENTSxCROPS with 1, 2, 5 or 10 crops, such as 25x10"


@dataclass(frozen=True)
class Protocol:
    """Segments and crops: ``25x10``, ``32x1``.

    1 crop is the centre, 2 are it and its mirror image, 5 the corners and the centre, 10 those and their mirror images.
    """

    segments: int = 25
    crops: int = 1

    def __post_init__(self) -> None:
        if self.segments < 1 or self.crops not in CROPS:
            raise RunError(f"no protocol {self}; {_EXPECTED}")

    def __str__(self) -> str:
        return f"{self.segments}x{self.crops}"

    @classmethod
    def parse(cls, text: str) -> "Protocol":
        match = re.fullmatch(r"(\d+)x(\d+)", text)
        if match is None:
            raise RunError(f"no protocol {text!r}; {_EXPECTED}")
        return cls(int(match[1]), int(match[2]))


def evaluate_run(
    run: str | Path,
    store_path: str | Path,
    *,
    split: str | None = None,
    protocol: str | None = None,
    device: str = "auto",
) -> Evaluation:
    """Test a run on the test side of ``split`` (its own if None), and keep what is found in the run if it is finished.

    Without ``protocol`` an MV-TSN is tested by 25x1, and a fusion by what that pooled. A probe and a zero-shot run see
    images alone, and have none.
    """
    loaded = load_run(run)
    if not loaded.finished:
        if not loaded.has_weights:
            raise RunError(f"{loaded.path} is unfinished, and no epoch's model is there; train it again")
        log.warning("%s is unfinished: this tests the best of its epochs so far, and is not kept", loaded.path)
    store = open_store(store_path)
    asked = Protocol.parse(protocol) if protocol else None
    if asked and loaded.kind not in ("tsn", "fusion"):
        raise RunError(f"{loaded.path} is a {loaded.kind}: it sees images alone and has no protocol {protocol}")
    if loaded.kind == "zeroshot":
        found = evaluate_zeroshot(loaded, store, split or loaded.config.get("split"))
    elif loaded.kind == "tsn":
        segments, crops = astuple(asked or Protocol())
        found = evaluate_tsn(loaded, store, split or loaded.split, segments=segments, crops=crops, device=device)
    else:
        views = astuple(asked) if asked else None
        found = evaluate_head(loaded, store, split or loaded.split, protocol=views, device=device)
    _warn_of_overlap(loaded, found)
    if loaded.finished:  # what an unfinished run says is not what it will say
        write_evaluation(loaded, found)
    return found


def _warn_of_overlap(run: Run, found: Evaluation) -> None:
    """Say so if tested clips are clips that the run was trained on, or its epoch chosen by."""
    tested = found.predictions["id"].to_pylist()
    seen = len(run.trained_on() & set(tested))
    if seen:
        log.warning(
            "%d of the %d test clips of split %r were training clips of %s: the accuracy is too good",
            seen, len(tested), found.metrics.split, run.path,
        )  # fmt: skip
