"""lightnet: a running normaliser instead of decay, so one scan sees the whole grid."""

from typing import Any

from .record import Figure, Paper, Scales

RECORD = Paper(
    slug="lightnet",
    title="You Only Scan Once: Efficient Multi-dimension Sequential Modeling with LightNet",
    authors="Qin, Mao, Shen, Li, Zhang, Dai, Zhong",
    year=2024,
    venue=None,
    arxiv="2405.21022",
    room=("nn", "ops", "models"),
    status="works",
    summary=(
        "Replaces the decay of linear attention by a running normaliser per key channel, which does not depend "
        "on the scan order. Without causality one pass then covers images, video or text, and with causality it "
        "is an ordinary recurrence. Two position encodings for grids, of linear cost, come with it."
    ),
    claim=(
        "A single pass without decay matches decay attention that scans an image two or four times, at a "
        "fraction of the time."
    ),
    figures=(
        Figure(
            (
                "one scan against multi-scan linear models: image classification and generation, bidirectional "
                "and causal language modelling"
            ),
            "on par or better",
            "abstract",
        ),
        Figure("scores per model", "not read", "unverified"),
    ),
    experiment=(
        "Digits as 64 pixel tokens: LightNet in one pass with and without its encodings against decay attention "
        "in 1, 2 and 4 scans, 3 seeds, plus timing on grids up to 128x128. Holds if one pass is at least as "
        "accurate as one decay scan and within 1 point of the best of 2 and 4, and at 128x128 at least 1.5 "
        "times faster than one scan and 4 times faster than four."
    ),
    code="OpenNLPLab/LightNet (licence unknown)",
    keywords=("linear attention", "recurrence", "position encoding", "image", "one scan", "multi-dimensional"),
    related=("hybrid-linear-attention", "transnormer", "lightning-attention-2"),
)

SCALES = Scales(smoke=(1, 1, 3), small=(3, 4, 7), full=(5, 12, 15))  # seeds, epochs, repeats of a timing
WIDTH, HEADS, LAYERS, BATCH = 32, 2, 2, 20
SIDES = (32, 64, 128)  # of the grids that are timed
ONCE = ("LightNet, no positions", "LightNet, MD-LRPE")  # reported beside the others, of the first seed
ARMS = {  # layer, scans (0: one pass over all), whether MD-TPE is added behind the embedding, options of the layer
    "LightNet, no positions": ("lightnet", 0, False, {"theta": None}), "LightNet, MD-LRPE": ("lightnet", 0, False, {}),
    "LightNet, MD-TPE + MD-LRPE": ("lightnet", 0, True, {}),
    **{f"decay, {n} scan{'s' * (n > 1)}": ("lightning", n, False, {}) for n in (1, 2, 4)},
}  # fmt: skip
RULES = {  # fixed before the first run, accuracies as means over seeds; (at least, at most)
    "accuracy of LightNet over one decay scan": (0.0, 1.0),
    "accuracy of LightNet over the best of 2 and 4 scans": (-0.01, 1.0),
    "one decay scan / one pass, 128 x 128": (1.5, 1e9),
    "four decay scans / one pass, 128 x 128": (4.0, 1e9),
    "exponent of one pass": (0.0, 1.1),
}


