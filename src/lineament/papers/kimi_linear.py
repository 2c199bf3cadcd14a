"""kimi-linear: a forget gate for every key channel, three layers to one of full attention."""

from typing import Any

from .record import Figure, Paper, Scales

RECORD = Paper(
    slug="kimi-linear",
    title="Kimi Linear: An Expressive, Efficient Attention Architecture",
    authors="Kimi Team",
    year=2025,
    venue=None,
    arxiv="2510.26692",
    room=("ops", "nn", "models"),
    status="works",
    summary=(
        "Kimi Delta Attention gives the gated delta rule one forget gate per key channel, so that one head "
        "holds slow and fast memories. Three such layers alternate with one latent full-attention layer without "
        "positions. The cache shrinks to about a quarter and decoding time stays nearly flat."
    ),
    claim=(
        "Channel-wise forgetting beats one gate per head, and the 3:1 hybrid matches or beats full attention at "
        "a quarter of the cache."
    ),
    figures=(
        Figure(
            "MMLU-Pro, base, 1.4T tokens: MLA / Gated DeltaNet hybrid / Kimi Linear",
            "47.2 / 47.9 / 51.0",
            "paper",
        ),
        Figure("RULER 128k: MLA / Gated DeltaNet hybrid / Kimi Linear", "81.3 / 80.5 / 84.3", "paper"),
        Figure("time per token at 1M tokens: MLA / Kimi Linear", "11.48 / 1.84 ms (6.3 times)", "paper"),
        Figure("KV cache", "up to 75 % smaller", "abstract"),
        Figure("validation perplexity at 3:1 / 0:1 / 1:1 / 7:1 / 15:1", "5.65 / 5.77 / 5.66 / 5.70 / 5.82", "paper"),
    ),
    experiment=(
        "Reversing 16 random tokens with 2 layers: KDA, Gated DeltaNet and a Mamba-2-style mixer, 3 seeds, "
        "beside an exact two-channel memory test and cache accounting. Holds if KDA leads Gated DeltaNet by at "
        "least 0.03 in mean accuracy; Mamba-2 is reported as it falls."
    ),
    code="MoonshotAI/Kimi-Linear (MIT)",
    keywords=("linear attention", "delta rule", "gating", "hybrid", "latent attention", "kv cache", "language model"),
    related=("deltanet", "hybrid-linear-attention", "hedgehog"),
)

SCALES = Scales(  # seeds, training steps, examples scored, tokens of the cache. "smoke": the mechanics only
    smoke=(1, 3, 16, 1024), small=(3, 400, 256, 8192), full=(3, 2000, 1024, 8192),
)  # fmt: skip
RULES = {  # fixed before the first run, for means over seeds; (at least, at most)
    "accuracy, KDA over Gated DeltaNet": (0.03, 1.0),
    "slow channel after ten steps": (1.0, 1.0),
    "fast channel after ten steps, times 2^10": (1.0, 1.0),
    "keys and values of 3:1 / softmax": (0.249, 0.251),
}
ARMS = {  # family, options; the last is Gated DeltaNet with a memory that only adds
    "KDA": ("kda", {"decay": "channel"}), "Gated DeltaNet": ("gated-deltanet", {"decay": "head"}),
    "Mamba-2 style": ("gated-deltanet", {"decay": "head", "erase": False}),
}  # fmt: skip


def experiment(scale: str = "small") -> Any:
    """Reverse random tokens, let two channels forget apart, and count the cache of a hybrid; `report.Evidence`."""
    import time

    from lineament.report import Evidence

    began, (seeds, steps, count, context) = time.perf_counter(), SCALES[scale]
    right = {arm: [_trained(arm, seed, steps, count) for seed in range(seeds)] for arm in ARMS}
    mean = {arm: sum(of) / seeds for arm, of in right.items()}
    (slow, fast), (hybrid, state, softmax) = _channels(), _cache(context)
    found = (mean["KDA"] - mean["Gated DeltaNet"], slow, fast * 2**10, hybrid / softmax)
    rows = [{"what": f"{arm}, accuracy", "found": mean[arm], "seeds": right[arm]} for arm in ARMS]
    rows += [{"what": f"bytes at T = {context}, {what}", "found": n} for what, n in
             (("3:1, keys and values", hybrid), ("3:1, states", state), ("softmax", softmax))]  # fmt: skip
    return Evidence.judged(
        dict(zip(RULES, found, strict=True)), RULES, verdict=scale != "smoke", name=RECORD.slug, claim=RECORD.claim,
        rows=rows, seeds=list(range(seeds)), seconds=time.perf_counter() - began,
    )  # fmt: skip


def _trained(arm: str, seed: int, steps: int, count: int) -> float:
    """Accuracy on unseen strings of 16 tokens of 31, said again from their end; 2 layers, 2 heads with 16-wide keys."""
    from dataclasses import replace

    from lineament import train
    from lineament._base.seeds import seeded
    from lineament.models import FAMILIES, DecoderForCausalLM, decoder_config
    from lineament.tasks import Recall, recall_loss, score_recall

    name, options = ARMS[arm]
    task: dict[str, Any] = {"task": "palindrome", "length": 33, "vocab": 32}
    own = replace(FAMILIES[name], options=options, key_share=0.5, value_share=1.0)
    with seeded(seed):
        model = DecoderForCausalLM(decoder_config(own, vocab_size=32, width=64, layers=2, heads=2))
    config = train.FitConfig(steps=steps, lr=3e-3, seed=seed)
    train.fit(model.train(), Recall(seed=seed, **task).batches(32), recall_loss, config)
    return score_recall(model.eval(), Recall(seed=1000 + seed, **task), count=count).token_accuracy


def _channels() -> tuple[float, float]:
    """What two channels of one head hold of a 1 written to each, after ten steps with gates 1 and 1/2."""
    import torch

    from lineament.ops import delta_rule

    k = torch.zeros(1, 12, 1, 2)
    k[0, 0, 0, 0] = k[0, 1, 0, 1] = 1
    written = (torch.arange(12) < 2).float().view(1, 12, 1)
    half = (1 - written) * torch.tensor(0.5).log()
    log_decay = torch.stack([torch.zeros_like(half), half], -1)
    _, state = delta_rule(k, k, torch.ones(1, 12, 1, 1), written, log_decay)
    return state[0, 0, 0, 0].item(), state[0, 0, 1, 0].item()


def _cache(context: int) -> tuple[int, int, int]:
    """Bytes of keys and values and of states in a 3:1 hybrid of 8 layers, and of the cache of a softmax model."""
    from lineament.models import DecoderForCausalLM, decoder_config
    from lineament.tasks import filled_cache

    def held(ratio: str) -> tuple[int, int]:
        config = decoder_config("kda", ratio=ratio, vocab_size=32, width=64, layers=8, heads=2)
        cache = filled_cache(DecoderForCausalLM(config).eval(), context).tensors()
        sizes = {name: x.numel() * x.element_size() for name, x in cache.items()}
        full = sum(n for name, n in sizes.items() if ".full." in name)
        return full, sum(sizes.values()) - full

    return *held("3:1"), held("full")[0]
