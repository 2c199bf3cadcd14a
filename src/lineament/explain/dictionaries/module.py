"""`Dictionary`: transcoders and sparse autoencoders, one module.

z = act((x - b_in) W_enc^T + b_enc), y = z W_dec + b_dec (+ x W_skip^T). A transcoder reads what an MLP receives and
writes what it gives (Dunefsky et al. 2024, arXiv:2406.11944); an autoencoder reads and writes one place.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lineament._base.errors import InputError, unknown
from lineament.explain.dictionaries.sparse import jump, sparse_decode, top_encode

ACTIVATIONS = ("relu", "topk", "jumprelu")
NORMS = ("none", "layer_norm", "constant_norm_rescale")
EPSILON = 1e-5  # beside the deviation of layer_norm, as SAELens has it


@dataclass(frozen=True, kw_only=True)
class DictionaryConfig:
    """What a dictionary is, beside its weights.

    Args:
        inputs, outputs: widths of what it reads and writes. features: how many there are.
        activation: of `ACTIVATIONS`. k: features kept by "topk".
        skip: whether x W_skip^T is added.
        input_bias: what is subtracted before encoding: "none", "own" (b_in), "output" (the decoder's bias; the habit of
            autoencoders, and wrong for transcoders).
        norm: a step per token before encoding, undone after decoding: of `NORMS`.
        window: width of what thresholds learn through ("jumprelu").
        reads, writes: places by TransformerLens's names or ours; equal for autoencoders. model: whose places.
        metadata: what else its file says, kept for saving.

    Raises:
        InputError: an unknown name, a number out of range, or parts that exclude each other.
    """

    inputs: int
    outputs: int
    features: int
    activation: str = "topk"
    k: int = 32
    skip: bool = False
    input_bias: str = "none"
    norm: str = "none"
    window: float = 0.1
    reads: str = ""
    writes: str = ""
    model: str = ""
    metadata: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for kind, value, known in (
            ("activation", self.activation, ACTIVATIONS),
            ("input bias", self.input_bias, ("none", "own", "output")),
            ("norm", self.norm, NORMS),
        ):
            if value not in known:
                raise unknown(kind, value, known)
        if min(self.inputs, self.outputs, self.features) < 1:
            raise InputError(f"a dictionary from {self.inputs} to {self.outputs} with {self.features} features")
        if self.activation == "topk" and not 0 < self.k <= self.features:
            raise InputError(f"k is {self.k}; the dictionary has {self.features} features")
        if self.inputs != self.outputs and (self.input_bias == "output" or self.norm != "none"):
            raise InputError(
                f"{self.inputs} wide is read and {self.outputs} written, so neither the output's bias nor a norm that "
                "is undone afterwards fits the input"
            )

    @property
    def transcodes(self) -> bool:
        """Whether it reads one place and writes another."""
        return self.reads != self.writes


class Dictionary(nn.Module):
    """Sparse features of one place of a model, or from one place to another.

    Weights: W_enc [F, D_in] (a row per feature), b_enc [F], W_dec [F, D_out], b_dec [D_out]; b_in [D_in], threshold
    [F], W_skip [D_out, D_in] where the config asks for them. Made with random weights, decoder rows of length 1.

    Example:
        >>> found = Dictionary(DictionaryConfig(inputs=4, outputs=4, features=8, k=2))
        >>> found.encode(torch.ones(3, 4)).count_nonzero(-1).max() <= 2
        tensor(True)
    """

    def __init__(self, config: DictionaryConfig, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.config = config
        F, D_in, D_out = config.features, config.inputs, config.outputs
        self.W_enc = nn.Parameter(torch.empty(F, D_in, dtype=dtype))
        self.W_dec = nn.Parameter(torch.empty(F, D_out, dtype=dtype))
        for W in (self.W_enc, self.W_dec):
            nn.init.kaiming_uniform_(W)
        with torch.no_grad():
            self.W_dec /= self.W_dec.norm(dim=1, keepdim=True)
        self.b_enc, self.b_dec = (nn.Parameter(torch.zeros(width, dtype=dtype)) for width in (F, D_out))
        if config.input_bias == "own":
            self.b_in = nn.Parameter(torch.zeros(D_in, dtype=dtype))
        if config.activation == "jumprelu":
            self.threshold = nn.Parameter(torch.full((F,), config.window, dtype=dtype))
        if config.skip:
            self.W_skip = nn.Parameter(torch.zeros(D_out, D_in, dtype=dtype))

    @property
    def b_read(self) -> Tensor | None:
        """What is subtracted before encoding, if anything."""
        return {"none": None, "own": getattr(self, "b_in", None), "output": self.b_dec}[self.config.input_bias]

    def extra_repr(self) -> str:
        """Say what it is."""
        c = self.config
        return f"{c.inputs} -> {c.features} -> {c.outputs}, {c.activation}, {c.reads or '?'} -> {c.writes or '?'}"

    def pre(self, x: Tensor) -> Tensor:
        """Return pre-activations [..., F] of what is read, [..., D_in]."""
        return self._centred(self._normed(x)[0]) @ self.W_enc.T + self.b_enc

    def encode(self, x: Tensor) -> Tensor:
        """Return features z [..., F] >= 0 of what is read, [..., D_in].

        Raises:
            InputError: another width.
        """
        if self.config.activation == "topk":
            values, index = self.active(x)
            shape = (*x.shape[:-1], self.config.features)
            return values.new_zeros(shape).scatter(-1, index, values)
        return self._fired(self.pre(x))[0]

    def active(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the features that are active and which they are, both [..., K]; others of these are 0.

        K is k for "topk", and the largest number active at once otherwise.
        """
        if self.config.activation == "topk":
            flat = self._centred(self._normed(x)[0]).flatten(0, -2)
            found = top_encode(flat, self.W_enc, self.b_enc, self.config.k)
            return found[0].unflatten(0, x.shape[:-1]), found[1].unflatten(0, x.shape[:-1])
        z = self.encode(x)
        return z.topk(max(1, int((z > 0).sum(-1).max())), dim=-1)

    def decode(self, z: Tensor, x: Tensor) -> Tensor:
        """Return what is written, [..., D_out], for features z [..., F] of what was read, x [..., D_in]."""
        return self._written(z @ self.W_dec, x)

    def forward(self, x: Tensor) -> Tensor:
        """Return what is written, [..., D_out], for what is read, [..., D_in]."""
        return self.run(x)[0]

    def run(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return what is written, the active features, and for training their numbers ("topk") or steps (others)."""
        if self.config.activation == "topk":
            values, index = self.active(x)
            made = sparse_decode(values.flatten(0, -2), index.flatten(0, -2), self.W_dec)
            return self._written(made.unflatten(0, x.shape[:-1]), x), values, index
        z, on = self._fired(self.pre(x))
        return self.decode(z, x), z, on

    @classmethod
    def load(cls, path: str | Path, **options: Any) -> "Dictionary":
        """Load one, as `explain.dictionaries.files.load_dictionary`."""
        from lineament.explain.dictionaries.files import load_dictionary

        return load_dictionary(path, **options)

    def save(self, folder: str | Path) -> Path:
        """Write it in SAELens's layout, as `explain.dictionaries.files.save_dictionary`."""
        from lineament.explain.dictionaries.files import save_dictionary

        return save_dictionary(self, folder)

    def check(self, features: Iterable[int]) -> list[int]:
        """Return feature numbers as they are.

        Raises:
            InputError: one is outside the dictionary.
        """
        listed = [int(each) for each in features]
        for each in listed:
            if not 0 <= each < self.config.features:
                raise InputError(f"feature {each} is outside the dictionary, which has features 0 to "
                                 f"{self.config.features - 1}")  # fmt: skip
        return listed

    def _fired(self, pre: Tensor) -> tuple[Tensor, Tensor]:
        if self.config.activation == "jumprelu":
            return jump(pre, self.threshold, self.config.window)
        z = pre.relu()
        return z, (z > 0).to(z)

    def _centred(self, x: Tensor) -> Tensor:
        return x if self.b_read is None else x - self.b_read

    def _written(self, made: Tensor, x: Tensor) -> Tensor:
        y = made + self.b_dec
        if self.config.norm != "none":
            _, scale, shift = self._normed(x)
            y = y * scale + shift
        return y + x.to(y) @ self.W_skip.T if self.config.skip else y

    def _normed(self, x: Tensor) -> tuple[Tensor, Tensor | float, Tensor | float]:
        """Return x [..., D_in] as it is encoded, and the scale and shift that undo it."""
        if x.shape[-1] != self.config.inputs:
            raise InputError(
                f"the dictionary reads width {self.config.inputs}, and {list(x.shape)} was given; is it of another "
                "model or place?"
            )
        x = x.to(self.W_enc.dtype)
        if self.config.norm == "layer_norm":
            mean = x.mean(-1, keepdim=True)
            deviation = (x - mean).std(-1, keepdim=True)
            return (x - mean) / (deviation + EPSILON), deviation, mean
        if self.config.norm == "constant_norm_rescale":
            scale = x.norm(dim=-1, keepdim=True) / self.config.inputs**0.5
            return x / scale, scale, 0.0
        return x, 1.0, 0.0


@torch.no_grad()
def scaled(dictionary: Dictionary, inputs: float, outputs: float) -> Dictionary:
    """Fold constant scales into a dictionary, in place: made for inputs * x and outputs * y, it is then for x and y.

    Decoder rows keep their length: what is left of the scale goes into the features, all alike.
    """
    d = dictionary
    if d.config.norm != "none":
        raise InputError(f"a dictionary with a {d.config.norm} step per token has no constant scale to fold")
    d.W_enc *= inputs / outputs
    for x in (d.b_enc, d.b_dec, getattr(d, "threshold", None)):
        if x is not None:
            x /= outputs
    if d.config.input_bias == "own":
        d.b_in /= inputs
    if d.config.skip:
        d.W_skip *= inputs / outputs
    return d
