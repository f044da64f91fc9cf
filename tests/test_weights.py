"""All layouts of the same weights give the same model, invalid files are refused, broken downloads are resumed."""

import hashlib
import json
import os
import pickle
import threading
from contextlib import contextmanager
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from safetensors.torch import save_file

from maestlib.audio.mel import MelConfig
from maestlib.collection.cli import main
from maestlib.models import hub
from maestlib.models.checkpoint import load_model, save_checkpoint
from maestlib.models.hub import RELEASED_MODELS, ReleasedModel, download, label_names, list_models
from maestlib.models.layouts import FREQ_POS, TIME_POS
from maestlib.models.maest import MAEST, MAESTConfig
from maestlib.models.patchout import Patchout

PARITY = Path(os.environ.get("MAESTLIB_DATA", Path(__file__).parents[2] / "shared")) / "parity"
DISCOGS = label_names(400)


def trained(model, seed=2):
    "Away from the initial values, so that no tensor can be ignored."
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.05 * torch.randn(p.shape, generator=generator))
    return model.eval()


@pytest.fixture(scope="module")
def model():
    return trained(MAEST(MAESTConfig(seconds=5, labels=DISCOGS, embed_dim=96, num_heads=3, depth=3)).init_weights(1))


@pytest.fixture(scope="module")
def state(model):
    return {k: v.detach().clone() for k, v in model.state_dict().items()}


@pytest.fixture(scope="module")
def outputs(model):
    "Logits, and all blocks under patchout."
    return answers(model, random_mel(312))


@torch.no_grad()
def answers(model, mel):
    return {"logits": model(mel), "blocks": model.embed(mel, blocks=range(3), patchout=Patchout(keep_every=2))}


def random_mel(frames, batch=2, seed=7):
    return torch.randn(batch, 96, frames, generator=torch.Generator().manual_seed(seed))


# ---- the layouts, written independently of maestlib.models.layouts ----


def as_ast(state, columns):
    "Hugging Face's names; `columns` of the time table are unrolled."
    prefix, width = "audio_spectrogram_transformer.", state["cls_token"].shape[-1]
    grid = state["time_new_pos_embed"][..., :columns] + state["freq_new_pos_embed"]
    positions = torch.cat([state["new_pos_embed"], grid.flatten(2).transpose(1, 2)], 1)
    embeddings = {
        "cls_token": state["cls_token"],
        "distillation_token": state["dist_token"],
        "position_embeddings": positions,
        "patch_embeddings.projection.weight": state["patch_embed.proj.weight"],
        "patch_embeddings.projection.bias": state["patch_embed.proj.bias"],
    }
    out = {f"{prefix}embeddings.{k}": v for k, v in embeddings.items()}
    plain = {"attn.proj": "attention.output.dense", "mlp.fc1": "intermediate.dense", "mlp.fc2": "output.dense"}
    plain |= {"norm1": "layernorm_before", "norm2": "layernorm_after"}
    for i in range(depth(state)):
        layer = f"{prefix}encoder.layer.{i}."
        for parameter in ("weight", "bias"):
            qkv = state[f"blocks.{i}.attn.qkv.{parameter}"]
            for j, name in enumerate(("query", "key", "value")):
                out[f"{layer}attention.attention.{name}.{parameter}"] = qkv[j * width : (j + 1) * width].clone()
            for ours, theirs in plain.items():
                out[f"{layer}{theirs}.{parameter}"] = state[f"blocks.{i}.{ours}.{parameter}"]
    for parameter in ("weight", "bias"):
        out[f"{prefix}layernorm.{parameter}"] = state[f"norm.{parameter}"]
        out[f"classifier.layernorm.{parameter}"] = state[f"head.0.{parameter}"]
        out[f"classifier.dense.{parameter}"] = state[f"head.1.{parameter}"]
    return out


def depth(state):
    return sum(k.endswith("norm1.bias") for k in state)


