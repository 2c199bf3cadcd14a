r"""Why SmolLM2 and a student of it answer "Paris": from tokens to heads to features; the page docs/why-paris.md.

    lineament transcode train smollm2 --layer 10 --layer 15 --layer 20 -o dictionaries --data wiki-sample --data docs
    lineament convert smollm2 -o student
    python benchmarks/why_paris.py --dictionaries dictionaries --student student \
        --json benchmarks/results/why-paris.json --page docs/why-paris.md --html docs/why-paris.html

Without --dictionaries tiny ones are trained on the spot, to see that everything runs.
"""

import argparse
import json
import tempfile
import time
from html import escape
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lineament import data, explain, io
from lineament.explain import places
from lineament.explain.circuit_page import batch
from lineament.explain.dictionaries.activations import open_activations
from lineament.explain.dictionaries.graph_page import GraphReport
from lineament.explain.dictionaries.reading import train_by_name
from lineament.models import load_teacher
from lineament.report import HeatText, Picture, Section, Tiles, heatmap, machine, page
from lineament.tasks.prompt_pairs import Pair, encode

LAYERS = (10, 15, 20)
COUNTRY, CAPITAL = "France", "Paris"
OTHERS = {"Germany": "Berlin", "Italy": "Rome", "Spain": "Madrid", "Japan": "Tokyo", "Russia": "Moscow",
          "England": "London", "China": "Beijing", "Egypt": "Cairo"}  # fmt: skip
SENTENCE = "The capital of {} is"
PROMPT = SENTENCE.format(COUNTRY)
MARKS = ("<!-- what the run printed -->", "<!-- end of the run -->")


def pairs(tokenizer: Any, count: int) -> list[Pair]:
    """Return the prompt beside the same about other countries, those whose names and capitals are one token."""
    one = lambda word: len(tokenizer(f" {word}", add_special_tokens=False)["input_ids"]) == 1  # noqa: E731
    fit = [(country, city) for country, city in OTHERS.items() if one(country) and one(city)][:count]
    return [Pair(PROMPT, SENTENCE.format(country), (f" {CAPITAL}",), (f" {city}",)) for country, city in fit]


def heads(model: Any, clean: Any, corrupt: Any, metric: Any, count: int) -> dict[str, Any]:
    """Return which heads carry the country: estimated for all, patched for all, and what each writes straight out."""
    sites = [f"blocks.{i}.attn.hook_z" for i in range(count)]
    share, found = metric.between(model, clean, corrupt), {}
    for method in ("relp", "patch"):
        began = time.process_time()
        effect = explain.effects(model, clean, corrupt, share, sites, method=method, by="head")
        found[method] = [x.tolist() for x in effect.mean().values()]
        found[f"{method} seconds"] = time.process_time() - began
    a, b = (torch.tensor(found[method]).flatten().double() for method in ("relp", "patch"))
    found["pearson"] = float(torch.corrcoef(torch.stack([a, b]))[0, 1])
    straight = {name: float(x[:, -1].mean()) for name, x in explain.direct_logits(model, clean, metric).scores.items()}
    order = sorted(straight, key=lambda name: -abs(straight[name]))[:12]
    return found | {"straight": {name: straight[name] for name in order}}


def gaze(model: Any, ids: Tensor, words: list[str], where: list[tuple[int, int]]) -> dict[str, Any]:
    """Return where heads look from the last token: name -> {word: share}."""
    try:
        weights = explain.patterns(model, {"input_ids": ids}).weights
    except ValueError:
        return {}
    return {
        f"a{layer}.h{head}": dict(zip(words, weights[layer][0, head, -1].tolist(), strict=True))
        for layer, head in where if layer in weights
    }  # fmt: skip


def explained(model: Any, placed: list[Any], windows: Tensor) -> dict[str, float]:
    """Return 1 - |y - y'|^2 / |y - mean|^2 of each dictionary on text, first positions left out."""
    names = [place for each in placed for place in (each.reads, each.writes)]
    parts = [places.values_at(model, {"input_ids": ids}, names, stop=True) for ids in windows.split(4)]
    held = {place: torch.cat([part[place][:, 1:].flatten(0, 1) for part in parts]) for place in names}
    found = {}
    with torch.no_grad():
        for each in placed:
            x, y = held[each.reads], held[each.writes]
            made = torch.cat([each.dictionary(some) for some in x.split(1024)])
            found[each.name] = 1 - float((made - y).square().sum() / (y - y.mean(0)).square().sum())
    return found


def features(model: Any, ids: Tensor, given: Any, placed: list[Any], target: int, asked: argparse.Namespace) -> Any:
    """Return the attribution graph of the answer, and the features that tell the country from others."""
    began = time.process_time()
    graph = explain.attribute(model, ids, placed, targets=[target], most_features=asked.features, keep_nodes=0.95)
    traced = time.process_time() - began
    clean, corrupt, metric = given
    circuit = explain.feature_circuit(model, clean, corrupt, metric, placed, faithful=float("inf"))  # half of all
    return graph, circuit, {"graph": traced, "circuit": time.process_time() - began - traced}


