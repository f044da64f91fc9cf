"""MAEST against an independent reference in float64: a convolution and an explicit softmax."""

import math
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from maestlib.models.cost import count_flops
from maestlib.models.maest import MAEST, MAESTConfig
from maestlib.models.patchout import Patchout, draw_patches, patch_grid, select_patches

PARITY = Path(os.environ.get("MAESTLIB_DATA", Path(__file__).parents[2] / "shared")) / "parity"
LABELS = [f"Group---{i}" for i in range(7)]


def reference(state, mel, heads, depth, rows, columns):
    "All block embeddings and the logits, computed step by step in float64."
    s = {k: v.double() for k, v in state.items()}
    x = torch.nn.functional.conv2d(mel.double()[:, None], s["patch_embed.proj.weight"], s["patch_embed.proj.bias"], 10)
    x = x + s["freq_new_pos_embed"] + s["time_new_pos_embed"][..., : x.shape[-1]]
    x = x[:, :, rows][:, :, :, columns].flatten(2).transpose(1, 2)
    tokens = torch.cat([s["cls_token"], s["dist_token"]], 1) + s["new_pos_embed"]
    x = torch.cat([tokens.expand(len(x), -1, -1), x], 1)

    def norm(x, name, eps):
        centred = x - x.mean(-1, keepdim=True)
        deviation = (centred.square().mean(-1, keepdim=True) + eps).sqrt()
        return centred / deviation * s[f"{name}.weight"] + s[f"{name}.bias"]

    def linear(x, name):
        return x @ s[f"{name}.weight"].T + s[f"{name}.bias"]

    block_embeddings = []
    for i in range(depth):
        q, k, v = linear(norm(x, f"blocks.{i}.norm1", 1e-6), f"blocks.{i}.attn.qkv").chunk(3, -1)
        out = []
        for a, b, c in zip(*(t.chunk(heads, -1) for t in (q, k, v)), strict=True):
            out.append(torch.softmax(a @ b.transpose(1, 2) / math.sqrt(a.shape[-1]), -1) @ c)
        x = x + linear(torch.cat(out, -1), f"blocks.{i}.attn.proj")
        hidden = linear(norm(x, f"blocks.{i}.norm2", 1e-6), f"blocks.{i}.mlp.fc1")
        x = x + linear(hidden * (1 + torch.erf(hidden / math.sqrt(2))) / 2, f"blocks.{i}.mlp.fc2")
        block_embeddings.append(torch.stack([x[:, 0], x[:, 1], x[:, 2:].mean(1)], 1))
    features = norm(x, "norm", 1e-6)[:, :2].mean(1)
    return torch.stack(block_embeddings, 1), linear(norm(features, "head.0", 1e-5), "head.1")


@pytest.fixture(scope="module")
def model():
    config = MAESTConfig(seconds=5, labels=LABELS, embed_dim=96, num_heads=3, depth=4)
    model = MAEST(config).init_weights(1).eval()
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():  # away from the initial values, so that no parameter can be ignored
        for p in model.parameters():
            p.add_(0.05 * torch.randn(p.shape, generator=generator))
    return model


@pytest.mark.parametrize(
    "patchout", [None, Patchout(keep_every=3), Patchout(drop_rows=(0, 7, 8)), Patchout(keep_every=5, drop_rows=(0, 1))]
)
@pytest.mark.parametrize("frames", [312, 100, 16])
def test_equals_the_reference(model, patchout, frames):
    mel = torch.randn(2, 96, frames, generator=torch.Generator().manual_seed(3))
    rows, columns = select_patches(patch_grid(frames), patchout)
    blocks, logits = reference(model.state_dict(), mel, 3, 4, rows, columns)
    with torch.no_grad():
        torch.testing.assert_close(model(mel, patchout).double(), logits, atol=1e-5, rtol=1e-4)
        ours = model.embed(mel, blocks=(0, 1, 2, 3), patchout=patchout)
    torch.testing.assert_close(ours.double(), blocks, atol=1e-5, rtol=1e-4)


def test_blocks_of_the_released_layout():
    "Block embeddings against those of the released code, for two blocks of a random state dict in its layout."
    state = load_file(Path(__file__).parent / "released_layout_two_blocks.safetensors")
    expected = {k: state.pop(k) for k in ("block0", "block1")}
    model = MAEST(MAESTConfig(seconds=30, labels=LABELS, embed_dim=96, num_heads=3, depth=2)).eval()
    own = {k: v for k, v in model.state_dict().items() if k.startswith(("norm", "head"))}
    model.load_state_dict(state | own, strict=True)
    mel = torch.randn(2, 96, 1875, generator=torch.Generator().manual_seed(7))
    with torch.no_grad():
        ours = model.embed(mel, blocks=(0, 1))
    for i, want in enumerate(expected.values()):
        torch.testing.assert_close(ours[:, i].flatten(1), want, atol=1e-4, rtol=0)


