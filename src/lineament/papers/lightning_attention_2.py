"""lightning-attention-2: causal linear attention in tiles: exact, and linear in practice."""

from typing import Any

from .record import Figure, Paper, Scales

RECORD = Paper(
    slug="lightning-attention-2",
    title=("Lightning Attention-2: A Free Lunch for Handling Unlimited Sequence Lengths in Large Language Models"),
    authors="Qin, Sun, Li, Shen, Sun, Zhong",
    year=2024,
    venue=None,
    arxiv="2401.04658",
    room=("ops", "nn"),
    status="works",
    summary=(
        "Computes causal linear attention with a fixed decay per head in tiles: products left to right inside a "
        "tile, one carried state between tiles. The result is exact, time grows linearly with length and "
        "activation memory too, forward and backward. It is the operator of TransNormerLLM and MiniMax-Text."
    ),
    claim=(
        "Tiling makes causal linear attention linear in practice, much faster than the token loop and than "
        "quadratic attention at long lengths."
    ),
    figures=(
        Figure(
            "forward, batch 4, 32 heads of 128, T = 32768: tiled / FlashAttention-2", "17.7 / 162.9 ms", "repository"
        ),
        Figure("backward, same: tiled / FlashAttention-2", "74.6 / 470.7 ms", "repository"),
        Figure("crossover against FlashAttention-2, forward", "between T = 2048 and 4096", "repository"),
        Figure("memory, backward, T = 32768: tiled / FlashAttention-2", "11,110 / 13,190 MB", "repository"),
        Figure("0.4B model, loss against Lightning Attention-1", "difference about 0.001", "unverified"),
    ),
    experiment=(
        "Timing of the tiled form against dense, token loop, materialised sums and softmax on one thread up to "
        "T = 8192; then a character model beside softmax and 1+ELU. Holds if the tiled exponent is at most 1.25 "
        "and the dense one at least 1.7, tiles are 3 times faster than loop and sums at 2048 and faster than "
        "dense at 4096, and the model beats 1+ELU by 0.08 nats within 0.10 of softmax."
    ),
    code="OpenNLPLab/lightning-attention (MIT)",
    keywords=("linear attention", "tiling", "decay", "long context", "kernel", "recurrence", "minimax"),
    related=("transnormer", "deltanet", "lightnet"),
)

LENGTHS = (512, 1024, 2048, 4096, 8192)
LONGEST = {"dense": 4096, "token loop": 4096, "sums": 2048}  # memory and patience of the slow ones
SCALES = Scales(  # seeds, training steps, repeats of a timing, longest text. "smoke": the mechanics only
    smoke=(1, 3, 1, 1024), small=(3, 200, 5, 8192), full=(3, 2000, 9, 8192),
)  # fmt: skip
RULES = {  # fixed before the first run; (at least, at most)
    "exponent of tiled": (0.0, 1.25),
    "exponent of dense": (1.7, 99.0),
    "token loop / tiled at 2048": (3.0, 1e9),
    "sums / tiled at 2048": (3.0, 1e9),
    "dense / tiled at 4096": (1.0, 1e9),
    "nats better than 1+ELU": (0.08, 99.0),
    "nats worse than softmax": (-99.0, 0.10),
}
ARMS = {"Lightning-2": "transnormer", "softmax": "llama", "1+ELU": "linear"}


