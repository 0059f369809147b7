"""The report's style sheet: light and dark, screen and print."""

STYLE = """
:root {
  color-scheme: light dark;
  --page: #f6f7f9; --panel: #ffffff; --ink: #18202f; --soft: #5d6779; --line: #e3e7ed;
  --fused: #1267d6; --stock: #e8912d; --right: #1267d6; --wrong: #d6336c; --empty: #f1f3f6;
}
@media (prefers-color-scheme: dark) {
  :root {
    --page: #0f1319; --panel: #181d26; --ink: #e8ecf3; --soft: #9aa5b7; --line: #2a3240;
    --fused: #5aa7ff; --stock: #f4a950; --right: #3d8ef0; --wrong: #ff6b9a; --empty: #202734;
  }
}
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", sans-serif; }
main { max-width: 1120px; margin: 0 auto; padding: 48px 24px 64px; }
h1 { font-size: 2.1rem; line-height: 1.2; letter-spacing: -0.02em; margin: 0 0 12px; }
h2 { font-size: 1.3rem; letter-spacing: -0.01em; margin: 48px 0 4px; }
h3 { font-size: 1rem; margin: 0 0 2px; }
p { margin: 0 0 12px; max-width: 76ch; }
.soft, figcaption, .card small { color: var(--soft); }
.lead { font-size: 1.1rem; }
.warn { border-left: 4px solid var(--stock); padding: 10px 16px; background: var(--panel); border-radius: 6px; }
.cards { display: grid; grid-template-columns: repeat(4, 1fr); gap: 16px; margin: 28px 0 0; }
.card, figure { background: var(--panel); border: 1px solid var(--line); border-radius: 12px; }
.card { padding: 18px 20px; }
.card b { display: block; font-size: 2.1rem; line-height: 1.15; letter-spacing: -0.03em; color: var(--fused);
  font-variant-numeric: tabular-nums; }
.card span { display: block; font-weight: 600; margin: 2px 0 6px; }
.card small { display: block; font-size: 0.85rem; line-height: 1.4; }
.pair { display: grid; grid-template-columns: 1fr 1fr; gap: 16px; margin-top: 16px; align-items: stretch; }
figure { margin: 0; padding: 18px 20px; }
figure.wide { margin-top: 16px; }
figcaption { font-size: 0.88rem; line-height: 1.45; margin-bottom: 12px; }
svg { display: block; width: 100%; height: auto; }
svg text { fill: var(--ink); font-size: 13px; font-family: inherit; font-variant-numeric: tabular-nums; }
svg .tick, svg .axis { fill: var(--soft); font-size: 12px; }
svg .name, svg .value { font-size: 14px; }
svg .value, svg .end { font-weight: 650; }
.grid { stroke: var(--line); }
.base { stroke: var(--soft); }
.even { stroke: var(--soft); stroke-dasharray: 4 4; }
.median { stroke: var(--fused); stroke-opacity: 0.5; stroke-width: 2; }
.line { fill: none; stroke-linejoin: round; stroke-linecap: round; }
.line.stock { stroke: var(--stock); stroke-width: 7; stroke-opacity: 0.45; }
.line.fused { stroke: var(--fused); stroke-width: 2; }
.mark.fused, .bar.fused { fill: var(--fused); }
.mark.stock { fill: var(--stock); fill-opacity: 0.45; r: 7px; }
.bar.stock { fill: var(--stock); }
svg text.end.fused { fill: var(--fused); }
svg text.end.stock { fill: var(--stock); }
.cell.none { fill: var(--empty); }
.cell.right { fill: var(--right); }
.cell.wrong { fill: var(--wrong); }
svg .count { font-weight: 600; fill: #fff; }
.legend { display: flex; gap: 22px; font-size: 0.92rem; margin: 10px 0 0; }
.legend i { display: inline-block; width: 26px; vertical-align: middle; margin-right: 8px; border-radius: 4px; }
.legend .fused { height: 3px; background: var(--fused); }
.legend .stock { height: 8px; background: var(--stock); opacity: 0.55; }
.digits { display: grid; grid-template-columns: repeat(auto-fill, minmax(64px, 1fr)); gap: 8px; margin: 6px 0 18px; }
.digit { text-align: center; font-size: 0.8rem; color: var(--soft); line-height: 1.3; }
.digit img { display: block; width: 100%; border-radius: 7px; border: 2px solid transparent; }
.digit b { color: var(--ink); font-size: 1rem; }
.digit.miss img { border-color: var(--wrong); }
.digit.miss b { color: var(--wrong); }
table { border-collapse: collapse; width: 100%; font-size: 0.92rem; }
td, th { text-align: left; padding: 6px 12px 6px 0; border-bottom: 1px solid var(--line); vertical-align: top; }
td.number, th.number { text-align: right; font-variant-numeric: tabular-nums; }
code { font: 0.88em ui-monospace, "SF Mono", Menlo, Consolas, monospace; }
@media (max-width: 860px) { .cards { grid-template-columns: 1fr 1fr; } .pair { grid-template-columns: 1fr; } }
@media print { body { background: #fff; } .card, figure { break-inside: avoid; } }
"""
