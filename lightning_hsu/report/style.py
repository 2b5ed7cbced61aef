"""How a report's page looks: on a phone and on paper, by day and by night."""

STYLE = """
:root{color-scheme:light dark;--page:#fff;--text:#1f2328;--soft:#57606a;--rule:#d8dee4;--panel:#f6f8fa;
--own:#2a6fbb;--bars:#9cc2ea;--random:#8a4b00;--above:#b4460f;--below:#2a6fbb}
@media screen and (prefers-color-scheme:dark){:root{--page:#15181c;--text:#e6e9ed;--soft:#a3acb6;--rule:#343b43;--panel:#1d2126;
--own:#7db4f0;--bars:#35618f;--random:#f0b35c;--above:#f39a6b;--below:#7db4f0}}
*{box-sizing:border-box}
body{margin:0 auto;max-width:1120px;padding:24px 16px 64px;background:var(--page);color:var(--text);
font:15px/1.5 system-ui,sans-serif;overflow-wrap:anywhere;-webkit-text-size-adjust:100%}
h1{font-size:1.5rem;line-height:1.25;margin:0 0 4px}
h2{font-size:1.1rem;margin:36px 0 8px}
h3{font-size:.95rem;margin:0 0 6px}
p{margin:0 0 10px;max-width:76ch}
a{color:inherit;text-decoration-color:var(--soft);text-underline-offset:2px}
.soft,figcaption{color:var(--soft);font-size:.87rem}
.lead{font-size:1.1rem;font-weight:600}
.scroll{overflow-x:auto;overflow-wrap:normal}
table{border-collapse:collapse;width:100%;font-size:.87rem;font-variant-numeric:tabular-nums}
th{text-align:left;font-weight:600;color:var(--soft);vertical-align:bottom}
th,td{padding:4px 14px 4px 0;border-bottom:1px solid var(--rule)}
td{vertical-align:top}
td{white-space:nowrap}
td:last-child{white-space:normal;min-width:12em}
.number{text-align:right}
.even{fill:var(--soft);stroke:var(--soft)}
details.layer{border-top:1px solid var(--rule)}
details.layer:last-of-type{border-bottom:1px solid var(--rule)}
summary{cursor:pointer;padding:10px 0}
.layer>summary b{margin-right:8px}
summary:focus-visible,a:focus-visible{outline:2px solid var(--own);outline-offset:2px}
.inside{scroll-margin-top:60px;padding:0 0 20px}
.charts{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,310px),1fr));gap:20px 28px;margin:8px 0 16px}
figure{margin:0;max-width:440px}
svg,img{display:block;width:100%}
svg{overflow:visible;fill:var(--soft);font:11px system-ui,sans-serif;font-variant-numeric:tabular-nums}
svg *{vector-effect:non-scaling-stroke}
.ratios{margin:16px 0 24px;padding:0 6px 0 44px;overflow:hidden}
.wide{font-size:12px}
.grid{stroke:var(--rule)}
.random{stroke:var(--text);stroke-width:1.5}
.curve{stroke:var(--random);stroke-width:2;stroke-dasharray:5 3;fill:none}
.edge{stroke:var(--random);stroke-dasharray:1 4;stroke-width:1.5}
.bars{fill:var(--bars)}
.values{stroke:var(--own);stroke-width:2;fill:none}
.dots{fill:var(--own)}
.stem{stroke-width:1.5;opacity:.45}
.above{fill:var(--above);stroke:var(--above)}
.below{fill:var(--below);stroke:var(--below)}
.halo{fill:var(--text);paint-order:stroke;stroke:var(--page);stroke-width:4px;stroke-linejoin:round}
svg a:hover circle,svg a:focus circle{stroke:var(--text);stroke-width:3}
.heat{height:auto;max-width:300px;image-rendering:pixelated;border:1px solid var(--rule);background:var(--page);
margin:0 0 8px}
.pairs{columns:15em auto;column-gap:28px;margin:0 0 10px;padding:0;list-style:none;font-size:.87rem;
font-variant-numeric:tabular-nums;max-width:76ch}
.pairs li{display:flex;justify-content:space-between;border-bottom:1px solid var(--rule);padding:1px 0;
break-inside:avoid;white-space:nowrap}
@media(min-width:900px){td wbr{display:none}}
@media(max-width:760px){.minor{display:none}th,td{padding-right:10px}td:first-child{white-space:normal;overflow-wrap:anywhere;
min-width:9em}}
@media print{body{max-width:none;padding:0;font-size:12px}figure{break-inside:avoid}.minor{display:table-cell}
details::details-content{content-visibility:visible;block-size:auto}*{print-color-adjust:exact}}
"""
