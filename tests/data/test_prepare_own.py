"""Folders and tables of one's own: what is there is stored as it is, what cannot be used is named."""

import argparse
import builtins
import errno
import json
import os
import random
import re
import signal
from pathlib import Path

import pytest
import webdataset
from tokenizers import Tokenizer

from mmfast.data import prepare
from mmfast.data.prepare import folder, index, table, writer
from mmfast.data.shards import Dataset
from mmfast.data.tars import index_tars
from mmfast.errors import UserError


def place(root, files):
    for name, data in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data if isinstance(data, bytes) else data.encode("utf-8"))
    return root


def samples(dataset):
    return {
        index.key(i): (
            split,
            tuple(index.read(i, c) for c in ("image", "text", "audio")),
            int(index.labels[i]),
        )
        for split, index in dataset.splits.items()
        for i in range(len(index))
    }


PETS = {
    "cat/a.jpg": b"jpg a",
    "cat/a.txt": "a cat",
    "cat/a.wav": b"wav a",
    "cat/b.v2.PNG": b"png b",
    "dog/x/c.txt": "ein Hündchen",
    "dog/d.flac": b"flac d",
    "dog/.hidden.txt": "no",
}


def test_files_that_share_a_name_are_one_sample_stored_as_they_are(tmp_path):
    made = Dataset.open(
        folder.prepare_folder(place(tmp_path / "pets", PETS), tmp_path / "out", split="train")
    )
    assert (
        made.classes == ("cat", "dog")
        and made.modalities == ("image", "text", "audio")
        and made.name == "pets"
    )
    assert samples(made) == {
        "cat/a": ("train", (b"jpg a", b"a cat", b"wav a"), 0),
        "cat/b_v2": ("train", (b"png b", None, None), 0),
        "dog/d": ("train", (None, None, b"flac d"), 1),
        "dog/x/c": ("train", (None, "ein Hündchen".encode(), None), 1),
    }


def test_a_flat_folder_has_no_labels_and_a_folder_per_split_is_understood(tmp_path):
    flat = place(tmp_path / "flat", {"a.jpg": b"1", "b.jpg": b"2"})
    made = Dataset.open(folder.prepare_folder(flat, tmp_path / "one", split="test"))
    assert (
        made.classes == ()
        and list(made.splits) == ["test"]
        and made.splits["test"].labels.tolist() == [-1, -1]
    )
    assert made.tokenizer_path is None and made.modalities == ("image",)
    with pytest.raises(UserError, match=r"no split 'train' \(or it is empty\); there are: test"):
        made.split("train")
    tree = place(tmp_path / "tree", {"train/cat/a.jpg": b"1", "val/dog/b.jpg": b"2", "test/cat/c.jpg": b"3"})
    made = Dataset.open(folder.prepare_folder(tree, tmp_path / "two"))
    assert made.classes == ("cat", "dog")
    assert {key: (split, label) for key, (split, _, label) in samples(made).items()} == {
        "train/cat/a": ("train", 0),
        "val/dog/b": ("validation", 1),
        "test/cat/c": ("test", 0),
    }


def test_a_sample_keeps_its_split_when_others_come(tmp_path):
    root = place(tmp_path / "in", {f"c{i % 3}/{i:03d}.txt": f"text {i}" for i in range(200)})
    before = samples(Dataset.open(folder.prepare_folder(root, tmp_path / "one")))
    place(root, {f"c{i % 3}/new{i:03d}.txt": "new" for i in range(50)})
    after = samples(Dataset.open(folder.prepare_folder(root, tmp_path / "two")))
    assert all(after[key][0] == split for key, (split, _, _) in before.items()) and len(after) == 250
    sizes = [sum(split == name for split, _, _ in before.values()) for name in writer.SPLITS]
    assert 140 <= sizes[0] <= 180 and min(sizes) >= 8


