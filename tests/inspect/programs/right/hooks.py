"""Hooks on tensors and modules that look and change nothing, a detached teacher, a frozen layer, no_grad."""

import copy

import torch
from torch import nn

torch.manual_seed(0)
student = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4))
teacher = copy.deepcopy(student)
student[0].requires_grad_(False)
norms = {}
activations = {}


def remember(module, inputs, output):
    activations[module] = output.detach().abs().mean().item()


student[2].register_forward_hook(remember)
student[4].register_full_backward_hook(lambda module, into, out: norms.update(output=out[0].norm().item()))
student[4].weight.register_hook(lambda grad: norms.update(weight=grad.norm().item()))
student[4].bias.register_post_accumulate_grad_hook(lambda p: norms.update(bias=p.grad.norm().item()))

x = torch.randn(10, 8)
with torch.no_grad():
    for p, q in zip(teacher.parameters(), student.parameters(), strict=True):
        p.mul_(0.9).add_(q, alpha=0.1)
    target = teacher(x + 0.1 * torch.randn_like(x)).softmax(-1)
scores = student(x)
center = scores.mean(0).detach()
loss = -(target * (scores - center).log_softmax(-1)).sum(-1).mean()
loss.backward()
print(loss.item(), norms, len(activations))
