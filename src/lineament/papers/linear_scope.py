"""linear-scope: the affine map a network is for one input, kept runnable."""

from .record import Figure, Paper

RECORD = Paper(
    slug="linear-scope",
    title="A Tour of Convolutional Networks Guided by Linear Interpreters",
    authors="Navarrete Michelini, Liu, Lu, Jiang",
    year=2019,
    venue="ICCV 2019",
    arxiv="1908.05168",
    room=("explain",),
    status="planned",
    summary=(
        "For a fixed input a network acts as an affine map, and this system keeps that map runnable: half of "
        "the batch is the real input, the other half are probes that follow the decisions of the first half. "
        "Columns, rows, singular vectors and the response to biases can then be read without building the map."
    ),
    claim=(
        "The output equals the interpreted linear map plus its bias response exactly, and their shares show how "
        "much a decision rests on biases."
    ),
    figures=(
        Figure("ImageNet classifiers", "vote per pixel and lean heavily on biases", "secondary"),
        Figure(
            "super-resolution and image translation",
            "wavelet-like bases; copying, moving and templates",
            "secondary",
        ),
        Figure("share of the bias in a decision", "not available", "unverified"),
    ),
    experiment=(
        "A digit CNN is replayed as its affine map, decisions are split into linear and bias part, and a small "
        "super-resolution net is compared with bicubic rows. Holds if map plus bias equals the output and the "
        "map equals the Jacobian to float precision; the bias share is reported, and rows should be clearly "
        "more elongated at edges than on flat pixels."
    ),
    code=None,
    keywords=(
        "linear interpreter",
        "affine map",
        "jacobian",
        "singular value decomposition",
        "cnn",
        "super-resolution",
        "bias",
    ),
    related=("dynamic-lrp", "relp", "level-set-traversal"),
)
