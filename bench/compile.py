"""What torch.compile gains: a training step of the default family, eager and compiled block by block as
`train.compile=true` does it.

    python bench/compile.py [--depth 6] [--steps 12] [--json]

One process; eager and compiled steps take turns, figures are medians, the ratio is the median over pairs. The first
compiled step, which compiles, is shown by itself: a run of N steps gains when N times the difference is more."""

import argparse
import json
import statistics
import time


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--depth", type=int, default=6)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    import torch

    from kiem import runtime
    from kiem.config.presets import resolve, tokenizer_vocab_size
    from kiem.config.run import RunConfig
    from kiem.data.loader import Batch
    from kiem.model.transformer import Transformer
    from kiem.optim.groups import build_optimizer
    from kiem.training.objective import NextToken
    from kiem.training.step import train_step

    runtime.set_up_process()
    wanted = RunConfig(depth=args.depth)
    config = resolve(wanted, tokenizer_vocab_size(wanted))
    context, rows = config.model.context_length, config.train.micro_batch_tokens // config.model.context_length
    tokens = torch.randint(0, config.model.vocab_size, (rows, context + 1))
    batch = Batch(
        tokens[:, :-1].contiguous(),
        tokens[:, 1:].contiguous(),
        torch.arange(context).expand(rows, context),
        torch.zeros(rows, context, dtype=torch.int32),
        rows * context,
    )

    def stepper(compiled: bool):
        model = Transformer(config.model).initialize(0, config.train.init)
        if compiled:
            for block in model.blocks:
                block.compile(dynamic=False)
        optimizer = build_optimizer(model, config.train)

        def step() -> float:
            began = time.perf_counter()
            train_step(NextToken(), model, optimizer, [batch], config.train, 0)
            return time.perf_counter() - began

        return step

    eager, compiled = stepper(False), stepper(True)
    eager()
    first = compiled()
    pairs = [(eager(), compiled()) for _ in range(args.steps)]
    found = {
        "depth": args.depth,
        "parameters": sum(p.numel() for p in Transformer(config.model).parameters()),
        "tokens_per_step": rows * context,
        "eager_seconds": statistics.median(e for e, _ in pairs),
        "compiled_seconds": statistics.median(c for _, c in pairs),
        "eager_over_compiled": statistics.median(e / c for e, c in pairs),
        "first_compiled_step_seconds": first,
    }
    print(json.dumps(found, indent=1) if args.json else "\n".join(f"{k:28} {v}" for k, v in found.items()))


if __name__ == "__main__":
    main()
