"""i-lora: a fast and a slow LoRA against forgetting."""

from .record import Figure, Paper

RECORD = Paper(
    slug="i-lora",
    title="Analyzing and Reducing Catastrophic Forgetting in Parameter Efficient Tuning",
    authors="Ren, Li, Wang, Zhao, Qin",
    year=2024,
    venue=None,
    arxiv="2402.18865",
    room=("weights", "train"),
    status="planned",
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
