"""diff-decompose: one picture into its transparent layers by a diffusion transformer."""

from .record import Figure, Paper

RECORD = Paper(
    slug="diff-decompose",
    title="DiffDecompose: Layer-Wise Decomposition of Alpha-Composited Images via Diffusion Transformers",
    authors="Zitong Wang, Hang Zhao, Qianyu Zhou, Xuequan Lu, Xiangtai Li, Hao Yang, Bo Yang, Yiren Song",
    year=2026,
    venue="CVPR 2026",
    arxiv="2505.21541",
    room=("tasks", "models"),
    status="planned",
    summary=(
        "Recovers a semi-transparent foreground and its background from one composite by sampling both from a "
        "diffusion transformer conditioned on the picture, a prompt and the blending type. All layers share one "
        "token sequence, and layers that must align share position codes."
    ),
    claim=(
        "Sharing position codes between the composite and the background lets the model copy what is visible "
        "and so recover the layers."
    ),
    figures=(
        Figure("mean against the second best: RMSE / SSIM / LPIPS", "-36.3 % / +1.2 % / -52.8 %", "secondary"),
        Figure("watermark removal, RMSE: best baseline / DiffDecompose", "11.53 / 3.00", "secondary"),
        Figure("X-ray, RMSE: without shared positions / with", "16.54 / 3.89", "secondary"),
        Figure("glass, RMSE: without shared positions / with", "24.60 / 7.99", "secondary"),
    ),
    experiment=(
        "Procedural 16x16 composites under three blending types; a small pixel-space transformer with shared "
        "positions against separate positions, one-step regression and the composite itself, 2 seeds. Holds if "
        "background RMSE with shared positions is at most 0.8 of that with separate ones and 0.6 of the "
        "composite's, with a lower recomposition error."
    ),
    code="Wangzt1121/DiffDecompose (README only, no licence)",
    keywords=(
        "image decomposition",
        "transparency",
        "diffusion transformer",
        "position encoding",
        "in-context",
        "lora",
    ),
    related=("clear", "linvideo"),
)
