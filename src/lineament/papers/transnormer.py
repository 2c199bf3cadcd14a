"""transnormer: normalise the output instead of dividing by a sum."""

from .record import Figure, Paper

RECORD = Paper(
    slug="transnormer",
    title="The Devil in Linear Transformer",
    authors="Qin, Han, Sun, Li, Kong, Barnes, Zhong",
    year=2022,
    venue="EMNLP 2022",
    arxiv="2210.10340",
    room=("nn", "ops"),
    status="planned",
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
        "1+ELU, 3 seeds. Holds if the divided form's largest gradient grows more than 1e4 times while "
        "NormAttention's stays below 4 over the root of epsilon and softmax's within a factor 2, and both "
        "variants beat 1+ELU by 0.08 nats within 0.10 of softmax."
    ),
    code="OpenNLPLab/Transnormer (no licence file)",
    keywords=("linear attention", "normalisation", "gradient stability", "block-diagonal attention", "language model"),
    related=("lightning-attention-2", "lightnet", "hedgehog"),
)
