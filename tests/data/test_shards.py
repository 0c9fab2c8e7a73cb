"""Shards: whole or not at all, readable by others, and honest about damage."""

import builtins
import errno
import io
import json
import multiprocessing
import os
import pickle
import signal
import tarfile
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import webdataset

from mmfast.data.shards import Dataset, ShardIndex, ShardWriter, Staging
from mmfast.data.tars import index_tars
from mmfast.errors import UserError


def parts(i):
    """A sample; every third has no audio, every fifth no image."""
    made = {
        "png": bytes([i]) * (100 + i),
        "txt": f"sample {i}".encode(),
        "ogg": os.urandom(0) + b"o" * (700 * i),
    }
    if i % 3 == 0:
        del made["ogg"]
    if i % 5 == 0:
        del made["png"]
    return made | {"json": json.dumps({"label": f"c{i % 4}"}).encode()}


def fill(folder, n=20, shard_bytes=16 << 10):
    with ShardWriter(folder, shard_bytes) as writer:
        for i in range(n):
            writer.write(f"dir/key{i:03d}", parts(i), label=i % 4)
    return folder


def everything(index):
    names = ("image", "text", "audio", "json")
    return [(index.key(i), *(index.read(i, name) for name in names)) for i in range(len(index))]


def test_what_was_written_is_read_back(tmp_path):
    index = ShardIndex.open(fill(tmp_path / "train"))
    assert len(index) == 20 and len(index.columns["shard_name"]) > 2
    assert index.keys == [f"dir/key{i:03d}" for i in range(20)]
    assert index.labels.dtype == np.int64 and index.labels.tolist() == [i % 4 for i in range(20)]
    for i in range(20):
        wanted = parts(i)
        assert index.read(i, "image") == wanted.get("png") and index.read(i, "audio") == wanted.get("ogg")
        assert index.has(i, "audio") == (i % 3 != 0) == index.present("audio")[i]
        assert index.extensions(i) == tuple(e for e in ("png", "txt", "ogg") if e in wanted)
        assert index.extension(i, "image") == ("png" if i % 5 else None)


def test_two_runs_give_the_same_bytes(tmp_path):
    one, two = fill(tmp_path / "one"), fill(tmp_path / "two")
    assert sorted(p.name for p in one.iterdir()) == sorted(p.name for p in two.iterdir())
    assert all(p.read_bytes() == (two / p.name).read_bytes() for p in one.iterdir())
    assert ShardIndex.open(one).fingerprint == ShardIndex.open(two).fingerprint


def test_the_fingerprint_follows_the_content(tmp_path):
    prints = set()
    for name, data in {"a": b"x", "b": b"y"}.items():  # same sizes, same offsets
        with ShardWriter(tmp_path / name) as writer:
            writer.write("k", {"txt": data})
        prints.add(ShardIndex.open(tmp_path / name).fingerprint)
    assert len(prints) == 2


def test_shards_are_plain_ustar(tmp_path):
    for path in fill(tmp_path / "train").glob("*.tar"):
        assert path.read_bytes()[257:265] == b"ustar\x0000"
        with tarfile.open(path) as tar:
            assert all(member.isfile() and member.mtime == 0 for member in tar)


def test_webdataset_reads_our_shards(tmp_path):
    folder = fill(tmp_path / "train")
    read = list(webdataset.WebDataset(sorted(map(str, folder.glob("*.tar"))), shardshuffle=False))
    assert len(read) == 20
    for i, sample in enumerate(read):
        assert sample["__key__"] == f"dir/key{i:03d}"
        assert {k: v for k, v in sample.items() if not k.startswith("__")} == parts(i)


def test_tars_made_by_webdataset_are_indexed(tmp_path):
    with webdataset.ShardWriter(str(tmp_path / "%06d.tar"), maxcount=3, verbose=0) as sink:
        for i in range(7):
            sink.write({"__key__": f"a.folder/{i}", "jpg": b"jpg%d" % i, "txt": f"text {i}", "cls": i})
    index = index_tars(tmp_path)
    assert index.keys == [f"a.folder/{i}" for i in range(7)] and index.labels.tolist() == list(range(7))
    assert (
        index.read(4, "image") == b"jpg4"
        and index.read(4, "text") == b"text 4"
        and index.read(4, "audio") is None
    )
    index.save()
    again = ShardIndex.open(tmp_path)
    assert again.fingerprint == index.fingerprint and everything(again) == everything(index)


