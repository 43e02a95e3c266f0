"""The report: one Markdown file, the same as one HTML page that needs no other file, and the plots."""

import base64
import html
import re
from dataclasses import dataclass
from datetime import date
from pathlib import Path

from markdown_it import MarkdownIt

from configs.errors import writing
from eval.compare import benchmarks, plots, tables
from eval.compare.collect import Method
from eval.compare.fairness import Fairness, verdict
from eval.compare.tables import Question, Table
from training.checkpoint import write_atomic

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #1a1a1a; max-width: 1180px; margin: 2em auto; padding: 0 1.2em; }
h1 { font-size: 1.6em; } h2 { font-size: 1.2em; margin-top: 2em; border-bottom: 1px solid #ddd; padding-bottom: .2em; }
div.wide { overflow-x: auto; }
table { border-collapse: collapse; margin: .8em 0; font-size: .87em; font-variant-numeric: tabular-nums; }
th, td { padding: .3em .7em; border-bottom: 1px solid #e4e4e4; vertical-align: top; }
th { border-bottom: 2px solid #888; text-align: left; } td { white-space: nowrap; max-width: 60em; } td:last-child { white-space: normal; }
img { max-width: 100%; width: 100%; } img.narrow { width: 680px; } code { font-size: .92em; background: #f3f3f3; padding: .1em .3em; }
blockquote { margin: 1em 0; padding: .4em 1em; border-left: 5px solid #999; background: #f6f6f6; }
blockquote.bad { border-color: #b00020; background: #fdf0f0; } blockquote.good { border-color: #1b7f3b; background: #effaf2; }
p.note { color: #555; font-size: .87em; }
"""  # noqa: E501


@dataclass
class Comparison:
    """What a report is made of."""

    methods: list[Method]
    fairness: Fairness
    question: Question
    command: str
    smoothing: float

    @property
    def words(self) -> str:
        runs = sum(len(method.runs) for method in self.methods)
        return f"{len(self.methods)} method{'s' * (len(self.methods) > 1)}, {runs} run{'s' * (runs > 1)}"


def write(comparison: Comparison, out: Path) -> Path:
    """Write report.md, report.html and the plots into the folder `out`; the path of report.md.

    ConfigError where that cannot be written.
    """
    methods, question = comparison.methods, comparison.question
    with writing("out", out, "; choose another with out="):
        out.mkdir(parents=True, exist_ok=True)
        plots.curves(methods, comparison.smoothing, out / "loss.png")
        plots.curves(methods, comparison.smoothing, out / "perplexity.png", perplexity=True)
        front = plots.loss_against_cache(methods, question, out / "pareto.png")
        plots.gradient_norms(methods, comparison.smoothing, out / "gradient_norm.png")
        text = markdown(comparison, front)
        write_atomic(out / "report.md", text)
        write_atomic(out / "report.html", page(text, out))
    return out / "report.md"


def markdown(comparison: Comparison, front: list[str]) -> str:
    """The whole report; the plots are beside it."""
    methods, fairness, question = comparison.methods, comparison.fairness, comparison.question
    words, reasons = verdict(fairness, methods)
    mark = "good" if not reasons and len(methods) > 1 else "bad" if "NOT" in words else "neutral"
    blocks = [
        f"# {', '.join(method.name for method in methods)}",
        "\n".join([f"> **{words}**", ">" * bool(reasons), *(f"> - {reason}" for reason in reasons)]).rstrip()
        + f"\n<!-- {mark} -->",
        f"{comparison.words}, {date.today().isoformat()}: `{comparison.command}`",
        "## Results",
        table(tables.final(methods, question, comparable=is_comparable(fairness, question))),
    ]
    if not fairness.same_tokens:
        blocks.append(
            "The runs' tokens differ, so that losses and perplexities of different rows are of different things. "
            + (
                "The text is the same: bits a byte can be compared."
                if fairness.same_text
                else "So is their text, as far as is known: no number here can be compared between rows."
            )
        )
    blocks.append("![loss against tokens, FLOPs and time](loss.png)")
    if question.target is not None and is_comparable(fairness, question):
        blocks += ["## What it takes to get there", table(tables.reach(methods, question))]
    blocks += ["## Cost", table(tables.cost(methods)), "![loss against cache](pareto.png)"]
    if front:
        blocks.append(f"No method has both less cache and less {question.label} than: {', '.join(front)}.")
    for suite in benchmarks.suites_of(methods):
        if benchmarks.is_benchmark(suite, methods):
            blocks += [f"## Benchmarks: {suite}", table(benchmarks.benchmark(suite, methods))]
        else:
            found = benchmarks.evaluation(suite, methods, question.confidence)
            blocks += [f"## Evaluation: {suite}", table(found)]
    if not benchmarks.suites_of(methods):
        blocks += ["## Benchmarks", "None yet: `python -m eval.run run=RUN suite=paper_zeroshot` adds them."]
    blocks += ["## Health", table(tables.health(methods)), "![gradient norms](gradient_norm.png)"]
    if len(methods) > 1:
        blocks += ["## Is it fair?", table(checks(fairness))]
        blocks += ["### Configuration: what differs", table(tables.differences(fairness.differing, methods))]
    blocks += ["## Perplexity", "![perplexity against tokens, FLOPs and time](perplexity.png)"]
    return "\n\n".join(blocks) + "\n"


def is_comparable(fairness: Fairness, question: Question) -> bool:
    """Whether the metric means the same in all runs."""
    return fairness.same_tokens or (fairness.same_text and question.metric == "val/bits_per_byte")


def checks(fairness: Fairness) -> Table:
    rows = [[check.name, check.verdict, check.grouped()] for check in fairness.checks]
    return Table(["what", "", "values"], rows)


def table(found: Table) -> str:
    """A pipe table, the numbers to the right, and its notes."""
    escape = lambda cell: cell.replace("|", "\\|")  # noqa: E731
    is_text = [
        i == 0 or not any(re.match(r"[-+]?[\d.]|-$", row[i]) for row in found.rows) or found.columns[i] == "values"
        for i in range(len(found.columns))
    ]
    lines = [
        "| " + " | ".join(map(escape, found.columns)) + " |",
        "|" + "|".join("---" if text else "---:" for text in is_text) + "|",
        *("| " + " | ".join(map(escape, row)) + " |" for row in found.rows),
    ]
    notes = "".join(f"\n\n*{note}*" for note in found.notes)
    return "\n".join(lines) + notes


def page(text: str, folder: Path) -> str:
    """The Markdown as an HTML page with its pictures inside."""
    body = MarkdownIt("commonmark", {"html": True}).enable("table").render(text)
    mark = re.search(r"<!-- (\w+) -->", body)
    if mark:
        body = body.replace("<blockquote>", f'<blockquote class="{mark[1]}">', 1).replace(mark[0], "")
    body = re.sub(r"<p><em>(.*?)</em></p>", r'<p class="note">\1</p>', body)

    body = body.replace("<table>", '<div class="wide">\n<table>').replace("</table>", "</table>\n</div>")

    def embed(match: re.Match) -> str:
        data = base64.b64encode((folder / match[1]).read_bytes()).decode()
        narrow = "" if match[1] in ("loss.png", "perplexity.png") else 'class="narrow" '
        return f'{narrow}src="data:image/png;base64,{data}"'

    body = re.sub(r'src="([^"]+\.png)"', embed, body)
    title = html.escape(text.splitlines()[0].removeprefix("# "))
    return (
        f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n<title>{title}</title>\n'
        f"<style>{STYLE}</style>\n</head>\n<body>\n{body}</body>\n</html>\n"
    )
