"""A small image classifier: strided, grouped and dilated convolutions, batch norm, max pooling with ties, dropout."""

import torch
from torch import nn


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1, bias=False),
            nn.BatchNorm2d(8),
            nn.ReLU(inplace=True),
            nn.MaxPool2d(2),
            nn.Conv2d(8, 16, 3, stride=2, padding=1, groups=2),
            nn.BatchNorm2d(16),
            nn.ReLU(inplace=True),
            nn.Conv2d(16, 16, 3, padding=2, dilation=2),
            nn.AvgPool2d(2),
        )
        self.classifier = nn.Sequential(nn.Flatten(), nn.Dropout(0.4), nn.Linear(16 * 4, 10))

    def forward(self, x):
        return self.classifier(self.features(x))


torch.manual_seed(0)
model = Net()
images = torch.rand(4, 3, 16, 16)
images[:, :, :8] = 0.5
loss = nn.functional.cross_entropy(model(images), torch.randint(10, (4,)), label_smoothing=0.1)
loss.backward()
print(loss.item())
