"""Malformed input of every kind, made from a seed: no traceback, no hang over ten seconds, no process that dies.

Each kind starts from something valid (a configuration in each form, a tokenizer, a run folder, options, data files) and
changes it as a user, another program or an attacker would. What comes out may be valid: then the command may succeed.
"""

import gzip
import json
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

CODES = {0, 1, 2, 3, 4, 5, 6, 7, 8}  # 1 is a program that failed, of explain and verify only
LIMIT = 10.0  # seconds
LIMIT_OF_VERIFY = 60.0  # a configuration that stayed valid is verified, which compiles its model
KINDS = ("config", "tokenizer", "run", "option", "data")
COUNT = {"fast": 2, "slow": 100}  # of each kind

MODEL = {"vocab_size": 300, "context_length": 32, "emb_dim": 16, "n_heads": 2, "n_layers": 1}
WHOLE = {"model": MODEL, "data": {"sources": ["text.txt"], "tokenizer": "bytes"},
         "train": {"batch_tokens": 64, "tokens": 128, "lr": 1e-3}, "seed": 3}  # fmt: skip
LLAMA = {"model_type": "llama", "vocab_size": 300, "hidden_size": 16, "intermediate_size": 44, "num_hidden_layers": 1,
         "num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 32, "rms_norm_eps": 1e-5,
         "rope_theta": 1e4, "tie_word_embeddings": True}  # fmt: skip
NANOGPT = "n_layer = 1\nn_head = 2\nn_embd = 16\nblock_size = 32\nvocab_size = 300\ndropout = 0.0\nbias = False\n"
ODD = [None, True, -1, 0, 10**400, 1e308, 1.5, float("nan"), float("inf"), "", "x", "\ud800", "a" * 300, "\x00", [], {},
       [[]], {"a": 1}, "../../etc/passwd", "-", "*", "hf:", "python", "1e999", "٣", "=", "💥"]  # fmt: skip
YAML_VALUES = ['!!int ""', "!!bool maybe", "!!timestamp abc", "!!map [a]", "!!set {a}", "!!omap [a: 1]", "*x", "&x 1",
               "!!python/name:os.system x", "? [a]", "2001-12-14", "0o17", "0x1F", "1:30", ".inf", "~", "|\n  x", "<<",
               "[" * 2000, "{" * 500, "'", '"\\x', "%", "@", "`", "-", "!!binary =", "!!float x"]  # fmt: skip


def deep(n):
    return "[" * n + "]" * n


def bytes_changed(r, content):
    """Cut short, flipped, repeated or filled with something else."""
    content = bytearray(content)
    way = r.randrange(6)
    if way == 0:
        return bytes(content[: r.randrange(len(content) + 1)])
    if way == 1:
        for _ in range(r.choice([1, 3, 30])):
            if content:
                content[r.randrange(len(content))] ^= 1 << r.randrange(8)
        return bytes(content)
    if way == 2:
        place = r.randrange(len(content) + 1)
        return bytes(content[:place]) + r.randbytes(r.choice([1, 10, 1000])) + bytes(content[place:])
    if way == 3:
        return bytes(content) * 2
    if way == 4:
        return r.choice([b"", b"\n", b"\xff\xfe", b"\xef\xbb\xbf" + bytes(content), b"null", b"[]", b"{}", b"0", b'"x"',
                         deep(100_000).encode(), b"\x00" * 1000])  # fmt: skip
    place = r.randrange(len(content) + 1)
    return (
        bytes(content[:place])
        + r.choice([b"\r", b"\x00", "é".encode(), b"\xe9", b"}", b"]", b",", b'"'])
        + bytes(content[place:])
    )


def value_changed(r, value):
    """One odd value somewhere in nested dictionaries and lists, a key lost, renamed or added."""
    if isinstance(value, dict) and value:
        key = r.choice(list(value))
        way = r.randrange(8)
        if way == 0:
            return {k: v for k, v in value.items() if k != key}
        if way == 1:
            return {**value, r.choice(["what", "", "n_layer_", "model", "a.b", "é" * 50, "__class__"]): r.choice(ODD)}
        if way == 2:
            return {(k + "_" if k == key else k): v for k, v in value.items()}
        return {**value, key: value_changed(r, value[key])}
    if isinstance(value, list) and value:
        place = r.randrange(len(value))
        return [*value[:place], value_changed(r, value[place]), *value[place + 1 :]]
    return r.choice(ODD)


