"""`lineament papers` and `lineament reproduce`: the catalogue and its experiments."""

from pathlib import Path
from typing import Annotated

import typer


def papers(
    words: Annotated[list[str] | None, typer.Argument(help="Words to look for, or one slug; empty lists all.")] = None,
    status: Annotated[str, typer.Option(help="Only 'works' or 'planned'.")] = "",
    json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """List and search the papers lineament is built on.

    Example: lineament papers linear attention
    """
    from dataclasses import asdict

    from rich.table import Table

    from lineament import papers as catalogue
    from lineament._base.errors import unknown
    from lineament.cli.messages import print_json, show
    from lineament.papers.record import STATUSES

    if status and status not in STATUSES:
        raise unknown("status", status, STATUSES)
    query = " ".join(words or [])
    exact = query in catalogue.MODULES
    found = [catalogue.record(query)] if exact else catalogue.search(query) if query else catalogue.records()
    found = [record for record in found if not status or record.status == status]
    if json:
        print_json([asdict(record) for record in found])
    elif exact and found:
        _page(found[0])
    else:
        table = Table("slug", "year", "status", "title")
        for record in found:
            table.add_row(record.slug, str(record.year), record.status, record.title)
        show(table, f"{len(found)} papers; `lineament papers SLUG` shows one")


def _page(record) -> None:
    from rich.table import Table

    from lineament.cli.messages import show

    where = f"arXiv:{record.arxiv}" if record.arxiv else record.venue or ""
    show(record.title, f"{record.authors}, {record.year}. {where}", "", record.summary, "")
    show(f"Claim. {record.claim}", f"Experiment. {record.experiment}", "")
    table = Table("setting", "the paper's figure", "status")
    for figure in record.figures:
        table.add_row(figure.setting, figure.value, figure.status)
    show(table, f"status: {record.status}; room: {', '.join(record.room)}; code: {record.code or 'none found'}")


def reproduce(
    slug: Annotated[str, typer.Argument(help="A paper, as `lineament papers` lists them.")],
    scale: Annotated[str, typer.Option(help="small (at most 300 s on 2 cores), full or study.")] = "small",
    html: Annotated[Path | None, typer.Option(help="Write a one-file report here.")] = None,
    out: Annotated[Path | None, typer.Option(help="Keep runs here and go on from them (studies).")] = None,
    only: Annotated[
        list[str] | None, typer.Option(help="Run a part: a glob over the names of runs; may be repeated (studies).")
    ] = None,
    workers: Annotated[int | None, typer.Option(help="Runs at a time on this machine (studies).")] = None,
    ray: Annotated[str | None, typer.Option(help="Run on a Ray cluster: its address, or 'auto' (studies).")] = None,
    runs: Annotated[bool, typer.Option("--runs", help="Only list the runs, and which are finished (studies).")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Run a paper's experiment: system beside baseline, against a threshold fixed beforehand.

    Exit code 1 says that the claim did not hold at this scale. Example: lineament reproduce hedgehog. A study, in
    parts: lineament reproduce hybrid-linear-attention --scale study --only "study-*" --out study --workers 2
    """
    from lineament import papers as catalogue
    from lineament.cli.messages import print_json, require_writable, show
    from lineament.report import page

    require_writable(html)
    asked = {"out": out and str(out), "only": only or None, "workers": workers, "ray": ray}
    options = {name: value for name, value in asked.items() if value is not None}
    if runs:
        kept = {name: value for name, value in options.items() if name in ("out", "only")}
        found = catalogue.runs(slug, scale, **kept)
        words = [f"{name}{'  finished' if done else ''}" for name, done in found.items()]
        print_json(found) if json else show(*words, f"{sum(found.values())} of {len(found)} are finished")
        return
    run = catalogue.experiment(slug, **options)
    evidence = run(scale, **options)
    if html is not None:
        page(catalogue.record(slug).title, [evidence], html)
    if json:
        print_json(evidence.to_json())
    else:
        show(*evidence.tables(), f"threshold: {evidence.threshold}")
        show({True: "held", False: "did not hold", None: "no verdict at this scale"}[evidence.passed])
    if evidence.passed is False:
        raise typer.Exit(1)
