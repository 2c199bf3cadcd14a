"""Rule sets as values: how each kind of operator hands relevance on, by name or made by the user."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from torch import nn

from lineament._base.errors import InputError, unknown
from lineament.explain.linear import AlphaBeta, Dynamic, Epsilon, Flat, Gamma, LinearRule, WSquare, ZBox, ZPlus
from lineament.graph import Where, select

CHOICES = {
    "activation": ("identity", "gradient", "identity-all"),
    "norm": ("freeze", "gradient", "identity"),
    "batchnorm": ("fold", "identity"),
    "gate": ("half", "gradient", "linear", "absolute"),
    "attention": ("half", "gradient", "values"),
    "softmax": ("propagate", "stop"),
    "sums": ("signed", "absolute"),
    "unknown": ("raise", "vjp"),
}
PLAIN = Epsilon()
CONVOLUTIONS = (nn.modules.conv._ConvNd,)


@dataclass(frozen=True, kw_only=True)
class Rules:
    """What each kind of operator does with relevance.

    Args:
        name: for messages.
        linear: of linear maps and convolutions: `Epsilon()`, `Gamma(0.25)`, ..., or any callable
            (linear, relevance, ledger) -> relevance of x.
        activation: "identity" (R passes whole where phi(0) = 0; exp, sigmoid and the like by their tangent),
            "gradient", or "identity-all" (R passes whole everywhere).
        norm: "freeze" (the scale is a constant, the centring is kept), "gradient", or "identity".
        batchnorm: "fold" (one linear map with the layer before it) or "identity".
        gate: of a product of two tracked tensors: "half" each, "gradient" (both the whole), "linear" (all to the factor
            that is no activation), "absolute" (by size).
        attention: of a matrix product of two tracked tensors: "half" each, "gradient", or "values" (all to the values).
        softmax: "propagate" (its tangent, as AttnLRP) or "stop" (the pattern is a constant).
        sums: "signed" shares a / (a + b), or "absolute" ones.
        first: rule of the first linear map above the input, instead of `linear`.
        where: `graph.Where` -> a linear rule, or a whole `Rules`, for the operators of these modules; the first fits.
        operators: node name ("Gelu") -> own rule for that operator, see `sweep.Step`.
        channels: module -> the channels (axis 1 of images, the last one otherwise) whose relevance goes on; the rest is
            stopped there.
        unknown: "raise" for an operator without a rule, or "vjp": its gradient, with the ledger left open.
    """

    name: str = "own"
    linear: LinearRule = PLAIN
    activation: str = "identity"
    norm: str = "freeze"
    batchnorm: str = "fold"
    gate: str = "half"
    attention: str = "half"
    softmax: str = "propagate"
    sums: str = "signed"
    first: LinearRule | None = None
    where: Mapping[Any, "LinearRule | Rules"] = field(default_factory=dict)
    operators: Mapping[str, Callable[[Any], None]] = field(default_factory=dict)
    channels: Mapping[str, Sequence[int]] = field(default_factory=dict)
    unknown: str = "raise"

    def __post_init__(self) -> None:
        for name, known in CHOICES.items():
            if getattr(self, name) not in known:
                raise unknown(f"choice for {name}", getattr(self, name), known)

    def by_module(self, model: nn.Module) -> dict[str, "Rules"]:
        """Return module name -> rules for the modules that `where` names.

        Raises:
            InputError: a name matches nothing; classes may be absent.
        """
        found: dict[str, Rules] = {}
        for where, rule in self.where.items():
            for name in _names(model, where):
                found.setdefault(name, rule if isinstance(rule, Rules) else replace(self, linear=rule, first=None))
        return found


def _names(model: nn.Module, where: Where | tuple[type, ...]) -> list[str]:
    if isinstance(where, type | tuple):
        return [name for name, module in model.named_modules() if isinstance(module, where)]
    return list(select(model, where))


EPSILON = Rules(name="epsilon")
ATTNLRP = Rules(name="attnlrp")
CP_LRP = Rules(name="cp-lrp", softmax="stop", attention="values", gate="linear")
RELP = Rules(name="relp", attention="gradient")
RELP_AH = Rules(name="relp-ah", attention="values", softmax="stop")
GRADIENT = Rules(name="gradient-x-input", activation="gradient", norm="gradient", gate="gradient", attention="gradient")
DYNAMIC = Rules(name="dynamic", linear=Dynamic(), activation="identity-all", gate="absolute", sums="absolute")


def epsilon(epsilon: float | None = None) -> Rules:
    """LRP-epsilon everywhere; `epsilon(None)` is LRP-0."""
    return replace(EPSILON, linear=Epsilon(epsilon))


def gamma(gamma: float = 0.25, epsilon: float | None = None) -> Rules:
    """LRP-gamma on every linear map."""
    return Rules(name="gamma", linear=Gamma(gamma, epsilon))


def alpha_beta(alpha: float = 2.0, beta: float = 1.0, epsilon: float | None = None) -> Rules:
    """LRP-alpha-beta on every linear map."""
    return Rules(name="alpha-beta", linear=AlphaBeta(alpha, beta, epsilon))


def _composite(name: str, convolution: LinearRule, dense: LinearRule, first: LinearRule | None = None) -> Rules:
    return Rules(name=name, linear=dense, first=first, where={CONVOLUTIONS: convolution})


def epsilon_plus(epsilon: float | None = 1e-6) -> Rules:
    """z+ on convolutions, epsilon on dense layers."""
    return _composite("epsilon-plus", ZPlus(epsilon), Epsilon(epsilon))


def epsilon_plus_flat(epsilon: float | None = 1e-6) -> Rules:
    """As `epsilon_plus`, flat on the first layer."""
    return _composite("epsilon-plus-flat", ZPlus(epsilon), Epsilon(epsilon), Flat(epsilon))


def epsilon_alpha2_beta1(epsilon: float | None = 1e-6) -> Rules:
    """alpha 2, beta 1 on convolutions, epsilon on dense layers."""
    return _composite("epsilon-alpha2-beta1", AlphaBeta(2, 1, epsilon), Epsilon(epsilon))


def epsilon_alpha2_beta1_flat(epsilon: float | None = 1e-6) -> Rules:
    """As `epsilon_alpha2_beta1`, flat on the first layer."""
    return _composite("epsilon-alpha2-beta1-flat", AlphaBeta(2, 1, epsilon), Epsilon(epsilon), Flat(epsilon))


def epsilon_gamma_box(low: Any = -3.0, high: Any = 3.0, *, epsilon: float | None = 1e-6, gamma: float = 0.25) -> Rules:
    """gamma on convolutions, epsilon on dense layers, zB on the first layer."""
    box = ZBox(low, high, epsilon)
    return _composite("epsilon-gamma-box", Gamma(gamma, epsilon), Epsilon(epsilon), box)


RULES: dict[str, Callable[..., Rules]] = {
    "epsilon": epsilon,
    "gamma": gamma,
    "alpha-beta": alpha_beta,
    "z-plus": lambda epsilon=None: Rules(name="z-plus", linear=ZPlus(epsilon)),
    "w-square": lambda epsilon=None: Rules(name="w-square", linear=WSquare(epsilon)),
    "flat": lambda epsilon=None: Rules(name="flat", linear=Flat(epsilon)),
    "attnlrp": lambda: ATTNLRP,
    "cp-lrp": lambda: CP_LRP,
    "relp": lambda: RELP,
    "relp-ah": lambda: RELP_AH,
    "dynamic": lambda: DYNAMIC,
    "gradient-x-input": lambda: GRADIENT,
    "epsilon-plus": epsilon_plus,
    "epsilon-plus-flat": epsilon_plus_flat,
    "epsilon-alpha2-beta1": epsilon_alpha2_beta1,
    "epsilon-alpha2-beta1-flat": epsilon_alpha2_beta1_flat,
    "epsilon-gamma-box": epsilon_gamma_box,
}
"""Rule sets by name; each is a function of its parameters."""


def rules_of(given: "str | Rules", model: nn.Module) -> Rules:
    """Return the rule set that a name means; "auto" is `attnlrp` where a model attends and `epsilon` elsewhere.

    Raises:
        InputError: no such name.
    """
    if isinstance(given, Rules):
        return given
    if given == "auto":
        return ATTNLRP if _attends(model) else EPSILON
    if given not in RULES:
        raise unknown("rules", given, ["auto", *RULES])
    return RULES[given]()


def _attends(model: nn.Module) -> bool:
    return any("attention" in type(m).__name__.lower() or "mixer" in type(m).__name__.lower() for m in model.modules())


def check_channels(rules: Rules, model: nn.Module) -> None:
    """Refuse concepts of modules that aren't there."""
    for name, chosen in rules.channels.items():
        select(model, name)
        if not len(chosen):
            raise InputError(f"no channels were chosen for {name!r}; give at least one")
