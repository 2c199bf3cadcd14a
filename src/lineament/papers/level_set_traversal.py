"""level-set-traversal: walk to another image while the model stays equally sure."""

from .record import Figure, Paper

RECORD = Paper(
    slug="level-set-traversal",
    title="Exploring Geometry of Blind Spots in Vision Models",
    authors="Balasubramanian, Sriramanan, Sadasivan, Feizi",
    year=2023,
    venue="NeurIPS 2023 (spotlight)",
    arxiv="2310.19889",
    room=("explain",),
    status="planned",
    summary=(
        "Level set traversal moves an image towards any target using only the part of the step orthogonal to "
        "the local gradient, so the model's confidence in the source class stays. It finds under-sensitivity: "
        "images that look like another class yet keep the label. Paths and triangles of high confidence measure "
        "how far such sets extend."
    ),
    claim=(
        "From a source image one can walk close to arbitrary targets at unchanged confidence, and the straight "
        "segment back stays confident."
    ),
    figures=(
        Figure(
            "ImageNet, CNN and transformer",
            "blind spots almost indistinguishable from arbitrary targets",
            "secondary",
        ),
        Figure("straight path from source to blind spot", "high confidence throughout", "secondary"),
        Figure("adversarially trained models", "larger triangles of high confidence", "secondary"),
        Figure("distance and triangle tables", "not checked", "unverified"),
    ),
    experiment=(
        "A small CNN on digits at 32x32 and about 90 source-target pairs; the baseline is the furthest point on "
        "the straight line that loses less than 0.2 confidence. Holds if the traversal ends at least 25 % "
        "closer than the line at higher confidence and the path from the source keeps a mean confidence above "
        "0.95."
    ),
    code="SriramB-98/blindspots-neurips-sub (no licence file)",
    keywords=("level set", "robustness", "under-sensitivity", "adversarial", "confidence", "image classification"),
    related=("linear-scope", "dynamic-lrp"),
)
