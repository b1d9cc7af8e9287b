"""The plan and the fold, done with columns, against the same done slowly with dictionaries."""

import shutil
from collections import defaultdict

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from shards import SPEC

from moclip.pipeline.extract import plan
from moclip.pipeline.extract.plan import cut, make_plan, videos_a_shard
from moclip.pipeline.extract.sources import Sources
from moclip.store import Entry, Receipt, SourceFacts, add_feature, create_store, fold_store, open_folder, publish
from moclip.store import write_receipt as write

FEATURES = ("a", "b", "c")
IDS = "vwxyz"
ROWS = st.dictionaries(
    st.sampled_from(IDS),
    st.tuples(st.sampled_from(["ok", "ok", "failed"]), st.none() | st.integers(1, 2), st.none() | st.just("hash")),
    min_size=1,
)
#: The receipts of a store: feature, and id to status, size and hash. Each is newer than those before it.
RECEIPTS = st.lists(
    st.tuples(st.sampled_from(FEATURES), ROWS, st.sampled_from([{}, {"n": 1}, {"n": None}])), max_size=6
)
#: What is listed: id to the file's size now.
LISTED = st.dictionaries(st.sampled_from(IDS), st.none() | st.integers(1, 2), min_size=1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("plans") / "store"


def write_store(url, receipts):
    shutil.rmtree(url, ignore_errors=True)
    create_store(url)
    for feature in FEATURES:
        add_feature(url, feature, SPEC)
    # Names in another order than times: no rule follows from the names of files.
    for time, (feature, rows, extra) in enumerate(receipts):
        videos = tuple(
            (
                SourceFacts(id_, path=f"{id_}{time}", bytes=size, content_hash=digest, extra=extra),
                Entry("ok", None, None, "1", 0, 1, bytes(16)) if status == "ok" else Entry("failed", "truncated"),
            )
            for id_, (status, size, digest) in rows.items()
        )
        write(open_folder(url), Receipt(feature, f"s{-time % 5}-{time}", SPEC, time, {}, {}, videos))


def slow_fold(receipts):
    """(id, feature) -> (status, shard's time), and id -> (size, hash, path)."""
    rows = [
        (id_, feature, status, time, size, digest)
        for time, (feature, found, _) in enumerate(receipts)
        for id_, (status, size, digest) in found.items()
    ]
    newest = {id_: size for id_, _, _, _, size, _ in rows if size is not None}
    rows = [row for row in rows if row[4] is None or row[4] == newest[row[0]]]
    rows.sort(key=lambda row: (row[2] == "failed", -row[3]))
    entries, videos = {}, {}
    for id_, feature, status, time, size, digest in rows:
        entries.setdefault((id_, feature), (status, f"s{-time % 5}-{time}"))
        videos.setdefault(id_, (size, digest, f"{id_}{time}"))
    return entries, videos


@settings(deadline=None, max_examples=50)
@given(RECEIPTS)
def test_the_fold_is_what_its_rule_says(folder, receipts):
    write_store(folder, receipts)
    folded = fold_store(folder)
    entries, videos = slow_fold(receipts)
    found = folded.entries.to_pylist()
    assert [((row["id"], row["feature"]), (row["status"], row["shard"])) for row in found] == sorted(entries.items())
    facts = [(row["id"], (row["bytes"], row["content_hash"], row["path"])) for row in folded.videos.to_pylist()]
    assert facts == sorted(videos.items())


def slow_plan(receipts, listed, features, workers, retry_failed, replace_changed):
    entries, videos = slow_fold(receipts)
    sizes = {id_: size for id_, (size, digest, _) in videos.items() if digest is not None}
    held = defaultdict(set)
    for (id_, feature), (status, _) in entries.items():
        if status == "ok":
            held[id_].add(feature)
    missing, done, failed_before, changed = {}, 0, [], []
    for id_, now in sorted(listed.items()):
        found = {name: entries.get((id_, name), (None,))[0] for name in features}
        if now is not None and id_ in sizes and sizes[id_] != now:
            if replace_changed and held[id_] <= set(features):
                missing[id_] = features
            else:
                changed.append(id_)
            continue
        lacking = tuple(name for name, state in found.items() if state is None or (state == "failed" and retry_failed))
        if "failed" in found.values() and not retry_failed:
            failed_before.append(id_)
        if lacking:
            missing[id_] = lacking
        elif "failed" not in found.values():
            done += 1
    most, tasks = videos_a_shard(len(missing), workers), []
    for lacking in sorted(set(missing.values())):
        members = sorted(id_ for id_ in missing if missing[id_] == lacking)
        for start in range(0, len(members), most):
            tasks.append((len(tasks), members[start : start + most], lacking))
    return tasks, done, tuple(failed_before), tuple(changed)


@settings(deadline=None)
@given(
    RECEIPTS,
    LISTED,
    st.lists(st.sampled_from(FEATURES), min_size=1, unique=True),
    st.integers(1, 2),
    st.booleans(),
    st.booleans(),
    st.booleans(),
)
def test_a_plan_is_the_slow_plan(folder, receipts, listed, features, workers, retry_failed, replace_changed, published):
    write_store(folder, receipts)
    if published:
        publish(folder)
    columns = {name: pa.array(sorted(listed)) for name in ("id", "relative_path", "label", "group")}
    sources = Sources(pa.table({**columns, "path": columns["id"].cast(pa.binary())}))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plan, "file_size", lambda path: listed[path.decode()])
        made = make_plan(
            folder,
            sources,
            tuple(features),
            workers=workers,
            retry_failed=retry_failed,
            replace_changed=replace_changed,
        )
    tasks = [(task.number, [video.id for video in task.videos], task.features) for task in made.tasks]
    expected = slow_plan(receipts, listed, tuple(features), workers, retry_failed, replace_changed)
    assert (tasks, made.done, made.failed_before, made.changed) == expected
    assert made.videos == sum(len(task.videos) for task in made.tasks)


@given(st.lists(st.integers(0, 9)), st.integers(1, 5), st.integers(1, 20))
def test_runs_are_bounded_and_cover_all(sizes, most, most_size):
    runs = list(cut(sizes, most=most, most_size=most_size))
    assert [at for run in runs for at in range(run.start, run.stop)] == list(range(len(sizes)))
    assert all(1 <= run.stop - run.start <= most for run in runs)
    assert all(sum(sizes[run.start : run.stop - 1]) < most_size for run in runs)
    full = [run.stop - run.start == most or sum(sizes[run]) >= most_size for run in runs[:-1]]
    assert all(full)
