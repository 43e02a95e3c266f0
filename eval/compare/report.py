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
from eval.compare.collect import Method, all_runs
from eval.compare.fairness import Fairness, Verdict
from eval.compare.tables import Question
from eval.tables import Table

PLOTS = ("loss.png", "pareto.png")
STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #1a1a1a; max-width: 1180px; margin: 2em auto; padding: 0 1.2em; }
h1 { font-size: 1.6em; } h2 { font-size: 1.2em; margin-top: 2em; border-bottom: 1px solid #ddd; padding-bottom: .2em; }
table { display: block; overflow-x: auto; border-collapse: collapse; font-size: .87em; }
th, td { padding: .3em .7em; border-bottom: 1px solid #e4e4e4; vertical-align: top; }
th { border-bottom: 2px solid #888; text-align: left; } td { white-space: nowrap; max-width: 60em; }
td:last-child { white-space: normal; } img { max-width: 100%; } em { color: #555; font-size: .87em; }
blockquote { margin: 1em 0; padding: .4em 1em; border-left: 5px solid #d55e00; background: #fdf3ec; }
"""


def write(
    methods: list[Method], verdict: Verdict, fairness: Fairness, question: Question, command: str, out: Path
) -> Path:
    """Write report.md, report.html and the plots into the folder `out`, and return the path of report.md.

    ConfigError if the folder cannot be written.
    """
    with writing("out", out, "; choose another with out="):
        out.mkdir(parents=True, exist_ok=True)
        plots.curves(methods, out / "loss.png")
        front = plots.loss_against_cache(methods, question, out / "pareto.png")
        text = markdown(methods, verdict, fairness, question, command, front)
        write_atomic(out / "report.md", text)
        write_atomic(out / "report.html", page(text, out))
    return out / "report.md"


def markdown(
    methods: list[Method], verdict: Verdict, fairness: Fairness, question: Question, command: str,
    front: list[str],
) -> str:  # fmt: skip
    """Return the whole report, which shows the plots from its own folder; `front`: the methods on the Pareto front."""
    words, reasons = verdict
    blocks = [
        f"# {', '.join(method.name for method in methods)}",
        "\n".join([f"> **{words}**", *([">"] if reasons else []), *(f"> - {reason}" for reason in reasons)]),
        f"Methods: {len(methods)}, runs: {len(all_runs(methods))}, {date.today().isoformat()}: `{command}`",
        "## Results",
        str(tables.final(methods, question)),
    ]
    if not fairness.same_tokens:
        text = (
            "The text is the same, so bits per byte can be compared."
            if fairness.same_text
            else "So is their text, as far as is known: no number here can be compared between rows."
        )
        blocks.append(
            f"The runs' tokens differ, so losses and perplexities of different rows are of different things. {text}"
        )
    blocks.append("![loss and perplexity against tokens and FLOPs](loss.png)")
    if question.target is not None and question.comparable:
        blocks += ["## What it takes to get there", str(tables.reach(methods, question))]
    blocks += ["## Cost", str(tables.cost(methods)), "![loss against cache](pareto.png)"]
    if front:
        blocks.append(f"No method has both less cache and less {question.label} than: {', '.join(front)}.")
    none_yet = {"Benchmarks": "None yet: `python -m eval.run run=RUN suite=paper_zeroshot` adds them."}
    for heading, found in (evaluations(methods, question.confidence) or none_yet).items():
        blocks += [f"## {heading}", str(found)]
    blocks += ["## Health", str(tables.health(methods))]
    if len(methods) > 1:
        rows = [list(check) for check in fairness.checks]
        blocks += ["## Is it fair?", str(Table(["what", "", "values"], rows))]
        blocks += ["### Configuration: what differs", str(tables.differences(methods))]
    return "\n\n".join(blocks) + "\n"


def page(text: str, folder: Path) -> str:
    """Return the Markdown as an HTML page with the report's own plots inside, and whatever else it names as text."""

    def embed(match: re.Match) -> str:
        is_own = match[1] in PLOTS and (folder / match[1]).is_file()
        content = base64.b64encode((folder / match[1]).read_bytes()).decode() if is_own else ""
        return f'src="data:image/png;base64,{content}"'

    renderer = MarkdownIt("commonmark", {"html": False}).enable("table")
    body = re.sub(r'src="([^"]*)"', embed, renderer.render(text))
    title = html.escape(text.splitlines()[0].removeprefix("# "))
    return (
        f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n<title>{title}</title>\n'
        f"<style>{STYLE}</style>\n</head>\n<body>\n{body}</body>\n</html>\n"
    )
