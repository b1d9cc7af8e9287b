"""The two ways through a video's packets: everything whole, or vectors and sampled frames alone."""

import itertools
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any, TypeVar

import av
import numpy as np

from moclip.errors import VideoError
from moclip.pipeline.extract.decoding import DecodeConfig, DecodedVideo, SampledFrame, Sink
from moclip.pipeline.extract.estimate import Estimator, motion_source
from moclip.pipeline.extract.gop import MOTION_ONLY, is_uncoded
from moclip.pipeline.extract.motion import Grid
from moclip.pipeline.extract.motion_rows import RowBuilder
from moclip.pipeline.extract.orientation import upright, upright_frame, upright_size
from moclip.pipeline.extract.reencode import Reencoder
from moclip.pipeline.extract.sampling import clip_id
from moclip.pipeline.extract.seek import FrameSeeker, UnclearError
from moclip.pipeline.extract.video_file import PacketIndex, VideoFile


class Wanted:
    """The frames that a policy chooses of each clip of a video, and how often each."""

    def __init__(self, config: DecodeConfig, video: VideoFile, video_id: str) -> None:
        self._policy = config.frames
        self._fps = video.fps
        self._id = video_id
        self.clip_frames = sys.maxsize
        if config.clip_seconds is not None:
            self.clip_frames = max(1, round(config.clip_seconds * video.fps))
        self._cut = config.clip_seconds is not None
        self.counts: Counter[int] = Counter()

    def choose(self, frames: int) -> None:
        """Choose among so many frames."""
        self.counts = self._chosen(frames)

    def changes_with(self, frames: int) -> bool:
        """Whether the choice among so many frames is another one."""
        return self._chosen(frames) != self.counts

    def _chosen(self, frames: int) -> Counter[int]:
        chosen: Counter[int] = Counter()
        for clip, start in enumerate(range(0, frames, self.clip_frames)):
            if self._policy is not None:
                length = min(self.clip_frames, frames - start)
                name = clip_id(self._id, clip) if self._cut else self._id
                chosen.update((start + self._policy.indices(length, self._fps, name)).tolist())
        return chosen


class _Pass:
    """What both ways of decoding share: counting, sampling, and rows of motion."""

    #: Whether every frame is decoded, so that every broken one shows.
    sees_all = True

    def __init__(self, video: VideoFile, config: DecodeConfig, sink: Sink, wanted: Wanted) -> None:
        self.video = video
        self.config = config
        self.wanted = wanted
        self.frames = self.corrupt = 0
        self.size = video.size
        self._sink = sink
        self._builder: RowBuilder | None = None
        self._first_s = self._last_s = 0.0

    def result(self) -> DecodedVideo:
        if self.frames == 0:
            raise VideoError("truncated", f"no frame of the {self.video.codec} stream decodes")
        width, height = upright_size(self.size, self.video.rotation)
        return DecodedVideo(
            codec=self.video.codec,
            width=width,
            height=height,
            fps=self.video.fps,
            frames=self.frames,
            clip_frames=self.wanted.clip_frames,
            duration_s=max(self.frames / self.video.fps, self._last_s - self._first_s),
            corrupt_frames=self.corrupt if self.sees_all else None,
            motion_source=motion_source(self.config.motion, self.video.codec),
            motion_error=self._motion_error(),
        )

    def see(self, seconds: float) -> None:
        """Count a frame."""
        self._first_s = seconds if self.frames == 0 else self._first_s
        self._last_s = seconds
        self.frames += 1

    def sample(self, frame: av.VideoFrame, number: int) -> None:
        rgb = upright(frame.to_ndarray(format="rgb24").astype(np.uint8, copy=False), self.video.rotation)
        clip, index = divmod(number, self.wanted.clip_frames)
        sampled = SampledFrame(clip, index, self.video.seconds(frame, number), rgb)
        for _ in range(self.wanted.counts[number]):
            self._sink.frame(sampled)

    def add_row(self, frame: av.VideoFrame, size: tuple[int, int], seconds: float, rotation: int = 0) -> None:
        """Take the vectors of a frame of ``size`` that is to be turned by ``rotation``."""
        if self._builder is None:
            config = self.config
            self._builder = RowBuilder(
                Grid(*upright_size(size, rotation), config.cell),
                rotation=rotation,
                window=config.window if config.accumulate else None,
                stride=config.stride,
                clip_frames=self.wanted.clip_frames,
                emit=self._sink.rows,
            )
        self._builder.add(frame, int(frame.pict_type), seconds)

    def finish_rows(self) -> None:
        if self._builder is not None:
            self._builder.finish()

    def without_vectors(self) -> bool:
        """Whether there are frames that could have vectors, and none of them has."""
        return self.frames > 1 and not (self._builder and self._builder.carried)

    def _motion_error(self) -> VideoError | None:
        # An estimate without vectors says that nothing moves.
        if self.config.motion != "native" or not self.without_vectors():
            return None
        return VideoError(
            "no_vectors",
            f"the {self.video.codec} decoder gave no motion vectors in {self.frames} frames; "
            "use --motion auto or estimate, or --motion none for the embedding alone",
        )


