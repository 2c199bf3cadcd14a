"""Training dictionaries on cached activations, by `train.fit`."""

import hashlib
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lineament import io, train
from lineament._base.errors import InputError, unknown
from lineament._base.seeds import seeded
from lineament.data import epoch_rows
from lineament.explain.dictionaries.activations import Activations, Said
from lineament.explain.dictionaries.module import Dictionary, DictionaryConfig, scaled

ERRORS = ("squared", "per-norm")
REVIVALS = ("none", "ghost", "auxk")
FIRST = 8192  # tokens that means and scales are taken from
AUXILIARY = 1 / 32  # weight of the auxiliary error (Gao et al. 2024, arXiv:2406.04093)


@dataclass(frozen=True, kw_only=True)
class DictionaryTraining:
    """How a dictionary learns.

    Args:
        steps, batch: optimiser steps, tokens in each. lr, schedule, warmup: of Adam, as for `train.FitConfig`.
        penalty: of the L1 norm of the features ("relu"), or of their number ("jumprelu"); "topk" has none.
        error: "squared" is |y' - y|^2 a token; "per-norm" its mean over coordinates by |y|, the form that published
            penalties (1.4e-4) are meant with.
        revive: of features silent for `dead_after` steps: "none", "ghost" gradients (the paper's), or "auxk" (what is
            left unexplained, by the dead features that come nearest to firing).
        normalise: bring inputs and targets to a mean square of 1 before; folded into the weights in the end.
        seed: of weights and of the order of tokens.

    Raises:
        InputError: an unknown name.
    """

    steps: int
    batch: int = 1024
    lr: float = 1e-3
    schedule: str = "linear"
    warmup: int = 50
    penalty: float = 0.0
    error: str = "per-norm"
    revive: str = "auxk"
    dead_after: int = 100
    normalise: bool = True
    seed: int = 0
    checkpoint_every: int = 100

    def __post_init__(self) -> None:
        for kind, value, known in (("error", self.error, ERRORS), ("revival", self.revive, REVIVALS)):
            if value not in known:
                raise unknown(kind, value, known)


@dataclass(frozen=True)
class Trained:
    """A dictionary with the numbers of its last step (l0, unexplained, dead), tokens seen, and how fast that went."""

    dictionary: Dictionary
    last: Mapping[str, float]
    tokens: int
    seconds: float
    tokens_per_second: float


def train_dictionary(
    activations: Activations,
    config: DictionaryConfig,
    training: DictionaryTraining,
    *,
    places: tuple[str, str] | None = None,
    out: str | Path | None = None,
    said: Said | None = None,
) -> Trained:
    """Train a transcoder or an autoencoder.

    Decoder rows have length 1 after every step, and their gradients no part along them, so that a penalty can't be
    dodged by small features on long rows.

    Args:
        activations: of what it reads and writes.
        config: the dictionary's. training: how it learns.
        places: what it reads and writes by the names of `activations`; the config's own if None.
        out: folder of the checkpoint; with the same settings the run goes on from there to the same result, to the bit.
        said: called with progress.

    Raises:
        InputError: a width that isn't the config's, fewer tokens than a batch, or a checkpoint of other settings.
    """
    reads, writes = places or (config.reads, config.writes)
    if config.norm != "none":
        raise InputError(f"dictionaries with a {config.norm} step per token are loaded, not trained; take norm='none'")
    first = torch.arange(min(FIRST, activations.count))
    x, y = activations.rows(reads, first), activations.rows(writes, first)
    if (x.shape[1], y.shape[1]) != (config.inputs, config.outputs):
        raise InputError(f"the places are {x.shape[1]} and {y.shape[1]} wide, the dictionary {config.inputs} and "
                         f"{config.outputs}")  # fmt: skip
    scales = [float(each.square().mean().rsqrt()) if training.normalise else 1.0 for each in (x, y)]
    learner = _Learner(_started(config, training.seed, x * scales[0], y * scales[1]), training)
    order = epoch_rows(activations.count, training.batch, seed=training.seed, what="tokens")

    def batch(step: int) -> tuple[Tensor, Tensor]:
        index = order(step)
        return activations.rows(reads, index) * scales[0], activations.rows(writes, index) * scales[1]

    def after(step: int, numbers: Mapping[str, float]) -> None:
        learner.settle()
        if said:
            said(f"dictionary of {writes}", step + 1, training.steps)

    claim(out, config, training, activations.digest)
    fit = train.FitConfig(
        steps=training.steps, lr=training.lr, schedule=training.schedule, warmup=min(training.warmup, training.steps),
        betas=(0.9, 0.999), clip=None, seed=training.seed, checkpoint_every=training.checkpoint_every,
    )  # fmt: skip
    began, done = time.perf_counter(), _done(out)
    with learner.straight():
        fitted = train.fit(learner, batch, dictionary_loss, fit, out=out, on_step=after)
    seconds = time.perf_counter() - began
    d = scaled(learner.dictionary, *scales).eval() if training.normalise else learner.dictionary.eval()
    new = (training.steps - done) * training.batch
    return Trained(d, dict(fitted.last), training.steps * training.batch, seconds, new / seconds)


