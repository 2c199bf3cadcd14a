"""lightnet: a running normaliser instead of decay, so one scan sees the whole grid."""

from .record import Figure, Paper

RECORD = Paper(
    slug="lightnet",
    title="You Only Scan Once: Efficient Multi-dimension Sequential Modeling with LightNet",
    authors="Qin, Mao, Shen, Li, Zhang, Dai, Zhong",
    year=2024,
    venue=None,
    arxiv="2405.21022",
    room=("ops", "nn"),
    status="planned",
    summary=(
        "Replaces the decay of linear attention by a running normaliser per key channel, which does not depend "
        "on the scan order. Without causality one pass then covers images, video or text, and with causality it "
        "is an ordinary recurrence. Two additive-cost position encodings for grids come with it."
    ),
    claim=(
        "A single pass without decay matches decay attention that scans an image two or four times, at a "
        "fraction of the time."
    ),
    figures=(
        Figure(
            (
                "one scan against multi-scan linear models: image classification and generation, bidirectional "
                "and causal language modelling"
            ),
            "on par or better",
            "abstract",
        ),
        Figure("scores per model", "not read", "unverified"),
    ),
    experiment=(
        "Digits as 64 pixel tokens: LightNet in one pass with and without its encodings against decay attention "
        "in 1, 2 and 4 scans, 3 seeds, plus timing on grids up to 128x128. Holds if one pass is at least as "
        "accurate as one decay scan and within 1 point of the best of 2 and 4, and at 128x128 at least 1.5 "
        "times faster than one scan and 4 times faster than four."
    ),
    code="OpenNLPLab/LightNet (licence unknown)",
    keywords=("linear attention", "recurrence", "position encoding", "image", "one scan", "multi-dimensional"),
    related=("hybrid-linear-attention", "transnormer", "lightning-attention-2"),
)
