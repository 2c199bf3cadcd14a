"""grokking-li2: a three-stage theory of when grokking sets in."""

from .record import Figure, Paper

RECORD = Paper(
    slug="grokking-li2",
    title="Provable Scaling Laws of Feature Emergence from Learning Dynamics of Grokking",
    authors="Yuandong Tian",
    year=2025,
    venue=None,
    arxiv="2509.21519",
    room=("explain", "train", "data"),
    status="planned",
    summary=(
        "A theory of grokking in two-layer networks in three stages: random features, features that each climb "
        "an energy on their own, and features that repel each other. On group arithmetic the maxima of the "
        "energy are the irreducible representations, which gives a law for the data needed. The library offers "
        "the groups, the energy, stage diagnostics and sample scans."
    ),
    claim=(
        "Weight decay drives feature learning, the features found are Fourier modes of the group, and the "
        "training share needed falls with group size."
    ),
    figures=(
        Figure("modular addition, M = 71, 40 % of the data", "groks with weight decay 2e-4, not without", "paper"),
        Figure("training share at the generalisation boundary", "proportional to log M / M", "paper"),
        Figure("off-diagonal share of the feature Gram matrices in stage two", "at most 8 %", "paper"),
        Figure("Muon against Adam at small width, M = 71", "lower test loss", "paper"),
    ),
    experiment=(
        "Energy ascent for M = 11 must give pure frequencies; modular addition with M = 23 is trained with and "
        "without weight decay, and the training share is scanned for M = 13, 23, 31. Holds if the decayed run "
        "groks within 1500 epochs in at least 4 of 5 seeds while the undecayed one stays below 0.8, and the "
        "critical share falls with M."
    ),
    code="yuandong-tian/understanding (CC BY-NC 4.0)",
    keywords=("grokking", "modular addition", "group theory", "feature learning", "muon", "scaling law"),
    related=("projection-head", "lmc-landscape"),
)
