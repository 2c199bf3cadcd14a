"""hourglass-mlp: residual MLPs whose skip connection is the wide part."""

from .record import Figure, Paper

RECORD = Paper(
    slug="hourglass-mlp",
    title="Rethinking the shape convention of an MLP",
    authors="Chen, Lee, Liao, Shiu",
    year=2025,
    venue=None,
    arxiv="2510.01796",
    room=("nn",),
    status="planned",
    summary=(
        "Turns the residual MLP inside out: the skip connection runs at an expanded width and every block "
        "squeezes through a narrow bottleneck. The input is lifted once, and the lift may stay at its random "
        "initial value. The library builds both shapes at matched parameters."
    ),
    claim=(
        "At equal parameters the hourglass shape gives better trade-offs than the conventional one, and a fixed "
        "random lift costs little."
    ),
    figures=(
        Figure("Pareto front over parameters, generative image tasks", "hourglass ahead", "abstract"),
        Figure("best shape as the budget grows", "deeper, wider skip, narrower bottleneck", "abstract"),
        Figure(
            "MNIST super-resolution: conventional / hourglass (skip; bottleneck x blocks)",
            "784; 1150 x 1 / 1150; 115 x 10",
            "repository",
        ),
        Figure(
            "ImageNet-32 denoising: conventional / hourglass (skip; bottleneck x blocks)",
            "3072; 4012 x 1 / 3546; 270 x 7",
            "repository",
        ),
        Figure("PSNR values", "not read", "unverified"),
    ),
    experiment=(
        "Denoising of natural 12x12 patches at matched parameters, both shapes, lift trained and fixed, with "
        "the whole front printed. Holds if the fixed lift is within 0.1 dB of the trained one with a third "
        "fewer trainable parameters, and below about 150k trainable parameters the fixed hourglass lies on or "
        "above the front; a win in total parameters is not expected at this size."
    ),
    code="official repository, name unverified (licence unverified)",
    keywords=("mlp", "residual", "bottleneck", "random projection", "pareto front"),
    related=("shallow-parallel", "g2gnet", "projection-head"),
)
