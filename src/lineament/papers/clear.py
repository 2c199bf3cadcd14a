"""clear: softmax attention kept, but only within a circle of image tokens."""

from .record import Figure, Paper

RECORD = Paper(
    slug="clear",
    title="CLEAR: Conv-Like Linearization Revs Pre-Trained Diffusion Transformers Up",
    authors="Songhua Liu, Zhenxiong Tan, Xinchao Wang",
    year=2025,
    venue="NeurIPS 2025",
    arxiv="2412.16112",
    room=("convert", "ops", "nn"),
    status="planned",
    summary=(
        "Makes a pre-trained text-to-image diffusion transformer linear in image area by restricting each image "
        "token's softmax to a circular neighbourhood plus the text. All weight shapes stay, and only the "
        "attention projections are tuned for 10K steps on 10K images the model drew itself."
    ),
    claim=(
        "A local softmax window keeps a pre-trained diffusion transformer almost intact where kernel linear "
        "attention destroys it."
    ),
    figures=(
        Figure("FLUX.1-dev, 1024 px, FID to the original model: kernel linear attention", "324.54", "secondary"),
        Figure(
            "FLUX.1-dev, 1024 px, FID to the original model: CLEAR, distilled, r = 8 / 16 / 32",
            "13.07 / 13.72 / 8.85",
            "secondary",
        ),
        Figure("GFLOPs per layer at 4096 px: full / r = 8", "53604.4 / 979.3", "derived"),
        Figure("8K generation", "6.3 times faster", "secondary"),
        Figure("attention compute saved at 8K, r = 8", "99.5 %", "derived"),
        Figure("GFLOPs per layer at 1024 px, r = 16 (recomputed from the mask: 86.6)", "80.6", "unverified"),
    ),
    experiment=(
        "First the published GFLOPs are recomputed from the mask alone; then a small diffusion transformer on "
        "digits is converted to a circular window, ReLU kernel attention, disjoint windows and strided keys. "
        "Holds if the circular window has the lowest velocity error to the teacher before and after 200 tuning "
        "steps, and the kernel form is at least three times worse before tuning."
    ),
    code="Huage001/CLEAR (Apache-2.0)",
    keywords=("diffusion transformer", "local attention", "conversion", "distillation", "high resolution", "flux"),
    related=("lit", "linfusion", "linvideo", "diff-decompose"),
)
