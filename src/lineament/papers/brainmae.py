"""brainmae: hide regions of a brain signal and fill them in from the others."""

from .record import Figure, Paper

RECORD = Paper(
    slug="brainmae",
    title="BrainMAE: A Region-aware Self-supervised Learning Framework for Brain Signals",
    authors="Yang, Mao, Liu, Liu",
    year=2024,
    venue=None,
    arxiv="2406.17086",
    room=("tasks", "nn", "models", "ops", "data"),
    status="planned",
    summary=(
        "A masked autoencoder on parcellated fMRI time series: whole regions are hidden in short segments and "
        "reconstructed from the rest. Attention between regions comes from learned region embeddings, so one "
        "graph is shared by all scans. A Gaussian conditional predictor is the exact linear reference beside "
        "it."
    ),
    claim=(
        "A region-aware masked autoencoder learns region embeddings that reflect functional connectivity and "
        "representations that beat fixed and dynamic connectivity baselines downstream."
    ),
    figures=(
        Figure("four downstream tasks against connectivity baselines", "better", "abstract"),
        Figure("static against dynamic graph variant, earlier version", "static ahead in all tables", "secondary"),
        Figure("ablations", "region embeddings, no self-loops and masking each help", "secondary"),
        Figure("data sets", "HCP-3T, HCP-7T, HCP-Aging, NSD", "unverified"),
        Figure("scores", "not readable", "unverified"),
    ),
    experiment=(
        "Resting runs of seven HCP subjects, 94 regions, are cut into segments with 40 % of the regions hidden, "
        "and the Gaussian conditional predictor is the bar. Learns if its R^2 is at least the Gaussian's minus "
        "0.03, wins only at plus 0.02 for 5 of 7 subjects, and learned embeddings must beat frozen random ones "
        "by 0.03 on every fold; on separable simulated data more than 0.01 above the Gaussian means a leak."
    ),
    code=None,
    keywords=("fmri", "masked autoencoder", "self-supervised", "functional connectivity", "region embedding"),
    related=("fmri-generative-ssl", "brain-encoder"),
)
