"""What is left of a load test: tables on the terminal, a JSON file, an HTML page."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from headrace.loadtest.load.figures import Estimate, Overhead, Row, failures, in_words, numbers
from headrace.loadtest.load.page import page
from headrace.loadtest.load.session import Load, Outcome
from headrace.loadtest.report import Figure, as_report

DECIMALS = 4
"""Of the seconds in the JSON file."""


def rows(outcomes: Sequence[Outcome], load: Load) -> list[Row]:
    """The table: one row a figure, one column a target."""
    by_target = [[numbers(run, load.limits) for run in outcome.runs] for outcome in outcomes]
    keys = list(dict.fromkeys(key for runs in by_target for run in runs for key in run))
    table = []
    if any(outcome.highest_rate is not None for outcome in outcomes):
        rates = [Estimate(outcome.highest_rate or 0.0) for outcome in outcomes]
        ratios = [Estimate.ratio([rate.value], [rates[0].value]) for rate in rates[1:]]
        table.append(Row("highest rate", "1/s", list(rates), ratios))
    for key in keys:
        values = [[run[key] for run in runs if key in run] for runs in by_target]
        estimates = [Estimate.of(column) if column else None for column in values]
        ratios = [
            Estimate.ratio(column, values[0]) if column and len(column) == len(values[0]) else None
            for column in values[1:]
        ]
        table.append(Row(*key, estimates, ratios))
    return table


def overhead(outcomes: Sequence[Outcome]) -> Overhead:
    """Of all runs that count, or of the search where none does."""
    runs = [run for outcome in outcomes for run in outcome.runs]
    return Overhead.of(runs or [run for outcome in outcomes for run in outcome.searched])


def print_tables(console: Console, outcomes: Sequence[Outcome], load: Load) -> None:
    """All figures, failures by cause, and what making the load cost."""
    repeats = max(len(outcome.runs) for outcome in outcomes)
    table = Table(title=f"{repeats} runs each, ± is the 95 % interval" if repeats > 1 else "one run")
    table.add_column("figure")
    for outcome in outcomes:
        table.add_column(outcome.target.name, justify="right")
    for outcome in outcomes[1:]:
        table.add_column(f"{outcome.target.name} / {outcomes[0].target.name}", justify="right")
    table.add_column("unit")
    for row in rows(outcomes, load):
        table.add_row(row.name, *(in_words(value) for value in [*row.estimates, *row.ratios]), row.unit)
    console.print(table)
    for outcome in outcomes:
        for cause, count in failures(outcome.runs).most_common(5):
            console.print(f"[red]{outcome.target.name}: {count} failed:[/red]", cause, markup=True)
    cost = overhead(outcomes)
    console.print(
        f"generator: {cost.cpu:.0%} of a core, loop lag p99 {cost.lag * 1000:.2f} ms, requests late p99 "
        f"{cost.late * 1000:.2f} ms, bytes waited for their stamp p99 {cost.stamp * 1000:.2f} ms, "
        f"at most {cost.most_running} streams at once"
    )
    for warning in cost.warnings:
        console.print(f"[bold red]the generator may be the bottleneck: {warning}[/]", soft_wrap=True)
    if cost.warnings:
        console.print(cost.advice, soft_wrap=True)


def as_json(outcomes: Sequence[Outcome], load: Load, command: str) -> dict[str, Any]:
    """The figures as `report` writes them, and each request, so that anything else can be computed."""
    figures = []
    for row in rows(outcomes, load):
        for outcome, estimate in zip(outcomes, row.estimates, strict=True):
            if estimate is not None:
                figures.append(
                    Figure(f"{outcome.target.name}: {row.name}", estimate.value, row.unit, spread=estimate.spread)
                )
        for outcome, ratio in zip(outcomes[1:], row.ratios, strict=True):
            if ratio is not None:
                name = f"{outcome.target.name} over {outcomes[0].target.name}: {row.name}"
                figures.append(Figure(name, ratio.value, "ratio", spread=ratio.spread))
    cost = overhead(outcomes)
    report = as_report("loadtest", [*figures, *cost.figures()], command=command)
    report["warnings"] = list(cost.warnings)
    report["seed"] = load.seed
    report["targets"] = [
        {
            "name": outcome.target.name,
            "url": outcome.target.url,
            "model": outcome.target.model,
            "endpoint": outcome.target.endpoint,
            "notes": list(outcome.target.notes),
            "failures": dict(failures(outcome.runs)),
            "search": [
                {
                    "rate": run.rate,
                    "in_time": load.limits.share_held(run.results, run.planned),
                    "cut_off": run.was_cut_off,
                }
                for run in outcome.searched
            ],
            "runs": [
                {
                    "rate": run.rate,
                    "concurrency": run.concurrency,
                    "seconds": round(run.seconds, DECIMALS),
                    "requests": [
                        {
                            "sent": round(result.sent, DECIMALS),
                            "events": [round(at, DECIMALS) for at in result.times],
                            "prompt_tokens": result.prompt_tokens,
                            "output_tokens": result.output_tokens,
                            **({"failure": result.failure} if result.failure else {}),
                        }
                        for result in run.results
                    ],
                }
                for run in outcome.runs
            ],
        }
        for outcome in outcomes
    ]
    return report


def write_results(save: Path, outcomes: Sequence[Outcome], load: Load, command: str) -> list[Path]:
    """NAME.json and NAME.html."""
    report = as_json(outcomes, load, command)
    data, html = (save.parent / f"{save.name}.{kind}" for kind in ("json", "html"))
    data.write_text(json.dumps(report) + "\n")
    html.write_text(page(outcomes, load, rows(outcomes, load), overhead(outcomes), report), encoding="utf-8")
    return [data, html]
