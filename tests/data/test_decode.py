"""What is checked before decoding, and that both decoders mean the same."""

import io
import itertools
import math
import re
import struct

import numpy as np
import pytest
import soundfile
import torch
import torchaudio
from loading import picture, sound
from PIL import Image as PilImage
from PIL import ImageOps
from torchaudio.transforms import MelSpectrogram, Resample

from mmfast.data import Audio, Image
from mmfast.data.dali import DaliAudio, DaliImages
from mmfast.data.decode import (
    AudioFile,
    ImageFile,
    TorchAudio,
    TorchImages,
    UndecodableError,
    check_audio,
    check_image,
    check_text,
    decode_pixels,
    decode_rows,
    decode_wave,
    resample,
    sample_audio,
    sample_image,
)

CPU = torch.device("cpu")
AUDIO = Audio(n_mels=40, max_seconds=1.0)


def make(kind, modality):
    if isinstance(modality, Image):
        return DaliImages(modality, 16, CPU, 2) if kind == "dali" else TorchImages(modality, 2)
    return DaliAudio(modality, 16, CPU, 2) if kind == "dali" else TorchAudio(modality, 2)


def encode(image, kind="PNG", **settings):
    buffer = io.BytesIO()
    image.save(buffer, kind, **settings)
    return buffer.getvalue()


@pytest.mark.parametrize("kind", ["jpg", "png"])
def test_height_and_width_are_read_from_the_header(kind):
    assert check_image(picture(1, kind, (31, 17))) == (17, 31)


@pytest.mark.parametrize(
    "settings", [{}, {"progressive": True}, {"optimize": True}, {"restart_marker_blocks": 2}]
)
def test_every_cut_of_a_jpeg_is_noticed(settings):
    data = encode(PilImage.open(io.BytesIO(picture(1, "png", (40, 30)))), "JPEG", **settings)
    assert check_image(data) == (30, 40)
    for end in range(len(data)):
        with pytest.raises(UndecodableError):
            check_image(data[:end])


def test_the_end_of_a_thumbnail_is_not_the_end_of_its_jpeg():
    exif = PilImage.Exif()
    exif[0x010E] = "\xff\xd9 in the header"
    data = encode(PilImage.new("RGB", (40, 30)), "JPEG", exif=exif, comment=picture(2))
    check_image(data)
    with pytest.raises(UndecodableError, match="JPEG cut short"):
        check_image(data[:-2])


def test_bytes_after_the_end_do_no_harm():
    for kind in ("jpg", "png"):
        assert check_image(picture(1, kind, (31, 17)) + b"\0\0trailing") == (17, 31)


def test_every_cut_of_a_png_is_noticed():
    data = picture(1, "png", (20, 10))
    for end in range(len(data)):
        with pytest.raises(UndecodableError):
            check_image(data[:end])


