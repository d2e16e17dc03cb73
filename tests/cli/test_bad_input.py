"""What a user gets wrong: one message that says what, where and what to do; the documented exit code; nothing lost.

Each row: the arguments, the exit code, and words of the message. Files are those of FILES and of the fixture `place`.
"""

import hashlib
import json
import os

import pytest

TINY = ["data.tokenizer=bytes", "model.vocab_size=257", "model.context_length=32", "model.emb_dim=16", "model.n_heads=2",
        "model.n_layers=1", "train.batch_tokens=64", "train.tokens=256", "seed=1"]  # fmt: skip

MODEL = {"vocab_size": 300, "context_length": 32, "emb_dim": 16, "n_heads": 2, "n_layers": 1}


def model(**changes):
    return json.dumps({key: value for key, value in (MODEL | changes).items() if value is not None})


FILES = {
    "ok.json": model(),
    "empty.json": "",
    "broken.json": '{\n "vocab_size": 300,\n "context_length": }\n',
    "binary.json": b"\x00\x01\x02\xff" * 50,
    "list.json": "[1, 2, 3]",
    "unknown.json": model(n_layer_typo=3),
    "near.json": model(n_heds=2, n_heads=None),
    "text_for_int.json": model(emb_dim="16"),
    "bool_for_int.json": model(n_layers=True),
    "float_for_int.json": model(n_layers=1.5),
    "negative.json": model(n_layers=-1),
    "zero.json": model(vocab_size=0),
    "huge.json": model(emb_dim=10**30),
    "nan.json": '{"vocab_size": 300, "context_length": 32, "emb_dim": 16, "n_heads": 2, "n_layers": 1, "drop_rate": NaN}',
    "drop.json": model(drop_rate=1.0),
    "indivisible.json": model(emb_dim=15),
    "kv.json": model(n_heads=4, n_kv_heads=3),
    "odd_head.json": model(emb_dim=6, position="rope"),
    "no_effect.json": model(rope_base=10000.0),
    "missing_key.json": model(emb_dim=None),
    "both_names.json": model(n_embd=16),
    "activation.json": model(activation="relu6"),
    "many.json": model(emb_dim=-1, n_layers="x", drop_rate=7, what=1),
    "duplicate.yaml": "model:\n  vocab_size: 300\n  vocab_size: 301\n",
    "tabs.yaml": "model:\n\tvocab_size: 300\n",
    "bomb.yaml": "a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(
        f"{chr(98 + i)}: &{chr(98 + i)} [{','.join(['*' + chr(97 + i)] * 9)}]\n" for i in range(9)),
    "tag.yaml": "model: !!python/object/apply:os.system ['echo hacked > hacked']\n",
    "broken.toml": "[model]\nvocab_size = \n",
    "prints.py": "print(1)\n",
    "code.py": "GPT = {'vocab_size': __import__('os').getpid()}\n",
    "section.yaml": "trian:\n  tokens: 100\n",
    "depth_and_model.json": json.dumps({"depth": 2, "model": MODEL}),
    "empty.txt": "",
    "binary.bin": b"\x00\xff\x00\xfe" * 1000,
    "short.txt": "too short",
    "latin1.txt": "caf\xe9 ".encode("latin-1") * 500,
    "broken.jsonl": "".join('{"text": "a line of text that is fine"}\n' if i % 2 else "{broken\n" for i in range(9)),
    "nokey.jsonl": '{"content": "abc"}\n' * 20,
    "group.jsonl": '{"text": {"body": "a"}}\n' * 9,
    "chat.jsonl": '{"messages": [{"role": "user", "content": "hi"}]}\n' * 9,
    "rows.json": '[{"body": "a"}, {"body": "b"}]',
    "deep.jsonl": "[" * 100_000 + "\n",
    "digits.jsonl": '{"text": ' + "9" * 6000 + "}\n",
    "torn.gz": b"\x1f\x8b\x08\x00garbage",
    "torn.zst": b"\x28\xb5\x2f\xfdgarbage",
    "bad.parquet": b"PAR1 not really",
    "tokenizer.json": '{"not": "a tokenizer"}',
    "afile": "x",
}  # fmt: skip
NEW = ("--out", "new", "--quiet")