def json_text(value):
    return json.dumps(value, ensure_ascii=True).encode()


def a_config(r, folder):
    form = r.choice(["json", "json", "yaml", "toml", "dict", "hf", "nanogpt", "call", "bytes"])
    changed = value_changed(r, WHOLE if r.random() < 0.7 else MODEL)
    name, content = "c.json", json_text(changed)
    if form == "yaml":
        lines = ["model:", *(f"  {k}: {v}" for k, v in MODEL.items()), "data:", "  tokenizer: bytes", "seed: 1"]
        place = r.randrange(len(lines))
        lines[place] = lines[place].partition(":")[0] + ": " + r.choice(YAML_VALUES)
        name, content = "c.yaml", "\n".join(lines).encode()
    elif form == "toml":
        lines = ["seed = 1", "[model]", *(f"{k} = {v}" for k, v in MODEL.items())]
        lines[r.randrange(len(lines))] = r.choice(["x = ", "emb_dim = 1e400", "[model]", "a.b.c = 1", 'x = "\\u"', "="])
        name, content = "c.toml", "\n".join(lines).encode()
    elif form == "dict":
        name, content = "c.py", f"GPT = {changed!r}\n".encode("utf-8", "backslashreplace")
    elif form == "hf":
        content = json_text(value_changed(r, LLAMA))
    elif form == "nanogpt":
        lines = NANOGPT.splitlines()
        place = r.randrange(len(lines))
        odd = [
            repr(r.choice(ODD)),
            "n",
            "__import__('os')",
            "1 / 0",
            "2 ** 10 ** 9",
            "-" * 5000 + "1",
            "(1",
            "lambda: 0",
        ]
        lines[place] = lines[place].partition("=")[0] + "= " + r.choice(odd)
        name, content = "c.py", "\n".join(lines).encode("utf-8", "backslashreplace")
    elif form == "call":
        given = ", ".join(f"{k}={v!r}" for k, v in value_changed(r, MODEL).items() if k.isidentifier())
        name, content = "c.py", f"config = GPTConfig({given})\n".encode("utf-8", "backslashreplace")
    elif form == "bytes":
        content = bytes_changed(r, json_text(WHOLE))
    (folder / name).write_bytes(content)
    return r.choice([["plan", name, "--no-measure"], ["plan", name, "--no-measure", "--json"],
                     ["train", name, "--out", "new", "-q", "train.tokens=128"], ["verify", name]])  # fmt: skip


def a_tokenizer(r, folder):
    base = json.loads((folder / "run/tokenizer/tokenizer.json").read_text())
    if r.random() < 0.5:
        kinds = [
            {"type": "WordLevel", "vocab": {"a": 0, "b": 1}, "unk_token": r.choice(["[UNK]", "a", None, 3])},
            {"type": "Unigram", "vocab": r.choice([[], [["a", 0.0]], [["a", -1.0], ["b", "x"]]]), "unk_id": 7},
            {"type": "BPE", "vocab": {"a": 0, "b": 2**31}, "merges": []},
            {"type": "BPE", "vocab": {"a": 0, "b": 1}, "merges": [["a", "c"]], "dropout": 0.5},
            {"type": "WordPiece", "vocab": {}, "unk_token": "[UNK]", "continuing_subword_prefix": "##"},
            {"type": "Nothing"},
        ]
        base["model"] = r.choice(kinds)
        base["pre_tokenizer"] = r.choice(
            [
                None,
                {"type": "Whitespace"},
                {
                    "type": "Split",
                    "pattern": {"Regex": r.choice(["(a+)+$", "(", "(?<=x*)y", "[" * 1000])},
                    "behavior": "Isolated",
                    "invert": False,
                },
            ]
        )
        base["normalizer"] = r.choice(
            [None, {"type": "Lowercase"}, {"type": "Precompiled", "precompiled_charsmap": r.choice(["AAAA", "", "x"])}]
        )
        content = json_text(base)
    elif r.random() < 0.5:
        content = json_text(value_changed(r, base))
    else:
        content = bytes_changed(r, json_text(base))
    (folder / "tokenizer.json").write_bytes(content)
    (folder / "tokenizer_config.json").write_bytes(json_text(value_changed(r, {"eos_token": "<|endoftext|>"})))
    return r.choice(
        [
            ["prepare", "text.txt", "--tokenizer", "tokenizer.json", "-q"],
            ["prepare", "text.txt", "--tokenizer", ".", "--json"],
            ["train", "c_ok.json", "--out", "new", "-q", "data.tokenizer=tokenizer.json"],
        ]
    )


