"""What places of a model hold on a text, cached on disk: made once, resumable, read by rows without loading it all."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lineament import io
from lineament._base.errors import InputError
from lineament.explain.places import values_at

Said = Callable[[str, int, int], None]
"""(what, done, of how many)."""
RECIPE = "activations.json"
IDS = "token_ids"  # in every shard: the windows it was made from
NUMPY = {torch.float16: np.float16, torch.float32: np.float32}


@dataclass(frozen=True)
class Activations:
    """Rows of what places hold, one per token, in shards of equal size.

    Attributes:
        folder: where they are. places: their names. count: tokens. digest: of the recipe they were made by.
        seconds: spent capturing in this call; tokens_per_second: of that.
    """

    folder: Path
    places: tuple[str, ...]
    count: int
    per_shard: int
    digest: str
    seconds: float = 0.0
    tokens_per_second: float = 0.0
    _open: dict[tuple[str, int], Any] = field(default_factory=dict, repr=False, compare=False)

    def rows(self, place: str, index: Tensor) -> Tensor:
        """Return what a place holds at some tokens, float32 [N, D].

        Raises:
            InputError: no such place or token.
        """
        if place not in self.places:
            raise InputError(f"{place!r} was not captured; there are {', '.join(self.places)}")
        if len(index) and not 0 <= int(index.min()) <= int(index.max()) < self.count:
            raise InputError(f"tokens are 0 to {self.count - 1}; asked for {int(index.min())} to {int(index.max())}")
        shards = index // self.per_shard
        found = torch.empty(len(index), self._shard(place, 0).shape[1])
        for shard in shards.unique().tolist():
            at = (shards == shard).nonzero().flatten()
            found[at] = torch.from_numpy(
                self._shard(place, shard)[(index[at] - shard * self.per_shard).numpy()]
            ).float()
        return found

    def windows(self, most: int) -> Tensor:
        """Return the first windows that were read, int64 [N, T], at most so many; their tokens are the first ones.

        The first position of each, which nothing was kept of, is in it too.
        """
        found: list[Tensor] = []
        for shard in range(-(-self.count // self.per_shard)):
            if sum(map(len, found)) >= most:
                break
            found.append(io.open_weights(_shard_path(self.folder, shard))[IDS].long())
        windows = torch.cat(found)
        return windows[: min(most, self.count // (windows.shape[1] - 1))]

    def _shard(self, place: str, shard: int) -> Any:
        if (place, shard) not in self._open:
            path = _shard_path(self.folder, shard)
            header = io.read_header(path)
            entry = header.entries[place]
            self._open[place, shard] = np.memmap(
                path, NUMPY[entry.dtype], "r", header.data_start + entry.begin, entry.shape
            )
        return self._open[place, shard]


def cache_activations(
    model: nn.Module,
    windows: Tensor,
    places: Sequence[str],
    folder: str | Path,
    *,
    about: Mapping[str, Any] | None = None,
    rows: int = 8,
    per_shard: int = 64,
    dtype: torch.dtype = torch.float16,
    said: Said | None = None,
) -> Activations:
    """Run a model on windows of text and keep what places hold, without the first position of each window.

    That position is a sink in most models, whose activations are outliers. The model runs to the last place only. What
    is already there is kept, so an interrupted run goes on. A folder serves some of its windows and places, and can
    grow to more windows.

    Args:
        model: in eval mode. windows: int64 [N, T]. places: by our names (":input": what a module receives).
        folder: a shard of `per_shard` windows each, written whole or not at all.
        about: what else names the recipe (the model's name, the text's).
        rows: windows in a forward pass. dtype: float16 or float32 on disk.
        said: called with progress.

    Raises:
        InputError: the folder holds another recipe's activations, the disk is too small, or numbers don't fit float16.
    """
    folder, places = Path(folder), tuple(dict.fromkeys(places))
    if dtype not in NUMPY:
        raise InputError(f"dtype is {dtype}; activations are cached as float16 or float32")
    if windows.dim() != 2 or windows.shape[1] < 2:
        raise InputError(f"windows are {list(windows.shape)}; expected [N, T] with T of 2 at least")
    windows, places = windows.cpu(), _also_there(folder, places)
    recipe = {
        "places": list(places), "length": windows.shape[1], "dtype": str(dtype), "per_shard": per_shard,
        "about": dict(about or {}),
    }  # fmt: skip
    _claim(folder, recipe)
    pieces, began, captured = windows.split(per_shard), time.perf_counter(), 0
    for shard, piece in enumerate(pieces):
        path = _shard_path(folder, shard)
        if not _there(path, piece):
            io.save_tensors({**_captured(model, piece, places, rows, dtype), IDS: piece.int()}, path)
            captured += piece.numel()
        if said:
            said("activations", shard + 1, len(pieces))
    seconds = time.perf_counter() - began
    return Activations(
        folder, places, len(windows) * (windows.shape[1] - 1), per_shard * (windows.shape[1] - 1),
        _digest({**recipe, "tokens": _digest(windows)}), seconds, captured / seconds if captured else 0.0,
    )  # fmt: skip


def open_activations(folder: str | Path) -> Activations:
    """Open what is cached in a folder, without the model that made it.

    Raises:
        InputError: nothing is there, or a shard is missing between others.
    """
    folder = Path(folder)
    recipe, shards = io.read_json(folder / RECIPE), sorted(folder.glob("shard-*.safetensors"))
    missing = [i for i, path in enumerate(shards) if path != _shard_path(folder, i)]
    if not shards or missing:
        raise InputError(f"{folder} lacks shard {(missing or [0])[0]}; cache its activations first")
    last, per_window = io.read_header(shards[-1]).entries[IDS].shape[0], recipe["length"] - 1
    windows = (len(shards) - 1) * recipe["per_shard"] + last
    return Activations(folder, tuple(recipe["places"]), windows * per_window, recipe["per_shard"] * per_window, "")


def _there(path: Path, windows: Tensor) -> bool:
    """Say whether a shard holds these windows, or these and further ones."""
    if not path.exists():
        return False
    ids = io.open_weights(path)[IDS].long()
    both = min(len(ids), len(windows))
    if not torch.equal(ids[:both], windows[:both]):
        raise InputError(f"{path.parent} holds activations of another text; give another folder")
    return len(ids) >= len(windows)


def _captured(
    model: nn.Module, windows: Tensor, places: Sequence[str], rows: int, dtype: torch.dtype
) -> dict[str, Tensor]:
    parts: dict[str, list[Tensor]] = {place: [] for place in places}
    device = next(model.parameters()).device
    for ids in windows.split(rows):
        for place, x in values_at(model, {"input_ids": ids.to(device)}, places, stop=True).items():
            parts[place].append(x[:, 1:].flatten(0, 1).to(dtype).cpu())
    found = {place: torch.cat(xs) for place, xs in parts.items()}
    for place, x in found.items():
        if not bool(x.isfinite().all()):
            raise InputError(f"what {place!r} holds doesn't fit {dtype}; pass dtype=torch.float32")
    return found


def _also_there(folder: Path, places: tuple[str, ...]) -> tuple[str, ...]:
    """Return what a folder's cache is of, if these places are among it."""
    known = tuple(io.read_json(folder / RECIPE)["places"]) if (folder / RECIPE).exists() else ()
    return known if set(places) <= set(known) else places


def _claim(folder: Path, recipe: Mapping[str, Any]) -> None:
    if (folder / RECIPE).exists():
        if io.read_json(folder / RECIPE) != recipe:
            raise InputError(f"{folder} holds activations of another model, text or place; give another folder")
    else:
        io.write_json(folder / RECIPE, recipe)


def _shard_path(folder: Path, shard: int) -> Path:
    return folder / f"shard-{shard:05d}.safetensors"


def _digest(value: Any) -> str:
    import hashlib

    raw = value.numpy().tobytes() if isinstance(value, Tensor) else repr(sorted(value.items())).encode()
    return hashlib.sha256(raw).hexdigest()[:16]
