"""Models that every peer builds from the same seed, with torch (and transformers) alone."""

import time
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

COMPOSITES = ("epsilon-plus", "epsilon-plus-flat", "epsilon-alpha2-beta1", "epsilon-gamma-box", "epsilon")


class Sum(nn.Module):
    """Adds along the last axis; a module, since some peers see nothing else."""

    def forward(self, x: Tensor) -> Tensor:
        return x.sum(-1)


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(width, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU(),
            nn.Conv2d(width, width, 3, padding=1), nn.BatchNorm2d(width),
        )  # fmt: skip
        self.sum, self.relu = Sum(), nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.relu(self.sum(torch.stack([self.body(x), x], -1)))


def image_model(name: str) -> tuple[nn.Module, Tensor]:
    """Return "vgg", the same with average pooling ("vgg-average"), or "resnet", with pictures, in float64.

    "vgg-large" and "vgg-large-average" are what is timed: wider, on larger pictures, in float32.
    """
    torch.manual_seed(0)
    large = "large" in name
    widths, size, dtype = ((64, 128, 256), 64, torch.float32) if large else ((16, 32, 32), 32, torch.float64)
    if name.startswith("vgg"):
        layers: list[nn.Module] = []
        pool = nn.AvgPool2d if name.endswith("average") else nn.MaxPool2d
        for before, after in pairwise((3, *widths)):
            layers += [nn.Conv2d(before, after, 3, padding=1), nn.ReLU(), pool(2)]
        model = nn.Sequential(
            *layers, nn.Flatten(), nn.Linear(widths[-1] * (size // 8) ** 2, 64), nn.ReLU(), nn.Linear(64, 10)
        )
    else:
        first = nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU()
        model = nn.Sequential(*first, Block(16), Block(16), nn.AvgPool2d(8), nn.Flatten(), nn.Linear(256, 10))
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean, std=0.3)
            nn.init.uniform_(module.running_var, 0.5, 2.0)
            nn.init.normal_(module.weight, 1.0, 0.2)
            nn.init.normal_(module.bias, std=0.2)
        elif isinstance(module, nn.Conv2d | nn.Linear):
            nn.init.normal_(module.bias, std=0.1)
    return model.eval().to(dtype), torch.randn(2, 3, size, size, dtype=dtype)


def language_model(layers: int = 4, width: int = 64, length: int = 32) -> tuple[nn.Module, Tensor]:
    """Return a random Llama with token numbers."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=1000, hidden_size=width, intermediate_size=8 * width // 3, num_hidden_layers=layers,
        num_attention_heads=width // 16, num_key_value_heads=width // 32, max_position_embeddings=1024,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    torch.manual_seed(1)  # versions of transformers draw their first weights in different ways
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() > 1:
                p.normal_(std=p.shape[-1] ** -0.5)
    return model, torch.randint(0, 1000, (1, length))


def saved_model(folder: str, length: int) -> tuple[nn.Module, Tensor]:
    """Return a Llama from a folder, with token numbers."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig.from_pretrained(folder)
    config.rope_theta = config.rope_parameters["rope_theta"]  # the peer's transformers knows this name only
    model = LlamaForCausalLM.from_pretrained(folder, config=config).float().eval()
    torch.manual_seed(1)
    return model, torch.randint(0, 40_000, (1, length))


def seconds(run: Callable[[], Any], repeats: int = 3) -> float:
    """Return the smallest CPU time of a few runs, after one to warm up."""
    run()
    found = []
    for _ in range(repeats):
        began = time.process_time()
        run()
        found.append(time.process_time() - began)
    return min(found)
