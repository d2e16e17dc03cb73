"""Errors in plain words: the right line, the shapes, and suggestions that run when they are put in."""

import re
import runpy

import pytest

from kiem.inspect.explain.mistakes import explain_error
from kiem.inspect.trace import Trace

# name: (program, the line with #! raises; what the explanation says; what a suggestion replaces, by how it begins)
PROGRAMS = {
    "chapter": (
        """
import torch.nn as nn
class SimpleNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(10, 5), nn.Linear(5, 1)
    def forward(self, x):
        return torch.sigmoid(self.fc2(torch.relu(self.fc1(x))))
net, criterion = SimpleNet(), nn.BCELoss()
output, target = net(torch.randn(1, 10)), torch.tensor([1.0])
loss = criterion(output, target) #!
""",
        ["output is float32[1, 1]", "target is float32[1]", "target.reshape(1, 1)", "target.view_as(output)"],
        {"target": "target"},
    ),
    "logits": (
        "out, y = torch.randn(4, 1), torch.ones(4)\nF.binary_cross_entropy_with_logits(out, y) #!",
        ["out is float32[4, 1]", "y is float32[4]", "y.reshape(4, 1)"], {"y": "y"}),
    "one target for all": (
        "out, y = torch.rand(4, 1), torch.ones(1)\nF.binary_cross_entropy(out, y) #!",
        ["y is float32[1]", "y.expand(4, 1)"], {"y": "y"}),
    "too few targets": (
        "out, y = torch.rand(4, 1), torch.ones(3)\nF.binary_cross_entropy(out, y) #!", ["each of the 4 outputs"], {}),
    "matmul": (
        "x, w = torch.ones(3, 4), torch.ones(5, 4)\ny = x @ w #!",
        ["x is float32[3, 4]", "w is float32[5, 4]", "`x @ w.T`"], {"x": "x @ w"}),
    "matmul the other way": (
        "x, w = torch.ones(3, 4), torch.ones(2, 3)\ny = torch.mm(x, w) #!", ["`w @ x`"], {"": "torch.mm(x, w)"}),
    "matmul of expressions": (
        "x, w = torch.ones(3, 4), torch.ones(5, 4)\ny = (x + 1) @ (w * 2) #!",
        ["x + 1 is a matrix [3, 4]", "`(x + 1) @ (w * 2).T`"], {"": "(x + 1) @ (w * 2)"}),
    "mv": ("w, v = torch.ones(3, 4), torch.ones(3)\ny = w @ v #!", ["v is float32[3]", "`w.T @ v`"], {"": "w @ v"}),
    "dot": ("a, b = torch.ones(3), torch.ones(4)\na.dot(b) #!", ["a is float32[3]", "must be equal"], {}),
    "dot of columns": (
        "a, b = torch.ones(3, 1), torch.ones(3)\na = torch.dot(a, b) #!", ["a.reshape(-1) @ b.reshape(-1)"],
        {"": "torch.dot(a, b)"}),
    "bmm": (
        "a, b = torch.ones(2, 3, 4), torch.ones(2, 5, 4)\nc = torch.bmm(a, b) #!", ["`a @ b.mT`"],
        {"": "torch.bmm(a, b)"}),
    "mm with a vector": ("v, w = torch.ones(3), torch.ones(3, 4)\ny = torch.mm(v, w) #!", ["`v @ w`"],
                         {"": "torch.mm(v, w)"}),
    "linear layer": (
        "fc, x = nn.Linear(10, 5), torch.ones(2, 8)\nfc(x) #!",
        ["x is float32[2, 8]", "fc is Linear(in_features=10", "takes 10"], {"nn": "nn.Linear(10, 5)"}),
    "inner layer": (
        "net = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten(), nn.Linear(10, 2))\nnet(torch.ones(1, 1, 8, 8)) #!",
        ["the input of net.2 is float32[1, 72]"], {"nn": "nn.Linear(10, 2)"}),
    "images into a linear layer": (
        "fc, x = nn.Linear(784, 5), torch.ones(2, 1, 28, 28)\nfc(x) #!", ["`x.flatten(1)`"],
        {"x": "x", "nn": "nn.Linear(784, 5)"}),
    "bias": (
        "x, w, b = torch.ones(2, 10), torch.ones(5, 10), torch.ones(4)\nF.linear(x, w, b) #!",
        ["b has 4 elements", "the features are 5", "nn.Linear(10, 5)"], {"torch": "b"}),
    "functional linear": (
        "x, w = torch.ones(2, 10), torch.ones(10, 5)\nF.linear(x, w) #!", ["w is float32[10, 5]", "`w.T`"], {"": "w"}),
    "broadcast": (
        "x, b = torch.ones(3, 4), torch.ones(3)\nx + b #!",
        ["x is float32[3, 4]", "b is float32[3]", "dimension 1", "`b.unsqueeze(1)`"], {"": "b"}),
    "broadcast of vectors": ("a, b = torch.ones(3), torch.ones(4)\na * b #!", ["b is float32[4]", "3 and 4"], {}),
    "broadcast in mse": (
        "out, y = torch.ones(3, 4), torch.ones(3)\nF.mse_loss(out, y) #!", ["out is float32[3, 4]", "`y.unsqueeze(1)`"],
        {"": "y"}),
    "transposed": ("a, b = torch.ones(3, 4), torch.ones(4, 3)\na - b #!", ["`b.T`"], {"": "b"}),
    "batches of products": (
        "a, b = torch.ones(2, 3, 4), torch.ones(3, 4, 5)\na @ b #!", ["before the last two", "dimension 0"], {}),
    "reshape": (
        "x = torch.ones(3, 4)\nx.reshape(5, 2) #!", ["x is float32[3, 4], 12 elements", "[5, 2] needs 10"],
        {"": "x.reshape(5, 2)"}),
    "reshape with -1": (
        "x = torch.ones(3, 4)\nx.reshape(5, -1) #!", ["a multiple of 5", "x.reshape(-1)"], {"": "x.reshape(5, -1)"}),
    "heads": ("q = torch.ones(2, 3, 8)\nq.view(2, 3, 3, 4) #!", ["q.reshape(2, 3, 2, 4)"], {"": "q.view(2, 3, 3, 4)"}),
    "view": (
        "x = torch.ones(3, 4)\nx.T.view(12) #!", ["x.T is float32[4, 3]", "`x.T.reshape(12)`"], {"": "x.T.view(12)"}),
    "cat": (
        "a, b = torch.ones(2, 3), torch.ones(2, 5)\nc = torch.cat([a, b]) #!",
        ["a is float32[2, 3]", "b is float32[2, 5]", "`torch.cat([a, b], dim=1)`"], {"": "torch.cat([a, b])"}),
    "cat of ranks": (
        "a, b = torch.ones(2, 3), torch.ones(3)\nc = torch.cat([a, b]) #!", ["`b.unsqueeze(0)`"], {"": "b"}),
    "stack": (
        "a, b = torch.ones(2), torch.ones(3)\nc = torch.stack([a, b]) #!", ["`torch.cat([a, b], dim=0)`"],
        {"": "torch.stack([a, b])"}),
    "double input": (
        "fc, x = nn.Linear(3, 2), torch.ones(2, 3, dtype=torch.float64)\nfc(x) #!",
        ["x is float64[2, 3]", "fc.weight is float32[2, 3]", "`x.to(torch.float32)`"], {"": "x"}),
    "integer input": (
        "fc, x = nn.Linear(3, 2), torch.tensor([[1, 2, 3]])\nfc(x) #!", ["x is int64[1, 3]"], {"": "x"}),
    "half layer": (
        "fc, x = nn.Linear(3, 2).half(), torch.ones(2, 3)\nfc(x) #!", ["float16[2, 3]", "`x.to(torch.float16)`"],
        {"": "x"}),
    "product of two types": (
        "a, b = torch.ones(2, 2), torch.ones(2, 2).double()\na @ b #!", ["`a.to(torch.float64)`"], {"": "a"}),
    "integer targets": (
        "p, y = torch.rand(3), torch.tensor([0, 1, 1])\nF.binary_cross_entropy(p, y) #!",
        ["y is int64[3]", "p is float32[3]", "`y.to(torch.float32)`"], {"": "y"}),
    "devices": (
        "fc, x = nn.Linear(3, 3, device='meta'), torch.ones(3, 3)\nfc(x) #!",
        ["x is float32[3, 3] on cpu", "on meta", "`x.to('meta')`"], {"": "x"}),
    "float classes": (
        "x, y = torch.ones(3, 5), torch.ones(3)\nF.cross_entropy(x, y) #!", ["y is float32[3]", "`y.long()`"],
        {"": "y"}),
    "class too large": (
        "x, y = torch.ones(3, 5), torch.tensor([1, 2, 5])\nF.cross_entropy(x, y) #!",
        ["from 1 to 5", "5 classes", "0 to 4", "`y - 1`"], {"": "y"}),
    "batch sizes": (
        "x, y = torch.ones(6, 5), torch.ones(2, 3, dtype=torch.long)\nF.cross_entropy(x, y) #!",
        ["x is float32[6, 5]", "y is int64[2, 3]", "`y.reshape(-1)`"], {"": "y"}),
    "language model": (
        "x, y = torch.ones(2, 3, 5), torch.ones(2, 3, dtype=torch.long)\nF.cross_entropy(x, y) #!",
        ["`x.flatten(0, -2), y.flatten()`"], {"": "x, y"}),
    "column of classes": (
        "x, y = torch.ones(3, 5), torch.ones(3, 1, dtype=torch.long)\nF.cross_entropy(x, y) #!", ["`y.reshape(-1)`"],
        {"y": "y", "x": "x, y"}),
    "no sigmoid": (
        "p, y = torch.full((3,), 2.0), torch.ones(3)\nF.binary_cross_entropy(p, y) #!", ["`torch.sigmoid(p)`"],
        {"": "p"}),
    "token too large": (
        "emb, ids = nn.Embedding(10, 3), torch.tensor([1, 12])\nemb(ids) #!",
        ["ids is int64[2]", "from 1 to 12", "10 rows", "0 to 9", "`nn.Embedding(13, 3)`"],
        {"ids": "ids", "nn": "nn.Embedding(10, 3)"}),
    "float tokens": ("emb, ids = nn.Embedding(10, 3), torch.ones(2)\nemb(ids) #!", ["`ids.long()`"], {"": "ids"}),
    "conv": (
        "conv, x = nn.Conv2d(3, 8, 3), torch.ones(1, 1, 28, 28)\nconv(x) #!",
        ["x is float32[1, 1, 28, 28]", "takes 3", "given are 1", "nn.Conv2d(1, 8"], {"nn": "nn.Conv2d(3, 8, 3)"}),
    "channels last": (
        "conv, x = nn.Conv2d(3, 8, 3), torch.ones(1, 28, 28, 3)\nconv(x) #!", ["`x.movedim(-1, 1)`"],
        {"x": "x", "nn": "nn.Conv2d(3, 8, 3)"}),
    "layer norm": ("norm, x = nn.LayerNorm(5), torch.ones(2, 4)\nnorm(x) #!", ["takes 5", "given are 4"],
                   {"": "nn.LayerNorm(5)"}),
    "batch norm": ("norm, x = nn.BatchNorm1d(4), torch.ones(2, 3)\nnorm(x) #!", ["takes 4", "given are 3"],
                   {"": "nn.BatchNorm1d(4)"}),
    "lstm": ("rnn, x = nn.LSTM(10, 5), torch.ones(2, 3, 8)\nrnn(x) #!", ["takes 10", "given are 8", "nn.LSTM(8, 5)"],
             {"": "nn.LSTM(10, 5)"}),
    "expand": ("x = torch.ones(3)\nx.expand(3, 4) #!", ["3 cannot fill 3, 4", "dimension 1 has 3, not 4"], {}),
    "not a scalar": (
        "w = torch.ones(3, requires_grad=True)\ny = w * 2\ny.backward() #!",
        ["y is float32[3]", "`y.sum().backward()`"],
        {"": "y.backward()"}),
    "integers with grad": ("x = torch.tensor([1, 2])\nx.requires_grad_() #!", ["x is int64[2]", "x.float()"], {}),
    "numpy": ("w = torch.ones(3, requires_grad=True)\nw.numpy() #!", ["`w.detach().cpu().numpy()`"], {"": "w.numpy()"}),
    "item": ("w = torch.ones(3)\nw.item() #!", ["3 numbers", "`w.tolist()`"], {"": "w.item()"}),
    "truth": ("w = torch.ones(3)\nif w > 0: #!\n    pass", ["`(w > 0).all()`"], {"": "w > 0"}),
    "mean of integers": ("x = torch.tensor([1, 2])\nx.mean() #!", ["x is int64[2]", "`x.float()`"], {"": "x"}),
    "in place to another type": ("x = torch.tensor([1, 2])\nx += 0.5 #!", ["x is int64[2]", "`x.float()`"], {}),
}  # fmt: skip
HEAD = "import torch\nimport torch.nn as nn, torch.nn.functional as F\n"


