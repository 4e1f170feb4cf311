"""The page around reports: one HTML file that needs no other, light or dark as its reader's device is, wide or narrow.

Promise: whatever text is put in through `text`, `table` and `data` is shown, and never run or taken for markup.
"""

from __future__ import annotations

import html
from collections.abc import Sequence
from typing import Any

import orjson

from lingua.report.figure import COLORS


def text(value: object) -> str:
    """Anything as text of a page."""
    return html.escape(str(value))


def table(heading: Sequence[str], rows: Sequence[Sequence[str]], numbers: Sequence[int] = ()) -> str:
    """A table of plain texts; the columns in `numbers` are aligned to the right."""

    def row(cells: Sequence[str], tag: str) -> str:
        kinds = [' class="number"' if i in numbers else "" for i in range(len(cells))]
        return "".join(f"<{tag}{kind}>{text(cell)}</{tag}>" for cell, kind in zip(cells, kinds, strict=True))

    body = "\n".join(f"<tr>{row(cells, 'td')}</tr>" for cells in rows)
    return f'<div class="scroll"><table>\n<tr>{row(heading, "th")}</tr>\n{body}\n</table></div>'


def folded(title: str, body: str, *, is_open: bool = False) -> str:
    """A part that is shown when its title is clicked. `body` is HTML."""
    return f"<details{' open' if is_open else ''}><summary>{text(title)}</summary>\n{body}\n</details>"


def data(value: Any) -> str:
    """A value as JSON for an attribute."""
    return html.escape(orjson.dumps(value).decode())


def page(title: str, body: str) -> str:
    """The whole file. `body` is HTML."""
    light, dark = ("".join(f"--{name}:{pair[i]};" for name, pair in COLORS.items()) for i in (0, 1))
    return _PAGE.format(
        title=text(title),
        body=body,
        style=f":root {{ color-scheme: light dark; {light} }}\n"
        f"@media (prefers-color-scheme: dark) {{ :root {{ {dark} }} }}\n{_STYLE}",
        script=f"<script>{_SCRIPT}</script>\n" if "data-readings" in body else "",
    )


_STYLE = """\
* { box-sizing: border-box }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper); max-width: 1240px;
  margin: 2em auto; padding: 0 1.5em; overflow-wrap: anywhere }
h1 { font-size: 1.45em; line-height: 1.3; margin: 0 0 .2em } h2 { font-size: 1.15em; margin: 2.2em 0 .6em }
h3 { font-size: 1em; margin: 1.4em 0 .4em }
code, pre { font: 13px ui-monospace, monospace } pre { white-space: pre-wrap; color: var(--soft); margin: 0 }
svg { display: block; width: 100%; height: auto } svg text { font-family: system-ui, sans-serif !important }
.scroll { overflow-x: auto } table { border-collapse: collapse; white-space: nowrap; font-size: .93em }
th, td { padding: .3em .9em .3em 0; text-align: left; vertical-align: top; border-bottom: 1px solid var(--grid) }
th { font-weight: 600; color: var(--soft) }
th.number, td.number { text-align: right; font-variant-numeric: tabular-nums }
.best td { font-weight: 700 } .bad { color: var(--bad) } .good { color: var(--good) }
i.dot { display: inline-block; width: .75em; height: .75em; border-radius: 50%; margin-right: .45em }
small, .note { color: var(--soft); font-weight: 400 } p { margin: .3em 0 .8em }
summary { cursor: pointer; color: var(--c0); padding: .3em 0 } details { margin: .4em 0 }
.cards { display: grid; grid-template-columns: repeat(auto-fill, minmax(150px, 1fr)); gap: .7em; margin: 1.2em 0 }
.cards div { border: 1px solid var(--grid); border-radius: 8px; padding: .55em .8em }
.cards b { display: block; font-size: 1.25em; line-height: 1.3; font-variant-numeric: tabular-nums }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 460px), 1fr)); gap: 1.6em 2em;
  margin-top: 1.2em }
figure { margin: 0; position: relative; min-width: 0 }
figcaption { margin-bottom: .3em } figcaption small { display: block }
.plot { position: relative } .wide { overflow-x: auto } .wide svg { min-width: 680px }
.plot hr { position: absolute; margin: 0; border: 0; border-left: 1px solid var(--soft); pointer-events: none }
.tip { position: absolute; top: 0; z-index: 2; pointer-events: none; white-space: nowrap; font-size: 12.5px;
  padding: .25em .6em; background: var(--paper); border: 1px solid var(--faint); border-radius: 6px }
@media (max-width: 640px) { body { padding: 0 .9em; margin-top: 1em } }
"""

# The values where the pointer is; without it the page shows the same pictures.
_SCRIPT = """
for (const plot of document.querySelectorAll('[data-readings]')) {
  const {box: [left, right, top, bottom], x: [lo, hi], percent, series} = JSON.parse(plot.dataset.readings);
  const tip = document.createElement('div'), rule = document.createElement('hr');
  const hide = hidden => { tip.hidden = rule.hidden = hidden };
  const told = y => percent ? (100 * y).toFixed(1) + '%' : String(+y.toPrecision(5));
  const nearest = (xs, x) => {
    const i = xs.findIndex(v => v >= x);
    return i < 0 ? xs.length - 1 : i > 0 && x - xs[i - 1] < xs[i] - x ? i - 1 : i;
  };
  tip.className = 'tip'; hide(true); plot.append(rule, tip);
  plot.addEventListener('pointerleave', () => hide(true));
  plot.addEventListener('pointermove', event => {
    const area = plot.getBoundingClientRect(), share = (event.clientX - area.left) / area.width;
    const x = lo + (share - left) / (right - left) * (hi - lo), slack = .03 * (hi - lo);
    const rows = [];
    let at = null;
    for (const s of series) {
      if (!s.x.length || x < s.x[0] - slack || x > s.x[s.x.length - 1] + slack) continue;
      const i = nearest(s.x, x), row = document.createElement('div'), dot = document.createElement('i');
      dot.className = 'dot'; dot.style.background = `var(--${s.color})`;
      row.append(dot, (series.length > 1 ? s.name + ' ' : '') + told(s.y[i]));
      rows.push(row); at = s.x[i];
    }
    hide(at === null);
    if (at === null) return;
    tip.replaceChildren(Number(at < 100 ? at.toPrecision(3) : at.toFixed()).toLocaleString('en'), ...rows);
    const place = left + (at - lo) / (hi - lo) * (right - left);
    rule.style.cssText = `left:${100 * place}%;top:${100 * top}%;height:${100 * (bottom - top)}%`;
    tip.style.cssText = share < .6 ? `left:${100 * place + 2}%` : `right:${100 * (1 - place) + 2}%`;
  });
}
"""

_PAGE = """\
<!DOCTYPE html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
{style}</style>
{body}
{script}</html>
"""
