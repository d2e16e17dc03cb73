"""Double precision: a Gaussian process likelihood by Cholesky factor, solve and log-determinant."""

import math

import torch

torch.manual_seed(0)
torch.set_default_dtype(torch.float64)
x = torch.linspace(0, 3, 12)
y = torch.sin(2 * x) + 0.1 * torch.randn(12)
log_length = torch.tensor(-0.3, requires_grad=True)
log_scale = torch.tensor(0.1, requires_grad=True)
log_noise = torch.tensor(-2.0, requires_grad=True)
distance = (x[:, None] - x[None, :]) ** 2
kernel = torch.exp(2 * log_scale - 0.5 * distance / torch.exp(2 * log_length))
kernel = kernel + torch.exp(2 * log_noise) * torch.eye(12)
factor = torch.linalg.cholesky(kernel)
alpha = torch.cholesky_solve(y[:, None], factor)
loss = 0.5 * y @ alpha[:, 0] + factor.diagonal().log().sum() + 6 * math.log(2 * math.pi)
loss.backward()
print(loss.item(), log_length.grad.item(), log_scale.grad.item(), log_noise.grad.item())
