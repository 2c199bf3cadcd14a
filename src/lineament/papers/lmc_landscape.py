"""lmc-landscape: why late forks share a valley and early ones do not."""

from .record import Figure, Paper

RECORD = Paper(
    slug="lmc-landscape",
    title="Landscaping Linear Mode Connectivity",
    authors="Singh, Adilova, Kamp, Fischer, Schölkopf, Hofmann",
    year=2024,
    venue="HiLD workshop at ICML 2024",
    arxiv="2406.16300",
    room=("weights",),
    status="planned",
    summary=(
        "Explains geometrically when two runs that share their first steps stay connected by a straight "
        "low-loss line: training descends a mountainside, and an early fork puts a ridge between the two runs. "
        "It comes with distances and angles from the fork, barrier curves, and second-order estimates for the "
        "whole network and for each layer."
    ),
    claim=(
        "The barrier falls as the fork happens later, and a second-order estimate ranks the barriers of single layers."
    ),
    figures=(
        Figure("barrier against the time of the fork", "shrinks as the fork happens later", "abstract"),
        Figure("barrier formula against measured height", "tracks it, also per layer; values not read", "unverified"),
        Figure("barriers of single layers", "often near zero when the full barrier is large", "secondary"),
    ),
    experiment=(
        "MLPs on digits with label noise are forked after 0, 8 and 30 epochs, and independent MLPs and "
        "ResNet20-size nets are matched and repaired. Holds if the full barrier falls monotonically at least 3 "
        "times with a layer-wise Spearman correlation of 0.8, matching cuts each MLP barrier 5 times, and for "
        "ResNets matching with REPAIR stays below REPAIR alone with a mean of at most 0.7 of it."
    ),
    code=None,
    keywords=("linear mode connectivity", "loss landscape", "barrier", "hessian", "interpolation", "ridge"),
    related=("weight-matching", "i-lora", "rws"),
)
