"""lit: a recipe from a softmax diffusion transformer to a linear one."""

from .record import Figure, Paper

RECORD = Paper(
    slug="lit",
    title="LiT: Delving into a Simple Linear Diffusion Transformer for Image Generation",
    authors=(
        "Jiahao Wang, Ning Kang, Lewei Yao, Mengzhao Chen, Chengyue Wu, Songyang Zhang, Shuchen Xue, Yong Liu, "
        "Taiqiang Wu, Xihui Liu, Kaipeng Zhang, Shifeng Zhang, Wenqi Shao, Zhenguo Li, Ping Luo"
    ),
    year=2025,
    venue="ICCV 2025",
    arxiv="2501.12976",
    room=("convert", "nn"),
    status="planned",
    summary=(
        "Turns a trained diffusion transformer into one with linear attention only, at a small share of the "
        "original training. The attention is plain: ReLU features, one depth-wise convolution, few heads. "
        "Everything but the attention weights is inherited, and the student is distilled on noise and variance."
    ),
    claim=(
        "Inheriting all but the attention and adding one depth-wise convolution beats training a linear model "
        "from scratch, and distillation brings it closer to the teacher."
    ),
    figures=(
        Figure("training steps against DiT, 256 / 512 px", "20 % / 33 %", "abstract"),
        Figure("XL/2-G, 256 px, FID: DiT after 7M steps / LiT after 1.4M", "2.27 / 2.32", "secondary"),
        Figure("XL/2-G, 512 px, FID: DiT / LiT", "3.04 / 3.69", "secondary"),
        Figure("S/2, FID: softmax / ReLU linear / with 5x5 convolution", "68.40 / 88.46 / 63.66", "unverified"),
        Figure("S/2, FID: no distillation / noise / noise and variance", "53.83 / 51.13 / 50.79", "unverified"),
    ),
    experiment=(
        "A pixel diffusion transformer on 16x16 digits: linear from scratch, inherited without and with the "
        "convolution, and the last with distillation, 3 seeds. Holds if inheritance with convolution beats both "
        "others by at least 3 % of noise error and distillation cuts the error to the teacher by at least 10 %."
    ),
    code=None,
    keywords=(
        "diffusion transformer",
        "linear attention",
        "weight inheritance",
        "distillation",
        "conversion",
        "image generation",
    ),
    related=("linfusion", "clear", "linvideo", "inline-attention"),
)