CASES = [
    # --- the command line itself
    ("no such verb", ["trian"], 2, ["trian"]),
    ("no such option", ["train", "--dept", "4"], 2, ["--dept", "--depth"]),
    ("option without value", ["train", "--depth"], 2, ["--depth"]),
    ("depth is no number", ["train", "--depth", "four"], 2, ["four", "integer"]),
    ("tokens are no number", ["train", "--tokens", "many"], 2, ["many", "10M"]),
    ("minutes are no number", ["train", "--minutes", "soon"], 2, ["soon"]),
    ("run is missing", ["generate"], 2, ["RUN"]),
    ("unknown shell", ["completion", "tcsh"], 2, ["tcsh", "bash"]),
    # --- configuration: overrides
    ("override without value", ["train", "ok.json", "train.lr", *NEW], 2, ["train.lr", "="]),
    ("override of nothing", ["train", "ok.json", "=3", *NEW], 2, ["=3"]),
    ("unknown key", ["train", "ok.json", "train.learning_speed=3", *NEW], 2, ["train.learning_speed"]),
    ("nearest key", ["train", "ok.json", "train.batch_token=64", *NEW], 2, ["train.batch_tokens"]),
    ("ambiguous key", ["train", "ok.json", "bias=x", *NEW], 2, ["bias"]),
    ("text for a number", ["train", "ok.json", "train.lr=fast", *NEW], 2, ["train.lr", "fast"]),
    ("negative rate", ["train", "ok.json", "train.lr=-1", *NEW], 2, ["train.lr", "-1"]),
    ("absurd rate", ["train", "ok.json", "train.lr=1e300", *NEW], 2, ["train.lr", "10"]),
    ("rate is inf", ["train", "ok.json", "train.lr=inf", *NEW], 2, ["train.lr"]),
    ("rate is nan", ["train", "ok.json", "train.lr=nan", *NEW], 2, ["train.lr"]),
    ("absurd tokens", ["train", "ok.json", f"train.tokens={10**30}", *NEW], 2, ["train.tokens"]),
    ("zero tokens", ["train", "ok.json", "train.tokens=0", *NEW], 2, ["train.tokens", "1"]),
    ("unknown optimizer", ["train", "ok.json", "train.optimizer=sgdx", *NEW], 2, ["sgdx", "muon", "adamw"]),
    ("rate of the absent Muon", ["train", "ok.json", "train.optimizer=adamw", "train.matrix_lr=0.1", *NEW], 2, ["matrix_lr"]),
    ("cool-down that is none", ["train", "ok.json", "train.cooldown=none", "train.cooldown_tokens=9", *NEW], 2, ["cooldown"]),
    ("unknown precision", ["train", "ok.json", "train.precision=float8", *NEW], 2, ["float8", "bfloat16"]),
    ("negative seed", ["train", "ok.json", "--seed", "-1", *NEW], 2, ["seed"]),
    ("batch and context", ["train", "--data", "text.txt", *TINY, "train.batch_tokens=65", *NEW], 2, ["65", "32", "64"]),
    ("batch and micro-batch", ["train", "ok.json", "train.batch_tokens=96", "train.micro_batch_tokens=64", *NEW], 2, ["96", "64"]),
    ("less than a batch", ["train", "--data", "text.txt", *TINY, "train.tokens=32", *NEW], 2, ["32", "64"]),
    ("warm-up too long", ["train", "--data", "text.txt", *TINY, "train.warmup_tokens=9999", *NEW], 2, ["9999", "256"]),
    ("depth 0", ["train", "--depth", "0", *NEW], 2, ["depth", "1"]),
    ("depth too large", ["plan", "--depth", "4000", "--no-measure"], 2, ["depth", "128"]),
    ("depth and a preset", ["plan", "gpt2-124m", "--depth", "4", "--no-measure"], 2, ["depth", "model"]),
    # --- configuration: files
    ("a name that no file can have", ["plan", "x" * 5000], 2, ["xxx"]),
    ("text of a name that no file can have", ["train", "--data", "x" * 5000, *TINY, *NEW], 3, ["xxx"]),
    ("other text of a name that no file can have", ["eval", "run", "--data", "1" * 5000], 3, ["(5000 characters)"]),
    ("no such file", ["plan", "nowhere.json"], 2, ["nowhere.json"]),
    ("nearest preset", ["plan", "gpt2-124mm"], 2, ["gpt2-124m"]),
    ("empty file", ["plan", "empty.json"], 2, ["empty.json", "empty"]),
    ("broken JSON", ["plan", "broken.json"], 2, ["broken.json", "3"]),
    ("binary file", ["plan", "binary.json"], 2, ["binary.json"]),
    ("a list", ["plan", "list.json"], 2, ["list.json"]),
    ("unknown model key", ["plan", "unknown.json"], 2, ["n_layer_typo", "n_layers"]),
    ("misspelt model key", ["plan", "near.json"], 2, ["n_heds", "n_heads"]),
    ("text for int in file", ["plan", "text_for_int.json"], 2, ["emb_dim", '"16"']),
    ("bool for int in file", ["plan", "bool_for_int.json"], 2, ["n_layers"]),
    ("float for int in file", ["plan", "float_for_int.json"], 2, ["n_layers", "1.5"]),
    ("negative in file", ["plan", "negative.json"], 2, ["n_layers", "-1"]),
    ("zero in file", ["plan", "zero.json"], 2, ["vocab_size"]),
    ("huge in file", ["plan", "huge.json"], 2, ["emb_dim"]),
    ("NaN in file", ["plan", "nan.json"], 2, ["drop_rate"]),
    ("dropout of everything", ["plan", "drop.json"], 2, ["drop_rate", "1"]),
    ("indivisible", ["plan", "indivisible.json"], 2, ["emb_dim 15", "n_heads 2"]),
    ("kv heads", ["plan", "kv.json"], 2, ["n_kv_heads 3", "n_heads 4"]),
    ("odd head", ["plan", "odd_head.json"], 2, ["head_dim 3"]),
    ("key without effect", ["plan", "no_effect.json"], 2, ["rope_base", "no effect"]),
    ("missing key", ["plan", "missing_key.json"], 2, ["emb_dim"]),
    ("both names of a key", ["plan", "both_names.json"], 2, ["n_embd", "emb_dim"]),
    ("unknown activation", ["plan", "activation.json"], 2, ["relu6", "swiglu"]),
    ("all problems at once", ["plan", "many.json"], 2, ["emb_dim", "n_layers", "drop_rate", "what"]),
    ("duplicate key", ["plan", "duplicate.yaml"], 2, ["vocab_size"]),
    ("tabs in YAML", ["plan", "tabs.yaml"], 2, ["tabs.yaml", "2"]),
    ("YAML bomb", ["plan", "bomb.yaml"], 2, ["bomb.yaml"]),
    ("YAML object", ["plan", "tag.yaml"], 2, ["tag.yaml"]),
    ("broken TOML", ["plan", "broken.toml"], 2, ["broken.toml", "2"]),
    ("code in a pasted config", ["plan", "code.py"], 2, ["code.py"]),
    ("unknown section", ["plan", "section.yaml"], 2, ["trian", "train"]),
    ("depth beside model", ["plan", "depth_and_model.json", "--no-measure"], 2, ["depth", "model"]),
    ("a folder that is no run", ["plan", "folder"], 4, ["folder", "config.yaml"]),
    # --- text
    ("missing text", ["train", "--data", "nowhere.txt", *TINY, *NEW], 3, ["nowhere.txt"]),
    ("missing glob", ["prepare", "no/**/*.txt"], 3, ["no/**/*.txt"]),
    ("empty text", ["train", "--data", "empty.txt", *TINY, *NEW], 3, ["empty.txt"]),
    ("empty folder", ["prepare", "folder", "--tokenizer", "bytes"], 3, ["folder"]),
    ("binary text", ["train", "--data", "binary.bin", *TINY, *NEW], 3, ["binary.bin"]),
    ("shorter than a context", ["train", "--data", "short.txt", *TINY, *NEW], 3, ["short.txt", "context"]),
    ("not UTF-8", ["train", "--data", "latin1.txt", "data.on_bad_text=error", *TINY, *NEW], 3, ["latin1.txt"]),
    ("misspelt key for prepare", ["prepare", "folder", "data.tokeniser=bytes"], 2, ["data.tokeniser", "data.tokenizer"]),
    ("explain of nothing", ["explain", "nothing.py"], 2, ["nothing.py", "a Python file"]),
    ("verify of a text", ["verify", "short.txt"], 2, ["short.txt"]),
    ("explain of a call that was not made", ["explain", "prints.py", "--wrt", "w", "--call", "3"], 2, ["0 backward calls"]),
    ("not UTF-8, strictly", ["prepare", "latin1.txt", "--tokenizer", "bytes", "data.on_bad_text=error"], 3, ["latin1.txt", "1"]),
    ("broken record, strictly", ["prepare", "broken.jsonl", "--tokenizer", "bytes", "data.on_bad_text=error"], 3, ["broken.jsonl"]),
    ("no such field", ["prepare", "nokey.jsonl", "--tokenizer", "bytes"], 3, ["nokey.jsonl", "text"]),
    ("text in a group", ["prepare", "group.jsonl", "--tokenizer", "bytes"], 3, ["group.jsonl", "data.text_key=text.body"]),
    ("chat records", ["prepare", "chat.jsonl", "--tokenizer", "bytes"], 3, ["chat.jsonl", "messages", "fine-tuning"]),
    ("chat in the text field", ["prepare", "chat.jsonl", "--tokenizer", "bytes", "data.text_key=messages"], 3, ["fine-tuning"]),
    ("records without text, as an array", ["prepare", "rows.json", "--tokenizer", "bytes"], 3, ["rows.json", "'body'", "data.text_key"]),
    ("deep record", ["prepare", "deep.jsonl", "--tokenizer", "bytes"], 3, ["deep.jsonl", "nested"]),
    ("number of 6,000 digits", ["prepare", "digits.jsonl", "--tokenizer", "bytes"], 3, ["digits.jsonl", "a number"]),
    ("a weight for some sources", ["train", "--data", "text.txt=1", "--data", "afile", *TINY, *NEW], 2, ["afile", "every source a weight"]),
    ("the whole file system", ["prepare", "/", "--tokenizer", "bytes"], 3, ["source /", "whole file system", "folders"]),
    ("the kernel's files", ["prepare", "/proc", "--tokenizer", "bytes"], 3, ["/proc"]),
    ("a device", ["prepare", "/dev/null", "--tokenizer", "bytes"], 3, ["/dev/null", "device"]),
    ("a name of 300 letters", ["prepare", "text.txt", "--tokenizer", "n" * 300], 3, ["nnn"]),
    ("text of a name of 300 letters", ["prepare", "n" * 300, "--tokenizer", "bytes"], 3, ["nnn"]),
    ("torn gzip", ["prepare", "torn.gz", "--tokenizer", "bytes"], 3, ["torn.gz"]),
    ("torn zstd", ["prepare", "torn.zst", "--tokenizer", "bytes"], 3, ["torn.zst"]),
    ("torn Parquet", ["prepare", "bad.parquet", "--tokenizer", "bytes"], 3, ["bad.parquet"]),
    ("bad weight", ["train", "--data", "text.txt=heavy", *TINY, *NEW], 2, ["heavy"]),
    ("negative weight", ["train", "--data", "text.txt=-1", *TINY, *NEW], 2, ["weight", "-1"]),
    ("missing tokenizer", ["prepare", "text.txt", "--tokenizer", "nowhere.json"], 3, ["nowhere.json"]),
    ("bad tokenizer", ["prepare", "text.txt", "--tokenizer", "tokenizer.json"], 3, ["tokenizer.json"]),
    ("vocabulary too small", ["train", "--data", "text.txt", *TINY, "model.vocab_size=200", *NEW], 2, ["200", "257"]),
    ("tokenizer vocabulary too small", ["train", "ok.json", "data.tokenizer_vocab_size=10", *NEW], 2, ["tokenizer_vocab_size", "258"]),
    # --- devices and folders
    ("unknown device", ["train", "ok.json", "--device", "quantum", *NEW], 2, ["quantum", "cpu"]),
    ("absent GPU", ["train", "--data", "text.txt", "--device", "cuda:63", *TINY, *NEW], 2, ["cuda:63"]),
    ("minutes and tokens", ["train", "ok.json", "--minutes", "1", "--tokens", "1k", *NEW], 2, ["minutes", "tokens"]),
    ("negative minutes", ["train", "ok.json", "--minutes", "-1", *NEW], 2, ["-1"]),
    ("out is another run", ["train", "--data", "text.txt", "--out", "run", *TINY, "seed=2"], 2, ["run", "kiem train run", "seed"]),
    ("out holds files", ["train", "--data", "text.txt", "--out", "full", *TINY], 2, ["full", "--out"]),
    ("out is a file", ["train", "--data", "text.txt", "--out", "afile", *TINY], 2, ["afile"]),
    ("out below a file", ["train", "--data", "text.txt", "--out", "afile/run", *TINY], 2, ["afile"]),
    # --- runs
    ("resume of nothing", ["train", "nowhere/"], 2, ["nowhere"]),
    ("resume of a plain folder", ["train", "folder"], 4, ["folder", "config.yaml"]),
    ("another rate in a run", ["train", "run", "train.lr=0.5"], 2, ["train.lr"]),
    ("another model in a run", ["train", "run", "model.n_layers=2"], 2, ["model.n_layers"]),
    ("a shorter run", ["train", "run", "train.tokens=64"], 2, ["64", "256"]),
    ("a run with minutes", ["train", "run", "--minutes", "1"], 2, ["--minutes"]),
    ("a run with a damaged config", ["train", "damaged"], 2, ["config.yaml"]),
    ("a checkpoint of another config", ["train", "swapped"], 2, ["emb_dim is 16", "32 now"]),
    ("eval of nothing", ["eval", "nowhere"], 4, ["nowhere"]),
    ("eval of a run without checkpoint", ["eval", "bare"], 4, ["bare"]),
    ("eval on missing text", ["eval", "run", "--data", "nowhere.txt"], 3, ["nowhere.txt"]),
    # --- generation
    ("generate from nothing", ["generate", "nowhere"], 4, ["nowhere"]),
    ("prompt too long", ["generate", "run", "--prompt", "x" * 100], 2, ["100", "31"]),
    ("negative temperature", ["generate", "run", "--temperature", "-1"], 2, ["temperature", "-1"]),
    ("top-p above 1", ["generate", "run", "--top-p", "1.5"], 2, ["top_p", "1.5"]),
    ("top-k 0", ["generate", "run", "--top-k", "0"], 2, ["top_k"]),
    ("no tokens", ["generate", "run", "--max-tokens", "0"], 2, ["max_tokens"]),
    ("absurd tokens to generate", ["generate", "run", "--max-tokens", str(10**12)], 2, ["max_tokens"]),
    ("empty stop", ["generate", "run", "--stop", ""], 2, ["stop"]),
    ("no texts", ["generate", "run", "--n", "0"], 2, ["n"]),
    ("repetition penalty 0", ["generate", "run", "--repetition-penalty", "0"], 2, ["repetition_penalty"]),
    ("bad seed", ["generate", "run", "--seed", str(10**30)], 2, ["seed"]),
]  # fmt: skip


