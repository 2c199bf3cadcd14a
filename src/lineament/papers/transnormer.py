"""transnormer: normalise the output instead of dividing by a sum."""

from typing import Any

from .record import Figure, Paper, Scales

RECORD = Paper(
    slug="transnormer",
    title="The Devil in Linear Transformer",
    authors="Qin, Han, Sun, Li, Kong, Barnes, Zhong",
    year=2022,
    venue="EMNLP 2022",
    arxiv="2210.10340",
    room=("nn", "ops"),
    status="works",
    summary=(
        "Kernel linear attention divides by a sum that can come near zero, so its gradients are unbounded, and "
        "it spreads attention over the whole sequence in early layers. TransNormer drops the division and "
        "normalises the output, and uses exact block-diagonal attention in the first half of the layers. "
        "Everything stays linear in length."
    ),
    claim=(
        "Without the division gradients have a ceiling, and block-diagonal early layers bring linear attention "
        "close to softmax."
    ),
    figures=(
        Figure(
            "text classification, language modelling and long-range arena",
            "better than vanilla and earlier linear transformers, with less time and memory",
            "abstract",
        ),
        Figure("WikiText-103 test perplexity: vanilla / T1 / T2", "31.01 / 31.35 / 31.01", "unverified"),
        Figure(
            "WikiText-103 test perplexity: 1+ELU / Performer / FLASH / LS",
            "34.25 / 77.65 / 34.63 / 32.59",
            "unverified",
        ),
    ),
    experiment=(
        "Exact gradients of one head as its inputs shrink, then character models T1 and T2 against softmax and "
        "1+ELU, and how far their first layers look. Holds if the divided form's largest gradient grows more than "
        "1e4 times while NormAttention's stays below 4 over the root of epsilon and softmax's within a factor 2, both "
        "variants beat 1+ELU by 0.08 nats within 0.10 of softmax, and their first layers keep to their blocks."
    ),
    code="OpenNLPLab/Transnormer (no licence file)",
    keywords=("linear attention", "normalisation", "gradient stability", "block-diagonal attention", "language model"),
    related=("lightning-attention-2", "lightnet", "hedgehog"),
)

SCALES = Scales(  # seeds, training steps. "smoke": the mechanics only; three seeds don't fit the time of "small"
    smoke=(1, 3), small=(2, 200), medium=(3, 200), full=(3, 2000),
)  # fmt: skip
EPS, SHRUNK = 1e-5, (1.0, 0.1, 0.01, 0.001)  # inside the norm's root; what the features are multiplied by
RULES = {  # fixed before the first run; losses are means over seeds; (at least, at most)
    "gradient of the divided form, last / first": (1e4, 1e12),
    "gradient of NormAttention, largest times root of eps": (0.0, 4.0),
    "gradient of softmax, largest / smallest": (1.0, 2.0),
    "nats T1 better than 1+ELU": (0.08, 99.0),
    "nats T2 better than 1+ELU": (0.08, 99.0),
    "nats T1 worse than softmax": (-99.0, 0.10),
    "nats T2 worse than softmax": (-99.0, 0.10),
    "first layer within 64 tokens, smallest of T1 and T2": (0.99, 1.0),  # by construction: its blocks have 64
}
NEAR = (32, 64)  # tokens, of 128
HALVES = {  # lower and upper half of the four layers, in TransNormer's block throughout
    "softmax": ("softmax", "softmax"), "1+ELU": ("linear", "linear"), "T1": ("diag-attention", "norm-attention"),
    "T2": ("diag-attention-t2", "norm-attention-t2"),
}  # fmt: skip


