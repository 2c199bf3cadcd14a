"""sensor-layout: a camera's pixel grid as a trainable layer."""

from .record import Figure, Paper

RECORD = Paper(
    slug="sensor-layout",
    title="Differentiable Sensor Layouts for End-to-End Learning of Task-Specific Camera Parameters",
    authors=("Hendrik Sommerhoff, Shashank Agnihotri, Mohamed Saleh, Michael Moeller, Margret Keuper, Andreas Kolb"),
    year=2023,
    venue=None,
    arxiv="2304.14736",
    room=("tasks", "nn", "ops"),
    status="planned",
    summary=(
        "Makes the layout of an image sensor trainable: a few parameters bend a regular grid, which makes "
        "pixels small in regions that matter and large elsewhere, at a fixed number. High-resolution images are "
        "integrated over the bent pixels and fed to any network; the data set as a whole gets one layout."
    ),
    claim=(
        "A learned grid beats a uniform one of equal pixel count when the scene has structure to exploit, and "
        "stays uniform when it has none."
    ),
    figures=(
        Figure(
            "learned against uniform layouts: MNIST at low resolution, CelebA, Cityscapes",
            "better; values not read",
            "abstract",
        ),
        Figure("rectilinear against curvilinear layouts", "rectilinear ahead in all experiments", "secondary"),
        Figure("Cityscapes, rectilinear", "more pixels at the left and right edges", "secondary"),
    ),
    experiment=(
        "Digits in a horizontal band of a cluttered canvas seen by a 12x12 sensor: uniform, learned and "
        "hand-set grids, with digits spread everywhere as the control, 3 seeds. Holds if the learned vertical "
        "parameter exceeds 0.5 on all seeds with a gain of at least 3 points, and in the control it stays below "
        "0.5 with a gain under 1 point."
    ),
    code=None,
    keywords=("sensor", "camera", "non-uniform sampling", "end-to-end", "segmentation", "image classification"),
    related=("conn-net",),
)
