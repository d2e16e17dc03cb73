"""How much longer a plain recipe needs to reach the loss of Kiem's defaults: same text, tokenizer, size and program.

    python bench/time_to_loss.py [--minutes 3.2] [--factors 1 1.5 2 3 4 6] [--out runs/time-to-loss]

First Kiem's defaults train for `minutes` on the Python standard library. Then a GPT-2 style model with as many weights
(learned positions, LayerNorm, GELU, tied head, dropout 0) trains with the settings of nanoGPT's README for a small CPU
run (12 sequences a step, AdamW 1e-3 falling as a cosine to 1e-4, betas 0.9 and 0.99, weight decay 0.1, clip 1.0, 100
steps of warm-up): one whole run for each factor, whose cosine ends at that many times our training time, until one
ends at our final loss or below. A cosine that ends later than it must would make the plain recipe look slow by
construction; so would stopping one early. Both sides run on this trainer, so that neither gains by its loop, and are
compared by bits per byte on all held-out text at the end of each run.
"""

import argparse
import json
import math
import sys
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


def outcome(run: Path) -> tuple[float, float]:
    """Seconds of training steps, and bits per byte on all held-out text at the end."""
    records = read_metrics(run / "metrics.jsonl")
    final = [r for r in records if r["kind"] == "eval"][-1]
    return sum(r["step_seconds"] for r in records if r["kind"] == "step"), final["bits_per_byte"]


def plain_recipe(like, tokenizer: Path, seconds: float) -> dict:
    """The plain recipe's configuration, as long as fits `seconds` of training steps on this machine."""
    batch = 12 * like.context_length
    recipe = {
        "model": as_large_gpt2(like),
        "data": {"tokenizer": str(tokenizer)},
        "train": {
            "optimizer": "adamw", "lr": 1e-3, "beta2": 0.99, "weight_decay": 0.1, "max_grad_norm": 1.0, "init": "gpt2",
            "batch_tokens": batch, "micro_batch_tokens": batch, "warmup_tokens": 100 * batch, "cooldown": "cosine",
            "final_lr_fraction": 0.1,
        },
    }  # fmt: skip
    planned = kiem.plan({**recipe, "train": {**recipe["train"], "tokens": 1000 * batch}})
    steps = max(int(seconds / planned.to_dict()["step_seconds"]), 200)
    recipe["train"] |= {"tokens": steps * batch, "cooldown_tokens": (steps - 100) * batch, "eval_every": steps}
    return recipe


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=3.2)
    parser.add_argument("--factors", type=float, nargs="+", default=[1, 1.5, 2, 3, 4, 6])
    parser.add_argument("--out", type=Path, default=Path("runs/time-to-loss"))
    args = parser.parse_args()

    ours = kiem.train(minutes=args.minutes, out=args.out / "kiem", quiet=True)
    config = read_config(ours.folder / "config.yaml")
    seconds, goal = outcome(ours.folder)
    runs, reached = [], None
    for factor in sorted(args.factors):
        recipe = plain_recipe(config.model, ours.folder / "tokenizer", factor * seconds)
        theirs = kiem.train(recipe, out=args.out / f"plain-{factor:g}", quiet=True)
        took, bits = outcome(theirs.folder)
        runs.append({"factor": factor, "training_seconds": took, "bits_per_byte": bits})
        print(runs[-1], file=sys.stderr)
        if bits <= goal:
            reached = took / seconds
            break
    print(json.dumps({
        "kiem": {"parameters": total_parameters(config.model), "training_seconds": seconds, "bits_per_byte": goal},
        "plain": {"parameters": total_parameters(ModelConfig(**recipe["model"])), "runs": runs},
        "times_longer": reached,
        "more_than_times_longer": runs[-1]["training_seconds"] / seconds if reached is None else None,
    }, indent=1))  # fmt: skip


if __name__ == "__main__":
    main()
