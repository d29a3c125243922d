"""How do all conditions look beside each other, on one machine or on several?

The same lines as a table of a page, whose squares carry their numbers and can be sorted, and as an
SVG file for pages without scripts. Both keep a letter and a mark in each square, so that nothing
depends on telling colours apart.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from html import escape
from itertools import groupby

from dlhelpers.course.claims.claim import Claim, Tip
from dlhelpers.course.report.squares import LETTERS, STEPS, Line, Square

__all__ = ["SCRIPT", "STYLE", "picture_svg", "picture_table"]

_PALE, _DEEP = "#111111", "#ffffff"  # ink
_TONES = {
    "h0": ("#dbeaf6", _PALE), "h1": ("#9cc8e8", _PALE), "h2": ("#2476b0", _DEEP),
    "h3": ("#0b3d63", _DEEP), "hc": ("#bccbd6", _PALE),
    "f0": ("#fce6d6", _PALE), "f1": ("#f4b183", _PALE), "f2": ("#b8530f", _DEEP),
    "f3": ("#6e2c00", _DEEP), "fc": ("#dcc7b4", _PALE),
    "u": ("#d5d5d5", _PALE),
}  # fmt: skip
_TONE_STYLE = "".join(
    f".{tone} {{ background: {colour}; fill: {colour}; color: {ink}; }}"
    for tone, (colour, ink) in _TONES.items()
)
STYLE = f"""
#picture td.sq {{ text-align: center; padding: 1px 4px; white-space: nowrap; position: relative;
  border: 1px solid var(--page); min-width: 4rem; max-width: 7rem;
  font-size: 0.85em; }}
#picture th[scope=row], #picture td.says {{ padding: 1px 0.8rem 1px 0; font-weight: normal;
  max-width: 17rem; overflow: hidden; text-overflow: ellipsis; white-space: nowrap; }}
#picture th {{ vertical-align: middle; }} #picture tr {{ border: none; }}
#picture tr.tip th {{ padding-top: 0.6rem; font-weight: 600; }}
#picture:not(.flat) tr.again td.says {{ color: transparent; }}
#picture a:not(:hover) {{ text-decoration: none; }} #picture thead th {{ text-align: center; }}
#picture .n, #picture .x, .legend .n {{ outline: 1px dashed; outline-offset: -3px; }}
#picture .seen {{ display: block; overflow: hidden; text-overflow: ellipsis; }}
.against {{ box-shadow: inset 0 0 0 3px var(--jp-ui-font-color1); font-weight: 700; }}
.more {{ position: absolute; width: 1px; height: 1px; overflow: hidden; clip-path: inset(50%); }}
td:hover > .more {{ width: max-content; max-width: 26rem; height: auto; clip-path: none;
  z-index: 2; right: 0; top: 100%; padding: 0.3rem 0.6rem; white-space: normal; text-align: left;
  background: var(--jp-layout-color2); color: var(--jp-ui-font-color1);
  border: 1px solid var(--jp-border-color1); font-weight: normal; }}
