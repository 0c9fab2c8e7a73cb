"""From shards to batches: the same bits at any world size, after any resume, whatever is missing or broken."""

import gc
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from loading import MODALITIES, holes, open_data, parts, picture, sentence, sound, write_dataset

from mmfast.data import Audio, Image, Text
from mmfast.data.assemble import Memory, choose_decoder
from mmfast.data.loader import _Stage
from mmfast.errors import UserError

DECODERS = ["dali", "torch"]
TRAIN, TEST = 40, 13


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    train = holes([parts(i) for i in range(TRAIN)])
    test = [parts(100 + i) for i in range(TEST)]
    return write_dataset(tmp_path_factory.mktemp("data") / "tiny", {"train": train, "test": test})


def batches(data, count, split="train", train=True, **settings):
    with data.loader(split, batch_size=8, train=train, **settings) as loader:
        return [batch for batch, _ in zip(loader, range(count), strict=False)]


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def loader_threads():
    return [thread for thread in threading.enumerate() if thread.name.startswith("mmfast")]


@pytest.fixture(autouse=True)
def no_thread_is_left_behind():
    yield
    gc.collect()
    deadline = time.monotonic() + 5
    while loader_threads() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert loader_threads() == []


@pytest.mark.parametrize("decoder", DECODERS)
def test_a_batch_is_what_the_contract_says(folder, decoder):
    data = open_data(folder, decoder=decoder)
    (batch,) = batches(data, 1)
    shapes = {name: (tuple(value.shape), value.dtype) for name, value in batch.items()}
    assert shapes == {
        "image": ((8, 3, 24, 24), torch.float32),
        "text": ((8, 5), torch.int64),
        "audio": ((8, 16, 51), torch.float32),
        "lengths": ((8, 3), torch.int64),
        "present": ((8, 3), torch.bool),
        "label": ((8,), torch.int64),
        "id": ((8,), torch.int64),
    }
    assert batch["image"].is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(batch["present"], batch["lengths"] > 0)
    assert batch["label"].tolist() == [int(i) % 3 for i in batch["id"]]
    assert (
        data.vocab_size == 13
        and data.num_classes == 3
        and list(data.modalities) == ["image", "text", "audio"]
    )


@pytest.mark.parametrize("decoder", DECODERS)
def test_what_is_missing_is_absent_and_zero_and_not_a_fault(folder, decoder):
    data = open_data(folder, decoder=decoder)
    index = data.dataset.split("train")
    with data.loader("train", batch_size=8, train=False) as loader:
        for batch in loader:
            for row, sample in enumerate(batch["id"].tolist()):
                for m, name in enumerate(data.modalities):
                    there = sample >= 0 and index.has(sample, name)
                    assert batch["present"][row, m] == there
                    assert (batch[name][row] != 0).any() == there
        assert loader.ledger == {}


def test_text_is_cut_and_padded(folder):
    data = open_data(folder)
    encode = data.loader("train", batch_size=8, train=False)
    words = ["[PAD]", "[UNK]", *dict.fromkeys("a red green blue small big round thing on the table".split())]
    for batch in encode:
        for sample, ids, length in zip(
            batch["id"].tolist(), batch["text"], batch["lengths"][:, 1].tolist(), strict=True
        ):
            if length:
                spoken = sentence(sample).decode().split()[:5]
                assert [words[i] for i in ids[:length]] == spoken
            assert (ids[length:] == 0).all()


def test_a_batch_of_nothing_is_a_batch(tmp_path):
    data = open_data(write_dataset(tmp_path / "d", {"train": [{"txt": b"red"}] * 3}))
    (batch,) = batches(data, 1, only=["image"])
    assert not batch["present"].any() and (batch["image"] == 0).all()


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("decoder", DECODERS)
def test_the_union_over_ranks_is_the_same_batch_at_any_world_size(folder, decoder, train):
    data = open_data(folder, decoder=decoder)
    whole = batches(data, 5, train=train)
    for world_size in (2, 4):
        ranks = [batches(data, 5, train=train, rank=r, world_size=world_size) for r in range(world_size)]
        for step, expected in enumerate(whole):
            for r in range(world_size):
                rows = {name: value[r::world_size] for name, value in expected.items()}
                assert same(ranks[r][step], rows)


