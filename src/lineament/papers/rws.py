"""rws: the small part of a weight update that carries robustness."""

from .record import Figure, Paper

RECORD = Paper(
    slug="rws",
    title="Robust Weight Signatures: Gaining Robustness as Easy as Patching Weights?",
    authors="Cai, Zhang, Wang",
    year=2023,
    venue="ICML 2023",
    arxiv="2302.12480",
    room=("weights",),
    status="planned",
    summary=(
        "Tunes one pre-trained net twice, on clean and on corrupted images, and removes from the second update "
        "whatever points along the first; the rest is the signature of that corruption and sits mostly in early "
        "layers. It patches other clean models of that architecture, and can be removed, scaled, combined and "
        "quantised."
    ),
    claim=(
        "The projected update of the first layers alone carries most of the robustness, survives 4-bit storage "
        "and costs little clean accuracy."
    ),
    figures=(
        Figure("storage against a full weight copy", "up to 13 times smaller", "abstract"),
        Figure("transfer", "a signature from one data set patches a model of another", "abstract"),
        Figure("models and data", "VGG16 and ResNet-50; CIFAR-10, CIFAR-100, Tiny-ImageNet", "abstract"),
        Figure("accuracies per corruption", "not checked", "unverified"),
    ),
    experiment=(
        "An MLP on digits, pre-trained, then tuned clean and under blur or noise, 3 seeds; signatures of first, "
        "last and all layers. Holds if for blur the first layer's signature recovers at least 60 % of the "
        "accuracy gap and the last layer's below 10 %, 4 bits change less than 1 point, and clean accuracy "
        "falls by at most 3 points."
    ),
    code="VITA-Group/Robust_Weight_Signatures (MIT)",
    keywords=("robustness", "weight patching", "task arithmetic", "corruption", "projection", "quantisation"),
    related=("atlas", "i-lora", "weight-matching"),
)
