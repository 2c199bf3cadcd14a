"""linfusion: a normalised linear attention distilled into Stable Diffusion."""

from .record import Figure, Paper

RECORD = Paper(
    slug="linfusion",
    title="LinFusion: 1 GPU, 1 Minute, 16K Image",
    authors="Songhua Liu, Weihao Yu, Zhenxiong Tan, Xinchao Wang",
    year=2024,
    venue=None,
    arxiv="2409.02097",
    room=("convert", "nn"),
    status="planned",
    summary=(
        "Puts a normalised, non-causal linear attention, its queries and keys refined by a small MLP, in place "
        "of all self-attention in Stable Diffusion's UNet, and distils only those layers. Because the weights "
        "sum to one, a model tuned at one resolution works at larger ones. One small checkpoint fits all models "
        "of a base."
    ),
    claim="Normalising the mixer is what makes a linear replacement carry over to resolutions it never saw.",
    figures=(
        Figure("image size on one GPU in about a minute", "16K", "abstract"),
        Figure("COCO-30K, SD-1.5 against LinFusion", "on par or better", "abstract"),
        Figure("COCO-30K, FID / CLIP-T, before to after", "12.86 to 12.57 / 0.321 to 0.323", "unverified"),
    ),
    experiment=(
        "A small denoiser on 16x16 digits is converted to the normalised mixer, the same without normaliser and "
        "a causal one, and all are measured against the teacher at 16x16 and, untrained, at 32x32. Holds if the "
        "normalised one is within 1.15 of the unnormalised at 16x16, at least 1.5 times better at 32x32, and "
        "better than the causal one at both."
    ),
    code="Huage001/LinFusion (Apache-2.0)",
    keywords=("diffusion", "linear attention", "conversion", "distillation", "high resolution", "stable diffusion"),
    related=("clear", "lit", "linvideo", "inline-attention"),
)