def test_unknown_kinds_and_text_that_is_not_utf8_are_named_and_counted(tmp_path, capsys):
    files = {"a.jpg": b"1", "a.txt": b"caf\xe9", "b.mp3": b"2", "c.xyz": b"3", "d.txt": b"\xff"}
    made = Dataset.open(folder.prepare_folder(place(tmp_path / "in", files), tmp_path / "out", split="train"))
    said = capsys.readouterr().err
    assert (
        f"{tmp_path}/in/a.txt: not UTF-8 at byte 3; left without text" in said
        and "2 x text not UTF-8" in said
    )
    assert "b.mp3: unknown extension '.mp3'" in said and "2 x file of an unknown kind" in said
    assert "1 x sample of which nothing is left" in said
    assert samples(made) == {"a": ("train", (b"1", None, None), -1)}


def test_folders_that_cannot_be_used_are_named(tmp_path):
    cases = [
        ({"a.jpg": b"1", "a.png": b"2"}, r"a\.png: a second image of one sample, beside a\.jpg"),
        ({"a.b.jpg": b"1", "a_b.jpg": b"2"}, "give the same key 'a_b'"),
        ({"a.xyz": b"1"}, "no file that can be used"),
        ({"a.txt": b"\xff"}, "no samples at all"),
        (
            {"train/cat/a.jpg": b"1", "test/cat/a.jpg": b"2", "README.txt": b"read"},
            r"4/README\.txt: outside the split folders that are there \(test, train\)",
        ),
        ({"train/a.jpg": b"1", "train.txt": b"read"}, r"5/train\.txt: outside the split folders"),
        ({"train/a.jpg": b"1", "val/b.jpg": b"2", "c/d.jpg": b"3"}, r"6/c/d\.jpg: outside the split folders"),
        ({os.fsdecode(b"\xff.jpg"): b"1"}, r"^b'.*/7/\\xff\.jpg': a name that is not UTF-8"),
    ]
    for number, (files, message) in enumerate(cases):
        with pytest.raises(UserError, match=message):
            chosen = None if "split" in message else "train"
            folder.prepare_folder(place(tmp_path / str(number), files), tmp_path / "out", split=chosen)
    with pytest.raises(UserError, match="nowhere: no such folder"):
        folder.prepare_folder(tmp_path / "nowhere", tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == list("01234567")


def test_a_class_may_have_the_name_of_a_split_and_a_file_a_macs(tmp_path):
    files = {f"{name}/at 10.00\u202fAM.jpg": b"1" for name in ("bus", "car", "train")}
    made = Dataset.open(folder.prepare_folder(place(tmp_path / "in", files), tmp_path / "out", split=None))
    assert made.classes == ("bus", "car", "train")
    assert set(samples(made)) == {f"{name}/at 10_00\u202fAM" for name in made.classes}


def test_links_are_followed_and_those_that_lead_nowhere_are_named(tmp_path, capsys):
    root = place(tmp_path / "in", {"cat/a.jpg": b"a"})
    place(tmp_path / "elsewhere", {"b.jpg": b"b", "deep/c.jpg": b"c"})
    (root / "dog").symlink_to(tmp_path / "elsewhere")
    (root / "cat/b.jpg").symlink_to(tmp_path / "elsewhere/b.jpg")
    (root / "cat/gone.jpg").symlink_to(tmp_path / "nothing.jpg")
    (root / "cat/round").symlink_to(root)
    os.mkfifo(root / "pipe.jpg")
    made = Dataset.open(folder.prepare_folder(root, tmp_path / "out", split="train"))
    assert samples(made).keys() == {"cat/a", "cat/b", "dog/b", "dog/deep/c"} and made.classes == (
        "cat",
        "dog",
    )
    said = capsys.readouterr().err
    for line in (
        "cat/gone.jpg: link to nothing",
        "cat/round: a link to a folder that holds it",
        "pipe.jpg: device or pipe",
    ):
        assert f"{root}/{line}; left out\n" in said
    assert said.count("in all: 1 x ") == 3


def test_changed_files_are_noticed(tmp_path):
    root = place(tmp_path / "in", {"a.txt": "one"})
    folder.prepare_folder(root, tmp_path / "out", split="train")
    folder.prepare_folder(root, tmp_path / "out", split="train")
    place(root, {"a.txt": "longer"})
    with pytest.raises(UserError, match="made with other arguments"):
        folder.prepare_folder(root, tmp_path / "out", split="train")
    made = Dataset.open(folder.prepare_folder(root, tmp_path / "out", split="train", force=True))
    assert made.splits["train"].read(0, "text") == b"longer"


TABLE = """image,text,audio,label,who,part
i/a.jpg,"A cat, asleep",s/a.ogg,cat,ann,train
i/a.jpg,Another caption,,cat,bob,validation
,t/c.txt,s/c.wav,,ann,test
"""


def listed(root, text=TABLE, **more):
    place(root, {"i/a.jpg": b"A", "s/a.ogg": b"SA", "s/c.wav": b"SC", "t/c.txt": "from a file", **more})
    return place(root, {"all.csv": text}) / "all.csv"


def test_a_table_gives_a_sample_per_row(tmp_path):
    made = Dataset.open(table.prepare_csv(listed(tmp_path / "in"), tmp_path / "out", split_column="part"))
    assert made.classes == ("cat",)
    assert samples(made) == {
        "line00000002": ("train", (b"A", b"A cat, asleep", b"SA"), 0),
        "line00000003": ("validation", (b"A", b"Another caption", None), 0),
        "line00000004": ("test", (None, b"from a file", b"SC"), -1),
    }


def test_rows_that_share_a_file_or_a_group_share_a_split(tmp_path):
    text = "image,text,audio,who\n" + "".join(
        f"i/{i // 5}.jpg,caption {i},s/{i // 10}.ogg,w{i % 2}\n" for i in range(200)
    )
    files = {f"i/{i}.jpg": f"{i}" for i in range(40)} | {f"s/{i}.ogg": f"{i}" for i in range(20)}
    file = listed(tmp_path / "in", text, **files)
    by_file = samples(Dataset.open(table.prepare_csv(file, tmp_path / "one")))
    seen = {}
    for split, (image, _, audio), _ in by_file.values():
        assert seen.setdefault(("i", image), split) == split and seen.setdefault(("a", audio), split) == split
    assert len({split for split, _, _ in by_file.values()}) >= 2
    by_who = samples(Dataset.open(table.prepare_csv(file, tmp_path / "two", group_column="who")))
    assert len({(int(key[4:]) % 2, split) for key, (split, _, _) in by_who.items()}) == 2
    file.write_text(re.sub(r"w\d$", " ", text, flags=re.MULTILINE))  # groups that nobody named
    assert samples(Dataset.open(table.prepare_csv(file, tmp_path / "three", group_column="who"))) == by_file


def test_a_tables_columns_are_found_beside_spaces_and_those_not_used_are_named(tmp_path, capsys):
    file = listed(tmp_path / "in", "image, label ,Text\ni/a.jpg,cat,a cat\n")
    made = Dataset.open(table.prepare_csv(file, tmp_path / "out", split="train"))
    assert samples(made) == {"line00000002": ("train", (b"A", None, None), 0)} and made.classes == ("cat",)
    assert "all.csv: column 'Text' is not used\n" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("i/gone.jpg,x,,cat", r"all\.csv:3: image 'i/gone\.jpg': no such file"),
        ("i/a.bmp,x,,cat", r"all\.csv:3: image 'i/a\.bmp': got extension '\.bmp', wanted jpg, jpeg, png"),
        (",t/gone.txt,,cat", r"all\.csv:3: text 't/gone\.txt': no such file"),
        ("i/a.jpg,x", r"all\.csv:3: another number of cells"),
        ("i/a.jpg,x,,cat,more", r"all\.csv:3: another number of cells"),
        (",,,cat", r"all\.csv:3: no component at all"),
        (f",{'long ' * 80}see a.txt,,cat", r"all\.csv:3: text 'long .* see a\.txt': no such file"),
        ('i/a.jpg,"x" y,,cat', r"all\.csv:3: "),
    ],
)
def test_bad_rows_are_named_with_file_and_line(tmp_path, capsys, line, message):
    file = listed(tmp_path / "in", f"image,text,audio,label\ni/a.jpg,x,,cat\n{line}\n")
    with pytest.raises(UserError, match=message):
        table.prepare_csv(file, tmp_path / "out", split="train")
    assert not (tmp_path / "out").exists()
    if '"' not in line:  # a broken quote has no end to go on from
        made = Dataset.open(table.prepare_csv(file, tmp_path / "out", split="train", skip_bad=True))
        assert len(made.splits["train"]) == 1 and "in all: 1 x bad row, left out" in capsys.readouterr().err


