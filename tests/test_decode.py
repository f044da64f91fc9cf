"""Files written with PyAV's encoders against their source: length, content, excerpts, damage, films."""

import math
from pathlib import Path

import av
import numpy as np
import pytest
import torch

from maestlib.audio import decode
from maestlib.audio.decode import open_audio
from maestlib.audio.mel import MEL, audio_duration, load_audio
from maestlib.inference.windows import stream_mel

RATE = 16000
PICTURE = dict(width=64, height=64, pix_fmt="yuv420p")


def music(seconds: float, rate: int) -> np.ndarray:  # (2, samples): a low random note every quarter of a second
    rng = np.random.default_rng(3)
    time_s = np.arange(round(seconds * rate)) / rate
    phase = time_s % 0.25
    hertz = 110 * 2 ** (rng.integers(0, 36, (2, 100)) / 12)[:, (time_s / 0.25).astype(int)]
    wave = np.sin(2 * np.pi * hertz * phase) + 0.5 * np.sin(6 * np.pi * hertz * phase)
    return (0.2 * wave * np.exp(-8 * phase) * (1 - np.exp(-200 * phase))).astype(np.float32)


def write(path: Path, wave: np.ndarray, codec: str, rate: int, picture_s: float = 0, **options) -> None:
    with av.open(str(path), "w", options=options) as container:
        picture = container.add_stream("mpeg4", rate=5, **PICTURE) if picture_s else None
        stream = container.add_stream(codec, rate=rate, layout="stereo")
        stream.bit_rate = 160000
        stream.options = {"aac_pns": "0"} if codec == "aac" else {}
        frame = av.AudioFrame.from_ndarray(np.ascontiguousarray(wave), format="fltp", layout="stereo")
        frame.sample_rate, frame.pts = rate, 0
        container.mux([*stream.encode(frame), *stream.encode(None)])
        if picture:
            image = av.VideoFrame.from_ndarray(np.zeros((64, 64, 3), np.uint8), format="rgb24")
            for _ in range(round(picture_s * 5)):
                image.pts = None
                container.mux(picture.encode(image))
            container.mux(picture.encode(None))


def load_source(seconds: float) -> np.ndarray:  # mono at 16 kHz: the notes are the same at any rate
    return music(seconds, RATE).mean(0)


def delay(wave: np.ndarray, source: np.ndarray) -> int:  # in samples, by cross-correlation
    size = 1 << (len(source) + len(wave)).bit_length()
    product = np.fft.irfft(np.fft.rfft(wave, size) * np.fft.rfft(source, size).conj())
    lag = int(product.argmax())
    return lag - size if lag > size // 2 else lag