def experiment(scale: str = "small") -> Any:
    """Classify digits, pixel by pixel, in one pass and in 1, 2 and 4 scans; time both on grids; `report.Evidence`."""
    import time
    from math import log
    from statistics import linear_regression

    from lineament.report import Evidence

    began, (count, epochs, repeats) = time.perf_counter(), SCALES[scale]
    runs = {arm: [_trained(arm, seed, epochs) for seed in range(1 if arm in ONCE else count)] for arm in ARMS}
    right = {arm: sum(run["accuracy"] for run in of) / len(of) for arm, of in runs.items()}
    ours, one, two, four = (right[arm] for arm in list(ARMS)[2:])
    seconds = _speed(repeats)
    single, largest = seconds["one pass"], max(SIDES)
    slope = linear_regression([log(n * n) for n in SIDES], [log(single[n]) for n in SIDES]).slope
    found = (ours - one, ours - max(two, four), *(seconds[scans][largest] / single[largest]
             for scans in ("one decay scan", "four decay scans")), slope)  # fmt: skip
    rows: list[dict[str, Any]] = [
        {"what": arm, "accuracy": right[arm], "seeds": [run["accuracy"] for run in of],
         "parameters": int(of[0]["parameters"]),
         "CPU s per epoch": sum(run["seconds"] for run in of) / len(of) / epochs}
        for arm, of in runs.items()
    ]  # fmt: skip
    rows += [{"what": f"{form}, ms", **{f"{n} x {n}": 1e3 * s for n, s in of.items()}} for form, of in seconds.items()]
    return Evidence.judged(
        dict(zip(RULES, found, strict=True)), RULES, verdict=scale != "smoke", name=RECORD.slug, claim=RECORD.claim,
        rows=rows, seeds=list(range(count)), seconds=time.perf_counter() - began,
        notes="positions cost: MD-LRPE doubles the key width; the timing rules are on the pass without them",
    )  # fmt: skip


def _trained(arm: str, seed: int, epochs: int) -> dict[str, float]:
    import time

    from lineament import data, models, nn, train
    from lineament._base.seeds import seeded
    from lineament.tasks.classify import accuracy, class_loss

    learning, unseen = data.normalized([data.load_images("digits", split=split) for split in ("train", "test")])
    kind, scans, encoded, options = ARMS[arm]
    with seeded(seed):
        made = [nn.Mixer(*nn.published(kind, model_width=WIDTH, heads=HEADS, options=options)) for _ in range(LAYERS)]
        mixers = [nn.Scanned(mixer, scans) if scans else nn.Field(mixer) for mixer in made]
        encode = nn.ToeplitzEncoding(WIDTH, HEADS, axes=2) if encoded else None
        net = models.GridClassifier(mixers, WIDTH, encode=encode)
    steps, began = epochs * (len(learning) // BATCH), time.process_time()
    config = train.FitConfig(steps=steps, lr=4e-3, warmup=min(20, steps // 2), seed=seed, log_every=steps)
    train.fit(net.train(), data.image_batches(learning, BATCH, seed=seed), class_loss, config)
    spent = time.process_time() - began
    return {
        "accuracy": accuracy(net.eval(), unseen.pixels, unseen.labels, batch_size=200),
        "parameters": sum(p.numel() for p in net.parameters()), "seconds": spent,
    }  # fmt: skip


def _speed(repeats: int) -> dict[str, dict[int, float]]:
    """Median seconds (of the thread) of a pass over a grid: 2 heads of 64, float32, forward, forms taking turns."""
    import time
    from statistics import median

    import torch

    from lineament import nn, ops
    from lineament._base.seeds import generator
    from lineament.tasks import in_turn

    found: dict[str, dict[int, float]] = {}
    threads, _ = torch.get_num_threads(), torch.set_num_threads(1)
    for side in SIDES:
        q, k, v = (torch.randn(1, side * side, 2, 64, generator=generator(i)) for i in range(3))
        place, log_decay = nn.coordinates((side, side))[None], torch.tensor([-0.0625, -0.00390625])
        gate = log_decay.expand(1, side * side, 2)
        forms = {
            "one pass": lambda x=(q, k, v): nn.global_field(*x),
            "one pass, MD-LRPE": lambda x=(q, k, v), place=place: nn.global_field(*x, place=place),
            "one decay scan": lambda x=(q, k, v, gate): ops.decayed_attention(*x),
            "four decay scans": lambda x=(q, k, v, gate): [ops.decayed_attention(*x) for _ in range(4)],
        }
        for form, seconds in in_turn(forms, repeats, clock=time.thread_time).items():
            found.setdefault(form, {})[side] = median(seconds)
    torch.set_num_threads(threads)
    return found
