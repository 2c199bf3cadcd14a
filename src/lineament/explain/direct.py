"""Direct logit attribution: what each node writes straight into the answer."""

import time
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lineament.explain.effects import Effects
from lineament.explain.moved import RELP, Metric, swept
from lineament.explain.relevance import named
from lineament.explain.wiring import wiring


def direct_logits(model: nn.Module, inputs: Mapping[str, Any] | Tensor, metric: Metric) -> Effects:
    """Split a metric of the logits among the nodes that wrote to the residual stream, the last norm's scale constant.

    What a node writes, and later nodes make of it, is not counted. For a metric linear in the logits the scores of
    all nodes and positions add up to it, but for the bias of the last norm where it has one.

    Args:
        model: a decoder whose residual stream is known (`wiring`); it comes back as it was.
        inputs: of one run.
        metric: of the output, a number per row, linear in the logits (`LogitDifference`).

    Returns:
        Node ("embed", "a3.h7", "m5", and "biases" of attention outputs if there are any) -> [B, T].
    """
    began, given, at = time.perf_counter(), named(model, inputs), wiring(model)
    place = f"{at.readers[-1].norm}:input"
    slope = swept(model, given, metric, [place], RELP)[place]
    scores, biases = {}, torch.zeros_like(slope)
    for group, x in at.values(model, given).items():
        for writer, part in zip(at.groups[group], at.written(group, x), strict=True):
            scores[at.writers[writer].name] = (part * slope).sum(-1)
        bias = getattr(at.maps.get(group), "bias", None)
        biases = biases if bias is None else biases + bias.detach()
    if bool(biases.any()):
        scores["biases"] = (biases * slope).sum(-1)
    return Effects(scores, "direct-logits", time.perf_counter() - began)
