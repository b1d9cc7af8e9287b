"""Which files below a folder are videos, by their names."""

import os
import posixpath
from collections.abc import Iterator

from moclip.errors import SourceError
from moclip.pipeline.extract.source_table import readable

VIDEO_EXTENSIONS = frozenset(
    ".3g2 .3gp .asf .avi .divx .f4v .flv .h264 .hevc .ivf .m2ts .m2v .m4v .mjpeg .mkv .mov .mp4 .mpeg "
    ".mpg .mts .mxf .ogv .ts .vob .webm .wmv .y4m".split()
)


def strip_extension(relative_path: str) -> str:
    """The path without its extension, where that is one of a video."""
    stem, extension = posixpath.splitext(relative_path)
    return stem if extension.lower() in VIDEO_EXTENSIONS else relative_path


def walk(root: str) -> Iterator[tuple[str, bool]]:
    """Every file below ``root``: its relative path, and whether its name says that it is a video.

    Links to folders are followed after all real folders, and each folder is listed once, under the first name
    that leads to it: no loop is entered, and no video is found twice.
    """
    folders: list[str] = [""]
    links: list[str] = []
    seen: set[tuple[int, int]] = set()
    while folders or links:
        relative = folders.pop() if folders else links.pop(0)
        folder = os.path.join(root, relative)
        try:
            facts = os.stat(folder)
            if (facts.st_dev, facts.st_ino) in seen:
                continue
            seen.add((facts.st_dev, facts.st_ino))
            entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
        except OSError as error:
            raise SourceError(
                f"cannot list the folder {readable(folder)!r}: {error.strerror}; make it readable or move it"
            ) from error
        for entry in entries:
            inside = f"{relative}/{entry.name}" if relative else entry.name
            if _is_folder(entry):
                (links if entry.is_symlink() else folders).append(inside)
            else:
                yield inside, _is_video(entry)


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link that leads to itself is not one
        return False


def _is_video(entry: os.DirEntry[str]) -> bool:
    """By name only. Hidden files are left out: "._clip.avi" is macOS's note about a clip, not a clip.

    A link that leads nowhere stays (it becomes a failed entry); a pipe does not (opening it never returns).
    """
    extension = os.path.splitext(entry.name)[1].lower()
    return (
        extension in VIDEO_EXTENSIONS
        and not entry.name.startswith(".")
        and (entry.is_file(follow_symlinks=False) or entry.is_symlink())
    )
