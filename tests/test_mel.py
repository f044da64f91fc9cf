"""The front end against Essentia's output, a slow float64 formula and torchaudio; decoding against itself."""

import math
import re

import numpy as np
import pytest
import soundfile
import torch
import torchaudio

from maestlib.audio.mel import MEL, MelConfig, audio_duration, load_audio, logmel, mel_edges, normalize
from maestlib.core.files import asset_path

ESSENTIA = np.load(asset_path("essentia.npz"))
TORCHAUDIO = MelConfig(frontend="torchaudio")


def test_essentia_from_the_first_frame_to_the_last():
    start = logmel(ESSENTIA["signal"]).T.numpy()
    assert np.abs(start[: len(ESSENTIA["mel"])] - ESSENTIA["mel"]).max() < 2e-5
    end = logmel(ESSENTIA["tail_signal"]).T.numpy()  # its first frame looks before the cut
    assert end[1:].shape == ESSENTIA["tail_mel"].shape
    assert np.abs(end[1:] - ESSENTIA["tail_mel"]).max() < 2e-5


def test_a_formula_in_float64():
    "Frame by frame and band by band, with the exact mel scale instead of the single-precision one."
    wave = np.random.default_rng(0).normal(0, 0.1, 16000)
    mel = np.linspace(0, 15 + 27 * math.log(8) / math.log(6.4), 98)
    edges = np.where(mel < 15, mel * 200 / 3, 1000 * 6.4 ** ((mel - 15) / 27))
    assert np.abs(edges - mel_edges()).max() < 0.01
    window = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(512) / 511)
    silence = np.zeros(256)
    padded = np.concatenate([silence, wave, silence])
    expected = np.zeros((96, 63))
    for i in range(63):
        power = np.abs(np.fft.rfft(padded[256 * i : 256 * i + 512] * window)) ** 2
        for b, (low, peak, high) in enumerate(zip(edges, edges[1:], edges[2:], strict=False)):
            weights = np.interp(np.arange(257) * 31.25, [low, peak, high], [0, 2 / (high - low), 0])
            expected[b, i] = np.log10(1 + 1e4 * power @ weights)
    assert np.abs(logmel(wave).numpy() - expected).max() < 5e-4


def test_torchaudio_front_end():
    wave = torch.from_numpy(ESSENTIA["signal"])
    shape = dict(sample_rate=16000, n_fft=512, hop_length=256, n_mels=96, f_max=8000)
    mel = torchaudio.transforms.MelSpectrogram(**shape, norm="slaney", mel_scale="slaney")(wave)
    assert torch.allclose(logmel(wave, TORCHAUDIO), torch.log10(1 + 1e4 * mel), atol=2e-5)


@pytest.mark.parametrize("config", [MEL, TORCHAUDIO], ids=lambda c: c.frontend)
def test_batches_and_long_waves(config):
    wave = torch.from_numpy(np.random.default_rng(1).normal(0, 0.1, (2, 3, 20000)).astype(np.float32))
    batch = logmel(wave, config)
    assert batch.shape == (2, 3, 96, 79)
    assert torch.allclose(batch[1, 2], logmel(wave[1, 2].numpy(), config), atol=1e-5)
    long = wave.flatten().repeat(10)  # more frames than one block
    assert torch.allclose(logmel(long, config)[:, 4000:4300], logmel(long[3990 * 256 :], config)[:, 10:310], atol=1e-5)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_gpu_gives_the_same():
    wave = torch.from_numpy(ESSENTIA["signal"])
    with torch.autocast("cuda", torch.float16):
        mel = logmel(wave.cuda()[None])
    assert mel.is_cuda and torch.allclose(mel[0].cpu(), logmel(wave), atol=2e-5)


@pytest.mark.parametrize("rate", [8000, 16000, 22050, 44100, 44101, 48000])
@pytest.mark.parametrize("suffix", ["wav", "flac", "ogg", "mp3"])
def test_a_part_is_that_part_of_the_whole(tmp_path, suffix, rate):
    if suffix == "mp3" and rate == 44101:
        pytest.skip("mp3 has no such rate")
    path = tmp_path / f"sound.{suffix}"
    noise = np.random.default_rng(2).normal(0, 0.1, (rate * 4, 2)).clip(-1, 1)
    with soundfile.SoundFile(path, "w", rate, 2) as file:
        for second in np.array_split(noise, 4):
            file.write(second)
    whole = load_audio(path)
    assert len(whole) == pytest.approx(64000, abs=2) and audio_duration(path) == pytest.approx(4, abs=1e-3)
    for offset, length in ((0, 1), (1.2345, 1.5), (3.5, 9)):
        first = round(offset * 16000)
        part = load_audio(path, offset, length)
        assert len(part) == min(length * 16000, len(whole) - first)
        assert torch.allclose(part, whole[first : first + len(part)], atol=1e-5)
    assert torch.allclose(load_audio(path, duration_s=2, center=True), whole[16000:48000], atol=1e-5)


def test_channels_are_averaged_and_nothing_is_clipped(tmp_path):
    soundfile.write(tmp_path / "loud.wav", np.tile([1.0, 4.0, 4.0], (4000, 1)), 8000, subtype="FLOAT")
    assert load_audio(tmp_path / "loud.wav")[1000:-1000].sub(3).abs().max() < 1e-3


@pytest.mark.parametrize(
    "arguments, words",
    [
        (dict(offset_s=-1), "offset_s=-1"),
        (dict(duration_s=0), "duration_s=0"),
        (dict(offset_s=1, center=True), "give one of the two"),
        (dict(offset_s=99), "is after its end at 0.10 s"),
    ],
)
def test_bad_parts(tmp_path, arguments, words):
    soundfile.write(tmp_path / "a.wav", np.zeros(1600), 16000)
    with pytest.raises(ValueError, match=re.escape(words)):
        load_audio(tmp_path / "a.wav", **arguments)


@pytest.mark.parametrize(
    "arguments, words",
    [
        (dict(frontend="librosa"), "frontend='librosa'"),
        (dict(f_max=9000), "f_max=9000"),
        (dict(hop_length=0), "hop_length=0"),
    ],
)
def test_bad_config(arguments, words):
    with pytest.raises(ValueError, match=words):
        MelConfig(**arguments)
    with pytest.raises(ValueError, match="unknown colour"):
        MelConfig.from_dict({"colour": 1})


def test_normalize_by_hand():
    mel = torch.full((1, 96, 2), 2.06755686098554 + 2 * 1.268292820667291)
    assert torch.allclose(normalize(mel), torch.ones(1, 96, 2))
