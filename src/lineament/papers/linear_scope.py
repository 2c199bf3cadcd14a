"""linear-scope: the affine map a network is for one input, kept runnable."""

from typing import Any

from .record import Figure, Paper, Scales

RECORD = Paper(
    slug="linear-scope",
    title="A Tour of Convolutional Networks Guided by Linear Interpreters",
    authors="Navarrete Michelini, Liu, Lu, Jiang",
    year=2019, venue="ICCV 2019", arxiv="1908.05168", room=("explain",), status="works",
    summary=(
        "For a fixed input a network acts as an affine map, and this system keeps that map runnable: half of the "
        "batch is the real input, the other half are probes that follow the decisions of the first half. Columns, "
        "rows, singular vectors and the response to biases can then be read without building the map."
    ),
    claim=(
        "The output equals the interpreted linear map plus its bias response exactly, and their shares show how much "
        "a decision rests on biases."
    ),
    figures=(
        Figure("ImageNet classifiers", "vote per pixel and lean heavily on biases", "secondary"),
        Figure("super-resolution, image translation", "wavelet-like bases; copying, moving and templates", "secondary"),
        Figure("share of the bias in a decision", "not available", "unverified"),
    ),
    experiment=(
        "A digit CNN is replayed as its affine map, decisions are split into linear and bias part, and a small super-"
        "resolution net is compared with bicubic rows. Holds if map plus bias equals the output and the map equals "
        "the Jacobian to float precision; the bias share is reported, and rows should be clearly more elongated at "
        "edges than on flat pixels."
    ),
    code=None, related=("dynamic-lrp", "relp", "level-set-traversal"),
    keywords=(
        "linear interpreter", "affine map", "jacobian", "singular value decomposition", "cnn", "super-resolution",
        "bias",
    ),
)  # fmt: skip

SCALES = Scales(  # seeds and steps of digits; steps of super-resolution, pixels whose rows are read of either kind
    smoke=(1, 4, 4, 2), small=(3, 540, 800, 60), full=(5, 540, 4000, 200),
)  # fmt: skip
RULES = {  # fixed before the first run: the worst seed of each; (at least, at most)
    "largest |A x + r - f| / largest |f|": (0.0, 1e-5),
    "largest |A - Jacobian| / largest |A|": (0.0, 1e-5),
    "largest |r| of the net without biases": (0.0, 1e-6),
    "anisotropy of rows, edges / flat pixels": (1.2, 99.0),
}
ARMS = {"as they are": (True, False), "standardised": (True, True), "without biases": (False, False)}  # biases, inputs


def experiment(scale: str = "small") -> Any:
    """Replay digit classifiers and a super-resolution net as affine maps; return `report.Evidence`."""
    import time

    from lineament.report import Evidence

    began, (seeds, steps, enlarging, pixels) = time.perf_counter(), SCALES[scale]
    rows = [_digits(seed, arm, steps) for seed in range(seeds) for arm in ARMS]
    rows.append(_enlarging(enlarging, pixels))
    found = (
        max(row["error"] for row in rows), max(row.get("beside the Jacobian", 0.0) for row in rows),
        max(row["largest |r|"] for row in rows if row["net"] == "without biases"),
        rows[-1]["anisotropy, edges"] / rows[-1]["anisotropy, flat"],
    )  # fmt: skip
    return Evidence.judged(
        dict(zip(RULES, found, strict=True)), RULES, verdict=scale != "smoke", name=RECORD.slug, claim=RECORD.claim,
        rows=rows, seeds=list(range(seeds)), seconds=time.perf_counter() - began,
        notes="Shares of the bias are of the margin before the runner-up and of |r| + |A x| on the winning logit.",
    )  # fmt: skip


