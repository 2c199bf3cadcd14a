"""hedgehog: a feature map trained to imitate softmax weights."""

from .record import Figure, Paper

RECORD = Paper(
    slug="hedgehog",
    title="The Hedgehog & the Porcupine: Expressive Linear Attentions with Softmax Mimicry",
    authors="Zhang, Bhatia, Kumbong, Ré",
    year=2024,
    venue="ICLR 2024",
    arxiv="2402.04347",
    room=("convert", "nn", "ops"),
    status="planned",
    summary=(
        "Linear attention with a small learned feature map per head, trained so that its weights match those of "
        "a softmax layer: spiky and monotone. It serves training from scratch and the conversion of fine-tuned "
        "or pre-trained models. The successor LoLCATs adds a sliding window of exact softmax and LoRA, which "
        "large language models need."
    ),
    claim=(
        "Distilling the feature map against the teacher's attention makes the swap to linear attention much "
        "less costly than fixed or undistilled maps."
    ),
    figures=(
        Figure("from scratch and fine-tuned conversion, share of softmax quality", "above 99 %", "abstract"),
        Figure("gain over earlier linear maps, WikiText-103 / GLUE", "up to 6 perplexity / 8.7 points", "abstract"),
        Figure("GPT-2 125M converted, WikiText-103 perplexity", "16.7", "abstract"),
        Figure(
            "same setting: softmax fine-tuned / T2R / Hybrid H3 / Hyena",
            "15.8 / 19.4 / 18.5 / 18.6",
            "unverified",
        ),
        Figure(
            "from scratch 125M: softmax / Hedgehog / Performer / 1+ELU",
            "18.6 / 20.8 / 26.8 / 25.6",
            "unverified",
        ),
        Figure("Llama-2-7B with LoRA, SAMSum ROUGE-1 over the base model", "+28.1", "abstract"),
        Figure("LoLCATs, Llama-3-8B, 0.04B tokens, mean score: converted / softmax", "73.1 / 74.2", "paper"),
    ),
    experiment=(
        "A 2-layer character model with softmax is converted with 1+ELU, T2R and Hedgehog, before and after 200 "
        "steps of distillation and 100 of fine-tuning, 3 seeds. Holds if distillation halves Hedgehog's "
        "divergence from the teacher and beats 1+ELU's, the swap loss is 0.8 nats better than 1+ELU's, the "
        "final loss leads 1+ELU and T2R by 0.03, and transfer alone closes half of the gap to the teacher."
    ),
    code=None,
    keywords=(
        "linear attention",
        "feature map",
        "conversion",
        "distillation",
        "lolcats",
        "sliding window",
        "language model",
    ),
    related=("hybrid-linear-attention", "linvideo", "transnormer", "kimi-linear"),
)
