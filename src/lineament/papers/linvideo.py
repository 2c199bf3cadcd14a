"""linvideo: learn which video layers can be linear, then match distributions."""

from .record import Figure, Paper

RECORD = Paper(
    slug="linvideo",
    title="LinVideo: A Post-Training Framework towards O(n) Attention in Efficient Video Generation",
    authors="Yushi Huang, Xingtong Ge, Ruihao Gong, Chengtao Lv, Jun Zhang",
    year=2026,
    venue="CVPR 2026",
    arxiv="2510.08318",
    room=("convert", "nn"),
    status="planned",
    summary=(
        "Replaces a chosen number of self-attention layers of a video diffusion transformer by linear attention "
        "without any video data. One scalar per layer learns which ones, and quality is recovered by matching "
        "student and teacher distributions at every time of the sampling path, with the student as its own "
        "score estimator."
    ),
    claim=(
        "Learned layer choice beats manual choice, and matching distributions along the trajectory beats plain "
        "regression."
    ),
    figures=(
        Figure("speed-up, Wan 1.3B and 14B", "1.43 to 1.71 times", "abstract"),
        Figure("latency cut after distillation to 4 steps", "15.9 to 20.9 times", "abstract"),
        Figure("Wan 1.3B, imaging quality: teacher / LinVideo, 16 of 30 layers", "66.25 / 66.07", "secondary"),
        Figure("imaging quality: distribution matching / MSE / DMD", "66.07 / 61.56 / 57.44", "secondary"),
        Figure("imaging quality: learned / manual / heuristic layers", "66.07 / 62.97 / 60.74", "secondary"),
    ),
    experiment=(
        "A 6-block video transformer on moving squares: 3 layers replaced by learned, random, deepest and "
        "shallowest choice, and the two losses on the same layers. Holds if the learned choice is no worse than "
        "the mean of random ones on 2 of 3 seeds, exactly 3 layers end as linear with all scores within 0.05 of "
        "0 or 1, and distribution matching is no worse than MSE in energy distance."
    ),
    code=None,
    keywords=(
        "video",
        "diffusion transformer",
        "linear attention",
        "layer selection",
        "distribution matching",
        "conversion",
    ),
    related=("hedgehog", "lit", "linfusion", "clear"),
)
