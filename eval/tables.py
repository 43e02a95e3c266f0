"""Tables of text that read well as Markdown and in a terminal."""

import re
from dataclasses import dataclass, field

WIDEST = 40  # characters to which the cells of a column are padded


@dataclass
class Table:
    columns: list[str]
    rows: list[list[str]]
    notes: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        """Return a Markdown table that is aligned as plain text too, and the notes."""
        columns = []
        for number, cells in enumerate(zip(self.columns, *self.rows, strict=True)):
            cells = [" ".join(cell.split()).replace("|", "\\|") for cell in cells]
            is_text = (
                number == 0 or cells[0] == "values" or not any(re.match(r"[-+]?\d|-$", cell) for cell in cells[1:])
            )
            width = min(WIDEST, max(3, *map(len, cells)))
            padded = [cell.ljust(width) if is_text else cell.rjust(width) for cell in cells]
            columns.append([padded[0], "-" * (width - 1) + ("-" if is_text else ":"), *padded[1:]])
        lines = [f"| {' | '.join(row)} |" for row in zip(*columns, strict=True)]
        return "\n\n".join(["\n".join(lines), *(f"*{note}*" for note in self.notes)])
