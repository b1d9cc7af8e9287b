"""The whole way on a corpus rendered here: four classes that need both eyes, held-out accuracy of each.

A textured disc, orange or blue, moves up or down over a textured background. Every *scene* (textures, place,
speed, drift of the background, codec, length) is filmed four times, once for each class, so that nothing but
appearance and direction tells its four clips apart:

- Up is Down played backwards. Both clips hold the same frames, and with an odd number of them also the same
  middle frame, which is the one that the image side sees. It can tell the colours apart and never the
  directions: half of the clips at best, up to what the codec's loss gives away.
- Blue is orange with the sign of its chroma turned. The luma, in which the encoders search for motion, is the
  same, and so are the vectors, up to rounding. It can tell the directions apart and never the colours: half.
- Fused, both are known: all clips.

Scenes of one group share their background; groups never cross from train to test.
"""

import json
import shlex
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from moclip.errors import SourceError
from moclip.pipeline.extract.encode import Frame, write_video

WIDTH, HEIGHT = 160, 120
GROUPS, SCENES_A_GROUP, TEST_GROUPS = 10, 3, 3
CLASSES = ("BlueDown", "BlueUp", "OrangeDown", "OrangeUp")
#: Orange as (Cb, Cr) around zero; blue is its negative. With luma from 75 to 180 neither clips in RGB.
ORANGE = (-38.0, 30.0)
ENCODER = "timm:test_vit2"
MOTION_BACKBONE = "timm:test_resnet"
INPUT_SIZE, MOTION_EPOCHS, HEAD_LR = 64, 20, 1e-3
#: What each run sees, by kind.
BEST = {
    "tsn": ("motion only", "cannot see colours: about half at best"),
    "probe": ("image only", "cannot see directions: about half at best"),
    "fusion": ("fused", "sees both; the image encoder is untrained"),
}


@dataclass(frozen=True)
class Codec:
    """An encoder, the suffix of its files, and its options."""

    name: str
    suffix: str
    options: dict[str, str]


#: One after the other, scene by scene: short GOPs and long ones, with B-frames and without.
CODECS = (
    Codec("mpeg4", ".avi", {"g": "12", "b": "1M"}),
    Codec("libx264", ".mp4", {"g": "24", "bf": "2", "crf": "20", "x264-params": "chroma-me=0:log-level=none"}),
    Codec("mpeg2video", ".mpg", {"g": "12", "bf": "0", "b": "2M"}),
)


@dataclass(frozen=True)
class Scene:
    """What the four clips of a scene share. Lengths in pixels, speeds in pixels a frame."""

    group: int
    clip: int
    frames: int
    codec: Codec
    speed: float
    drift: float
    radius: int
    centre: tuple[int, int]
    texture: NDArray[np.float32]
    background: NDArray[np.float32]

    def __post_init__(self) -> None:
        if self.frames % 2 == 0:
            raise ValueError(f"{self.frames} frames have no middle one: up and down could be told apart by it")

    def name(self, label: str) -> str:
        """The clip's path below the corpus, as UCF101 names its clips."""
        return f"{label}/v_{label}_g{self.group:02d}_c{self.clip:02d}{self.codec.suffix}"


@dataclass(frozen=True)
class Demo:
    """Where the demo keeps what it makes."""

    out: Path

    @property
    def videos(self) -> Path:
        return self.out / "videos"

    @property
    def splits(self) -> Path:
        return self.out / "splits"

    @property
    def weights(self) -> Path:
        return self.out / "untrained.safetensors"

    @property
    def store(self) -> Path:
        return self.out / "demo.zarr"

    def run(self, kind: str) -> Path:
        return self.out / "runs" / kind


def run_demo(out: str | Path, report: Callable[[str], None], run: Callable[[Sequence[str]], None]) -> None:
    """Render, extract, train, test and compare below ``out``, which must be empty or not exist.

    ``report`` gets lines; ``run`` gets the arguments of each `moclip` command and runs it. One to two minutes on
    two cores, offline.
    """
    demo = Demo(Path(out))
    if demo.out.exists() and any(demo.out.iterdir()):
        raise SourceError(f"{demo.out} is not empty; remove it, or give another --out")
    render_corpus(demo.out)
    clips = len(CLASSES) * GROUPS * SCENES_A_GROUP
    report(f"rendered {clips} clips of {len(CLASSES)} classes to {demo.videos}: {', '.join(CLASSES)}")
    write_untrained_weights(demo.weights)
    report(f"wrote {demo.weights}: random weights for {ENCODER}. The image side is UNTRAINED here;")
    report("  it tells orange from blue, and its accuracy says nothing about a real encoder's.")
    for arguments in demo_commands(demo):
        report(f"$ moclip {shlex.join(arguments)}")
        run(arguments)
    for line in _table(demo):
        report(line)


def demo_commands(demo: Demo) -> tuple[tuple[str, ...], ...]:
    """What comes after rendering: extract, three trainings, and a test of the last."""
    encoder = ("--encoder", ENCODER, "--weights", str(demo.weights))
    backbone = ("--backbone", MOTION_BACKBONE, "--weights", "none", "--input-size", str(INPUT_SIZE))
    heads = ("--lr", str(HEAD_LR), "--device", "cpu")

    def train(kind: str, *options: str) -> tuple[str, ...]:
        return ("train", kind, str(demo.store), "--split", "1", *options, "--out", str(demo.run(kind)))

    return (
        ("extract", str(demo.videos), str(demo.store), "--splits", str(demo.splits), *encoder),
        train("tsn", *backbone, "--epochs", str(MOTION_EPOCHS), "--device", "cpu"),
        train("probe", *heads),
        train("fusion", "--motion-run", str(demo.run("tsn")), *heads),
        ("evaluate", str(demo.run("fusion")), str(demo.store), "--device", "cpu"),
    )


