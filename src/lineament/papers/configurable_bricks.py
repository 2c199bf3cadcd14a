"""configurable-bricks: a language model seen as groups of neurons and add-on modules."""

from .record import Figure, Paper

RECORD = Paper(
    slug="configurable-bricks",
    title="Configurable Foundation Models: Building LLMs from a Modular Perspective",
    authors=(
        "Xiao, Zhang, Song, Jiang, Yao, Han, Wang, Wang, Huang, Lin, Chen, Zhao, Tu, Zhong, Zhang, Si, Moo, "
        "Zhao, Chen, Lin, Liu, Shang, Sun"
    ),
    year=2024,
    venue=None,
    arxiv="2409.02877",
    room=("weights",),
    status="planned",
    summary=(
        "Views a language model as bricks: groups of feed-forward neurons that specialise in pre-training, and "
        "modules added later such as LoRAs. It measures sparsity and functional specialisation of neurons and "
        "names four operations on bricks: routing, merging, updating and growing. The library adds expert "
        "splitting with a router and one record type for all bricks."
    ),
    claim=(
        "Feed-forward neurons are sparsely active and specialised: removing the top neurons of one function "
        "hurts that function far more than the others."
    ),
    figures=(
        Figure("neurons with a normalised indicator below 0.2", "80 %", "paper"),
        Figure("neurons maskable with almost no loss, by activation / by output magnitude", "70 % / 80 %", "paper"),
        Figure(
            "best functionality score per layer for coding, math, translation",
            "above 0.8 in most layers",
            "paper",
        ),
        Figure("Llama-3-8B, top 5 % of coding neurons removed, perplexity on coding", "+112 %", "paper"),
        Figure("Llama-3-8B, the same across functions", "mostly +3 to +26 %", "paper"),
        Figure("overlap of the top 5 % neurons between functions (random 0.05)", "0.00 to 0.09", "paper"),
    ),
    experiment=(
        "A digit classifier with 512 hidden units takes its classes as functions, once trained densely and once "
        "with an L1 penalty on activations. Holds if removing a class's top 5 % of units raises its own loss "
        "more than ten times as much as the others', and in the sparse network 20 % of the experts keep 99 % of "
        "the accuracy."
    ),
    code=None,
    keywords=(
        "modularity",
        "mixture of experts",
        "activation sparsity",
        "neuron specialisation",
        "routing",
        "moefication",
    ),
    related=("atlas", "transcoders", "i-lora"),
)
