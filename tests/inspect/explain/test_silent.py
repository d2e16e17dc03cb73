"""Mistakes that raise no error: what is said of them, and that right programs are left in peace."""

import runpy
import warnings

import pytest

from kiem.inspect.trace import Trace

HEAD = "import torch\nimport torch.nn as nn, torch.nn.functional as F\ntorch.manual_seed(0)\n"
CUT = """
class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(3, 4), nn.Linear(4, 1)
    def forward(self, x):
        h = torch.relu(self.fc1(x)).detach()
        return self.fc2(h)
net = Net()
for _ in range(9):
    net(torch.randn(5, 3)).pow(2).mean().backward()
"""
BY_HAND = """
X, y = torch.randn(10, 2), torch.randn(10, 1)
w = torch.randn(2, 1, requires_grad=True)
for _ in range(3):
    ((X @ w - y) ** 2).mean().backward()
    w.data -= 0.1 * w.grad
    w.grad = None
"""


def notes(tmp_path, source):
    file = tmp_path / "program.py"
    file.write_text(HEAD + source)
    with warnings.catch_warnings(action="ignore"), Trace() as trace:
        runpy.run_path(str(file))
    return [note.replace(str(file), "program.py") for note in trace.graph.notes]


@pytest.mark.parametrize(("loss", "advice"), [
    ("F.mse_loss(out, target)", "`target.unsqueeze(1)`"),
    ("F.smooth_l1_loss(out, target)", "`target.unsqueeze(1)`"),
    ("((out - target) ** 2).mean()", "`target.unsqueeze(1)`"),
    ("((target[:, None] - out[:, 0]) ** 2).mean()", ".squeeze(1)`"),
])  # fmt: skip
def test_a_loss_that_is_broadcast_is_said(tmp_path, loss, advice):
    source = f"net = nn.Linear(3, 1)\nout, target = net(torch.randn(8, 3)), torch.randn(8)\n{loss}.backward()"
    (note,) = notes(tmp_path, source)
    assert "program.py:6" in note and "broadcast to [8, 8]" in note and advice in note
    mended = loss.replace("target[:, None]", "target[:, None].squeeze(1)") if "None" in loss else \
        loss.replace("target", "target.unsqueeze(1)")  # fmt: skip
    assert notes(tmp_path, source.replace(loss, mended)) == []


def test_distances_of_all_pairs_are_meant(tmp_path):
    assert notes(tmp_path, "x = torch.randn(8, requires_grad=True)\n(x[:, None] - x).abs().sum().backward()") == []


def test_what_gets_no_gradient_is_said_once(tmp_path):
    (note,) = notes(tmp_path, CUT)
    assert note == "the output of relu (program.py:10) is detached at program.py:10; no gradient: net.fc1"


def test_a_tensor_that_is_also_used_without_its_gradient_is_said(tmp_path):
    source = "w = torch.randn(3, requires_grad=True)\nhidden = w * 2\n(hidden.detach() * w).sum().backward()"
    assert notes(tmp_path, source) == ["hidden is detached at program.py:6"]


def test_a_change_through_data_is_said_but_not_a_step_by_hand(tmp_path):
    source = "w = torch.linspace(-2, 2, 5, requires_grad=True)\ny = torch.tanh(w)\ny.data.clamp_(-0.5, 0.5)\n"
    (note,) = notes(tmp_path, source + "y.sum().backward()")
    assert note.startswith("y is changed in place through .data or .detach()") and "program.py:6" in note
    assert notes(tmp_path, BY_HAND) == []
