"""The small run of these tests, and how somebody else would change a checkpoint: with right checksums."""

import hashlib
import json

from kiem.runs import checkpoint

TINY = [
    *("data.tokenizer=bytes", "model.vocab_size=257", "model.context_length=16", "model.emb_dim=16", "model.n_heads=2"),
    *("model.n_layers=1", "train.batch_tokens=64", "train.save_every=2", "train.keep_checkpoints=2", "seed=1"),
]
FIRST = ["train", "--data", "text.txt", "--tokens", "1280", "--out", "run", "-q", *TINY]  # 20 steps


def newest(run):
    return checkpoint.newest(run)[0]


def resign(path, change):
    """Change what a manifest or a state says, and sign it again."""
    state = json.loads((path / "state.json").read_text())
    manifest = json.loads((path / "manifest.json").read_text())
    change(state, manifest)
    text = checkpoint._json(state)
    (path / "state.json").write_bytes(text)
    if isinstance(manifest.get("files"), dict) and "state.json" in manifest["files"]:
        (path / "state.json").unlink()
        manifest["files"]["state.json"] = checkpoint._write(path / "state.json", text)
    manifest.pop("sha256", None)
    manifest["sha256"] = hashlib.sha256(checkpoint._json(manifest)).hexdigest()
    (path / "manifest.json").write_bytes(checkpoint._json(manifest))