@pytest.fixture(scope="session")
def furnished(place):
    """The folder `place` with everything that the cases name."""
    import shutil

    for name, content in FILES.items():
        (place / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    (place / "folder").mkdir()
    (place / "full").mkdir()
    (place / "full" / "thesis.txt").write_text("all there is")
    for name in ("damaged", "swapped", "bare"):
        shutil.copytree(place / "run", place / name)
    (place / "damaged" / "config.yaml").write_text("model: [broken\n")
    config = place / "swapped" / "config.yaml"
    config.write_text(
        config.read_text()
        .replace("emb_dim: 16", "emb_dim: 32")
        .replace("hidden_dim: 64", "hidden_dim: 128")
        .replace("head_dim: 8", "head_dim: 16")
    )
    shutil.rmtree(place / "bare" / "checkpoints")
    return place


def picture(folder):
    """Every file outside the cache, with a digest of what is in it."""
    found = {}
    for root, folders, files in os.walk(folder):
        folders[:] = [f for f in folders if f != "cache"]
        for name in files:
            path = os.path.join(root, name)
            if name != ".lock":
                with open(path, "rb") as file:
                    found[path] = hashlib.sha256(file.read()).hexdigest()
    return found


def test_the_table_is_long_enough():
    assert len(CASES) >= 100 and len({name for name, *_ in CASES}) == len(CASES)


@pytest.mark.parametrize(("arguments", "code", "words"), [case[1:] for case in CASES], ids=[case[0] for case in CASES])
def test_bad_input(furnished, kiem, arguments, code, words):
    before = picture(furnished)
    result = kiem(*arguments)
    assert result.code == code, result.err
    assert "Traceback (most" not in result.err and "pydantic" not in result.err
    assert sum(line.startswith("error:") for line in result.err.splitlines()) == 1, result.err
    said = result.err[result.err.index("error:") :]
    for word in words:
        assert word in said, said
    assert picture(furnished) == before
    assert not (furnished / "new").exists()


def test_the_same_as_json(furnished, kiem):
    result = kiem("plan", "indivisible.json", "--json")
    error = json.loads(result.out)["error"]
    assert (error["kind"], error["exit_code"], result.code) == ("ConfigError", 2, 2)
    assert "emb_dim 15" in error["message"]
