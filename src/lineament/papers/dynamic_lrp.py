"""dynamic-lrp: relevance propagation on the operations of the autograd graph."""

from .record import Figure, Paper

RECORD = Paper(
    slug="dynamic-lrp",
    title=("Always Keep Your Promises: DynamicLRP, A Model-Agnostic Solution To Layer-Wise Relevance Propagation"),
    authors="Lee, Millan Arias",
    year=2025,
    venue=None,
    arxiv="2512.07010",
    room=("explain", "graph"),
    status="planned",
    summary=(
        "Layer-wise relevance propagation with one rule per tensor operation instead of per module, so that "
        "about fifty rules cover any model without changing it. Activations that autograd did not save are "
        "found by deferred look-ups called promises. Here it is the relevance engine that patching, linear "
        "replay and attribution graphs share."
    ),
    claim=(
        "Rules on tensor operations cover nearly every node of very different models and attribute as "
        "faithfully as tools written per architecture."
    ),
    figures=(
        Figure("VGG16, ImageNette, ABPC: DynamicLRP / Zennit", "1.77 / 1.69", "abstract"),
        Figure("ViT-B/16, CIFAR-10, ABPC: DynamicLRP / AttnLRP", "1.46 / 1.46", "paper"),
        Figure("RoBERTa-large / Flan-T5-large, SQuADv2, top token in the gold span", "93.70 % / 95.06 %", "abstract"),
        Figure("graph nodes covered, 15 models", "31,440 of 31,465 (99.92 %)", "paper"),
        Figure("graph nodes covered, revised version", "99.99 %", "abstract"),
    ),
    experiment=(
        "A 4-layer GPT-2-shaped model on synthetic indirect-object prompts, a small digit CNN with pixel "
        "flipping, and node coverage over tiny configurations of many architectures. Holds if the relevance "
        "rules put the answer name first in at least 90 % of prompts where gradient x input does so in at most "
        "40 %; flipping is reported for two occluders because the order depends on it."
    ),
    code="keeinlev/dynamicLRP (MIT)",
    keywords=("relevance propagation", "lrp", "attribution", "autograd", "conservation", "explainability"),
    related=("relp", "linear-scope", "transcoders"),
)