def write(layout, state, folder):
    "One of the layouts, as a file; returns what to load."
    file = folder / f"{layout}.ckpt"
    worse = {f"net.{k}": torch.zeros_like(v) for k, v in state.items()}
    averaged = {f"net_swa.{k}": v for k, v in state.items()}
    columns = state["time_new_pos_embed"].shape[-1]
    wrapped = {
        "bare": state,
        "state_dict": {"state_dict": state, "epoch": 129, "loss": 0.1},
        "net": {"state_dict": {f"net.{k}": v for k, v in state.items()}},
        "net_swa": averaged,
        "training": {"state_dict": worse | averaged},
    }
    if layout in wrapped:
        torch.save(wrapped[layout], file)
    elif layout == "old":  # what PyTorch wrote before 1.6
        torch.save(state, file, _use_new_zipfile_serialization=False)
    elif layout == "ours":
        config = MAESTConfig(columns * 0.16 // 1 + 1, DISCOGS, embed_dim=96, num_heads=3, depth=depth(state))
        model = MAEST(config)
        model.load_state_dict(state)
        save_checkpoint(model, file := folder / "best.safetensors", run="test")
    elif layout == "safetensors":
        save_file(state, file)
    elif layout == "ast":
        save_file(as_ast(state, columns), file := folder / "model.safetensors")
    elif layout == "ast_folder":
        file = folder / "hf"
        file.mkdir()
        torch.save(as_ast(state, columns - 1), file / "pytorch_model.bin")
        names = {str(i): name for i, name in reversed(list(enumerate(DISCOGS)))}
        notes = {"id2label": names, "num_attention_heads": 3, "num_mel_bins": 96}
        (file / "config.json").write_text(json.dumps(notes))
    return file


LAYOUTS = ("bare", "state_dict", "net", "net_swa", "training", "old", "ours", "safetensors", "ast", "ast_folder")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_is_the_same_model(model, state, outputs, layout, tmp_path):
    again = load_model(write(layout, state, tmp_path))
    assert again.config == model.config and not again.training
    assert all(p.requires_grad and p.dtype == torch.float32 for p in again.parameters())
    tolerance = 1e-5 if "ast" in layout else 0
    torch.testing.assert_close(answers(again, random_mel(312)), outputs, atol=tolerance, rtol=tolerance)


@pytest.mark.skipif(not PARITY.exists(), reason="needs the folder parity/ of reference outputs (MAESTLIB_DATA)")
@pytest.mark.parametrize("layout", ["bare", "state_dict", "training", "ours", "ast", "ast_folder"])
def test_parity_through_load(layout, tmp_path):
    "What the released code computes, to 1e-4, whatever the file."
    state = torch.load(PARITY / "official_layout_dim96.pt", weights_only=True)
    model = load_model(PARITY / "official_layout_dim96.pt" if layout == "bare" else write(layout, state, tmp_path))
    assert model.config == MAESTConfig(seconds=30, labels=DISCOGS, embed_dim=96, num_heads=3)
    want, mel = np.load(PARITY / "reference_outputs.npz"), random_mel(1875)
    with torch.no_grad():
        ours = {f"block{i}": x.flatten(1) for i, x in enumerate(model.embed(mel, blocks=range(12)).unbind(1))}
        ours |= {"logits": model(mel), "logits_625": model(mel[..., :625])}
        ours["po_t5f3_logits"] = model(mel, Patchout(keep_every=5, drop_rows=(0, 7, 8)))
    for name, value in ours.items():
        np.testing.assert_allclose(value.numpy(), want[name], atol=1e-4, err_msg=name)


def test_full_size_against_maest_infer(tmp_path):
    "The 768-wide model on random weights; its own package takes the mel as normalised already."
    maest_infer = pytest.importorskip("maest_infer")
    theirs = trained(maest_infer.get_maest(arch="discogs-maest-10s-pw-129e", pretrained=False))
    torch.save(theirs.state_dict(), tmp_path / "full.ckpt")
    ours, mel = load_model(tmp_path / "full.ckpt"), random_mel(625, batch=1)
    assert ours.config == MAESTConfig(seconds=10, labels=DISCOGS)
    with torch.no_grad():
        logits, _ = theirs(mel.clone(), melspectrogram_input=True)
        _, block6 = theirs(mel.clone(), transformer_block=6, melspectrogram_input=True)
        torch.testing.assert_close(ours(mel), logits, atol=1e-4, rtol=0)
        torch.testing.assert_close(ours.embed(mel, blocks=(6,)).flatten(1), block6, atol=1e-4, rtol=0)
    (tmp_path / "full.ckpt").unlink()


# ---- adapting ----


def cubic(old, new):
    "(new, old) bicubic interpolation in float64: Keys' kernel, a = -0.75, pixel centres aligned, edges repeated."
    matrix, a = np.zeros((new, old)), -0.75
    for i in range(new):
        x = (i + 0.5) * old / new - 0.5
        for j in range(int(np.floor(x)) - 1, int(np.floor(x)) + 3):
            d = abs(x - j)
            near, far = (a + 2) * d**3 - (a + 3) * d**2 + 1, a * (d**3 - 5 * d**2 + 8 * d - 4)
            matrix[i, min(max(j, 0), old - 1)] += near if d <= 1 else far if d < 2 else 0
    return matrix


def test_passt_is_interpolated(state, tmp_path, capsys):
    generator = torch.Generator().manual_seed(3)
    time, frequency = torch.randn(1, 96, 1, 99, generator=generator), torch.randn(1, 96, 12, 1, generator=generator)
    heads = {k: torch.randn(527, *v.shape[1:], generator=generator) for k, v in state.items() if len(v) == 400}
    torch.save(state | heads | {TIME_POS: time, FREQ_POS: frequency}, tmp_path / "passt.pt")
    model = load_model(tmp_path / "passt.pt", seconds=30)
    assert "12 × 99 to 9 × 187 rows and columns" in capsys.readouterr().out
    assert len(model.config.labels) == 527 and model.config.grid == (9, 186)
    want = time[0, :, 0].numpy() @ cubic(99, 187).T, frequency[0, :, :, 0].numpy() @ cubic(12, 9).T
    np.testing.assert_allclose(model.state_dict()[TIME_POS][0, :, 0], want[0], atol=2e-4)
    np.testing.assert_allclose(model.state_dict()[FREQ_POS][0, :, :, 0], want[1], atol=2e-4)
    assert torch.equal(model.head[1].weight, heads["head.1.weight"])
    assert load_model(tmp_path / "passt.pt").config.seconds == 10
    unchanged = load_model(tmp_path / "passt.pt", mel=MelConfig(n_mels=128))  # its own height: the rows stay
    assert torch.equal(unchanged.state_dict()[FREQ_POS], frequency)


def test_deit_becomes_a_maest(tmp_path, capsys):
    "timm's model, narrow."
    import timm

    deit = timm.create_model(
        "deit_base_distilled_patch16_384", pretrained=False, embed_dim=96, depth=2, num_heads=3, num_classes=1000
    )
    theirs = trained(deit).state_dict()
    torch.save({"model": theirs}, tmp_path / "deit.pth", _use_new_zipfile_serialization=False)
    with pytest.raises(ValueError, match="no head for music"):
        load_model(tmp_path / "deit.pth")
    model = load_model(tmp_path / "deit.pth", labels=["jig", "reel"], new_head=True, seconds=10)
    assert "untrained head for 2 labels" in capsys.readouterr().out
    assert (model.config.depth, model.config.num_heads, model.config.labels) == (2, 3, ("jig", "reel"))
    ours = model.state_dict()
    grid = theirs["pos_embed"][0, 2:].reshape(24, 24, 96).permute(2, 0, 1).numpy()
    grid = cubic(24, 9) @ grid @ cubic(24, 62).T
    np.testing.assert_allclose(ours[FREQ_POS][0, :, :, 0], grid.mean(2), atol=2e-4)
    np.testing.assert_allclose(ours[TIME_POS][0, :, 0], grid.mean(1), atol=2e-4)
    assert torch.equal(ours["new_pos_embed"], theirs["pos_embed"][:, :2])
    torch.testing.assert_close(ours["patch_embed.proj.weight"][:, 0], theirs["patch_embed.proj.weight"].sum(1))
    shared = [k for k in theirs if k.startswith(("blocks.", "norm.", "cls", "dist"))]
    assert len(shared) == 28 and all(torch.equal(ours[k], theirs[k]) for k in shared)


def test_another_length_keeps_everything_else(model, state, tmp_path, capsys):
    longer = load_model(write("ours", state, tmp_path), seconds=20)
    changed = {k for k, v in longer.state_dict().items() if not torch.equal(v, state[k])}
    assert changed == {TIME_POS} and longer.config.seconds == 20 and longer.config.labels == DISCOGS
    want = state[TIME_POS][0, :, 0].numpy() @ cubic(31, 125).T
    np.testing.assert_allclose(longer.state_dict()[TIME_POS][0, :, 0], want, atol=2e-4)
    assert "9 × 31 to 9 × 125 rows and columns" in capsys.readouterr().out


def test_a_new_head_only_on_request(state, tmp_path, capsys):
    file = write("bare", state, tmp_path)
    with pytest.raises(ValueError, match=r"bare\.ckpt: 400 labels, but 2 were given; new_head=True"):
        load_model(file, labels=["jig", "reel"])
    model = load_model(file, labels=["jig", "reel"], new_head=True, seed=3)
    assert "untrained head for 2 labels in place of 400" in capsys.readouterr().out
    assert model(random_mel(312)).shape == (2, 2) and torch.equal(model.norm.weight, state["norm.weight"])
    assert torch.equal(model.head[1].weight, load_model(file, labels=["a", "b"], new_head=True, seed=3).head[1].weight)
    mine = [f"mine {i}" for i in range(400)]
    assert (
        load_model(file, labels=mine).config.labels[1] == "mine 1"
    )  # this layout holds no names, so that these may be right
    with pytest.raises(ValueError, match="labels differ: 'Blues---Boogie Woogie'"):
        load_model(write("ours", state, tmp_path), labels=DISCOGS[::-1])


def test_training_checkpoints_prefer_the_average(state, tmp_path):
    "`net.` holds zeros in this file."
    assert load_model(write("training", state, tmp_path)).cls_token.abs().sum() > 0


def test_separated_heads(state, tmp_path):
    model, mel = load_model(write("bare", state, tmp_path), separate_heads=True), random_mel(312)
    with torch.no_grad():
        cls, dist = model.forward_features(mel).unbind(1)
        both = (model.head(cls) + model.head_dist(dist)) / 2
        torch.testing.assert_close(model(mel), both)
    with pytest.raises(ValueError, match="no second head"):
        load_model(write("ast", state, tmp_path), separate_heads=True)


def test_random_weights(tmp_path):
    model = load_model("random", size="tiny", seconds=5, dtype=torch.bfloat16, num_heads=6)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert model.config == MAESTConfig(5, DISCOGS, embed_dim=192, num_heads=6)
    same, other = (load_model("random", size="tiny", seconds=5, num_heads=6, seed=s).head[1].weight for s in (0, 1))
    assert torch.equal(same.bfloat16(), model.head[1].weight) and not torch.equal(same, other)
    save_checkpoint(model, tmp_path / "half.safetensors", run="test")
    again = load_model(tmp_path / "half.safetensors")  # heads, which no shape tells, come from the file
    assert again.config == model.config and torch.equal(again.cls_token, model.cls_token.float())


def test_half_precision_copies(state, tmp_path):
    "A copy in float16 or bfloat16 comes back as float32, Hugging Face's layout included."
    for dtype in (torch.float16, torch.bfloat16):
        half = {k: v.to(dtype) for k, v in as_ast(state, 31).items()}
        save_file(half, tmp_path / "half.safetensors")
        model = load_model(tmp_path / "half.safetensors")
        assert model.cls_token.dtype == torch.float32
        grids = [s[TIME_POS] + s[FREQ_POS] for s in (model.state_dict(), state)]
        torch.testing.assert_close(*grids, atol=8 * torch.finfo(dtype).eps, rtol=0)


# ---- what is no checkpoint ----


class Malicious:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def nan(state):
    return state | {"norm.bias": torch.full((96,), float("nan"))}


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda s: {k: v for k, v in s.items() if k != "norm.bias"}, r"norm\.bias is missing"),
        (lambda s: s | {"blocks.2.extra": torch.zeros(1)}, r"blocks\.2\.extra is unexpected"),
        (lambda s: s | {"norm.bias": torch.zeros(7)}, r"norm\.bias is \(7,\) instead of \(96,\)"),
        (lambda s: s | {"head_dist.bias": torch.zeros(399)}, r"head_dist\.bias is \(399,\)"),
        (lambda s: s | {TIME_POS: torch.zeros(96, 31)}, "do not have the shapes of a MAEST"),
        (lambda s: {k: v for k, v in s.items() if k != TIME_POS}, "another architecture"),
        (nan, r"norm\.bias contains NaN"),
        (lambda s: s | {"norm.bias": torch.zeros(96, dtype=torch.int32)}, r"not floating-point tensors: norm\.bias"),
        (lambda s: s | {"epoch": 3}, "not floating-point tensors: epoch"),
        (lambda s: {f"net.{k}": v for k, v in s.items()} | {"mel.window": torch.zeros(1)}, r"mel\.window"),
        (lambda s: {"conv1.weight": torch.zeros(3)}, "another architecture"),
        (lambda s: {"cls_token": s["cls_token"], "pos_embed": torch.zeros(1, 197, 96)}, "another architecture"),
        (lambda s: {}, "no named tensors"),
        (lambda s: [s["cls_token"]], "no named tensors"),
        (lambda s: s["cls_token"], "no named tensors"),
        (lambda s: {**as_ast(s, 31), "audio_spectrogram_transformer.pooler": torch.zeros(1)}, "pooler is unexpected"),
        (
            lambda s: {k: v for k, v in as_ast(s, 31).items() if ".2.attention.attention.key.w" not in k},
            r"blocks\.2\.attn\.query\.weight is unexpected",
        ),
        (
            lambda s: {k: v.flip(1) ** 2 if "position" in k else v for k, v in as_ast(s, 31).items()},
            "not time plus frequency",
        ),
    ],
)
def test_mismatching_tensors_are_named(state, make, message, tmp_path):
    torch.save(make(state), tmp_path / "invalid.ckpt")
    with pytest.raises(ValueError, match=message) as error:
        load_model(tmp_path / "invalid.ckpt")
    assert "invalid.ckpt" in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("layout", ["released", "ast", "deit"])
