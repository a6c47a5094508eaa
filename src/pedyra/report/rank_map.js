"use strict";
// The map of ranks, and the slider that goes through the adjustments.

const MAP_TOP = 22, CELL_MIN = 18;

function mapColor(share) {
  const [from, to, part] = share < 0.5 ? ["low", "mid", share * 2] : ["mid", "high", share * 2 - 1];
  return `color-mix(in oklab, var(--map-${to}) ${(100 * part).toFixed(0)}%, var(--map-${from}))`;
}

// Columns are depths while they are wide enough to read, rows on a narrow page.
function mapLayout(panel, width) {
  const depths = panel.depths.map(depth => depth ?? "–"); // outside of any block
  const typeWidth = 10 + 6.9 * Math.max(...panel.types.map(t => t.length));
  const columnWidth = (width - typeWidth) / panel.depths.length;
  if (columnWidth >= CELL_MIN) {
    const wide = Math.min(columnWidth, 92);
    return {flipped: false, left: typeWidth, top: MAP_TOP, wide, tall: Math.min(40, Math.max(24, wide * 0.6)), rows: panel.types, columns: depths};
  }
  const left = 34, slant = 12 + 4.9 * Math.max(...panel.types.map(t => t.length));
  const wide = Math.min(66, (width - left - 26) / panel.types.length);
  return {flipped: true, left, top: slant, wide, tall: 22, rows: depths, columns: panel.types};
}

function drawMap(host, panel, view) {
  const width = Math.max(240, host.clientWidth), layout = mapLayout(panel, width), {left, top, wide, tall, flipped} = layout;
  const height = top + tall * layout.rows.length + 22, last = panel.frames.length - 1, frame = panel.frames[view.index];
  const highest = Math.max(1, ...panel.frames.flatMap(f => f.cells.flat()));
  if (!view.built) buildMap(host, panel, view, highest);
  view.draw = () => drawMap(host, panel, view);
  const svg = view.svg;
  svg.replaceChildren();
  svg.setAttribute("viewBox", `0 0 ${width} ${height}`);
  svg.setAttribute("height", height);
  svg.setAttribute("aria-label", `Ranks ${view.index ? `after adjustment ${view.index}` : "at the start"}. ${spoken(panel, frame)}`);
  layout.columns.forEach((name, c) => {
    const x = left + wide * (c + 0.5);
    if (flipped) svgNode(svg, "text", {x: 0, y: 0, transform: `translate(${x},${top - 7}) rotate(-42)`}, name);
    else svgNode(svg, "text", {x, y: 14, "text-anchor": "middle"}, name);
  });
  layout.rows.forEach((name, r) => {
    svgNode(svg, "text", {x: left - 8, y: top + tall * (r + 0.5), "text-anchor": "end", "dominant-baseline": "central"}, name);
    layout.columns.forEach((_, c) => drawCell(svg, frame, layout, r, c, highest));
  });
  const axis = (flipped ? "rows: depth in the model" : "depth in the model (block)") + (panel.depths.includes(null) ? ", – outside of the blocks" : "");
  const middle = Math.min(left + wide * panel.depths.length / 2, width - 3.3 * axis.length);  // half of its length
  svgNode(svg, "text", {x: flipped ? 0 : middle, y: height - 5, "text-anchor": flipped ? "start" : "middle"}, axis);
  view.output.textContent = (view.index ? `Adjustment ${view.index} of ${last}, step ${frame.step}: ` : "Start: ") + frame.text;
  view.input?.setAttribute("aria-valuetext", view.output.textContent);
}

function drawCell(svg, frame, {left, top, wide, tall, flipped}, r, c, highest) {
  const [row, column] = flipped ? [c, r] : [r, c];
  const rank = frame.cells[row][column], change = frame.changes[row][column];
  if (rank === null) return;
  const share = rank / highest, x = left + wide * c, y = top + tall * r;
  svgNode(svg, "rect", {class: "cell", x: x + 1, y: y + 1, width: wide - 2, height: tall - 2, rx: 2, style: `fill: ${mapColor(share)}`});
  const text = Number.isInteger(rank) ? rank : rank.toFixed(1), size = wide < 27 ? 10.5 : 12.5;
  svgNode(svg, "text", {class: "cell-text", x: x + wide / 2, y: y + tall / 2, style: `font-size: ${size}px; fill: var(--map-ink${share > 0.6 ? "-high" : ""})`}, text);
  if (!change) return;
  svgNode(svg, "rect", {class: "changed", x: x + 1.6, y: y + 1.6, width: wide - 3.2, height: tall - 3.2, rx: 2});
  const s = wide < 27 ? 4 : 6, corner = change > 0 ? `M${x + wide - s - 4},${y + s + 4}h${s}l${-s / 2},${-s}z` : `M${x + wide - s - 4},${y + tall - s - 4}h${s}l${-s / 2},${s}z`;
  svgNode(svg, "path", {d: corner, style: `fill: var(--map-ink${share > 0.6 ? "-high" : ""})`});
}

const spoken = (panel, frame) => panel.types.map((type, i) => `${type}: ${frame.cells[i].map(v => v ?? "none").join(", ")}`).join("; ");

function buildMap(host, panel, view, highest) {
  view.built = true;
  if (host.parentElement.children.length > 1) htmlNode(host, "h4", "", panel.title);
  const row = htmlNode(host, "div", "slider"), last = panel.frames.length - 1;
  if (last > 0) addSlider(row, panel, view, last);
  view.output = htmlNode(row, "output");
  view.svg = svgNode(host, "svg", {class: "map", role: "img"});
  const scale = htmlNode(host, "div", "scale");
  scale.append("rank 0");
  htmlNode(scale, "i");
  scale.append(String(highest));
  if (last > 0) htmlNode(scale, "span", "", "▲ gained, ▼ lost at this adjustment");
}

function addSlider(row, panel, view, last) {
  const id = `${panel.key}-slider`, label = htmlNode(row, "label", "", "Adjustment");
  label.htmlFor = id;
  const play = htmlNode(row, "button", "", "Play");
  play.type = "button";
  view.input = htmlNode(row, "input");
  Object.assign(view.input, {type: "range", id, min: 0, max: last, step: 1, value: view.index});
  const show = index => { view.index = index; view.input.value = index; view.draw(); };
  let timer = null;
  const stop = () => { clearInterval(timer); timer = null; play.textContent = "Play"; };
  view.input.addEventListener("input", () => { stop(); show(Number(view.input.value)); });
  play.addEventListener("click", () => {
    if (timer !== null) return stop();
    if (view.index === last) show(0);
    play.textContent = "Pause";
    timer = setInterval(() => { show(view.index + 1); if (view.index === last) stop(); }, 450);
  });
}