.legend span {{ display: inline-block; padding: 0 0.5rem; margin-right: 2px; }}
{_TONE_STYLE}
"""
SCRIPT = """
{
  const table = document.getElementById('picture'), body = table.tBodies[0];
  const every = [...body.rows], lines = every.filter(row => row.className !== 'tip');
  const sort = document.getElementById('sort');
  const number = (row, key) => row.dataset[key] === '' ? -1e9 : Number(row.dataset[key]);
  sort.addEventListener('change', () => {
    const key = sort.value, grouped = key === 'tip';
    const order = key === 'notebook' ? (a, b) => number(a, key) - number(b, key)
      : (a, b) => number(b, key) - number(a, key);
    table.classList.toggle('flat', !grouped);
    for (const row of every) if (row.className === 'tip') row.hidden = !grouped;
    body.append(...(grouped ? every : [...lines].sort(order)));
  });
}
"""
_SVG_STYLE = (
    "text { font: 10px system-ui, sans-serif; fill: #1f2328; } .page { fill: #ffffff; }"
    ".tip { font-weight: 700; font-size: 11px; } .sq { text-anchor: middle; pointer-events: none; }"
    ".n, .x { fill: transparent; stroke: #8a8f98; stroke-dasharray: 2 2; }"
    ".mark { fill: none; stroke: #1f2328; stroke-width: 2; }"
    "@media (prefers-color-scheme: dark) { text { fill: #e4e7eb; } .page { fill: #15181c; }"
    ".mark { stroke: #ffffff; } }"
    f".pale {{ fill: {_PALE}; }} .deep {{ fill: {_DEEP}; }}"
)
_WIDTH, _ROW, _TIP, _SQUARE, _GAP, _TOP = 500, 14, 24, 22, 24, 60


def picture_table(
    lines: Sequence[Line],
    tips: Sequence[Tip],
    machines: Sequence[str],
    link: Callable[[Claim, str], str],
) -> str:
    """Return the picture as a table that can be sorted, with its legend.

    Args:
        lines: of :func:`dlhelpers.course.report.squares.lines_of`.
        tips: which group the lines, in this order.
        machines: heads of the columns.
        link: a claim and a text -> the text as HTML that leads to where the claim is settled.
    """
    notebooks = sorted({line.claim.notebook for line in lines})
    heads = "".join(f"<th scope='col'>{escape(name)}</th>" for name in machines)
    body = []
    for says, group in _by_tip(lines, tips):
        body.append(
            f"<tr class='tip'><th colspan='{2 + len(machines)}' scope='rowgroup'>{escape(says)}"
            "</th></tr>"
        )
        for claim, own in groupby(group, key=lambda line: line.claim):
            for number, line in enumerate(own):
                body.append(_row(line, claim, number, notebooks.index(claim.notebook), link))
    sorts = {"tip": "tip", "notebook": "notebook", "effect": "effect"}
    sorts |= {"gap": "disagreement between machines"} if len(machines) > 1 else {}
    options = "".join(f"<option value='{key}'>{said}</option>" for key, said in sorts.items())
    return (
        f"<p><label>sort by <select id='sort'>{options}</select></label></p>{_legend()}"
        f"<div class='wide'><table id='picture'><thead><tr><th scope='col'>Claim</th>"
        f"<th scope='col'>Condition</th>{heads}</tr></thead><tbody>{''.join(body)}</tbody></table>"
        "</div>"
    )


def picture_svg(
    lines: Sequence[Line], tips: Sequence[Tip], machines: Sequence[str], folder: str
) -> str:
    """Return the picture as an SVG file in two columns; squares tell more where one points.

    Args:
        lines, tips, machines: as of :func:`picture_table`.
        folder: of the notebooks, as seen from the file.
    """
    groups = _by_tip(lines, tips)
    heights = [_TIP + _ROW * len(group) for _, group in groups]
    columns: list[list[tuple[str, list[Line]]]] = [[], []]
    filled = [0, 0]
    for height, group in zip(heights, groups, strict=True):
        side = int(filled[0] + height / 2 > sum(heights) / 2 or bool(columns[1]))
        columns[side].append(group)
        filled[side] += height
    height, width = _TOP + max(filled) + 10, 2 * _WIDTH + _GAP + 20
    parts = [
        f"<rect class='page' x='-10' width='{width}' height='{height}'/>",
        _svg_legend("holds", 4),
        _svg_legend("fails", 22),
        *(
            _column(column, n * (_WIDTH + _GAP), machines, folder)
            for n, column in enumerate(columns)
        ),
    ]
    tones = "".join(f".{tone} {{ fill: {colour}; }}" for tone, (colour, _) in _TONES.items())
    return (
        f"<svg xmlns='http://www.w3.org/2000/svg' viewBox='-10 0 {width} {height}' "
        f"width='{width}' height='{height}' role='img'><title>How each condition of each tip came "
        f"out on {len(machines)} machines</title><style>{_SVG_STYLE}{tones}</style>\n"
        + "\n".join(parts)
        + "\n</svg>\n"
    )


def _by_tip(lines: Sequence[Line], tips: Sequence[Tip]) -> list[tuple[str, list[Line]]]:
    """Group lines by tip in the tips' order; a tip that is not known keeps its id."""
    said = {tip.id: tip.says for tip in tips}
    groups: dict[str, list[Line]] = {tip.id: [] for tip in tips}
    for line in lines:
        groups.setdefault(line.claim.tip, []).append(line)
    return [(said.get(id, id), group) for id, group in groups.items() if group]


def _row(
    line: Line, claim: Claim, number: int, notebook: int, link: Callable[[Claim, str], str]
) -> str:
    distances = [s.distance for s in line.squares if s.distance is not None]
    effect = f"{sum(distances) / len(distances):.4f}" if distances else ""
    apart = "" if line.gap is None else f"{(line.gap.factor or 1.0) + 100 * line.turned:.4f}"
    return (
        f"<tr class='line{' again' * (number > 0)}' data-notebook='{notebook}' "
        f"data-effect='{effect}' data-gap='{apart}'><td class='says' title='{escape(claim.says)}'>"
        f"{escape(claim.says)}</td><th scope='row'>{link(claim, line.name)}</th>"
        + "".join(map(_cell, line.squares))
        + "</tr>"
    )


