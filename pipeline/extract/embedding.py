"""Images through a frozen encoder, in batches that cross the borders between videos."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt

from moclip.errors import EncoderError, VideoError
from moclip.pipeline.backbones import Encoder, EncoderConfig, load_encoder
from moclip.store import FeatureSpec, ShardWriter, SourceFacts, limit_threads

#: How many images go through the encoder at once.
ENCODE_BATCH = 32


@lru_cache(maxsize=1)
def worker_encoder(config: EncoderConfig, device: str = "auto") -> Encoder:
    """One model a process, loaded once; ``auto`` is a GPU where there is one."""
    import torch

    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    return load_encoder(config, device)


def cap_threads(threads: int, *, encoding: bool) -> None:
    """More threads than cores, over all workers, make every one of them slower."""
    limit_threads(threads)
    if encoding:
        import torch

        torch.set_num_threads(threads)


@dataclass(frozen=True)
class _Waiting:
    """A video whose entry is not written: how many of its images the encoder got, or what is wrong with it."""

    facts: SourceFacts
    images: int
    columns: Mapping[str, npt.ArrayLike]
    error: VideoError | None = None


class EmbeddingQueue:
    """Images of several videos wait here until they fill a batch; entries leave in the order of the videos.

    ``failed`` counts the failed entries so far.
    """

    def __init__(self, encoder: Encoder, spec: FeatureSpec, writer: ShardWriter) -> None:
        if encoder.weights_sha256 != spec.parameters["weights_sha256"]:
            raise EncoderError(f"the weights of {encoder.name} on this worker are not the coordinator's")
        self._encoder = encoder
        self._writer = writer
        self.failed = 0
        self._waiting: list[_Waiting] = []
        self._prepared: list[Any] = []
        self._rows = np.empty((0, encoder.dim), np.float16)

    def prepare(self, rgb: npt.NDArray[np.uint8]) -> Any:
        """An image, (H, W, 3), by the encoder's own preprocessing."""
        return self._encoder.prepare(rgb)

    def add(self, facts: SourceFacts, prepared: Iterable[Any], columns: Mapping[str, npt.ArrayLike]) -> None:
        """Take a video's prepared images and the columns of their rows.

        Images may be made as they are taken: a :class:`VideoError` on the way fails the video.
        """
        images, failure = 0, None
        try:
            for image in prepared:
                self._prepared.append(image)
                images += 1
                if len(self._prepared) == ENCODE_BATCH:
                    self._encode()
        except VideoError as error:
            failure = error
        self._waiting.append(_Waiting(facts, images, columns, failure))
        self._write_encoded()

    def fail(self, facts: SourceFacts, error: VideoError) -> None:
        self._waiting.append(_Waiting(facts, 0, {}, error))

    def flush(self) -> None:
        """Encode what waits, and write the entries of all videos."""
        if self._prepared:
            self._encode()
        self._write_encoded()

    def _encode(self) -> None:
        import torch

        with np.errstate(over="ignore"):
            rows = self._encoder.encode(torch.stack(self._prepared)).astype(np.float16)
        self._rows = np.concatenate([self._rows, rows])
        self._prepared = []

    def _write_encoded(self) -> None:
        while self._waiting and self._waiting[0].images <= len(self._rows):
            video = self._waiting.pop(0)
            rows, self._rows = np.split(self._rows, [video.images])
            self._write(video, rows)

    def _write(self, video: _Waiting, rows: npt.NDArray[np.float16]) -> None:
        """Close a video. A value that is not finite fails it."""
        error = video.error
        if error is None and not np.isfinite(rows).all():
            error = VideoError("not_finite", "the encoder gave a value that float16 cannot hold")
        if error is None:
            self._writer.append(rows, **video.columns)
            self._writer.ok(video.facts)
        else:
            self._writer.fail(video.facts, error.reason, error.detail)
            self.failed += 1
