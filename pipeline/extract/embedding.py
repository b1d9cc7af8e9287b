"""Images through a frozen encoder, in batches that cross the borders between videos: here, or in another process."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt

from moclip.errors import EncoderError, VideoError
from moclip.pipeline.backbones import Encoder, EncoderConfig, load_encoder
from moclip.pipeline.extract.tasks import Progress
from moclip.store import FeatureSpec, ShardWriter, SourceFacts, limit_threads


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
class ClosedVideo:
    """A video whose images are all there, and whose entry is not written: how many of the images before it are its own.

    Without ``facts``, those images are of nothing.
    """

    images: int
    facts: SourceFacts | None = None
    columns: Mapping[str, npt.ArrayLike] = field(default_factory=dict)
    error: VideoError | None = None


@dataclass(frozen=True)
class Images:
    """A shard's images on their way from who decodes to who encodes: (n, 3, S, S), prepared, and what they are of.

    ``decoded`` is what has been done for them.
    """

    prepared: npt.NDArray[Any]
    videos: tuple[ClosedVideo, ...]
    decoded: Progress


class ImageTaker(ABC):
    """Takes videos' images: first a video's images, as many as there are, and then what they are of.

    ``failed`` counts the failed entries so far.
    """

    def __init__(self) -> None:
        self.failed = 0
        self._open = 0

    @abstractmethod
    def prepare(self, rgb: npt.NDArray[np.uint8]) -> Any:
        """An image, (H, W, 3), by the encoder's own preprocessing."""

    @abstractmethod
    def _take(self, image: Any) -> None: ...

    @abstractmethod
    def end(self, video: ClosedVideo) -> None:
        """Take what the images before are of."""

    def add(self, image: Any) -> None:
        """Take the current video's next image, as it was prepared."""
        self._take(image)
        self._open += 1

    def close(self, facts: SourceFacts, columns: Mapping[str, npt.ArrayLike], images: int | None = None) -> None:
        """End the current video, or its first ``images`` as a video of their own."""
        self._end(ClosedVideo(self._open if images is None else images, facts, columns))

    def fail(self, facts: SourceFacts, error: VideoError) -> None:
        """End the current video as failed; its images count for nothing."""
        self.failed += 1
        self._end(ClosedVideo(self._open, facts, error=error))

    def restart(self) -> None:
        """Forget the images of the current video."""
        self._end(ClosedVideo(self._open))

    def _end(self, video: ClosedVideo) -> None:
        self._open -= video.images
        self.end(video)


class ImageCollector(ImageTaker):
    """Keeps images for an encoder in another process. ``shape`` is the encoder's preprocessing."""

    def __init__(self, shape: Callable[[npt.NDArray[np.uint8]], Any]) -> None:
        super().__init__()
        self._shape = shape
        self._prepared: list[Any] = []
        self._videos: list[ClosedVideo] = []

    def prepare(self, rgb: npt.NDArray[np.uint8]) -> Any:
        return self._shape(rgb).numpy()

    def _take(self, image: Any) -> None:
        self._prepared.append(image)

    def end(self, video: ClosedVideo) -> None:
        self._videos.append(video)

    def collected(self, decoded: Progress) -> Images:
        """All of them; ``decoded`` is what was done for them."""
        prepared = np.stack(self._prepared) if self._prepared else np.zeros((0, 3, 1, 1), np.uint8)
        return Images(prepared, tuple(self._videos), decoded)


class EmbeddingQueue(ImageTaker):
    """Images of several videos wait here until they fill a batch; entries leave in the order of the videos."""

    def __init__(self, encoder: Encoder, spec: FeatureSpec, writer: ShardWriter) -> None:
        super().__init__()
        if encoder.weights_sha256 != spec.parameters["weights_sha256"]:
            raise EncoderError(f"the weights of {encoder.name} on this worker are not the coordinator's")
        self._encoder = encoder
        self._writer = writer
        self._closed: list[ClosedVideo] = []
        self._prepared: list[Any] = []
        self._rows = np.empty((0, encoder.dim), np.float16)

    def prepare(self, rgb: npt.NDArray[np.uint8]) -> Any:
        return self._encoder.prepare(rgb)

    def _take(self, image: Any) -> None:
        self._prepared.append(image)
        if len(self._prepared) == self._encoder.batch:
            self._encode()

    def end(self, video: ClosedVideo) -> None:
        self._closed.append(video)
        self._write_encoded()

    def take_all(self, images: Images) -> None:
        """Take what was collected elsewhere, and write the entries."""
        import torch

        for image in torch.from_numpy(images.prepared):
            self._take(image)
        for video in images.videos:
            self.end(video)
        self.flush()

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
        while self._closed and self._closed[0].images <= len(self._rows):
            video = self._closed.pop(0)
            rows, self._rows = np.split(self._rows, [video.images])
            if video.facts is not None:
                self._write(video.facts, video, rows)

    def _write(self, facts: SourceFacts, video: ClosedVideo, rows: npt.NDArray[np.float16]) -> None:
        """Write a video's entry. A value that is not finite fails it."""
        error = video.error
        if error is None and not np.isfinite(rows).all():
            error = VideoError("not_finite", "the encoder gave a value that float16 cannot hold")
            self.failed += 1
        if error is None:
            self._writer.append(rows, **video.columns)
            self._writer.ok(facts)
        else:
            self._writer.fail(facts, error.reason, error.detail)
