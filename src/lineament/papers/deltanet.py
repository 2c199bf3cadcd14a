"""deltanet: a linear memory that overwrites instead of only adding."""

from .record import Figure, Paper

RECORD = Paper(
    slug="deltanet",
    title="Parallelizing Linear Transformers with the Delta Rule over Sequence Length",
    authors="Yang, Wang, Zhang, Shen, Kim",
    year=2024,
    venue="NeurIPS 2024",
    arxiv="2406.06484",
    room=("ops", "nn"),
    status="planned",
    summary=(
        "A linear-time sequence mixer whose memory reads what a key returns and writes only the error, so that "
        "a value can be overwritten. Its steps are Householder-like, and their products have a compact form, so "
        "a whole chunk needs only dense matrix products and a single triangular solve."
    ),
    claim=(
        "Erasing before writing improves recall over additive linear attention, and the chunked form trains "
        "fast at the same exactness."
    ),
    figures=(
        Figure("against Mamba and GLA, perplexity and zero-shot tasks including recall", "better", "abstract"),
        Figure("both hybrids with softmax layers against a strong transformer", "better", "abstract"),
        Figure(
            "1.3B, 100B tokens, WikiText perplexity: Transformer++ / Mamba / GLA / DeltaNet",
            "16.85 / 17.06 / 17.22 / 16.87",
            "unverified",
        ),
        Figure(
            "1.3B, 100B tokens, LAMBADA perplexity: Transformer++ / Mamba / GLA / DeltaNet",
            "13.44 / 13.89 / 14.47 / 12.21",
            "unverified",
        ),
    ),
    experiment=(
        "Keys written twice must return their last value: DeltaNet against the same layer without erasing, 2 "
        "layers, 500 steps, beside training-free overwrite and speed checks. Holds if over 3 seeds DeltaNet "
        "reaches 0.93 accuracy with a lead of at least 0.10, the delta memory's error on recent keys is below a "
        "quarter of the additive one's, and the chunked form is at least four times as fast as the token loop."
    ),
    code="fla-org/flash-linear-attention (MIT)",
    keywords=("linear attention", "delta rule", "householder", "recurrence", "associative recall", "language model"),
    related=("kimi-linear", "hybrid-linear-attention", "lightning-attention-2"),
)
