import os
import pickle
from collections.abc import Callable
from datetime import date
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moclip.errors import SourceError
from moclip.pipeline.extract.sources import SourceList, VideoSource, list_sources

Tree = Callable[..., Path]


@pytest.fixture
def tree(tmp_path: Path) -> Tree:
    """Make empty files by their relative paths, and return the folder they are in."""

    def make(*names: str | bytes) -> Path:
        for name in names:
            path = os.path.join(os.fsencode(tmp_path), os.fsencode(name))
            os.makedirs(os.path.dirname(path), exist_ok=True)
            open(path, "wb").close()
        return tmp_path

    return make


def ids(sources: SourceList) -> list[str]:
    return [video.id for video in sources.videos]


class TestFolder:
    def test_label_is_the_parent_folder(self, tree: Tree) -> None:
        sources = list_sources(tree("b/y.avi", "a/deep/x.MP4", "top.mkv"))
        assert [(v.id, v.label, v.relative_path) for v in sources.videos] == [
            ("a/deep/x", "deep", "a/deep/x.MP4"),
            ("b/y", "b", "b/y.avi"),
            ("top", None, "top.mkv"),
        ]
        assert sources.classes == ("b", "deep")
        assert all(os.path.isabs(v.path) and os.path.exists(v.path) for v in sources.videos)

    def test_other_files_are_listed_as_skipped(self, tree: Tree) -> None:
        sources = list_sources(tree("a/x.avi", "a/notes.txt", "a/._x.avi", "README"))
        assert ids(sources) == ["a/x"]
        assert sources.skipped == ("README", "a/._x.avi", "a/notes.txt")

    def test_extensions_settle_clashes(self, tree: Tree) -> None:
        assert ids(list_sources(tree("x.avi", "x.mp4", "y.avi"))) == ["x.avi", "x.mp4", "y"]

    def test_a_settled_clash_may_cause_another(self, tree: Tree) -> None:
        sources = list_sources(tree("x.avi", "x.mp4", "x.avi.mp4"))
        assert ids(sources) == ["x.avi", "x.avi.mp4", "x.mp4"]
        assert all(v.id == v.relative_path for v in sources.videos)

    def test_names_of_any_bytes(self, tree: Tree) -> None:
        names = [b"c\xff/new\nline.mp4", b"c\xff/\xfe \xc3\xa9.mp4", b"c\xff/" + b"n" * 246 + b".mp4"]
        sources = list_sources(tree(*names))
        assert sorted(os.fsencode(v.path) for v in sources.videos) == sorted(
            os.path.join(os.fsencode(tree()), name) for name in names
        )
        assert "c\\xff/\\xfe é" in ids(sources)
        assert "c\\xff/new\nline" in ids(sources)
        assert sources.classes == ("c\\xff",)
        for video in sources.videos:
            (video.id + video.relative_path).encode("utf-8")
        assert pickle.loads(pickle.dumps(sources.videos)) == sources.videos

    def test_linked_folders_are_followed_once(self, tree: Tree) -> None:
        root = tree("a/x.avi")
        outside = root.parent / f"{root.name}-outside"
        outside.mkdir()
        (outside / "y.avi").touch()
        (root / "a" / "loop").symlink_to(root)
        (root / "again").symlink_to(root / "a")
        (root / "linked").symlink_to(outside)
        assert ids(list_sources(root)) == ["a/x", "linked/y"]

    def test_a_broken_link_is_listed_and_a_pipe_is_not(self, tree: Tree) -> None:
        root = tree("a/x.avi")
        (root / "a" / "gone.avi").symlink_to(root / "nowhere.avi")
        os.mkfifo(root / "a" / "pipe.avi")
        sources = list_sources(root)
        assert ids(sources) == ["a/gone", "a/x"]
        assert sources.skipped == ("a/pipe.avi",)

    def test_one_video(self, tree: Tree) -> None:
        sources = list_sources(tree("a/x.avi") / "a" / "x.avi")
        assert [(v.id, v.label, v.relative_path) for v in sources.videos] == [("x", None, "x.avi")]

    def test_order_is_by_id_and_not_by_path(self, tree: Tree) -> None:
        assert ids(list_sources(tree("a-b/x.avi", "a/x.avi", "a.avi"))) == ["a", "a-b/x", "a/x"]


class TestTextList:
    def write(self, folder: Path, content: bytes) -> Path:
        (folder / "list.txt").write_bytes(content)
        return folder / "list.txt"

    def test_lines(self, tmp_path: Path) -> None:
        content = b"\xef\xbb\xbf# videos\n\n  \nc/x.avi\tOne label\r\n../side/y.avi\n/far/away/z.avi\n\xff.mp4\t\n"
        sources = list_sources(self.write(tmp_path, content))
        assert [(v.id, v.label) for v in sources.videos] == [
            ("\\xff", None),
            ("away/z", None),
            ("c/x", "One label"),
            ("side/y", None),
        ]
        by_id = {v.id: v for v in sources.videos}
        assert by_id["away/z"].path == "/far/away/z.avi"
        assert by_id["away/z"].relative_path == "away/z.avi"
        assert by_id["c/x"].path == str(tmp_path / "c" / "x.avi")
        assert os.path.normpath(by_id["side/y"].path) == str(tmp_path.parent / "side" / "y.avi")

    def test_an_absolute_path_below_the_list_is_relative(self, tmp_path: Path) -> None:
        sources = list_sources(self.write(tmp_path, os.fsencode(tmp_path / "a" / "b" / "x.avi")))
        assert ids(sources) == ["a/b/x"]

    def test_too_many_fields(self, tmp_path: Path) -> None:
        with pytest.raises(SourceError, match=r"list\.txt', line 2: expected a path.*found 3 fields"):
            list_sources(self.write(tmp_path, b"a.mp4\nb.mp4\tlabel\tmore\n"))