class _Learner(nn.Module):
    """A dictionary that learns, and for how many steps each feature has been silent."""

    silent: Tensor

    def __init__(self, dictionary: Dictionary, training: DictionaryTraining) -> None:
        super().__init__()
        self.dictionary, self.training_config = dictionary, training
        self.register_buffer("silent", torch.zeros(dictionary.config.features))

    def straight(self) -> Any:
        """Take from the decoder's gradient its part along the rows; the handle is a context manager."""
        W = self.dictionary.W_dec
        return W.register_hook(lambda g: g - (g * W.detach()).sum(1, keepdim=True) * W.detach())

    @torch.no_grad()
    def settle(self) -> None:
        """Bring decoder rows back to length 1, thresholds to 0 at least."""
        d = self.dictionary
        d.W_dec /= d.W_dec.norm(dim=1, keepdim=True)
        if d.config.activation == "jumprelu":
            d.threshold.clamp_min_(0)

    @torch.no_grad()
    def count(self, z: Tensor, index: Tensor | None) -> float:
        """Note which features fired; return how many did per token."""
        on = z > 0
        fired = on.any(0) if index is None else torch.zeros_like(self.silent).bool().index_fill(0, index[on], True)
        self.silent += 1
        self.silent[fired] = 0
        return float(on.sum(-1, dtype=torch.float32).mean())


def dictionary_loss(learner: nn.Module, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, dict[str, float]]:
    """Return the loss of a learning dictionary on what is read and what should be written: for `train.fit`."""
    assert isinstance(learner, _Learner)
    (x, y), d, how = batch, learner.dictionary, learner.training_config
    made, z, more = d.run(x)
    sparse = d.config.activation == "topk"
    l0 = learner.count(z, more if sparse else None)
    rest = y - made
    error = _error(rest, y, how.error)
    loss = error
    if not sparse:
        loss = loss + how.penalty * (z if d.config.activation == "relu" else more).sum(-1).mean()
    dead = (learner.silent >= how.dead_after).nonzero().flatten()
    if len(dead) and how.revive != "none":
        loss = loss + (_ghost if how.revive == "ghost" else _auxk)(d, x, rest.detach(), dead, error.detach())
    spread = (y - y.mean(0)).square().sum()
    return loss, {"l0": l0, "unexplained": float(rest.detach().square().sum() / spread), "dead": float(len(dead))}


def _error(rest: Tensor, y: Tensor, form: str) -> Tensor:
    if form == "squared":
        return rest.square().sum(-1).mean()
    return (rest.square() / y.norm(dim=-1, keepdim=True).clamp_min(1e-6)).mean()


def _ghost(d: Dictionary, x: Tensor, rest: Tensor, dead: Tensor, error: Tensor) -> Tensor:
    """Ghost gradients: dead features, exponentially active, explain half of what is left; as large as the error."""
    pre = (x if d.b_read is None else x - d.b_read) @ d.W_enc[dead].T + d.b_enc[dead]
    made = pre.clamp_max(20.0).exp() @ d.W_dec[dead]
    size = rest.norm(dim=-1, keepdim=True)
    made = made * (size / (2 * made.norm(dim=-1, keepdim=True)).clamp_min(1e-6)).detach()
    loss = ((made - rest).square() / size.clamp_min(1e-6)).mean()
    return loss * (error / loss.detach().clamp_min(1e-12))


def _auxk(d: Dictionary, x: Tensor, rest: Tensor, dead: Tensor, error: Tensor) -> Tensor:
    """The dead features nearest to firing explain what is left; relative to it, in the error's own size."""
    pre = (x if d.b_read is None else x - d.b_read) @ d.W_enc[dead].T + d.b_enc[dead]
    values, index = pre.topk(min(len(dead), max(1, d.config.outputs // 2)), dim=-1)
    made = torch.zeros_like(pre).scatter(-1, index, values.relu()) @ d.W_dec[dead]
    share = (made - rest).square().sum() / rest.square().sum().clamp_min(1e-12)
    return AUXILIARY * error * share


def _started(config: DictionaryConfig, seed: int, x: Tensor, y: Tensor) -> Dictionary:
    """Return a new dictionary whose biases are the means, so that it begins with features of what differs from them."""
    with seeded(seed):
        d = Dictionary(config)
    with torch.no_grad():
        if not config.transcodes:
            d.W_enc.copy_(d.W_dec)
        d.b_dec.copy_(y.mean(0))
        if config.input_bias == "own":
            d.b_in.copy_(x.mean(0))
        if config.input_bias == "none" and config.norm == "none":
            d.b_enc.copy_(-d.W_enc @ x.mean(0))
    return d.train()


def claim(out: str | Path | None, config: DictionaryConfig, training: DictionaryTraining, digest: str) -> None:
    """Refuse a folder whose checkpoint was made with other settings or on other activations."""
    if out is None:
        return
    settings = {"config": asdict(config), "training": asdict(replace(training, checkpoint_every=1)), "on": digest}
    name = hashlib.sha256(repr(settings).encode()).hexdigest()[:16]
    path = Path(out) / "settings.json"
    if path.exists() and io.read_json(path).get("digest") != name:
        raise InputError(f"{out} holds the checkpoint of other settings or activations; give another folder")
    io.write_json(path, {"digest": name, "training": asdict(training)})


def _done(out: str | Path | None) -> int:
    """Return the steps that the checkpoint in a folder has behind it."""
    path = None if out is None else Path(out) / "checkpoint.safetensors"
    return int(io.open_weights(path).metadata["step"]) if path is not None and path.exists() else 0
