"""Errors of backward calls in words: the line, the name, and advice that mends: it is applied, and the program runs."""

import re
import runpy

import pytest

from kiem.inspect.explain.mistakes import explain_error
from kiem.inspect.trace import Trace

HEAD = "import torch\nimport torch.nn as nn, torch.nn.functional as F\ntorch.manual_seed(0)\n"
GAN = """
G, D = nn.Linear(2, 3), nn.Linear(3, 1)
og, od = torch.optim.SGD(G.parameters(), lr=0.1), torch.optim.SGD(D.parameters(), lr=0.1)
ones, zeros, bce = torch.ones(6, 1), torch.zeros(6, 1), F.binary_cross_entropy_with_logits
for _ in range(2):
    fake = G(torch.randn(6, 2))
    loss_d = bce(D(torch.randn(6, 3)), ones) + bce(D(fake), zeros)
    od.zero_grad()
    loss_d.backward()
    od.step()
    loss_g = bce(D(fake), ones)
    og.zero_grad()
    loss_g.backward() #!
    og.step()
"""
GAN_SHARED = """
G, D = nn.Linear(2, 3), nn.Sequential(nn.Linear(3, 4), nn.LeakyReLU(0.2), nn.Linear(4, 1))
og, od = torch.optim.Adam(G.parameters()), torch.optim.Adam(D.parameters())
bce = nn.BCEWithLogitsLoss()
fake, real = G(torch.randn(6, 2)), torch.randn(6, 3)
d_fake = D(fake)
loss_d = bce(D(real), torch.ones(6, 1)) + bce(d_fake, torch.zeros(6, 1))
loss_g = bce(d_fake, torch.ones(6, 1))
od.zero_grad(); loss_d.backward(retain_graph=True); od.step()
og.zero_grad(); loss_g.backward(); og.step() #!
"""
FUNCTION = """
class Add(torch.autograd.Function):
    @staticmethod
    def forward(ctx, a, b):
        return a + b
    @staticmethod
    def backward(ctx, g):
        return RESULT
a, b = torch.ones(2, 3, requires_grad=True), torch.ones(3, requires_grad=True)
Add.apply(a, b).sum().backward() #!
"""
FORGOTTEN = """
X, y = torch.randn(10, 2), torch.randn(10, 1)
w = torch.randn(2, 1)
b = torch.zeros(1)
for _ in range(2):
    loss = ((X @ w + b - y) ** 2).mean()
    loss.backward() #!
    with torch.no_grad():
        w -= 0.1 * w.grad
        b -= 0.1 * b.grad
"""
LSTM_NET = """
class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.lstm = nn.LSTM(3, 4)
        self.state = torch.zeros(1, 2, 4), torch.zeros(1, 2, 4)
    def forward(self, x):
        out, self.state = self.lstm(x, self.state)
        return out
net = Net()
for _ in range(3):
    net(torch.randn(5, 2, 3)).mean().backward() #!
"""
# name: (program, the line with #! raises; what is said; what to replace by what, as advised)
PROGRAMS = {
    "a loss twice": (
        "w = torch.ones(3, requires_grad=True)\nloss = (w ** 2).sum()\nloss.backward() # first\nloss.backward() #!",
        ["The backward call at line 6", "graph of loss (line 5)", "`loss.backward(retain_graph=True)`"],
        {"loss.backward() # first": "loss.backward(retain_graph=True)"}),
    "forward outside the loop": (
        "w = torch.ones(3, requires_grad=True)\na = w * 2\nloss = a.exp().mean()\n"
        "for _ in range(2):\n    # here\n    loss.backward() #!\n",
        ["the forward pass (lines 5 to 6) ran once, outside the loop", "Move lines 5 to 6 into the loop"],
        {"a = w * 2\nloss = a.exp().mean()\n": "", "# here": "a = w * 2; loss = a.exp().mean()"}),
    "part of it outside the loop": (
        "w = torch.ones(3, requires_grad=True)\np = w.softmax(0)\nfor i in range(2):\n    # here\n"
        "    (p * i).exp().sum().backward() #!\n",
        ["p: computed once, at line 5, outside the loop", "Move line 5 into the loop"],
        {"p = w.softmax(0)\n": "", "# here": "p = w.softmax(0)"}),
    "a GAN's fake batch": (
        GAN, ["Two losses use fake, made at line 9", "a GAN's discriminator", "detach at line 10: `fake.detach()`"],
        {"bce(D(fake), zeros)": "bce(D(fake.detach()), zeros)"}),
    "a hidden state": (
        "cell, h = nn.RNNCell(3, 4), torch.zeros(2, 4)\nfor _ in range(3):\n    h = cell(torch.randn(2, 3), h)\n"
        "    h.pow(2).mean().backward() #!\n    # end\n",
        ["h, made at line 6 in the step before", "`h = h.detach()`"], {"# end": "h = h.detach()"}),
    "the state of an LSTM": (
        "lstm, state = nn.LSTM(3, 4), None\nfor _ in range(3):\n    out, state = lstm(torch.randn(5, 2, 3), state)\n"
        "    out.pow(2).mean().backward() #!\n    # end\n",
        ["state, made at line 6", "`state = tuple(part.detach() for part in state)`"],
        {"# end": "state = tuple(part.detach() for part in state)"}),
    "h and c of an LSTM": (
        "lstm, h, c = nn.LSTM(3, 4), torch.zeros(1, 2, 4), torch.zeros(1, 2, 4)\nfor _ in range(3):\n"
        "    out, (h, c) = lstm(torch.randn(5, 2, 3), (h, c))\n    out.pow(2).mean().backward() #!\n    # end\n",
        ["h and c, made at line 6", "`h = h.detach(); c = c.detach()`"], {"# end": "h = h.detach(); c = c.detach()"}),
    "a state kept in a module": (
        LSTM_NET, ["self.state, made at line 11", "`self.state = tuple(part.detach() for part in self.state)`"],
        {"return out": "self.state = tuple(part.detach() for part in self.state); return out"}),
    "an optimizer step between": (
        GAN_SHARED, ["D.2.weight was changed in place by od.step() at line 12", "read at line 9",
                     "Move od.step() after this backward call"],
        {"; od.step()": "", "loss_g.backward();": "loss_g.backward(); od.step();"}),
    "an optimizer step between, forward again": (
        GAN_SHARED, ["or run the forward pass from line 9 on again after it"],
        {"og.zero_grad();": "loss_g = bce(D(fake), torch.ones(6, 1)); og.zero_grad();",
         "d_fake = D(fake)": "d_fake = D(fake.detach())"}),
    "changed in place": (
        "w = torch.ones(3, requires_grad=True)\na = w.sigmoid()\na += 1\na.sum().backward() #!",
        ["output of Sigmoid", "by sigmoid at line 5", "line 6: a += 1", "`a = a + 1`"], {"a += 1": "a = a + 1"}),
    "a method in place": (
        "w = torch.ones(3, requires_grad=True)\na = w.exp()\na.mul_(2)\na.sum().backward() #!",
        ["line 6: a.mul_(2)", "`a = a.mul(2)`"], {"a.mul_(2)": "a = a.mul(2)"}),
    "an element in place": (
        "w = torch.ones(3, requires_grad=True)\na = w.exp()\na[0] = 5\na.sum().backward() #!",
        ["line 6: a[0] = 5", "`a = a.clone()`"], {"a[0] = 5": "a = a.clone()\na[0] = 5"}),
    "a module in place": (
        "act = nn.ReLU(inplace=True)\nh = nn.Linear(4, 4)(torch.randn(3, 4)).sigmoid()\ny = act(h)\n"
        "y.sum().backward() #!", ["line 6: y = act(h)", "inplace=False"], {"inplace=True": "inplace=False"}),
    "a leaf in place": (
        "w = torch.zeros(3, 3, requires_grad=True)\nw[0, 0] = 1.0 #!",
        ["w is float32[3, 3]", "`with torch.no_grad(): w[0, 0] = 1.0`"],
        {"w[0, 0] = 1.0": "with torch.no_grad(): w[0, 0] = 1.0"}),
    "w and b without gradient": (
        FORGOTTEN, ["no tensor that it was computed from has requires_grad=True",
                    "`w.requires_grad_()` and `b.requires_grad_()`"],
        {"b = torch.zeros(1)": "b = torch.zeros(1)\nw.requires_grad_(); b.requires_grad_()"}),
    "an optimizer's tensors without gradient": (
        "x, k = torch.randn(4), torch.randn(4)\nopt = torch.optim.SGD([k], lr=0.1)\nloss = (x * k).sum()\n"
        "loss.backward() #!", ["Before loss is computed: `k.requires_grad_()`"],
        {"loss = ": "k.requires_grad_()\nloss = "}),
    "argmax": (
        "net, y = nn.Linear(4, 3), torch.tensor([0, 1, 2, 0, 1])\npred = net(torch.randn(5, 4)).argmax(1).float()\n"
        "loss = ((pred - y) ** 2).mean()\nloss.backward() #!",
        ["The graph ends at", "program.py:5: pred = ", "argmax gives int64[5]", "float32[5, 3]", "F.cross_entropy"],
        {".argmax(1).float()": "", "((pred - y) ** 2).mean()": "F.cross_entropy(pred, y)"}),
    "detached": (
        "net = nn.Linear(4, 3)\nh = net(torch.randn(5, 4)).detach()\nloss = h.mean()\nloss.backward() #!",
        ["program.py:5", "leave `.detach()` out"], {".detach()": ""}),
    "under no_grad": (
        "net = nn.Linear(4, 3)\nwith torch.no_grad():\n    h = net(torch.randn(5, 4))\nloss = h.mean()\n"
        "loss.backward() #!", ["program.py:6", "move it out of the block"],
        {"with torch.no_grad():": "if True:"}),
    "through numpy": (
        "net = nn.Linear(3, 1)\nout = net(torch.randn(4, 3)).detach().numpy()\nloss = torch.tensor(out).mean()\n"
        "loss.backward() #!", ["program.py:6: torch.tensor(out) makes a new tensor"],
        {".detach().numpy()": "", "torch.tensor(out)": "out"}),
    "a gradient of another shape": (
        "x, g = torch.ones(2, 3, requires_grad=True), torch.ones(3)\ny = x * 2\ny.backward(g) #!",
        ["y is float32[2, 3]", "here g is float32[3]", "`g.expand_as(y)`"], {"(g)": "(g.expand_as(y))"}),
    "a gradient of another rank": (
        "x, g = torch.ones(2, 3, requires_grad=True), torch.ones(6)\ny = x * 2\ny.backward(g) #!",
        ["`g.reshape(2, 3)`"], {"(g)": "(g.reshape(2, 3))"}),
    "a gradient unnamed": (
        "x = torch.ones(2, 3, requires_grad=True)\ny = x * 2\ny.backward(torch.ones(4)) #!",
        ["here it is [4]", "`y.backward(torch.ones_like(y))`"],
        {"y.backward(torch.ones(4))": "y.backward(torch.ones_like(y))"}),
    "too few gradients": (
        FUNCTION.replace("RESULT", "g"),
        ["Add.forward takes a, b; Add.backward (", "program.py:10) returned 1", "Return 2 values"],
        {"return g": "return g, g.sum(0)"}),
    "a gradient of a wrong shape": (
        FUNCTION.replace("RESULT", "g, g.new_ones(7)"),
        ["returned a gradient of shape [7] for b, which has shape [3]", "the shape [3]"],
        {"g.new_ones(7)": "g.new_ones(3)"}),
    "classes made floats": (
        "x, y = torch.ones(3, 5), torch.tensor([1, 2, 0])\nF.cross_entropy(x, y.float()) #!",
        ["y.float() is float32[3]: class indices must be int64", "Try: `y`"], {"y.float()": "y"}),
}  # fmt: skip