def test_building_and_writing_agree(tmp_path):
    written = ShardIndex.open(fill(tmp_path / "train"))
    built = index_tars(tmp_path / "train", classes=["c0", "c1", "c2", "c3"])
    assert everything(built) == everything(written) and built.labels.tolist() == written.labels.tolist()


@pytest.mark.parametrize("keep", [0, 100, 512, 5000])
def test_a_tar_cut_short_is_named_with_both_sizes(tmp_path, keep):
    path = fill(tmp_path / "train", n=3) / "000000.tar"
    whole = path.stat().st_size
    os.truncate(path, keep)
    with pytest.raises(
        UserError, match=rf"000000\.tar: cut short: got {keep} bytes, wanted {whole}.*dir/key00[01]"
    ):
        ShardIndex.open(tmp_path / "train")


def test_a_foreign_tar_cut_short_is_named_with_its_offset(tmp_path):
    path = fill(tmp_path / "train", n=3) / "000000.tar"
    last = ShardIndex.open(tmp_path / "train").columns["offset"][2, 2]  # the audio of sample 2
    os.truncate(path, last + 10)
    with pytest.raises(
        UserError, match=rf"000000\.tar: cut short at offset {last}: got 10 bytes .*wanted 1400"
    ):
        index_tars(tmp_path / "train")
    path.write_bytes(b"not a tar at all" * 100)
    with pytest.raises(UserError, match=r"000000\.tar: not a whole, uncompressed tar"):
        index_tars(tmp_path / "train")


def put(path, members, **settings):
    """A tar as others make them; returns the offset of each member."""
    path.parent.mkdir(parents=True, exist_ok=True)
    offsets = []
    with tarfile.open(path, "w", **settings) as tar:
        for name, data in members:
            offsets.append(tar.offset)
            info = tarfile.TarInfo(name)
            if isinstance(data, bytes):
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
            else:
                info.type, info.linkname = tarfile.SYMTYPE, data
                tar.addfile(info)
    return offsets


TEXTS = [(f"{i}.txt", b"text") for i in range(10)]


@pytest.mark.parametrize(
    "damage",
    [
        pytest.param(lambda data, at: data[:at], id="cut between two members"),
        pytest.param(lambda data, at: data[: at + 100], id="cut inside a header"),
        pytest.param(lambda data, at: data[: at + 10] + b"XXXX" + data[at + 14 :], id="a damaged header"),
        pytest.param(lambda data, at: data[:at] + bytes(512) + data[at + 512 :], id="a header wiped out"),
        pytest.param(lambda data, at: data[:at] + bytes(1024) + data, id="two tars in one"),
    ],
)
def test_a_foreign_tar_that_ends_where_it_should_not_is_named_with_its_offset(tmp_path, damage):
    at = put(tmp_path / "a.tar", TEXTS)[5]
    assert len(index_tars(tmp_path)) == 10
    (tmp_path / "a.tar").write_bytes(damage((tmp_path / "a.tar").read_bytes(), at))
    with pytest.raises(UserError, match=rf"a\.tar: cut short or damaged at offset {at}: wanted"):
        index_tars(tmp_path)


def test_what_a_foreign_tar_loses_is_told(tmp_path):
    members = [
        ("a.jpg", b"a"),
        ("a.png", b"a"),
        ("a.json", b'{"label": 2.0}'),
        ("b.webp", b"b"),
        ("b.json", b'{"label": [1, 2]}'),
        ("c.jpg", b"c"),
        ("c.json", b'{"label": [1, 2]}'),
        ("d.jpg", "a.jpg"),
        ("README", b"read me"),
        (".hidden", b""),
    ]
    put(tmp_path / "a.tar", members)
    told = []
    index = index_tars(tmp_path, tell=lambda kind, line: told.append(line))
    assert index.keys == ["a", "c"] and index.labels.tolist() == [2, -1]
    assert sorted(told) == [
        f"{tmp_path}/a.tar: {line}"
        for line in (
            "README: file of an unknown kind; left out",
            "a.png: second file of a component; left out",
            "b.webp: file of an unknown kind; left out",
            "b: nothing is left of it",
            "c.json: label that is neither a whole number nor a name; left without label",
            "d.jpg: link, device or sparse file; left out",
        )
    ]


