"""projection-head: why the layer below the projection head is the better one."""

from .record import Figure, Paper

RECORD = Paper(
    slug="projection-head",
    title="Investigating the Benefits of Projection Head for Representation Learning",
    authors="Xue, Gan, Ni, Joshi, Mirzasoleiman",
    year=2024,
    venue="ICLR 2024",
    arxiv="2403.11391",
    room=("explain", "nn", "train"),
    status="planned",
    summary=(
        "Explains why representations are taken below the head the loss acts on: training makes the weights of "
        "features more unequal with every layer, so lower layers treat features more evenly and keep those that "
        "vanish above. The library offers probes at every depth, read-outs of feature weights, and a fixed "
        "reweighting head."
    ),
    claim=(
        "In linear contrastive networks feature weights follow a power law in depth, so the layer before the "
        "head is better where the downstream feature is weak, and not where it is already the strongest."
    ),
    figures=(
        Figure(
            "before against after the head, mismatched pre-training and downstream tasks",
            "better before it",
            "abstract",
        ),
        Figure("fixed reweighting head against a learned head", "comparable; values not read", "unverified"),
        Figure("digit on image, digit often dropped or very weak or strong", "better before the head", "secondary"),
    ),
    experiment=(
        "A two-layer linear net under the spectral loss must show the predicted weights, w after the head and "
        "the root of w before it, to 1 % for emerged features. Probes on planted features must favour the lower "
        "layer by at least 5 points when the label's feature is weak and not when it is strongest, and a "
        "retrained last layer under a spurious pixel must be at least as good below the head."
    ),
    code=None,
    keywords=(
        "contrastive learning",
        "projection head",
        "representation",
        "feature weighting",
        "spectral loss",
        "linear network",
    ),
    related=("grokking-li2", "hourglass-mlp"),
)