def test_any_tensor_missing_or_malformed(state, layout, tmp_path):
    "One key at a time: always a ValueError that names the file, never another error, never a model."
    small = {k: v for k, v in state.items() if not k.startswith("blocks.") or k.startswith("blocks.0.")}
    if layout == "ast":
        small = as_ast(small, 31)
    if layout == "deit":
        small = {k: v for k, v in small.items() if "pos_embed" not in k and not k.startswith("head")}
        small |= {"pos_embed": torch.randn(1, 27, 96), "patch_embed.proj.weight": torch.randn(96, 3, 16, 16)}
    options = {"labels": ["jig"], "new_head": True} if layout == "deit" else {}
    file = tmp_path / "invalid.safetensors"
    save_file(small, file)
    load_model(file, **options)
    for k in small:
        for change in ({}, {k: torch.zeros(())}, {k: torch.zeros(2, 3)}):
            save_file({other: t for other, t in small.items() if other != k} | change, file)
            with pytest.raises(ValueError, match=r"invalid\.safetensors") as error:
                load_model(file, **options)
            assert "\n" not in str(error.value)


def test_damaged_files_say_so(state, tmp_path):
    intact = {name: write(name, state, tmp_path).read_bytes() for name in ("bare", "old", "ours")}
    files = {
        f"{name} {part}": data[: int(len(data) * part)] for name, data in intact.items() for part in (0.01, 0.5, 0.999)
    }
    files |= {"text": b"<html>404</html>" * 50, "empty": b"", "noise": os.urandom(4000), "brace": b"12345678{"}
    for name, data in files.items():
        (tmp_path / "bad.ckpt").write_bytes(data)
        with pytest.raises(ValueError, match=r"bad\.ckpt") as error:
            load_model(tmp_path / "bad.ckpt")
        assert "\n" not in str(error.value) and "weights_only" not in str(error.value), name


