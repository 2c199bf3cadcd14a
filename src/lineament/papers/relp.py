"""relp: activation patching at the cost of one backward pass, with relevance instead of gradients."""

from .record import Figure, Paper

RECORD = Paper(
    slug="relp",
    title="RelP: Faithful and Efficient Circuit Discovery in Language Models via Relevance Patching",
    authors="Rezaei Jafari, Eberle, Khakzar, Nanda",
    year=2025,
    venue="Mechanistic Interpretability Workshop at NeurIPS 2025 (spotlight)",
    arxiv="2508.21258",
    room=("explain", "graph"),
    status="planned",
    summary=(
        "Activation patching needs a forward pass per component, and attribution patching replaces it by one "
        "gradient that is a poor secant in deep nets. RelP keeps that cost but propagates relevance "
        "coefficients instead of the gradient, with frozen norm scales, identity rules for activations and half "
        "rules for gates."
    ),
    claim=(
        "Relevance coefficients approximate true patching much better than gradients on the residual stream and "
        "on MLP outputs."
    ),
    figures=(
        Figure(
            "GPT-2 large, MLP outputs, Pearson correlation with patching: gradient / RelP",
            "0.006 / 0.956",
            "abstract",
        ),
        Figure("GPT-2 small, residual stream: gradient / RelP", "0.753 / 0.968", "secondary"),
        Figure("GPT-2 small, attention outputs: gradient / RelP", "0.979 / 0.962", "secondary"),
        Figure("GPT-2 small, MLP outputs: gradient / RelP", "0.195 / 0.992", "secondary"),
        Figure(
            "sparse feature circuits against integrated gradients",
            "comparable faithfulness in one pass",
            "abstract",
        ),
    ),
    experiment=(
        "Four-layer GPT-2-shaped models learn synthetic indirect-object sentences, and every layer and position "
        "is patched exactly and by both approximations. Holds if RelP's correlation leads the gradient's by at "
        "least 0.1 on the residual stream and on MLP outputs in each of 3 seeds."
    ),
    code="FarnoushRJ/RelP (Apache-2.0)",
    keywords=(
        "activation patching",
        "attribution patching",
        "circuit discovery",
        "relevance propagation",
        "interpretability",
        "language model",
    ),
    related=("dynamic-lrp", "transcoders", "alignment-maps", "linear-scope"),
)