def failing(tmp_path, source):
    """The exception of a program, and the line that should have raised it."""
    file = tmp_path / "program.py"
    file.write_text(HEAD + source)
    line = next(n for n, text in enumerate(file.read_text().splitlines(), 1) if "#!" in text)
    with pytest.raises(Exception) as caught:
        runpy.run_path(str(file))
    return caught.value, f"{file}:{line}: "


@pytest.mark.filterwarnings("ignore:Using a target size")  # the mistake of one of the programs
@pytest.mark.parametrize("name", PROGRAMS)
def test_an_error_is_explained_and_the_suggestions_run(name, tmp_path):
    source, said, swaps = PROGRAMS[name]
    error, where = failing(tmp_path, source)
    text = explain_error(error)
    assert text is not None
    assert text.startswith(where)
    for part in said:
        assert part in text, text
    assert 2 <= len(text.splitlines()) <= 6
    if not swaps:
        return
    codes = re.findall(r"`(.*?)`", next(line for line in reversed(text.splitlines()) if "`" in line))
    assert any(code.startswith(begin) for code in codes for begin in swaps)
    for code in codes:
        old = next((old for begin, old in swaps.items() if code.startswith(begin)), None)
        if old is not None:
            place = list(re.finditer(rf"(?<![\w.]){re.escape(old)}(?!\w)", HEAD + source))[-1]
            mended = (HEAD + source)[: place.start()] + code + (HEAD + source)[place.end() :]
            (tmp_path / "mended.py").write_text(mended)
            runpy.run_path(str(tmp_path / "mended.py"))


def test_shapes_that_only_the_recorder_knows(tmp_path):
    file = tmp_path / "program.py"
    file.write_text(HEAD + "x, b = torch.ones(3, 4), torch.ones(3)\n(x * 2) + b.relu()")
    with pytest.raises(RuntimeError), Trace() as trace:
        runpy.run_path(str(file))
    text = trace.graph.failure.explanation
    assert "x * 2 is float32[3, 4], b.relu() is float32[3]" in text
    assert "`b.relu().unsqueeze(1)`" in text


def test_nothing_is_said_where_nothing_is_known():
    assert explain_error(ValueError("mine")) is None
    assert (
        explain_error(
            RuntimeError("size of tensor a (3) must match the size of tensor b (4) at non-singleton dimension 0")
        )
        is None
    )