def test_tables_that_cannot_be_used_are_named(tmp_path):
    for data, message in [
        (b"image,text\ni/a.jpg,caf\xe9\n", r"all\.csv: not UTF-8 at byte 22"),
        ("picture,words\na,b\n", "got columns picture, words; wanted some of image, text, audio, label"),
        ("", "got columns none"),
        ("image\n", "no samples at all"),
        ("image,label, label\ni/a.jpg,cat,dog\n", "all.csv: column 'label' is there twice"),
    ]:
        with pytest.raises(UserError, match=message):
            table.prepare_csv(listed(tmp_path / "in", data), tmp_path / "out")
    with pytest.raises(UserError, match=r"gone\.csv: No such file"):
        table.prepare_csv(tmp_path / "gone.csv", tmp_path / "out")
    with pytest.raises(UserError, match="--group-column 'whom' is no column; there are: image"):
        table.prepare_csv(listed(tmp_path / "in"), tmp_path / "out", group_column="whom")
    with pytest.raises(UserError, match=r"all\.csv:2: who: got 'ann', wanted train, validation, test"):
        table.prepare_csv(listed(tmp_path / "in"), tmp_path / "out", split_column="who")


def test_every_source_has_the_interface_of_the_command(tmp_path):
    parser = argparse.ArgumentParser()
    sources = parser.add_subparsers(dest="source")
    for name, module in prepare.SOURCES.items():
        module.add_arguments(sources.add_parser(name))
    place(tmp_path / "in", {"a.txt": "x"})
    args = parser.parse_args(
        ["folder", str(tmp_path / "in"), "--out", str(tmp_path / "out"), "--split", "train"]
    )
    assert prepare.SOURCES[args.source].prepare(args) == tmp_path / "out"
    args = parser.parse_args(
        ["csv", str(listed(tmp_path / "t")), "--out", str(tmp_path / "out2"), "--fractions", "1,0,0"]
    )
    assert prepare.SOURCES[args.source].prepare(args) == tmp_path / "out2"
    args = parser.parse_args(["digits", "--out", str(tmp_path / "out3"), "--samples", "3,2,many"])
    with pytest.raises(UserError, match="--samples: got '3,2,many'"):
        prepare.SOURCES[args.source].prepare(args)
    for wrong in ("1,1,1", "nan,nan,nan", "1,nan,0", "inf,-inf,1", "1,0"):
        with pytest.raises(UserError, match=rf"--fractions: got '{wrong}'"):
            folder.parse_fractions(wrong)
    assert {name: parser.parse_args([name]).out.as_posix() for name in ("stamps", "digits")} == {
        "stamps": "data/stamps",
        "digits": "data/digits",
    }


