"""Explain a model: where an output comes from, by relevance on the operators of its autograd graph.

- `relevance(model, inputs, *, target, rules, at, baseline) -> Relevance`: of inputs, of modules, with a ledger.
- `Rules`, `RULES`: rule sets as values and by name; `Epsilon`, `Gamma`, `AlphaBeta`, `ZPlus`, `ZBox`, `Flat`, `WSquare`
  are rules of linear maps. `METHODS`: integrated gradients, SmoothGrad, occlusion, rollout.
- `effects(model, clean, corrupt, metric, sites, *, method) -> Effects`: activation patching, ablations, and estimates:
  attribution patching, RelP, integrated gradients, direct logit attribution.
- `scope(model, x) -> Scope`: the affine map f(x) = A x + r the model is for one input, to be run, transposed, read.
- `coverage(model, inputs)`: operator x count x rule.
- `infidelity`, `sensitivity`, `flipping`, `abpc`: how good an explanation is.
"""

from lineament.explain.coverage import coverage
from lineament.explain.effects import Effects, effects
from lineament.explain.ledger import COLUMNS, Ledger
from lineament.explain.linear import AlphaBeta, Dynamic, Epsilon, Flat, Gamma, Linear, WSquare, ZBox, ZPlus
from lineament.explain.methods import METHODS, DeepLift, IntegratedGradients, Occlusion, Rollout, SmoothGrad
from lineament.explain.operators import OPERATORS
from lineament.explain.quality import abpc, flipping, infidelity, sensitivity
from lineament.explain.relevance import Relevance, relevance
from lineament.explain.rules import RULES, Rules
from lineament.explain.scope import Scope, scope

__all__ = [
    "COLUMNS",
    "METHODS",
    "OPERATORS",
    "RULES",
    "AlphaBeta",
    "DeepLift",
    "Dynamic",
    "Effects",
    "Epsilon",
    "Flat",
    "Gamma",
    "IntegratedGradients",
    "Ledger",
    "Linear",
    "Occlusion",
    "Relevance",
    "Rollout",
    "Rules",
    "Scope",
    "SmoothGrad",
    "WSquare",
    "ZBox",
    "ZPlus",
    "abpc",
    "coverage",
    "effects",
    "flipping",
    "infidelity",
    "relevance",
    "scope",
    "sensitivity",
]
