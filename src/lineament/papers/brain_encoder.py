"""brain-encoder: every brain region asks the image for what it needs."""

from .record import Figure, Paper

RECORD = Paper(
    slug="brain-encoder",
    title="Transformer brain encoders explain human high-level visual responses",
    authors="Adeli, Sun, Kriegeskorte",
    year=2025,
    venue="NeurIPS 2025 (spotlight)",
    arxiv="2505.17329",
    room=("tasks", "nn", "models", "ops", "data"),
    status="planned",
    summary=(
        "Predicts fMRI responses to images: a single layer of cross-attention reads the patch tokens of a "
        "frozen vision model, with one learned query per brain region, and a linear map per region does the "
        "rest. Scores are given relative to the noise ceiling, beside closed-form ridge regression."
    ),
    claim=(
        "Routing by content through attention predicts higher visual areas better than ridge regression or "
        "fixed spatial weights on the same features."
    ),
    figures=(
        Figure(
            "attention routing against ridge and spatial-times-feature maps",
            "better across backbones and modalities",
            "abstract",
        ),
        Figure("gain over ridge, subject 1", "concentrated in higher visual areas", "repository"),
        Figure("V2d / FBA / OFA attend by", "location / content / both", "repository"),
        Figure("scores per subject and backbone", "not readable", "unverified"),
    ),
    experiment=(
        "A simulated cortex on scenes of real digits holds location-tuned, category-tuned and pooling regions, "
        "read from a network outside the model's family. Holds if on 3 of 3 seeds category regions reach 0.45 "
        "of the explainable variance and lead the best baseline by 0.15, location regions lose at most 0.05 to "
        "flat ridge, and content-free keys cost at least 0.10."
    ),
    code="Hosseinadeli/transformer_brain_encoder (GPL-3.0)",
    keywords=("fmri", "brain encoding", "cross-attention", "ridge regression", "noise ceiling", "visual cortex"),
    related=("brainmae", "fmri-generative-ssl"),
)