def test_a_full_disk_leaves_nothing_and_is_one_line(tmp_path, monkeypatch):
    root = place(tmp_path / "in", {f"{split}/c/{i}.txt": "text" for split in writer.SPLITS for i in range(3)})
    real = builtins.open

    def full(path, mode="r", *args, **kwargs):
        if "w" in mode and ".test.partial/000000.tar" in str(path):
            return real("/dev/full", "wb", buffering=0)
        return real(path, mode, *args, **kwargs)

    monkeypatch.setattr(builtins, "open", full)
    with pytest.raises(
        UserError, match=r"/out/test/000000\.tar: cannot be written: No space left on device"
    ) as caught:
        folder.prepare_folder(root, tmp_path / "out")
    assert "\n" not in str(caught.value) and [path.name for path in tmp_path.iterdir()] == ["in"]


def test_a_full_disk_at_the_very_end_keeps_the_old_dataset(tmp_path, monkeypatch):
    root = place(tmp_path / "in", {"a.txt": "old"})
    folder.prepare_folder(root, tmp_path / "out", split="train")
    place(root, {"a.txt": "newer"})

    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(writer.Path, "write_text", full)
    with pytest.raises(UserError, match="No space left on device"):
        folder.prepare_folder(root, tmp_path / "out", split="train", force=True)
    assert Dataset.open(tmp_path / "out").splits["train"].read(0, "text") == b"old"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in", "out"]


