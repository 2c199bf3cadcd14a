"""hyperzzw: image-sized generated kernels instead of residuals and attention."""

from .record import Figure, Paper

RECORD = Paper(
    slug="hyperzzw",
    title="HyperZ·Z·W Operator Connects Slow-Fast Networks for Full Context Interaction",
    authors="Harvie Zhang",
    year=2024,
    venue=None,
    arxiv="2401.17948",
    room=("nn", "models"),
    status="planned",
    summary=(
        "Does away with residual links and attention: a slow network maps coordinates to kernels of the image's "
        "own size, and multiplying them with the activations gives weights that depend on the context and act "
        "on those same activations. Many such branches are concentrated by a bottleneck, and standardisation "
        "without learned parameters keeps features centred."
    ),
    claim=(
        "Multiplying hyper-kernels with activations mixes the full context in every layer without a loss of "
        "accuracy against the hyper-kernels alone."
    ),
    figures=(
        Figure("CIFAR-10, 100 epochs", "95.3 %", "repository"),
        Figure("CIFAR-100, 100 epochs", "75.7 %", "repository"),
        Figure("sMNIST, pMNIST, sCIFAR10, STL-10", "strong with fewer parameters", "unverified"),
    ),
    experiment=(
        "Two blocks on 8x8 digits with the full operator, with kernels alone, and a CNN of equal parameters, 3 "
        "seeds. Holds if the full operator's mean accuracy is at most 0.5 points below the kernels alone and "
        "both reach 90 %; the CNN is reported whatever it scores."
    ),
    code="hyperevolnet/Terminator (code withdrawn, no licence)",
    keywords=(
        "hyper-kernel",
        "implicit network",
        "context-dependent convolution",
        "image classification",
        "terminator",
    ),
    related=("care-transformer", "tensor-attention"),
)
