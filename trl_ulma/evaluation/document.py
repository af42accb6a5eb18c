"""The parts of a report, and their output as Markdown, as text for a terminal, and as one self-contained HTML file."""

import base64
import html
import re
import textwrap
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

_STYLE = """\
:root { color-scheme: light dark; --ink: #1b1b1b; --paper: #ffffff; --line: #d0d0d0; --soft: #f3f3f3 }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e6e6; --paper: #16181c; --line: #43474f; --soft: #22252b } }
body { color: var(--ink); background: var(--paper); font: 16px/1.5 system-ui, sans-serif; max-width: 62rem;
  margin: 2rem auto; padding: 0 1rem }
table { border-collapse: collapse; display: block; overflow-x: auto; margin: 1rem 0;
  font-variant-numeric: tabular-nums }
th, td { border: 1px solid var(--line); padding: .3rem .6rem; text-align: right; vertical-align: top }
th:first-child, td:first-child, .text th, .text td { text-align: left } th { background: var(--soft) }
.text td:not(:first-child), p, li, code, figcaption { overflow-wrap: anywhere }
figure { margin: 1rem 0 2rem } picture { display: block } figcaption { max-width: 40rem }
img { max-width: 100%; height: auto }
p.title { font-weight: 600; margin-bottom: .2rem }
blockquote { border-left: 3px solid var(--line); margin: .2rem 0 1rem; padding: .1rem 1rem; white-space: pre-wrap;
  overflow-wrap: anywhere }
strong.verdict { display: block; background: var(--soft); padding: .8rem 1rem; border-left: 4px solid #0072b2 }
pre { background: var(--soft); padding: .8rem 1rem; overflow-x: auto }
details { border-top: 1px solid var(--line); padding: .5rem 0 } summary { cursor: pointer; font-weight: 600 }
@media print { details:not([open])::details-content { content-visibility: visible; block-size: auto } }
@media (max-width: 40rem) {
  body { margin: 1rem auto } h1 { font-size: 1.6rem } h2 { font-size: 1.25rem }
  .wide tr:first-child { display: none } .wide, .wide tbody, .wide tr, .wide td { display: block; border: 0 }
  .wide tr { border: 1px solid var(--line); margin-bottom: .8rem; padding: .3rem 0 }
  .wide td { padding: .1rem .6rem; text-align: left; overflow-wrap: anywhere }
  .wide td::before { content: attr(data-label) ": "; font-weight: 600 }
}"""
# With more columns, a narrow page shows the cells of a row below each other
_MANY_COLUMNS = 4


@dataclass(frozen=True)
class Heading:
    """A heading. Level 1 is the title of the document."""

    text: str
    level: int = 2


@dataclass(frozen=True)
class Text:
    """A paragraph. A strong one is a conclusion."""

    text: str
    strong: bool = False


@dataclass(frozen=True)
class Bullets:
    """A list."""

    items: Sequence[str]


@dataclass(frozen=True)
class Table:
    """A table. The first column is text. The others are numbers, or text if `is_text`."""

    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    is_text: bool = False


@dataclass(frozen=True)
class Quote:
    """A quotation with a title."""

    title: str
    text: str


@dataclass(frozen=True)
class Picture:
    """A picture. The folder of the report has `name`.svg and `name`-dark.svg, and the same as .png.

    Attributes:
        name: see above.
        caption: one sentence below it on what to look at; "" for none.
        alternative: what it shows, in words and numbers, for readers who do not see it; `name` if it is "".
    """

    name: str
    caption: str = ""
    alternative: str = ""


@dataclass(frozen=True)
class Code:
    """Lines that are shown as they are, such as a command."""

    text: str


@dataclass(frozen=True)
class Details:
    """A section that is closed until a reader clicks on its title. It is open in print, and in a terminal."""

    title: str
    parts: Sequence["Part"]


Part = Heading | Text | Bullets | Table | Quote | Picture | Code | Details


def to_markdown(parts: Iterable[Part]) -> str:
    """The document as GitHub Markdown. Texts are escaped, so that they are shown as they are.

    Example:
        >>> print(to_markdown([Heading("A < B", 1), Bullets(["x", "y"]), Quote("The answer", "# No")]), end="")
        # A &lt; B
        <BLANKLINE>
        - x
        - y
        <BLANKLINE>
        The answer:
        <BLANKLINE>
        > \\# No
    """
    return "\n\n".join(map(_markdown, parts)) + "\n"


def to_html(parts: Sequence[Part], folder: Path) -> str:
    """The document as HTML, with its pictures. It is light or dark like the reader's system.

    Args:
        parts: the parts of the document.
        folder: the folder with the pictures.

    Example:
        >>> print(to_html([Text("<b>")], Path()).splitlines()[-3])
        <p>&lt;b&gt;</p>
    """
    title = next((part.text for part in parts if isinstance(part, Heading)), "Report")
    body = "\n".join(_html(part, folder) for part in parts)
    return (
        f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n<title>{html.escape(title)}</title>\n'
        f'<meta name="viewport" content="width=device-width">\n<style>\n{_STYLE}\n</style>\n</head>\n<body>\n'
        f"{body}\n</body>\n</html>\n"
    )