@pytest.mark.parametrize("decoder", DECODERS)
def test_a_resumed_run_sees_the_same_bits(folder, decoder):
    data = open_data(folder, decoder=decoder, prefetch=3)
    straight = batches(data, 12)
    with data.loader("train", batch_size=8, train=True) as loader:
        for _ in range(4):
            next(loader)
        time.sleep(0.2)  # prefetch is full: the threads are ahead of the consumer
        stopped_at = loader.step
    assert stopped_at == 4
    resumed = batches(open_data(folder, decoder=decoder), 8, start_step=stopped_at)
    assert all(same(a, b) for a, b in zip(straight[4:], resumed, strict=True))


def test_an_evaluation_is_finite_and_filled_up(folder):
    data = open_data(folder)
    with data.loader("test", batch_size=8, train=False) as loader:
        first, again = list(loader), list(loader)
        assert loader.steps_per_epoch == len(first) == 2
    ids = torch.cat([batch["id"] for batch in first])
    assert ids.tolist() == [*range(TEST), -1, -1, -1]
    filler = first[1]
    assert (filler["label"][5:] == -1).all() and not filler["present"][5:].any()
    assert all((filler[name][5:] == 0).all() for name in MODALITIES)
    assert all(same(a, b) for a, b in zip(first, again, strict=True))


def test_training_is_augmented_anew_in_every_epoch_and_evaluation_never(folder):
    data, plain = open_data(folder), open_data(folder, augment=False)
    steps = TRAIN // 8

    def images(chosen):
        return {
            (epoch, sample): image
            for epoch in range(2)
            for batch in chosen[epoch * steps : (epoch + 1) * steps]
            for sample, image, there in zip(
                batch["id"].tolist(), batch["image"], batch["present"][:, 0], strict=True
            )
            if there
        }

    augmented, still = images(batches(data, 2 * steps)), images(batches(plain, 2 * steps))
    seen = [sample for epoch, sample in augmented if epoch == 0]
    assert all(not torch.equal(augmented[0, sample], augmented[1, sample]) for sample in seen)
    assert all(torch.equal(still[0, sample], still[1, sample]) for sample in seen)
    for batch in batches(data, steps, train=False):
        for sample, image in zip(batch["id"].tolist(), batch["image"], strict=True):
            assert (0, sample) not in still or torch.equal(image, still[0, sample])


def test_seeds_differ_and_are_repeatable(folder):
    data = open_data(folder)
    (first,), (other,), (again,) = batches(data, 1), batches(data, 1, seed=1), batches(data, 1, seed=0)
    assert same(first, again) and not torch.equal(first["id"], other["id"])


def test_modalities_left_out_are_absent_and_the_others_keep_their_bits(folder):
    data = open_data(folder)
    for whole, part in zip(batches(data, 3), batches(data, 3, only=["audio"]), strict=True):
        assert not part["present"][:, :2].any() and (part["image"] == 0).all() and (part["text"] == 0).all()
        assert torch.equal(part["audio"], whole["audio"]) and torch.equal(part["id"], whole["id"])


def test_two_modalities_may_read_one_component(folder):
    two = {
        "wide": Image(size=24),
        "close": Image(size=12, crop_scale=(0.1, 0.2)),
        "words": Text(max_tokens=3),
    }
    (batch,) = batches(open_data(folder, modalities=two), 1)
    assert batch["wide"].shape[-1] == 24 and batch["close"].shape[-1] == 12
    assert torch.equal(batch["present"][:, 0], batch["present"][:, 1])


@pytest.mark.parametrize("decoder", DECODERS)
def test_a_kept_batch_does_not_change(folder, decoder):
    data = open_data(folder, decoder=decoder)
    with data.loader("train", batch_size=8, train=True) as loader:
        kept = [next(loader) for _ in range(3)]
        copies = [{name: value.clone() for name, value in batch.items()} for batch in kept]
        for _ in range(12):
            next(loader)
    assert all(same(a, b) for a, b in zip(kept, copies, strict=True))


def garble(data, start, count=40):
    return data[:start] + bytes(byte ^ 0x5A for byte in data[start : start + count]) + data[start + count :]


