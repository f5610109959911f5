"""The HTML report: one file that needs nothing else, in light and dark."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path
from typing import Any

from headrace.loadtest.load.figures import Estimate, Overhead, Row, failures, in_words
from headrace.loadtest.load.session import Load, Outcome
from headrace.loadtest.load.svg import Limit, Series, distribution, plot
from headrace.loadtest.report import Figure

STYLE = Path(__file__).with_name("report.css")
TILES = (
    ("highest rate", "1/s"),
    ("requests", "1/s"),
    ("output", "tokens/s"),
    ("goodput", "1/s"),
    ("TTFT p50", "ms"),
    ("TTFT p99", "ms"),
    ("ITL p50", "ms"),
    ("ITL p99", "ms"),
)
COLOURS = 6
SLICES = 40
"""Of a run's time, in which events are counted."""


def page(outcomes: Sequence[Outcome], load: Load, table: Sequence[Row], cost: Overhead, report: dict[str, Any]) -> str:
    """All of it."""
    title = escape(f"Load test of {', '.join(outcome.target.name for outcome in outcomes)}")
    parts = [f"<h1>{title}</h1><p>{escape(_what(load))}</p>"]
    if cost.warnings:
        why = escape(f"{'; '.join(cost.warnings)}: {cost.advice}")
        parts.append(f"<p class=warning>The generator may be the bottleneck: {why}</p>")
    parts += [_tiles(outcomes, table), f"<h2>Plots</h2><div class=plots>{''.join(_plots(outcomes, load))}</div>"]
    parts += [f"<h2>Figures</h2><p>{_intervals(outcomes)}</p>", _figures(outcomes, table), _failures(outcomes)]
    parts += ["<h2>What making the load cost</h2>", _cost(cost)]
    command = escape(report["command"]) + ("" if "--seed" in report["command"] else f" --seed {load.seed}")
    where = escape(f"{report['date']}, client on {report['machine']}.")
    cached = "A server that saw this seed may have its prompts' prefixes cached: restart it, or leave --seed out."
    parts.append(f"<h2>How to run it again</h2><p><code>{command}</code></p><p>{where} {cached}</p>")
    head = '<meta charset="utf-8"><meta name="viewport" content="width=device-width">'
    head += f"<title>{title}</title><style>{STYLE.read_text()}</style>"
    return f'<!doctype html><html lang="en">{head}<body><main>{"".join(parts)}</main></body></html>\n'


def _what(load: Load) -> str:
    workload = load.workload
    if workload.trace:
        lengths = f"a trace of {len(workload.trace)} requests"
    else:
        lengths = f"{workload.prompt} tokens in, {workload.output} out"
    if load.concurrency:
        how = f"{load.concurrency} requests at once"
    elif not load.finds_rate and load.rate:
        how = f"{load.rate:.4g} requests a second, "
        how += "as the trace has them" if workload.trace else f"burstiness {workload.burstiness:g}"
    else:
        how = "the highest rate"
    within = f"; {load.limits.share:.0%} in time: {load.limits.describe()}" if load.limits.are_set else ""
    return f"{lengths}; {how}; {load.repeats} runs{within}"


def _intervals(outcomes: Sequence[Outcome]) -> str:
    repeats = max(len(outcome.runs) for outcome in outcomes)
    if repeats < 2:
        return "There are no confidence intervals without repeats."
    turns = "; targets ran in turns, ratios are taken pair by pair" if len(outcomes) > 1 else ""
    return f"Means of {repeats} runs with 95 % confidence intervals{turns}."


def _tiles(outcomes: Sequence[Outcome], table: Sequence[Row]) -> str:
    rows = {(row.name, row.unit): row for row in table}
    keys = [key for key in TILES if key in rows]
    parts = []
    for number, outcome in enumerate(outcomes):
        notes = "; ".join([f"{outcome.target.model} at {outcome.target.url}", *outcome.target.notes])
        name = f'<b><i class="c{number % COLOURS}"></i>{escape(outcome.target.name)}</b>'
        parts.append(f"<div class=target>{name}<p>{escape(notes)}</p></div>")
        tiles = [(name, unit, rows[name, unit].estimates[number]) for name, unit in keys]
        parts.append(f"<div class=tiles>{''.join(_tile(*tile) for tile in tiles)}</div>")
    return "".join(parts)


def _tile(name: str, unit: str, estimate: Estimate | None) -> str:
    value, _, spread = in_words(estimate).partition(" ± ")
    below = f"± {spread}" if spread else "&nbsp;"
    return f"<div class=tile>{escape(name)}<b>{value} <small>{escape(unit)}</small></b><small>{below}</small></div>"