def a_run(r, folder):
    files = sorted(p for p in (folder / "run").rglob("*") if p.is_file())
    for _ in range(r.choice([1, 1, 2])):
        path = r.choice(files)
        if not path.exists() or not path.is_file():
            continue
        way = r.randrange(8)
        content = path.read_bytes()
        if way < 4:
            path.write_bytes(bytes_changed(r, content))
        elif way == 4 and path.suffix == ".json":
            path.write_bytes(json_text(value_changed(r, json.loads(content))))
        else:
            path.unlink()
            if way == 5:
                path.mkdir()
            elif way == 6:
                os.mkfifo(path)
            elif way == 7:
                path.symlink_to(r.choice([path, Path("/dev/zero"), Path("/nonexistent")]))
    return r.choice([["train", "run", "-q"], ["train", "run", "-q", "train.tokens=512"], ["eval", "run"], ["generate", "run",
                     "--max-tokens", "3"], ["explain", "run"], ["plan", "run", "--no-measure"], ["eval", "run", "--data",
                     "text.txt", "--json"]])  # fmt: skip


def an_option(r, folder):
    odd = r.choice(["", "-1", "0", "nan", "inf", "1e400", "1" * 5000, "x", "a" * 300, "\udcff", "../..", "/", "/dev/null",
                    "/proc/self/mem", "*", "[D]", "=", "=1", "a=b=c", "--", "-", "é", "None", "true", "[1]", "{}", "1,2",
                    "0x10", "٣", "1e-400", "-0.0"])  # fmt: skip
    commands = {
        "train": ["--depth", "--data", "--tokens", "--minutes", "--seed", "--device", "--out"],
        "generate": ["--prompt", "--max-tokens", "--temperature", "--top-k", "--top-p", "--repetition-penalty", "--stop",
                     "--seed", "--n", "--device"],
        "eval": ["--data", "--device"],
        "plan": ["--depth"],
        "prepare": ["--tokenizer", "--config"],
        "explain": ["--wrt", "--call", "--html"],
    }  # fmt: skip
    command = r.choice(list(commands))
    option = r.choice(commands[command])
    if odd.startswith("1" * 20) and option == "--max-tokens":
        odd = "-5"
    start = {"train": ["train", "c_ok.json", "-q"], "generate": ["generate", "run", "--max-tokens", "3"], "eval": ["eval",
             "run"], "plan": ["plan", "c_ok.json", "--no-measure"], "prepare": ["prepare", "text.txt"],
             "explain": ["explain", "program.py"]}[command]  # fmt: skip
    if command == "train" and option != "--out":
        start = [*start, "--out", "new"]
    if r.random() < 0.3:
        return [
            *start,
            f"{r.choice(['train.lr', 'model.emb_dim', 'data.tokenizer', 'seed', 'train.batch_tokens', 'x.y'])}={odd}",
        ]
    return [*start, option, odd]


