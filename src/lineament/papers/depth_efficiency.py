"""depth-efficiency: do late layers compute, or only polish?"""

from typing import Any

from .record import Figure, Paper, Scales

RECORD = Paper(
    slug="depth-efficiency",
    title="Do Language Models Use Their Depth Efficiently?",
    authors="Csordás, Manning, Potts",
    year=2025,
    venue="NeurIPS 2025",
    arxiv="2505.13898",
    room=("explain", "graph"),
    status="works",
    summary=(
        "Residual-stream measurements of what depth is used for: how much and in which direction each sublayer "
        "writes, what a skipped layer changes further up for tokens still to come, the logit lens, depth scores "
        "by difficulty, and linear maps between models of different depth. One report says where a model "
        "changes phase."
    ),
    claim=(
        "A deeper model spreads the same computation over more layers: the best linear map from a shallow model "
        "runs along equal relative depth."
    ),
    figures=(
        Figure(
            "contribution of the second half of the layers",
            "much smaller, with a change of phase near the middle",
            "abstract",
        ),
        Figure("depth used by harder, multi-hop inputs", "no more than by easy ones", "abstract"),
        Figure(
            "maps from a shallow to a deep model",
            "error lowest along the diagonal of relative depth",
            "abstract",
        ),
        Figure("values behind the curves", "not read", "unverified"),
    ),
    experiment=(
        "Character models of 4 and 8 layers are trained on Python source files and mapped onto each other in "
        "closed form. Holds if best source and target depth correlate above 0.8 and above the 95th percentile "
        "of a permuted null, and the logit-lens divergence falls monotonically; the late-layer decline is not "
        "expected at this size and not claimed."
    ),
    code="RobertCsordas/llm_effective_depth (no licence file)",
    keywords=("depth", "residual stream", "logit lens", "layer skipping", "interpretability", "language model"),
    related=("alignment-maps", "transcoders", "shallow-parallel"),
)  # fmt: skip

SCALES = Scales(  # seeds; steps; sequences to fit maps from, to test them, to read; "smoke": the mechanics only
    smoke=(1, 3, 12, 4, 2), small=(1, 300, 400, 64, 16), full=(3, 600, 400, 64, 32),
)  # fmt: skip
RULES = {  # fixed before the first run: the worst seed of each; (at least, at most)
    "correlation of relative depths": (0.8, 1.0),
    "its lead over the 95th percentile of permuted layers": (0.0, 2.0),
    "largest rise of the logit lens's KL, 8 layers": (-99.0, 0.0),
}
LENGTH = 96


def experiment(scale: str = "small") -> Any:
    """Train models of 4 and 8 layers, read their depth, and map one onto the other; return `report.Evidence`."""
    import time

    from lineament.report import Evidence

    began, (seeds, *sizes) = time.perf_counter(), SCALES[scale]
    rows, found = [], []
    for seed in range(seeds):
        made, numbers = _run(seed, *sizes)
        untrained = _run(seed, 0, *sizes[1:])[1]
        rows += [*made, {"layers": "4 to 8, untrained", "seed": seed, "correlation": untrained[0],
                         "95th percentile, permuted": untrained[1]}]  # fmt: skip
        found.append(numbers)
    worst = (min(n[0] for n in found), min(n[0] - n[1] for n in found), max(n[2] for n in found))
    return Evidence.judged(
        dict(zip(RULES, worst, strict=True)), RULES, verdict=scale != "smoke", name=RECORD.slug, claim=RECORD.claim,
        rows=rows, seeds=list(range(seeds)), seconds=time.perf_counter() - began,
        notes="The decline of contributions and skip effects in late layers belongs to large pretrained models and is "
        "not claimed at this size; its numbers stand in the rows. Effective depth is this library's summary.",
    )  # fmt: skip


def _run(seed: int, steps: int, fitted: int, tested: int, read: int) -> tuple[list[dict[str, Any]], list[float]]:
    """Return a row per layer and target layer; the correlation, its chance level, and the largest rise of the KL."""
    from itertools import pairwise

    from lineament import explain
    from lineament.tasks import characters

    text = characters("python-source", length=LENGTH)
    models, rows, rise = {}, [], 0.0
    for layers in (4, 8):
        models[layers], loss = _learned(text, layers, steps, seed)
        found = explain.depth(models[layers], list(text.test[:read]), cuts=1, seed=seed)
        KL, ratio = found.lens["KL"], found.written["|c|/|h|"]["mean"]
        rise = max(after - before for before, after in pairwise(KL))
        rows += [
            {"layers": layers, "seed": seed, "loss": loss, "layer": s, "|c|/|h|": ratio[s], "lens KL": KL[s],
             "skipped, current: later layers": sum(found.current["mean"][s][s + 1 :]) / max(1, layers - s - 1),
             "skipped, future: later layers": sum(found.future["mean"][s][s + 1 :]) / max(1, layers - s - 1),
             "effective depth": found.effective_depth}
            for s in range(layers)
        ]  # fmt: skip
    unseen = text.test[read : read + tested]
    maps = explain.layer_maps(models[4], models[8], text.train[:fitted].split(50), unseen.split(50))[0]
    best = maps.best.tolist()
    rows += [
        {"layers": "4 to 8", "seed": seed, "target layer": j, "best from": i, "R2": float(maps.r2[i, j]),
         "R2 from the embedding": float(maps.r2[0, j]), "relative error": float(maps.error[i, j])}
        for j, i in enumerate(best)
    ]  # fmt: skip
    return rows, [maps.diagonal(), maps.chance(), rise]


def _learned(text: Any, layers: int, steps: int, seed: int) -> tuple[Any, float]:
    """Train a Llama on characters; return it with its loss on unseen text, in nats."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from lineament import train
    from lineament._base.seeds import generator, seeded
    from lineament.tasks import next_token_loss, perplexity

    shape: dict[str, Any] = {"hidden_size": 96, "intermediate_size": 256, "num_attention_heads": 4}
    with seeded(seed):
        model = LlamaForCausalLM(
            LlamaConfig(vocab_size=text.vocab, num_hidden_layers=layers, max_position_embeddings=LENGTH, **shape)
        )

    def draw(step: int) -> torch.Tensor:
        return text.train[torch.randint(len(text.train), (24,), generator=generator(seed * 100_003 + step))]

    train.fit(model.train(), draw, next_token_loss, train.FitConfig(steps=steps, lr=2e-3, warmup=min(20, steps)))
    return model.eval(), perplexity(model, text.test[-256:], batch_size=32).nll
