"""Points on disk: rounded once, shard by shard, resumed where a kill left off, complete or not there at all."""

import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lineament import io
from lineament._base.errors import InputError
from lineament.weights.point import Point

BESIDE = (".json", ".txt", ".model", ".jinja", ".py", ".tiktoken")
OURS = ("config.json", "adapter_config.json", "lineament.json", "evidence.json", "merge.json")
PLAN = ".plan"  # what is being written, so that other work is not taken for the same


class Rounded(Mapping[str, Tensor]):
    """A point as it is written: each tensor evaluated when it is asked for, rounded once, checked to be finite."""

    def __init__(self, point: Point, dtype: torch.dtype | None = None) -> None:
        self.point = point.to(dtype) if dtype else point
        self.specs = self.point.specs
        self.failed = False
        """Whether a tensor could not be computed; then what was written so far is worth nothing."""

    def dtype(self, name: str) -> torch.dtype:
        """The dtype it is written in."""
        return self.specs[name].dtype

    def shape(self, name: str) -> tuple[int, ...]:
        """Its shape."""
        return self.specs[name].shape

    def nbytes(self, name: str | None = None) -> int:
        """Bytes of one tensor or of all."""
        return sum(spec.nbytes for spec in self.specs.values()) if name is None else self.specs[name].nbytes

    def __getitem__(self, name: str) -> Tensor:
        try:
            tensor = self.point[name]
            check_tensor(name, tensor, self.point.label)
        except InputError:
            self.failed = True
            raise
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self.specs)

    def __len__(self) -> int:
        return len(self.specs)


def check_tensor(name: str, tensor: Tensor, label: str) -> None:
    """Check that a floating tensor is finite.

    Raises:
        InputError: names the tensor and where it is from.
    """
    if not tensor.is_floating_point():
        return
    total = tensor.float().sum() if tensor.itemsize == 1 else tensor.sum()  # one pass; overflow is looked into below
    if not torch.isfinite(total) and (count := int((~torch.isfinite(tensor.float())).sum())):
        raise InputError(f"{name!r} of {label} holds {count} NaN or infinite numbers; get it again or repair it first")


def write_point(
    point: Point,
    folder: str | Path,
    *,
    dtype: torch.dtype | None = None,
    max_shard_size: int | str = "5GB",
    config: Mapping[str, Any] | None = None,
    card: str | None = None,
    finish: Callable[[Path], None] | None = None,
    progress: Callable[[int], None] | None = None,
    resume: bool = True,
) -> Path:
    """Write a point as a model folder: weights, config, tokenizer files, model card.

    Args:
        point: what to write; evaluated tensor by tensor, each rounded once.
        folder: must not exist; work happens in FOLDER.partial, and the same call goes on there after a kill.
        dtype: of floating tensors; default: each as it is.
        max_shard_size: bytes or text such as "5GB".
        config: fields to change in config.json; None as a value removes one.
        card: text of README.md; default: where the point comes from.
        finish: called with the partial folder at the end, for further files.
        progress: called with the bytes of each tensor written.
        resume: False refuses a partial folder.

    Returns:
        The folder.

    Raises:
        InputError: the folder exists; the partial one is of other work; a tensor is not finite (the partial folder is
            removed then); the disk is too small.
    """
    folder = Path(folder)
    if folder.exists() or folder.is_symlink():
        raise InputError(f"{folder} exists already; choose another folder or remove it first")
    rounded = Rounded(point, dtype)
    partial = io.partial_path(folder)
    if not partial.exists():
        io.need_space(folder, rounded.nbytes() + (1 << 20))
    told = {"point": rounded.point.fingerprint, "shards": io.parse_bytes(max_shard_size)}
    with io.building_folder(folder, resume=resume, scratch=PLAN) as partial:
        _same_work(partial, told)
        try:
            io.save_sharded(
                rounded, partial, max_shard_size=max_shard_size, keep=told["point"] is not None, progress=progress
            )
        except InputError:
            for path in partial.iterdir() if rounded.failed else ():
                shutil.rmtree(path) if path.is_dir() else path.unlink()
            raise
        _write_beside(point, rounded, partial, config or {})
        io.write_text(partial / "README.md", card or f"# A point in weight space\n\n{point.label}\n")
        if finish:
            finish(partial)
    return folder


def _same_work(partial: Path, told: Mapping[str, Any]) -> None:
    """Compare what is to be written with what an earlier run left; without fingerprints start again."""
    plan = partial / PLAN / "plan.json"
    if plan.exists():
        if io.read_json(plan) != dict(told):
            raise InputError(f"{partial} is left from other work than this; remove it, or choose another output folder")
    elif any(partial.glob("*.safetensors")):
        raise InputError(f"{partial} holds files that nobody accounts for; remove it, or choose another output folder")
    io.write_json(plan, dict(told))


def _write_beside(point: Point, rounded: Rounded, partial: Path, changes: Mapping[str, Any]) -> None:
    if point.folder is None:
        return
    for file in sorted(point.folder.iterdir()):
        if file.suffix in BESIDE and file.name not in OURS and not file.name.endswith(".index.json"):
            io.write_bytes(partial / file.name, file.read_bytes())
    config = io.read_json(point.folder / "config.json") | dict(point.config) | dict(changes)
    kinds = {spec.dtype for spec in rounded.specs.values() if spec.floating}
    for key in ("dtype", "torch_dtype"):
        if key in config and len(kinds) == 1:
            config[key] = str(kinds.pop()).removeprefix("torch.")
            break
    removed = [key for key, value in {**point.config, **changes}.items() if value is None]
    io.write_json(partial / "config.json", {key: value for key, value in config.items() if key not in removed})


def merge_card(title: str, parents: list[str], recipe: Mapping[str, Any], notes: list[str]) -> str:
    """Write a model card: what was merged, how, and what was settled on the way."""
    front = ["---", "library_name: transformers", "tags:", "- lineament", "- merge", "base_model:"]
    front += [f"- {parent}" for parent in parents] + ["---", ""]
    told = json.dumps(recipe, indent=2, default=str)
    said = [f"- {note}" for note in notes] or ["- Nothing had to be settled."]
    body = [
        f"# {title}", "", "A merge of these models, made with [lineament](https://github.com/lineament/lineament):", "",
        *[f"- `{parent}`" for parent in parents], "", "## How it was made", "", "```json", told, "```", "",
        "## What was settled on the way", "", *said, "", "## How to use it", "", "```python",
        "from transformers import AutoModelForCausalLM, AutoTokenizer", "",
        'model = AutoModelForCausalLM.from_pretrained("this folder")',
        'tokenizer = AutoTokenizer.from_pretrained("this folder")', "```", "",
        "The licences of the parents apply to the merge.", "",
    ]  # fmt: skip
    return "\n".join([*front, *body])
