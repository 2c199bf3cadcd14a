"""g2gnet: sparse layers in which groups of units talk to partner groups."""

from .record import Figure, Paper

RECORD = Paper(
    slug="g2gnet",
    title="Neuro-inspired Ensemble-to-Ensemble Communication Primitives for Sparse and Efficient ANNs",
    authors="Konstantaropoulos, Smirnakis, Papadopouli",
    year=2025,
    venue=None,
    arxiv="2508.14140",
    room=("nn", "train"),
    status="planned",
    summary=(
        "Splits the units of feed-forward layers into groups that connect densely to their partner group in the "
        "next layer and sparsely to the others, after functional connectivity in mouse visual cortex. Edges may "
        "be pruned and regrown during training, also by a Hebbian rule on correlated activity."
    ),
    claim=("At up to 75 % sparsity, group-structured connections are at least as accurate as the dense network."),
    figures=(
        Figure("sparsity", "up to 75 %", "abstract"),
        Figure("accuracy over dense on Fashion-MNIST, CIFAR-10 and CIFAR-100", "up to +4.3 points", "abstract"),
        Figure("which data set gives the largest gain", "not read", "unverified"),
        Figure("further gain by dynamic and Hebbian rewiring", "positive, size not read", "unverified"),
    ),
    experiment=(
        "An MLP on 300 digit images: dense, random mask and group mask at 75 % sparsity, with and without "
        "rewiring, 5 seeds. Holds if the group mask is at least as accurate as dense and as a random mask of "
        "equal density; rewiring is reported as it falls."
    ),
    code=None,
    keywords=("sparsity", "dynamic sparse training", "hebbian", "modularity", "neuroscience"),
    related=("hourglass-mlp", "shallow-parallel", "configurable-bricks"),
)