# name, encoder, the codec's delay (samples at 44.1 kHz) that the container does not tell
FORMATS = {
    "a.m4a": ("aac", 0),
    "lossless.m4a": ("alac", 0),
    "a.opus": ("libopus", 0),
    "a.webm": ("libopus", 0),
    "a.wma": ("wmav2", 2048),
    "a.mp3": ("libmp3lame", 0),
    "a.flac": ("flac", 0),
    "a.mka": ("aac", 0),
    "a.aac": ("aac", 1024),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("formats")
    for name, (codec, _) in FORMATS.items():
        rate = 48000 if codec == "libopus" else 44100
        write(folder / name, music(9.5, rate), codec, rate)
    return folder


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_is_its_source(folder, name):
    source = load_source(9.5)
    wave = load_audio(folder / name)
    late = delay(wave.numpy(), source)
    assert abs(late) <= math.ceil(FORMATS[name][1] * RATE / 44100) + 1
    inner = slice(RATE, 8 * RATE)
    heard = wave.numpy()[inner.start + late : inner.stop + late]
    assert np.corrcoef(heard, source[inner])[0, 1] > 0.99
    assert np.std(heard) == pytest.approx(np.std(source[inner]), rel=0.06)  # LAME encodes at 95 %
    assert audio_duration(folder / name) == pytest.approx(9.5, abs=0.06)
    assert len(wave) == math.ceil(audio_duration(folder / name) * RATE - 1e-6)


@pytest.mark.parametrize("name", FORMATS)
def test_an_excerpt_is_that_part_of_the_whole(folder, name):
    whole = load_audio(folder / name)
    for offset, length in ((0, 1), (1.2345, 1.5), (4.321, 2), (9, 9)):
        first = round(offset * RATE)
        part = load_audio(folder / name, offset, length)
        assert len(part) == min(length * RATE, len(whole) - first)
        assert torch.allclose(part, whole[first : first + len(part)], atol=1e-5)
    first = (len(whole) - 2 * RATE) // 2
    part = load_audio(folder / name, duration_s=2, center=True)
    assert torch.allclose(part, whole[first : first + 2 * RATE], atol=1e-5)


@pytest.mark.parametrize("name", ["a.m4a", "a.wma"])
def test_a_recording_in_parts_has_the_mel_of_the_whole(folder, name):
    parts = torch.cat(list(stream_mel(folder / name, MEL, part_s=2.0)), 1)
    assert torch.allclose(parts, torch.cat(list(stream_mel(folder / name, MEL)), 1), atol=2e-3)


def test_only_the_excerpt_is_decoded_where_the_container_can_be_sought(folder, monkeypatch):
    decoded = []
    resampler = av.AudioResampler

    class Counting:
        def __init__(self, **options):
            self.inner = resampler(**options)

        def resample(self, frame):
            decoded.append(frame.samples)
            return self.inner.resample(frame)

    monkeypatch.setattr(av, "AudioResampler", Counting)
    load_audio(folder / "a.m4a", 7, 0.5)
    assert 0.5 * 44100 <= sum(decoded) < 1.0 * 44100


@pytest.mark.parametrize("name", ["a.m4a", "a.wma"])
def test_a_recording_in_parts_is_decoded_once(folder, name, monkeypatch):
    opened, open_stream = [], decode.open_stream
    monkeypatch.setattr(
        decode, "open_stream", lambda path, *section: opened.append(path) or open_stream(path, *section)
    )
    assert len(list(stream_mel(folder / name, MEL, part_s=1.5))) > 4
    assert len(opened) == 2, "for its header, and for its samples"


@pytest.mark.parametrize("suffix", ["mp4", "mkv", "mov"])
def test_the_sound_of_a_film(tmp_path, suffix):
    wave = music(4, 44100)
    write(tmp_path / f"film.{suffix}", wave, "aac", 44100, picture_s=7)
    assert audio_duration(tmp_path / f"film.{suffix}") == pytest.approx(4, abs=0.06)
    heard, source = load_audio(tmp_path / f"film.{suffix}").numpy(), load_source(4)
    assert np.corrcoef(heard[RATE : 3 * RATE], source[RATE : 3 * RATE])[0, 1] > 0.99


@pytest.mark.parametrize("layout", ["mono", "5.1"])
def test_other_channels_are_averaged(tmp_path, layout):
    tone = (0.3 * np.sin(2 * np.pi * 440 * np.arange(44100) / 44100)).astype(np.float32)
    channels = {"mono": 1, "5.1": 6}[layout]
    with av.open(str(tmp_path / "a.m4a"), "w") as container:
        stream = container.add_stream("alac", rate=44100, layout=layout)
        frame = av.AudioFrame.from_ndarray(np.tile(tone, (channels, 1)), format="fltp", layout=layout)
        frame.sample_rate = 44100
        container.mux([*stream.encode(frame), *stream.encode(None)])
    with open_audio(tmp_path / "a.m4a") as (rate, length, read):
        assert read(0, length).shape == (44100, channels) and rate == 44100
    expected = 0.3 * torch.sin(2 * torch.pi * 440 * torch.arange(RATE) / RATE)
    assert (load_audio(tmp_path / "a.m4a") - expected)[400:-400].abs().max() < 1e-3


def test_files_that_cannot_be_read_are_named(tmp_path):
    write(tmp_path / "good.m4a", music(9, 44100), "aac", 44100)
    write(tmp_path / "streamed.m4a", music(9, 44100), "aac", 44100, movflags="faststart")
    write(tmp_path / "lossless.m4a", music(9, 44100), "alac", 44100, movflags="faststart")
    write(tmp_path / "music.wma", music(9, 44100), "wmav2", 44100)
    good = (tmp_path / "good.m4a").read_bytes()
    half = len(good) // 2
    (tmp_path / "no index.m4a").write_bytes(good[:half])
    (tmp_path / "noise inside.m4a").write_bytes(
        good[:half] + np.random.default_rng(0).bytes(20000) + good[half + 20000 :]
    )
    for name in ("streamed.m4a", "lossless.m4a", "music.wma"):
        content = (tmp_path / name).read_bytes()
        (tmp_path / f"half {name}").write_bytes(content[: len(content) // 2])
    (tmp_path / "text.m4a").write_text("this is not music\n" * 99)
    (tmp_path / "list.m4a").write_text("#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\nhttp://127.0.0.1:9/a.ts\n")
    with av.open(str(tmp_path / "silent.mp4"), "w") as container:
        stream = container.add_stream("mpeg4", rate=5, **PICTURE)
        image = av.VideoFrame.from_ndarray(np.zeros((64, 64, 3), np.uint8), format="rgb24")
        container.mux([*stream.encode(image), *stream.encode(None)])
    for name, words in {
        "no index.m4a": "is it audio, and complete",
        "noise inside.m4a": "damaged between",
        "half streamed.m4a": "damaged",
        "half lossless.m4a": "damaged",
        "half music.wma": "damaged",
        "text.m4a": "is it audio",
        "list.m4a": "is it audio",
        "silent.mp4": "no audio stream",
    }.items():
        with pytest.raises(ValueError, match=words) as caught:
            load_audio(tmp_path / name)
        assert str(tmp_path / name) in str(caught.value) and "\n" not in str(caught.value)
    assert len(load_audio(tmp_path / "half lossless.m4a", 1, 1)) == RATE, "what comes before the damage is read"


@pytest.mark.parametrize("protection", ["FairPlay", "CENC"])
def test_protected_files_are_not_read(folder, tmp_path, protection):
    path = tmp_path / "a.m4a"
    if protection == "FairPlay":
        data = (folder / "a.m4a").read_bytes()
        table = data.index(b"stsd")
        path.write_bytes(data[:table] + data[table:].replace(b"mp4a", b"drms", 1))
    else:
        key = dict(encryption_key="76a6c65c5ea762046bd749a2e632ccbb", encryption_kid="a7e61c373e219033c21091fa607bf3b8")
        write(path, music(2, 44100), "aac", 44100, encryption_scheme="cenc-aes-ctr", **key)
    with pytest.raises(ValueError, match="a.m4a: is copy-protected" if protection == "FairPlay" else "a.m4a: damaged"):
        load_audio(path)
