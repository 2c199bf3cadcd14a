"""neural-circuit-diagrams: architectures drawn so that every wire is an axis."""

from .record import Figure, Paper

RECORD = Paper(
    slug="neural-circuit-diagrams",
    title=(
        "Neural Circuit Diagrams: Robust Diagrams for the Communication, Implementation, and Analysis of Deep "
        "Learning Architectures"
    ),
    authors="Abbott",
    year=2024,
    venue="TMLR 2024",
    arxiv="2402.05424",
    room=("graph",),
    status="planned",
    summary=(
        "A graphical language whose wires are tensor axes: shapes, broadcasting and reshapes become visible, "
        "and a diagram corresponds to code. The paper draws by hand. Here any traceable model becomes a typed "
        "term with inferred axes, an SVG drawing, and an executable proof that the drawing is right."
    ),
    claim=(
        "A diagram with an identity for every axis describes an architecture completely enough to be run, "
        "whatever way the code was written."
    ),
    figures=(
        Figure("worked examples", "attention, convolutions, identity ResNet, U-Net, ViT", "paper"),
        Figure("benchmark numbers", "none in the paper", "paper"),
    ),
    experiment=(
        "MLP, three spellings of attention, encoder, convolution blocks, U-Net, ViT and tiny GPT-2 and Llama "
        "are traced, drawn and executed as terms. Holds if terms reproduce the models to 1e-5, at most 2 % of "
        "the nodes are opaque, the axes of attention and MLP match a hand-written truth, and the three "
        "attentions give the same term up to renaming."
    ),
    code="vtabbott/Neural-Circuit-Diagrams (no licence file)",
    keywords=("diagram", "tensor axes", "einsum", "tracing", "torch export", "svg"),
    related=("weight-matching", "dynamic-lrp"),
)