@pytest.mark.parametrize("kind", ["wav", "ogg", "opus"])
def test_every_cut_of_a_sound_is_noticed(kind):
    data = sound(1, kind, rate=48000, seconds=0.1)
    check_audio(data)
    for end in range(0, len(data), 1 + len(data) // 997):
        with pytest.raises(UndecodableError):
            check_audio(data[:end])


@pytest.mark.parametrize("decoder", ["dali", "torch"])
def test_a_cut_flac_does_not_decode(decoder):
    data = sound(1, "flac", seconds=1.0)
    decode = make(decoder, AUDIO)
    for end in (50, len(data) // 2, len(data) - 10):
        with pytest.raises(UndecodableError):
            check_audio(data[:end])
            decode([AudioFile(data[:end])])


@pytest.mark.parametrize("check", [check_image, check_audio])
@pytest.mark.parametrize("data", [b"", b"\xff", b"GIF89a" + bytes(50), bytes(1000), b"RIFF", b"\xff\xd8\xff"])
def test_other_bytes_are_refused(check, data):
    with pytest.raises(UndecodableError):
        check(data)


def test_random_bytes_never_crash_the_checks():
    rng = np.random.default_rng(0)
    for start in (b"\xff\xd8\xff\xe0", b"\x89PNG\r\n\x1a\n", b"OggS", b"RIFF1234WAVE"):
        for _ in range(300):
            data = start + rng.bytes(rng.integers(0, 200)) + b"\0\0\0\0IEND\xaeB`\x82"
            for check in (check_image, check_audio):
                try:
                    check(data)
                except UndecodableError:
                    pass


def test_a_header_that_asks_for_all_memory_is_refused():
    data = bytearray(picture(1, "png", (20, 10)))
    data[16:24] = b"\0\0\xff\xff" * 2
    with pytest.raises(UndecodableError, match="65535 x 65535 pixels"):
        check_image(bytes(data))


def test_text_that_is_not_utf8_is_told_with_its_byte():
    assert check_text("größe".encode()) == "größe"
    with pytest.raises(UndecodableError, match="not UTF-8: byte 0xff at 3"):
        check_text(b"abc\xffdef")


@pytest.mark.parametrize("decoder", ["dali", "torch"])
@pytest.mark.parametrize("kind", ["jpg", "png"])
@pytest.mark.parametrize("orientation", [None, 3, 6, 8])
def test_a_box_is_cut_out_of_the_upright_image(decoder, kind, orientation):
    exif = PilImage.Exif()
    if orientation:
        exif[0x0112] = orientation
    plain = PilImage.open(io.BytesIO(picture(3, "png", (50, 36))))
    data = encode(plain, "JPEG" if kind == "jpg" else "PNG", exif=exif)
    upright = np.asarray(ImageOps.exif_transpose(PilImage.open(io.BytesIO(data))).convert("RGB"))
    assert check_image(data) == upright.shape[:2]
    side, (top, left) = 20, (9, 13)
    decode = make(decoder, Image(size=side, mean=(0.0, 0.0, 0.0), std=(1 / 255, 1 / 255, 1 / 255)))
    (values, steps) = decode([ImageFile(data, (top, left, side, side), flip) for flip in (False, True)])
    expected = torch.from_numpy(upright[top : top + side, left : left + side].copy()).permute(2, 0, 1).float()
    assert steps.tolist() == [1, 1]
    # a box of the output's own size is not resampled
    assert (values[0] - expected).abs().max() <= (0.01 if kind == "png" else 3)
    assert torch.equal(values[1], values[0].flip(-1))


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
@pytest.mark.parametrize("order", ["<", ">"])
def test_an_orientation_is_read_as_the_decoders_read_it_whatever_type_it_claims(kind, order):
    plain = PilImage.open(io.BytesIO(picture(3, "png", (50, 36))))
    dali = make("dali", Image(size=8))
    for type, count, value in itertools.product((1, 2, 3, 4, 5, 9), (0, 1, 2), (1, 6, 6 << 16)):
        exif = b"II*\0" if order == "<" else b"MM\0*"
        exif += struct.pack(f"{order}IHHHIII", 8, 1, 0x0112, type, count, value, 0)
        data = encode(plain, kind, exif=b"Exif\0\0" + exif)
        height, width = check_image(data)
        assert decode_pixels(data).shape == (3, height, width)
        dali([ImageFile(data, (0, 0, height, width), False)])


@pytest.mark.parametrize("decoder", ["dali", "torch"])
def test_an_image_of_another_size_than_it_says_is_refused(decoder):
    with pytest.raises(UndecodableError):
        make(decoder, Image(size=8))([ImageFile(picture(1, "jpg", (30, 20)), (0, 10, 20, 21), False)])


@pytest.mark.parametrize("mode", ["L", "LA", "RGBA", "P", "1"])
def test_every_kind_of_png_becomes_rgb(mode):
    data = encode(
        PilImage.open(io.BytesIO(picture(3, "png", (24, 24)))).convert(mode.replace("LA", "L")).convert(mode)
    )
    expected = torch.from_numpy(np.asarray(PilImage.open(io.BytesIO(data)).convert("RGB")).copy()).permute(
        2, 0, 1
    )
    assert torch.equal(decode_pixels(data), expected)
    dali = make("dali", Image(size=24, mean=(0.0, 0.0, 0.0), std=(1 / 255, 1 / 255, 1 / 255)))
    values, _ = dali([ImageFile(data, (0, 0, 24, 24), False)])
    assert (values[0] - expected).abs().max() < 0.01


def test_both_decoders_give_the_same_picture_up_to_rounding():
    image = Image(size=32)
    files = [
        ImageFile(picture(i, "jpg", (90 + i, 70)), (3, 5, 50 + i % 4, 40), bool(i % 2)) for i in range(16)
    ]
    dali, torch_ = make("dali", image)(files)[0], make("torch", image)(files)[0]
    assert dali.is_contiguous(memory_format=torch.channels_last)
    assert torch_.is_contiguous(memory_format=torch.channels_last)
    difference = (dali - torch_).abs() * 255 * 0.225  # in pixel values
    assert difference.max() < 4 and difference.mean() < 0.6


def log_mel(data, modality, dtype=torch.float32):
    samples, rate = soundfile.read(io.BytesIO(data), dtype="float32")
    assert rate == modality.sample_rate
    mel = MelSpectrogram(rate, modality.n_fft, hop_length=modality.hop, n_mels=modality.n_mels).to(dtype)
    return torch.log(mel(torch.from_numpy(samples)[: modality.max_samples].to(dtype)) + modality.floor)


@pytest.mark.parametrize("decoder", ["dali", "torch"])
@pytest.mark.parametrize("kind", ["wav", "flac", "ogg"])
@pytest.mark.parametrize("modality", [AUDIO, Audio(), Audio(sample_rate=8000, n_fft=256, hop=100, n_mels=23)])
def test_log_mels_are_torchaudios(decoder, kind, modality):
    data = sound(4, kind, rate=modality.sample_rate, seconds=0.8)
    values, steps = make(decoder, modality)([AudioFile(data)])
    expected = log_mel(data, modality)
    frames = expected.shape[1]
    assert values.shape == (1, *modality.shape) and steps.tolist() == [frames]
    assert (values[0, :, :frames] - expected).abs().max() < 1e-4
    assert (values[0, :, frames:] == 0).all()


@pytest.mark.parametrize("decoder", ["dali", "torch"])
def test_a_long_sound_is_cut_before_its_spectrogram(decoder):
    data = sound(7, "flac", seconds=3.0)  # cut at one second
    values, steps = make(decoder, AUDIO)([AudioFile(data)])
    truth = log_mel(data, AUDIO, torch.float64)
    assert steps.tolist() == [AUDIO.frames] == [truth.shape[1]]
    assert (values[0] - truth).abs().max() < 5e-5


@pytest.mark.parametrize("decoder", ["dali", "torch"])
def test_stereo_is_mixed_and_short_sounds_are_padded(decoder):
    buffer = io.BytesIO()
    wave = np.random.default_rng(0).standard_normal((8000, 2)) * 0.1
    soundfile.write(buffer, wave, 16000, format="WAV", subtype="FLOAT")
    mono = io.BytesIO()
    soundfile.write(mono, wave.mean(axis=1), 16000, format="WAV", subtype="FLOAT")
    values, steps = make(decoder, AUDIO)(
        [AudioFile(buffer.getvalue()), AudioFile(mono.getvalue()), AudioFile(sound(0, seconds=1 / 16000))]
    )
    assert (values[0] - values[1]).abs().max() < 1e-3
    assert steps.tolist() == [51, 51, 201 // 160 + 1]
    assert values.isfinite().all()


@pytest.mark.parametrize("decoder", ["dali", "torch"])
@pytest.mark.parametrize("rate", [8000, 22050, 44100, 48000])
@pytest.mark.parametrize("seconds", [0.6, 2.0])
def test_resampled_sounds_have_torchaudios_log_mels(decoder, rate, seconds):
    data = sound(5, "flac", rate=rate, seconds=seconds)
    values, steps = make(decoder, AUDIO)([AudioFile(data)])
    samples, _ = soundfile.read(io.BytesIO(data), dtype="float32")
    wave = Resample(rate, AUDIO.sample_rate)(torch.from_numpy(samples))[: AUDIO.max_samples]
    mel = MelSpectrogram(AUDIO.sample_rate, AUDIO.n_fft, hop_length=AUDIO.hop, n_mels=AUDIO.n_mels)
    expected = torch.log(mel(wave) + AUDIO.floor)
    assert steps.tolist() == [expected.shape[1]]
    audible = expected > -7  # above half of a low rate there is nothing but rounding
    assert (values[0, :, : expected.shape[1]] - expected)[audible].abs().max() < 1e-4


@pytest.mark.parametrize("rate", [8000, 11025, 24000, 32000, 44100, 48000])
@pytest.mark.parametrize("n", [1, 100, 7001])
def test_resampling_is_torchaudios(rate, n):
    wave = torch.from_numpy(np.random.default_rng(0).standard_normal(n).astype(np.float32))
    expected = torchaudio.functional.resample(wave.double(), rate, 16000)
    ours = torch.from_numpy(resample(wave.numpy(), rate, 16000))
    assert ours.dtype == torch.float32 and ours.shape == expected.shape
    assert (ours - expected).abs().max() < 2e-6


def test_an_odd_rate_does_not_ask_for_gigabytes():
    decode = make("dali", AUDIO)
    odd, even = (
        decode([AudioFile(sound(5, "wav", rate=rate, seconds=0.5))])[0].clone() for rate in (44101, 44100)
    )
    assert (odd - even).abs().mean() < 0.5  # another noise, the same tone


@pytest.mark.parametrize("decoder", ["dali", "torch"])
def test_a_sound_without_samples_is_refused(decoder):
    decode = make(decoder, AUDIO)
    with pytest.raises(UndecodableError, match="no samples"):
        decode([AudioFile(sound(0, seconds=0.0)), AudioFile(sound(1))])
    decode([sample_audio()])


def wav(samples, rate=16000):
    buffer = io.BytesIO()
    soundfile.write(buffer, np.array(samples), 16000, format="WAV", subtype="FLOAT")
    data = buffer.getvalue()
    return data.replace(struct.pack("<I", 16000), struct.pack("<I", rate), 1)


def flac(samples):
    """One of 3200 samples whose header says another number."""
    data = bytearray(sound(1, "flac", seconds=0.2))
    data[21:26] = (int.from_bytes(data[21:26], "big") >> 36 << 36 | samples).to_bytes(5, "big")
    return bytes(data)


@pytest.mark.parametrize("decoder", ["dali", "torch"])
@pytest.mark.parametrize(
    ("data", "message"),
    [
        (wav([0.1, math.nan] * 400), "samples that are no numbers, or beyond 1e"),
        (wav([0.1, -math.inf] * 400), "samples that are no numbers, or beyond 1e"),
        (wav([0.1, 1e25] * 400), "samples that are no numbers, or beyond 1e"),
        (wav([0.1] * 800, 2**31 - 1), "Hz, wanted 1 to 768000"),
        (wav([0.1] * 800, 100_000_001), "Hz, wanted 1 to 768000"),
        (flac(0), "FLAC that does not say how long it is"),
        (flac(2**36 - 1), r"FLAC cut short: \d+ bytes for 68719476735 samples"),
        (flac(4000), "does not decode"),
    ],
    ids=["nan", "inf", "1e25", "2 GHz", "100 MHz", "flac streamed", "flac without end", "flac too short"],
)
def test_sounds_whose_numbers_cannot_be_are_refused(decoder, data, message):
    try:
        check_audio(data)  # before decoding, where it can be known then
    except UndecodableError as error:
        assert re.search(message, str(error))
    else:
        with pytest.raises(UndecodableError, match=message):
            make(decoder, AUDIO)([AudioFile(data)])


def test_a_flac_that_promises_too_much_does_not_ask_for_its_memory():
    with pytest.raises(UndecodableError, match="does not decode"):  # not even unchecked
        make("torch", AUDIO)([AudioFile(flac(2**36 - 1))])


@pytest.mark.parametrize("kind", ["ogg", "opus"])
def test_a_sound_is_the_same_read_in_blocks(kind, monkeypatch):
    data = sound(3, kind, rate=48000, seconds=0.5)
    whole, _ = decode_wave(data)
    monkeypatch.setattr("mmfast.data.decode._BLOCK", 1000)
    assert np.array_equal(decode_wave(data)[0], whole)


@pytest.mark.parametrize("decoder", ["dali", "torch"])
@pytest.mark.parametrize("bad", [{0}, {2, 3}, {0, 1, 2, 3, 4, 5}])
def test_the_bad_are_found_and_the_others_keep_their_bits(decoder, bad):
    image = Image(size=16)
    decode = make(decoder, image)
    good = [ImageFile(picture(i, "png", (30, 30)), (0, 0, 20, 20), False) for i in range(6)]
    broken = bytearray(good[0].data)
    broken[60:90] = bytes(30)
    files = [ImageFile(bytes(broken), f.box, f.flip) if i in bad else f for i, f in enumerate(good)]
    rows = torch.tensor([7, 1, 3, 2, 5, 4])
    outputs = []
    for chosen in (good, files):
        values, steps = image.empty(8), torch.zeros(8, dtype=torch.int64)
        faults = decode_rows(decode, chosen, rows, values, steps)
        outputs.append((values, steps, faults))
    (expected, _, none), (values, steps, faults) = outputs
    assert none == {} and set(faults) == {int(rows[i]) for i in bad}
    assert all(reason.startswith("does not decode: ") for reason in faults.values())
    expected[list(faults)] = 0
    assert torch.equal(values, expected)
    assert steps.tolist() == [int(r in set(rows.tolist()) - set(faults)) for r in range(8)]
    assert math.isclose(values[0].abs().sum(), 0)


def test_a_broken_decoder_is_not_blamed_on_the_files():
    class Broken:
        known_good = sample_image()

        def __call__(self, files):
            raise UndecodableError("out of memory")

        def close(self):
            pass

    with pytest.raises(UndecodableError, match="out of memory"):
        rows = torch.arange(2)
        decode_rows(Broken(), [sample_image()] * 2, rows, Image(size=8).empty(2), torch.zeros(2))
