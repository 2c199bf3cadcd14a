"""alignment-maps: how much an alignment map may do before causal abstraction says nothing."""

from .record import Figure, Paper

RECORD = Paper(
    slug="alignment-maps",
    title=("The Non-Linear Representation Dilemma: Is Causal Abstraction Enough for Mechanistic Interpretability?"),
    authors="Sutter, Minder, Hofmann, Pimentel",
    year=2025,
    venue="NeurIPS 2025 (spotlight)",
    arxiv="2507.08802",
    room=("explain", "graph"),
    status="planned",
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
