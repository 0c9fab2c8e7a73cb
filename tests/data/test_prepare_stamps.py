"""Stamps: a package of the same shape, made here, so that no test needs the network."""

import json
import os
import stat
import subprocess
from collections import defaultdict

import numpy as np
import pytest
import soundfile
from PIL import Image

from mmfast.data.prepare import stamps
from mmfast.data.shards import Dataset
from mmfast.errors import UserError


def draw(path, seed, mode="RGBA"):
    rng = np.random.default_rng(seed)
    pixels = rng.integers(0, 256, (12, 16, 4), dtype=np.uint8)
    pixels[0, 0] = 0, 0, 0, 0  # transparent: white once composited
    Image.fromarray(pixels).convert(mode).save(path)


def speak(path, seed):
    soundfile.write(path, np.random.default_rng(seed).normal(0, 0.1, 800), 16000)


def lay_out(root):
    """Three categories of 24 stamps; some captions and recordings repeat, some stamps lack a part."""
    number = 0
    for category in ("animals", "food", "town"):
        folder = root / category / "sub"
        folder.mkdir(parents=True)
        for i in range(24):
            number += 1
            base = folder / f"s{i:02d}"
            caption = f"A {category} {i if i % 6 else 0}."  # every sixth has the same caption
            base.with_suffix(".txt").write_text(
                f"{caption}\nde.utf8=D {caption}\nfr.utf8=Le {category} {i}.\n", "utf-8"
            )
            if i == 3:
                base.with_suffix(".svg").write_text("<svg/>")
            else:
                draw(base.with_suffix(".png"), number, ("RGBA", "LA", "P", "RGB")[i % 4])
            if i != 4:
                speak(f"{base}_desc_fr.ogg", 7 if i in (8, 9) else number)  # one recording for two stamps
            if i % 2:
                speak(f"{base}_desc_de.ogg", 1000 + number)
        draw(folder / "s00_mirror.png", 1)
    few = root / "space"
    few.mkdir()
    draw(few / "rocket.png", 999)
    (few / "rocket.txt").write_text("A rocket.\n")


@pytest.fixture(scope="module")
def deb(tmp_path_factory):
    folder = tmp_path_factory.mktemp("deb")
    lay_out(folder / "tree" / stamps.ROOT)
    doc = folder / "tree/usr/share/doc" / stamps.PACKAGE
    doc.mkdir(parents=True)
    (doc / "copyright").write_text("License: GPL-2\n")
    control = folder / "tree/DEBIAN"
    control.mkdir()
    (control / "control").write_text(
        f"Package: {stamps.PACKAGE}\nVersion: 1\nArchitecture: all\nMaintainer: x <x@example.org>\nDescription: test\n"
    )
    path = folder / f"{stamps.PACKAGE}_1_all.deb"
    subprocess.run(["dpkg-deb", "-Znone", "-b", folder / "tree", path], check=True, capture_output=True)
    return path


def rows(dataset):
    for split, index in dataset.splits.items():
        for i in range(len(index)):
            yield split, index, i, json.loads(index.read(i, "json"))


def test_nothing_leaks_between_splits(deb, tmp_path):
    made = Dataset.open(stamps.prepare_stamps(tmp_path / "out", deb=deb, languages=["all"]))
    splits = defaultdict(set)
    for split, index, i, about in rows(made):
        splits["stamp", about["stamp"]].add(split)
        splits["caption", index.read(i, "text")].add(split)
        for component in ("audio", "image"):
            if index.has(i, component):
                splits[component, index.read(i, component)].add(split)
    assert {kind for kind, _ in splits} == {"stamp", "caption", "audio", "image"}
    assert [key for key, seen in splits.items() if len(seen) > 1] == []


def test_splits_are_stratified_as_groups_allow(deb, tmp_path):
    made = Dataset.open(stamps.prepare_stamps(tmp_path / "out", deb=deb))
    for split, share in {"train": 0.70, "validation": 0.15, "test": 0.15}.items():
        counts = np.bincount(made.splits[split].labels, minlength=3)
        assert np.all(np.abs(counts - 24 * share) <= 2), (split, counts)


def test_stamps_that_lack_a_part_are_kept_or_dropped_as_asked(deb, tmp_path):
    kept = Dataset.open(stamps.prepare_stamps(tmp_path / "kept", deb=deb))
    gaps = {about["stamp"]: index.extensions(i) for _, index, i, about in rows(kept)}
    assert (
        len(gaps) == 72 and gaps["food/sub/s03"] == ("txt", "ogg") and gaps["food/sub/s04"] == ("jpg", "txt")
    )
    full = Dataset.open(stamps.prepare_stamps(tmp_path / "full", deb=deb, complete=True))
    assert sum(full.splits[s].present(c).size for s in full.splits for c in ("image",)) == 66
    assert all(index.extensions(i) == ("jpg", "txt", "ogg") for _, index, i, _ in rows(full))


