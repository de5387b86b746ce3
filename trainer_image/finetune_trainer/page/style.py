"""The style of report.html: light or dark as the reader's system is, readable on paper and on a telephone."""

CSS = """
:root{--ink:#1d2430;--soft:#5b6675;--line:#d9dee6;--paper:#fff;--back:#f4f6f9;--one:#2563eb;--two:#d9480f;
--good:#14713b;--bad:#b42318;--mark:#fff1b8}
@media (prefers-color-scheme:dark){:root{--ink:#e6eaf0;--soft:#9aa5b4;--line:#333c49;--paper:#1a2029;--back:#11151b;
--one:#6ea8ff;--two:#ff9e64;--good:#56c98a;--bad:#ff8a80;--mark:#5a4a12}}
*{box-sizing:border-box}
body{margin:0;background:var(--back);color:var(--ink);
font:15px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,"Helvetica Neue",sans-serif}
main{max-width:60rem;margin:0 auto;padding:1.5rem 1rem 4rem}
header,section{background:var(--paper);border:1px solid var(--line);border-radius:10px;padding:1.1rem 1.3rem;
margin:0 0 1rem}
h1{margin:0;font-size:1.7rem;overflow-wrap:anywhere}
h2{margin:0 0 .8rem;font-size:1.15rem}
h3{margin:1.2rem 0 .5rem;font-size:1rem}
h4{margin:0 0 .3rem;font-size:.85rem;font-weight:600;color:var(--soft)}
p{margin:.4rem 0}
.sub{color:var(--soft);overflow-wrap:anywhere}
.verdict{font-weight:600;overflow-wrap:anywhere}
.good{color:var(--good)}.bad{color:var(--bad)}
.tiles{display:grid;grid-template-columns:repeat(auto-fit,minmax(8rem,1fr));gap:.6rem;margin-top:.9rem}
.tiles div{border:1px solid var(--line);border-radius:8px;padding:.5rem .55rem}
.tiles b{display:block;font-size:.9rem;overflow-wrap:anywhere}
.tiles span{color:var(--soft);font-size:.82rem}
table{border-collapse:collapse;width:100%}
th,td{text-align:left;vertical-align:top;padding:.28rem .8rem .28rem 0;border-bottom:1px solid var(--line)}
.facts th{font-weight:400;color:var(--soft);width:17rem}
.grid th{font-weight:600}
td{overflow-wrap:anywhere;font-variant-numeric:tabular-nums}
.grid td{overflow-wrap:break-word}
em{color:var(--soft)}
.gates{margin:0;padding-left:1.2rem}
figure{margin:.6rem 0 0}
figcaption{font-weight:600;font-size:.95rem;display:flex;flex-wrap:wrap;justify-content:space-between;gap:.3rem 1rem}
.legend{display:flex;flex-wrap:wrap;gap:.2rem 1rem;font-weight:400;color:var(--soft);font-size:.85rem}
.legend i{display:inline-block;width:1.2rem;height:0;margin-right:.4rem;vertical-align:middle;border-top:3px solid}
i.train{color:var(--one)}i.eval{color:var(--two)}i.level{color:var(--soft);border-top-style:dashed}
svg{display:block;width:100%;height:auto}
svg text{fill:var(--soft);font-size:12px}
polyline{fill:none;stroke-width:1.8;stroke-linejoin:round;vector-effect:non-scaling-stroke}
polyline.train{stroke:var(--one)}polyline.eval{stroke:var(--two)}
circle.train{fill:var(--one)}circle.eval{fill:var(--two)}
.level{stroke:var(--soft);stroke-dasharray:5 4}
line.grid{stroke:var(--line)}.axis{fill:none;stroke:var(--soft)}.bar{fill:var(--one)}
.halves{display:grid;grid-template-columns:repeat(auto-fit,minmax(17rem,1fr));gap:.4rem 1.2rem}
.halves>*{min-width:0}
.halves svg text{font-size:18px}
article{border-top:1px solid var(--line);padding:.7rem 0}
article:first-of-type{border-top:0;padding-top:0}
.prompt{font-weight:600;white-space:pre-wrap;overflow-wrap:anywhere}
pre{margin:0;padding:.6rem .8rem;background:var(--back);border:1px solid var(--line);border-radius:8px;
white-space:pre-wrap;overflow-wrap:anywhere;font:13px/1.5 ui-monospace,Menlo,Consolas,monospace;max-height:32rem;
overflow:auto}
mark{background:var(--mark);color:inherit;border-radius:2px}
@media (max-width:36rem){svg text,.halves svg text{font-size:20px}text[transform]{display:none}
.facts th{width:40%}}
@media print{body{background:none}main{max-width:none}figure,header,tr{break-inside:avoid}
h2,h3,h4,.prompt{break-after:avoid}pre{max-height:none}mark{print-color-adjust:exact}}
"""