class TestTables:
    def test_csv(self, tmp_path: Path) -> None:
        file = tmp_path / "list.csv"
        file.write_bytes(
            b"path,id,label,group,split_1,score,day,note\n"
            b'a/x.avi,001,007,03,train,1.5,2024-05-01,"hi, there"\n'
            b'"b/new\nline.mp4",,,,,NA,,\n'
            b"b/\xff.mp4,,NA,,test,3,2024-05-02,x\n"
        )
        one, raw, newline = list_sources(file).videos
        extra = {"score": 1.5, "day": date(2024, 5, 1), "note": "hi, there"}
        path = str(tmp_path / "a" / "x.avi")
        assert one == VideoSource("001", path, "a/x.avi", "007", "03", {"1": "train"}, extra)
        assert (raw.id, raw.label, os.fsencode(raw.path)[-6:]) == ("b/\\xff", "NA", b"/\xff.mp4")
        assert (newline.id, newline.label, newline.group, newline.splits) == ("b/new\nline", None, None, {})
        assert newline.extra == {"score": None, "day": None, "note": ""}

    def test_parquet_keeps_types_and_makes_known_columns_text(self, tmp_path: Path) -> None:
        columns = {
            "path": pa.array([b"b/\xff.mp4", b"a.avi"], pa.binary()),
            "label": pa.array([2, None], pa.int64()),
            "split_a": pa.array(["val", ""]).dictionary_encode(),
            "boxes": pa.array([[1, 2], []], pa.list_(pa.int32())),
        }
        pq.write_table(pa.table(columns), tmp_path / "list.parquet")
        plain, raw = list_sources(tmp_path / "list.parquet").videos
        assert (raw.id, raw.label, raw.splits, raw.extra) == ("b/\\xff", "2", {"a": "val"}, {"boxes": [1, 2]})
        assert (plain.id, plain.label, plain.splits, plain.extra) == ("a", None, {}, {"boxes": []})

    def test_a_missing_video_is_no_error_here(self, tmp_path: Path) -> None:
        (tmp_path / "list.csv").write_text("path\nnowhere.mp4\n")
        assert ids(list_sources(tmp_path / "list.csv")) == ["nowhere"]

    def test_given_ids_are_kept_as_they_are(self, tmp_path: Path) -> None:
        (tmp_path / "list.csv").write_text("path,id\nx.mp4,\ny.mp4,x\n")
        assert ids(list_sources(tmp_path / "list.csv")) == ["x", "x.mp4"]

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            ("", "cannot read the table"),
            ("file,label\na.mp4,x\n", r"no column 'path', only \['file', 'label'\]"),
            ("path,label\na.mp4\n", "Expected 2 columns, got 1"),
            ("path\n\n", "holds no videos"),
            ("path,id\n,1\n", "row 1: the path is empty"),
            ("path,path\na,b\n", "several columns 'path'"),
            (
                "path,split_1\na.mp4,train\nb.mp4,trian\n",
                "row 2, column 'split_1': found 'trian'; expected train",
            ),
            ("path,id\na.mp4,1\nb.mp4,1\n", r"the id '1' twice, to '.*a\.mp4' and '.*b\.mp4'"),
        ],
    )
    def test_what_is_wrong_is_said_in_one_line(self, tmp_path: Path, content: str, message: str) -> None:
        (tmp_path / "list.csv").write_text(content)
        with pytest.raises(SourceError, match=message) as caught:
            list_sources(tmp_path / "list.csv")
        assert "\n" not in str(caught.value)

    def test_text_named_parquet(self, tmp_path: Path) -> None:
        (tmp_path / "list.parquet").write_text("path\n")
        with pytest.raises(SourceError, match="cannot read the table"):
            list_sources(tmp_path / "list.parquet")


def test_no_such_source(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="no such source"):
        list_sources(tmp_path / "nowhere")


def test_neither_video_nor_list(tree: Tree) -> None:
    with pytest.raises(SourceError, match="neither a video"):
        list_sources(tree("x.png") / "x.png")


def test_empty_source(tree: Tree) -> None:
    with pytest.raises(SourceError, match=r"holds no videos: found 2 other files, the first 'a/x\.txt'"):
        list_sources(tree("a/x.txt", "b/y.txt"))


NAMES = st.text(st.characters(exclude_characters="/\0", exclude_categories=("Cs",)), min_size=1, max_size=12).filter(
    lambda name: name not in (".", "..")
)


@given(st.lists(st.tuples(NAMES, NAMES, st.sampled_from([".avi", ".mp4", ".avi.mp4"])), min_size=1, unique=True))
def test_ids_are_unique_sorted_text(tmp_path_factory: pytest.TempPathFactory, files: list[tuple[str, ...]]) -> None:
    """Whatever the names: every row of a list becomes one source, known by its own relative path."""
    folder = tmp_path_factory.mktemp("list")
    paths = [f"{parent}/{name}{extension}" for parent, name, extension in files]
    pq.write_table(pa.table({"path": pa.array([p.encode() for p in paths], pa.binary())}), folder / "list.parquet")
    sources = list_sources(folder / "list.parquet")
    assert sorted(v.relative_path for v in sources.videos) == sorted(paths)
    assert ids(sources) == sorted(set(ids(sources)))
    for video in sources.videos:
        assert video.relative_path.startswith(video.id)