def to_text(parts: Iterable[Part], width: int = 80) -> str:
    """Return the document as text for a terminal.

    Pictures are left out. A table that is too wide becomes a block of lines per row.

    Example:
        >>> print(to_text([Heading("Perplexity"), Table(["model", "answers"], [["out", "47.63"]])]), end="")
        Perplexity
        ──────────
        model  answers
        out      47.63
        >>> print(to_text([Table(["row", "answer"], [["1", "a long answer"]], is_text=True)], 12), end="")
        row 1
          answer
            a long
            answer
    """
    return _joined(parts, width) + "\n"


def _joined(parts: Iterable[Part], width: int) -> str:
    shown = (_as_text(part, width) for part in parts if not isinstance(part, Picture))
    return re.sub(r"─\n\n", "─\n", "\n\n".join(shown))


def _as_text(part: Part, width: int) -> str:
    if isinstance(part, Details):
        return _joined([Heading(part.title), *part.parts], width)
    if isinstance(part, Code):
        return textwrap.indent(part.text, "  ")
    if isinstance(part, Heading):
        return f"{_filled(part.text, width)}\n{'─' * min(_columns(part.text), width)}" if part.level < 3 else part.text
    if isinstance(part, Text):
        return _filled(part.text, width)
    if isinstance(part, Bullets):
        return "\n".join(_filled(item, width, "- ", "  ") for item in part.items)
    if isinstance(part, Quote):
        lines = [_filled(line, width, "  ", "  ") for line in part.text.splitlines() or [""]]
        return "\n".join([f"{part.title}:", *lines])
    if isinstance(part, Picture):
        return ""
    lines = [[_printable(cell) for cell in row] for row in (part.header, *part.rows)]
    widths = [max(map(_columns, column)) for column in zip(*lines, strict=True)]
    if sum(widths) + 2 * (len(widths) - 1) <= width:
        is_left = [True, *[part.is_text] * (len(widths) - 1)]
        return "\n".join(_row(line, widths, is_left) for line in lines)
    return "\n".join(_block(lines[0], line, width) for line in lines[1:])


def _row(cells: Sequence[str], widths: Sequence[int], is_left: Sequence[bool]) -> str:
    padded = [
        cell + " " * (most - _columns(cell)) if left else " " * (most - _columns(cell)) + cell
        for cell, most, left in zip(cells, widths, is_left, strict=True)
    ]
    return "  ".join(padded).rstrip()


def _block(header: Sequence[str], cells: Sequence[str], width: int) -> str:
    """The cells of a row below one another, each with the name of its column. A long cell is below the name."""
    lines = [_filled(f"{header[0]} {cells[0]}".strip(), width)]
    for name, cell in zip(header[1:], cells[1:], strict=True):
        line = f"  {name}: {cell}"
        fits = _columns(line) <= width
        lines += [line] if fits else [_filled(name, width, "  ", "  "), _filled(cell, width, "    ", "    ")]
    return "\n".join(lines)


def _filled(text: str, width: int, first: str = "", other: str = "") -> str:
    return textwrap.fill(
        _printable(text),
        width,
        initial_indent=first,
        subsequent_indent=other,
        break_on_hyphens=False,
    )


def _printable(text: str) -> str:
    """Return text in one line, without characters that control a terminal."""
    return "".join(letter if letter.isprintable() else " " for letter in text)


def _columns(text: str) -> int:
    """Return how many columns of a terminal a text takes."""
    return sum(
        0 if unicodedata.combining(letter) else 1 + (unicodedata.east_asian_width(letter) in "WF") for letter in text
    )


def table(header: Sequence[str], rows: Iterable[Sequence[str]], *, is_text: bool = False) -> str:
    r"""A Markdown table. The first column is text. The others are numbers, or text if `is_text`.

    Example:
        >>> print(table(["model", "AUC"], [["a|b", "0.9"]]))
        | model | AUC |
        | :-- | --: |
        | a\|b | 0.9 |
    """
    rule = [":--", *[":--" if is_text else "--:"] * (len(header) - 1)]
    cells = [[" ".join(cell.replace("|", "\\|").splitlines()) for cell in row] for row in (header, *rows)]
    return "\n".join("| " + " | ".join(row) + " |" for row in (cells[0], rule, *cells[1:]))


