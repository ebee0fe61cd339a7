"""The look of the page: light and dark, narrow and wide; curves have the colours c0 to c5."""

STYLE = """
:root { color-scheme: light dark; --ink: #1c2024; --soft: #667079; --line: #e2e6ea; --paper: #fff;
  --tile: #f5f7f9;
  --c0: #2367c4; --c1: #d0670b; --c2: #1d8a4e; --c3: #9440c2; --c4: #b3243f; --c5: #55707f;
  --alarm: #d11f2f; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6e9ec; --soft: #97a1ab; --line: #31383f; --paper: #14181c; --tile: #1d2329;
    --c0: #6ea8fa; --c1: #f2a25c; --c2: #5fcf92; --c3: #c78cf0; --c4: #f07d92; --c5: #a2b8c4;
  --alarm: #ff6b76; } }
body { margin: 0; background: var(--paper); color: var(--ink); font: 15px/1.5 system-ui, sans-serif; }
main { max-width: 1200px; margin: 0 auto; padding: 24px 20px 60px; }
h1 { font-size: 24px; margin: 0; overflow-wrap: anywhere; } h2 { font-size: 18px; margin: 36px 0 8px; }
.status { font-size: 16px; margin: 4px 0 16px; } .note, small { color: var(--soft); font-size: 13px;
  font-weight: 400; }
.facts { display: grid; grid-template-columns: repeat(auto-fit, minmax(120px, 1fr)); gap: 10px; margin: 0; }
.facts div { background: var(--tile); border-radius: 8px; padding: 10px 12px; }
dt { color: var(--soft); font-size: 12px; } dd { margin: 0; font-size: 20px;
  font-variant-numeric: tabular-nums; }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 480px), 1fr));
  gap: 18px; }
figure { margin: 0; min-width: 0; } figcaption { font-weight: 600; } svg { width: 100%; height: auto;
  display: block; }
.legend { margin: 0; font-size: 13px; } .key::before { content: "■ "; } .key { margin-right: 12px; }
.k0::before { color: var(--c0); } .k1::before { color: var(--c1); } .k2::before { color: var(--c2); }
.k3::before { color: var(--c3); } .k4::before { color: var(--c4); } .k5::before { color: var(--c5); }
.grid { stroke: var(--line); } text { fill: var(--soft); font: 11px system-ui, sans-serif; }
.value { text-anchor: end; } .step { text-anchor: middle; }
.curve { fill: none; stroke-width: 1.6; stroke-linejoin: round; } .band { opacity: .18; stroke: none; }
.curve.c0 { stroke: var(--c0); } .curve.c1 { stroke: var(--c1); } .curve.c2 { stroke: var(--c2); }
.curve.c3 { stroke: var(--c3); } .curve.c4 { stroke: var(--c4); } .curve.c5 { stroke: var(--c5); }
.band.c0, .dot.c0 { fill: var(--c0); } .band.c1, .dot.c1 { fill: var(--c1); }
  .band.c2, .dot.c2 { fill: var(--c2); }
.band.c3, .dot.c3 { fill: var(--c3); } .band.c4, .dot.c4 { fill: var(--c4); }
  .band.c5, .dot.c5 { fill: var(--c5); }
.restart { stroke: var(--soft); stroke-dasharray: 3 3; } .skip { stroke: var(--alarm); stroke-width: 2; }
.wide { overflow-x: auto; } table { border-collapse: collapse; font-size: 14px; }
th, td { text-align: left; padding: 5px 14px 5px 0; border-bottom: 1px solid var(--line);
  vertical-align: top; }
th { color: var(--soft); font-weight: 500; } .samples img { display: block; max-width: 256px;
  border-radius: 4px; }
details { margin-top: 14px; } summary { cursor: pointer; font-weight: 600; }
pre { overflow-x: auto; background: var(--tile); padding: 12px; border-radius: 8px; font-size: 12.5px; }
"""