def test_ctrl_c_leaves_nothing_and_says_so(tmp_path, monkeypatch):
    root = place(tmp_path / "in", {f"{i}.txt": "text" for i in range(9)})
    real, calls = folder.read_parts, []

    def interrupted(parts, log):
        calls.append(parts)
        if len(calls) == 5:
            assert (tmp_path / ".out.partial").is_dir()
            signal.raise_signal(signal.SIGINT)
        return real(parts, log)

    monkeypatch.setattr(folder, "read_parts", interrupted)
    with pytest.raises(KeyboardInterrupt, match="/out: interrupted, nothing was written"):
        folder.prepare_folder(root, tmp_path / "out", split="train")
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_the_tokenizer_lowers_composes_and_marks_what_it_does_not_know():
    tokenizer = writer.train_tokenizer(["A café by the sea", "the café", "The sea"] * 3)
    assert (tokenizer.token_to_id("[PAD]"), tokenizer.token_to_id("[UNK]")) == (0, 1)
    composed, decomposed = tokenizer.encode("CAFÉ").ids, tokenizer.encode("cafe\u0301").ids
    assert composed == decomposed and len(composed) == 1
    assert tokenizer.encode("日").ids[-1] == 1
    assert tokenizer.decode(tokenizer.encode("the sea").ids) == "the sea"
    assert 0 not in tokenizer.encode("anything at all").ids


def test_the_tokenizer_is_the_same_every_time():
    words = ["".join(random.Random(i).choices("abcdefghij", k=4)) for i in range(300)]  # many ties
    texts = [" ".join(words[i : i + 5]) for i in range(290)]
    made = {writer.train_tokenizer(texts).to_str() for _ in range(4)}
    assert len(made) == 1 and len(json.loads(made.pop())["model"]["vocab"]) > 100


def test_shards_of_a_dataset_are_those_of_the_writer(tmp_path, monkeypatch):
    made = folder.prepare_folder(place(tmp_path / "in", {"a/x.txt": "t"}), tmp_path / "out", split="train")
    assert index_tars(made / "train", classes=["a"]).labels.tolist() == [0]
    assert Tokenizer.from_file(str(made / "tokenizer.json")).get_vocab_size() >= 2


def test_tars_of_others_become_a_dataset_and_stay_as_they_are(tmp_path):
    for split, count in {"train": 6, "test": 2}.items():
        (tmp_path / split).mkdir()
        with webdataset.ShardWriter(str(tmp_path / split / "%03d.tar"), maxcount=4, verbose=0) as sink:
            for i in range(count):
                label = {"label": ("dog", "cat")[i % 2]} if i != 5 else {"other": 1}
                sink.write({"__key__": f"{i}", "jpg": b"jpg", "txt": f"text {i}", "json": label})
    before = {path: path.read_bytes() for path in tmp_path.rglob("*.tar")}
    made = Dataset.open(index.prepare_index(tmp_path))
    assert made.classes == ("cat", "dog") and made.modalities == ("image", "text") and made.tokenizer_path
    assert made.splits["train"].labels.tolist() == [1, 0, 1, 0, 1, -1] and len(made.splits["test"]) == 2
    assert {path: path.read_bytes() for path in tmp_path.rglob("*.tar")} == before and len(before) == 3
    prints = made.splits["train"].fingerprint
    assert Dataset.open(index.prepare_index(tmp_path, force=True)).splits["train"].fingerprint == prints
    os.truncate(tmp_path / "train" / "001.tar", 600)
    with pytest.raises(UserError, match=r"train/001\.tar: cut short.*--force indexes it again"):
        index.prepare_index(tmp_path)


