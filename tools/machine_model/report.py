"""A report in one HTML file: nothing is loaded from elsewhere."""

import base64
import html
from dataclasses import dataclass, field
from pathlib import Path

from machine_model.tables import Table

_STYLE = """
:root { color-scheme: light dark }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 72rem; margin: 2rem auto; padding: 0 1rem }
table { border-collapse: collapse; margin: .5rem 0 1.5rem; display: block; overflow-x: auto }
th, td { padding: .25rem .7rem; border-bottom: 1px solid #8884; text-align: right; white-space: nowrap }
th:first-child, td:first-child { text-align: left }
td.words, th.words { text-align: left; white-space: normal; min-width: 14rem }
img { max-width: 100%; background: white; border-radius: 4px }
h1 { font-size: 1.5rem } h2 { font-size: 1.15rem; margin-top: 2rem }
"""
_WORDS = {"source", "note", "bottleneck", "figure"}  # columns that are read, not compared


@dataclass
class Report:
    """title, then sections in the order in which they were added."""

    title: str
    _parts: list[str] = field(default_factory=list)

    def words(self, text: str) -> None:
        self._parts.append(f"<p>{html.escape(text)}</p>")

    def table(self, title: str, table: Table) -> None:
        columns, rows = table
        kinds = [' class="words"' if name in _WORDS else "" for name in columns]
        head = "".join(f"<th{kind}>{html.escape(name)}</th>" for name, kind in zip(columns, kinds, strict=True))
        body = "".join(
            "<tr>"
            + "".join(f"<td{k}>{html.escape(c)}</td>" for c, k in zip(row, kinds, strict=True))
            + "</tr>\n"
            for row in rows
        )
        self._parts.append(f"<h2>{html.escape(title)}</h2><table><tr>{head}</tr>\n{body}</table>")

    def picture(self, title: str, png: Path) -> None:
        data = base64.b64encode(png.read_bytes()).decode()
        self._parts.append(
            f'<h2>{html.escape(title)}</h2><img alt="{html.escape(title)}" src="data:image/png;base64,{data}">'
        )

    def write(self, path: Path) -> None:
        title = html.escape(self.title)
        path.write_text(
            '<!doctype html><html lang="en"><meta charset="utf-8">'
            '<meta name="viewport" content="width=device-width, initial-scale=1">'
            f"<title>{title}</title><style>{_STYLE}</style><h1>{title}</h1>\n"
            + "\n".join(self._parts)
            + "</html>\n"
        )
