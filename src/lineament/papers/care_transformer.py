"""care-transformer: a mobile image backbone that splits channels between attention and convolution."""

from .record import Figure, Paper

RECORD = Paper(
    slug="care-transformer",
    title="CARE Transformer: Mobile-Friendly Linear Visual Transformer via Decoupled Dual Interaction",
    authors="Yuan Zhou, Qingshan Xu, Jiequan Cui, Junbao Zhou, Jing Zhang, Richang Hong, Hanwang Zhang",
    year=2025,
    venue="CVPR 2025",
    arxiv="2411.16170",
    room=("nn", "models"),
    status="planned",
    summary=(
        "An image backbone for phones in which only part of the channels go through linear attention, the "
        "larger part through depth-wise convolutions, and a quarter is a memory that skips the mixer. Two small "
        "convolutional units then let local and global features, and features and memory, interact."
    ),
    claim=(
        "Splitting the channels between local and global mixing costs less than stacking both on all channels, "
        "at about the same accuracy."
    ),
    figures=(
        Figure("CARE-S0, ImageNet-1K top-1, 0.7 GMACs, 7.3 M parameters", "78.4 %", "repository"),
        Figure("CARE-S1, ImageNet-1K top-1, 1.0 GMACs, 9.6 M parameters", "80.1 %", "repository"),
        Figure("CARE-S2, ImageNet-1K top-1, 1.9 GMACs, 19.5 M parameters", "82.1 %", "repository"),
        Figure("latency on an iPhone 13, S0 / S1 / S2", "1.1 / 1.4 / 2.0 ms", "repository"),
        Figure("points lost without memory / interaction / asymmetric split, S1", "0.8 / 1.4 / 0.3", "unverified"),
    ),
    experiment=(
        "A two-stage micro model on digits at 32x32 against a stacked design, a symmetric split, no memory and "
        "no interaction, with accuracy, exact multiply-adds and CPU milliseconds, 3 seeds. Holds if "
        "multiply-adds and time are at least 20 % below the stacked design with accuracy within 1 point, and "
        "CARE is not worse than CARE without interaction."
    ),
    code="zhouyuan888888/CARE-Transformer (no root licence file; weight card MIT)",
    keywords=("vision", "linear attention", "mobile", "depth-wise convolution", "image classification"),
    related=("inline-attention", "rala", "lit"),
)
