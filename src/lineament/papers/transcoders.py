"""transcoders: sparse stand-ins for MLPs that make circuits readable."""

from .record import Figure, Paper

RECORD = Paper(
    slug="transcoders",
    title="Transcoders Find Interpretable LLM Feature Circuits",
    authors="Dunefsky, Chlenski, Nanda",
    year=2024,
    venue="NeurIPS 2024",
    arxiv="2406.11944",
    room=("explain",),
    status="planned",
    summary=(
        "A transcoder is a wide, sparsely active layer trained to imitate a model's MLP from input to output. "
        "Since its decoder writes to the residual stream and its encoder reads from it, the influence of one "
        "feature on a later one is an activation times a fixed weight product. Users get features, circuits per "
        "prompt and connection strengths that need no input."
    ),
    claim=(
        "At equal sparsity transcoders keep the model's loss about as well as sparse autoencoders while making "
        "circuits through MLPs explicit."
    ),
    figures=(
        Figure(
            ("Pythia-410M layer 15, blind rating of 50 features, interpretable / maybe / no: transcoder"),
            "41 / 8 / 1",
            "repository",
        ),
        Figure(
            ("Pythia-410M layer 15, blind rating of 50 features, interpretable / maybe / no: autoencoder"),
            "38 / 8 / 4",
            "repository",
        ),
        Figure("same layer, loss with 44 active features: transcoder", "3.355", "repository"),
        Figure("same layer, loss with 60 active features: autoencoder", "3.360", "repository"),
        Figure("greater-than circuit of GPT-2 small", "fewer features than neurons; counts not read", "unverified"),
    ),
    experiment=(
        "A 2-layer language model on a synthetic topic language; transcoders and autoencoders at three sparsity "
        "penalties and 2 seeds, then a planted two-feature conjunction. Holds if the transcoder recovers at "
        "least 85 % of the loss that zero-ablation costs with at most 20 active features and its curve stays "
        "within twice the autoencoder's excess loss; the circuit's hit rate is reported against random paths."
    ),
    code="jacobdunefsky/transcoder_circuits (no top-level licence)",
    keywords=(
        "transcoder",
        "sparse autoencoder",
        "feature circuit",
        "attribution graph",
        "interpretability",
        "language model",
    ),
    related=("relp", "dynamic-lrp", "alignment-maps", "depth-efficiency"),
)
