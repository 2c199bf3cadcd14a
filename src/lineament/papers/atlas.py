"""atlas: one learned coefficient per parameter block and task vector."""

from .record import Figure, Paper

RECORD = Paper(
    slug="atlas",
    title="Knowledge Composition using Task Vectors with Learned Anisotropic Scaling",
    authors="Zhang, Albert, Rodriguez-Opazo, van den Hengel, Abbasnejad",
    year=2024,
    venue="NeurIPS 2024",
    arxiv="2407.02880",
    room=("weights",),
    status="planned",
    summary=(
        "aTLAS adds task vectors to a pre-trained model with a separate learned coefficient for every tensor "
        "instead of one scalar per task vector. The few thousand coefficients are fitted by gradient descent on "
        "a small set for addition, negation, few-shot or test-time adaptation, and the summed weights cost "
        "nothing at inference. A gradient rule picks the best task vectors under a budget."
    ),
    claim=(
        "Learned block-wise coefficients compose task vectors clearly better than the best single scalar per vector."
    ),
    figures=(
        Figure("ViT-B/32, addition over 8 tasks, mean accuracy: scalar search / aTLAS", "70.12 / 84.98", "paper"),
        Figure(
            "ViT-B/32, negation, target accuracy (lower is better): scalar search / aTLAS",
            "23.22 / 18.76",
            "paper",
        ),
        Figure("ViT-B/32, 22 data sets, 1 / 4 / 16 shots (zero-shot 60.4)", "66.0 / 70.0 / 72.8", "paper"),
        Figure("ViT-B/32, 22 data sets, test-time adaptation with UFM (zero-shot 60.4)", "66.9", "paper"),
        Figure("ViT-L/14, addition over 8 tasks: scalar search / aTLAS", "82.93 / 91.36", "paper"),
    ),
    experiment=(
        "An MLP on scikit-learn digits is fine-tuned on four transformed domains, and coefficients are fitted "
        "on 200 validation samples. Holds if the block-wise coefficients beat the best single scalar by at "
        "least 10 points of mean test accuracy."
    ),
    code="fredzzhang/atlas (no licence file)",
    keywords=("task vector", "task arithmetic", "model merging", "few-shot", "anisotropic scaling"),
    related=("rws", "i-lora", "configurable-bricks"),
)
