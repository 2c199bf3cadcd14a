"""conn-net: segmentation as the question whether neighbouring pixels belong together."""

from .record import Figure, Paper

RECORD = Paper(
    slug="conn-net",
    title="ConnNet: A Long-Range Relation-Aware Pixel-Connectivity Network for Salient Segmentation",
    authors="Michael Kampffmeyer, Nanqing Dong, Xiaodan Liang, Yujia Zhang, Eric P. Xing",
    year=2018,
    venue="IEEE Transactions on Image Processing 28(5), online 2018",
    arxiv="1804.07836",
    room=("tasks",),
    status="planned",
    summary=(
        "Salient segmentation in which the network predicts, for each pixel, whether it is connected to each of "
        "its eight neighbours, and the mask is read off the connections both sides agree on. Target, loss and "
        "decoder fit any segmentation network or mask branch."
    ),
    claim=("Predicting connectivity instead of a binary mask gives more coherent segmentations on the same backbone."),
    figures=(
        Figure("connectivity against binary segmentation, several backbones, both tasks", "better", "abstract"),
        Figure("MSRA-B, maximum F", "about 0.933", "unverified"),
        Figure("salient instance segmentation, mAP", "81.06", "unverified"),
    ),
    experiment=(
        "Decoding is tested exactly under random flips of decisions; then a 60K-parameter network on procedural "
        "textures is trained with a binary and with a connectivity head. Holds if the connectivity head's mean "
        "IoU is at least the binary one's on 2 of 3 seeds with at least 20 % fewer spurious components."
    ),
    code=None,
    keywords=("segmentation", "saliency", "pixel connectivity", "non-local block", "instance segmentation"),
    related=("sensor-layout",),
)
