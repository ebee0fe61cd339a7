"""The look of what only this page has: curves in the colours c0 to c5, marks, samples."""

STYLE = """
.legend { margin: 0; font-size: 13px; } .key::before { content: "■ "; } .key { margin-right: 12px; }
.k0::before { color: var(--c0); } .k1::before { color: var(--c1); } .k2::before { color: var(--c2); }
.k3::before { color: var(--c3); } .k4::before { color: var(--c4); } .k5::before { color: var(--c5); }
.curve { fill: none; stroke-width: 1.6; stroke-linejoin: round; } .band { opacity: .18; stroke: none; }
.curve.c0 { stroke: var(--c0); } .curve.c1 { stroke: var(--c1); } .curve.c2 { stroke: var(--c2); }
.curve.c3 { stroke: var(--c3); } .curve.c4 { stroke: var(--c4); } .curve.c5 { stroke: var(--c5); }
.band.c0, .dot.c0 { fill: var(--c0); } .band.c1, .dot.c1 { fill: var(--c1); }
  .band.c2, .dot.c2 { fill: var(--c2); }
.band.c3, .dot.c3 { fill: var(--c3); } .band.c4, .dot.c4 { fill: var(--c4); }
  .band.c5, .dot.c5 { fill: var(--c5); }
.restart { stroke: var(--soft); stroke-dasharray: 3 3; } .skip { stroke: var(--alarm); stroke-width: 2; }
.samples img { display: block; max-width: 256px; border-radius: 4px; }
"""
