"""GPT-2 124M training on this machine: Kiem beside transformers' GPT2LMHeadModel with torch's AdamW.

    python bench/gpt2_124m.py [--device cpu] [--batch 2] [--rounds 3] [--steps 3] [--drop-rate 0.0] [--json]

Batch 2 x 1024 tokens by default. Each variant runs in a process of its own, in turn, `rounds` times; figures are
medians over rounds of the median step, and ratios are taken within a round. Peak memory is the process's highest
resident set with everything in it; on a CUDA device, what was allocated there. Both sides get the same random tokens;
that they compute the same loss is asserted by tests/model/test_parity.py.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time

CONTEXT, VOCAB = 1024, 50257
VARIANTS = (
    "transformers float32",
    "transformers bfloat16 autocast",
    "kiem float32 adamw",
    "kiem float32 muon",
    "kiem bfloat16 adamw",
    "kiem bfloat16 muon",
)


def transformers_step(precision: str, device: str, rows: int, drop_rate: float):
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    drops = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), drop_rate)
    model = GPT2LMHeadModel(GPT2Config(**drops)).to(device).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=6e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    tokens = torch.randint(0, VOCAB, (rows, CONTEXT), device=device)

    def step():
        with torch.autocast(device, torch.bfloat16, enabled=precision == "bfloat16"):
            loss = model(tokens, labels=tokens).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def kiem_step(precision: str, optimizer_name: str, device: str, rows: int, drop_rate: float):
    import torch

    from kiem import runtime
    from kiem.config.presets import PRESETS, resolve
    from kiem.config.run import RunConfig, TrainConfig
    from kiem.data.loader import Batch
    from kiem.model.transformer import Transformer
    from kiem.optim.groups import build_optimizer
    from kiem.training.objective import NextToken
    from kiem.training.step import train_step

    runtime.set_up_process()
    size = rows * CONTEXT
    train = TrainConfig(
        tokens=100 * size, batch_tokens=size, micro_batch_tokens=size, optimizer=optimizer_name, precision=precision
    )
    model_config = PRESETS["gpt2-124m"].model_copy(update={"drop_rate": drop_rate})
    config = resolve(RunConfig(model=model_config, train=train), VOCAB)
    model = Transformer(config.model, getattr(torch, precision)).initialize(0, config.train.init).to(device)
    optimizer = build_optimizer(model, config.train)
    tokens = torch.randint(0, VOCAB, (rows, CONTEXT + 1), device=device)
    positions = torch.arange(CONTEXT, device=device).expand(rows, CONTEXT)
    batch = Batch(
        tokens[:, :-1].contiguous(),
        tokens[:, 1:].contiguous(),
        positions,
        torch.zeros(rows, CONTEXT, dtype=torch.int32, device=device),
        size,
    )
    return lambda: train_step(NextToken(), model, optimizer, [batch], config.train, 0)


def run_one(variant: str, steps: int, device: str, rows: int, drop_rate: float) -> dict:
    import torch

    from kiem.runtime import memory_now, peak_memory

    torch.manual_seed(0)
    who, precision, *rest = variant.split()
    step = (
        transformers_step(precision, device, rows, drop_rate)
        if who == "transformers"
        else kiem_step(precision, rest[0], device, rows, drop_rate)
    )
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    step()
    seconds = []
    for _ in range(steps):
        wait()
        began = time.perf_counter()
        step()
        wait()
        seconds.append(time.perf_counter() - began)
    return {
        "tokens_per_second": rows * CONTEXT / statistics.median(seconds),
        "peak_bytes": peak_memory(torch.device(device)),
        "rss_bytes": memory_now(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--batch", type=int, default=2, help="sequences of 1024 tokens")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--drop-rate", type=float, default=0.0)
    parser.add_argument(
        "--variants", nargs="*", choices=VARIANTS, default=None, help="default: all that this processor is made for"
    )
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        print(json.dumps(run_one(args.one, args.steps, args.device, args.batch, args.drop_rate)))
        return
    if args.variants is None:
        import torch

        from kiem.runtime import has_fast_bfloat16

        fast = has_fast_bfloat16(torch.device(args.device))
        args.variants = [v for v in VARIANTS if fast or "bfloat16" not in v]
    rounds = []
    for _ in range(args.rounds):
        one = {}
        for variant in args.variants:
            command = [
                sys.executable,
                __file__,
                "--one",
                variant,
                "--device",
                args.device,
                "--batch",
                str(args.batch),
                "--steps",
                str(args.steps),
                "--drop-rate",
                str(args.drop_rate),
            ]
            one[variant] = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
            print(variant, one[variant], file=sys.stderr)
        rounds.append(one)
    base = args.variants[0]
    table = {}
    for variant in args.variants:
        rates = [r[variant]["tokens_per_second"] for r in rounds]
        table[variant] = {
            "tokens_per_second": statistics.median(rates),
            "peak_gb": statistics.median(r[variant]["peak_bytes"] for r in rounds) / 1e9,
            f"speed_over_{base.replace(' ', '_')}": statistics.median(
                r[variant]["tokens_per_second"] / r[base]["tokens_per_second"] for r in rounds
            ),
            f"memory_over_{base.replace(' ', '_')}": statistics.median(
                r[variant]["peak_bytes"] / r[base]["peak_bytes"] for r in rounds
            ),
        }
    if args.json:
        print(json.dumps(table, indent=1))
    else:
        for variant, row in table.items():
            print(f"{variant:32}" + "  ".join(f"{key} {value:8.2f}" for key, value in row.items()))


if __name__ == "__main__":
    main()
