"""Where a dictionary belongs in a model: the names of its places, and its weights in the model's own coordinates.

SAELens names places as TransformerLens does, and some of those hold other numbers than any tensor of a transformers
model: norms without their gain, residuals less their mean, heads less the values' bias. All of it is affine, so it is
folded into the dictionary here.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from copy import deepcopy
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from lineament._base.errors import InputError, near_miss
from lineament.explain.dictionaries.module import Dictionary
from lineament.explain.places import ALIASES, aliased, replaced
from lineament.explain.recording import module_of
from lineament.graph import select
from lineament.models import adapter_for, head_shape

NORMALIZED = re.compile(r"blocks\.(\d+)\.ln2\.hook_normalized")
_Module = TypeVar("_Module", bound=nn.Module)
LAYER = re.compile(r"(?:^|\.)(\d+)(?:\.|$|:)")


@dataclass(frozen=True)
class Placed:
    """A dictionary in a model.

    Attributes:
        dictionary: for the numbers that the model itself holds.
        reads, writes: places by our names; ":input" means what a module receives, ":stream" the residual stream there.
        layer: which one.
    """

    dictionary: Dictionary
    reads: str
    writes: str
    layer: int

    @property
    def name(self) -> str:
        """A short name for its nodes: "t10" for a transcoder of layer 10, "s10" for an autoencoder."""
        return f"{'t' if self.reads != self.writes else 's'}{self.layer}"


def placed(model: nn.Module, dictionary: Dictionary, *, centred: bool | None = None) -> Placed:
    """Find a dictionary's places in a model, and fold what TransformerLens's numbers differ by into a copy of it.

    It is where the model is: a copy of it is moved there if need be.

    Args:
        centred: whether it was made for residuals less their mean over the width (TransformerLens's centred writing
            weights, as GPT-2's `res-jb`); its file's own word if None.

    Raises:
        InputError: places that aren't known (the nearest known is named), of another width, or numbers that may be
            centred or not with nobody saying which.
    """
    config = dictionary.config
    reads, writes = (_place(model, name) for name in (config.reads, config.writes))
    if reads in ("", ":input") or writes == "":
        raise InputError("the dictionary doesn't say what it reads and writes; set reads= and writes= in its config")
    for place in (reads, writes):
        select(model, module_of(place))
    found = LAYER.search(writes)
    _check_width(model, dictionary)
    module = next(iter(select(model, reads.removesuffix(":input")).values()))
    d = moved(dictionary, next(module.parameters(), next(model.parameters())).device)
    if NORMALIZED.fullmatch(config.reads):
        d = _with_gain(d, *norm_affine(model.get_submodule(reads), config.inputs))
    if config.reads.endswith("hook_z"):
        d = _with_shift(d, value_bias(model, int(found[1]) if found else 0))
    if _is_centred(model, dictionary, centred):
        d = _from_centred(d)
    return Placed(d, reads, writes, int(found[1]) if found else 0)


def moved(module: _Module, device: torch.device) -> _Module:
    """Return a module itself if it is on a device, and else a copy there."""
    some = next(module.parameters(), None)
    return module if some is None or some.device == device else deepcopy(module).to(device)


def _place(model: nn.Module, name: str) -> str:
    if match := NORMALIZED.fullmatch(name):
        adapter = adapter_for(model)
        if not adapter.reads:
            raise InputError(f"where {adapter.model_type} has {name!r} is not known; name a module")
        return f"{adapter.layers}.{match[1]}.{adapter.reads[1]}"
    if not name.startswith(("blocks.", "hook_")):
        return name
    try:
        return str(aliased(model, name))
    except InputError as error:
        known = [re.sub(r"\(.*?\)", "0", key).replace("\\", "") for key in (*ALIASES, NORMALIZED.pattern)]
        hint = near_miss(re.sub(r"\d+", "0", name, count=1), known)
        raise InputError(f"{error}{hint}") from None


def _check_width(model: nn.Module, dictionary: Dictionary) -> None:
    config, width = dictionary.config, int(getattr(model.config, "hidden_size", 0))  # pyright: ignore
    of_stream = not re.search(r"hook_(post|[qkvz])$", config.reads) and "_proj" not in config.reads
    if width and of_stream and config.inputs != width:
        raise InputError(f"the dictionary reads width {config.inputs}, and the model is {width} wide; it is of another "
                         f"model{f' ({config.model})' if config.model else ''}")  # fmt: skip


def norm_affine(norm: nn.Module, width: int) -> tuple[Tensor, Tensor]:
    """Return gain and shift [D] of a norm layer of any family, asked with a vector that has mean 0 and deviation 1."""
    if width % 2:
        raise InputError(f"a norm of odd width {width} can't be asked for its gain")
    some = next(norm.parameters(), torch.zeros(()))
    sign = torch.ones(width, dtype=some.dtype, device=some.device)
    sign[1::2] = -1
    with torch.no_grad():
        up, down = norm(1e3 * sign), norm(-1e3 * sign)  # large, so that epsilon counts for nothing
    return (up - down) / 2 * sign, (up + down) / 2


@torch.no_grad()
def _with_gain(dictionary: Dictionary, gain: Tensor, shift: Tensor) -> Dictionary:
    """Return the dictionary for gain * n + shift instead of n."""
    if bool((gain == 0).any()):
        raise InputError("the norm's gain is 0 somewhere, so what was there before it can't be told")
    if not dictionary.config.transcodes:
        raise InputError("an autoencoder of a norm's output without its gain has no place in the model; use resid_mid")
    d = deepcopy(dictionary)
    d.W_enc /= gain
    if d.config.input_bias == "own":
        d.b_in *= gain
    if d.config.skip:
        d.W_skip /= gain
    return _with_shift(d, shift, written=False)


@torch.no_grad()
def _with_shift(dictionary: Dictionary, shift: Tensor | None, *, written: bool = True) -> Dictionary:
    """Return the dictionary for x + shift instead of x, read and (an autoencoder's) written."""
    d = deepcopy(dictionary)
    if shift is None or not bool(shift.any()):
        return d
    if d.config.norm != "none":
        raise InputError(f"a dictionary with a {d.config.norm} step per token can't be moved by a shift")
    shift = shift.to(d.W_enc)
    d.b_enc -= d.W_enc @ shift
    if d.config.input_bias == "output":  # what is written moves, what is subtracted must not
        d.b_enc += d.W_enc @ shift if written else 0
    if written:
        d.b_dec += shift
    if d.config.skip:
        d.b_dec -= d.W_skip @ shift
    return d


def value_bias(model: nn.Module, layer: int) -> Tensor | None:
    """Return the bias of the values of a layer, head by head as they lie before the output projection, if any."""
    adapter = adapter_for(model)
    attention = model.get_submodule(f"{adapter.layers}.{layer}.{adapter.attention}")
    shape = head_shape(model.config)
    if hasattr(attention, "v_proj"):
        bias: Any = attention.v_proj.bias
        if bias is None:
            return None
        heads = bias.unflatten(0, (shape["key_heads"], -1))
        return heads.repeat_interleave(shape["heads"] // shape["key_heads"], 0).flatten().detach()
    fused: Any = getattr(attention, "c_attn", None)
    if fused is None:
        raise InputError(f"where {adapter.model_type} adds the values' bias is not known; hook_z is refused there")
    return fused.bias.chunk(3)[2].detach()


def _is_centred(model: nn.Module, dictionary: Dictionary, said: bool | None) -> bool:
    """Say whether a dictionary was made for residuals less their mean.

    RMS norms keep the mean, so TransformerLens centres nothing in models with them.
    """
    names = (dictionary.config.reads, dictionary.config.writes)
    if not all(re.search(r"hook_(resid_\w+|embed|mlp_out|attn_out)$", name) for name in names):
        return False
    if not any(isinstance(module, nn.LayerNorm) for module in model.modules()):
        return False
    options = dictionary.config.metadata.get("model_from_pretrained_kwargs") or {}
    said = options.get("center_writing_weights") if said is None else said
    if said is None:
        raise InputError(
            f"{names[0]} of a model with LayerNorm may be less its mean (TransformerLens centres writing weights) or "
            "not, and the dictionary doesn't say; pass centred=True or centred=False"
        )
    return bool(said)


@torch.no_grad()
def _from_centred(dictionary: Dictionary) -> Dictionary:
    """Return the dictionary for x, where it was made for x less its mean: centre its encoder, and hand the mean on."""
    c = dictionary.config
    if c.norm != "none" or c.inputs != c.outputs:
        raise InputError("a centred dictionary with a norm step, or of two widths, can't be put on raw residuals")
    bias = dictionary.b_read
    d = Dictionary(replace(c, input_bias="none", skip=True), dictionary.W_enc.dtype)
    centred = dictionary.W_enc - dictionary.W_enc.mean(1, keepdim=True)
    d.W_enc.copy_(centred)
    d.b_enc.copy_(dictionary.b_enc if bias is None else dictionary.b_enc - dictionary.W_enc @ bias)
    d.W_dec.copy_(dictionary.W_dec)
    d.b_dec.copy_(dictionary.b_dec)
    if c.activation == "jumprelu":
        d.threshold.copy_(dictionary.threshold)
    if not c.transcodes:
        d.W_skip.fill_(1 / c.inputs)
    if c.skip:
        d.W_skip += dictionary.W_skip - dictionary.W_skip.mean(1, keepdim=True)
    return d


@contextmanager
def substituted(model: nn.Module, dictionaries: Sequence[Placed], *, keep: int = 1) -> Iterator[None]:
    """Let a model go on with what dictionaries write while the block runs.

    Args:
        keep: so many first positions of each text stay the model's own (the first is a sink, full of outliers).
    """
    read: dict[str, Tensor] = {}

    def seen(name: str) -> Any:
        return lambda x: read.update({name: x}) or x

    def written(each: Placed) -> Any:
        def change(y: Tensor) -> Tensor:
            new = each.dictionary(read.pop(each.name) if each.reads != each.writes else y).to(y)
            return torch.cat([y[:, :keep], new[:, keep:]], 1)

        return change

    with ExitStack() as hooks:
        for each in dictionaries:
            if each.reads != each.writes:
                hooks.enter_context(replaced(model, each.reads, seen(each.name)))
            hooks.enter_context(replaced(model, each.writes, written(each)))
        yield


def check_layers(dictionaries: Sequence[Placed]) -> Mapping[int, Placed]:
    """Return dictionaries by layer.

    Raises:
        InputError: none, or two for one layer.
    """
    found = {each.layer: each for each in dictionaries}
    if not dictionaries or len(found) != len(dictionaries):
        raise InputError(f"{len(dictionaries)} dictionaries for {len(found)} layers; give one per layer, at least one")
    return found
