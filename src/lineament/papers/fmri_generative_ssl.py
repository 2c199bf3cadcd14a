"""fmri-generative-ssl: masked reconstruction of dynamic connectivity graphs."""

from .record import Figure, Paper

RECORD = Paper(
    slug="fmri-generative-ssl",
    title="A Generative Self-Supervised Framework using Functional Connectivity in fMRI Data",
    authors="Choi, Keum, Yun, Kim, Lee",
    year=2023,
    venue="NeurIPS 2023 workshop on temporal graph learning",
    arxiv="2312.01994",
    room=("tasks", "nn", "models", "ops", "data"),
    status="planned",
    summary=(
        "A scan becomes a sequence of graphs of brain regions joined by strong correlations in sliding windows. "
        "A graph network is pre-trained without labels by rebuilding hidden nodes and edges from the same "
        "window and from windows before and after. It is then fine-tuned for traits with few labels, next to "
        "plain connectivity baselines."
    ),
    claim="Generative pre-training on dynamic connectivity helps when labels are few.",
    figures=(
        Figure("scale of the study", "more than 50,000 scans", "abstract"),
        Figure("fine-tuned models", "accurate and robust", "abstract"),
        Figure("scores", "not readable", "unverified"),
    ),
    experiment=(
        "A simulated cohort differs either in the dwell time of switching states or in static connectivity: 300 "
        "unlabelled, 40 labelled and 200 test subjects. Holds if pre-training adds at least 0.05 AUROC over "
        "training from scratch on dwell, mean of 3 seeds with none negative; useful only if within 0.02 of the "
        "standard deviation of connectivity over windows."
    ),
    code=None,
    keywords=("fmri", "functional connectivity", "graph neural network", "self-supervised", "masked autoencoder"),
    related=("brainmae", "brain-encoder"),
)