_REENCODERS: dict[str, type[Reencoder]] = {"mpeg4": Reencoder, "estimate": Estimator}


class PlainPass(_Pass):
    """One decoder, every frame whole; what does not decode is counted and passed over."""

    def decode(self) -> None:
        reencoder = _REENCODERS[self.config.motion]() if self.config.motion in _REENCODERS else None
        times: list[float] = []
        for frame in self._decoded():
            self._check_size(frame)
            number, seconds = self.frames, self.video.seconds(frame, self.frames)
            self.corrupt += bool(frame.is_corrupt)
            self.see(seconds)
            # Before the re-encoder, which sets the frame's time to its own.
            if number in self.wanted.counts:
                self.sample(frame, number)
            if self.config.motion == "native":
                self.add_row(frame, self.size, seconds, self.video.rotation)
            elif reencoder is not None:
                times.append(seconds)
                self._add_again(reencoder.feed(upright_frame(frame, self.video.rotation)), times)
        if reencoder is not None and self.frames:
            self._add_again(reencoder.feed(None), times)
        self.finish_rows()

    def _decoded(self) -> Iterator[av.VideoFrame]:
        context = self.video.decoder({"flags2": "+export_mvs"} if self.config.motion == "native" else {})
        for packet in itertools.chain(self.video.packets(), [None]):
            try:
                yield from context.decode(packet)
            except av.error.FFmpegError:
                self.corrupt += 1

    def _add_again(self, frames: Iterable[av.VideoFrame], times: list[float]) -> None:
        for frame in frames:
            self.add_row(frame, (frame.width, frame.height), times.pop(0))

    def _check_size(self, frame: av.VideoFrame) -> None:
        size = (frame.width, frame.height)
        if self.frames == 0:
            self.size = size
        elif size != self.size:
            raise VideoError(
                "resolution_changed",
                f"frame {self.frames} is {size[0]}x{size[1]}, those before it {self.size[0]}x{self.size[1]}",
            )


class SkippingPass(_Pass):
    """Vectors from a decoder that leaves pixels out, frames from one that decodes only their GOPs.

    Raises :class:`UnclearError` unless every packet is one sound frame, or uncoded: then frame n is that of plain
    decoding.
    """

    def __init__(
        self, video: VideoFile, config: DecodeConfig, sink: Sink, wanted: Wanted, index: PacketIndex | None
    ) -> None:
        super().__init__(video, config, sink, wanted)
        self._seeker = FrameSeeker(video, sorted(wanted.counts), index) if index else None
        self._decoder: Any = None
        self.sees_all = config.motion != "none"
        if config.motion != "none":
            # Concealing an error looks at pixels: the plain pass does that.
            options = {"flags2": "+export_mvs", "err_detect": "explode", **MOTION_ONLY[video.codec]}
            self._decoder = video.decoder(options)
            self._lowres = int(options.get("lowres", 0))

    def decode(self) -> None:
        packets = coded = 0
        for packet, following in _with_next(self.video.packets()):
            packets += 1
            coded += not is_uncoded(self.video.codec, packet.size)
            if packet.is_corrupt or packet.is_discard:
                raise UnclearError
            if self._seeker is not None:
                for number, frame in self._seeker.feed(packet, following):
                    self.sample(frame, number)
            if self._decoder is not None:
                self._read_vectors(packet)
            elif not is_uncoded(self.video.codec, packet.size):
                self._see_packet(packet)
        if self._seeker is not None:
            for number, frame in self._seeker.finish():
                self.sample(frame, number)
        if self._decoder is not None:
            self._read_vectors(None)
        self.finish_rows()
        # In a packed stream the placeholders are frames.
        if self.frames == 0 or (self.frames != coded and (self._seeker or self.frames != packets)):
            raise UnclearError

    def _see_packet(self, packet: Any) -> None:
        """Count a frame that is not decoded. Packets do not come in display order."""
        seconds = self.video.seconds(packet, self.frames)
        first, last = (seconds, seconds) if self.frames == 0 else (self._first_s, self._last_s)
        self.see(seconds)
        self._first_s, self._last_s = min(first, seconds), max(last, seconds)

    def _read_vectors(self, packet: Any) -> None:
        try:
            frames = self._decoder.decode(packet)
        except av.error.FFmpegError as error:
            raise UnclearError from error
        for frame in frames:
            if frame.is_corrupt or (frame.width, frame.height) != self._shown_size():
                raise UnclearError
            seconds = self.video.seconds(frame, self.frames)
            self.see(seconds)
            self.add_row(frame, self.size, seconds, self.video.rotation)

    def _shown_size(self) -> tuple[int, int]:
        """The size of a picture that was decoded at a fraction of it."""
        width, height = self.size
        return -(-width >> self._lowres), -(-height >> self._lowres)


_Item = TypeVar("_Item")


def _with_next(items: Iterable[_Item]) -> Iterator[tuple[_Item, _Item | None]]:
    """Each item with the one after it, the last with None."""
    before: list[_Item] = []
    for item in items:
        if before:
            yield before.pop(), item
        before.append(item)
    if before:
        yield before.pop(), None
