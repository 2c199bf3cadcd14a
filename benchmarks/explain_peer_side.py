"""What peers say, in a process and an environment of their own: no line of lineament is imported here.

python benchmarks/explain_peer_side.py zennit|captum|lxt OUT.pt [LAYERS WIDTH LENGTH | FOLDER LENGTH | MODEL]
"""

import sys
from collections.abc import Callable
from typing import Any
from unittest.mock import MagicMock

import torch

from explain_models import Sum, image_model, language_model, saved_model, seconds


def without_torchvision() -> None:
    """Let zennit, which imports torchvision for the names of its models, be imported without it."""
    try:
        import torchvision  # noqa: F401
    except (ImportError, RuntimeError):
        for name in ("torchvision", "torchvision.models", "torchvision.models.resnet", "torchvision.models.vgg"):
            sys.modules[name] = MagicMock()


def zennit(*timed: str) -> dict[str, Any]:
    """Return relevances by model and composite, or CPU seconds of a model's."""
    without_torchvision()
    from zennit import composites as c
    from zennit.attribution import Gradient
    from zennit.canonizers import SequentialMergeBatchNorm
    from zennit.layer import Sum as PeerSum
    from zennit.rules import Epsilon, Norm, Pass

    made: dict[str, Callable[[Any], Any]] = {
        "epsilon-plus": lambda x: c.EpsilonPlus(epsilon=1e-9, stabilizer=1e-9, canonizers=x),
        "epsilon-plus-flat": lambda x: c.EpsilonPlusFlat(epsilon=1e-9, stabilizer=1e-9, canonizers=x),
        "epsilon-alpha2-beta1": lambda x: c.EpsilonAlpha2Beta1(epsilon=1e-9, stabilizer=1e-9, canonizers=x),
        "epsilon-gamma-box": lambda x: c.EpsilonGammaBox(-3.0, 3.0, epsilon=1e-9, stabilizer=1e-9, canonizers=x),
        "epsilon": lambda x: c.LayerMapComposite(
            [
                (torch.nn.ReLU, Pass()), (PeerSum, Norm(stabilizer=1e-9)),
                (torch.nn.AvgPool2d, Norm(stabilizer=1e-9)),
                ((torch.nn.Conv2d, torch.nn.Linear), Epsilon(epsilon=1e-9)),
            ],
            canonizers=x,
        ),
    }  # fmt: skip
    found: dict[str, Any] = {}
    for name in timed or ("vgg", "resnet"):
        for rules, make in made.items():
            model, x = image_model(name)
            for module in list(model.modules()):
                for key, child in module.named_children():
                    if isinstance(child, Sum):
                        setattr(module, key, PeerSum())

            def run(model: Any = model, x: Any = x, make: Any = make) -> torch.Tensor:
                with Gradient(model=model, composite=make([SequentialMergeBatchNorm()])) as attributor:
                    _, R = attributor(x, lambda y: y * torch.nn.functional.one_hot(y.argmax(-1), y.shape[-1]))
                return R.detach()

            found[f"{name}/{rules}"] = seconds(run) if timed else run()
    return found


def captum(name: str = "") -> dict[str, Any]:
    """Return relevances by method, or CPU seconds of a model's."""
    from captum.attr import LRP, DeepLift, IntegratedGradients, LayerConductance
    from captum.attr._utils.lrp_rules import EpsilonRule

    model, x = image_model(name or "vgg")

    def lrp() -> torch.Tensor:
        for module in model:
            if isinstance(module, torch.nn.Flatten):  # captum has no rule for it, and forgets one after a run
                module.rule = EpsilonRule()
        return LRP(model).attribute(x.clone(), target=top).detach()

    top = model(x).argmax(-1)
    options: dict[str, Any] = {"target": top, "n_steps": 20, "method": "riemann_middle"}
    smooth, _ = image_model(f"{name or 'vgg'}-average")
    best = smooth(x).argmax(-1)
    runs: dict[str, Callable[[], Any]] = {
        "deep-lift": lambda: DeepLift(smooth).attribute(x.clone(), baselines=0.1, target=best).detach(),
        "lrp": lrp,
        "integrated-gradients": lambda: IntegratedGradients(model).attribute(x, baselines=0.0, **options).detach(),
        "conductance": lambda: LayerConductance(model, model[7]).attribute(x, baselines=0.0, **options).detach(),
    }
    return {what: seconds(run) if name else run() for what, run in runs.items()}


def lxt(*shape: int | str) -> dict[str, Any]:
    import transformers.models.llama.modeling_llama as llama

    without_torchvision()
    from lxt.efficient import monkey_patch

    monkey_patch(llama, verbose=False)
    named = isinstance(shape[0], str)
    model, ids = saved_model(*shape) if named else language_model(*shape)  # type: ignore[arg-type]
    model.requires_grad_(False)

    def run() -> torch.Tensor:
        x = model.get_input_embeddings()(ids).requires_grad_()
        model(inputs_embeds=x, use_cache=False, logits_to_keep=1).logits[0, -1].max().backward()
        return (x.grad * x).sum(-1).detach()

    return {"relevance": run(), "seconds": seconds(run, 1 if named else 3)}


if __name__ == "__main__":
    torch.set_num_threads(1)
    peer, out, *rest = sys.argv[1:]
    torch.save(
        {"zennit": zennit, "captum": captum, "lxt": lxt}[peer](*(int(x) if x.isdigit() else x for x in rest)), out
    )