def test_a_sparse_file_in_a_foreign_tar_is_told(tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w", format=tarfile.PAX_FORMAT) as tar:
        for name, data in [("a.txt", b"text"), ("b.txt", b"1\n0\n4\n".ljust(512, b"\0") + b"text")]:
            info = tarfile.TarInfo(name)
            if name == "b.txt":
                info.pax_headers = {
                    "GNU.sparse.major": "1",
                    "GNU.sparse.minor": "0",
                    "GNU.sparse.realsize": "4",
                }
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    told = []
    assert index_tars(tmp_path, tell=lambda *what: told.append(what)).keys == ["a"]
    kind = "link, device or sparse file"
    assert told == [(kind, f"{tmp_path}/a.tar: b.txt: {kind}; left out")]


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ([("a.jpg", b""), ("b.jpg", b""), ("a.cls", b"1")], r"a\.cls stands apart from the other files of its sample"),
        ([("a.jpg", b""), ("a.json", b'{"label": 100000000000000000000}')], r"a\.json: label 1000+, wanted 0 to 999999"),
        ([("a.jpg", b""), ("a.cls", b"123456789")], r"a\.cls: label 123456789, wanted 0 to 999999"),
        ([("a.jpg", b""), ("a.cls", b"-2")], r"a\.cls: label -2, wanted 0 to 999999, or -1 for none"),
        ([("caf\xe9.jpg", b"")], r"'caf.*\.jpg': a name that is not UTF-8"),
    ],
)  # fmt: skip
def test_foreign_tars_that_cannot_be_used_are_named(tmp_path, members, message):
    put(tmp_path / "a.tar", members, format=tarfile.GNU_FORMAT, encoding="latin-1")
    with pytest.raises(UserError, match=rf"^{tmp_path}/a\.tar: {message}"):
        index_tars(tmp_path)


def test_a_tar_that_shrinks_while_in_use_is_named(tmp_path):
    index = ShardIndex.open(fill(tmp_path / "train", n=3))
    os.truncate(tmp_path / "train" / "000000.tar", 700)
    with pytest.raises(
        UserError, match=r"000000\.tar: cut short at offset \d+: got \d+ bytes .*key002.*wanted 1400"
    ):
        index.read(2, "audio")


def test_a_shard_that_grew_or_went_is_named(tmp_path):
    path = fill(tmp_path / "train", n=3) / "000000.tar"
    with open(path, "ab") as file:
        file.write(b"more")
    with pytest.raises(UserError, match="changed after it was indexed"):
        ShardIndex.open(tmp_path / "train")
    path.unlink()
    with pytest.raises(UserError, match=r"000000\.tar: No such file"):
        ShardIndex.open(tmp_path / "train")


def test_an_empty_split_is_named(tmp_path):
    with ShardWriter(tmp_path / "validation"):
        pass
    with pytest.raises(UserError, match="validation: an empty split: 0 samples"):
        ShardIndex.open(tmp_path / "validation")
    (tmp_path / "bare").mkdir()
    with pytest.raises(UserError, match="bare: an empty split: no"):
        index_tars(tmp_path / "bare")


def test_missing_or_broken_descriptions_are_named(tmp_path):
    with pytest.raises(UserError, match="nowhere: not a prepared dataset: no such folder"):
        Dataset.open(tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"dataset\.json is missing"):
        Dataset.open(tmp_path)
    wrong = [
        b'{"version": 1, "splits": %s}' % value for value in (b'["train"]', b"null", b'{}, "classes": null')
    ]
    for broken in (b"{", b"[]", b"\xff", b'{"version": 1}', *wrong):
        (tmp_path / "dataset.json").write_bytes(broken)
        with pytest.raises(UserError, match=r"dataset\.json: not a dataset's description"):
            Dataset.open(tmp_path)
    (tmp_path / "dataset.json").write_text('{"version": 2, "splits": {}}')
    with pytest.raises(UserError, match="version 2, wanted 1"):
        Dataset.open(tmp_path)
    (tmp_path / "dataset.json").write_text('{"version": 1, "splits": {"train": 3}}')
    with pytest.raises(UserError, match="train: not a split"):
        Dataset.open(tmp_path)
    fill(tmp_path / "train", n=2)
    with pytest.raises(UserError, match="train: got 2 samples, wanted 3"):
        Dataset.open(tmp_path)
    (tmp_path / "train" / "index.npz").write_bytes(b"PK\x03\x04 broken")
    with pytest.raises(UserError, match=r"index\.npz: not a readable index"):
        Dataset.open(tmp_path)


def test_the_index_holds_no_pickle(tmp_path):
    folder = fill(tmp_path / "train", n=2)
    with np.load(folder / "index.npz", allow_pickle=False) as file:
        assert all(file[name].dtype != object for name in file.files)


