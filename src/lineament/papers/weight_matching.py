"""weight-matching: permute one network onto another, for any traced architecture."""

from .record import Figure, Paper

RECORD = Paper(
    slug="weight-matching",
    title=(
        "Analysis of Linear Mode Connectivity via Permutation-Based Weight Matching: With Insights into Other "
        "Permutation Search Methods"
    ),
    authors="Ito, Yamada, Kumagai",
    year=2025,
    venue="ICLR 2025",
    arxiv="2402.04051",
    room=("weights", "graph"),
    status="planned",
    summary=(
        "Hidden units can be permuted without changing a network; weight matching finds the permutation that "
        "lines one model up with another so that they can be averaged. The paper finds that matching hardly "
        "shortens the distance but aligns the singular vectors of large singular values. The library derives "
        "the symmetry group from the traced graph instead of a hand-written table."
    ),
    claim=(
        "Matching removes most of the loss barrier between independently trained networks although it shortens "
        "their distance little, because it aligns the leading singular vectors."
    ),
    figures=(
        Figure("distance between the models, cut by matching", "6 to 20 % only", "secondary"),
        Figure(
            "alignment of leading singular vectors, MLP: before / after",
            "about 0 / up to about 0.8",
            "secondary",
        ),
        Figure("straight-through estimator, same alignment", "about 0 although its barrier is low", "secondary"),
        Figure(
            "three models matched to one anchor, barrier",
            "lower with matching than with the straight-through estimator",
            "abstract",
        ),
        Figure("Git Re-Basin, ResNet20 at 32 times the width, CIFAR-10, test barrier", "zero", "unverified"),
    ),
    experiment=(
        "Independently trained pairs: MLPs on digits and ResNet20-size nets, before and after matching, with "
        "REPAIR and REPAIR alone as the control, 3 pairs each. Holds if for MLPs the barrier falls at least 5 "
        "times while distance falls under 35 % and leading alignment exceeds 0.3 and the mean over all vectors, "
        "and for ResNets matching with REPAIR is below REPAIR alone in every pair with a mean of at most 0.7 of "
        "it and 0.6 of the barrier before."
    ),
    code=None,
    keywords=(
        "permutation symmetry",
        "weight matching",
        "git re-basin",
        "linear mode connectivity",
        "repair",
        "model merging",
        "singular vectors",
    ),
    related=("lmc-landscape", "neural-circuit-diagrams", "fireq"),
)
