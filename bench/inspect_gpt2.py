"""What recording and verifying cost on GPT-2 124M, batch 1 x 128, beside torchlens and torch.autograd.gradcheck.

    python bench/inspect_gpt2.py [--rounds 3] [--peer-python PATH] [--json]

The model is transformers' GPT2LMHeadModel without dropout, on random tokens. Each variant runs in a process of its
own, in turn, `rounds` times; `ratio` is its time over a plain forward and backward (torchlens: a plain forward, as it
traces no more) of the same process, after one warm-up of both. `memory`: the process's highest resident set while the
variant runs, less that of the plain steps before. `--peer-python`: an interpreter with torch, transformers and
torchlens (an environment of its own: it is no dependency of Kiem). gradcheck runs in its fast mode, in float64, on
the loss as a function of all parameters; it names no operation."""

import argparse
import json
import statistics
import subprocess
import sys
import time

VARIANTS = ("kiem record", "kiem verify per operation", "kiem verify", "torchlens trace", "gradcheck fast")


def gpt2():
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)).train()
    return model, torch.randint(0, 50257, (1, 128))


def peak_bytes() -> int:
    """Highest resident set of this process since it was last reset (Linux)."""
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith("VmHWM"))


def reset_peak() -> None:
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")


def run_one(variant: str) -> dict:
    model, tokens = gpt2()

    def forward():
        return model(tokens, labels=tokens).loss

    def step():
        model.zero_grad(set_to_none=True)
        forward().backward()

    plain, instrumented, note = VARIANT_STEPS[variant](model, tokens, forward, step)
    plain()
    if variant in ("kiem record", "torchlens trace"):
        instrumented()
    times = []
    for _ in range(3):
        began = time.perf_counter()
        plain()
        times.append(time.perf_counter() - began)
    reset_peak()
    plain()
    before = peak_bytes()
    reset_peak()
    seconds = []
    for _ in range(3 if variant in ("kiem record", "torchlens trace") else 1):
        began = time.perf_counter()
        told = instrumented()
        seconds.append(time.perf_counter() - began)
    seconds = statistics.median(seconds)
    return {
        "seconds": seconds,
        "plain_seconds": statistics.median(times),
        "ratio": seconds / statistics.median(times),
        "memory_bytes": max(peak_bytes() - before, 0),
        "note": told or note,
    }


def kiem_record(model, tokens, forward, step):
    import kiem

    def recorded():
        with kiem.record() as trace:
            step()
        return f"{len(trace.graph.ops)} operations, {len(trace.graph.backwards[0].steps)} backward steps"

    return step, recorded, ""


def kiem_verify(end_to_end):
    def made(model, tokens, forward, step):
        from kiem.inspect.record.recorder import Recorder
        from kiem.inspect.verify.verifier import Verifier
        from kiem.runtime import keep_freed_memory

        keep_freed_memory()

        def verified():
            verifier = Verifier(end_to_end)
            with Recorder(observer=verifier, keep=None):
                step()
            result = verifier.result
            counts = {
                kind: sum(v.verdict == kind for v in result.verdicts)
                for kind in ("ok", "kink", "zero", "unchecked", "wrong")
            }
            return f"{counts}, {len(result.parameters)} parameters end to end"

        return step, verified, ""

    return made


def torchlens_trace(model, tokens, forward, step):
    import torchlens

    def traced():
        trace = torchlens.trace(model, [tokens])
        return f"forward only: {len(trace)} entries"

    return forward, traced, "forward only"


def gradcheck_fast(model, tokens, forward, step):
    import torch

    model.double()
    names, parameters = zip(*model.named_parameters(), strict=True)

    def loss(*values):
        return torch.func.functional_call(
            model, dict(zip(names, values, strict=True)), (tokens,), {"labels": tokens}
        ).loss

    def checked():
        right = torch.autograd.gradcheck(
            loss, tuple(p.detach().clone().requires_grad_() for p in parameters), fast_mode=True
        )
        return f"{right}; float64, {len(parameters)} parameters"

    return step, checked, ""


VARIANT_STEPS = {
    "kiem record": kiem_record,
    "kiem verify per operation": kiem_verify(False),
    "kiem verify": kiem_verify(True),
    "torchlens trace": torchlens_trace,
    "gradcheck fast": gradcheck_fast,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--variants", nargs="*", choices=VARIANTS, default=VARIANTS)
    parser.add_argument("--peer-python", default=sys.executable)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        print("\n" + json.dumps(run_one(args.one)))
        return
    rows: dict[str, list[dict]] = {}
    for _ in range(args.rounds):
        for variant in args.variants:
            python = args.peer_python if variant == "torchlens trace" else sys.executable
            done = subprocess.run([python, __file__, "--one", variant], capture_output=True, text=True)
            if done.returncode:
                print(f"{variant}: skipped: {done.stderr.strip().splitlines()[-1][:200]}", file=sys.stderr)
                continue
            rows.setdefault(variant, []).append(json.loads(done.stdout.strip().splitlines()[-1]))
            print(variant, rows[variant][-1], file=sys.stderr)
    table = {
        variant: {key: statistics.median(row[key] for row in found) for key in found[0] if key != "note"}
        | {"note": found[-1]["note"]}
        for variant, found in rows.items()
    }
    if args.json:
        print(json.dumps(table, indent=1))
        return
    for variant, row in table.items():
        print(
            f"{variant:28} {row['ratio']:7.2f} x  {row['seconds']:8.2f} s  "
            f"{row['memory_bytes'] / 1e6:8.0f} MB  {row['note']}"
        )


if __name__ == "__main__":
    main()