def test_a_pickle_that_runs_code_does_not_run(state, tmp_path):
    executed = tmp_path / "executed"
    torch.save(state | {"epoch": Malicious(executed)}, tmp_path / "zip.ckpt")
    torch.save(state | {"epoch": Malicious(executed)}, tmp_path / "old.ckpt", _use_new_zipfile_serialization=False)
    for protocol in (2, 4):
        (tmp_path / f"plain{protocol}.ckpt").write_bytes(pickle.dumps({"a": Malicious(executed)}, protocol))
    torch.save(torch.nn.Linear(2, 2), tmp_path / "module.ckpt")
    for name in ("zip", "old", "plain2", "plain4", "module"):
        with pytest.raises(ValueError, match=rf"{name}\.ckpt: contains Python objects, which could run code"):
            load_model(tmp_path / f"{name}.ckpt")
    assert not executed.exists()


def test_unknown_names_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="did you mean 'discogs-maest-30s-pw-129e'"):
        load_model("discogs-maest-30s-pw-129")
    with pytest.raises(FileNotFoundError, match=r"best\.safetensors"):
        load_model(tmp_path)
    with pytest.raises(ValueError, match="size='huge'"):
        load_model("random", size="huge")


# ---- downloads ----


@contextmanager
def serve(content, ranges=True, stop_at=None):
    "A file server; yields a dict: `url`, `first_bytes` (the first byte of each request), `stop_at` (break off there)."
    plan = {"first_bytes": [], "stop_at": stop_at}

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            start = int(self.headers["Range"].removeprefix("bytes=").rstrip("-")) if ranges else 0
            plan["first_bytes"].append(start)
            if start >= len(content):
                self.send_error(416)
                return
            self.send_response(206 if ranges else 200)
            self.send_header("Content-Length", str(len(content) - start))
            self.end_headers()
            self.wfile.write(content[start : plan["stop_at"]])

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield plan | {"url": f"http://127.0.0.1:{server.server_port}/a/model.ckpt", "plan": plan}
    finally:
        server.shutdown()
        server.server_close()


