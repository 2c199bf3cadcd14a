"""hyperzzw: image-sized generated kernels instead of residuals and attention."""

from typing import Any

from .record import Figure, Paper, Scales

RECORD = Paper(
    slug="hyperzzw",
    title="HyperZ·Z·W Operator Connects Slow-Fast Networks for Full Context Interaction",
    authors="Harvie Zhang",
    year=2024,
    venue=None,
    arxiv="2401.17948",
    room=("nn", "models", "ops"),
    status="works",
    summary=(
        "Does away with residual links and attention: a slow network maps coordinates to kernels of the image's "
        "own size, and multiplying them with the activations gives weights that depend on the context and act "
        "on those same activations. Many such branches are concentrated by a bottleneck, and standardisation "
        "without learned parameters keeps features centred."
    ),
    claim=(
        "Multiplying hyper-kernels with activations mixes the full context in every layer without a loss of "
        "accuracy against the hyper-kernels alone."
    ),
    figures=(
        Figure("CIFAR-10, 100 epochs", "95.3 %", "repository"),
        Figure("CIFAR-100, 100 epochs", "75.7 %", "repository"),
        Figure("sMNIST, pMNIST, sCIFAR10, STL-10", "strong with fewer parameters", "unverified"),
    ),
    experiment=(
        "Two blocks on 8x8 digits with the full operator, with kernels alone, and a CNN of equal parameters, 3 "
        "seeds. Holds if the full operator's mean accuracy is at most 0.5 points below the kernels alone and "
        "both reach 90 %; the CNN is reported whatever it scores."
    ),
    code="hyperevolnet/Terminator (code withdrawn, no licence)",
    keywords=(
        "hyper-kernel",
        "implicit network",
        "context-dependent convolution",
        "image classification",
        "terminator",
    ),
    related=("care-transformer", "tensor-attention"),
)

SCALES = Scales(smoke=(1, 1, 100), small=(3, 10, 550), full=(5, 40, 550))  # seeds, epochs, test images
HIDDEN = ("global_hidden", "local_hidden", "channel_hidden", "gate_hidden", "space_hidden")
ARMS: dict[str, dict[str, Any]] = {  # those marked "once" run for the first seed alone
    "Z * W": {}, "W alone": {"gated": False}, "CNN": {"cnn": True}, "kernels frozen": {"frozen": True, "once": True},
    "no slow loss": {"slow": 0.0, "once": True}, "Z * W on sequences of 64": {"axes": 1, "once": True},
}  # fmt: skip
RULES = {  # fixed before the first run; (at least, at most)
    "accuracy, Z * W minus W alone": (-0.005, 2.0), "accuracy, Z * W": (0.9, 2.0), "accuracy, W alone": (0.9, 2.0),
    "largest channel mean after standardisation": (0.0, 1e-5),
}  # fmt: skip


def experiment(scale: str = "small") -> Any:
    """Train two blocks on digits with the full operator and with kernels alone, beside a CNN of as many parameters."""
    import time

    from lineament.report import Evidence

    began, seeds = time.perf_counter(), range(SCALES[scale][0])
    runs = {arm: [_run(seed, *SCALES[scale][1:], **{k: v for k, v in how.items() if k != "once"})
                  for seed in (seeds[:1] if "once" in how else seeds)] for arm, how in ARMS.items()}  # fmt: skip
    mean = {arm: {key: sum(run[key] for run in of) / len(of) for key in of[0]} for arm, of in runs.items()}
    full, alone = mean["Z * W"]["accuracy"], mean["W alone"]["accuracy"]
    found = (full - alone, full, alone, max(run["channel mean"] for run in runs["Z * W"]))
    return Evidence.judged(
        dict(zip(RULES, found, strict=True)), RULES, verdict=scale != "smoke", name=RECORD.slug, claim=RECORD.claim,
        rows=[{"arm": arm, **of, "runs": len(runs[arm]), "each": [run["accuracy"] for run in runs[arm]]}
              for arm, of in mean.items()],
        seeds=list(seeds), seconds=time.perf_counter() - began,
        notes="Tested in batches of 50: answers depend on the batch.",
    )  # fmt: skip


def _run(
    seed: int, epochs: int, tested: int, *, gated: bool = True, cnn: bool = False, frozen: bool = False,
    slow: float = 1.0, axes: int = 2,
) -> dict[str, float]:  # fmt: skip
    import time
    import warnings

    import torch

    from lineament import data, graph, models, nn, train
    from lineament._base.seeds import seeded

    learning, held_out = data.normalized([data.load_images("digits", split=split) for split in ("train", "test")])
    draw, shape = data.image_batches(learning, 50, seed=seed), (-1, 1, *[8 if axes == 2 else 64] * axes)
    with seeded(seed):
        config = models.TerminatorConfig(
            blocks=nn.HyperConfig(size=shape[-1], axes=axes, gated=gated, **dict.fromkeys(HIDDEN, 24)), channels=1,
            classes=10, factors=(12, 2), layers=(2, 2), dropout=(0.0, 0.05), before=((), ()),
        )  # fmt: skip
        net: Any = models.Terminator(config)
        if cnn:
            size = _parameters(net)
            net = min((_cnn(width) for width in range(16, 96)), key=lambda made: abs(_parameters(made) - size))
    if frozen:
        for module in graph.select(net, lambda name, m: type(m) is nn.HyperKernel).values():  # not the local ones
            module.requires_grad_(False)

    def loss(model: Any, batch: Any) -> Any:
        out = model(batch[0] if cnn else batch[0].view(shape))
        logits, spread = (out, 0.0) if cnn else out
        return torch.nn.functional.cross_entropy(logits, batch[1], label_smoothing=0.1) + slow * spread, {}

    steps = epochs * (len(learning) // 50)
    began = time.process_time()
    train.fit(net.train(), draw, loss, train.FitConfig(steps=steps, lr=3e-3, warmup=min(20, steps // 2), seed=seed))
    spent, images = time.process_time() - began, held_out.pixels[:tested]
    where = "blocks.*.standardize" if not cnn else "1"
    with torch.no_grad(), graph.capture(net.eval(), where) as seen, warnings.catch_warnings(action="ignore"):
        outs = [net(part if cnn else part.view(shape)) for part in images.split(50)]
    logits = torch.cat([out if cnn else out.logits for out in outs])
    means = [x.mean((0, *range(2, x.dim()))).abs().max().item() for calls in seen.values() for x in calls]
    return {
        "accuracy": (logits.argmax(1) == held_out.labels[:tested]).double().mean().item(),
        "parameters": _parameters(net), "seconds of CPU per epoch": spent / epochs, "channel mean": max(means),
    }  # fmt: skip


def _cnn(width: int) -> Any:
    from torch.nn import AdaptiveAvgPool2d, BatchNorm2d, Conv2d, Flatten, Linear, ReLU, Sequential

    layers = [(Conv2d(c, width, 3, padding=1), BatchNorm2d(width), ReLU()) for c in (1, width, width)]
    return Sequential(*[part for layer in layers for part in layer], AdaptiveAvgPool2d(1), Flatten(), Linear(width, 10))


def _parameters(net: Any) -> int:
    return sum(p.numel() for p in net.parameters())