def test_tars_that_came_or_changed_after_the_index_are_noticed(tmp_path):
    def write(name, text):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        with webdataset.TarWriter(str(path)) as sink:
            sink.write({"__key__": "a", "txt": text})
        return path

    write("train/a.tar", "one")
    before = Dataset.open(index.prepare_index(tmp_path)).splits["train"].fingerprint
    index.prepare_index(tmp_path)
    time = os.stat(write("train/a.tar", "two")).st_mtime_ns  # of the same size
    os.utime(tmp_path / "train/a.tar", ns=(time, time + 1))
    for name, message in [
        ("train/a.tar", r"train/a\.tar: changed after it was indexed: its time is another"),
        ("train/b.tar", r"train/b\.tar: came after the index was made, which does not name it"),
        ("test/a.tar", "test: came after the index was made"),
    ]:
        if not (tmp_path / name).exists():
            write(name, "more")
        with pytest.raises(UserError, match=f"{message}; --force indexes it again"):
            index.prepare_index(tmp_path)
        made = Dataset.open(index.prepare_index(tmp_path, force=True))
        assert made.splits["train"].fingerprint != before
    assert len(made.splits["train"]) == 2 and len(made.splits["test"]) == 1
    root = place(tmp_path / "in", {"a.txt": "one"})
    for described in (None, b"{", b"[]"):  # even with --force nothing replaces what others made
        if described is not None:
            (tmp_path / "dataset.json").write_bytes(described)
        for force in (False, True):
            with pytest.raises(UserError, match=r"dataset\.json does not say what it was made with"):
                folder.prepare_folder(root, tmp_path, force=force)
    assert (tmp_path / "train/b.tar").is_file()


def test_tars_of_others_with_numbers_for_labels(tmp_path, capsys):
    (tmp_path / "train").mkdir()
    with webdataset.ShardWriter(str(tmp_path / "train" / "%03d.tar"), verbose=0) as sink:
        for i in range(4):
            sink.write({"__key__": f"{i}", "txt": "x", "cls": 2 * i})
        sink.write({"__key__": "more", "txt": "x", "webp": b"picture"})
        sink.write({"__key__": "lost", "webp": b"picture"})
    made = Dataset.open(index.prepare_index(tmp_path))
    assert made.classes == tuple("0123456") and made.splits["train"].labels.tolist() == [0, 2, 4, 6, -1]
    said = capsys.readouterr().err
    assert "/train/000.tar: more.webp: file of an unknown kind; left out\n" in said
    assert "in all: 2 x file of an unknown kind\nin all: 1 x sample of which nothing is left\n" in said
    assert said.endswith(f"{tmp_path}: 5 train; 7 classes, 1 x no label\n")
    with pytest.raises(UserError, match="none of the folders train, validation, test is here"):
        index.prepare_index(tmp_path / "train")


def test_the_guide_runs(tmp_path, monkeypatch, capsys):
    guide = Path(__file__).parents[2] / "docs/guides/data.md"
    monkeypatch.chdir(tmp_path)
    exec("\n".join(re.findall(r"```python\n(.*?)```", guide.read_text("utf-8"), re.DOTALL)), {})
    said = capsys.readouterr().out
    assert (
        "50 train000000" in said and "('png', 'txt', 'flac')" in said and "('cat', 'dog') {'train': " in said
    )
