"""Where decoding may begin: packets of which no frame before them in display order needs anything after, nor the
other way round. Read from the bitstream, since containers mark open and closed GOPs alike.
"""

import re
from collections.abc import Callable, Iterator, Mapping

#: What a decoder of motion may leave out, since it touches pixels and never vectors: the loop filter of H.264; of
#: MPEG-4, seven eighths of the picture's width and height, in the inverse transform and in motion compensation.
MOTION_ONLY: Mapping[str, Mapping[str, str]] = {
    "h264": {"skip_loop_filter": "all"},
    "mpeg4": {"lowres": "3"},
}

#: MPEG-4 has packets without a picture in them: the frame before is to be shown on. They have no room for more.
_MOST_UNCODED_BYTES = 8
#: What DivX writes of itself where a packet holds a P-VOP and its B-VOPs, and the next ones are placeholders.
_PACKED = re.compile(rb"DivX\d+[Bb]\d+p")
_START_CODE = b"\0\0\1"


def begins_gop(codec: str, packet: bytes, following: bytes | None, extradata: bytes | None) -> bool:
    """Whether a packet that its container marks as a key frame begins a closed GOP."""
    closed = _CLOSED.get(codec)
    return closed is not None and closed(packet, following, extradata or b"")


def numbers_frames(codec: str, extradata: bytes | None) -> bool:
    """Whether :func:`begins_gop` can tell for this stream, and every packet is one frame or, if uncoded, none."""
    return codec in _CLOSED and not (codec == "mpeg4" and _PACKED.search(extradata or b""))


def is_uncoded(codec: str, packet_bytes: int) -> bool:
    """Whether a packet is too small to hold a picture."""
    return codec == "mpeg4" and packet_bytes <= _MOST_UNCODED_BYTES


def _mpeg4(packet: bytes, following: bytes | None, extradata: bytes) -> bool:
    """An I-VOP that no B-VOP follows: those are shown before it, and need the GOP before."""
    return _vop_types(packet) == [0] and (following is None or 2 not in _vop_types(following))


def _vop_types(packet: bytes) -> list[int]:
    """vop_coding_type of each picture in a packet: 0 I, 1 P, 2 B, 3 sprite."""
    return [packet[at + 4] >> 6 for at in _found(packet, _START_CODE + b"\xb6") if at + 4 < len(packet)]


def _mpeg12(packet: bytes, following: bytes | None, extradata: bytes) -> bool:
    return _picture_types(packet)[:1] == [1] and (following is None or 3 not in _picture_types(following))


def _picture_types(packet: bytes) -> list[int]:
    """picture_coding_type: 1 I, 2 P, 3 B."""
    return [packet[at + 5] >> 3 & 7 for at in _found(packet, _START_CODE + b"\0") if at + 5 < len(packet)]


def _h264(packet: bytes, following: bytes | None, extradata: bytes) -> bool:
    """An IDR picture: nal_unit_type 5. A recovery point is marked as a key frame too, and is none."""
    size = (extradata[4] & 3) + 1 if len(extradata) > 4 and extradata[0] == 1 else None
    return _first_slice((unit & 31 for unit in _units(packet, size)), range(1, 6)) == 5


def _hevc(packet: bytes, following: bytes | None, extradata: bytes) -> bool:
    """An IDR picture, nal_unit_type 19 or 20; CRA and BLA pictures may have leading pictures."""
    size = (extradata[21] & 3) + 1 if len(extradata) > 21 and extradata[0] == 1 else None
    return _first_slice((unit >> 1 & 63 for unit in _units(packet, size)), range(32)) in (19, 20)


def _first_slice(types: Iterator[int], slices: range) -> int | None:
    return next((kind for kind in types if kind in slices), None)


def _units(packet: bytes, length_bytes: int | None) -> Iterator[int]:
    """The first byte of each NAL unit, after start codes or, in mp4 and mkv, after lengths."""
    if length_bytes is None:
        yield from (packet[at + 3] for at in _found(packet, _START_CODE) if at + 3 < len(packet))
        return
    at = 0
    while at + length_bytes < len(packet):
        yield packet[at + length_bytes]
        at += length_bytes + int.from_bytes(packet[at : at + length_bytes], "big")


def _found(packet: bytes, code: bytes) -> Iterator[int]:
    at = packet.find(code)
    while at >= 0:
        yield at
        at = packet.find(code, at + len(code))


def _always(packet: bytes, following: bytes | None, extradata: bytes) -> bool:
    return True


_CLOSED: Mapping[str, Callable[[bytes, bytes | None, bytes], bool]] = {
    "h264": _h264,
    "hevc": _hevc,
    "mpeg4": _mpeg4,
    "mpeg1video": _mpeg12,
    "mpeg2video": _mpeg12,
    "vp8": _always,
    "vp9": _always,
    "av1": _always,
}
