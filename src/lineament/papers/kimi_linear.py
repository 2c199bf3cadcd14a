"""kimi-linear: a forget gate for every key channel, three layers to one of full attention."""

from .record import Figure, Paper

RECORD = Paper(
    slug="kimi-linear",
    title="Kimi Linear: An Expressive, Efficient Attention Architecture",
    authors="Kimi Team",
    year=2025,
    venue=None,
    arxiv="2510.26692",
    room=("ops", "nn", "models"),
    status="planned",
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
