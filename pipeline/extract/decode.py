"""One video, from packets to motion rows and sampled frames, in one reading of its file.

Motion needs no pixels, and the encoder few frames. So the stream's own decoder reads the vectors of all frames and
leaves out what only pixels need (:data:`~moclip.pipeline.extract.gop.MOTION_ONLY`); a second decoder makes the
sampled frames, of the packets from the beginning of their GOP on (:class:`~moclip.pipeline.extract.seek.FrameSeeker`).
Where that does not pay, or anything about the stream is odd, one decoder does all, in the plain way. The values are
the same.
"""

from collections.abc import Iterable
from dataclasses import replace

import numpy as np

from moclip.pipeline.extract.decoding import DecodeConfig, DecodedVideo, Sink
from moclip.pipeline.extract.estimate import motion_source
from moclip.pipeline.extract.gop import MOTION_ONLY, numbers_frames
from moclip.pipeline.extract.passes import PlainPass, SkippingPass, Wanted
from moclip.pipeline.extract.seek import UnclearError
from moclip.pipeline.extract.video_file import PacketIndex, VideoFile, index_packets, open_video

#: A second decoder pays if it sees no more than this part of the packets: it costs 0.7 to 0.8 of a decoder that
#: exports vectors, and what the first leaves out saves 0.3 to 0.45 (``benchmarks/extract.py``).
WORTH = 0.5


class _Again(Exception):
    """The video has to be decoded anew: in the plain way, or knowing its number of frames."""

    def __init__(self, *, exact: bool, frames: int | None = None, estimate: bool = False) -> None:
        self.exact = exact
        self.frames = frames
        self.estimate = estimate


def decode_video(path: str, video_id: str, config: DecodeConfig, sink: Sink) -> DecodedVideo:
    """Decode ``path`` once; rows and frames go to ``sink``. :class:`VideoError` where nothing can be said of the video.

    Frames are sampled by the number of frames that the container promises. If another number decodes and the choice
    changes, or if something on the way makes skipping unsafe, the video is decoded again from its beginning.
    """
    exact, frames = config.exact, None
    while True:
        try:
            return _decode(path, video_id, config, sink, exact, frames)
        except _Again as again:
            exact, frames = exact or again.exact, again.frames if frames is None else frames
            if again.estimate:
                config = replace(config, motion="estimate")
            sink.restart()


def _decode(
    path: str, video_id: str, config: DecodeConfig, sink: Sink, exact: bool, frames: int | None
) -> DecodedVideo:
    with open_video(path) as video:
        asked, config = config.motion, replace(config, motion=motion_source(config.motion, video.codec))
        index = (video.index() or index_packets(path)) if config.frames else None
        wanted = Wanted(config, video, video_id)
        if index is not None:
            wanted.choose(index.frames if frames is None else frames)
        skipping = not exact and _pays(config, video, wanted, index)
        run = SkippingPass(video, config, sink, wanted, index) if skipping else PlainPass(video, config, sink, wanted)
        try:
            run.decode()
        except UnclearError as error:
            raise _Again(exact=True) from error
        if wanted.changes_with(run.frames):
            raise _Again(exact=False, frames=run.frames)
        if asked == "auto" and config.motion == "native" and run.without_vectors():
            raise _Again(exact=exact, frames=frames, estimate=True)
        return run.result()


def _pays(config: DecodeConfig, video: VideoFile, wanted: Wanted, index: PacketIndex | None) -> bool:
    """Whether a decoder that skips, and perhaps a second one, are less work than one that does everything."""
    if config.motion not in ("native", "none"):
        return False
    if index is None:
        return video.codec in MOTION_ONLY
    if not wanted.counts or not numbers_frames(video.codec, video.extradata):
        return False
    if config.motion == "none":
        return True
    return video.codec in MOTION_ONLY and _decoded_twice(wanted.counts, index) <= WORTH


def _decoded_twice(wanted: Iterable[int], index: PacketIndex) -> float:
    """The part of the packets that lies between the beginning of a GOP and the last frame wanted of it."""
    keyframes = np.array(index.keyframes)
    numbers = np.array(sorted(wanted), np.int64)
    begins = keyframes[np.searchsorted(keyframes, numbers, "right") - 1]
    last_of_gop = np.append(begins[1:] != begins[:-1], True)
    return float((numbers - begins + 1)[last_of_gop].sum() / index.frames)
