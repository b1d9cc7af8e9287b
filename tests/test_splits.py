from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moclip.errors import SourceError
from moclip.pipeline.extract.sources import Sources
from moclip.pipeline.extract.splits import (
    label_from_table,
    merge_labels,
    read_labels_csv,
    read_splits,
)

CLASSES = "1 Swing\n2 Biking\n"
TRAIN = "Biking/v_Biking_g01_c01.avi 2\r\nSwing/v_Swing_g02_c01.avi 1\r\n\r\n"
TEST = "Biking/v_Biking_g03_c01.avi\nSwing/v_Swing_g04_c02.avi\n"


def write_lists(folder: Path, **contents: str) -> Path:
    """The lists of two classes, or other contents for some of the files (given without .txt)."""
    files = {"classInd": CLASSES, "trainlist01": TRAIN, "testlist01": TEST} | contents
    for name, content in files.items():
        (folder / f"{name}.txt").write_text(content)
    return folder


def source(path: str, label: str | None = None, **splits: str) -> dict[str, object]:
    known = {"id": path.removesuffix(".avi"), "path": b"/videos/" + path.encode(), "relative_path": path}
    return {**known, "label": label, "group": None, **{f"split_{name}": value for name, value in splits.items()}}


def sources(*videos: dict[str, object]) -> Sources:
    names = {name: None for video in videos for name in video}
    kinds = [(name, pa.binary() if name == "path" else pa.string()) for name in names]
    return Sources(pa.Table.from_pylist(list(videos), pa.schema(kinds)))


def table(ids: Sequence[str], **columns: Sequence[str | None]) -> pa.Table:
    empty = [None] * len(ids)
    cells = {"id": ids, "label": columns.pop("label", empty), "group": columns.pop("group", empty), **columns}
    return pa.table({name: pa.array(column, pa.string()) for name, column in cells.items()})


class TestReading:
    def test_ucf101_lists(self, tmp_path: Path) -> None:
        splits = read_splits(write_lists(tmp_path, trainlist02=TRAIN))
        assert splits.classes == ("Swing", "Biking")
        assert splits.names == ("1", "2")
        listed = splits.videos["Biking/v_Biking_g01_c01"]
        assert (listed.label, listed.group, listed.splits) == ("Biking", "g01", {"1": "train", "2": "train"})
        assert splits.videos["Swing/v_Swing_g04_c02"].splits == {"1": "test"}

    @pytest.mark.parametrize(
        ("contents", "message"),
        [
            (
                {"trainlist01": "\nSwing/a.avi 3\n"},
                r"trainlist01\.txt', line 2: .* the label 3, which classInd",
            ),
            (
                {"testlist01": "Swim/a.avi\n"},
                r"testlist01\.txt', line 1: .* of the class 'Swim', which classInd",
            ),
            ({"testlist01": "a.avi\n"}, "line 1: .* of the class '', which classInd"),
            (
                {"trainlist01": "Swing/a.avi 2\n"},
                "line 1: .* has the label of 'Biking'; mend the label or the path",
            ),
            ({"testlist01": TRAIN}, r"in train and in test of split 1"),
            ({"classInd": "Swing\n"}, r"classInd\.txt', line 1: found 'Swing'; expected an index"),
            (
                {"classInd": "1 Swing\n1 Biking\n"},
                "line 2: the index or the class of '1 Biking' is there already",
            ),
        ],
    )
    def test_what_is_wrong_is_said(self, tmp_path: Path, contents: dict[str, str], message: str) -> None:
        with pytest.raises(SourceError, match=message):
            read_splits(write_lists(tmp_path, **contents))

    def test_missing_files(self, tmp_path: Path) -> None:
        with pytest.raises(SourceError, match=r"cannot read .*classInd\.txt"):
            read_splits(tmp_path / "nowhere")
        (tmp_path / "classInd.txt").write_text(CLASSES)
        with pytest.raises(SourceError, match="no split lists"):
            read_splits(tmp_path)

    def test_names_with_spaces(self, tmp_path: Path) -> None:
        lists = write_lists(tmp_path, classInd="1 Long jump\n", trainlist01="Long jump/a 2 b.avi 1\n", testlist01="")
        assert read_splits(lists).videos["Long jump/a 2 b"].label == "Long jump"


