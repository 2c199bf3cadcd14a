"""alignment-maps: how much an alignment map may do before causal abstraction says nothing."""

from typing import Any

from .record import Figure, Paper, Scales

RECORD = Paper(
    slug="alignment-maps",
    title=("The Non-Linear Representation Dilemma: Is Causal Abstraction Enough for Mechanistic Interpretability?"),
    authors="Sutter, Minder, Hofmann, Pimentel",
    year=2025,
    venue="NeurIPS 2025 (spotlight)",
    arxiv="2507.08802",
    room=("explain", "graph"),
    status="works",
    summary=(
        "Distributed alignment search with interchangeable alignment maps, from coordinate subsets and "
        "rotations to reversible networks, scored by interchange interventions. It shows that a map of "
        "unlimited complexity can align almost any network with almost any algorithm. The complexity of the map "
        "therefore belongs in every report."
    ),
    claim=(
        "Where a rotation fails, a reversible non-linear map still reaches near-perfect "
        "interchange-intervention accuracy, and a strong enough map makes even an untrained network appear "
        "aligned."
    ),
    figures=(
        Figure(
            ("both equalities, trained MLP, layers 1 / 2 / 3, rotation: interchange-intervention accuracy"),
            "0.842 / 0.614 / 0.498",
            "repository",
        ),
        Figure(
            "both equalities, trained MLP, layers 1 / 2 / 3, reversible network of 10 blocks",
            "0.998 / 0.999 / 0.999",
            "repository",
        ),
        Figure(
            "identity of the first argument (control), layers 1 / 2 / 3, reversible network",
            "0.511 / 0.507 / 0.510",
            "repository",
        ),
        Figure("randomly initialised Pythia, indirect object identification", "about 100 %", "abstract"),
        Figure("randomly initialised MLP, strong reversible networks", "above 80 %", "secondary"),
    ),
    experiment=(
        "A three-block MLP learns hierarchical equality; rotations and reversible maps are then fitted at "
        "layers 1 and 3 and on an untrained copy, with identity of the first argument as the control. Holds if "
        "at layer 3 the rotation stays below 0.6 while a one-block reversible network exceeds 0.95, and on the "
        "untrained network the reversible map leads the rotation by at least 0.1."
    ),
    code="densutter/non-linear-representation-dilemma (no licence file)",
    keywords=(
        "causal abstraction",
        "distributed alignment search",
        "interchange intervention",
        "reversible network",
        "interpretability",
    ),
    related=("relp", "transcoders", "depth-efficiency"),
)

SCALES = Scales(  # seeds; steps of the net, of a map, of maps of untrained nets; layers; "smoke": the mechanics only
    smoke=(1, 4, 3, 3, (0, 2)), small=(1, 6000, 2000, 3000, (0, 2)),
    full=(10, 20_000, 10_000, 10_000, (0, 1, 2)),
)  # fmt: skip
RULES = {  # fixed before the first run: the worst seed of each; (at least, at most)
    "IIA at layer 3, rotation": (0.0, 0.6),
    "IIA at layer 3, RevNet of one block": (0.95, 1.0),
    "untrained net, layer 3: IIA of the RevNet - of the rotation": (0.1, 1.0),
}
MAPS: dict[str, tuple[int, int]] = {  # blocks and hidden units of a reversible network; none for a rotation
    "rotation": (0, 0), "RevNet B=1, H=16": (1, 16), "RevNet B=4, H=64": (4, 64), "RevNet B=10, H=64": (10, 64),
}  # fmt: skip
SWEEP = {f"RevNet B={B}, H={H}": (B, H) for B in (1, 5, 10) for H in (2, 4, 8, 16, 32, 64)}
ONE, STRONG = "RevNet B=1, H=16", "RevNet B=4, H=64"


def experiment(scale: str = "small") -> Any:
    """Align a trained and an untrained MLP with algorithms of hierarchical equality; return `report.Evidence`."""
    import time

    from lineament.report import Evidence

    began, (seeds, *sizes) = time.perf_counter(), SCALES[scale]
    rows, found = [], []
    for seed in range(seeds):
        made = _run(seed, *sizes, full=scale == "full")
        iia = {(row["net"], row["layer"], row["algorithm"], row["map"]): row["IIA"] for row in made}
        both, rows = "both equalities", rows + made
        lead = iia["untrained", 3, both, STRONG] - iia["untrained", 3, both, "rotation"]
        found.append((iia["trained", 3, both, "rotation"], iia["trained", 3, both, ONE], lead))
    rotation, one, lead = zip(*found, strict=True)
    return Evidence.judged(
        dict(zip(RULES, (max(rotation), min(one), min(lead)), strict=True)), RULES, verdict=scale != "smoke",
        name=RECORD.slug, claim=RECORD.claim, rows=rows, seeds=list(range(seeds)), seconds=time.perf_counter() - began,
        notes="IIA is of 10,000 interventions among unseen inputs; chance is the commonest answer, or leaving the "
        "answer as it was, whichever is right more often. The first argument is the control: nothing should hold it; "
        "half of its sources are chosen so that the vectors compared are equal.",
    )  # fmt: skip


def _run(
    seed: int, learned: int, steps: int, longer: int, layers: tuple[int, ...], *, full: bool
) -> list[dict[str, Any]]:
    """Train one net; return a row per net, layer, algorithm and map."""
    from dataclasses import replace

    from lineament import explain, nn, tasks
    from lineament.explain.align import ADAM

    nets = {"trained": tasks.learned_mlp("hierarchical", steps=learned, seed=seed),
            "untrained": tasks.learned_mlp("hierarchical", steps=0, seed=seed)}  # fmt: skip
    pools = {
        chained: [tasks.equality_examples("hierarchical", count, seed=1000 * seed + 7 + i, chained=chained)
                  for i, count in enumerate((200_000, 20_000))]
        for chained in (False, True)
    }  # fmt: skip
    both, names = "both equalities", [*MAPS, *SWEEP] if full else ["rotation", ONE]
    arms = [("trained", layer, both, name) for layer in layers for name in names]
    arms += [("untrained", 2, both, "rotation"), ("untrained", 2, both, STRONG), ("trained", 2, "first argument", ONE)]
    if full:
        arms += [("untrained", 2, both, name) for name in SWEEP]
        arms += [("trained", layer, "left equality", name) for layer in layers for name in MAPS]
    rows = []
    for net, layer, algorithm, name in dict.fromkeys(arms):
        B, H = (MAPS | SWEEP)[name]
        config = explain.AlignConfig(
            map="rotation" if not B else lambda width, B=B, H=H: nn.Reversible(width, blocks=B, hidden=H),
            batch=6400 if full else 1024, seed=seed,
            fit=replace(ADAM, steps=longer if net == "untrained" and B else steps),
        )  # fmt: skip
        known, unseen = pools[algorithm == "first argument"]
        one = explain.align(nets[net], str(layer), tasks.ALGORITHMS[algorithm], known, unseen, config)
        rows.append({"net": net, "map": name, "seed": seed, **one.row(), "layer": layer + 1})
    return rows
