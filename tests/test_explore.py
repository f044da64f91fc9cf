"""What the explorers do with sound that is broken, too long or too short, without a browser."""

import datetime

import numpy as np
import pytest
import soundfile
import torch
from traitlets.utils.bunch import Bunch

pytest.importorskip("anywidget", reason="the widgets need the extra demo: pip install -e '.[dev]'")

from maestlib.controls import Latest, Track, hear
from maestlib.explore import AttentionExplorer, PatchoutExplorer, TagExplorer
from maestlib.mel import MEL
from maestlib.model import MAEST, MAESTConfig


@pytest.fixture(scope="module")
def tunes(tmp_path_factory):
    folder, found = tmp_path_factory.mktemp("sound"), {}
    for name, pitch in (("low", 220), ("high", 880)):
        path = folder / f"{name}.wav"
        soundfile.write(path, 0.3 * np.sin(np.arange(16000 * 6) * pitch * 2 * np.pi / 16000), 16000)
        found[name] = str(path)
    return found


def small(labels=("a", "b", "c")):
    return MAEST(MAESTConfig(width=48, heads=3, depth=3, seconds=5, labels=labels)).init_weights(0).eval()


def upload(name: str, content: bytes) -> tuple:
    now = datetime.datetime.now(datetime.timezone.utc)
    return (Bunch(name=name, type="", size=len(content), content=content, last_modified=now),)


def test_unreadable_missing_and_too_short_sound_is_said(tunes, tmp_path):
    heard = []
    track = Track(tunes, MEL, 30, heard.append)
    (tmp_path / "noise.mp3").write_bytes(b"this is no sound" * 100)
    soundfile.write(tmp_path / "short.wav", np.zeros(1600), 16000)
    for path, words in (
        ("noise.mp3", "noise.mp3"),
        ("short.wav", "shorter than one patch"),
        ("no.wav", "no such file"),
    ):
        track.path.value = str(tmp_path / path)
        assert words in track.says.value and not heard, path
    track.pick.value = "high"
    assert len(heard) == 1 and track.says.value == "" and track.player.sound[:4] == b"fLaC"


def test_an_unreadable_upload_is_said_by_its_own_name(tunes):
    heard = []
    track = Track(tunes, MEL, 30, heard.append)
    track.upload.value = upload("mine.mp3", b"no sound at all")
    assert "mine.mp3" in track.says.value and "/tmp" not in track.says.value and not heard


def test_three_hours_are_read_in_part(tmp_path):
    path, hour = tmp_path / "long.wav", np.zeros(8000 * 3600, np.int16)
    with soundfile.SoundFile(path, "w", 8000, 1) as file:
        for _ in range(3):
            file.write(hour)
    wave, says = hear(str(path), limit_s=60)
    assert len(wave) == 60 * 16000 and says == "It lasts 180.0 minutes; you see and hear the first 60 s."


def test_the_patchout_explorer_follows_its_sliders(tunes):
    widget = PatchoutExplorer(small(), tunes)
    widget.hear.wait()
    before, said = np.array(widget.figure.data[1].z), np.array(widget.tags.data[0].x)
    widget.time.value = 9
    widget.hear.wait()
    assert widget.figure.data[1].z.sum() > before.sum() and not np.array_equal(said, widget.tags.data[0].x)
    widget.pattern.value = "training"
    first = np.array(widget.figure.data[1].z)
    widget.seed.value = 7
    assert not np.array_equal(first, widget.figure.data[1].z), "another seed, another pattern"
    widget.frequency.value = 8
    widget.hear.wait()
    assert "⚠" not in widget.track.says.value


@pytest.mark.parametrize("explorer", [PatchoutExplorer, TagExplorer])
def test_a_model_without_labels_says_so(tunes, explorer):
    widget = explorer(small(labels=()), tunes)
    (widget.hear if explorer is PatchoutExplorer else widget.read).wait()
    assert "no labels" in widget.track.says.value


def test_attention_of_each_head(tunes):
    widget = AttentionExplorer(small(), tunes)
    widget.look.wait()
    seen = []
    for head in range(3):
        widget.head.value = head
        seen.append(np.array(widget.figure.data[1].z))
    assert not np.array_equal(seen[0], seen[1]) and np.isclose(np.mean(seen[2]), 1, atol=1e-3)


def test_what_goes_wrong_in_the_thread_reaches_the_widget():
    said = []
    asked = Latest(lambda value: torch.zeros(1)[value], said.append)
    asked(5)
    asked.wait()
    assert isinstance(said[0], IndexError)