def _plots(outcomes: Sequence[Outcome], load: Load) -> Iterable[str]:
    limits = load.limits
    good = [[result for run in outcome.runs for result in run.results if not result.failure] for outcome in outcomes]
    names = [outcome.target.name for outcome in outcomes]

    def series(points: Iterable[Sequence[tuple[float, float]]], dots: bool = False) -> list[Series]:
        return [Series(name, p, n % COLOURS, dots) for n, (name, p) in enumerate(zip(names, points, strict=True))]

    searched = [
        [
            (run.rate or 0, 100 * limits.share_held(run.results, run.planned))
            for run in sorted(o.searched, key=lambda run: run.rate or 0)
        ]
        for o in outcomes
    ]
    yield plot(
        "Search",
        "requests/s",
        "% in time",
        series(searched, dots=True),
        [Limit(f"{limits.share:.0%}", y=limits.share * 100)],
    )
    ttft = series([distribution([result.ttft * 1000 for result in results]) for results in good])
    yield plot("Time to first token", "ms", "% of requests within", ttft, _limit(limits.ttft, "x"))
    gaps = [distribution(_up_to_p999([gap * 1000 for result in results for gap in result.gaps])) for results in good]
    yield plot(
        "Inter-token time", "ms, up to the 99.9th percentile", "% of gaps within", series(gaps), _limit(limits.itl, "x")
    )
    if any(outcome.runs for outcome in outcomes):
        last = [outcome.runs[-1].results if outcome.runs else [] for outcome in outcomes]
        dots = series([[(r.sent, r.ttft * 1000) for r in results if not r.failure] for results in last], dots=True)
        yield plot("First tokens of the last run", "seconds", "ms", dots, _limit(limits.ttft, "y"))
        rates = [_rates([(r.sent + at) for r in results for at in r.times]) for results in last]
        yield plot("Output of the last run", "seconds", "events with text/s", series(rates))
        counts = [_running([(r.sent, r.sent + r.ended) for r in results]) for results in last]
        yield plot("Requests at once in the last run", "seconds", "requests", series(counts))


def _limit(seconds: float | None, axis: str) -> list[Limit]:
    if seconds is None:
        return []
    name = f"{seconds * 1000:g} ms"
    return [Limit(name, x=seconds * 1000) if axis == "x" else Limit(name, y=seconds * 1000)]


def _up_to_p999(values: list[float]) -> list[float]:
    ordered = sorted(values)
    return ordered[: max(int(len(ordered) * 0.999), 1)]


def _rates(times: Sequence[float]) -> list[tuple[float, float]]:
    width = max(times, default=0.0) / SLICES or 1.0
    counts = Counter(int(at / width) for at in times)
    return [((slice + 0.5) * width, counts[slice] / width) for slice in range(max(counts, default=-1) + 1)]


def _running(spans: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    changes = sorted([(start, 1) for start, _ in spans] + [(end, -1) for _, end in spans])
    points, running = [], 0
    for at, change in changes:
        points += [(at, float(running)), (at, float(running + change))]
        running += change
    return points


def _figures(outcomes: Sequence[Outcome], table: Sequence[Row]) -> str:
    base = outcomes[0].target.name
    heads = ["figure", *(o.target.name for o in outcomes), *(f"{o.target.name} / {base}" for o in outcomes[1:]), "unit"]
    lines = [[row.name, *(in_words(value) for value in [*row.estimates, *row.ratios]), row.unit] for row in table]
    return _table(heads, lines)


def _failures(outcomes: Sequence[Outcome]) -> str:
    lines = [
        [outcome.target.name, cause, str(count)]
        for outcome in outcomes
        for cause, count in failures(outcome.runs).most_common()
    ]
    return f"<h2>Failures</h2>{_table(['target', 'cause', 'requests'], lines)}" if lines else ""


def _cost(cost: Overhead) -> str:
    def line(figure: Figure) -> list[str]:
        met = {None: "", True: "yes", False: "no"}[figure.met]
        return [figure.name.removeprefix("generator: "), f"{figure.value or 0:.2f}", figure.unit, figure.target, met]

    return _table(["figure", "value", "unit", "trusted", "met"], [line(figure) for figure in cost.figures()])


def _table(heads: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    head = "".join(f"<th scope=col>{escape(text)}</th>" for text in heads)
    body = "".join(f"<tr>{''.join(f'<td>{escape(text)}</td>' for text in line)}</tr>" for line in lines)
    return f"<div class=table tabindex=0><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"
