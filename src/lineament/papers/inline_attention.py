"""inline-attention: linear attention made injective by subtraction, and given local focus."""

from .record import Figure, Paper

RECORD = Paper(
    slug="inline-attention",
    title="Bridging the Divide: Reconsidering Softmax and Linear Attention",
    authors=("Dongchen Han, Yifan Pu, Zhuofan Xia, Yizeng Han, Xuran Pan, Xiu Li, Jiwen Lu, Shiji Song, Gao Huang"),
    year=2024,
    venue="NeurIPS 2024",
    arxiv="2412.06590",
    room=("nn", "models"),
    status="planned",
    summary=(
        "Linear attention that divides by a sum gives different queries the same weights, and it has little "
        "local focus. InLine replaces the division by subtracting the mean and adds a 3x3 mixing of values with "
        "kernels made from the input. It drops into DeiT, PVT, Swin and CSwin."
    ),
    claim=("Injective weights and a local residual bring linear attention to the accuracy of softmax attention."),
    figures=(
        Figure("InLine-DeiT T / S / B at 224 / 288 / 448 px, ImageNet-1K top-1", "74.5 / 80.2 / 82.3", "repository"),
        Figure("InLine-PVT T / S / M / L", "78.2 / 82.0 / 83.2 / 83.6", "repository"),
        Figure("InLine-Swin T / S / B", "82.4 / 83.6 / 84.1", "repository"),
        Figure("InLine-CSwin T / S / B", "83.2 / 83.8 / 84.5", "repository"),
        Figure("ADE20K mIoU, PVT-T / Swin-T, before to after", "36.57 to 39.16 / 44.51 to 45.57", "secondary"),
    ),
    experiment=(
        "First, without training, the difference between the weight rows of q and 3q under each operator; then "
        "a small ViT on 16x16 digits with softmax, ReLU-linear and InLine with and without its residual, 3 "
        "seeds. Holds if InLine with the residual is at most 0.5 points below softmax and InLine without it "
        "beats ReLU-linear."
    ),
    code="LeapLabTHU/InLine (no licence file)",
    keywords=("vision", "linear attention", "injectivity", "local attention", "image classification"),
    related=("rala", "care-transformer", "lit", "linfusion"),
)
