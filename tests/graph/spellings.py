"""One attention in several spellings, and small nets for pictures."""

import torch
import torch.nn.functional as F
from torch import nn


class Projected(nn.Module):
    def __init__(self, width=24, heads=4):
        super().__init__()
        self.heads = heads
        self.q, self.k, self.v, self.o = (nn.Linear(width, width) for _ in range(4))

    def split(self, x):
        b, t, _ = x.shape
        return (f(x).view(b, t, self.heads, -1).transpose(1, 2) for f in (self.q, self.k, self.v))


class View(Projected):
    def forward(self, x):
        q, k, v = self.split(x)
        weights = (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).softmax(-1)
        return self.o((weights @ v).transpose(1, 2).reshape(x.shape))


class Sdpa(Projected):
    causal = False

    def forward(self, x):
        q, k, v = self.split(x)
        out = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        return self.o(out.transpose(1, 2).flatten(2))


class Causal(Sdpa):
    causal = True


class Einsum(Projected):
    def forward(self, x):
        q, k, v = (f(x).unflatten(-1, (self.heads, -1)) for f in (self.q, self.k, self.v))
        weights = torch.einsum("bqhd,bkhd->bhqk", q * q.shape[-1] ** -0.5, k).softmax(-1)
        return self.o(torch.einsum("...hqk,...khd->...qhd", weights, v).flatten(2))


class Module(nn.Module):
    def __init__(self, weights):
        super().__init__()
        self.attention, self.weights = nn.MultiheadAttention(24, 4, batch_first=True), weights

    def forward(self, x):
        return self.attention(x, x, x, need_weights=self.weights)[0]


def attention(spelling):
    """Attention of width 24 with 4 heads, in eval mode."""
    torch.manual_seed(0)
    makers = {
        "view": View, "sdpa": Sdpa, "causal": Causal, "einsum": Einsum, "module": lambda: Module(False),
        "module with weights": lambda: Module(True),
    }  # fmt: skip
    return makers[spelling]().eval()


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


class UNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.down1, self.down2 = nn.Conv2d(1, 8, 3, padding=1), nn.Conv2d(8, 12, 3, padding=2, dilation=2)
        self.norm, self.up = nn.GroupNorm(4, 12), nn.ConvTranspose2d(12, 6, 3, 2, 1, 1)
        self.join, self.out = nn.Conv2d(14, 10, 3, padding=1, groups=2), nn.Conv2d(10, 2, 1)

    def forward(self, x):
        a = F.relu(self.down1(x))
        b = F.relu(self.norm(self.down2(F.max_pool2d(a, 2))))
        return self.out(F.silu(self.join(torch.cat([a, self.up(b)], 1))))


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
