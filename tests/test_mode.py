"""Mode is told from how long each pitch class sounds, in any key."""

import numpy as np
import pytest
import torch

from maestlib.studies import mode

SCALES = {"Major": (0, 2, 4, 5, 7, 9, 11), "Dorian": (0, 2, 3, 5, 7, 9, 10), "Minor": (0, 2, 3, 5, 7, 8, 10),
          "Mixolydian": (0, 2, 4, 5, 7, 9, 10)}  # fmt: skip


@pytest.fixture
def tracks():  # profiles, tonics, modes: eight tracks of each mode, the tonic the longest
    rng = np.random.default_rng(0)
    modes, tonics = list(SCALES) * 8, rng.integers(12, size=32)
    profiles = np.zeros((32, 12))
    for row, (name, tonic) in enumerate(zip(modes, tonics, strict=True)):
        profiles[row, [(tonic + step) % 12 for step in SCALES[name]]] = 1 + rng.random(7) / 4
        profiles[row, tonic] += 1
    return profiles, tonics, modes


def test_modes_are_told_apart_and_the_key_makes_no_difference(tracks):
    profiles, tonics, modes = tracks
    train, others = np.arange(16), np.arange(16, 32)
    scores = mode.key_free_scores(profiles, tonics, modes, train)
    assert [mode.MODES[i] for i in scores[others].argmax(1)] == [modes[row] for row in others]
    np.testing.assert_allclose(scores.sum(1), 1)
    shift = np.random.default_rng(1).integers(12, size=32)
    turned = np.stack([np.roll(profile, by) for profile, by in zip(profiles, shift, strict=True)])
    np.testing.assert_allclose(mode.key_free_scores(turned, (tonics + shift) % 12, modes, train), scores)
    hidden = np.where(np.arange(32) < 16, tonics, 0)
    np.testing.assert_array_equal(mode.key_free_scores(profiles, hidden, modes, train), scores)
    with pytest.raises(ValueError, match="no training track is Minor"):
        mode.key_free_scores(profiles, tonics, modes, train[[0, 1, 3]])


def test_a_reader_learns_which_row_a_partial_is_in_and_the_same_seed_reads_the_same():
    rng = np.random.default_rng(0)
    classes = rng.random((6, 40, 12)) < 0.3
    patches = torch.from_numpy(classes[..., :9, None] * np.ones(4)).half() * 2 - 1  # row r sounds with pitch class r
    read = [mode.read_pitch_classes(patches, classes, np.arange(4), mean_rows=False, steps=25) for _ in range(2)]
    assert np.array_equal(*read)
    held_out = read[0][4:, :, :9][classes[4:, :, :9]].mean() - read[0][4:, :, :9][~classes[4:, :, :9]].mean()
    assert held_out > 0.5
