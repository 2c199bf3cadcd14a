"""hybrid-linear-attention: which linear mixer, and how many softmax layers beside it."""

from .record import Figure, Paper

RECORD = Paper(
    slug="hybrid-linear-attention",
    title="A Systematic Analysis of Hybrid Linear Attention",
    authors="Wang, Zhu, Abreu, Shan, Kergan, Pan, Chou, Li, G. Zhang, Huang, Eshraghian",
    year=2025,
    venue=None,
    arxiv="2507.06457",
    room=("models", "nn", "ops", "tasks"),
    status="planned",
    summary=(
        "A controlled comparison of six linear mixers, from vector states to gated delta rules, at several "
        "ratios of linear to full-attention layers. The library offers the instrument: interchangeable mixers "
        "in one block, a builder that takes a ratio or an explicit list, recall and language-modelling probes, "
        "and cache accounting."
    ),
    claim=(
        "Language-modelling quality hardly depends on the ratio, while recall rises clearly with the share of "
        "softmax layers."
    ),
    figures=(
        Figure("language modelling against the ratio", "nearly flat", "abstract"),
        Figure("recall against the share of full attention", "rises clearly, most below 3:1", "abstract"),
        Figure("recommended", "HGRN-2 or Gated DeltaNet between 3:1 and 6:1", "abstract"),
        Figure("models trained", "72, at 340M and 1.3B parameters", "abstract"),
        Figure("KV cache at 3:1 / 6:1 against full attention", "4 times / 7 times smaller", "derived"),
    ),
    experiment=(
        "Small scale checks the mechanics on associative recall: softmax and every 1:1 hybrid must end at 95 %, "
        "the RetNet hybrid must lead pure RetNet by 10 points at step 100, and cache bytes must equal the "
        "arithmetic. The study scale gives the verdict: 3:1 gains at least 10 points wherever pure recall is "
        "below 90 %, Gated DeltaNet beats RetNet pure, and the hybrid's cache stays within 1.1 of a quarter of "
        "softmax's plus the state."
    ),
    code="fla-org/flash-linear-attention (MIT)",
    keywords=("hybrid", "linear attention", "recall", "kv cache", "hgrn", "retnet", "gla", "mamba"),
    related=("deltanet", "kimi-linear", "hedgehog", "lightnet"),
)
