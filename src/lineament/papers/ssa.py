"""ssa: train with random subsets of attention, test with ensembles of them."""

from itertools import pairwise
from typing import Any

from .record import Figure, Paper, Scales

RECORD = Paper(
    slug="ssa",
    title="The Information Pathways Hypothesis: Transformers are Dynamic Self-Ensembles",
    authors="Hussain, Zaki, Subramanian",
    year=2023,
    venue="KDD 2023",
    arxiv="2306.01705",
    room=("models", "nn", "ops"),
    status="works",
    summary=(
        "Trains a transformer with a random subset of attention sources, new in every layer and step, on the "
        "hypothesis that dense attention is an ensemble of sparse pathways. Cost falls, the randomness "
        "regularises, and a short dense tuning or an average over random sub-models improves on dense training. "
        "Weights and inference stay as they are."
    ),
    claim=(
        "Stochastically subsampled attention trains at a fraction of the cost without loss, and averaging "
        "sub-models is better than any single one."
    ),
    figures=(
        Figure("memory and compute of self-attention in training", "4 to 8 times less", "abstract"),
        Figure("PCQM4Mv2, validation MAE: EGT with SSA / with self-ensemble", "0.0876 / 0.0865", "secondary"),
        Figure(
            "WikiText-103, enwik8, CIFAR-10, ImageNet, image generation",
            "better than dense after tuning",
            "secondary",
        ),
    ),
    experiment=(
        "Digits as 64 pixel tokens: dense, unbiased and locally biased subsampling by 4, with the last tenth of "
        "the steps dense, 3 seeds. Holds if an ensemble of 16 has lower NLL than one sub-model in every arm, "
        "and the best subsampled arm is at most 0.5 points below dense training with a lower NLL."
    ),
    code="shamim-hussain/ssa (README only, no licence file)",
    keywords=("sparse attention", "subsampling", "self-ensemble", "regularisation", "training cost"),
    related=("tensor-attention", "clear"),
)

ARMS: dict[str, dict[str, Any] | None] = {
    "dense": None, "unbiased": {"mode": "unbiased", "reduction": 4}, "local": {"reduction": 4, "sigma": 16.0},
}  # fmt: skip
SCALES = Scales(  # seeds; layers, epochs, members of an ensemble, seed lists, test images. "smoke": the mechanics only
    smoke=(1, 1, 1, 2, 2, 100), small=(3, 3, 12, 16, 5, 597), full=(3, 4, 40, 16, 5, 597),
)  # fmt: skip
NOISE = 0.005  # nats by which an ensemble may be worse than one half its size
WAYS = ("dense pass", "one sub-model", "ensemble")


def experiment(scale: str = "small") -> Any:
    """Train dense and subsampled on digits as 64 pixel tokens; score a dense pass, one sub-model and an ensemble."""
    import time

    from lineament.report import Evidence

    began, seeds = time.perf_counter(), range(SCALES[scale][0])
    runs = [{arm: _run(arm, seed, *SCALES[scale][1:]) for arm in ARMS} for seed in seeds]
    curves = {arm: runs[0][arm].pop("curve") for arm in ARMS}
    mean = {arm: {k: sum(run[arm][k] for run in runs) / len(runs) for k in runs[0][arm]} for arm in ARMS}
    rules = _rules(mean, curves)
    return Evidence(
        name=RECORD.slug, claim=RECORD.claim,
        rows=[{"trained": arm, **mean[arm], "NLL by members, first seed, 200 images": curves[arm]} for arm in ARMS]
        + [{"trained": rule, "held": held} for rule, held in rules.items()],
        threshold="; ".join(rules), passed=None if scale == "smoke" else all(rules.values()),
        seeds=list(seeds), seconds=time.perf_counter() - began,
        notes="NLL in nats; a subsampled layer computes a quarter of the scores. Dense training's sub-models are "
        "unbiased ones.",
    )  # fmt: skip


