"""neural-circuit-diagrams: architectures drawn so that every wire is an axis."""

from typing import Any

from .record import Figure, Paper, Scales

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
    status="works",
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

SCALES = Scales(smoke=("MLP", "attention, views", "attention, einsum"), small=(), full=())  # (): all nets
RULES = {  # fixed before the first run, for the worst of all nets; (at least, at most)
    "largest |term - model| / largest |model|": (0.0, 1e-5),
    "largest share of opaque operators": (0.0, 0.02),
    "axes of attention and MLP as written by hand": (1.0, 1.0),
    "spellings of attention that give the same term": (1.0, 1.0),
}
TRUTH = {  # by hand: the sizes of all axes: batch, inputs, hidden, outputs; batch, tokens, width in and out, h, k, v
    "MLP": [2, 5, 16, 23], "attention, views": [2, 4, 6, 6, 7, 24, 24],
}  # fmt: skip
SPELLINGS = ("attention, views", "attention, fused", "attention, einsum", "attention, nn.MultiheadAttention")


def experiment(scale: str = "small") -> Any:
    """Trace, draw and run small nets of many kinds as terms; return `report.Evidence`."""
    import time

    from lineament.report import Evidence

    began, asked, nets = time.perf_counter(), SCALES[scale], _nets()
    nets |= _pretrained() if scale == "full" else {}
    chosen, rows, terms = asked or tuple(nets), [], {}
    for name in chosen:
        row, terms[name] = _drawn(name, *nets[name])
        rows.append(row)
    spelled = [name for name in SPELLINGS if name in chosen]
    same = [terms[name].signature() == terms[spelled[0]].signature() for name in spelled]
    right = [sorted(axis.size for axis in terms[name].axes) == sizes for name, sizes in TRUTH.items()]
    found = (
        max(row["error"] for row in rows), max(row["opaque"] for row in rows), sum(right) / len(right),
        sum(same) / len(same),
    )  # fmt: skip
    return Evidence.judged(
        dict(zip(RULES, found, strict=True)), RULES, verdict=scale != "smoke", name=RECORD.slug, claim=RECORD.claim,
        rows=rows, seeds=[0], seconds=time.perf_counter() - began,
        notes="Beside each diagram: how many nodes a graph of operators has, in which no axis has an identity.",
    )  # fmt: skip


def _nets() -> dict[str, tuple[Any, dict[str, Any]]]:
    """Nets with an example call; unequal sizes keep axes apart for the reader."""
    import torch
    from torch import nn
    from transformers import ViTConfig, ViTForImageClassification

    from lineament._base.seeds import generator, seeded
    from lineament.graph.diagrams.examples import UNet, attention
    from lineament.models.classifiers import ResidualClassifier, dense_classifier
    from lineament.models.tiny import tiny, tiny_teacher

    def given(name: str, *shape: int) -> dict[str, Any]:
        return {name: torch.randn(*shape, generator=generator(0))}

    text = {"input_ids": torch.tensor([[3, 5, 7, 2, 9, 4, 1, 8, 6, 11, 13]]), "use_cache": False}
    shape: dict[str, Any] = {"hidden_size": 24, "num_attention_heads": 4, "num_hidden_layers": 3}
    picture = ViTConfig(**shape, intermediate_size=40, image_size=16, patch_size=4, num_channels=3)
    kinds = ("view", "sdpa", "einsum", "module")
    with seeded(0):
        attentions = {
            name: (attention(kind), given("x", 2, 7, 24)) for name, kind in zip(SPELLINGS, kinds, strict=True)
        }
        block = nn.TransformerEncoderLayer(24, 4, 40, batch_first=True, norm_first=True).eval()
        return {
            "MLP": (dense_classifier((16, 23, 5)), given("input", 2, 16)), **attentions,
            "encoder block": (block, given("src", 2, 7, 24)),
            "ResNet20": (ResidualClassifier().eval(), given("x", 2, 1, 16, 16)),
            "U-Net": (UNet().eval(), given("x", 2, 1, 16, 16)),
            "ViT": (ViTForImageClassification(picture).eval(), given("pixel_values", 2, 3, 16, 16)),
            "GPT-2": (tiny_teacher("gpt2"), text), "Llama": (tiny_teacher("llama"), text),
            "student, hedgehog and window": (tiny("llama", "hedgehog-window"), text),
        }  # fmt: skip


def _pretrained() -> dict[str, tuple[Any, dict[str, Any]]]:
    import torch

    from lineament.models import load_model

    return {"SmolLM2-135M": (load_model("smollm2"), {"input_ids": torch.arange(13)[None], "use_cache": False})}


def _drawn(name: str, net: Any, call: dict[str, Any]) -> tuple[dict[str, Any], Any]:
    """Draw one net and run its term beside it in float64."""
    import time

    from lineament import graph

    began = time.process_time()
    found = graph.diagram(net, **call)
    svg, term = found.svg(), found.term
    seconds = time.process_time() - began
    row = {
        "net": name, "error": found.error(**call), "opaque": term.opaque_share, "operators": len(term.ops),
        "axes": len(term.axes), "SVG elements": svg.count("<") - svg.count("</"), "CPU seconds": seconds,
        "nodes of a plain graph": term.counts["operators"] + term.counts["constant"],
    }  # fmt: skip
    return row, term
