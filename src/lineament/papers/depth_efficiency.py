"""depth-efficiency: do late layers compute, or only polish?"""

from .record import Figure, Paper

RECORD = Paper(
    slug="depth-efficiency",
    title="Do Language Models Use Their Depth Efficiently?",
    authors="Csordás, Manning, Potts",
    year=2025,
    venue="NeurIPS 2025",
    arxiv="2505.13898",
    room=("explain", "graph"),
    status="planned",
    summary=(
        "Residual-stream measurements of what depth is used for: how much and in which direction each sublayer "
        "writes, what a skipped layer changes further up for tokens still to come, the logit lens, depth scores "
        "by difficulty, and linear maps between models of different depth. One report says where a model "
        "changes phase."
    ),
    claim=(
        "A deeper model spreads the same computation over more layers: the best linear map from a shallow model "
        "runs along equal relative depth."
    ),
    figures=(
        Figure(
            "contribution of the second half of the layers",
            "much smaller, with a change of phase near the middle",
            "abstract",
        ),
        Figure("depth used by harder, multi-hop inputs", "no more than by easy ones", "abstract"),
        Figure(
            "maps from a shallow to a deep model",
            "error lowest along the diagonal of relative depth",
            "abstract",
        ),
        Figure("values behind the curves", "not read", "unverified"),
    ),
    experiment=(
        "Character models of 4 and 8 layers are trained on Python source files and mapped onto each other in "
        "closed form. Holds if best source and target depth correlate above 0.8 and above the 95th percentile "
        "of a permuted null, and the logit-lens divergence falls monotonically; the late-layer decline is not "
        "expected at this size and not claimed."
    ),
    code="RobertCsordas/llm_effective_depth (no licence file)",
    keywords=("depth", "residual stream", "logit lens", "layer skipping", "interpretability", "language model"),
    related=("alignment-maps", "transcoders", "shallow-parallel"),
)
