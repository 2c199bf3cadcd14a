"""tensor-attention: attention over pairs of keys, exactly and in near-linear time."""

from .record import Figure, Paper

RECORD = Paper(
    slug="tensor-attention",
    title=("How to Capture Higher-order Correlations? Generalizing Matrix Softmax Attention to Kronecker Computation"),
    authors="Alman, Song",
    year=2024,
    venue="ICLR 2024 (spotlight)",
    arxiv="2310.04064",
    room=("ops", "nn"),
    status="planned",
    summary=(
        "Attention in which each query scores pairs of keys, so that one layer detects triples. Exact cost is "
        "cubic; when entries are small a polynomial approximation brings it near linear, and above a sharp "
        "bound no fast algorithm can exist under SETH. The library has the exact operator, the approximation "
        "with its error bound, and higher orders."
    ),
    claim=(
        "One layer of pairwise-key attention solves triple detection that ordinary attention cannot, and the "
        "fast approximation works exactly while entries stay bounded."
    ),
    figures=(
        Figure("entries of order o((log n)^(1/3))", "time n^(1+o(1))", "abstract"),
        Figure("entries of order (log n)^(1/3) or more", "no time n^(3-c) for any c > 0, under SETH", "abstract"),
        Figure("order k instead of 3: threshold", "(log n)^(1/k)", "paper"),
        Figure("triple detection by one layer", "possible; not for ordinary attention", "abstract"),
    ),
    experiment=(
        "Triple detection built by hand and learned (M = 13, n = 6, 3 seeds), error of the approximation "
        "against the entry bound, and timing. Holds if learned tensor attention reaches 97 % where the ordinary "
        "one stays at 80 % or below, the exact form's time exponent is at least 2.3 and the approximate one's "
        "at most 1.3 with a speed-up of 50 at n = 512, and the error grows a thousandfold from bound 0.5 to 2."
    ),
    code=None,
    keywords=("tensor attention", "kronecker product", "polynomial method", "higher-order", "complexity", "match3"),
    related=("ssa", "hyperzzw"),
)
