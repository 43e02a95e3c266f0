"""The report: a Markdown file, the same as one HTML page that needs no other file, and the plots."""

import base64
import html
import re
from datetime import date
from pathlib import Path

from markdown_it import MarkdownIt

from configs.errors import writing
from data.files import write_atomic
from eval.compare import plots, tables
from eval.compare.benchmarks import evaluations
from eval.compare.collect import Method
from eval.compare.fairness import Fairness, verdict
from eval.compare.tables import Question
from eval.tables import Table

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #1a1a1a; max-width: 1180px; margin: 2em auto; padding: 0 1.2em; }
h1 { font-size: 1.6em; } h2 { font-size: 1.2em; margin-top: 2em; border-bottom: 1px solid #ddd; padding-bottom: .2em; }
div.wide { overflow-x: auto; }
table { border-collapse: collapse; margin: .8em 0; font-size: .87em; font-variant-numeric: tabular-nums; }
th, td { padding: .3em .7em; border-bottom: 1px solid #e4e4e4; vertical-align: top; }
th { border-bottom: 2px solid #888; text-align: left; }
td { white-space: nowrap; max-width: 60em; } td:last-child { white-space: normal; }
img { max-width: 100%; } code { font-size: .92em; background: #f3f3f3; padding: .1em .3em; }
blockquote { margin: 1em 0; padding: .4em 1em; border-left: 5px solid #999; background: #f6f6f6; }
blockquote.problem { border-color: #d55e00; background: #fdf3ec; }
blockquote.matched { border-color: #0072b2; background: #eef6fb; }
p.note { color: #555; font-size: .87em; }
"""


def write(methods: list[Method], fairness: Fairness, question: Question, command: str, share: float, out: Path) -> Path:
    """Write report.md, report.html and the plots into the folder `out`, and return the path of report.md.

    `share`: of a run, that the curves are smoothed over. ConfigError if the folder cannot be written.
    """
    with writing("out", out, "; choose another with out="):
        out.mkdir(parents=True, exist_ok=True)
        plots.curves(methods, share, out / "loss.png", time=question.time)
        plots.curves(methods, share, out / "perplexity.png", time=question.time, perplexity=True)
        plots.gradient_norms(methods, out / "gradient_norm.png")
        front = plots.loss_against_cache(methods, question, out / "pareto.png")
        text = markdown(methods, fairness, question, command, front)
        write_atomic(out / "report.md", text)
        write_atomic(out / "report.html", page(text, out))
    return out / "report.md"


def markdown(methods: list[Method], fairness: Fairness, question: Question, command: str, front: list[str]) -> str:
    """Return the whole report, which shows the plots from its own folder; `front`: the methods on the Pareto front."""
    words, reasons = verdict(fairness, methods)
    runs = sum(len(method.runs) for method in methods)
    blocks = [
        f"# {', '.join(method.name for method in methods)}",
        "\n".join([f"> **{words}**", *([">"] if reasons else []), *(f"> - {reason}" for reason in reasons)]),
        f"Methods: {len(methods)}, runs: {runs}, {date.today().isoformat()}: `{command}`",
        "## Results",
        str(tables.final(methods, question)),
    ]
    if not fairness.same_tokens:
        blocks.append(
            "The runs' tokens differ, so losses and perplexities of different rows are of different things. "
            + (
                "The text is the same, so bits per byte can be compared."
                if fairness.same_text
                else "So is their text, as far as is known: no number here can be compared between rows."
            )
        )
    blocks += ["![loss against tokens and FLOPs](loss.png)", times(methods, question)]
    if question.target is not None and question.comparable:
        blocks += ["## What it takes to get there", str(tables.reach(methods, question))]
    blocks += ["## Cost", str(tables.cost(methods)), "![loss against cache](pareto.png)"]
    if front:
        blocks.append(f"No method has both less cache and less {question.label} than: {', '.join(front)}.")
    evaluated = evaluations(methods, question.confidence)
    for heading, found in evaluated.items():
        blocks += [f"## {heading}", str(found)]
    if not evaluated:
        blocks += ["## Benchmarks", "None yet: `python -m eval.run run=RUN suite=paper_zeroshot` adds them."]
    blocks += ["## Health", str(tables.health(methods)), "![gradient norms](gradient_norm.png)"]
    if len(methods) > 1:
        rows = [list(check) for check in fairness.checks]
        blocks += ["## Is it fair?", str(Table(["what", "", "values"], rows))]
        blocks += ["### Configuration: what differs", str(tables.differences(fairness.differing, methods))]
    blocks += ["## Perplexity", "![perplexity against tokens and FLOPs](perplexity.png)"]
    return "\n\n".join(blocks) + "\n"


def times(methods: list[Method], question: Question) -> str:
    """Return what the reader must know about training times."""
    if not question.time:
        return "*Training times are left out: they compare methods only if nothing else ran. `time=true` adds them.*"
    uneven = [run.dir.name for method in methods for run in method.runs if not run.is_steady]
    if not uneven:
        return "*Every run trained at a steady speed.*"
    return f"**Do not trust the times: no steady speed in {', '.join(uneven)}. Something else may have been running.**"


def page(text: str, folder: Path) -> str:
    """Return the Markdown as an HTML page that has the pictures of `folder` inside."""
    body = MarkdownIt("commonmark").enable("table").render(text)
    if "<strong>Not a fair" in body:
        body = body.replace("<blockquote>", '<blockquote class="problem">', 1)
    elif "<strong>Matched in" in body:
        body = body.replace("<blockquote>", '<blockquote class="matched">', 1)
    body = re.sub(r"<p><em>(.*?)</em></p>", r'<p class="note">\1</p>', body)
    body = body.replace("<table>", '<div class="wide">\n<table>').replace("</table>", "</table>\n</div>")

    def embed(match: re.Match) -> str:
        return f'src="data:image/png;base64,{base64.b64encode((folder / match[1]).read_bytes()).decode()}"'

    body = re.sub(r'src="([^"]+\.png)"', embed, body)
    title = html.escape(text.splitlines()[0].removeprefix("# "))
    return (
        f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n<title>{title}</title>\n'
        f"<style>{STYLE}</style>\n</head>\n<body>\n{body}</body>\n</html>\n"
    )