def experiment(scale: str = "small") -> Any:
    """Time five forms of attention and train three character models; returns `report.Evidence`."""
    import time

    from lineament.report import Evidence

    began, (seeds, steps, repeats, longest) = time.perf_counter(), SCALES[scale]
    seconds, losses = _speed(repeats, longest), _quality(seeds, steps)
    mean = {arm: sum(of) / len(of) for arm, of in losses.items()}
    found = {
        "exponent of tiled": _exponent(seconds["tiled"]), "exponent of dense": _exponent(seconds["dense"]),
        "token loop / tiled at 2048": _ratio(seconds, "token loop", 2048),
        "sums / tiled at 2048": _ratio(seconds, "sums", 2048), "dense / tiled at 4096": _ratio(seconds, "dense", 4096),
        "nats better than 1+ELU": mean["1+ELU"] - mean["Lightning-2"],
        "nats worse than softmax": mean["Lightning-2"] - mean["softmax"],
    }  # fmt: skip
    times = [{"what": f"{form}, ms", **{f"T={t}": 1e3 * s for t, s in of.items()}} for form, of in seconds.items()]
    quality = [{"what": f"{arm}, nats", "found": mean[arm], "seeds": losses[arm]} for arm in losses]
    return Evidence.judged(
        found, RULES, verdict=scale != "smoke", name=RECORD.slug, claim=RECORD.claim, rows=times + quality,
        seeds=list(range(seeds)), seconds=time.perf_counter() - began,
    )  # fmt: skip


def _exponent(seconds: dict[int, float]) -> float:
    """Slope of log seconds over log T from 1024 on (below, a call's fixed cost shows)."""
    import math
    from statistics import linear_regression

    points = [(math.log(t), math.log(s)) for t, s in seconds.items() if t >= min(1024, max(seconds) // 2)]
    return linear_regression(*zip(*points, strict=True)).slope


def _ratio(seconds: dict[str, dict[int, float]], form: str, length: int) -> float:
    at = min(length, max(seconds[form]))
    return seconds[form][at] / seconds["tiled"][at]


def _speed(repeats: int, longest: int) -> dict[str, dict[int, float]]:
    """Median seconds of a forward pass: 2 heads of 64, float32, one thread, forms taking turns."""
    from statistics import median

    import torch
    from torch.nn.functional import scaled_dot_product_attention

    from lineament._base.seeds import generator
    from lineament.ops import decayed_attention
    from lineament.tasks import in_turn

    def forms(T: int) -> dict[str, Any]:
        q, k, v = (torch.randn(1, T, 2, 64, generator=generator(i)) for i in range(3))
        log_decay = torch.tensor([-0.25, -0.0625]).expand(1, T, 2)
        heads, steps = [x.transpose(1, 2) for x in (q, k, v)], torch.arange(T if LONGEST["dense"] >= T else 0)
        mask = ((steps[:, None] - steps) * log_decay[0, 0, :, None, None]).tril().exp().tril()
        return {
            "tiled": lambda: decayed_attention(q, k, v, log_decay, backend="chunked", chunk_size=64),
            "dense": lambda: ((heads[0] @ heads[1].mT) * mask) @ heads[2],
            "token loop": lambda: decayed_attention(q, k, v, log_decay, backend="reference"),
            "sums": lambda: q[..., None, :] @ (k[..., None] * v[..., None, :]).cumsum(1),
            "softmax": lambda: scaled_dot_product_attention(*heads, is_causal=True),  # pyright: ignore[reportArgumentType]
        }

    found: dict[str, dict[int, float]] = {}
    threads, _ = torch.get_num_threads(), torch.set_num_threads(1)
    for T in LENGTHS:
        if longest >= T:
            steps = {form: step for form, step in forms(T).items() if LONGEST.get(form, T) >= T}
            for form, seconds in in_turn(steps, repeats).items():
                found.setdefault(form, {})[T] = median(seconds)
    torch.set_num_threads(threads)
    return found


def _quality(seeds: int, steps: int) -> dict[str, list[float]]:
    """Losses in nats per character, by seed: 4 layers of width 64, equal parameters within 2 %."""
    from lineament.models import decoder_config, match_parameters
    from lineament.tasks import characters, learn_characters

    text = characters()
    shape: dict[str, Any] = {"vocab_size": text.vocab, "width": 64, "layers": 4, "heads": 2}
    softmax = decoder_config("llama", **shape)
    configs = {arm: match_parameters(decoder_config(of, **shape), softmax) for arm, of in ARMS.items()}
    return {
        arm: [learn_characters(config, text, steps=steps, seed=seed) for seed in range(seeds)]
        for arm, config in configs.items()
    }
