"""rala: rank restored to linear attention by key weights and a gate."""

from .record import Figure, Paper

RECORD = Paper(
    slug="rala",
    title="Breaking the Low-Rank Dilemma of Linear Attention",
    authors="Qihang Fan, Huaibo Huang, Ran He",
    year=2025,
    venue="CVPR 2025",
    arxiv="2411.07635",
    room=("nn", "models"),
    status="planned",
    summary=(
        "Traces the weakness of linear attention in vision to the low rank of its key-value buffer and its "
        "output, with two cheap repairs: the mean query decides the weight of each key, and a linear function "
        "of the input gates the output. With rotary positions and a value convolution it forms the backbone "
        "RAVLT, whose published form keeps softmax in the last two stages."
    ),
    claim=(
        "Key weights and an output gate raise the effective rank of linear attention and with it the accuracy, "
        "above all on dense tasks."
    ),
    figures=(
        Figure("RAVLT-S, ImageNet-1K top-1, 4.6 GFLOPs", "84.4 %", "repository"),
        Figure("RAVLT-T, ImageNet-1K top-1, 2.4 GFLOPs", "82.8 %", "unverified"),
        Figure("RAVLT T / S / B / L, COCO Mask R-CNN 1x, box AP", "47.3 / 49.8 / 51.2 / 52.3", "repository"),
        Figure("RAVLT-T top-1: full / no key weights / no gate / neither", "82.8 / 82.1 / 82.5 / 81.4", "unverified"),
        Figure("DeiT-T setting: softmax / plain linear / RALA", "72.2 / 68.5 / 75.1", "unverified"),
    ),
    experiment=(
        "A small all-linear backbone on digits and on per-token segmentation of a canvas: softmax, plain "
        "linear, key weights, gate, both; accuracy and effective rank after training, 3 seeds. Holds if the "
        "gate's effective rank is at least 1.3 times the plain one and both together gain at least 0.5 points "
        "of accuracy or 1 of mIoU; that key weights alone raise the rank is reported, not assumed."
    ),
    code="qhfan/RALA (no licence file; weight card MIT)",
    keywords=(
        "vision",
        "linear attention",
        "effective rank",
        "gating",
        "rotary embedding",
        "detection",
        "segmentation",
    ),
    related=("inline-attention", "care-transformer", "lit"),
)