def _digits(seed: int, arm: str, steps: int) -> dict[str, Any]:
    """Train one classifier; split every decision on the test digits into A x and r."""
    import torch
    from torch import nn

    from lineament import data, explain, train
    from lineament._base.seeds import seeded
    from lineament.tasks.classify import class_loss

    bias, standardised = ARMS[arm]
    known, unseen = (data.load_images("digits", split=split) for split in ("train", "test"))
    known, unseen = data.normalized([known, unseen]) if standardised else (known, unseen)
    with seeded(seed):
        net = nn.Sequential(
            nn.Conv2d(1, 16, 3, padding=1, bias=bias), nn.ReLU(), nn.Conv2d(16, 32, 3, padding=1, bias=bias), nn.ReLU(),
            nn.MaxPool2d(2), nn.Conv2d(32, 32, 3, padding=1, bias=bias), nn.ReLU(), nn.Flatten(),
            nn.Linear(512, 10, bias),
        )  # fmt: skip
    train.fit(net, data.image_batches(known, 64, seed=seed), class_loss, train.FitConfig(steps=steps, lr=2e-3))
    net.eval()
    found, labels = explain.scope(net, unseen.pixels), unseen.labels
    Ax, r, f = found.linear(found.input), found.bias, found.output
    one = unseen.pixels[:1]
    A, J = explain.scope(net, one).columns(*range(64)).view(64, 10), torch.func.jacrev(net)(one).view(10, 64)
    two = f.topk(2).indices
    margins, winning = ([y.gather(1, two).diff() for y in (r, f)], [y.gather(1, two[:, :1]).abs() for y in (r, Ax)])
    right = [(scores.argmax(1) == labels).float().mean().item() for scores in (f, Ax, r)]
    return {
        "net": arm, "seed": seed, "accuracy": right[0], "of A x alone": right[1], "of r alone": right[2],
        "bias in the margin, median": (margins[0] / margins[1]).median().item(),
        "bias in the logit, median": (winning[0] / sum(winning)).median().item(), "largest |r|": r.abs().max().item(),
        "error": found.error, "beside the Jacobian": ((A.T - J).abs().max() / A.abs().max()).item(),
    }  # fmt: skip


def _enlarging(steps: int, count: int) -> dict[str, Any]:
    """Train a x2 super-resolution net; compare rows of its map at edges with rows at flat pixels."""
    import torch
    from torch import nn
    from torch.nn.functional import avg_pool2d

    from lineament import data, explain, train
    from lineament._base.seeds import generator, seeded
    from lineament.nn import Residual
    from lineament.tasks import psnr, restoration_loss

    sharp, held_out = (data.load_patches(32, split=part, stride=8) for part in ("train", "test"))
    with seeded(0):
        convolutions = [nn.Conv2d(a, b, 3, padding=1) for a, b in ((1, 32), (32, 32), (32, 32), (32, 1))]
    bicubic = nn.Upsample(scale_factor=2, mode="bicubic")
    net = nn.Sequential(bicubic, Residual(nn.Sequential(*[x for c in convolutions for x in (c, nn.ReLU())][:-1])))

    def draw(step: int) -> tuple[torch.Tensor, torch.Tensor]:
        at = torch.randint(len(sharp), (16,), generator=generator(step))
        return avg_pool2d(sharp[at], 2), sharp[at]

    train.fit(net, draw, restoration_loss, train.FitConfig(steps=steps, lr=1e-3, warmup=20))
    net.eval()
    low, shares = avg_pool2d(held_out, 2), []
    order = sum(d.square() for d in torch.gradient(held_out[:, 0], dim=(1, 2)))[:, 8:24, 8:24].flatten().argsort()
    chosen = {"flat": order[: len(order) // 2], "edges": order[-len(order) // 20 :]}
    spread: dict[str, list[float]] = {kind: [] for kind in chosen}
    for kind, places in chosen.items():
        for place in places[torch.randperm(len(places), generator=generator(1))[:count]].tolist():
            patch, y, x = place // 256, 8 + place // 16 % 16, 8 + place % 16
            found = explain.scope(net, low[patch : patch + 1])
            spread[kind].append(explain.anisotropy(found.rows((0, 0, y, x))[0, 0, 0]))
            shares.append((float(found.bias[0, 0, y, x] / found.output[0, 0, y, x]), found.error))
    middle = {f"anisotropy, {kind}": torch.tensor(values).median().item() for kind, values in spread.items()}
    kernel = explain.scope(bicubic.double(), low[:1].double()).rows((0, 0, 16, 16))[0, 0, 0]
    return {
        "net": "x2 super-resolution", "PSNR, dB": psnr(net, low, held_out), **middle,
        "PSNR of bicubic": psnr(bicubic, low, held_out), "anisotropy of bicubic": explain.anisotropy(kernel),
        "r / f, median": torch.tensor(shares)[:, 0].median().item(), "error": max(error for _, error in shares),
    }  # fmt: skip
