"""From a plan to a model: slices laid out, vocabularies joined, everything checked, then written shard by shard."""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lineament import io
from lineament._base.errors import InputError, unknown
from lineament.weights.differences import check_alike, listed
from lineament.weights.merge import Task, check_count, find_method, merged, resolve, same_point
from lineament.weights.point import Point
from lineament.weights.recipe import Recipe, Slice
from lineament.weights.settings import layer_places
from lineament.weights.sources import open_named
from lineament.weights.templates import chosen_template
from lineament.weights.vocabulary import Vocabulary, build_vocabulary, load_tokenizer, vocabulary_names, with_vocabulary
from lineament.weights.write import Rounded, merge_card, write_point

MISSING = ("refuse", "base", "skip")
TOKENIZER = (
    "tokenizer.json", "tokenizer_config.json", "tokenizer.model", "spiece.model", "vocab.json", "vocab.txt",
    "merges.txt", "added_tokens.json", "special_tokens_map.json", "chat_template.jinja",
)  # fmt: skip
GENERAL = ("architectures", "eos_token_id")  # lists that are none of layers, however many these are
DEPTHS = ("num_hidden_layers", "n_layer", "num_layers", "n_layers")


@dataclass(frozen=True)
class Prepared:
    """A merge that is fully checked and not begun: the result as a point, what it costs, what was settled."""

    recipe: Recipe
    point: Point
    vocabulary: Vocabulary | None
    templates: tuple[str, ...]
    notes: tuple[str, ...]
    inputs: int

    def costs(self) -> dict[str, int]:
        """Bytes to read and to write, and the memory and disk that takes."""
        specs = Rounded(self.point, self.recipe.dtype).specs.values()
        largest = max((4 * spec.nbytes // spec.dtype.itemsize for spec in specs), default=0)
        written = sum(spec.nbytes for spec in specs)
        read = sum(file.stat().st_size for file in self.point.files)
        return {"tensors": len(specs), "read": read, "written": written, "disk": written + (1 << 20),
                "memory": (self.inputs + 2) * largest + 256_000_000}  # fmt: skip


def prepare(
    recipe: Recipe, *, seed: int = 0, any_base: bool = False, dequantise: bool = False, untie: bool = False,
    statistics: Mapping[str, Any] | None = None,
) -> Prepared:  # fmt: skip
    """Open a plan's models and check everything that can be known from headers and configs.

    Raises:
        InputError: a model that can't be opened; models that do not fit together; layers that are not there; options
            that are unknown, missing or without a value for a tensor.
    """
    chosen_template(recipe.chat_template, ())
    if recipe.missing not in MISSING:
        raise unknown("answer to missing tensors", recipe.missing, MISSING)
    opened = {}
    for name in recipe.models:
        point = open_named(name, dequantise=dequantise, any_base=any_base, rename=recipe.rename)
        opened[name] = point.untie() if untie else point
    first = recipe.base or recipe.slices[0].sources[0].model
    vocabulary = None
    if recipe.tokenizer_source or recipe.tokens:
        vocabulary = _vocabulary(recipe, opened, first)
        opened = with_vocabulary(opened, vocabulary, recipe.base, recipe.tokens)
    stack = {name: Point.open(stat) for name, stat in (statistics or {}).items()}
    _check_alike(recipe, opened)
    like = opened[recipe.base or recipe.slices[0].sources[0].model]
    tasks, layers = _tasks(recipe, opened, stack)
    point = merged(tasks, recipe.method, like, seed=seed)
    if layers is not None:
        point = replace(point, config={**point.config, **_depth(like, opened, layers)})
    templates = tuple(_template(opened[name]) for name in opened)
    most = max(len(task.inputs) + (task.base is not None) for task in tasks.values())
    notes = (*recipe.notes, *_notes(recipe, opened), *_lacking(recipe, opened))
    return Prepared(recipe, point, vocabulary, templates, notes, most)


def _vocabulary(recipe: Recipe, opened: Mapping[str, Point], first: str) -> Vocabulary:
    folders, sizes = {}, {}
    for name, point in opened.items():
        if point.folder is None or not vocabulary_names(point):
            raise InputError(
                f"{name} has no tokenizer or no embedding that could be put in order; leave tokenizer_source out"
            )
        folders[name], sizes[name] = point.folder, point.shape(vocabulary_names(point)[0])[0]
    source = recipe.tokenizer_source or "union"
    if source not in ("union", "base") and source not in opened:
        opened_source = Point.open(source)
        if opened_source.folder is None:
            raise InputError(f"{source} has no tokenizer")
        folders[source], sizes[source] = opened_source.folder, 1 << 60
    return build_vocabulary(folders, sizes, source, first, list(recipe.tokens), recipe.pad_to)


def _check_alike(recipe: Recipe, opened: Mapping[str, Point]) -> None:
    if recipe.method == "passthrough" or any(part.layers for one in recipe.slices for part in one.sources):
        return  # tensors are checked one by one where they meet
    first, *rest = opened.values()
    for point in rest:
        check_alike(first, point, names=recipe.missing == "refuse")


def _tasks(
    recipe: Recipe, opened: Mapping[str, Point], stats: Mapping[str, Point]
) -> tuple[dict[str, Task], list[tuple[str, int]] | None]:
    """Lay the slices out: what belongs to no layer from the first slice before, from the last one after the layers."""
    tasks: dict[str, Task] = {}
    sliced = any(part.layers for one in recipe.slices for part in one.sources)
    if not sliced:
        one = recipe.slices[0]
        names = _names(recipe, one, opened)
        places = layer_places(names)
        for name in names:
            tasks[name] = _task(recipe, one, opened, stats, name, [name] * len(one.sources), places[name])
        return tasks, None
    stack = _stack(opened[recipe.slices[0].sources[0].model])
    outside = [n for n in opened[recipe.slices[0].sources[0].model].specs if not n.startswith(stack)]
    depth, taken = 0, []
    for one in recipe.slices:
        count = one.sources[0].layers[1] - one.sources[0].layers[0]  # pyright: ignore[reportOptionalSubscript]
        for step in range(count):
            t = step / (count - 1) if count > 1 else 1.0
            heads = [f"{stack}{part.layers[0] + step}." if part.layers else stack for part in one.sources]
            taken.append((one.sources[0].model, int(heads[0].removeprefix(stack)[:-1])))
            first = opened[one.sources[0].model].specs
            inner = [n.removeprefix(heads[0]) for n in first if n.startswith(heads[0])]
            if not inner:
                raise InputError(f"{one.sources[0].model} has no layer {heads[0]}; layer_range goes beyond its end")
            for rest in inner:
                name = f"{stack}{depth}.{rest}"
                tasks[name] = _task(recipe, one, opened, stats, name, [head + rest for head in heads], t)
            depth += 1
    for name in outside:
        first = any(part in name for part in ("embed", "wte", "wpe")) and "embed_out" not in name
        one = recipe.slices[0 if first else -1]
        tasks[name] = _task(recipe, one, opened, stats, name, [name] * len(one.sources), 0.0)
    return tasks, taken


def _names(recipe: Recipe, one: Slice, opened: Mapping[str, Point]) -> list[str]:
    names = dict.fromkeys(opened[recipe.base or one.sources[0].model].specs)
    if recipe.missing == "skip" and recipe.base:
        return list(names)
    return list(names | dict.fromkeys(n for part in one.sources for n in opened[part.model].specs))


def _task(
    recipe: Recipe, one: Slice, opened: Mapping[str, Point], stats: Mapping[str, Point], name: str,
    names: Sequence[str], t: float,
) -> Task:  # fmt: skip
    row, base = find_method(recipe.method), one.base or recipe.base
    base = base if row.base != "none" else None
    places = [(opened[part.model], each) for part, each in zip(one.sources, names, strict=True)]
    is_base = [base is not None and same_point(point, opened[base]) for point, _ in places]
    places = _filled(recipe, opened, places, name)
    own = [i for i, place in enumerate(places) if place is not None and not is_base[i]]
    if own or base is None or recipe.missing != "skip":  # where all were skipped the base stays
        check_count(recipe.method, row, len(own), base is not None)
    at = [each for each, one_of_it in zip(names, is_base, strict=True) if one_of_it]
    origin = None if base is None else (opened[base], _base_name(names, at, base, name))
    inputs = tuple(place for i in own if (place := places[i]) is not None)
    shapes = {point.shape(each) for point, each in (*inputs, *([origin] if origin else []))}
    if len(shapes) > 1:
        raise InputError(f"{name!r} would be made of tensors of the shapes {listed(sorted(shapes))}; they must agree")
    scopes = [[one.sources[i].parameters, one.parameters, recipe.parameters] for i in own]
    told = [(stats[one.sources[i].model], names[i]) if one.sources[i].model in stats else None for i in own]
    statistics = tuple(place if place and place[1] in place[0] else None for place in told)
    if row.statistics and not stats:
        raise InputError(f"{recipe.method} needs statistics of each model; use weights.merge from Python")
    options = resolve(row, scopes, [one.parameters, recipe.parameters], name, t)
    return Task(inputs=inputs, base=origin, options=options, statistics=statistics)


def _filled(
    recipe: Recipe, opened: Mapping[str, Point], places: Sequence[tuple[Point, str]], name: str
) -> list[tuple[Point, str] | None]:
    """Settle what a model lacks: the base's tensor in its place, or nothing at all."""
    found: list[tuple[Point, str] | None] = []
    for point, each in places:
        instead = (opened[recipe.base], each) if recipe.missing == "base" and recipe.base else None
        if each in point:
            found.append((point, each))
        elif recipe.missing == "skip" or (instead and each in instead[0]):
            found.append(instead)
        else:
            told = "" if recipe.missing == "refuse" else ", and there is no base that has it"
            raise InputError(
                f"{point.label} has no tensor {each!r}, which {name!r} of the result is made of{told}; --missing base "
                "takes the base's, --missing skip leaves the model out there"
            )
    return found


def _base_name(names: Sequence[str], listed_base: Sequence[str], base: str, name: str) -> str:
    """Return which of the base's tensors belongs beside those of the sources: its own, or the one they all have."""
    if not listed_base and len(set(names)) > 1:
        raise InputError(
            f"{name!r} is made of other layers of each source ({listed(names)}); list {base} among them to say which "
            "of its layers are the base"
        )
    return (listed_base or names)[0]


def _stack(point: Point) -> str:
    """Return the prefix of a model's layers, such as `model.layers.`."""
    found = {match[1] for name in point.specs if (match := re.match(r"(.*?\.)\d+\.", name))}
    if len(found) != 1:
        raise InputError(
            f"{point.label} has {len(found)} stacks of layers ({listed(sorted(found))}); slices need exactly one"
        )
    return found.pop()


def _depth(like: Point, opened: Mapping[str, Point], layers: Sequence[tuple[str, int]]) -> dict[str, Any]:
    """Change what a config says of layers, given as (model, number): how many, and lists with one entry for each."""
    if like.folder is None:
        return {}
    config = io.read_json(like.folder / "config.json")
    key = next((key for key in DEPTHS if key in config), None)
    if key is None:
        raise InputError(f"{like.folder}/config.json does not say how many layers there are; slices can't be laid out")
    folders = {model: opened[model].folder or like.folder for model, _ in layers}
    configs = {model: io.read_json(folder / "config.json") for model, folder in folders.items()}
    changes: dict[str, Any] = {key: len(layers)}
    for name in (k for k, v in config.items() if isinstance(v, list) and len(v) == config[key] and k not in GENERAL):
        each = [(model, i, configs[model].get(name) or config[name]) for model, i in layers]
        if lacking := [f"layer {i} of {model}" for model, i, told in each if i >= len(told)]:
            raise InputError(f"no config says {name} of {listed(lacking)}; slices can't be laid out")
        changes[name] = [told[i] for _, i, told in each]
    return changes


def _template(point: Point) -> str:
    if point.folder is None:
        return ""
    file = point.folder / "chat_template.jinja"
    if file.is_file():
        return file.read_text(encoding="utf-8")
    file = point.folder / "tokenizer_config.json"
    told = io.read_json(file).get("chat_template") if file.is_file() else None
    return told if isinstance(told, str) else ""


def _lacking(recipe: Recipe, opened: Mapping[str, Point]) -> list[str]:
    """Name the tensors that some model lacks, where that was settled."""
    if recipe.missing == "refuse":
        return []
    names = dict.fromkeys(name for point in opened.values() for name in point.specs)
    lacking = [name for name in names if any(name not in point for point in opened.values())]
    done = "the base's were taken" if recipe.missing == "base" else "the models without them were left out there"
    return [f"not every model has {listed(lacking)}: {done}"] if lacking else []


def _notes(recipe: Recipe, opened: Mapping[str, Point]) -> list[str]:
    """Name what differs between the configs and is taken from the first."""
    configs = {n: io.read_json(p.folder / "config.json") for n, p in opened.items() if p.folder is not None}
    if len(configs) < 2:
        return []
    first, *rest = configs
    skip = {"_name_or_path", "transformers_version", "dtype", "torch_dtype", "use_cache"}
    skip |= {"vocab_size"} if recipe.tokenizer_source or recipe.tokens else set()
    notes = []
    for other in rest:
        keys = {
            k for k in {**configs[first], **configs[other]} if configs[first].get(k) != configs[other].get(k)
        } - skip
        if keys:
            notes.append(f"config: {listed(sorted(keys))} of {other} differ from {first}, whose values were taken")
    return notes


def run_recipe(
    recipe: Recipe, out: str | Path, *, prepared: Prepared | None = None, max_shard_size: int | str = "5GB",
    progress: Callable[[int], None] | None = None, resume: bool = True, **options: Any,
) -> Path:  # fmt: skip
    """Carry a plan out and write the model; see `prepare` and `write.write_point` for options and errors."""
    prepared = prepared or prepare(recipe, **options)
    template = chosen_template(recipe.chat_template, prepared.templates)

    def finish(partial: Path) -> None:
        if prepared.vocabulary is not None:
            for name in TOKENIZER:  # the first model's own would stand beside those of the new one
                (partial / name).unlink(missing_ok=True)
            prepared.vocabulary.tokenizer.save_pretrained(partial)
            if (file := partial / "generation_config.json").is_file():
                told = io.read_json(file) | prepared.vocabulary.special_ids(file.name)
                io.write_json(file, {key: value for key, value in told.items() if value is not None})
        if template:
            tokenizer = load_tokenizer(partial)
            tokenizer.chat_template = template
            tokenizer.save_pretrained(partial)

    card = merge_card(Path(out).name, recipe.models, recipe.text, list(prepared.notes))
    return write_point(
        prepared.point, out, dtype=recipe.dtype, max_shard_size=max_shard_size, card=card, finish=finish,
        progress=progress, resume=resume,
    )  # fmt: skip
