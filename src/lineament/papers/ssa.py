"""ssa: train with random subsets of attention, test with ensembles of them."""

from .record import Figure, Paper

RECORD = Paper(
    slug="ssa",
    title="The Information Pathways Hypothesis: Transformers are Dynamic Self-Ensembles",
    authors="Hussain, Zaki, Subramanian",
    year=2023,
    venue="KDD 2023",
    arxiv="2306.01705",
    room=("nn", "ops"),
    status="planned",
    summary=(
        "Trains a transformer with a random subset of attention sources, new in every layer and step, on the "
        "hypothesis that dense attention is an ensemble of sparse pathways. Cost falls, the randomness "
        "regularises, and a short dense tuning or an average over random sub-models improves on dense training. "
        "Weights and inference stay as they are."
    ),
    claim=(
        "Stochastically subsampled attention trains at a fraction of the cost without loss, and averaging "
        "sub-models is better than any single one."
    ),
    figures=(
        Figure("memory and compute of self-attention in training", "4 to 8 times less", "abstract"),
        Figure("PCQM4Mv2, validation MAE: EGT with SSA / with self-ensemble", "0.0876 / 0.0865", "secondary"),
        Figure(
            "WikiText-103, enwik8, CIFAR-10, ImageNet, image generation",
            "better than dense after tuning",
            "secondary",
        ),
    ),
    experiment=(
        "Digits as 64 pixel tokens: dense, unbiased and locally biased subsampling by 4, with the last tenth of "
        "the steps dense, 3 seeds. Holds if an ensemble of 16 has lower NLL than one sub-model in every arm, "
        "and the best subsampled arm is at most 0.5 points below dense training with a lower NLL."
    ),
    code="shamim-hussain/ssa (README only, no licence file)",
    keywords=("sparse attention", "subsampling", "self-ensemble", "regularisation", "training cost"),
    related=("tensor-attention", "clear"),
)