def experiment(scale: str = "small") -> Any:
    """Measure exact gradients as features shrink, then train four character models; returns `report.Evidence`."""
    import time

    from lineament.report import Evidence

    began, (seeds, steps) = time.perf_counter(), SCALES[scale]
    steep, (losses, near) = _gradients(), _trained(seeds, steps)
    mean = {arm: sum(of) / len(of) for arm, of in losses.items()}
    divided, norm, softmax = (list(of.values()) for of in steep.values())
    leads = [mean["1+ELU"] - mean["T1"], mean["1+ELU"] - mean["T2"]]
    gaps = [mean["T1"] - mean["softmax"], mean["T2"] - mean["softmax"]]
    ceilings = (divided[-1] / divided[0], max(norm) * EPS**0.5, max(softmax) / min(softmax))
    rows = [
        {"what": f"largest gradient, {form}", **{f"a={a:g}": g for a, g in of.items()}} for form, of in steep.items()
    ]
    rows += [{"what": f"{arm}, nats", "found": mean[arm], "seeds": losses[arm]} for arm in losses]
    rows += [{"what": f"{arm}, first layer's share of the last", **{f"{n} tokens": x for n, x in of.items()}}
             for arm, of in near.items()]  # fmt: skip
    inside = min(near[arm][64] for arm in ("T1", "T2"))
    return Evidence.judged(
        dict(zip(RULES, (*ceilings, *leads, *gaps, inside), strict=True)), RULES, verdict=scale != "smoke",
        name=RECORD.slug, claim=RECORD.claim, rows=rows, seeds=list(range(seeds)), seconds=time.perf_counter() - began,
    )  # fmt: skip


def _gradients() -> dict[str, dict[float, float]]:
    """Largest |do/ds_ij| of one causal head (64 tokens, 16 channels) whose 1+ELU features are multiplied by a."""
    import torch
    from torch import Tensor
    from torch.nn.functional import elu

    from lineament._base.seeds import generator
    from lineament.nn.norms import OutputNorm

    x = [torch.randn(64, 16, generator=generator(i), dtype=torch.float64) for i in range(3)]
    v, past = x[2], torch.ones(64, 64, dtype=torch.bool).tril()
    norm = OutputNorm(1, 16, over="simple", eps=EPS)
    forms = {
        "divided": lambda s: (s * past) @ v / (s * past).sum(-1, keepdim=True),
        "NormAttention": lambda s: norm(((s * past) @ v)[None, :, None])[0, :, 0],
        "softmax": lambda s: s.masked_fill(~past, -torch.inf).softmax(-1) @ v,
    }

    def largest(form: Any, a: float) -> float:
        q, k = (a * (1 + elu(part)) for part in x[:2])
        slopes: Tensor = torch.func.jacrev(lambda s: form(s))(q @ k.mT)  # [T, V, T, T]
        return slopes.abs().max().item()

    return {name: {a: largest(form, a) for a in SHRUNK} for name, form in forms.items()}


def _trained(seeds: int, steps: int) -> tuple[dict[str, list[float]], dict[str, dict[int, float]]]:
    """Losses in nats per character by seed, and the first layers' shares: 4 layers of width 64, equal parameters."""
    import torch

    from lineament import tasks
    from lineament.models import decoder_config, match_parameters

    text = tasks.characters()
    shape: dict[str, Any] = {"vocab_size": text.vocab, "width": 64, "layers": 4, "heads": 2}
    configs = {
        arm: decoder_config("transnormer-t1", ratio=[half for half in halves for _ in range(2)], **shape)
        for arm, halves in HALVES.items()
    }
    losses: dict[str, list[float]] = {arm: [] for arm in HALVES}
    near: dict[str, dict[int, float]] = {arm: dict.fromkeys(NEAR, 0.0) for arm in HALVES}
    for seed in range(seeds):
        for arm, config in configs.items():
            own = match_parameters(config, configs["softmax"])
            model = tasks.character_model(own, text, steps=steps, seed=seed)
            losses[arm].append(tasks.score_characters(model, text))
            weights = tasks.mixing_weights(model, text.test[:16])
            near[arm] = {n: x + tasks.near_share(weights, n) / seeds for n, x in near[arm].items()}
    even = torch.ones(1, 1, *[text.test.shape[1]] * 2).tril()
    return losses, near | {"equal weights": {n: tasks.near_share(even, n) for n in NEAR}}