def _markdown(part: Part) -> str:
    if isinstance(part, Heading):
        return f"{'#' * part.level} {_plain(part.text)}"
    if isinstance(part, Text):
        return f"**{_plain(part.text)}**" if part.strong else _plain(part.text)
    if isinstance(part, Bullets):
        return "\n".join(f"- {_plain(item)}" for item in part.items)
    if isinstance(part, Table):
        return table(
            [_plain(cell) for cell in part.header],
            [[(_literal if part.is_text else _plain)(cell) for cell in row] for row in part.rows],
            is_text=part.is_text,
        )
    if isinstance(part, Code):
        return f"```bash\n{part.text}\n```"
    if isinstance(part, Details):
        parts = "\n\n".join(map(_markdown, part.parts))
        return f"<details>\n<summary>{_plain(part.title)}</summary>\n\n{parts}\n\n</details>"
    if isinstance(part, Quote):
        lines = [_quoted(line) for line in part.text.splitlines() or [""]]
        return f"{_plain(part.title)}:\n\n" + "\n".join(f"> {line}".rstrip() for line in lines)
    picture = (
        f'<picture>\n<source media="(prefers-color-scheme: dark)" srcset="{part.name}-dark.png">\n'
        f'<img alt="{_alternative(part)}" src="{part.name}.png">\n</picture>'
    )
    return f"{picture}\n\n{_plain(part.caption)}" if part.caption else picture


def _plain(text: str) -> str:
    """Escape HTML in Markdown. Code between backticks does not change."""
    pieces = re.split(r"(`[^`\n]*`)", text)
    return "".join(
        piece if i % 2 else piece.replace("&", "&amp;").replace("<", "&lt;") for i, piece in enumerate(pieces)
    )


def _literal(text: str) -> str:
    """Escape a quotation, so that Markdown shows it as it is."""
    return re.sub(r"([\\`*_\[\]~])", r"\\\1", text.replace("&", "&amp;").replace("<", "&lt;"))


def _quoted(line: str) -> str:
    """Escape the beginning of a quoted line, so that it is no heading, list or quote."""
    line = re.sub(r"^(\s*)([#>+-])", r"\1\\\2", _literal(line))
    return re.sub(r"^(\s*\d+)([.)])", r"\1\\\2", line)


def _html(part: Part, folder: Path) -> str:
    if isinstance(part, Heading):
        return f"<h{part.level}>{_inline(part.text)}</h{part.level}>"
    if isinstance(part, Text):
        text = _inline(part.text)
        return f'<p><strong class="verdict">{text}</strong></p>' if part.strong else f"<p>{text}</p>"
    if isinstance(part, Bullets):
        return "<ul>\n" + "\n".join(f"<li>{_inline(item)}</li>" for item in part.items) + "\n</ul>"
    if isinstance(part, Table):
        head = "".join(f"<th>{_inline(cell)}</th>" for cell in part.header)
        rows = ("".join(_cell(*each, part.is_text) for each in zip(part.header, row, strict=True)) for row in part.rows)
        kinds = ["text"] * part.is_text + ["wide"] * (part.is_text or len(part.header) >= _MANY_COLUMNS)
        kind = f' class="{" ".join(kinds)}"' if kinds else ""
        return f"<table{kind}>\n<tr>{head}</tr>\n" + "\n".join(f"<tr>{row}</tr>" for row in rows) + "\n</table>"
    if isinstance(part, Code):
        return f"<pre><code>{html.escape(part.text, quote=False)}</code></pre>"
    if isinstance(part, Details):
        parts = "\n".join(_html(each, folder) for each in part.parts)
        return f"<details>\n<summary>{_inline(part.title)}</summary>\n{parts}\n</details>"
    if isinstance(part, Quote):
        return f'<p class="title">{_inline(part.title)}:</p>\n<blockquote>{html.escape(part.text)}</blockquote>'
    light, dark = (_embedded(folder / f"{part.name}{suffix}.svg") for suffix in ("", "-dark"))
    caption = f"\n<figcaption>{_inline(part.caption)}</figcaption>" if part.caption else ""
    return (
        f'<figure>\n<picture><source media="(prefers-color-scheme: dark)" srcset="{dark}">'
        f'<img alt="{_alternative(part)}" src="{light}"></picture>{caption}\n</figure>'
    )


def _alternative(part: Picture) -> str:
    """The text of a picture as the value of an attribute, in one line."""
    return html.escape(" ".join((part.alternative or part.name).split()))


def _cell(header: str, cell: str, is_text: bool) -> str:
    """A cell, with the name of its column for narrow pages. Intervals are not broken into two lines."""
    if not is_text:
        cell = re.sub(r"\[[^\]]*\]", lambda found: found[0].replace(" ", "\xa0"), cell)
    return f'<td data-label="{html.escape(header)}">{html.escape(cell, quote=False) if is_text else _inline(cell)}</td>'


def _inline(text: str) -> str:
    return re.sub(r"`([^`\n]*)`", r"<code>\1</code>", html.escape(text, quote=False))


def _embedded(file: Path) -> str:
    return "data:image/svg+xml;base64," + base64.b64encode(file.read_bytes()).decode("ascii")
