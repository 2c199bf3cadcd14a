"""lightning-attention-2: causal linear attention in tiles: exact, and linear in practice."""

from .record import Figure, Paper

RECORD = Paper(
    slug="lightning-attention-2",
    title=("Lightning Attention-2: A Free Lunch for Handling Unlimited Sequence Lengths in Large Language Models"),
    authors="Qin, Sun, Li, Shen, Sun, Zhong",
    year=2024,
    venue=None,
    arxiv="2401.04658",
    room=("ops", "nn"),
    status="planned",
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
            "forward, batch 4, 32 heads of 128, T = 32768: tiled / FlashAttention-2",
            "17.7 / 162.9 ms",
            "repository",
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
