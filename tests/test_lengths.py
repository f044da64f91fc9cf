"""Files whose header does not tell their length, and files that hold several: all of the sound, and nothing else."""

import io
import re

import av
import numpy as np
import pytest
import soundfile
import torch
from helpers import one_thread, tiny_model  # noqa: F401

from maestlib.audio import lengths
from maestlib.audio.decode import AUDIO_SUFFIXES, list_audio
from maestlib.audio.lengths import check_length, find_sections
from maestlib.audio.mel import MEL, audio_duration, load_audio
from maestlib.collection.scan import scan
from maestlib.inference.windows import stream_mel

RATE = 16000


def tone(hertz: float, seconds: float = 2.0, rate: int = 44100, channels: int = 2) -> np.ndarray:  # (channels, samples)
    wave = 0.3 * np.sin(2 * np.pi * hertz * np.arange(round(seconds * rate)) / rate)
    return np.tile(wave.astype(np.float32), (channels, 1))


def encode(wave: np.ndarray, codec: str, container: str, rate: int = 44100, **options) -> bytes:
    "Encode a waveform (channels, samples) by FFmpeg."
    file, layout = io.BytesIO(), "mono" if len(wave) == 1 else "stereo"
    with av.open(file, "w", format=container) as out:
        stream = out.add_stream(codec, rate=rate, layout=layout)
        stream.options = options
        frame = av.AudioFrame.from_ndarray(np.ascontiguousarray(wave), format="fltp", layout=layout)
        frame.sample_rate, frame.pts = rate, 0
        to = av.AudioResampler(stream.format, layout, rate, frame_size=stream.codec_context.frame_size or None)
        for part in [*to.resample(frame), *to.resample(None), None]:
            out.mux(stream.encode(part))
    return file.getvalue()


def write(wave: np.ndarray, container: str, rate: int = 44100, subtype: str | None = None) -> bytes:
    "Encode a waveform (channels, samples) by libsndfile."
    file = io.BytesIO()
    soundfile.write(file, wave.T, rate, format=container, subtype=subtype)
    return file.getvalue()


def mp3(*arguments, **options) -> bytes:
    "An mp3 file without the tag in front."
    data = encode(*arguments, codec="libmp3lame", container="mp3", **options)
    return data[10 + sum(byte << 7 * i for i, byte in enumerate(data[9:5:-1])) :]