def _rules(mean: dict[str, dict[str, float]], curves: dict[str, dict[int, float]]) -> dict[str, bool]:
    accuracy, nll = mean["dense"]["dense pass, accuracy"], mean["dense"]["dense pass, NLL"]
    ours = [(mean[arm][f"{way}, accuracy"], mean[arm][f"{way}, NLL"])
            for arm in ("unbiased", "local") for way in ("dense pass", "ensemble")]  # fmt: skip
    falling = [list(curve.values()) for curve in curves.values()]
    return {
        "the ensemble's NLL is below one sub-model's in every arm": all(
            of["ensemble, NLL"] < of["one sub-model, NLL"] for of in mean.values()
        ),
        "a subsampled arm, dense pass or ensemble, is within 0.5 points of dense training and has lower NLL": any(
            a >= accuracy - 0.005 and b < nll for a, b in ours
        ),
        f"NLL does not rise by more than {NOISE} when an ensemble doubles": all(
            b <= a + NOISE for curve in falling for a, b in pairwise(curve)
        ),
    }


def _run(arm: str, seed: int, layers: int, epochs: int, members: int, lists: int, tested: int) -> dict[str, Any]:
    import math
    from contextlib import nullcontext

    import torch
    from transformers import IJepaConfig, IJepaForImageClassification

    from lineament import data, models, nn, train
    from lineament._base.seeds import seeded

    learning, held_out = data.normalized([data.load_images("digits", split=split) for split in ("train", "test")])
    held_out, draw = held_out[:tested], data.image_batches(learning, 50, seed=seed)
    how = nn.Subsampling(**(ARMS[arm] or ARMS["unbiased"] or {}))
    with seeded(seed):
        model = IJepaForImageClassification(
            IJepaConfig(
                image_size=8, patch_size=1, num_channels=1, num_labels=10, hidden_size=48, intermediate_size=192,  # pyright: ignore[reportCallIssue]
                num_attention_heads=4, num_hidden_layers=layers, attn_implementation="sdpa",  # pyright: ignore[reportCallIssue]
                initializer_range=48**-0.5,  # the default .02 is for wide models: 12 epochs then end at 59 % (dense)
            )
        )  # fmt: skip

    def learn(first: int, steps: int, lr: float) -> None:
        config = train.FitConfig(steps=steps, lr=lr, warmup=min(20, steps // 2), seed=seed * 1000 + first)
        loss = lambda m, b: (m(pixel_values=b[0], labels=b[1]).loss, {})  # noqa: E731
        train.fit(model.train(), lambda step: draw(first + step), loss, config)

    def score(log_p: torch.Tensor, way: str) -> dict[str, float]:
        hits, nll = log_p.argmax(-1) == held_out.labels, torch.nn.functional.nll_loss(log_p, held_out.labels)
        return {f"{way}, accuracy": hits.float().mean().item(), f"{way}, NLL": nll.item()}

    steps = epochs * (len(learning) // 50)
    with models.subsampled(model, how) if ARMS[arm] else nullcontext():
        learn(0, steps - steps // 10, 2e-3)
    learn(steps - steps // 10, steps // 10, 2e-4)  # dense, at a low rate
    with torch.no_grad():
        found: dict[str, Any] = score(model.eval()(held_out.pixels).logits.log_softmax(-1), "dense pass")
    one = torch.stack(
        [models.self_ensemble(model, how, members=1, seed=i, pixel_values=held_out.pixels) for i in range(members)]
    )
    single = [score(member, "one sub-model") for member in one]
    found |= {key: sum(of[key] for of in single) / members for key in single[0]}
    found |= score(one.logsumexp(0) - math.log(members), "ensemble")
    if seed:
        return found
    held_out, curve = held_out[:200], {2**i: 0.0 for i in range(members.bit_length())}
    for seeds in torch.arange(lists * members).split(members):
        one = [models.self_ensemble(model, how, members=1, seed=int(i), pixel_values=held_out.pixels) for i in seeds]
        for size in curve:
            curve[size] += score(torch.stack(one[:size]).logsumexp(0) - math.log(size), "")[", NLL"] / lists
    return found | {"curve": curve}