@pytest.mark.skipif(not PARITY.exists(), reason="needs the folder parity/ of reference outputs (MAESTLIB_DATA)")
def test_parity_with_the_released_code():
    "Logits, features, twelve blocks, the shorter input and the inference patchouts, to 1e-4."
    state = torch.load(PARITY / "official_layout_dim96.pt", weights_only=True)
    want = np.load(PARITY / "reference_outputs.npz")
    model = MAEST(MAESTConfig(seconds=30, labels=[str(i) for i in range(400)], embed_dim=96, num_heads=3)).eval()
    model.load_state_dict(state, strict=True)
    mel = torch.randn(2, 96, 1875, generator=torch.Generator().manual_seed(7))
    patchouts = {
        "f3": Patchout(drop_rows=(0, 7, 8)),
        "f4": Patchout(drop_rows=(0, 1, 7, 8)),
        "t2": Patchout(keep_every=2),
        "t3": Patchout(keep_every=3),
        "t5f3": Patchout(keep_every=5, drop_rows=(0, 7, 8)),
    }
    with torch.no_grad():
        ours = {
            "logits": model(mel),
            "features": model.forward_features(mel).mean(1),
            "logits_625": model(mel[..., :625]),
        }
        ours |= {f"block{i}": x.flatten(1) for i, x in enumerate(model.embed(mel, blocks=range(12)).unbind(1))}
        ours["block6_625"] = model.embed(mel[..., :625])[:, 0].flatten(1)
        for name, patchout in patchouts.items():
            ours[f"po_{name}_logits"] = model(mel, patchout)
            ours[f"po_{name}_block6"] = model.embed(mel, patchout=patchout)[:, 0].flatten(1)
    assert len(ours) == 26
    for name, value in ours.items():
        np.testing.assert_allclose(value.numpy(), want[name], atol=1e-4, err_msg=name)


def test_training_uses_the_full_time_table(model):
    "In training a shorter input starts at a random column of the time table, drawn from the generator."
    mel = torch.zeros(1, 96, 100)
    model.train()
    starts = {
        round(float(model.embed_patches(mel, generator=torch.Generator().manual_seed(s))[0][0, 2, 0].detach()), 5)
        for s in range(200)
    }
    model.eval()
    assert len(starts) == model.time_new_pos_embed.shape[-1] - patch_grid(100)[1] + 1


@torch.no_grad()
def test_an_embedding_draws_its_patches_once(model):
    mel, patchout = torch.randn(2, 96, 312, generator=torch.Generator().manual_seed(0)), Patchout.random(2, 9)
    torch.manual_seed(3)
    kept = draw_patches((9, 30), patchout, 2)
    state = torch.get_rng_state()
    torch.manual_seed(3)
    random = model.embed(mel, (1, 3), patchout, rows=True)
    assert torch.equal(torch.get_rng_state(), state)
    assert random.shape == (2, 2, 3 + 2 * 7, 96) and torch.equal(random, model.embed(mel, (1, 3), kept, rows=True))


def test_random_patchout_is_uniform():
    counts = np.zeros(9)
    generator = torch.Generator().manual_seed(0)
    for _ in range(2000):
        rows, columns = select_patches((9, 30), Patchout.random(rows=3, columns=15), generator)
        assert len(set(rows.tolist())) == 6 and len(set(columns.tolist())) == 15
        counts[rows] += 1
    assert np.abs(counts / 2000 - 6 / 9).max() < 0.05


def test_dropped_patches_cost_nothing():
    config = MAESTConfig.from_size("base", labels=[f"genre {i}" for i in range(400)])
    assert count_flops(config)["total_tokens"] == 1676 and count_flops(config, Patchout(keep_every=3))["tokens"] == 560
    assert count_flops(config, Patchout(keep_every=3))["gflop"] < count_flops(config)["gflop"] / 3


@pytest.mark.parametrize(
    ("mel", "message"),
    [
        (torch.zeros(96, 312), "batch"),
        (torch.zeros(1, 128, 312), "96"),
        (torch.zeros(1, 96, 15), "16 frames"),
        (torch.zeros(1, 96, 400), "312"),
        (torch.zeros(1, 96, 312, dtype=torch.int16), "int16"),
        (torch.full((1, 96, 312), float("nan")), "NaN"),
    ],
)
def test_bad_mels_are_refused(model, mel, message):
    with pytest.raises(ValueError, match=message):
        model(mel)


@pytest.mark.parametrize("blocks", [(), (4,), (-1,), (0, 12)])
def test_bad_blocks_are_refused(model, blocks):
    with pytest.raises(ValueError, match="0 to 3"):
        model.embed(torch.zeros(1, 96, 100), blocks=blocks)
