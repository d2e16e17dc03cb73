"""How much longer a plain recipe needs to reach the loss of Kiem's defaults: same text, tokenizer, size and program.

    python bench/time_to_loss.py [--minutes 3.2] [--factor 5] [--out runs/time-to-loss]

First Kiem's defaults train for `minutes` on the Python standard library. Then a GPT-2 style model with as many weights
(learned positions, LayerNorm, GELU, tied head, dropout 0) trains for `factor` times as long with the settings of
nanoGPT's README for a small CPU run (12 sequences a step, AdamW 1e-3 falling as a cosine to 1e-4, betas 0.9 and 0.99,
weight decay 0.1, clip 1.0, 100 steps of warm-up). Both run on this trainer, so that neither gains by its loop; the
cosine ends at the end of the longer time, which favours the plain recipe. Printed: the time at which it first reached
Kiem's final held-out loss (in bits per byte), if it did; on the way it is evaluated on 65,536 held-out tokens.
"""

import argparse
import json
import math
from pathlib import Path

import kiem
from kiem.config.model import ModelConfig
from kiem.config.read import read_config
from kiem.planning.count import total_parameters
from kiem.runs.metrics import read_metrics


def as_large_gpt2(like) -> dict:
    """A GPT-2 config with the depth, vocabulary and context of `like`, and the width whose parameter count is
    nearest."""
    fields = {"vocab_size": like.vocab_size, "context_length": like.context_length, "n_layers": like.n_layers}
    sizes = []
    for heads in range(1, 33):
        config = ModelConfig(**fields, emb_dim=32 * heads, n_heads=heads)
        sizes.append((abs(math.log(total_parameters(config) / total_parameters(like))), config))
    return min(sizes, key=lambda pair: pair[0])[1].model_dump()


def curve(run: Path) -> list[tuple[float, float]]:
    """(seconds of training and evaluation so far, bits per byte) at each evaluation."""
    seconds, points = 0.0, []
    for record in read_metrics(run / "metrics.jsonl"):
        if record["kind"] == "step":
            seconds += record["step_seconds"]
        elif record["kind"] == "eval":
            points.append((seconds, record["bits_per_byte"]))
    return points


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=3.2)
    parser.add_argument("--factor", type=float, default=5.0)
    parser.add_argument("--out", type=Path, default=Path("runs/time-to-loss"))
    args = parser.parse_args()

    ours = kiem.train(minutes=args.minutes, out=args.out / "kiem", quiet=True)
    config = read_config(ours.folder / "config.yaml")
    model = as_large_gpt2(config.model)
    batch = 12 * config.model.context_length
    plain = {
        "model": model,
        "data": {"tokenizer": str(ours.folder / "tokenizer")},
        "train": {
            "optimizer": "adamw", "lr": 1e-3, "beta2": 0.99, "weight_decay": 0.1, "max_grad_norm": 1.0, "init": "gpt2",
            "batch_tokens": batch, "micro_batch_tokens": batch, "warmup_tokens": 100 * batch, "cooldown": "cosine",
            "final_lr_fraction": 0.1,
        },
    }  # fmt: skip
    planned = kiem.plan({**plain, "train": {**plain["train"], "tokens": 1000 * batch}})
    seconds = args.factor * curve(ours.folder)[-1][0]
    steps = int(seconds / planned.to_dict()["step_seconds"])
    length = {"tokens": steps * batch, "cooldown_tokens": (steps - 100) * batch, "eval_every": max(1, steps // 50)}
    plain["train"] |= length
    theirs = kiem.train(plain, out=args.out / "plain", quiet=True)

    goal_seconds, goal = curve(ours.folder)[-1]
    points = curve(theirs.folder)
    reached = next((s for s, bits in points if bits <= goal), None)
    print(json.dumps({
        "kiem": {"parameters": total_parameters(config.model), "training_seconds": goal_seconds, "bits_per_byte": goal},
        "plain": {"parameters": total_parameters(read_config(model).model), "training_seconds": points[-1][0],
                  "bits_per_byte": points[-1][1], "reached_after_seconds": reached,
                  "curve": [(round(s, 1), round(b, 4)) for s, b in points]},
        "times_longer": None if reached is None else reached / goal_seconds,
        "at_least_times_longer": points[-1][0] / goal_seconds if reached is None else None,
    }, indent=1))  # fmt: skip


if __name__ == "__main__":
    main()
