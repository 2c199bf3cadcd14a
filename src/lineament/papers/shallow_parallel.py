"""shallow-parallel: a residual stack with its layers side by side."""

from .record import Figure, Paper

RECORD = Paper(
    slug="shallow-parallel",
    title="Make Deep Networks Shallow Again",
    authors="Bermeitinger, Hrycej, Handschuh",
    year=2023,
    venue="KDIR 2023",
    arxiv="2309.08414",
    room=("nn", "explain"),
    status="planned",
    summary=(
        "Multiplying out a residual stack gives the identity, each layer alone, and compositions of several "
        "layers. Without the compositions it is a single broad layer with the same parameters. The library "
        "converts a stack to this form and to orders in between, and reports how much of the output each order "
        "explains."
    ),
    claim="At equal parameters the parallel form reaches about the same loss as the sequential one.",
    figures=(
        Figure("trained combinations, MNIST and CIFAR-10", "6,912", "abstract"),
        Figure("sequential against parallel, training and validation loss", "about equal", "abstract"),
        Figure("detail", "shallow sometimes better on validation, deep slightly better on training", "secondary"),
    ),
    experiment=(
        "Residual stacks of 2 to 16 dense layers on digits, sequential and parallel, 3 seeds. Holds if test "
        "accuracies differ by less than 1.5 points at every depth and the gap in test loss, parallel minus "
        "deep, falls with depth; training losses are not equal at this size, and that is reported."
    ),
    code=None,
    keywords=("residual network", "depth", "parallel layers", "taylor expansion", "shallow network"),
    related=("depth-efficiency", "hourglass-mlp"),
)