def labels(
    model: Any, tokenizer: Any, placed: list[Any], wanted: set[str], asked: argparse.Namespace
) -> dict[str, Any]:
    """Return name -> what a feature fires on in the text it was trained on, and the tokens it speaks for."""
    kept, found = open_activations(asked.dictionaries / "activations"), {}
    windows = kept.windows(asked.read)
    for each in placed:
        own = sorted(int(name.rpartition(".")[2]) for name in wanted if name.startswith(f"{each.name}."))
        if own:
            board = explain.dashboard(
                model, tokenizer, each, windows, features=own, examples=4, activations=kept, name=asked.model
            )
            found |= {f"{each.name}.{f.feature}": f for f in board.features}
    return found


def told(name: str, asked: argparse.Namespace, folders: list[Path], windows: Tensor) -> dict[str, Any]:
    """Tell the story of one model; what is needed for pictures stays in it under keys that begin with "_"."""
    model, tokenizer = load_teacher(name)
    placed = [explain.placed(model, explain.Dictionary.load(folder)) for folder in folders]
    ids = tokenizer(PROMPT, return_tensors="pt")["input_ids"]
    words = [tokenizer.decode([i]) for i in ids[0].tolist()]
    target = tokenizer(f" {CAPITAL}", add_special_tokens=False)["input_ids"][0]
    with torch.no_grad():
        chances = model(input_ids=ids).logits[0, -1].softmax(-1)
    best = chances.topk(5)
    story: dict[str, Any] = {
        "says": [[tokenizer.decode([i]), p] for i, p in zip(best.indices.tolist(), best.values.tolist(), strict=True)],
        "rank": 1 + int((chances > chances[target]).sum()), "probability": float(chances[target]),
    }  # fmt: skip
    relevance = explain.relevance(model, {"input_ids": ids}, target=target)
    story["tokens"] = list(zip(words, relevance.inputs["input_ids"][0].tolist(), strict=True))
    chosen = pairs(tokenizer, asked.countries)
    clean, corrupt, metric = given = batch(encode(tokenizer, chosen))
    with torch.no_grad():
        margins = [metric(places.run(model, of)) for of in (clean, corrupt)]
    story["margins"] = [
        {"instead of France": country, "logit of Paris less that of": city, "asked for France": a, "asked for it": b}
        for country, city, a, b in zip(
            [pair.corrupt.split()[-2] for pair in chosen], [pair.distractor[0].strip() for pair in chosen],
            *(margin.tolist() for margin in margins), strict=True,
        )
    ]  # fmt: skip
    story["heads"] = heads(model, clean, corrupt, metric, len(model.model.layers))
    grid = torch.tensor(story["heads"]["patch"])
    top = [divmod(i, grid.shape[1]) for i in grid.flatten().topk(6).indices.tolist()]
    story["gaze"] = gaze(model, ids, words, top) if name == asked.model else {}
    print(f"{time.process_time():.0f} s: heads of {name}", flush=True)
    graph, circuit, seconds = features(model, ids, given, placed, target, asked)
    story |= {"ends": graph.ends, "active": graph.active, "expanded": graph.expanded, "seconds": seconds}
    story["circuit"] = {
        "size": len(circuit.parts), "of": circuit.total, "faithfulness": circuit.faithfulness, "whole": circuit.whole,
        "nothing": circuit.nothing, "parts": dict(list(circuit.parts.items())[:60]),
    }  # fmt: skip
    report = GraphReport(model=name, graph=graph, words=words, answers={target: f" {CAPITAL}"})
    story["nodes"] = report.rows(24)
    named = [row["node"].partition("@")[0] for row in report.rows(len(graph.nodes))]
    story["features of the graph"] = [name for name in dict.fromkeys(named) if name.startswith("t")]
    story["explained"] = explained(model, placed, windows)
    print(f"{time.process_time():.0f} s: features of {name}", flush=True)
    return story | {"_report": report, "_model": model, "_tokenizer": tokenizer, "_placed": placed}


def strongest(story: dict[str, Any], each: int) -> list[str]:
    """Return the features that count most, layer by layer: in the graph and for telling countries apart."""
    found: dict[str, None] = {}
    for layer in LAYERS:
        for names in (story["features of the graph"], list(story["circuit"]["parts"])):
            found |= dict.fromkeys([name for name in names if name.startswith(f"t{layer}.")][:each])
    return list(found)


