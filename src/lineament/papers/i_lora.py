"""i-lora: a fast and a slow LoRA against forgetting."""

from typing import Any

from .record import Figure, Paper, Scales

RECORD = Paper(
    slug="i-lora",
    title="Analyzing and Reducing Catastrophic Forgetting in Parameter Efficient Tuning",
    authors="Ren, Li, Wang, Zhao, Qin",
    year=2024,
    venue=None,
    arxiv="2402.18865",
    room=("weights", "train"),
    status="works",
    summary=(
        "Sequential LoRA tuning forgets, yet somewhere on the straight line from the adapter before a task to "
        "the one after it, loss is low on old and new tasks alike. I-LoRA follows that line: a fast adapter "
        "learns, a slow one averages it, and replayed samples tie the fast to the slow."
    ),
    claim=(
        "Points inside the line between successive adapters balance old and new tasks, and tuning with replay "
        "and a slow adapter forgets far less than plain sequential tuning."
    ),
    figures=(
        Figure("8-task stream, gain over the best earlier method", "up to 11 points", "abstract"),
        Figure(
            "adapters interpolated between tasks",
            "old-task score kept at little cost on the new task",
            "abstract",
        ),
        Figure("scores per task", "not checked", "unverified"),
    ),
    experiment=(
        "Four digit domains in sequence on a frozen MLP with LoRA of rank 4, 4 seeds: sequential, replay and "
        "I-LoRA. Holds if replay methods lead sequential tuning by at least 30 points and the interpolation "
        "line has an interior maximum in at least 3 of 4 seeds; I-LoRA against replay is reported with a "
        "confidence interval and called a win only if that excludes zero."
    ),
    code="which47/LLMCL (no licence file)",
    keywords=("continual learning", "catastrophic forgetting", "lora", "mode connectivity", "replay", "moving average"),
    related=("lmc-landscape", "atlas", "rws"),
)

SCALES = Scales(smoke=(1, 2, 5), small=(4, 25, 3), full=(20, 25, 5))  # seeds; epochs of a task; arms
SEED, SIZES, WARM, BATCH, MEMORY = 4100, (64, 128, 128, 10), 300, 90, 100
DOMAINS: dict[str, Any] = {
    "upright": lambda x: x, "quarter turn": lambda x: x.rot90(1, (2, 3)), "mirror": lambda x: x.flip(3),
    "negative": lambda x: 1 - x,
}  # fmt: skip
ARMS: dict[str, tuple[str, int, float]] = {  # method, rows of memory, decay of the slow adapter
    "sequential": ("sequential", MEMORY, 0.95), "replay": ("replay", MEMORY, 0.95), "I-LoRA": ("i-lora", MEMORY, 0.95),
    "replay, memory 20": ("replay", 20, 0.99), "I-LoRA, memory 20": ("i-lora", 20, 0.99),
}  # fmt: skip
RULES = {  # fixed before the first run; (at least, at most)
    "replay over sequential, mean accuracy": (0.30, 1.0),
    "I-LoRA (slow) over sequential, mean accuracy": (0.30, 1.0),
    "share of seeds with an interior maximum on the line": (0.75, 1.0),
}


def experiment(scale: str = "small") -> Any:
    """Teach four digit domains one after another by LoRA; return `report.Evidence`. Accuracies on digits unseen."""
    import time

    from lineament.report import Evidence

    began, (count, epochs, arms) = time.perf_counter(), SCALES[scale]
    runs = [_run(SEED + i, epochs, arms) for i in range(count)]
    names = [name for name in runs[0] if name != "line"]
    final = {name: [run[name][0] for run in runs] for name in names}
    rows: list[dict[str, Any]] = [
        {"arm": name, "accuracy": _mean(final[name]), "forgetting": _mean([run[name][1] for run in runs]),
         "seeds": final[name]} for name in names
    ]  # fmt: skip
    pairs = [(f"I-LoRA{size}, slow", f"replay{size}, fast") for size in ("", ", memory 20")]
    for pair in pairs[: arms // 2]:
        gains = [a - b for a, b in zip(*(final[name] for name in pair), strict=True)]
        low, high = _interval(gains)
        rows.append({"arm": f"{pair[0]} over {pair[1]}", "accuracy": _mean(gains), "seeds": gains,
                     "95 % from": low, "to": high, "a win": low > 0})  # fmt: skip
    lines = [run["line"] for run in runs]
    means = [_mean([line[i] for line in lines]) for i in range(len(lines[0]))]
    rows.append({"arm": "line from task 2 to 3, l = 0, .1, ..., 1 (no replay)", "seeds": means})
    sequential = _mean(final["sequential, fast"])
    found = (
        _mean(final["replay, fast"]) - sequential, _mean(final["I-LoRA, slow"]) - sequential,
        _mean([float(max(line[1:-1]) > max(line[0], line[-1])) for line in lines]),
    )  # fmt: skip
    return Evidence.judged(
        dict(zip(RULES, found, strict=True)), RULES, verdict=scale != "smoke", name=RECORD.slug, claim=RECORD.claim,
        rows=rows, seeds=[SEED + i for i in range(count)], seconds=time.perf_counter() - began,
        notes="accuracy: mean over the four domains after the last; the interval is Student's over seeds",
    )  # fmt: skip


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)


def _interval(values: list[float]) -> tuple[float, float]:
    from scipy.stats import sem, t

    if len(values) < 2:
        return float("nan"), float("nan")
    half = float(sem(values) * t.ppf(0.975, len(values) - 1))
    return _mean(values) - half, _mean(values) + half


def _run(seed: int, epochs: int, arms: int) -> dict[str, Any]:
    import copy
    from functools import partial

    from peft import LoraConfig

    from lineament import data, models, train, weights
    from lineament._base.seeds import seeded
    from lineament.tasks.classify import accuracy

    known, unseen = (data.load_images("digits", split=split, seed=seed) for split in ("train", "test"))
    base = weights.trained(
        partial(models.dense_classifier, SIZES), known[:WARM], epochs=60, batch=30, seed=seed, lr=1e-3,
        schedule="constant",
    )  # fmt: skip
    lessons = [weights.Lesson(name, (view(known.pixels[WARM:]), known.labels[WARM:]),
                              (view(unseen.pixels), unseen.labels)) for name, view in DOMAINS.items()]  # fmt: skip
    steps = epochs * (len(lessons[0]) // BATCH)
    config = train.FitConfig(steps=steps, lr=5e-3, schedule="constant", seed=seed, log_every=steps)
    found: dict[str, Any] = {}
    for arm, (method, memory, decay) in list(ARMS.items())[:arms]:
        with seeded(seed):
            lora = LoraConfig(r=4, lora_alpha=16, target_modules=["1", "3", "5"])
            learner = weights.FastSlow(copy.deepcopy(base), lora, decay=decay)
        stream = weights.continual(
            learner, lessons, config, lambda model, test: accuracy(model, *test), method=method, batch=BATCH,
            memory=memory, hidden="4",
        )  # fmt: skip
        for adapter in weights.ADAPTERS if method == "i-lora" else ("fast",):
            found[f"{arm}, {adapter}"] = (stream.average(adapter), stream.forgetting(adapter))
        if method == "sequential":
            tests = {lesson.name: [lesson.test] for lesson in lessons[:3]}
            two, three = stream.points["fast"][1:3]
            line = weights.line(learner, two, three, tests)
            found["line"] = [_mean(list(at)) for at in zip(*(line.values("accuracy", n) for n in tests), strict=True)]
    return found
