"""What a notebook shows of a store: its numbers as a table, one frame's motion as a picture."""

import html
import io
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from PIL import Image

from moclip.errors import FeatureError
from moclip.store import FeatureInfo, Store, StoreInfo, describe

#: About the longer side of a picture of motion, in pixels of the screen.
_VIEW_PX = 480


def overview(store: Store) -> "Overview":
    """What the store holds, in numbers: a table in a notebook, text elsewhere. No array is opened."""
    return Overview(store.url, describe(store))


def motion_view(store: Store, video: str, frame: int, feature: str = "motion") -> "MotionView":
    """One frame's motion as a picture: the hue is its direction, the brightness its length."""
    feature = store.resolve(feature)
    if store.features[feature].axes[:1] != ("displacement",):
        raise FeatureError(f"{feature} is no motion: a motion feature's first axis is 'displacement'")
    rows = store.gather(feature, [video], [frame])
    return MotionView(video, frame, rows[0].astype(np.float32), store.features[feature].unit)


@dataclass(frozen=True)
class Overview:
    """A store's numbers. Names of a stranger's store are shown as text, whatever they hold."""

    url: str
    info: StoreInfo

    def __repr__(self) -> str:
        lines = [f"{_plain(self.url)}: {self._size()}"]
        for title, header, rows in self._tables():
            lines += ["", title, *_columns([header, *rows])]
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        parts = [f"<p><b>{html.escape(self.url)}</b>: {html.escape(self._size())}</p>"]
        for title, header, rows in self._tables():
            body = "".join(_html_row(row, "td") for row in rows)
            parts.append(f"<table><caption>{title}</caption>{_html_row(header, 'th')}{body}</table>")
        return "".join(parts)

    def _size(self) -> str:
        info = self.info
        return f"{info.videos} videos, {info.hours:.2f} hours, {info.frames} frames, {len(info.labels)} classes"

    def _tables(self) -> Iterator[tuple[str, list[str], list[list[str]]]]:
        header = ["name", "kind", "dtype", "unit", "digest", "videos", "rows", "MiB", "failed"]
        yield "features", header, [_feature_row(feature) for feature in self.info.features]
        if self.info.splits:
            parts = ["train", "val", "test"]
            rows = [[name, *(str(n.get(part, 0)) for part in parts)] for name, n in self.info.splits.items()]
            yield "splits", ["name", *parts], rows


def _feature_row(f: FeatureInfo) -> list[str]:
    spec = f.specification
    numbers = [str(f.ok), str(f.rows), f"{f.bytes / 2**20:.1f}"]
    failed = ", ".join(f"{n} {why}" for why, n in f.failures.items()) or "-"
    return [f.name, spec.kind, spec.dtype, spec.unit, f.digest, *numbers, failed]


@dataclass(frozen=True, repr=False)
class MotionView:
    """One frame's displacement, (2, gh, gw) in ``unit``, as a picture. The longest vector is the brightest."""

    video: str
    frame: int
    displacement: npt.NDArray[np.float32]
    unit: str

    @property
    def longest(self) -> float:
        return float(np.hypot(*self.displacement).max(initial=0))

    def __repr__(self) -> str:
        return f"MotionView({self.video!r}, frame {self.frame}, longest {self.longest:.1f} x {self.unit})"

    def image(self) -> Image.Image:
        """The picture in RGB, each cell a square."""
        x, y = self.displacement
        hue = np.arctan2(y, x) / (2 * np.pi) % 1 * 255
        bright = np.hypot(x, y) * (255 / (self.longest or 1))
        planes = [Image.fromarray(plane.astype(np.uint8)) for plane in (hue, np.full_like(hue, 255), bright)]
        picture = Image.merge("HSV", planes).convert("RGB")
        side = max(1, _VIEW_PX // max(picture.size))
        return picture.resize((picture.width * side, picture.height * side), Image.Resampling.NEAREST)

    def _repr_png_(self) -> bytes:
        file = io.BytesIO()
        self.image().save(file, "PNG")
        return file.getvalue()


def _plain(text: str) -> str:
    """Text without control characters, which a terminal would obey."""
    return repr(text)[1:-1]


def _columns(rows: Sequence[Sequence[str]]) -> list[str]:
    shown = [[_plain(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*shown, strict=True)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in shown]


def _html_row(cells: Iterable[str], tag: str) -> str:
    return "<tr>" + "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in cells) + "</tr>"
