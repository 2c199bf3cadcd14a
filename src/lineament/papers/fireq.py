"""fireq: INT4 weights and cache, FP8 activations, and exact rescalings that make them bearable."""

from .record import Figure, Paper

RECORD = Paper(
    slug="fireq",
    title="FireQ: Fast INT4-FP8 Kernel and RoPE-aware Quantization for LLM Inference Acceleration",
    authors="Baek, Choi, Son, Bin, Choi, Moon, Jang, Lee",
    year=2025,
    venue=None,
    arxiv="2505.20839",
    room=("quant", "ops", "graph"),
    status="planned",
    summary=(
        "Post-training quantisation of RoPE decoders to INT4 weights, FP8 activations and an INT4 cache. Scale "
        "pairs that cancel exactly are folded into neighbouring weights; for keys and queries they are equal "
        "within each rotary pair, so rotation leaves them alone. It is faster than QServe on prefill but less "
        "accurate."
    ),
    claim=(
        "Rescaling keys and queries within rotary pairs recovers much of what a 4-bit cache loses, and FP8 "
        "group scales cost almost nothing."
    ),
    figures=(
        Figure(
            ("Llama-3-8B, WikiText perplexity: FP16 / QServe / FireQ with FP8 scales / with BF16 scales"),
            "6.13 / 6.70 / 7.06 / 7.03",
            "repository",
        ),
        Figure(
            "Llama-3-8B, mean of 6 zero-shot tasks: FP16 / QServe / FireQ with FP8 scales",
            "70.61 / 69.08 / 67.92",
            "repository",
        ),
        Figure("prefill tokens per second, batch 16, length 1024: QServe / FireQ", "29.4k / 37.2k", "repository"),
        Figure("Llama-2-7B feed-forward throughput to FP16, batch 16: QServe / FireQ", "0.74 / 1.24", "repository"),
    ),
    experiment=(
        "SmolLM2-135M with groups of 64, perplexity step by step from float to W4A8KV4, beside SmoothAttention, "
        "Hadamard and an 8-bit cache. Holds if 8-bit activations and FP8 scales each cost at most 1 %, the key "
        "rescalings recover at least 30 % of the log-perplexity a plain 4-bit cache loses and undo constructed "
        "outliers to within 2 %, and the whole stays within 1.20 of 4-bit weights alone."
    ),
    code="llm-fireq/fireq (BSD-3-Clause)",
    keywords=("quantisation", "int4", "fp8", "kv cache", "rotary embedding", "inference"),
    related=("weight-matching",),
)