def test_classes_languages_captions_and_licence(deb, tmp_path):
    made = Dataset.open(stamps.prepare_stamps(tmp_path / "out", deb=deb, languages=["de"], captions="spoken"))
    assert made.classes == ("animals", "food", "town") and made.licence == "GPL-2"
    assert "License: GPL-2" in (made.path / "NOTICE").read_text()
    for _, index, i, about in rows(made):
        assert index.read(i, "text").decode().startswith("D A" if about["language"] else "A")
        assert about["label"] == made.classes[index.labels[i]] == about["stamp"].split("/")[0]
    everything = Dataset.open(stamps.prepare_stamps(tmp_path / "all", deb=deb, all_classes=True))
    assert everything.classes == ("animals", "food", "space", "town")
    with pytest.raises(UserError, match="--languages: no speech in xx; there are: de, fr"):
        stamps.prepare_stamps(tmp_path / "xx", deb=deb, languages=["xx"])


def test_transparency_becomes_white(tmp_path):
    for mode in ("RGBA", "LA"):
        draw(tmp_path / "a.png", 0, mode)
        Image.new("RGBA", (8, 8), (0, 0, 0, 0)).convert(mode).save(tmp_path / "clear.png")
        data = stamps.encode(tmp_path / "clear.png")
        (tmp_path / "clear.jpg").write_bytes(data)
        assert np.asarray(Image.open(tmp_path / "clear.jpg")).min() == 255
    Image.new("RGB", (2300, 100)).save(tmp_path / "wide.png")
    (tmp_path / "wide.jpg").write_bytes(stamps.encode(tmp_path / "wide.png"))
    assert Image.open(tmp_path / "wide.jpg").size == (512, 22)


def test_a_picture_that_does_not_decode_is_told_and_left_out(tmp_path, capsys, monkeypatch):
    lay_out(tmp_path / "package" / stamps.ROOT)
    broken = tmp_path / "package" / stamps.ROOT / "food/sub/s01.png"
    os.truncate(broken, 60)
    monkeypatch.setattr(stamps, "unpack", lambda deb, folder: tmp_path / "package")
    made = Dataset.open(stamps.prepare_stamps(tmp_path / "out", deb="any"))
    said = capsys.readouterr().err
    assert f"{broken}: " in said and "in all: 1 x picture that does not decode" in said
    assert (
        sum(not index.has(i, "image") for _, index, i, a in rows(made) if a["stamp"] == "food/sub/s01") == 1
    )


def test_two_runs_give_the_same_bytes(deb, tmp_path):
    one, two = (stamps.prepare_stamps(tmp_path / name, deb=deb) for name in ("one", "two"))
    files = [path.relative_to(one) for path in one.rglob("*") if path.is_file()]
    assert len(files) == 9 and all((one / name).read_bytes() == (two / name).read_bytes() for name in files)


def test_a_bad_package_is_named_and_leaves_nothing(tmp_path):
    with pytest.raises(UserError, match=r"nowhere\.deb: no such file"):
        stamps.prepare_stamps(tmp_path / "out", deb=tmp_path / "nowhere.deb")
    bad = tmp_path / "bad.deb"
    bad.write_bytes(b"not a package")
    with pytest.raises(UserError, match=r"bad\.deb: cannot be unpacked"):
        stamps.prepare_stamps(tmp_path / "out", deb=bad)
    assert [path.name for path in tmp_path.iterdir()] == ["bad.deb"]


def fake_apt(folder, script):
    path = folder / "apt-get"
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(path.stat().st_mode | stat.S_IEXEC)


def test_where_the_package_cannot_be_had_one_line_says_what_was_tried(tmp_path, monkeypatch):
    (tmp_path / "bin").mkdir()
    monkeypatch.setenv("PATH", str(tmp_path / "bin"), prepend=os.pathsep)
    fake_apt(tmp_path / "bin", 'echo "W: hm" >&2; echo "E: Unable to locate package" >&2; exit 100')
    with pytest.raises(UserError) as caught:
        stamps.prepare_stamps(tmp_path / "out")
    line = str(caught.value)
    assert "`apt-get download` said: E: Unable to locate package; with fresh package lists: E:" in line
    assert "--deb" in line and "\n" not in line and [path.name for path in tmp_path.iterdir()] == ["bin"]
    monkeypatch.setattr(stamps.shutil, "which", lambda name: None)
    with pytest.raises(UserError, match="this system has no apt-get"):
        stamps.prepare_stamps(tmp_path / "out")


def test_the_package_is_downloaded_with_package_lists_of_its_own_where_there_are_none(
    tmp_path, monkeypatch, deb
):
    (tmp_path / "bin").mkdir()
    monkeypatch.setenv("PATH", str(tmp_path / "bin"), prepend=os.pathsep)
    fake_apt(
        tmp_path / "bin",
        f"""case "$*" in
*lists*update) touch lists/ok;;
*lists*download*) test -e lists/ok && cp {deb} .;;
*) echo "E: no lists" >&2; exit 100;;
esac""",
    )
    assert len(Dataset.open(stamps.prepare_stamps(tmp_path / "out")).splits["train"]) > 40
