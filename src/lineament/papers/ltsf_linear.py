"""ltsf-linear: one linear layer against long-horizon transformers."""

from .record import Figure, Paper

RECORD = Paper(
    slug="ltsf-linear",
    title="Are Transformers Effective for Time Series Forecasting?",
    authors="Ailing Zeng, Muxi Chen, Lei Zhang, Qiang Xu",
    year=2023,
    venue="AAAI 2023",
    arxiv="2205.13504",
    room=("tasks", "nn", "ops", "data"),
    status="planned",
    summary=(
        "Three forecasters of a single layer each, from a window of past values to all future ones at once: "
        "plain, with trend and season split off, and with the last value subtracted. All are affine maps with a "
        "closed-form fit, and the weight matrix is the explanation. They challenge the long-horizon "
        "transformers of 2019 to 2022."
    ),
    claim=(
        "In the multivariate squared-error protocol a single linear layer beats those transformers on long horizons."
    ),
    figures=(
        Figure("ETTh1, MSE at 96 / 720: NLinear", ".374 / .440", "repository"),
        Figure("ETTh1, MSE at 96 / 720: FEDformer", ".376 / .506", "repository"),
        Figure("Electricity, MSE at 96 / 720: Linear", ".140 / .203", "repository"),
        Figure("Electricity, MSE at 96 / 720: FEDformer", ".193 / .246", "repository"),
        Figure("Exchange, MSE at 96: NLinear / repeating the last value", ".081 / .081", "repository"),
        Figure(
            "Traffic, univariate MASE, similar sizes: Autoformer / DLinear (the reverse)",
            ".910 / .965",
            "secondary",
        ),
    ),
    experiment=(
        "Four bundled series at two horizons: linear models by gradient descent and in closed form, repeats and "
        "a small transformer. Holds if the best linear error is at most 0.95 of the transformer's in 5 of 8 "
        "cells, shuffling the window hurts linear models by 50 % and the transformer less than half as much in "
        "half of the cells, the longer window helps Linear on 3 of 4 series, and descent ends within 5 % of the "
        "exact fit in 6 of 8 cells."
    ),
    code="cure-lab/LTSF-Linear (Apache-2.0)",
    keywords=("time series", "forecasting", "linear model", "dlinear", "nlinear", "least squares", "baseline"),
    related=("linear-scope", "shallow-parallel"),
)