def fires_on(feature: Any, around: int = 5) -> list[str]:
    """Return the places a feature fires on most, the token in brackets."""
    found = []
    for tokens, values in feature.examples:
        at = max(range(len(values)), key=values.__getitem__)
        before, after = "".join(tokens[max(0, at - around) : at]), "".join(tokens[at + 1 : at + 3])
        found.append(" ".join(f"{before}[{tokens[at]}]{after}".split()))
    return found


def label_rows(result: dict[str, Any]) -> list[dict[str, Any]]:
    """Return a row per labelled feature: what it does in each model, what it fires on, what it speaks for."""
    rows = []
    for name, label in result["labels"].items():
        row: dict[str, Any] = {"feature": name}
        for model, story in result["models"].items():
            row[f"lost without it ({model})"] = story["circuit"]["parts"].get(name)
        rows.append(row | {
            "fires on": f"{label['density']:.2%} of tokens: " + " · ".join(label["fires on"][:3]),
            "speaks for": ", ".join(repr(t) for t in label["speaks for"][:5]),
        })  # fmt: skip
    return rows


def markdown(rows: list[dict[str, Any]]) -> list[str]:
    """Write rows as a table."""

    def show(x: Any) -> str:
        if isinstance(x, float):
            return f"{x:.3f}"
        return "-" if x is None else escape(str(x), quote=False).replace("|", "\\|")

    if not rows:
        return ["None.", ""]
    lines = ["| " + " | ".join(rows[0]) + " |", "|---" * len(rows[0]) + "|"]
    return [*lines, *("| " + " | ".join(show(x) for x in row.values()) + " |" for row in rows), ""]


def answer_rows(result: dict[str, Any]) -> list[dict[str, Any]]:
    return [
        {"model": name, "goes on with": ", ".join(f"{word!r} {p:.1%}" for word, p in story["says"][:4]),
         "rank of Paris": story["rank"], "features explain, layers 10, 15, 20":
         ", ".join(f"{x:.2f}" for x in story["explained"].values())}
        for name, story in result["models"].items()
    ]  # fmt: skip


def head_rows(story: dict[str, Any], count: int = 8) -> list[dict[str, Any]]:
    patch, relp = (torch.tensor(story["heads"][method]) for method in ("patch", "relp"))
    rows = []
    for i in patch.flatten().abs().topk(count).indices.tolist():
        layer, head = divmod(i, patch.shape[1])
        name = f"a{layer}.h{head}"
        looks = story["gaze"].get(name, {})
        seen = ", ".join(f"{word!r} {x:.0%}" for word, x in sorted(looks.items(), key=lambda p: -p[1])[:2])
        rows.append({"head": name, "patched": float(patch[layer, head]), "by RelP": float(relp[layer, head]),
                     "straight into the answer (logits)": story["heads"]["straight"].get(name),
                     "looks at": seen or "-"})  # fmt: skip
    return rows


def text(result: dict[str, Any]) -> str:
    """Write what was found as Markdown: what stands between the marks of the page."""
    lines = markdown(answer_rows(result))
    for name, story in result["models"].items():
        lines += [f"### {name}: heads", "", *markdown(head_rows(story))]
        lines += [f"Share of the way from another country's prompt to that of France, mean of "
                  f"{len(story['margins'])} countries. RelP's correlation with patching over all heads: "
                  f"{story['heads']['pearson']:.3f}.", ""]  # fmt: skip
        ends = ", ".join(f"{share:.0%} in {kind}s" for kind, share in story["ends"].items())
        c = story["circuit"]
        lines += [f"### {name}: features", "",
                  f"{story['active']} features are active on the prompt, {story['expanded']} were looked into; "
                  f"influence ends: {ends}. The three layers' MLPs carry {c['whole'] - c['nothing']:.2f} of the "
                  f"{c['whole']:.2f} logits between Paris and the other capital.", ""]  # fmt: skip
    lines += ["### What the features are", "", *markdown(label_rows(result))]
    lines += [f"{result['cpu seconds']:.0f} s of one core ({result['machine']['cpu']})."]
    return "\n".join(lines)