def corruptions():
    """Number of a sample -> the component that is broken, its bytes, and what the ledger must say."""
    jpg, png, ogg, flac, wav = (
        picture(0, "jpg"),
        picture(1, "png"),
        sound(2, "ogg"),
        sound(1, "flac"),
        sound(3, "wav"),
    )
    return {
        0: ("image", "jpg", jpg[: len(jpg) // 2], "JPEG cut short"),
        1: ("image", "png", garble(png, len(png) // 2), "does not decode"),
        2: ("audio", "ogg", garble(ogg, len(ogg) // 2, 300), "does not decode"),
        3: ("audio", "wav", wav[:-100], "WAV cut short"),
        4: ("image", "jpg", b"", "neither JPEG nor PNG"),
        5: ("text", "txt", b"caf\xe9", "not UTF-8"),
        6: ("image", "jpg", garble(jpg, 70, 200), ""),
        7: ("audio", "flac", flac[: len(flac) // 2], "does not decode"),
        8: ("audio", "ogg", ogg[: len(ogg) // 2], "Ogg cut short"),
        9: ("text", "txt", b"  ", "no tokens"),
        10: ("image", "png", png[:-8], "PNG cut short"),
        12: ("audio", "wav", sound(0, seconds=0.0), "no samples"),
    }


@pytest.mark.parametrize("decoder", DECODERS)
def test_the_broken_are_absent_and_counted_and_the_others_keep_their_bits(tmp_path, decoder):
    samples = [parts(i) for i in range(16)]
    broken = [dict(sample) for sample in samples]
    extensions = {"image": ("jpg", "png"), "text": ("txt",), "audio": ("wav", "flac", "ogg")}
    for number, (component, extension, bytes_, _) in corruptions().items():
        for name in extensions[component]:
            broken[number].pop(name, None)
        broken[number][extension] = bytes_
    whole = open_data(write_dataset(tmp_path / "whole", {"train": samples}), decoder=decoder)
    data = open_data(write_dataset(tmp_path / "broken", {"train": broken}), decoder=decoder)
    for train in (True, False):
        with data.loader("train", batch_size=8, train=train) as loader:
            for expected, batch in zip(batches(whole, 2, train=train), loader, strict=False):
                for row, sample in enumerate(batch["id"].tolist()):
                    bad = corruptions().get(sample, (None,))[0]
                    for m, name in enumerate(MODALITIES):
                        assert batch["present"][row, m] == (name != bad)
                        wanted = torch.zeros_like(batch[name][row]) if name == bad else expected[name][row]
                        assert torch.equal(batch[name][row], wanted)
                if loader.step == 2:
                    break
            counted = {key: (modality, reason) for (_, key, modality, reason) in loader.ledger}
            assert set(loader.ledger.values()) == {1}
            assert counted.keys() == {f"train-{number:03d}" for number in corruptions()}
            for number, (component, _, _, reason) in corruptions().items():
                modality, said = counted[f"train-{number:03d}"]
                assert modality == component and reason in said


def test_the_ledger_counts_what_was_handed_out_not_what_was_prefetched(tmp_path):
    samples = [{"jpg": picture(i)} for i in range(6)]
    samples[5] = {"jpg": picture(5)[:-9]}
    data = open_data(write_dataset(tmp_path / "d", {"train": samples}), modalities={"image": Image(size=8)})
    with data.loader("train", batch_size=2, train=False) as loader:
        next(loader)
        time.sleep(0.2)
        assert loader.ledger == {}
        list(iter(loader))
        assert loader.ledger == {("train", "train-005", "image", "JPEG cut short: no end marker"): 1}


def test_a_bad_sample_is_counted_in_every_epoch(tmp_path):
    samples = [{"png": picture(i, "png")} for i in range(4)]
    samples[2] = {"png": garble(samples[2]["png"], 300)}
    data = open_data(write_dataset(tmp_path / "d", {"train": samples}), modalities={"image": Image(size=8)})
    with data.loader("train", batch_size=4, train=True) as loader:
        seen = [next(loader) for _ in range(3)]
        assert list(loader.ledger.values()) == [3]
    assert all((batch["present"][:, 0] == (batch["id"] != 2)).all() for batch in seen)


def test_sounds_kept_in_memory_have_the_same_bits_and_are_decoded_once(folder, monkeypatch):
    data, forgetful = open_data(folder), open_data(folder, memory_mb=0)
    decoded = []
    monkeypatch.setattr("mmfast.data.assemble.check_audio", lambda data: decoded.append(len(data)))
    steps = 3 * TRAIN // 8
    kept = batches(data, steps)
    sounds = sum(data.dataset.split("train").present("audio"))
    assert len(decoded) <= 2 * sounds  # once, and what was read ahead before it was known
    decoded.clear()
    again = batches(data, steps)
    assert decoded == []
    for a, b, c in zip(kept, again, batches(forgetful, steps), strict=True):
        assert same(a, b) and same(a, c)


def test_memory_has_a_limit():
    memory = Memory(1)
    for sample in range(10):
        memory.keep(("train", "audio", sample), torch.zeros(64, 1024))  # a quarter of a megabyte
    assert len(memory.sounds) == 4


def test_a_shard_cut_short_while_training_ends_in_one_line(tmp_path):
    data = open_data(write_dataset(tmp_path / "d", {"train": [parts(i) for i in range(8)]}))
    (shard, *_) = sorted((tmp_path / "d" / "train").glob("*.tar"))
    loader = data.loader("train", batch_size=8, train=True)
    os.truncate(shard, 3000)
    with pytest.raises(UserError, match=rf"{shard}.*cut short at offset"):
        next(loader)
    assert loader_threads() == []


def test_an_error_in_a_thread_is_raised_in_the_consumer_with_its_cause(folder):
    data = open_data(folder)
    with data.loader("train", batch_size=8, train=True) as loader:
        next(loader)

        object.__setattr__(loader.view, "index", SimpleNamespace(labels=loader.view.index.labels))
        with pytest.raises(RuntimeError, match=r"loading step .* of 'train' failed: .*read") as caught:
            for _ in range(10):
                next(loader)
        assert isinstance(caught.value.__cause__, AttributeError)


def test_leaving_early_leaves_no_thread(folder):
    data = open_data(folder)
    before = threading.active_count()
    with pytest.raises(ZeroDivisionError), data.loader("train", batch_size=8, train=True) as loader:
        for _ in loader:
            _ = 1 / 0
    assert loader_threads() == [] and threading.active_count() == before
    forgotten = data.loader("train", batch_size=8, train=True)
    next(forgotten)
    del forgotten  # the fixture sees to it that its threads go too


def test_closing_twice_and_going_on_work(folder):
    data = open_data(folder)
    loader = data.loader("train", batch_size=8, train=True)
    loader.close()
    first = next(loader)
    loader.close()
    loader.close()
    second = next(loader)
    loader.close()
    expected = batches(data, 2)
    assert same(first, expected[0]) and same(second, expected[1])


SCRIPT = """
import sys, time
sys.path.insert(0, {here!r})
from loading import open_data
loader = open_data({folder!r}, decoder={decoder!r}).loader("train", batch_size=8, train=True)
next(loader)
print("ready", flush=True)
{rest}
"""


@pytest.mark.parametrize("decoder, rest", [("dali", "for _ in loader: pass"), ("dali", ""), ("torch", "")])
def test_ctrl_c_and_the_end_of_the_program_do_not_hang(folder, decoder, rest):
    script = SCRIPT.format(here=os.path.dirname(__file__), folder=str(folder), decoder=decoder, rest=rest)
    process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    try:
        assert process.stdout.readline() == b"ready\n"
        if rest:
            time.sleep(0.2)
            process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=30)
    finally:
        process.kill()  # one that did hang would take a core from all that follows
    assert process.returncode == (-signal.SIGINT if rest else 0), said.decode()


def test_time_waiting_is_measured(folder):
    with open_data(folder).loader("train", batch_size=8, train=True) as loader:
        next(loader)
        first = loader.time_waiting
        time.sleep(0.3)
        next(loader)
    assert first > 0 and loader.time_waiting - first < 0.1


def test_the_fingerprint_follows_the_data_and_what_is_made_of_it(folder):
    base = open_data(folder)
    assert base.fingerprint == open_data(folder, threads=1, prefetch=1, decoder="torch").fingerprint
    others = [
        open_data(folder, seed=1),
        open_data(folder, augment=False),
        open_data(folder, modalities={**MODALITIES, "image": Image(size=25)}),
        open_data(folder, modalities={"audio": MODALITIES["audio"]}),
        open_data(folder, modalities=dict(reversed(MODALITIES.items()))),
    ]
    assert len({base.fingerprint, *(other.fingerprint for other in others)}) == 6


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"split": "nowhere"}, "no split 'nowhere'.*train, test"),
        ({"batch_size": 7, "world_size": 2}, "batch_size: got 7, wanted a multiple of the 2 ranks"),
        ({"batch_size": 0}, "batch_size: got 0"),
        (
            {"split": "test", "batch_size": 28, "world_size": 14},
            "'test' has 13 samples, fewer than the 14 ranks",
        ),
        ({"rank": 2, "world_size": 2}, "rank: got 2 of 2"),
        ({"start_step": -1}, "start_step: got -1"),
        ({"only": ["image", "smell"]}, "no modality 'smell'; there are: image, text, audio"),
    ],
)
def test_impossible_loaders_are_refused_in_one_line(folder, settings, message):
    with pytest.raises(UserError, match=message) as caught:
        open_data(folder).loader(**{"split": "train", "batch_size": 8, "train": True, **settings})
    assert "\n" not in str(caught.value)


def test_a_component_that_the_dataset_lacks_is_refused(folder):
    with pytest.raises(UserError, match=r"data.modalities.radar: component 'radar' is not in"):
        open_data(folder, modalities={"radar": Audio(component="radar")})


def test_text_without_a_tokenizer_is_refused(tmp_path):
    path = write_dataset(tmp_path / "d", {"train": [parts(0)]})
    (path / "tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match=r"tokenizer.json: not a tokenizer file"):
        open_data(path)
    (path / "tokenizer.json").unlink()
    with pytest.raises(UserError, match=r"tokenizer.json: no such file"):
        open_data(path)
    open_data(path, modalities={"image": Image()})


def test_a_batch_may_be_larger_than_the_split(folder):
    data = open_data(folder)
    with data.loader("test", batch_size=32, train=True) as loader:
        ids = next(loader)["id"]
    assert sorted(ids[:TEST].tolist()) == list(range(TEST)) == sorted(ids[TEST : 2 * TEST].tolist())


def test_without_dali_the_other_decoder_is_chosen(folder, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert choose_decoder(open_data(folder, decoder="auto").config) == "torch"
    with pytest.raises(UserError, match=r"data.decoder: got 'dali', which is not installed"):
        open_data(folder, decoder="dali")


@pytest.mark.skipif(torch.cuda.is_available(), reason="asks for what a machine without a GPU answers")
def test_decoding_on_a_gpu_that_is_not_there_is_refused(folder):
    with pytest.raises(UserError, match=r"data.device: got 'gpu', but no CUDA device is there"):
        open_data(folder, device="gpu")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_batches_born_on_the_gpu_agree_with_the_cpus(folder):
    for cpu, gpu in zip(
        batches(open_data(folder), 5), batches(open_data(folder, device="gpu"), 5), strict=True
    ):
        assert gpu["image"].is_cuda and gpu["audio"].is_cuda
        assert gpu["image"].is_contiguous(memory_format=torch.channels_last)
        assert torch.equal(gpu["present"], cpu["present"]) and torch.equal(gpu["id"], cpu["id"])
        assert (gpu["audio"].cpu() - cpu["audio"]).abs().max() < 1e-3
        assert (gpu["image"].cpu() - cpu["image"]).abs().mean() < 0.05


def test_the_guide_runs(tmp_path, monkeypatch, capsys):
    guide = (Path(__file__).parents[2] / "docs/guides/loading.md").read_text()
    monkeypatch.chdir(tmp_path)
    names = {}
    for block in guide.split("```python\n")[1:]:
        exec(block.partition("```")[0], names)
    assert "10 samples, 3 steps" in capsys.readouterr().out


def test_decoding_threads_start_no_workers_of_their_own():
    """With a second set of OpenMP workers in the process, the trainer's sleep after every operation."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    inside = _Stage((torch.get_num_threads() for _ in range(1)), 1, "test")
    assert list(inside) == [1]
    assert torch.get_num_threads() == 2
    torch.set_num_threads(before)