def some_data(r, folder):
    records = [{"text": f"record {i} with a text that is long enough", "n": i} for i in range(40)]
    form = r.choice(["jsonl", "jsonl", "gz", "txt", "json", "zst", "parquet", "odd"])
    lines = [json.dumps(x) for x in records]
    name = f"d.{form}"
    if form == "jsonl":
        place = r.randrange(len(lines))
        lines[place] = r.choice(
            [
                '{"text": ' + "9" * 6000 + "}",
                '{"text": "\\ud800"}',
                deep(3000),
                "",
                "null",
                '{"text": 5}',
                '{"text": {"a": "b"}}',
                '{"messages": []}',
                '{"text": null}',
                '{"text"',
                "\x00",
                '{"text": "a", "text": "b"}',
                '{"text": ""}',
                json.dumps(value_changed(r, records[0])),
            ]
        )
        content = "\n".join(lines).encode()
    elif form == "gz":
        name, content = "d.jsonl.gz", bytes_changed(r, gzip.compress("\n".join(lines).encode()))
    elif form == "json":
        content = r.choice([json_text(records), json.dumps(records, indent=2).encode(), json_text({"data": records}),
                            deep(50_000).encode()])  # fmt: skip
    elif form == "odd":
        name = r.choice(["d", "d.pdf", "d.docx", "d.ipynb", "d.html", "d.png", "d" * 200 + ".txt", "-d.txt", "d=1.txt"])
        content = bytes_changed(r, b"%PDF-1.4 <html><body>text</body></html>" * 40)
    else:
        content = bytes_changed(r, ("a line of text that is long enough\n" * 40).encode())
    (folder / "data").mkdir()
    (folder / "data" / name).write_bytes(content)
    if r.random() < 0.3:
        os.mkfifo(folder / "data" / "pipe.txt")
    source = r.choice(["data", f"data/{name}", "data/*"])
    return r.choice(
        [
            [
                "prepare",
                source,
                "--tokenizer",
                r.choice(["bytes", "chars", "bpe"]),
                "-q",
                "data.tokenizer_vocab_size=270",
            ],
            ["prepare", source, "--tokenizer", "bytes", "--json"],
            ["eval", "run", "--data", source],
            ["train", "c_ok.json", "--data", source, "--out", "new", "-q"],
        ]
    )


MAKERS = dict(zip(KINDS, (a_config, a_tokenizer, a_run, an_option, some_data), strict=True))


@pytest.fixture(scope="module")
def server():
    command = [sys.executable, str(Path(__file__).with_name("malformed_server.py"))]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def ask(folder, arguments, limit=LIMIT):
        process.stdin.write(json.dumps({"folder": str(folder), "arguments": arguments, "limit": limit}) + "\n")
        process.stdin.flush()
        return json.loads(process.stdout.readline())

    yield ask
    with process:  # closes its pipes, and it ends
        pass


@pytest.fixture(scope="module")
def template(server, tmp_path_factory):
    """A text, a valid configuration, a program and a trained run."""
    folder = tmp_path_factory.mktemp("template")
    (folder / "text.txt").write_text(
        "".join(f"line {i}: the quick fox number {i * i % 97} jumps\n" for i in range(400))
    )
    (folder / "c_ok.json").write_text(json.dumps(WHOLE | {"data": {"sources": ["text.txt"], "tokenizer": "bytes"}}))
    (folder / "program.py").write_text(
        "import torch\nw = torch.ones(2, requires_grad=True)\n(w * 2).sum().backward()\n"
    )
    done = server(folder, ["train", "c_ok.json", "--out", "run", "-q"], 60)
    assert done["code"] == 0, done
    return folder


def cases():
    for kind in KINDS:
        for seed in range(COUNT["slow"]):
            marks = [] if seed < COUNT["fast"] else [pytest.mark.slow]
            yield pytest.param(kind, seed, marks=marks, id=f"{kind}-{seed}")


@pytest.mark.parametrize("kind, seed", list(cases()))
def test_malformed_input_has_one_message(server, template, tmp_path, monkeypatch, kind, seed):
    shutil.copytree(template, tmp_path, dirs_exist_ok=True)
    r = random.Random(f"{kind} {seed}")
    arguments = MAKERS[kind](r, tmp_path)
    done = server(tmp_path, arguments, LIMIT_OF_VERIFY if arguments[0] == "verify" else LIMIT)
    told = (arguments, done)
    assert done["code"] in CODES, told
    assert "Traceback (most recent" not in done["err"] + done["out"], told
    assert done["code"] != 1 or arguments[0] in ("explain", "verify"), told
    if done["code"] not in (0, 1, 8):
        assert "error:" in done["err"] or "stopped:" in done["err"], told