def pictured(result: dict[str, Any], stories: dict[str, Any], board: dict[str, Any], path: Path) -> list[Path]:
    """Write the page and, beside it, its pictures for the docs."""
    sections, files = [Section("The answer", [Tiles({
        f"{name} says": (repr(story["says"][0][0]), f"{story['says'][0][1]:.1%}; Paris has rank {story['rank']}")
        for name, story in stories.items()}), answer_rows(result)])], []  # fmt: skip
    for name, story in stories.items():
        said, values = zip(*story["tokens"], strict=True)
        grid = [[abs(x) for x in row] for row in story["heads"]["patch"]]
        looks: dict[str, Any] = {"xlabel": "head", "ylabel": "layer", "unit": "share of the way"}
        drawn = [heatmap(grid, **looks, dark=dark) for dark in (False, True)]
        graph = story["_report"]
        pictures = {"heads": drawn[0], "graph": graph.png()}
        files += [io.write_bytes(path.with_name(f"{path.stem}-{name}-{k}.png"), png) for k, png in pictures.items()]
        about = (
            "Each head's part in moving the answer from another country's capital to Paris, by patching, as a share of "
            "the whole way (absolute; the mean over the countries)."
        )
        ends = {f"ends in {kind}s": f"{share:.0%}" for kind, share in story["ends"].items()}
        sections += [
            Section(f"{name}: tokens", [HeatText(said, values, "Relevance of each token for Paris (AttnLRP)."),
                                        story["margins"]]),
            Section(f"{name}: heads", [Picture(drawn[0], f"Map of the heads of {name}", about, drawn[1]),
                                       head_rows(story)]),
            Section(f"{name}: features", [
                Tiles({"features active": story["active"], **ends}),
                Picture(pictures["graph"], f"Attribution graph of Paris in {name}",
                        "From below: tokens, features (t10.57@3: feature 57 of layer 10 on token 3), what dictionaries "
                        "leave unexplained (e10@3), MLPs without one (m5@3), the answer.", graph.png(dark=True)),
                story["nodes"]]),
        ]  # fmt: skip
    parts: list[Any] = []
    for name, feature in board.items():
        spoken = ", ".join(repr(word) for word, _ in feature.promotes[:6])
        parts.append(f"{name} fires on {feature.density:.2%} of tokens and speaks for {spoken}.")
        parts += [HeatText(tokens, values) for tokens, values in feature.examples[:3]]
    sections.append(Section("What the features are", [label_rows(result) or "None.", *parts]))
    page(f"Why do they answer {CAPITAL}?", sections, path, lead=f"{PROMPT!r}, from tokens to heads to features.")
    return [path, *files]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--student", help="a converted student's folder; left out without")
    parser.add_argument("--dictionaries", type=Path, help="OUT of `lineament transcode train`, its activations in it")
    parser.add_argument("--countries", type=int, default=len(OTHERS))
    parser.add_argument("--features", type=int, default=512, help="features looked into by the graph")
    parser.add_argument("--read", type=int, default=2000, help="cached windows read for labels")
    parser.add_argument("--windows", type=int, default=16, help="held-out windows that dictionaries are scored on")
    parser.add_argument("--length", type=int, default=256, help="of those")
    parser.add_argument("--each", type=int, default=3, help="features labelled of each layer and list")
    parser.add_argument("--quick", action="store_true", help="tiny dictionaries, one country, few features")
    for name in ("json", "page", "html"):
        parser.add_argument(f"--{name}", type=Path)
    asked = parser.parse_args()
    if asked.quick:
        asked.countries, asked.features, asked.read, asked.windows, asked.each = 1, 4, 8, 2, 1
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        if asked.dictionaries is None:
            asked.dictionaries = Path(folder)
            train_by_name(asked.model, folder, layers=LAYERS, tokens=1024, features=64, epochs=1.0,
                          training={"batch": 256})  # fmt: skip
        run(asked)


def run(asked: argparse.Namespace) -> None:
    folders = [asked.dictionaries / f"transcoder-{layer}" for layer in LAYERS]
    _, tokenizer = load_teacher(asked.model)
    held = data.load_text("wiki-sample", split="test")
    windows = data.windows(held, tokenizer, asked.length, max_tokens=asked.windows * asked.length)
    names = {"teacher": asked.model} | ({"student": asked.student} if asked.student else {})
    stories = {name: told(path, asked, folders, windows) for name, path in names.items()}
    teacher = stories["teacher"]
    wanted = {name for story in stories.values() for name in strongest(story, asked.each)}
    board = labels(teacher["_model"], teacher["_tokenizer"], teacher["_placed"], wanted, asked)
    board = {name: board[name] for name in sorted(board, key=lambda n: (int(n[1:].split(".")[0]), n))}
    plain = {name: {k: v for k, v in story.items() if not k.startswith("_")} for name, story in stories.items()}
    result = {
        "machine": machine(), "prompt": PROMPT, "models": plain,
        "labels": {name: {"density": f.density, "fires on": fires_on(f), "speaks for": [t for t, _ in f.promotes]}
                   for name, f in board.items()},
        "cpu seconds": time.process_time(),
    }  # fmt: skip
    print(text(result))
    if asked.json:
        io.write_text(asked.json, json.dumps(result, indent=1) + "\n")
    if asked.html:
        print(*pictured(result, stories, board, asked.html))
    if asked.page:
        before, rest = asked.page.read_text(encoding="utf-8").split(MARKS[0])
        io.write_text(asked.page, f"{before}{MARKS[0]}\n{text(result)}\n{MARKS[1]}{rest.split(MARKS[1])[1]}")


if __name__ == "__main__":
    main()