@pytest.mark.parametrize("key", ["", "a.b", "a/", "/a", "../a", "a\nb", "a\x85b"])
def test_keys_that_others_would_read_differently_are_refused(tmp_path, key):
    with pytest.raises(UserError, match="key"), ShardWriter(tmp_path / "train") as writer:
        writer.write(key, {"txt": b""})
    assert list(tmp_path.iterdir()) == []


def test_bad_samples_are_refused(tmp_path):
    for parts, message in [
        ({"gif": b""}, "unknown extension 'gif'"),
        ({"jpg": b"", "png": b""}, "more than one image"),
    ]:
        with pytest.raises(UserError, match=message), ShardWriter(tmp_path / "train") as writer:
            writer.write("k", parts)
    with pytest.raises(UserError, match="'k' was written twice"), ShardWriter(tmp_path / "train") as writer:
        writer.write("k", {"txt": b""})
        writer.write("k", {"txt": b""})
    with (
        pytest.raises(UserError, match="not a possible ustar name"),
        ShardWriter(tmp_path / "train") as writer,
    ):
        writer.write("k" * 300, {"txt": b""})
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_leaves_nothing_and_is_one_line(tmp_path, monkeypatch):
    class Full(io.BufferedWriter):
        def write(self, data):
            if self.tell() + len(data) > 3000:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return super().write(data)

    monkeypatch.setattr(builtins, "open", lambda path, mode: Full(io.FileIO(path, mode)))
    with pytest.raises(UserError, match=r"000000\.tar: cannot be written: No space left on device") as caught:
        fill(tmp_path / "train")
    assert "\n" not in str(caught.value) and list(tmp_path.iterdir()) == []


def test_a_disk_that_fills_up_at_the_index_leaves_nothing(tmp_path, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(np, "savez", full)
    with pytest.raises(UserError, match=r"index\.npz: cannot be written: No space left on device"):
        fill(tmp_path / "train")
    assert list(tmp_path.iterdir()) == []


def test_ctrl_c_while_writing_leaves_nothing(tmp_path):
    with pytest.raises(KeyboardInterrupt), ShardWriter(tmp_path / "train") as writer:
        writer.write("a", {"txt": b"x"})
        assert [path.name for path in tmp_path.iterdir()] == [".train.partial"]
        signal.raise_signal(signal.SIGINT)
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_writer_left_is_swept_and_a_living_one_is_respected(tmp_path):
    living = Staging(tmp_path / "train")
    with pytest.raises(UserError, match="another process is writing it"):
        ShardWriter(tmp_path / "train")
    (living.path / "000000.tar").write_bytes(b"half")
    os.close(living._lock)  # as if killed: the lock goes, the files stay
    index = ShardIndex.open(fill(tmp_path / "train", n=3))
    assert len(index) == 3 and [p.name for p in tmp_path.iterdir()] == ["train"]


def test_a_finished_split_is_not_overwritten(tmp_path):
    before = ShardIndex.open(fill(tmp_path / "train", n=3)).fingerprint
    with pytest.raises(UserError, match="train: already there"):
        fill(tmp_path / "train", n=4)
    assert ShardIndex.open(tmp_path / "train").fingerprint == before


def test_threads_read_at_once_and_descriptors_stay_few(tmp_path, monkeypatch):
    monkeypatch.setattr("mmfast.data.shards._KEPT_OPEN", 2)
    index = ShardIndex.open(fill(tmp_path / "train", n=40, shard_bytes=1))
    wanted = everything(index)
    barrier = threading.Barrier(8)

    def read(seed):
        barrier.wait()
        order = np.random.default_rng(seed).permutation(40)
        return all(index.read(int(i), "text") == wanted[i][2] for i in np.tile(order, 5))

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(read, range(8)))
    assert len(index._files) <= 2
    ours = [
        os.readlink(f"/proc/self/fd/{fd}")
        for fd in os.listdir("/proc/self/fd")
        if os.path.exists(f"/proc/self/fd/{fd}")
    ]
    assert sum(str(tmp_path) in path for path in ours) <= 2


def test_forked_and_spawned_processes_read_from_one_index(tmp_path):
    index = ShardIndex.open(fill(tmp_path / "train"))
    wanted = everything(index)  # descriptors are open when the fork comes
    with multiprocessing.get_context("fork").Pool(2) as pool:
        assert [pool.apply(index.read, (i, "text")) for i in range(20)] == [row[2] for row in wanted]
    assert everything(pickle.loads(pickle.dumps(index))) == wanted