@pytest.mark.parametrize("name", PROGRAMS)
def test_it_is_explained_and_the_advice_mends_it(name, tmp_path):
    source, said, swaps = PROGRAMS[name]
    file = tmp_path / "program.py"
    file.write_text(HEAD + source)
    line = next(n for n, text in enumerate(file.read_text().splitlines(), 1) if "#!" in text)
    with pytest.raises(RuntimeError), Trace() as trace:
        runpy.run_path(str(file))
    text = trace.graph.failure.explanation
    assert text.startswith(f"{file}:{line}: ") and 2 <= len(text.splitlines()) <= 6
    for part in said:
        assert part in text, text
    mended = HEAD + source
    for old, new in swaps.items():
        assert old in mended
        mended = mended.replace(old, new, 1)
    file.with_name("mended.py").write_text(mended)
    runpy.run_path(str(file.with_name("mended.py")))


def test_without_a_recording_only_what_the_traceback_shows_is_said(tmp_path):
    file = tmp_path / "program.py"
    file.write_text(
        "import torch\nw = torch.ones(3, requires_grad=True)\na = w.sigmoid()\na += 1\na.sum().backward()\n"
    )
    with pytest.raises(RuntimeError) as caught:
        runpy.run_path(str(file))
    text = explain_error(caught.value)
    assert "program.py:4: a += 1" in text and re.search(r"`x = x \+ y` instead of `x \+= y`", text)