class TestApplying:
    def test_sources(self, tmp_path: Path) -> None:
        videos = sources(
            source("Biking/v_Biking_g01_c01.avi", "Biking"),
            source("Swing/v_Swing_g02_c01.avi", "Swing"),
            source("Extra/other.avi", "Extra"),
        )
        labelled, labelling = read_splits(write_lists(tmp_path)).apply(videos)
        assert [(v.label, v.group, v.splits) for v in labelled] == [
            ("Biking", "g01", {"1": "train"}),
            ("Extra", None, {}),
            ("Swing", "g02", {"1": "train"}),
        ]
        assert labelling.classes == ("Swing", "Biking", "Extra")
        assert labelling.absent == ("Biking/v_Biking_g03_c01", "Swing/v_Swing_g04_c02")
        assert labelling.unlisted == ("Extra/other",)

    def test_by_name_where_it_is_unique(self, tmp_path: Path) -> None:
        videos = sources(
            source("all/v_Biking_g01_c01.avi"),
            source("one/v_Swing_g02_c01.avi"),
            source("two/v_Swing_g02_c01.avi"),
        )
        labelled, labelling = read_splits(write_lists(tmp_path)).apply(videos)
        assert labelled[0].splits == {"1": "train"}
        assert labelling.unlisted == ("one/v_Swing_g02_c01", "two/v_Swing_g02_c01")

    def test_ids_of_a_store(self, tmp_path: Path) -> None:
        """An id may be anything where the path is known; without it, it may still carry its extension."""
        splits = read_splits(write_lists(tmp_path))
        labelling = splits.label(table(["7"]), pa.array(["Biking/v_Biking_g01_c01.avi"]))
        assert labelling.table["label"].to_pylist() == ["Biking"]
        labelling = splits.label(table(["Biking/v_Biking_g01_c01.avi"]))
        assert labelling.table["split_1"].to_pylist() == ["train"]

    def test_a_split_is_replaced_and_another_kept(self, tmp_path: Path) -> None:
        videos = sources(
            source("x.avi", "X", **{"1": "train", "own": "val"}),
            source("Biking/v_Biking_g03_c01.avi", "B"),
        )
        labelled, _ = read_splits(write_lists(tmp_path)).apply(videos)
        assert (labelled[0].label, labelled[0].splits) == ("Biking", {"1": "test"})
        assert (labelled[1].label, labelled[1].splits) == ("X", {"own": "val"})


class TestTables:
    def test_labels_of_sources(self) -> None:
        made = sources(source("a.avi"), source("b.avi", "B", two="val")).labels
        assert made.equals(table(["a", "b"], label=[None, "B"], split_two=[None, "val"]))

    def test_merging(self) -> None:
        old = table(["a", "b", "c"], label=["1", "2", "3"], group=["g", None, None], split_1=["train", "test", None])
        new = pa.table({"id": ["c", "b", "z"], "label": ["new", None, "z"], "split_1": ["test", None, "val"]})
        expected = table(
            ["a", "b", "c"], label=["1", "2", "new"], group=["g", None, None], split_1=[None, None, "test"]
        )
        assert merge_labels(old, new).equals(expected)

    def test_csv_by_id(self, tmp_path: Path) -> None:
        (tmp_path / "labels.csv").write_text("id,label,note\n001,A,x\nz,B,\nb,,\n")
        new = read_labels_csv(tmp_path / "labels.csv")
        assert new.column_names == ["id", "label"]
        labelling = label_from_table(table(["001", "b", "c"], label=["X", "Y", "X"]), new, ["Y", "X"])
        assert labelling.table["label"].to_pylist() == ["A", "Y", "X"]
        assert labelling.classes == ("Y", "X", "A")
        assert labelling.absent == ("z",)
        assert labelling.unlisted == ("c",)

    def test_csv_by_path_is_read_as_a_list_of_sources(self, tmp_path: Path) -> None:
        (tmp_path / "list.csv").write_text("path,group,split_x\nb/y.avi,g2,test\na/x.avi,g1,\n")
        expected = pa.table({"id": ["a/x", "b/y"], "group": ["g1", "g2"], "split_x": [None, "test"]})
        assert read_labels_csv(tmp_path / "list.csv").equals(expected)

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            ("label\nx\n", "no column 'id' and none 'path'"),
            ("id,note\n1,x\n", "names no label, group or split_"),
            ("id,label\n1,x\n1,y\n", "row 2 repeats the id '1' of row 1"),
            ("id,label\n,x\n", "row 1 has no id"),
            ("id,split_1\n1,dev\n", "row 1, column 'split_1': found 'dev'"),
        ],
    )
    def test_what_is_wrong_is_said(self, tmp_path: Path, content: str, message: str) -> None:
        (tmp_path / "labels.csv").write_text(content)
        with pytest.raises(SourceError, match=message):
            read_labels_csv(tmp_path / "labels.csv")

    def test_not_a_table(self, tmp_path: Path) -> None:
        with pytest.raises(SourceError, match="not a table of labels"):
            read_labels_csv(tmp_path / "labels.txt")


CELLS = st.dictionaries(st.text("ab\n é", min_size=1, max_size=3), st.none() | st.sampled_from("xyz"))


@given(CELLS, CELLS)
def test_merging_keeps_the_ids_and_never_loses_a_label(old: dict[str, str], new: dict[str, str]) -> None:
    merged = merge_labels(
        table(sorted(old), label=[old[i] for i in sorted(old)]),
        table(list(new), label=list(new.values())),
    )
    assert merged["id"].to_pylist() == sorted(old)
    assert merged["label"].to_pylist() == [new.get(i) or old[i] for i in sorted(old)]


@given(st.text())
def test_any_text_is_read_or_refused(tmp_path_factory: pytest.TempPathFactory, content: str) -> None:
    folder = tmp_path_factory.mktemp("lists")
    (folder / "classInd.txt").write_text(CLASSES)
    (folder / "trainlist01.txt").write_text(content, newline="")
    with suppress(SourceError):
        splits = read_splits(folder)
        assert {video.label for video in splits.videos.values()} <= set(splits.classes)
