"""Twelve kinds of architecture, each with an example call and the order of its group in closed form."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn

from lineament._base.seeds import seeded
from lineament.nn import Mixer, MixerConfig, Slots

IDS = torch.tensor([[1, 2, 3, 4]])
TEXT = {"input_ids": IDS, "use_cache": False}


def lg(n: int) -> float:
    """log10 n!"""
    return math.lgamma(n + 1) / math.log(10)


@dataclass(frozen=True)
class Kind:
    """An architecture: how it is built, an example call, log10 |G| and the number of free classes."""

    build: Callable[[], nn.Module]
    order: float
    free: int
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)

    def model(self, seed: int = 0) -> nn.Module:
        with seeded(seed):
            return self.build().eval()


class BasicBlock(nn.Module):
    def __init__(self, inward: int, outward: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inward, outward, 3, stride, 1, bias=False)
        self.bn1, self.bn2 = nn.BatchNorm2d(outward), nn.BatchNorm2d(outward)
        self.conv2 = nn.Conv2d(outward, outward, 3, 1, 1, bias=False)
        self.shortcut = nn.Sequential()
        if stride != 1 or inward != outward:
            self.shortcut = nn.Sequential(nn.Conv2d(inward, outward, 1, stride, bias=False), nn.BatchNorm2d(outward))

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))) + self.shortcut(x))


class ResNet20(nn.Module):
    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width)
        sizes = [(width, width, 1), (width, 2 * width, 2), (2 * width, 4 * width, 2)]
        for i, (a, b, stride) in enumerate(sizes, 1):
            setattr(
                self, f"layer{i}", nn.Sequential(BasicBlock(a, b, stride), BasicBlock(b, b, 1), BasicBlock(b, b, 1))
            )
        self.linear = nn.Linear(4 * width, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        return self.linear(self.layer3(self.layer2(self.layer1(x))).mean((2, 3)))


class Separable(nn.Module):
    """Depthwise and grouped convolutions with squeeze and excitation."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.depthwise = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.b, self.grouped = nn.Conv2d(8, 12, 1), nn.Conv2d(12, 20, 3, padding=1, groups=4)
        self.squeeze, self.excite = nn.Linear(20, 5), nn.Linear(5, 20)
        self.c, self.out = nn.Conv2d(20, 6, 1), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.grouped(F.relu(self.b(F.relu(self.depthwise(F.relu(self.a(x))))))))
        x = x * torch.sigmoid(self.excite(F.relu(self.squeeze(x.mean((2, 3))))))[:, :, None, None]
        return self.out(F.relu(self.c(x)).mean((2, 3)))


class UNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.down1, self.down2 = nn.Conv2d(1, 8, 3, padding=1), nn.Conv2d(8, 12, 3, padding=1)
        self.norm, self.up = nn.GroupNorm(4, 12), nn.ConvTranspose2d(12, 6, 2, 2)
        self.join, self.out = nn.Conv2d(14, 10, 3, padding=1), nn.Conv2d(10, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        a = F.relu(self.down1(x))
        b = F.relu(self.norm(self.down2(F.max_pool2d(a, 2))))
        return self.out(F.silu(self.join(torch.cat([a, self.up(b)], 1))))


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.lstm, self.out = nn.Embedding(19, 8), nn.LSTM(8, 16, 2, batch_first=True), nn.Linear(16, 19)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.lstm(self.embed(x))[0])


def vgg() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(8, 12, 3, padding=1), nn.ReLU(),
        nn.MaxPool2d(2), nn.Flatten(), nn.Linear(12 * 4, 20), nn.ReLU(), nn.Linear(20, 5),
    )  # fmt: skip


def mixer() -> nn.Module:
    shape = {"heads": 4, "key_heads": 2, "key_width": 8, "value_width": 8, "model_width": 32}
    layer = Mixer(MixerConfig(kind="gated-deltanet", **shape), Slots(conv=4, output_norm="head"))
    return nn.Sequential(nn.Linear(5, 32), layer, nn.Linear(32, 3))


