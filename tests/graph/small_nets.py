"""Small nets for pictures, with everything that convolutions do."""

import torch
import torch.nn.functional as F
from torch import nn

from lineament.graph.diagrams.examples import UNet


class Block(nn.Module):
    def __init__(self, inward, outward, stride):
        super().__init__()
        self.conv1 = nn.Conv2d(inward, outward, 3, stride, 1, bias=False)
        self.conv2 = nn.Conv2d(outward, outward, 3, 1, 1, bias=False)
        self.norm1, self.norm2 = nn.BatchNorm2d(outward), nn.BatchNorm2d(outward)
        self.relu = nn.ReLU(inplace=True)
        self.short = nn.Conv2d(inward, outward, 1, stride, bias=False) if stride != 1 else nn.Identity()

    def forward(self, x):
        out = self.norm2(self.conv2(self.relu(self.norm1(self.conv1(x)))))
        out += self.short(x)
        return self.relu(out)


class ResNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 4, 7, 2, 3), nn.ReLU(), nn.MaxPool2d(3, 2, 1))
        self.blocks = nn.Sequential(Block(4, 4, 1), Block(4, 4, 1), Block(4, 6, 2), Block(6, 6, 1))
        self.pool, self.out = nn.AdaptiveAvgPool2d(1), nn.Linear(6, 5)

    def forward(self, x):
        return self.out(self.pool(self.blocks(self.stem(x))).flatten(1))


class Depthwise(nn.Module):
    """Depthwise convolution, squeeze and excitation, bicubic-free enlargement."""

    def __init__(self):
        super().__init__()
        self.a, self.depthwise = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 3, padding="same", groups=8)
        self.squeeze, self.excite, self.shuffle = nn.Linear(8, 4), nn.Linear(4, 8), nn.PixelShuffle(2)

    def forward(self, x):
        x = F.hardswish(self.depthwise(F.relu6(self.a(x))))
        x = x * torch.sigmoid(self.excite(F.relu(self.squeeze(x.mean((2, 3))))))[:, :, None, None]
        return F.interpolate(F.avg_pool2d(self.shuffle(x), 2), scale_factor=2)


VISION = {"ResNet": (ResNet, 3), "U-Net": (UNet, 1), "depthwise": (Depthwise, 3)}


def vision(name):
    """A net in eval mode with statistics that are no identity, and a picture for it."""
    torch.manual_seed(0)
    maker, channels = VISION[name]
    net = maker().eval()
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
    return net, torch.randn(2, channels, 16, 16)