@pytest.fixture
def weights_dir(tmp_path, monkeypatch):
    "An empty cache, and no proxy between this machine and itself."
    monkeypatch.setenv("MAESTLIB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    return tmp_path / "cache/weights"


def entry(url, content, sha256=None, **fields):
    return ReleasedModel(
        "model", url, len(content), sha256 or hashlib.sha256(content).hexdigest(), 5, 400, "none", **fields
    )


CONTENT = np.random.default_rng(0).bytes(3_500_000)


@pytest.mark.parametrize("ranges", [True, False])
def test_interrupted_download_is_resumed(weights_dir, ranges):
    with serve(CONTENT, ranges, stop_at=2_500_000) as server:
        wanted = entry(server["url"], CONTENT)
        with pytest.raises(ConnectionError, match="loading again continues") as error:
            download(wanted)
        assert server["url"] in str(error.value) and not wanted.path.exists()
        server["plan"]["stop_at"] = None
        assert download(wanted).read_bytes() == CONTENT
        assert server["first_bytes"] == ([0, 2_500_000] if ranges else [0, 0])
        assert download(wanted) == weights_dir / "model.ckpt" and len(server["first_bytes"]) == 2
    assert [p.name for p in weights_dir.iterdir()] == ["model.ckpt"]


def test_complete_part_file_is_renamed(weights_dir):
    weights_dir.mkdir(parents=True)
    (weights_dir / "model.ckpt.part").write_bytes(CONTENT)
    with serve(CONTENT) as server:
        assert download(entry(server["url"], CONTENT)).read_bytes() == CONTENT


def test_wrong_download_is_discarded(weights_dir):
    with serve(CONTENT) as server:
        wanted = entry(server["url"], CONTENT, sha256="0" * 64)
        with pytest.raises(ValueError, match=hashlib.sha256(CONTENT).hexdigest()) as error:
            download(wanted)
        assert "0" * 64 in str(error.value) and not wanted.path.exists()


def test_many_processes_download_once(weights_dir):
    results = []
    with serve(CONTENT) as server:
        wanted = entry(server["url"], CONTENT)
        threads = [threading.Thread(target=lambda: results.append(download(wanted))) for _ in range(4)]
        [t.start() for t in threads]
        [t.join() for t in threads]
        assert results == [weights_dir / "model.ckpt"] * 4 and server["first_bytes"] == [0]
    assert [p.name for p in weights_dir.iterdir()] == ["model.ckpt"]


def test_offline_and_manual_copy(weights_dir, state, tmp_path, monkeypatch):
    "Nothing answers: the error says what to put where; a file put there is verified, then used."
    content = write("bare", state, tmp_path).read_bytes()
    with serve(content) as server:
        url = server["url"]
    monkeypatch.setitem(RELEASED_MODELS, "model", entry(url, content, separate_heads=True))
    with pytest.raises(ConnectionError) as error:
        load_model("model")
    assert url in str(error.value) and str(weights_dir / "model.ckpt") in str(error.value)
    (weights_dir / "model.ckpt").write_bytes(content)
    model = load_model("model")
    assert model.config.separate_heads and torch.equal(model.norm.bias, state["norm.bias"])
    (weights_dir / "model.ckpt").write_bytes(content[:-1] + b"?")
    with pytest.raises(ValueError, match=RELEASED_MODELS["model"].sha256):
        load_model("model")
    (weights_dir / "model.ckpt").write_bytes(content[:-1])
    with pytest.raises(ValueError, match="bytes"):
        load_model("model")


def test_genres_is_a_short_name(weights_dir, state, tmp_path, monkeypatch, capsys):
    "Without the file it says at once what to put where; with it, under which licence the weights are."
    name = hub.SHORT_NAMES["genres"]
    assert hub.find_released("genres") is hub.find_released(name) and hub.find_released(name).num_labels == 519
    content = write("bare", state, tmp_path).read_bytes()
    with serve(content) as server:
        url = server["url"]  # nothing answers there
    monkeypatch.setitem(RELEASED_MODELS, name, replace(entry(url, content), name=name, license="CC BY-NC-SA 4.0"))
    soundfile.write(tmp_path / "song.wav", np.random.default_rng(0).normal(0, 0.1, 96_000), 16_000)
    command = ["tag", str(tmp_path / "song.wav"), "--model", "genres", "--top", "1"]
    assert main(command) == 2
    assert f"{name}: no download" in (error := capsys.readouterr().err) and str(weights_dir / "model.ckpt") in error
    (weights_dir / "model.ckpt").write_bytes(content)
    assert main(command) == 0 and "---" in (printed := capsys.readouterr()).out
    assert printed.err.count(f"{name}: weights under CC BY-NC-SA 4.0, for non-commercial use only") == 1


def test_the_registry():
    table = list_models()
    assert len(table) == 10 and table["name"].n_unique() == table["url"].n_unique() == table["sha256"].n_unique() == 10
    maest = table.filter(table["layout"] == "released")
    assert len(maest) == 8 and set(maest["license"]) == {"CC BY-NC-SA 4.0"}
    assert maest["seconds"].to_list() == [5, 10, 10, 10, 20, 30, 30, 30]
    assert [name for name, e in RELEASED_MODELS.items() if e.separate_heads] == ["discogs-maest-30s-pw-73e-ts"]
    assert hub.label_names(519)[-1] in hub.label_names(519) and "---" in hub.label_names(519)[-1]
