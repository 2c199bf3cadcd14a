"""hourglass-mlp: residual MLPs whose skip connection is the wide part."""

from typing import Any

from .record import Figure, Paper, Scales

RECORD = Paper(
    slug="hourglass-mlp",
    title="Rethinking the shape convention of an MLP",
    authors="Chen, Lee, Liao, Shiu",
    year=2025,
    venue=None,
    arxiv="2510.01796",
    room=("nn", "tasks"),
    status="works",
    summary=(
        "Turns the residual MLP inside out: the skip connection runs at an expanded width and every block "
        "squeezes through a narrow bottleneck. The input is lifted once, and the lift may stay at its random "
        "initial value. The library builds both shapes at matched parameters."
    ),
    claim=(
        "At equal parameters the hourglass shape gives better trade-offs than the conventional one, and a fixed "
        "random lift costs little."
    ),
    figures=(
        Figure("Pareto front over parameters, generative image tasks", "hourglass ahead", "abstract"),
        Figure("best shape as the budget grows", "deeper, wider skip, narrower bottleneck", "abstract"),
        Figure(
            "MNIST super-resolution: conventional / hourglass (skip; bottleneck x blocks)",
            "784; 1150 x 1 / 1150; 115 x 10",
            "repository",
        ),
        Figure(
            "ImageNet-32 denoising: conventional / hourglass (skip; bottleneck x blocks)",
            "3072; 4012 x 1 / 3546; 270 x 7",
            "repository",
        ),
        Figure("PSNR values", "not read", "unverified"),
    ),
    experiment=(
        "Denoising of natural 12x12 patches at matched parameters, both shapes, lift trained and fixed, with "
        "the whole front printed. Holds if the fixed lift is within 0.1 dB of the trained one with a third "
        "fewer trainable parameters, and below about 150k trainable parameters the fixed hourglass lies on or "
        "above the front; a win in total parameters is not expected at this size."
    ),
    code="official repository, name unverified (licence unverified)",
    keywords=("mlp", "residual", "bottleneck", "random projection", "pareto front"),
    related=("shallow-parallel", "g2gnet", "projection-head"),
)

SCALES = Scales(smoke=(1, 1, 1200), small=(2, 15, 13300), full=(5, 60, 13300))  # seeds; epochs; patches
SEED, SIZE, SIGMA, BATCH = 5200, 12, 0.15, 128
BUDGETS = (108_000, 126_200, 189_000)  # trainable parameters
NETS: dict[str, tuple[str, dict[str, Any]]] = {  # shape, and what differs; all of two blocks but the last two
    **{f"conventional, {n // 1000}k": ("conventional", {"budget": n, "blocks": 2}) for n in BUDGETS},
    **{f"hourglass, fixed lift, {n // 1000}k": ("hourglass", {"budget": n, "blocks": 2, "lift": "fixed"})
       for n in BUDGETS},
    "hourglass, 189k": ("hourglass", {"budget": 189_000, "blocks": 2}),
    "hourglass, deeper, 189k": ("hourglass", {"budget": 189_000, "blocks": 4}),
}  # fmt: skip
RULES = {  # fixed before the first run, for means over seeds; (at least, at most)
    "fixed lift below the trained one at the same width, dB": (-9.0, 0.1),
    "trainable parameters of the fixed lift / of the trained one": (0.0, 0.67),
    "fixed hourglass over the best net of no more trainable parameters, below 150k, worst, dB": (0.0, 9.0),
}


def experiment(scale: str = "small") -> Any:
    """Denoise natural patches by nets of both shapes; return `report.Evidence` with the front printed."""
    import time

    from lineament.report import Evidence, front

    began, (count, epochs, patches) = time.perf_counter(), SCALES[scale]
    runs = [_run(SEED + i, epochs, patches) for i in range(count)]
    rows: list[dict[str, Any]] = []
    for name, config in _configs().items():
        values = [run[name] for run in runs]
        rows.append({"net": name, "skip": config.skip, "hidden": config.hidden, "blocks": config.blocks,
                     "trainable": config.trainable, "total": config.total, "multiply-adds": config.multiply_adds,
                     "dB": sum(values) / count, "seeds": values})  # fmt: skip
    for cost in ("trainable", "total", "multiply-adds"):
        best = front(rows, cost, "dB")
        for row in rows:
            row[f"on the front of {cost}"] = row in best
    found = dict(zip(RULES, _found({row["net"]: row for row in rows}), strict=True))
    return Evidence.judged(
        found, RULES, verdict=scale != "smoke", name=RECORD.slug, claim=RECORD.claim, rows=rows,
        seeds=[SEED + i for i in range(count)], seconds=time.perf_counter() - began,
        notes="one learning rate for all nets; PSNR on patches from parts of the photographs nobody trained on",
    )  # fmt: skip


def _found(of: dict[str, Any]) -> tuple[float, ...]:
    trained, fixed = of["hourglass, 189k"], of["hourglass, fixed lift, 126k"]
    leads = []
    for name, row in of.items():
        if "fixed" in name and row["trainable"] < 150_000:
            others = [o["dB"] for n, o in of.items() if "fixed" not in n and o["trainable"] <= 1.01 * row["trainable"]]
            leads.append(row["dB"] - max(others))
    return trained["dB"] - fixed["dB"], fixed["trainable"] / trained["trainable"], min(leads)


def _configs() -> dict[str, Any]:
    from lineament import nn

    found = {}
    for name, (shape, how) in NETS.items():
        options = {**how, "skip": 3 * SIZE**2 if shape == "hourglass" else None}
        found[name] = nn.matched(shape, SIZE**2, SIZE**2, count="trainable", **options)
    return found


def _run(seed: int, epochs: int, patches: int) -> dict[str, float]:
    import dataclasses

    import torch

    from lineament import data, nn, tasks, train
    from lineament._base.seeds import seeded

    clean, unseen = (data.load_patches(SIZE, split=split).flatten(1) for split in ("train", "test"))
    clean = clean[torch.randperm(len(clean), generator=torch.Generator().manual_seed(seed))[:patches]]
    scored = tasks.noisy(unseen, SIGMA, seed=seed)
    draw = data.image_batches(data.Images(clean, torch.zeros(len(clean)), 1), BATCH, seed=seed)

    def batches(step: int) -> Any:  # new noise every step
        pixels, _ = draw(step)
        return tasks.noisy(pixels, SIGMA, seed=seed * 1_000_003 + step), pixels

    found = {}
    for name, config in _configs().items():
        with seeded(seed):
            net = nn.ResidualMLP(dataclasses.replace(config, seed=seed))
        steps = epochs * (len(clean) // BATCH)
        settings = train.FitConfig(steps=steps, lr=1e-3, betas=(0.9, 0.999), seed=seed, log_every=steps)
        train.fit(net, batches, tasks.restoration_loss, settings)
        found[name] = tasks.psnr(net.eval(), scored, unseen)
    return found
