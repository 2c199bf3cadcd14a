"""Weights on disk, opened late: the headers are read and checked at once, each tensor when it is asked for."""

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NoReturn

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from lineament._base.errors import InputError, near_miss
from lineament.io.files import read_json
from lineament.io.header import Header, read_header

PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
_INDEX = ".safetensors.index.json"


class Weights(Mapping[str, Tensor]):
    """The tensors of one or more safetensors files, by name. Reading one reads nothing else.

    A mapping in the order of the files: `weights["name"]` loads, `name in weights` and `len(weights)` don't. Opening
    checks every header against its file, so that a truncated or mended shard is found before any work.

    Example:
        >>> import tempfile, torch
        >>> from lineament.io import save_tensors
        >>> path = save_tensors({"w": torch.arange(6.0).view(2, 3)}, Path(tempfile.mkdtemp()) / "model.safetensors")
        >>> weights = open_weights(path)
        >>> weights.names, weights.shape("w"), weights.load("w").sum().item()
        (['w'], (2, 3), 15.0)
    """

    def __init__(self, files: Mapping[Path, Header], homes: Mapping[str, Path], source: Path) -> None:
        self.source = source
        """The file or folder that was opened."""
        self._headers = dict(files)
        self._homes = dict(homes)
        self._open: dict[Path, safe_open] = {}

    @property
    def names(self) -> list[str]:
        """The tensors' names."""
        return list(self._homes)

    @property
    def files(self) -> list[Path]:
        """The files behind the names."""
        return list(self._headers)

    @property
    def metadata(self) -> dict[str, str]:
        """The text that travels in the headers; a later shard's wins."""
        return {key: text for header in self._headers.values() for key, text in header.metadata.items()}

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor, from the header."""
        return self._headers[self._home(name)].entries[name].shape

    def dtype(self, name: str) -> torch.dtype:
        """The dtype of a tensor, from the header."""
        return self._headers[self._home(name)].entries[name].dtype

    def nbytes(self, name: str | None = None) -> int:
        """The bytes of one tensor, or of all of them."""
        wanted = self.names if name is None else [name]
        return sum(math.prod(self.shape(each)) * self.dtype(each).itemsize for each in wanted)

    def load(self, name: str, *, device: str | torch.device = "cpu") -> Tensor:
        """Read one tensor into memory of its own.

        Raises:
            InputError: no such name, or the file changed since it was opened.
        """
        path = self._home(name)
        try:
            if path not in self._open:
                self._open[path] = safe_open(path, framework="pt")
            return self._open[path].get_tensor(name).to(device)
        except (SafetensorError, OSError) as error:
            raise InputError(f"{path} can't be read any more ({error}); was it changed since it was opened?") from None

    def close(self) -> None:
        """Let go of the files. The next `load` opens them again."""
        self._open.clear()

    def _home(self, name: str) -> Path:
        if name not in self._homes:
            raise InputError(f"{self.source} has no tensor {name!r}.{near_miss(name, self._homes)}")
        return self._homes[name]

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._homes:  # what a mapping owes its users; `load` has the better message
            raise KeyError(name)
        return self.load(name)

    def __contains__(self, name: object) -> bool:
        return name in self._homes

    def __iter__(self) -> Iterator[str]:
        return iter(self._homes)

    def __len__(self) -> int:
        return len(self._homes)

    def __repr__(self) -> str:
        return (
            f"Weights({str(self.source)!r}: {len(self)} tensors in {len(self._headers)} files, {self.nbytes()} bytes)"
        )


def open_weights(path: str | Path) -> Weights:
    """Open the safetensors weights of a model folder, or a single file, and check all headers.

    In a folder, `model.safetensors` comes first, then `model.safetensors.index.json` with its shards, then the only
    safetensors file or index there is (an adapter's, say).

    Args:
        path: a folder, a `.safetensors` file or a `.safetensors.index.json`.

    Returns:
        A mapping name -> tensor that loads a tensor when it is asked for.

    Raises:
        InputError: nothing there, only pickles, a missing shard, a truncated file, or a header that does not hold.
    """
    path = Path(path)
    if not path.exists():
        raise InputError(f"{path} does not exist; expected a model folder or a safetensors file")
    main = _find(path) if path.is_dir() else path
    if main.name.endswith(_INDEX):
        return _open_index(main, path)
    if main.suffix in PICKLES:
        _refuse_pickle(main)
    if main.suffix != ".safetensors":
        raise InputError(f"{main} is not a safetensors file; expected a model folder, .safetensors or {_INDEX}")
    header = read_header(main)
    return Weights({main: header}, dict.fromkeys(header.entries, main), path)


def check_finite(weights: Mapping[str, Tensor], *, source: str = "the model") -> None:
    """Check that no floating-point tensor holds NaN or infinity, one tensor in memory at a time.

    Args:
        weights: a state dict, or what `open_weights` gives.
        source: how the error calls them.

    Raises:
        InputError: names the first five tensors that do, and how many of their numbers.
    """
    source = str(weights.source) if isinstance(weights, Weights) else source
    bad = {name: count for name in weights if (count := _not_finite(weights[name]))}
    if bad:
        listed = ", ".join(f"{name} ({count})" for name, count in list(bad.items())[:5])
        more = f" and {len(bad) - 5} more tensors" if len(bad) > 5 else ""
        raise InputError(f"{source} holds NaN or infinite numbers in {listed}{more}; get it again or repair it first")


def _not_finite(tensor: Tensor) -> int:
    if not (tensor.is_floating_point() or tensor.is_complex()) or tensor.is_meta:
        return 0
    if tensor.is_floating_point() and tensor.itemsize == 1:  # float8 has few operators
        tensor = tensor.float()
    if torch.isfinite(tensor.detach().sum()):  # one pass without a mask; an overflow of the sum is looked into below
        return 0
    return int((~torch.isfinite(tensor)).sum())


def _find(folder: Path) -> Path:
    for name in ("model.safetensors", f"model{_INDEX}"):
        if (folder / name).exists():
            return folder / name
    indices = sorted(folder.glob(f"*{_INDEX}"))
    singles = sorted(folder.glob("*.safetensors"))
    for found in (indices, singles):
        if len(found) == 1:
            return found[0]
        if found:
            raise InputError(f"{folder} holds {', '.join(f.name for f in found[:4])}; which? Give the file itself")
    pickles = sorted(file for file in folder.iterdir() if file.suffix in PICKLES and file.name != "training_args.bin")
    if pickles:
        _refuse_pickle(pickles[0])
    raise InputError(f"{folder} holds no weights; expected model.safetensors or model{_INDEX} in it")


def _open_index(index: Path, source: Path) -> Weights:
    table = read_json(index)
    homes = table.get("weight_map") if isinstance(table, dict) else None
    if not isinstance(homes, dict) or not homes or not all(isinstance(name, str) for name in homes.values()):
        raise InputError(f"{index} has no weight_map from tensor names to files; get it again or save the model again")
    headers: dict[Path, Header] = {}
    for shard in dict.fromkeys(homes.values()):
        if Path(shard).name != shard or shard in (".", "..") or "\\" in shard:
            raise InputError(f"{index} names the shard {shard!r}; expected the plain name of a file beside it")
        if Path(shard).suffix in PICKLES:
            _refuse_pickle(index.with_name(shard))
        if not index.with_name(shard).exists():
            raise InputError(f"{index.with_name(shard)} is missing, but {index.name} lists it; get the shard again")
        headers[index.with_name(shard)] = read_header(index.with_name(shard))
    for name, shard in homes.items():
        if name not in headers[index.with_name(shard)].entries:
            raise InputError(f"{index.with_name(shard)} has no tensor {name!r}, but {index.name} says so; get it again")
    return Weights(headers, {name: index.with_name(shard) for name, shard in homes.items()}, source)


def _refuse_pickle(path: Path) -> NoReturn:
    raise InputError(
        f"{path} is a pickle, which can run code when it is opened, so only safetensors are read; where you trust it, "
        "load it once with transformers and save it again (`model.save_pretrained(folder)` writes safetensors)"
    )
