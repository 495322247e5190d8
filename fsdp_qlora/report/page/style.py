"""The style sheet of the page: one for both themes, for a phone, a screen and paper. No file is fetched."""

STYLE = r"""
:root {
  color-scheme: light dark;
  --paper: #ffffff; --panel: #f5f7f9; --ink: #1b2128; --soft: #55606c; --rule: #d5dbe1;
  --mean: #0b5cad; --step: #7aa5d2; --eval: #a84b00; --wrong: #b3202c; --good: #1c6b34;
  --p0: #0b5cad; --p1: #5b9bd5; --p2: #1c7a55; --p3: #8a5a00; --p4: #7a4fa3; --p5: #b04a6a; --p6: #6b7680;
  --k0: #7d97b3; --k1: #5f86b3; --k2: #3f72ae; --k3: #1f5a9c; --k4: #0a3566;
}
@media screen and (prefers-color-scheme: dark) {
  :root {
    --paper: #11161c; --panel: #1a2129; --ink: #e4e9ee; --soft: #a3aeb9; --rule: #343e49;
    --mean: #6fb3f2; --step: #3f74a8; --eval: #f2a063; --wrong: #ff8a86; --good: #7bd196;
    --p0: #6fb3f2; --p1: #3d7ab5; --p2: #5cc79a; --p3: #d9a648; --p4: #b795e0; --p5: #ea8fae; --p6: #8d98a3;
    --k0: #5b7187; --k1: #6489b0; --k2: #6fa3d8; --k3: #95c3ee; --k4: #cbe4fb;
  }
}
* { box-sizing: border-box; }
body {
  margin: 0 auto; padding: 24px 20px 64px; max-width: 960px; background: var(--paper); color: var(--ink);
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", sans-serif;
  overflow-wrap: anywhere; -webkit-text-size-adjust: 100%;
}
h1 { font-size: 1.7rem; line-height: 1.2; margin: 0 0 4px; }
h2 { font-size: 1.2rem; margin: 0 0 12px; padding-top: 12px; border-top: 1px solid var(--rule); }
h3 { font-size: .95rem; margin: 0 0 8px; }
h4 { font-size: .8rem; margin: 10px 0 4px; color: var(--soft); font-weight: 600; }
section { margin-top: 40px; }
p { margin: 0 0 10px; }
.lead, .note, figcaption { color: var(--soft); }
.note, figcaption { font-size: .875rem; }
.alarm { color: var(--wrong); font-weight: 600; }
.right { color: var(--good); font-weight: 600; }
code { white-space: nowrap; }
.lead code { white-space: normal; }
code, pre { font: .875em/1.45 ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; }
pre { overflow-x: auto; padding: 12px; background: var(--panel); border-radius: 8px; overflow-wrap: normal; }
.figures { display: grid; grid-template-columns: repeat(auto-fit, minmax(150px, 1fr)); gap: 10px; margin: 20px 0 0; }
.figures div { background: var(--panel); border-radius: 10px; padding: 12px 14px; }
.figures dt { font-size: .8rem; color: var(--soft); }
.figures dd { margin: 2px 0 0; font-size: 1.3rem; font-weight: 650; line-height: 1.25; }
.figures dd small { display: block; font-size: .8rem; font-weight: 400; color: var(--soft); }
.scroll { overflow-x: auto; margin: 0 0 14px; }
table { border-collapse: collapse; width: 100%; font-size: .9rem; font-variant-numeric: tabular-nums; }
th, td { text-align: left; vertical-align: top; padding: 6px 14px 6px 0; border-bottom: 1px solid var(--rule); }
td, th { overflow-wrap: break-word; min-width: 5.5em; }
thead th { color: var(--soft); font-weight: 600; font-size: .8rem; }
tbody th { font-weight: 400; white-space: nowrap; }
.number { text-align: right; white-space: nowrap; }
.legend { list-style: none; display: flex; flex-wrap: wrap; gap: 4px 18px; margin: 0 0 6px; padding: 0; }
.legend { font-size: .85rem; }
.key { display: inline-block; width: 14px; height: 10px; margin-right: 7px; border-radius: 2px; background: var(--c); }
.plot { padding: 30px 14px 50px 60px; margin: 0 0 18px; }
svg { display: block; overflow: visible; }
svg text { fill: var(--soft); font-size: 12px; font-variant-numeric: tabular-nums; }
.grid, .axis { stroke: var(--rule); stroke-width: 1; }
.axis { stroke: var(--soft); }
.line { fill: none; stroke: var(--c); stroke-width: 1.6; stroke-linejoin: round; stroke-linecap: round; }
.line, .area { vector-effect: non-scaling-stroke; }
.area { fill: var(--c); stroke: var(--c); stroke-width: 1; }
.line.step { stroke-width: 1; }
.dot { fill: var(--c); stroke: var(--paper); stroke-width: 1; }
.step { --c: var(--step); } .mean { --c: var(--mean); } .eval { --c: var(--eval); } .wrong { --c: var(--wrong); }
.bars { margin: 0 0 16px; }
.bar { margin: 0 0 10px; }
.bar p { display: flex; flex-wrap: wrap; justify-content: space-between; gap: 0 16px; margin: 0 0 3px; }
.bar p { font-size: .875rem; }
rect { fill: var(--c); stroke: var(--paper); stroke-width: 1; }
.cell { stroke-width: .5; }
.part-0 { --c: var(--p0); } .part-1 { --c: var(--p1); } .part-2 { --c: var(--p2); } .part-3 { --c: var(--p3); }
.part-4 { --c: var(--p4); } .part-5 { --c: var(--p5); } .part-6 { --c: var(--p6); }
.measured { --c: var(--mean); } .reserved { --c: var(--step); }
.here { --c: var(--p0); } .away { --c: var(--p3); } .shared { --c: var(--p4); }
.keep-0 { --c: var(--k0); } .keep-1 { --c: var(--k1); } .keep-2 { --c: var(--k2); } .keep-3 { --c: var(--k3); }
.keep-4 { --c: var(--k4); }
.strip { margin: 14px 0; }
.strip svg { margin: 4px 0 6px; }
.asked { border: 1px solid var(--rule); border-radius: 10px; padding: 14px 16px; margin: 0 0 14px; }
.pair { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 260px), 1fr)); gap: 0 20px; }
.pair > div { min-width: 0; }
.said { white-space: pre-wrap; unicode-bidi: isolate; background: var(--panel); border-radius: 6px; }
.said { padding: 6px 10px; font-size: .9rem; }
summary { cursor: pointer; }
.long > summary { list-style: none; }
.long > summary::-webkit-details-marker { display: none; }
summary .said { display: block; }
.open { font-size: .85rem; color: var(--mean); text-decoration: underline; }
.open::before { content: "\25b8\a0"; display: inline-block; }
details[open] > summary .open::before { content: "\25be\a0"; }
details[open] > summary .start { display: none; }
a { color: var(--mean); }
@media (max-width: 520px) { body { padding: 16px 14px 48px; } .plot { padding-left: 52px; }
  tbody th { white-space: normal; } h1 { font-size: 1.35rem; } }
@media print {
  body { max-width: none; padding: 0; font-size: 11pt; }
  .asked, .plot, .strip, .bars, .figures div, tr { break-inside: avoid; }
  h2, h3, h4 { break-after: avoid; }
  .scroll { overflow: visible; }
  * { print-color-adjust: exact; -webkit-print-color-adjust: exact; }
}
"""
