"""deltanet: a linear memory that overwrites instead of only adding."""

from typing import Any

from .record import Figure, Paper, Scales

RECORD = Paper(
    slug="deltanet",
    title="Parallelizing Linear Transformers with the Delta Rule over Sequence Length",
    authors="Yang, Wang, Zhang, Shen, Kim",
    year=2024,
    venue="NeurIPS 2024",
    arxiv="2406.06484",
    room=("ops", "nn"),
    status="works",
    summary=(
        "A linear-time sequence mixer whose memory reads what a key returns and writes only the error, so that "
        "a value can be overwritten. Its steps are Householder-like, and their products have a compact form, so "
        "a whole chunk needs only dense matrix products and a single triangular solve."
    ),
    claim=(
        "Erasing before writing improves recall over additive linear attention, and the chunked form trains "
        "fast at the same exactness."
    ),
    figures=(
        Figure("against Mamba and GLA, perplexity and zero-shot tasks including recall", "better", "abstract"),
        Figure("both hybrids with softmax layers against a strong transformer", "better", "abstract"),
        Figure(
            "1.3B, 100B tokens, WikiText perplexity: Transformer++ / Mamba / GLA / DeltaNet",
            "16.85 / 17.06 / 17.22 / 16.87",
            "unverified",
        ),
        Figure(
            "1.3B, 100B tokens, LAMBADA perplexity: Transformer++ / Mamba / GLA / DeltaNet",
            "13.44 / 13.89 / 14.47 / 12.21",
            "unverified",
        ),
    ),
    experiment=(
        "Keys written twice must return their last value: DeltaNet against the same layer without erasing, 2 "
        "layers, 500 steps, beside training-free overwrite and speed checks. Holds if over 3 seeds DeltaNet "
        "reaches 0.93 accuracy with a lead of at least 0.10, the delta memory's error on recent keys is below a "
        "quarter of the additive one's, and the chunked form is at least four times as fast as the token loop."
    ),
    code="fla-org/flash-linear-attention (MIT)",
    keywords=("linear attention", "delta rule", "householder", "recurrence", "associative recall", "language model"),
    related=("kimi-linear", "hybrid-linear-attention", "lightning-attention-2"),
)

SCALES = Scales(  # seeds, training steps, examples scored. "smoke": the mechanics only
    smoke=(1, 3, 16), small=(3, 500, 256), full=(3, 2000, 1024),
)  # fmt: skip
RULES = {  # fixed before the first run, for means over seeds; (at least, at most)
    "accuracy of DeltaNet": (0.93, 1.0),
    "accuracy over additive": (0.10, 1.0),
    "error of recent keys, delta / additive": (0.0, 0.25),
    "error of orthonormal keys": (0.0, 1e-10),
    "a key written twice, delta: from its last value": (0.0, 1e-10),
    "a key written twice, additive: from the sum of both": (0.0, 1e-10),
    "token loop / chunked": (4.0, 1e9),
}
ARMS = {"DeltaNet": True, "additive": False}  # whether a write erases; nothing else differs


def experiment(scale: str = "small") -> Any:
    """Train on keys that are written twice, measure the bare memory, and time its two forms; `report.Evidence`."""
    import time

    from lineament.report import Evidence

    began, (seeds, steps, count) = time.perf_counter(), SCALES[scale]
    right = {arm: [_trained(erase, seed, steps, count) for seed in range(seeds)] for arm, erase in ARMS.items()}
    mean = {arm: sum(of) / seeds for arm, of in right.items()}
    loop, chunked = _speed()
    found = dict(zip(RULES, (mean["DeltaNet"], mean["DeltaNet"] - mean["additive"], *_memory(), loop / chunked),
                     strict=True))  # fmt: skip
    rows = [{"what": f"{arm}, accuracy", "found": mean[arm], "seeds": right[arm]} for arm in ARMS]
    rows += [{"what": "T = 2048, ms: token loop", "found": 1e3 * loop}, {"what": "chunked", "found": 1e3 * chunked}]
    return Evidence.judged(
        found, RULES, verdict=scale != "smoke", name=RECORD.slug, claim=RECORD.claim, rows=rows,
        seeds=list(range(seeds)), seconds=time.perf_counter() - began,
    )  # fmt: skip


def _trained(erase: bool, seed: int, steps: int, count: int) -> float:
    """Accuracy on unseen examples of a 2-layer model whose head has 32 channels for 8 keys, written twice each."""
    from dataclasses import replace

    from lineament import train
    from lineament._base.seeds import seeded
    from lineament.models import FAMILIES, DecoderForCausalLM, decoder_config
    from lineament.tasks import Recall, recall_loss, score_recall

    task: dict[str, Any] = {"task": "overwrite", "length": 48, "vocab": 64, "pairs": 8}  # 31 keys, 31 values
    own = replace(FAMILIES["deltanet"], key_share=0.5, value_share=0.5, options={"erase": erase})
    with seeded(seed):
        model = DecoderForCausalLM(decoder_config(own, vocab_size=64, width=64, layers=2, heads=1))
    config = train.FitConfig(steps=steps, lr=3e-3, seed=seed)
    train.fit(model.train(), Recall(seed=seed, **task).batches(32), recall_loss, config)
    return score_recall(model.eval(), Recall(seed=1000 + seed, **task), count=count).token_accuracy


def _memory() -> tuple[float, float, float, float]:
    """Squared errors of bare memories: recent keys of 96 in 64 channels, orthonormal keys, a rewritten key in both."""
    import torch
    from torch import Tensor
    from torch.nn.functional import normalize

    from lineament._base.seeds import generator
    from lineament.ops import decayed_attention, delta_rule

    def draw(count: int, seed: int) -> Tensor:
        return torch.randn(1, count, 1, 64, generator=generator(seed), dtype=torch.float64)

    def errors(k: Tensor, v: Tensor, last: int, held: Tensor | None = None) -> tuple[float, float]:
        one = torch.ones(k.shape[:3], dtype=k.dtype)
        states = delta_rule(k, k, v, one)[1], decayed_attention(k, k, v)[1]
        k, v = k[0, -last:, 0], v[0, -last:, 0] if held is None else held
        return tuple(((k @ S[0, 0] - v).square().sum(-1) / v.square().sum(-1)).mean().item() for S in states)  # type: ignore[return-value]

    delta, additive = errors(normalize(draw(96, 0), dim=-1), draw(96, 1), 16)
    basis = torch.linalg.qr(draw(64, 2)[0, :, 0])[0][None, :, None]
    twice, v = basis[:, [0, 1, 0]], draw(3, 4)
    both = v[0, [0, 2]].sum(0)
    return delta / additive, max(errors(basis, draw(64, 3), 64)), errors(twice, v, 1)[0], errors(twice, v, 1, both)[1]


def _speed() -> tuple[float, float]:
    """Median seconds of the token loop and of the chunked form: T = 2048, 2 heads of 64, one thread."""
    from statistics import median

    import torch
    from torch.nn.functional import normalize

    from lineament._base.seeds import generator
    from lineament.ops import delta_rule
    from lineament.tasks import in_turn

    q, k, v = (torch.randn(1, 2048, 2, 64, generator=generator(i)) for i in range(3))
    beta = torch.rand(1, 2048, 2, generator=generator(3))
    forms = {form: lambda form=form: delta_rule(q, normalize(k, dim=-1), v, beta, backend=form)
             for form in ("reference", "chunked")}  # fmt: skip
    threads, _ = torch.get_num_threads(), torch.set_num_threads(1)
    seconds = in_turn(forms, 5)
    torch.set_num_threads(threads)
    return median(seconds["reference"]), median(seconds["chunked"])