def render_corpus(out: str | Path, seed: int = 0) -> None:
    """Write ``out``/videos/<class>/*, and UCF101-style lists with one split, "1", to ``out``/splits.

    The same seed gives the same frames everywhere, and the same files with the same version of the encoders.
    """
    demo = Demo(Path(out))
    scenes = list(make_scenes(seed))
    for label in CLASSES:
        (demo.videos / label).mkdir(parents=True, exist_ok=True)
        for scene in scenes:
            path = demo.videos / scene.name(label)
            write_video(path, film(scene, label), codec=scene.codec.name, options=scene.codec.options)
    _write_lists(demo.splits, scenes)


def make_scenes(seed: int) -> Iterator[Scene]:
    """Scenes group by group. Everything is drawn without regard to the classes, which all film all scenes."""
    rng = np.random.default_rng(seed)
    for group in range(1, GROUPS + 1):
        background = _texture(rng, coarse=int(rng.integers(6, 16)))
        for clip in range(1, SCENES_A_GROUP + 1):
            yield Scene(
                group=group,
                clip=clip,
                frames=int(rng.choice(np.arange(33, 49, 2))),
                codec=CODECS[(group + clip) % len(CODECS)],
                speed=float(rng.uniform(1.5, 3.5)),
                drift=float(rng.uniform(-1, 1)),
                radius=int(rng.integers(28, 42)),
                centre=(int(rng.integers(45, WIDTH - 45)), int(rng.integers(0, HEIGHT))),
                texture=_texture(rng, coarse=int(rng.integers(4, 9))),
                background=background,
            )


def film(scene: Scene, label: str) -> list[Frame]:
    """The frames of one class's clip of a scene, uint8 (HEIGHT, WIDTH, 3)."""
    sign = 1 if label.startswith("Orange") else -1
    frames = [_frame(scene, number, sign) for number in range(scene.frames)]
    return frames[::-1] if label.endswith("Up") else frames


def write_untrained_weights(path: Path, seed: int = 0) -> None:
    """Write a safetensors file of ``ENCODER``'s random initialisation."""
    import timm
    import torch
    from safetensors.torch import save_file

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = timm.create_model(ENCODER.removeprefix("timm:"), pretrained=False, num_classes=0)
    save_file(model.state_dict(), path)


def _frame(scene: Scene, number: int, sign: int) -> Frame:
    """Frame ``number`` of a scene with the disc going down; what leaves below comes back above."""
    fallen = round(number * scene.speed)
    x, y = scene.centre
    rows = (np.arange(HEIGHT) - y - fallen + HEIGHT // 2) % HEIGHT - HEIGHT // 2
    disc = rows[:, None] ** 2 + (np.arange(WIDTH) - x) ** 2 < scene.radius**2
    drifted = np.roll(scene.background, round(number * scene.drift), 1)
    luma = np.where(disc, np.roll(scene.texture, fallen, 0), drifted)
    cb, cr = (sign * chroma * disc for chroma in ORANGE)
    rgb = np.stack([luma + 1.402 * cr, luma - 0.344136 * cb - 0.714136 * cr, luma + 1.772 * cb], -1)
    return rgb.round().clip(0, 255).astype(np.uint8)


def _texture(rng: np.random.Generator, coarse: int) -> NDArray[np.float32]:
    """Random luma from 75 to 180: cells of ``coarse`` pixels, and grain for motion search to hold on to."""
    cells = rng.uniform(85, 170, (-(-HEIGHT // coarse), -(-WIDTH // coarse)))
    luma = cells.repeat(coarse, 0).repeat(coarse, 1)[:HEIGHT, :WIDTH]
    grain: NDArray[np.float32] = (luma + rng.uniform(-10, 10, luma.shape)).astype(np.float32)
    return grain


def _write_lists(folder: Path, scenes: list[Scene]) -> None:
    """classInd.txt, trainlist01.txt with indices, testlist01.txt without: the last groups are held out."""
    folder.mkdir(parents=True, exist_ok=True)
    indices = {label: index for index, label in enumerate(CLASSES, start=1)}
    train = [f"{s.name(c)} {indices[c]}" for c in CLASSES for s in scenes if s.group <= GROUPS - TEST_GROUPS]
    test = [s.name(c) for c in CLASSES for s in scenes if s.group > GROUPS - TEST_GROUPS]
    (folder / "classInd.txt").write_text("".join(f"{index} {label}\n" for label, index in indices.items()))
    (folder / "trainlist01.txt").write_text("".join(f"{line}\n" for line in train))
    (folder / "testlist01.txt").write_text("".join(f"{line}\n" for line in test))


def _table(demo: Demo) -> Iterator[str]:
    """The held-out accuracies, beside what each side could reach at best."""
    found = {kind: json.loads((demo.run(kind) / "metrics.json").read_bytes())["test"] for kind in BEST}
    yield f"accuracy on {found['fusion']['clips']} held-out clips (chance is 25 %):"
    for kind, (title, best) in BEST.items():
        yield f"  {title:<12} {100 * found[kind]['top1']:5.1f} %   {best}"
