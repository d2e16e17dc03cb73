import numpy as np
import torch

tensor0d = torch.tensor(1)
tensor1d = torch.tensor([1, 2, 3])
tensor2d = torch.tensor([[1, 2], [3, 4]])
tensor3d = torch.tensor([[[1, 2], [3, 4]], [[5, 6], [7, 8]]])
for tensor in (tensor0d, tensor1d, tensor2d, tensor3d):
    print(tensor.ndim, tensor.shape, tensor.dtype)

print(tensor1d.dtype)
floatvec = torch.tensor([1.0, 2.0, 3.0])
print(floatvec.dtype)
floatvec = tensor1d.to(torch.float32)
print(floatvec.dtype)

print(tensor2d.reshape(4, 1))
print(tensor2d.view(4, 1))
print(tensor2d.T)
print(tensor2d.matmul(tensor2d.T))
print(tensor2d @ tensor2d.T)

array = np.array([[1.0, 2.0], [3.0, 4.0]])
copied = torch.tensor(array)
shared = torch.from_numpy(array)
array[0, 0] = 9.0
print(copied[0, 0].item(), shared[0, 0].item(), shared.dtype)
print(tensor3d.numpy().shape, floatvec.numpy().dtype)