def llama(**changes: Any) -> nn.Module:
    shape: dict[str, Any] = {
        "vocab_size": 19, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 8,
        "num_key_value_heads": 2, "head_dim": 4,
    }  # fmt: skip
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**shape | changes))


def mixtral() -> nn.Module:
    shape: dict[str, Any] = {
        "vocab_size": 19, "hidden_size": 32, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 8,
        "num_key_value_heads": 2, "head_dim": 4, "num_local_experts": 4,
    }  # fmt: skip
    model = transformers.MixtralForCausalLM(transformers.MixtralConfig(**shape))
    model.set_experts_implementation("batched_mm")
    return model


def gpt2() -> nn.Module:
    ends = {"bos_token_id": 0, "eos_token_id": 0}
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(vocab_size=19, n_embd=24, n_head=4, n_layer=2, **ends))


def bert() -> nn.Module:
    shape: dict[str, Any] = {"hidden_size": 24, "num_attention_heads": 4, "num_hidden_layers": 2}
    return transformers.BertForMaskedLM(transformers.BertConfig(vocab_size=19, intermediate_size=40, **shape))


def vit() -> nn.Module:
    shape: dict[str, Any] = {"hidden_size": 24, "num_attention_heads": 4, "num_hidden_layers": 2}
    config = transformers.ViTConfig(intermediate_size=40, image_size=8, patch_size=4, num_labels=5, **shape)
    return transformers.ViTForImageClassification(config)


ATTENTION = lg(4) + 4 * lg(6) + 4 * lg(6)  # heads; q and k channels of each; v and o channels of each
KINDS = {
    "MLP": Kind(
        lambda: nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.ReLU(), nn.Linear(8, 7), nn.Tanh(), nn.Linear(7, 3)),
        lg(8) + lg(7), 2, (torch.zeros(2, 4),),
    ),
    "VGG": Kind(vgg, lg(8) + lg(12) + lg(20), 3, (torch.zeros(1, 3, 8, 8),)),
    "ResNet with shortcuts": Kind(ResNet20, 4 * (lg(16) + lg(32) + lg(64)), 12, (torch.zeros(2, 3, 16, 16),)),
    "grouped and depthwise conv": Kind(
        Separable, lg(8) + lg(4) + 4 * lg(3) + 4 * lg(5) + lg(5) + lg(6), 6, (torch.zeros(1, 3, 8, 8),)
    ),
    "ViT": Kind(vit, lg(24) + 2 * (ATTENTION + lg(40)), 9, (torch.zeros(1, 3, 8, 8),)),
    "GPT-2": Kind(gpt2, lg(24) + 2 * (ATTENTION + lg(96)), 9, kwargs=TEXT),
    "Llama": Kind(llama, lg(32) + 2 * (lg(2) + 2 * lg(4) + 2 * lg(4) + lg(48)), 9, kwargs=TEXT),
    "BERT": Kind(bert, lg(24) + 2 * (ATTENTION + lg(40)), 9, kwargs={"input_ids": IDS}),
    "Mixture of experts": Kind(
        mixtral, lg(32) + 2 * (lg(2) + 4 * lg(4) + lg(4) + 4 * lg(24)), 11, kwargs=TEXT
    ),
    "U-Net": Kind(UNet, lg(8) + lg(4) + 4 * lg(3) + lg(6) + lg(10), 5, (torch.zeros(1, 1, 8, 8),)),
    "LSTM": Kind(Recurrent, lg(8) + 2 * lg(16), 3, (IDS,)),
    "Gated DeltaNet": Kind(
        mixer, 2 * lg(32) + lg(2) + 2 * lg(2) + 2 * lg(8) + lg(8) + lg(8), 7, (torch.zeros(1, 5, 5),)
    ),
}  # fmt: skip
