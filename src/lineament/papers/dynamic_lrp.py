"""dynamic-lrp: relevance propagation on the operations of the autograd graph."""

from typing import Any

from .record import Figure, Paper, Scales

RECORD = Paper(
    slug="dynamic-lrp",
    title=("Always Keep Your Promises: DynamicLRP, A Model-Agnostic Solution To Layer-Wise Relevance Propagation"),
    authors="Lee, Millan Arias",
    year=2025,
    venue=None,
    arxiv="2512.07010",
    room=("explain", "graph"),
    status="works",
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

RULE_SETS = ("attnlrp", "relp", "cp-lrp", "dynamic", "integrated-gradients", "gradient-x-input")
SCALES = Scales(  # seeds, steps of the language model, prompts, steps of the image model; "smoke": the mechanics only
    smoke=(1, 10, 8, 10), small=(2, 1200, 100, 300), full=(5, 1200, 400, 1000),
)  # fmt: skip
SYSTEM, BASELINE = "attnlrp", "gradient-x-input"
RULES = {SYSTEM: (0.9, 1.0), BASELINE: (0.0, 0.4)}  # share of prompts whose answer's name is on top; fixed beforehand


def experiment(scale: str = "small") -> Any:
    """Name the words an answer comes from, flip pixels, and count covered nodes; return `report.Evidence`."""
    import time

    from lineament.report import Evidence

    began, (seeds, *sizes) = time.perf_counter(), SCALES[scale]
    found = [_words(seed, sizes[0], sizes[1]) for seed in range(seeds)]
    first = {name: [row[name] for row in found] for name in found[0]}
    mean = {name: sum(shares) / seeds for name, shares in first.items()}
    rows: list[dict[str, Any]] = [
        {"test": "answer's name on top", "rules": name, "share of prompts": mean[name], "seeds": first[name]}
        for name in mean
    ]
    rows += _flips(sizes[2]) + _coverage()
    return Evidence.judged(
        mean, RULES, verdict=scale != "smoke", name=RECORD.slug, claim=RECORD.claim, rows=rows,
        seeds=list(range(seeds)), seconds=time.perf_counter() - began,
        notes="The rule is on the share of prompts in which the answer's name comes first, in the mean over seeds.",
    )  # fmt: skip


def _words(seed: int, steps: int, count: int) -> dict[str, float]:
    """Train on sentences with an indirect object; return the share of prompts whose answer's name comes first."""
    import torch

    from lineament import explain
    from lineament.tasks.indirect_object import IndirectObject, learned_model

    language = IndirectObject(seed=seed)
    model = learned_model(language, steps=steps, seed=seed)
    held_out = language.prompts(count, batch=10**6)
    with torch.no_grad():
        right = model(held_out.ids).logits[:, -1].argmax(-1) == held_out.answer
    found = {"model's accuracy": right.float().mean().item()}
    for rules in RULE_SETS:
        R = explain.relevance(model, {"input_ids": held_out.ids}, target=held_out.answer, rules=rules)
        found[rules] = (R.inputs["input_ids"].argmax(1) == held_out.answer_at).float().mean().item()
    return found


def _flips(steps: int) -> list[dict[str, Any]]:
    """Flip the pixels of digits by relevance; the order of methods depends on what is put in their place."""
    import torch
    from torch import nn

    from lineament import data, explain, train
    from lineament._base.errors import InputError
    from lineament._base.seeds import generator, seeded

    try:
        known, unseen = (data.load_images("digits", split=split) for split in ("train", "test"))
    except InputError as missing:
        return [{"test": "flipping", "rules": f"not run: {missing}"}]
    with seeded(0):
        model = nn.Sequential(
            nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(32, 32, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(512, 10),
        )  # fmt: skip
    config, loss = train.FitConfig(steps=steps, lr=2e-3), nn.functional.cross_entropy
    train.fit(model, data.image_batches(known, 128), lambda m, b: (loss(m(b[0]), b[1]), {}), config)
    x, rows = unseen.pixels[:300], []
    for rules in ("random", "gradient-x-input", "epsilon", "gamma", "integrated-gradients"):
        R = torch.rand(x.shape, generator=generator(0))
        R = R if rules == "random" else explain.relevance(model, x, rules=rules).inputs["input"]
        area = {
            key: explain.abpc(*explain.flipping(model, x, R[:, 0], steps=16, baseline=value))
            for key, value in {"ABPC, flipped to 0": 0.0, "ABPC, to the mean": known.pixels.mean(0)}.items()
        }
        rows.append({"test": "flipping", "rules": rules} | area)
    return rows


def _coverage() -> list[dict[str, Any]]:
    """Count the nodes with a rule of their own over every family of decoders, and the largest gap in a ledger."""
    import torch

    from lineament import explain, models

    total, covered, worst, inputs = 0, 0, 0.0, {"input_ids": torch.arange(3, 15).view(2, 6)}
    for family in models.ADAPTERS:
        model = models.tiny_teacher(family)
        rows = explain.coverage(model, inputs)
        total, covered = total + sum(r["count"] for r in rows), covered + sum(r["count"] for r in rows if r["covered"])
        worst = max(worst, explain.relevance(model, inputs).ledger.unaccounted)
    return [{"test": f"coverage, {len(models.ADAPTERS)} families", "nodes": total, "with a rule": covered,
             "largest gap in a ledger": worst}]  # fmt: skip
