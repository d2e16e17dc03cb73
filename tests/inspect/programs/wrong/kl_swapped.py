"""KL(teacher || student) in forward; backward is that of KL(student || teacher)."""

import torch
from torch import nn


class Distil(torch.autograd.Function):
    @staticmethod
    def forward(ctx, student, teacher):
        log_q, log_p = student.log_softmax(-1), teacher.log_softmax(-1)
        ctx.save_for_backward(log_q, log_p)
        return (log_p.exp() * (log_p - log_q)).sum(-1).mean()

    @staticmethod
    def backward(ctx, grad):  # defined
        log_q, log_p = ctx.saved_tensors
        q, ratio = log_q.exp(), log_q - log_p
        kl = (q * ratio).sum(-1, keepdim=True)
        return grad * q * (ratio - kl) / q.shape[0], None


torch.manual_seed(0)
teacher = nn.Sequential(nn.Linear(10, 64), nn.ReLU(), nn.Linear(64, 6)).requires_grad_(False)
student = nn.Linear(10, 6)
x = torch.randn(20, 10)
with torch.no_grad():
    target = 3 * teacher(x)
loss = Distil.apply(student(x), target)  # wrong: Distil
loss.backward()
print(loss.item())