def _cell(square: Square) -> str:
    mark = " !" if square.against else ""
    return (
        f"<td class='sq {square.tone}{' against' * square.against}'>"
        f"<span class='seen' aria-hidden='true'><b>{square.letter}{mark}</b> "
        f"{escape(square.found)}</span>"
        f"<span class='more'>{escape(square.said)}</span></td>"
    )


def _legend() -> str:
    steps = [f"up to {STEPS[0]:g}x", *(f"{step:g}x or more" for step in STEPS)]
    beyond = "".join(f"<span class='h{n}'>{said}</span>" for n, said in enumerate(steps))
    short = "".join(f"<span class='f{n}'>{said}</span>" for n, said in enumerate(steps))
    return (
        f"<p class='legend'><b>H</b> holds, beyond its threshold by {beyond}<br>"
        f"<b>F</b> fails, short of it by {short}<br><span class='hc'>H</span>"
        "<span class='fc'>F</span> counted, or a difference: no distance · "
        "<span class='u'>?</span> unsettled · <span class='n'>–</span> not measured · "
        "<span class='against'>!</span> against the mechanism</p>"
    )


def _svg_legend(verdict: str, y: int) -> str:
    """Draw what the colours of a verdict mean, with the other marks behind those of the first."""
    key = verdict[0]
    steps = [f"by up to {STEPS[0]:g}x", *(f"{step:g}x" for step in STEPS), "counted"]
    others = [("u", "unsettled"), ("n", "not measured"), ("x", "not run")]
    names = [(f"{key}{n}", said) for n, said in zip((0, 1, 2, 3, "c"), steps, strict=True)]
    drawn = [*names, *others] if key == "h" else names
    letters = {tone: LETTERS[verdict] for tone, _ in names} | {"u": "?", "n": "–"}
    beyond = "beyond" if key == "h" else "short of"
    parts = [
        f"<text x='0' y='{y + 10}'>{letters[f'{key}0']} {verdict}, {beyond} its threshold</text>"
    ]
    for n, (tone, said) in enumerate(drawn):
        square = Square(letters.get(tone, ""), tone, None, False, "", said)
        parts.append(
            f"<g transform='translate({150 + 105 * n},{y})'>{_drawn(square, 0)}"
            f"<text x='26' y='10'>{said}</text></g>"
        )
    if key == "f":
        against = Square("H", "h1", None, True, "", "against the mechanism")
        parts.append(
            f"<g transform='translate(675,{y})'>{_drawn(against, 0)}"
            f"<text x='26' y='10'>against the mechanism</text></g>"
        )
    return "".join(parts)


def _column(
    groups: Sequence[tuple[str, Sequence[Line]]], left: int, machines: Sequence[str], folder: str
) -> str:
    right = left + _WIDTH - _SQUARE * len(machines)
    room = int((right - left) / 5.1)
    parts = [
        f"<text class='sq' x='{right + (n + 0.5) * _SQUARE:g}' y='{_TOP}'>{escape(name)}</text>"
        for n, name in enumerate(machines)
    ]
    y = _TOP
    for says, group in groups:
        y += _TIP
        parts.append(f"<text class='tip' x='{left}' y='{y - 5}'>{escape(_cut(says, room))}</text>")
        for line in group:
            address = escape(f"{folder}/{line.claim.notebook}.ipynb")
            drawn = "".join(_drawn(s, n * _SQUARE) for n, s in enumerate(line.squares))
            parts.append(
                f"<a href='{address}'><text x='{left + 8}' y='{y + 10}'>"
                f"{escape(_cut(line.name, room))}<title>{escape(line.claim.says)}</title></text>"
                f"</a><g transform='translate({right},{y})'>{drawn}</g>"
            )
            y += _ROW
    return "\n".join(parts)


def _drawn(square: Square, x: int) -> str:
    box = f"M{x + 1} 1h{_SQUARE - 2}v{_ROW - 2}h-{_SQUARE - 2}z"
    ink = "deep" if _TONES.get(square.tone, ("", ""))[1] == _DEEP else "pale"
    ink = ink if square.tone in _TONES else ""
    mark = f"<path class='mark' d='{box}'/>" if square.against else ""
    letter = f"{square.letter}{'!' * square.against}"
    text = f"<text class='sq {ink}' x='{x + _SQUARE // 2}' y='10.5'>{letter}</text>"
    title = f"<title>{escape(square.said)}</title>"
    return f"<path class='{square.tone}' d='{box}'>{title}</path>{text if letter else ''}{mark}"


def _cut(text: str, room: int) -> str:
    text = " ".join(text.split())
    return text if len(text) <= room else f"{text[: room - 1]}…"
