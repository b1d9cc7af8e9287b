"""From a grid of displacements to a network's input: quantise, resize, crop and mirror, on the device.

Everything is measured in pixels of the frame, so a grid of 8 px cells and the full field give one picture.
A resize followed by a crop is linear in the grid: two small matrix products, one for each axis.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

#: The network's input that sizes are stated for, and the size that its test crops are taken from (CoViAR).
BASE = 224
_TEST_SIZE = 256
#: How many crops a test can see.
CROPS = (1, 2, 5, 10)


@dataclass(frozen=True)
class Geometry:
    """A frame of ``width`` x ``height`` pixels sampled on ``gw`` x ``gh`` cells of ``cell`` pixels."""

    width: int
    height: int
    cell: int
    gw: int
    gh: int

    def __post_init__(self) -> None:
        if (self.gw, self.gh) != (-(-self.width // self.cell), -(-self.height // self.cell)):
            raise ValueError(f"a {self.gw}x{self.gh} grid of {self.cell} px cells is not of {self.width}x{self.height}")

    @property
    def row_bytes(self) -> int:
        return 4 * self.gw * self.gh


@dataclass(frozen=True)
class Views:
    """One view a clip: squash the frame to ``resize`` x ``resize``, crop at (``left``, ``top``), perhaps
    mirror.

    Each is a tensor of n; all segments of a clip share its view.
    """

    resize: torch.Tensor
    left: torch.Tensor
    top: torch.Tensor
    mirror: torch.Tensor

    def __len__(self) -> int:
        return len(self.resize)

    def take(self, chosen: npt.NDArray[np.int64]) -> "Views":
        at = torch.from_numpy(chosen)
        return Views(self.resize[at], self.left[at], self.top[at], self.mirror[at])


@dataclass(frozen=True)
class Augmentation:
    """How training varies what it shows: crops of ``size`` pixels from squashed frames of the sides ``resize``, which
    are stated for crops of :data:`BASE`, and perhaps mirror images.
    """

    size: int
    resize: tuple[int, ...] = (224, 256, 299)
    mirror: bool = True


def random_views(n: int, how: Augmentation, rng: np.random.Generator) -> Views:
    """Training views: one of the sides, a random crop, mirrored in half of the cases or never."""
    sides = np.array([how.size * side // BASE for side in how.resize])[rng.integers(len(how.resize), size=n)]
    left, top = (rng.integers(0, sides - how.size + 1) for _ in range(2))
    mirrored = (rng.random(n) < 0.5) & how.mirror
    return Views(*(torch.from_numpy(values) for values in (sides, left, top, mirrored)))


def fixed_views(n: int, size: int, crops: int = 1) -> Views:
    """Test views of each of n clips, clip by clip: the centre or, of 5 :data:`CROPS` and more, corners and centre;
    of an even number, the mirror image of each.
    """
    resize = size * _TEST_SIZE // BASE
    edge = resize - size
    boxes = [(edge // 2, edge // 2)]
    if crops >= 5:
        boxes += [(0, 0), (edge, 0), (0, edge), (edge, edge)]
    views = [(x, y, mirror) for mirror in ((False, True) if crops % 2 == 0 else (False,)) for x, y in boxes]
    left, top, mirrors = (torch.tensor(column).repeat(n) for column in zip(*views, strict=True))
    return Views(torch.full((n * crops,), resize), left, top, mirrors)


def quantise(pixels: torch.Tensor) -> torch.Tensor:
    """Displacements in pixels to CoViAR's 8-bit picture, in [-0.5, 0.5]; no motion is 128 / 255 - 0.5."""
    return (torch.trunc(pixels * (127.5 / 20)) + 128).clamp_(0, 255).div_(255).sub_(0.5)


def prepare(
    grids: torch.Tensor, geometry: Geometry, views: Views, size: int, scale: float = 1.0, *, mirror_bytes: bool = False
) -> torch.Tensor:
    """Grids (n, segments, 2, gh, gw), times ``scale`` in pixels, under one view a clip: (n, segments, 2,
    size, size).

    Mirroring negates x *before* it is quantised: no motion stays no motion. The published code mirrors the bytes,
    255 - v, and makes 127 of it; ``mirror_bytes`` does so too.
    """
    device = grids.device
    mirror = views.mirror.to(device)
    sign = torch.where(mirror, -1.0, 1.0)[:, None, None, None]
    pixels = grids.float() * scale
    if not mirror_bytes:
        pixels[:, :, 0] *= sign
    picture = quantise(pixels)
    if mirror_bytes:
        picture[:, :, 0] *= sign
    across = resize_matrix(views.left, views.resize, size, geometry.width, geometry.cell, geometry.gw)
    down = resize_matrix(views.top, views.resize, size, geometry.height, geometry.cell, geometry.gh)
    across, down = across.to(device), down.to(device)
    across = torch.where(mirror[:, None, None], across.flip(1), across)
    return down[:, None, None] @ picture @ across.mT[:, None, None]


def resize_matrix(
    offset: torch.Tensor, resize: torch.Tensor, size: int, length: int, cell: int, count: int
) -> torch.Tensor:
    """Weights (n, size, count) that turn ``count`` cells along an axis of ``length`` pixels into ``size``
    pixels.

    Output pixel j lies at ``(j + offset + 0.5) * length / resize - 0.5`` in the frame, cell i at
    ``min(i * cell + cell // 2, length - 1)``; linear in between and constant beyond the ends. With 1 px
    cells this is ``torch.nn.functional.interpolate(mode="bilinear", align_corners=False)``.
    """
    n = len(offset)
    if count == 1:
        return torch.ones((n, size, 1))
    at = torch.clamp(torch.arange(count) * cell + cell // 2, max=length - 1).double()
    wanted = (torch.arange(size) + offset[:, None] + 0.5) * (length / resize[:, None].double()) - 0.5
    right = torch.searchsorted(at, wanted.contiguous()).clamp(1, count - 1)
    share = ((wanted - at[right - 1]) / (at[right] - at[right - 1])).clamp(0, 1)
    weights = torch.zeros((n, size, count), dtype=torch.float64)
    weights.scatter_(2, right[..., None], share[..., None])
    weights.scatter_(2, right[..., None] - 1, 1 - share[..., None])
    return weights.float()
