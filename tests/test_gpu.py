"""What needs a CUDA device: `python -m pytest -m gpu`, or bench/gpu.sh for these and the timings.

The reference is float64 on the CPU. A GPU sums in another order than a CPU, so its float32 error is allowed to be a few
times the CPU's own, measured against the same reference in the same test.
"""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from kiem.config.model import ModelConfig
from kiem.model.transformer import Transformer

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
DEVICE = "cuda"
PROGRAMS = Path(__file__).parent / "inspect" / "programs"
GPT2 = {"vocab_size": 512, "context_length": 128, "emb_dim": 128, "n_heads": 4, "n_layers": 4}
MODERN = GPT2 | {"n_kv_heads": 2, "hidden_dim": 352, "norm": "rmsnorm", "activation": "swiglu", "position": "rope",
                 "qk_norm": True, "bias": False, "head_dim": 32}  # fmt: skip


@pytest.fixture(autouse=True)
def _full_precision():
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    yield


def loss_and_gradients(model, device):
    config = model.config
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(config.vocab_size, (4, config.context_length + 1), generator=generator).to(device)
    docs = (torch.arange(config.context_length) >= config.context_length // 3).int().expand(4, -1).to(device)
    model = model.to(device)
    model.zero_grad()
    loss, valid = model(tokens[:, :-1], targets_BT=tokens[:, 1:], docs_BT=docs)
    (loss / valid).backward()
    found = {name: p.grad.double().cpu() for name, p in model.named_parameters()}
    return (loss / valid).double().item(), found


def relative(found, exact):
    return {name: ((found[name] - g).norm() / g.norm().clamp_min(1e-12)).item() for name, g in exact.items()}


@pytest.mark.parametrize("fields", [GPT2, MODERN], ids=["gpt2", "modern"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_loss_and_gradients_are_the_cpus(fields, dtype):
    config = ModelConfig(**fields)
    exact_loss, exact = loss_and_gradients(Transformer(config, torch.float64).initialize(0).double(), "cpu")
    cpu_loss, cpu = loss_and_gradients(Transformer(config, dtype).initialize(0), "cpu")
    gpu_loss, gpu = loss_and_gradients(Transformer(config, dtype).initialize(0), DEVICE)
    unit = torch.finfo(dtype).eps
    assert abs(gpu_loss - exact_loss) <= 4 * abs(cpu_loss - exact_loss) + 8 * unit * exact_loss
    allowed = relative(cpu, exact)
    for name, error in relative(gpu, exact).items():
        assert error <= 4 * allowed[name] + 8 * unit, (name, error, allowed[name])


def kiem(*arguments, cwd, **options):
    return subprocess.run([sys.executable, "-m", "kiem", *arguments], cwd=cwd, capture_output=True, text=True,
                          env={**os.environ, "KIEM_CACHE": str(cwd / "cache")}, timeout=300, **options)  # fmt: skip


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("gpu")
    lines = (f"line {i} of a text that is long enough, {i * i % 977}\n" for i in range(8_000))
    (folder / "text.txt").write_text("".join(lines))
    config = {"model": MODERN, "data": {"sources": ["text.txt"], "tokenizer": "bytes"},
              "train": {"batch_tokens": 4096, "micro_batch_tokens": 2048, "save_every": 10, "eval_every": 20,
                        "eval_tokens": 2048, "tokens": 4096 * 60}}  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def losses(run):
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {r["step"]: r["loss"] for r in records if r["kind"] == "step"}


def test_a_run_learns_resumes_and_is_used(place):
    done = kiem("train", "config.json", "--device", DEVICE, "--out", "whole", "--json", cwd=place)
    assert done.returncode == 0, done.stderr
    whole = losses(place / "whole")
    assert whole[60] < 0.6 * whole[1]

    command = [sys.executable, "-m", "kiem", "train", "config.json", "--device", DEVICE, "--out", "killed", "-q"]
    process = subprocess.Popen(command, cwd=place, env={**os.environ, "KIEM_CACHE": str(place / "cache")})
    waited = time.monotonic()
    while not (place / "killed" / "checkpoints" / "step-00000020").exists() and process.poll() is None:
        assert time.monotonic() - waited < 240
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    done = kiem("train", "killed", "--json", cwd=place)
    assert done.returncode == 0, done.stderr
    killed = losses(place / "killed")
    assert killed.keys() == whole.keys()
    assert killed == whole  # bit for bit

    generated = [kiem("generate", "whole", "--prompt", "line 7", "--temperature", "0", "--max-tokens", "20", "--device",
                      device, cwd=place) for device in ("cpu", DEVICE)]  # fmt: skip
    assert generated[0].returncode == generated[1].returncode == 0, generated[1].stderr
    assert generated[0].stdout == generated[1].stdout
    evaluated = [json.loads(kiem("eval", "whole", "--device", device, "--json", cwd=place).stdout)["loss"]
                 for device in ("cpu", DEVICE)]  # fmt: skip
    assert evaluated[0] == pytest.approx(evaluated[1], rel=1e-2)  # bfloat16 on the one, perhaps float32 on the other


@pytest.mark.parametrize("name, code", [("right/gpt2", 0), ("right/cnn", 0), ("wrong/softmax_sum", 1)])
def test_programs_are_verified_on_the_device(tmp_path, name, code):
    program = (PROGRAMS / f"{name}.py").read_text()
    (tmp_path / "program.py").write_text(f"import torch\ntorch.set_default_device('{DEVICE}')\n{program}")
    done = kiem("verify", "program.py", cwd=tmp_path)
    assert done.returncode == code, done.stdout + done.stderr


def test_a_models_ways_of_computing_agree(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model": MODERN, "device": DEVICE}))
    done = kiem("verify", "config.json", cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_plan_holds_on_the_device(place):
    planned = kiem("plan", "config.json", "--json", f"device={DEVICE}", cwd=place)
    assert planned.returncode == 0, planned.stderr
    plan = json.loads(planned.stdout)
    done = kiem("train", "config.json", "--device", DEVICE, "--out", "planned", "--json", cwd=place)
    assert done.returncode == 0, done.stderr
    records = [json.loads(line) for line in (place / "planned" / "metrics.jsonl").read_text().splitlines()]
    peak = max(r["memory_bytes"] for r in records if r["kind"] == "step")
    assert 0.8 < plan["peak_memory_bytes"] / peak < 1.25