def without_count(data: bytes) -> bytes:
    "An mp3 file without its first frame, of the count."
    kbps = [0, 32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320][data[2] >> 4]
    return data[144_000 * kbps // 44100 + (data[2] >> 1 & 1) :]


def with_count(data: bytes, factor: float) -> bytes:
    "An mp3 file with another number of frames in its first one."
    at = max(data.find(b"Xing"), data.find(b"Info")) + 8
    frames = int.from_bytes(data[at : at + 4], "big")
    return data[:at] + int(frames * factor).to_bytes(4, "big") + data[at + 4 :]


def put(data: bytes, at: int, value: bytes) -> bytes:
    return data[:at] + value + data[at + len(value) :]


def with_total(data: bytes, total: int) -> bytes:
    "A flac file with another number of samples in its header."
    return put(data, 21, bytes([data[21] & 0xF0]) + total.to_bytes(4, "big"))


def with_old_sizes(data: bytes, mark: bytes, order: str) -> bytes:
    "A wav or aiff file of 2 s as a recorder leaves it that was switched off: with the sizes after a second."
    at = data.find(mark) + 4
    size = int.from_bytes(data[at : at + 4], order)
    return put(put(data, at, (size // 2).to_bytes(4, order)), 4, (at + size // 2).to_bytes(4, order))


LOW, HIGH = 440, 1500  # Hz
MP3, MP3_HIGH = mp3(tone(LOW)), mp3(tone(HIGH))
WAV, RF64 = write(tone(LOW), "WAV"), write(tone(LOW), "RF64")
FLAC = write(tone(LOW), "FLAC")
FILES = {  # name: content, the tones in it
    "joined.mp3": (MP3 + MP3_HIGH + MP3, (LOW, HIGH, LOW)),
    "joined with tags.mp3": (2 * (b"ID3\4\0\0\0\0\1\0" + bytes(128) + MP3 + b"TAG" + bytes(125)), (LOW, LOW)),
    "joined without counts.mp3": (without_count(MP3) + without_count(MP3_HIGH), (LOW, HIGH)),
    "other rate.mp3": (MP3 + mp3(tone(HIGH, rate=48000), rate=48000), (LOW, HIGH)),
    "other rate, lower first.mp3": (mp3(tone(LOW, rate=22050), rate=22050) + MP3_HIGH, (LOW, HIGH)),
    "stereo then mono.mp3": (MP3 + mp3(tone(HIGH, channels=1)), (LOW, HIGH)),
    "no count.mp3": (without_count(MP3), (LOW,)),
    "count of 0.mp3": (with_count(MP3, 0), (LOW,)),
    "half the count.mp3": (with_count(MP3, 0.5), (LOW,)),
    "ten times the count.mp3": (with_count(MP3, 10), (LOW,)),
    "quiet first.mp3": (without_count(mp3(np.pad(tone(LOW), ((0, 0), (88200, 0))))), (0, LOW)),
    "broken first frame.mp3": (without_count(MP3)[100:], (LOW,)),
    "joined.aac": (encode(tone(LOW), "aac", "adts") + encode(tone(HIGH), "aac", "adts"), (LOW, HIGH)),
    "other rate.aac": (
        encode(tone(LOW), "aac", "adts") + encode(tone(HIGH, rate=48000, channels=1), "aac", "adts", 48000),
        (LOW, HIGH),
    ),
    "chained.ogg": (write(tone(LOW), "OGG") + write(tone(HIGH), "OGG"), (LOW, HIGH)),
    "the same twice.ogg": (2 * write(tone(LOW), "OGG"), (LOW, LOW)),
    "chained, other rate.ogg": (write(tone(LOW), "OGG") + write(tone(HIGH, rate=48000), "OGG", 48000), (LOW, HIGH)),
    "chained, mono.ogg": (write(tone(LOW), "OGG") + write(tone(HIGH, channels=1), "OGG"), (LOW, HIGH)),
    "chained.opus": (
        encode(tone(LOW, rate=48000), "libopus", "ogg", 48000)
        + encode(tone(HIGH, rate=48000), "libopus", "ogg", 48000),
        (LOW, HIGH),
    ),
    "joined.wav": (WAV + write(tone(HIGH, rate=48000), "WAV", 48000), (LOW, HIGH)),
    "joined.au": (write(tone(LOW), "AU") + write(tone(HIGH), "AU"), (LOW, HIGH)),
    "joined.flac": (FLAC + write(tone(HIGH, rate=48000), "FLAC", 48000), (LOW, HIGH)),
    "the same twice.flac": (2 * FLAC, (LOW, LOW)),
    "joined.aiff": (write(tone(LOW), "AIFF") + write(tone(HIGH), "AIFF"), (LOW, HIGH)),
    "joined.m4a": (encode(tone(LOW), "aac", "ipod") + encode(tone(HIGH), "aac", "ipod"), (LOW, HIGH)),
    "size of 0.wav": (put(put(WAV, WAV.find(b"data") + 4, bytes(4)), 4, bytes(4)), (LOW,)),
    "largest size.wav": (put(put(WAV, WAV.find(b"data") + 4, b"\xff" * 4), 4, b"\xff" * 4), (LOW,)),
    "gsm.wav": (write(tone(LOW, rate=8000, channels=1), "WAV", 8000, "GSM610"), (LOW,)),
    "no total.flac": (with_total(FLAC, 0), (LOW,)),
    "half the total.flac": (with_total(FLAC, 44100), (LOW,)),
    "without the last frame's.flac": (with_total(FLAC, 88200 // 4096 * 4096), (LOW,)),
    "ten times the total.flac": (with_total(FLAC, 882000), (LOW,)),
    "tagged, half the total.flac": (b"ID3\4\0\0\0\0\1\0" + bytes(128) + with_total(FLAC, 44100), (LOW,)),
    "old size.wav": (with_old_sizes(WAV, b"data", "little"), (LOW,)),
    "old size of the samples.wav": (put(with_old_sizes(WAV, b"data", "little"), 4, WAV[4:8]), (LOW,)),
    "old size.rf64": (put(RF64, RF64.find(b"ds64") + 16, (176400).to_bytes(8, "little")), (LOW,)),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("lengths")
    for name, (data, _) in FILES.items():
        (folder / name).write_bytes(data)
    return folder


@pytest.mark.parametrize("name", FILES)
def test_all_of_the_sound_is_read(folder, name):
    wave, tones = load_audio(folder / name).numpy(), FILES[name][1]
    assert abs(len(wave) / RATE - 2 * len(tones)) < 0.1 * len(tones)
    assert audio_duration(folder / name) == pytest.approx(len(wave) / RATE, abs=0.03)
    for i, hertz in enumerate(tones):
        inner = wave[(2 * i + 1) * RATE - 8000 :][:RATE]
        if hertz:
            spectrum = np.abs(np.fft.rfft(inner))
            assert spectrum.argmax() == hertz and 0.15 < inner.std() < 0.24
        else:
            assert np.abs(inner).max() < 1e-3


@pytest.mark.parametrize("name", FILES)
def test_excerpts_are_those_of_the_whole(folder, name):
    whole = load_audio(folder / name)
    for offset, seconds in ((0.4, 0.5), (1.6, 0.3), (len(whole) / RATE / 2 - 0.2, 0.4), (1.0, 99)):
        first = round(offset * RATE)
        part = load_audio(folder / name, offset, seconds)
        assert len(part) == min(round(seconds * RATE), len(whole) - first)
        assert torch.allclose(part, whole[first : first + len(part)], atol=1e-3)
    first = (len(whole) - RATE) // 2
    middle = load_audio(folder / name, duration_s=1, center=True)
    near = [(middle - whole[first + lag :][:RATE]).abs().max() for lag in range(-450, 451)]  # a frame may be damaged
    assert min(near) < 1e-3


@pytest.mark.parametrize("name", ["joined.mp3", "chained, other rate.ogg", "no total.flac"])
def test_a_stream_has_the_mel_of_the_whole(folder, name):
    parts = list(stream_mel(folder / name, MEL, part_s=0.7))
    assert torch.allclose(torch.cat(parts, 1), torch.cat(list(stream_mel(folder / name, MEL)), 1), atol=2e-3)


def notes(seconds: float, rate: int) -> np.ndarray:  # (1, samples): another note every quarter of a second
    time_s = np.arange(round(seconds * rate)) / rate
    hertz = 110 * 2 ** (np.random.default_rng(0).integers(0, 36, 99) / 12)[(time_s * 4).astype(int)]
    return (0.5 * np.sin(2 * np.pi * hertz * time_s) * np.exp(-8 * (time_s % 0.25)))[None].astype(np.float32)


def without_stamps(wave: np.ndarray, codec: str, container: str, rate: int) -> bytes:
    "Encode as programs do that leave the time stamps to the encoder."
    file = io.BytesIO()
    with av.open(file, "w", format=container) as out:
        stream = out.add_stream(codec, rate=rate, layout="mono")
        frame = av.AudioFrame.from_ndarray(wave, format="fltp", layout="mono")
        frame.sample_rate = rate
        to = av.AudioResampler(stream.format, "mono", rate, frame_size=stream.codec_context.frame_size or None)
        for part in [*to.resample(frame), *to.resample(None), None]:
            out.mux(stream.encode(part))
    return file.getvalue()


CODECS = [
    *((encode, rate, *rest) for rate in (16000, 44100, 48000) for rest in (("aac", "ipod"), ("flac", "flac"))),
    *((encoder, rate, "libmp3lame", "mp3") for encoder in (encode, without_stamps) for rate in (16000, 44100, 48000)),
    *((encoder, rate, "libopus", "ogg") for encoder in (encode, without_stamps) for rate in (16000, 48000)),
    *((write, rate, "VORBIS", "OGG") for rate in (16000, 44100, 48000)),
]


@pytest.mark.parametrize("encoder, rate, codec, container", CODECS)
def test_the_whole_and_excerpts_lie_where_the_source_does(tmp_path, encoder, rate, codec, container):
    source, wave = notes(6, RATE)[0], notes(6, rate)
    arguments = (wave, container, rate, codec) if encoder is write else (wave, codec, container, rate)
    data = encoder(*arguments)
    for content in (data, data[: data.rfind(b"OggS") + 100]) if codec == "libopus" else (data,):  # the last page cut
        (tmp_path / "a").write_bytes(content)
        whole = load_audio(tmp_path / "a").numpy()
        assert len(whole) == 6 * RATE or (content is not data and len(whole) > 3.5 * RATE)
        middle = source[RATE : 3 * RATE]
        lags = range(-1200, 1201, 1)
        assert max(lags, key=lambda lag: whole[RATE + lag : 3 * RATE + lag] @ middle) in (-1, 0, 1)
        for offset in (0.1, 1.3, 2.7, 5.1, 5.5):
            part = load_audio(tmp_path / "a", offset, 0.4).numpy() if offset * RATE < len(whole) else []
            assert np.allclose(part, whole[round(offset * RATE) :][: len(part)], atol=1e-3)


@pytest.mark.parametrize("behind", [b"LIST\x04\0\1\0INFO" + bytes(65536), b"ID3\4" + bytes(9999), bytes(999), b""])
def test_what_is_no_sound_behind_the_samples_is_not_read(tmp_path, behind):
    (tmp_path / "a.wav").write_bytes(WAV + behind)
    assert len(load_audio(tmp_path / "a.wav")) == 2 * RATE
    assert check_length(tmp_path / "a.wav")


def test_a_size_that_cannot_be_ignored_is_named(tmp_path):
    (tmp_path / "a.aiff").write_bytes(with_old_sizes(write(tone(LOW), "AIFF"), b"SSND", "big"))
    with pytest.raises(ValueError, match="a.aiff: holds more samples than its header says"):
        load_audio(tmp_path / "a.aiff")


@pytest.mark.parametrize("seconds", [(14, 14), (14, 9), (1, 14)], ids=str)
@pytest.mark.parametrize("container", ["FLAC", "OGG"])
def test_long_files_that_were_joined_are_read_to_their_end(tmp_path, monkeypatch, container, seconds):
    monkeypatch.setattr(lengths, "SEARCHED_BYTES", 1 << 16)  # else they would have to be longer
    noise = 0.1 * np.random.default_rng(0).normal(size=(2, 14 * RATE)).astype(np.float32)
    parts = [write(noise[:, : count * RATE], container, RATE) for count in seconds]
    (tmp_path / "one").write_bytes(parts[-1])
    (tmp_path / "joined").write_bytes(b"".join(parts))
    assert len(load_audio(tmp_path / "joined")) == sum(seconds) * RATE
    assert len(load_audio(tmp_path / "one")) == seconds[-1] * RATE and len(find_sections(tmp_path / "one")) == 1


def test_an_mp3_that_was_cut_ends_where_it_ends(tmp_path):
    (tmp_path / "cut.mp3").write_bytes(MP3[: len(MP3) // 2])
    assert len(load_audio(tmp_path / "cut.mp3")) / RATE == pytest.approx(1, abs=0.1)


@pytest.mark.parametrize("rate, channels", [(1, 1), (999, 1), (768_001, 1), (2**31 - 1, 1), (44100, 65)])
def test_headers_of_no_recording_are_refused(tmp_path, rate, channels):
    (tmp_path / "odd.wav").write_bytes(write(np.zeros((channels, 4000), np.float32), "WAV", rate))
    with pytest.raises(ValueError, match=f"odd.wav: a sample rate of {rate:,} Hz, {channels} channels"):
        load_audio(tmp_path / "odd.wav")


@pytest.mark.parametrize(
    "arguments",
    [
        *(dict(sample_rate=value) for value in (0, -16000, 10**9, float("inf"), 16000.5)),
        *(dict(duration_s=value) for value in (float("nan"), float("inf"), "3", -1)),
        *(dict(offset_s=value) for value in (float("nan"), float("inf"), "3")),
        *(dict(channel=value) for value in (2, -1, 0.5, "left")),
    ],
    ids=str,
)
def test_parameters_out_of_range_are_named(tmp_path, arguments):
    (tmp_path / "a.wav").write_bytes(WAV)
    ((name, value),) = arguments.items()
    with pytest.raises(ValueError, match=re.escape(f"{name}={value!r}")):
        load_audio(tmp_path / "a.wav", **arguments)


@pytest.mark.parametrize("gain, cancels", [(-1.0, True), (-0.85, True), (-0.5, False), (1.0, False)])
def test_channels_that_cancel_are_reported(tmp_path, caplog, gain, cancels):
    left = tone(LOW, rate=RATE, channels=1)[0]
    (tmp_path / "a.wav").write_bytes(write(np.stack([left, gain * left]), "WAV", RATE))
    load_audio(tmp_path / "a.wav")
    assert ("a.wav: its channels cancel" in caplog.text) == cancels
    caplog.clear()
    assert np.abs(load_audio(tmp_path / "a.wav", channel=0).numpy() - left).max() < 1e-3
    assert np.abs(load_audio(tmp_path / "a.wav", channel=1).numpy() - gain * left).max() < 1e-3
    assert not caplog.text


def test_floats_on_the_scale_of_integers_are_reported_with_their_file(tmp_path, caplog):
    (tmp_path / "a.wav").write_bytes(write(20_000 * tone(LOW), "WAV", subtype="FLOAT"))
    load_audio(tmp_path / "a.wav")
    assert re.search(r"a.wav: samples of 4,24. .* 32768", caplog.text)


def test_channels_that_cancel_are_a_row_of_a_scan(tmp_path):
    left = tone(LOW, seconds=6, rate=RATE, channels=1)[0]
    (tmp_path / "music").mkdir()
    for name, right in (("good.wav", left), ("bad.wav", -left)):
        (tmp_path / "music" / name).write_bytes(write(np.stack([left, right]), "WAV", RATE))
    report = scan(tmp_path / "music", tmp_path / "library", tiny_model(), progress=False)
    ((path, problem),) = report.doubtful
    assert path.endswith("bad.wav") and problem.startswith("its channels cancel") and report.read == 2


def test_the_usual_names_of_audio_are_listed(tmp_path):
    for suffix in AUDIO_SUFFIXES | {".txt"}:
        (tmp_path / f"a{suffix.upper()}").write_bytes(b"x")
    assert len(list_audio([tmp_path]).files) == len(AUDIO_SUFFIXES)
    assert {".m4b", ".mp4", ".mka", ".oga", ".aifc", ".au", ".w64", ".wv"} <= AUDIO_SUFFIXES


def test_a_flac_with_flipped_bits_is_read_or_named(tmp_path):
    rng, path, named = np.random.default_rng(0), tmp_path / "flipped.flac", 0
    soundfile.write(path, rng.normal(0, 0.1, 48_000), 16_000)
    whole = path.read_bytes()
    for _ in range(30):
        data = bytearray(whole)
        for at in rng.integers(0, len(data), 32):
            data[at] ^= 1 << rng.integers(8)
        path.write_bytes(data)
        try:
            assert load_audio(path).isfinite().all()
        except ValueError as error:
            assert str(path) in str(error)
            named += 1
    assert named
