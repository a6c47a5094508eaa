"use strict";
// Axes, curves, points and bars from one panel of the report's data. Drawn at the width of the page, so that text
// keeps its size on a telephone; colours come from the style sheet, so that dark mode needs no second drawing.

const TOP = 26, BOTTOM = 42, RIGHT = 10;

function svgNode(parent, tag, attributes = {}, text = null) {
  const node = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  if (text !== null) node.textContent = text;
  parent.append(node);
  return node;
}

function htmlNode(parent, tag, className = "", text = null) {
  const node = document.createElement(tag);
  if (className) node.className = className;
  if (text !== null) node.textContent = text;
  parent.append(node);
  return node;
}

const ink = series => series.color === null ? "var(--grey)" : `var(--c${series.color})`;

function shown(value) {
  if (value === null || value === undefined) return "–";
  const size = Math.abs(value);
  const text = size >= 1000 ? Math.round(value).toLocaleString("en")
    : size > 0 && size < 0.001 ? value.toExponential(2) : String(Number(value.toPrecision(4)));
  return text.replace(/-/g, "−");
}

function tickText(value) {
  const size = Math.abs(value);
  if (size >= 10000) return new Intl.NumberFormat("en", {notation: "compact"}).format(value);
  if (size > 0 && size < 0.001) {
    const power = Math.floor(Math.log10(size) + 1e-9), lead = Number((size / 10 ** power).toPrecision(2));
    const raised = String(power).replace(/./g, c => "⁰¹²³⁴⁵⁶⁷⁸⁹"[c] ?? "⁻");
    return (value < 0 ? "−" : "") + (lead === 1 ? "" : `${lead}·`) + "10" + raised;
  }
  return String(Number(value.toPrecision(6))).replace("-", "−");
}

function linearTicks(low, high, count) {
  const rough = (high - low) / count, unit = 10 ** Math.floor(Math.log10(rough));
  const step = unit * [1, 2, 5, 10].find(m => m * unit >= rough);
  const ticks = [];
  for (let k = Math.ceil(low / step - 1e-9); k * step <= high + step * 1e-9; k++) ticks.push(k * step);
  return ticks;
}

// Powers of ten if there are enough of them, else with 2 and 5 between, else as on a linear axis.
function logTicks(low, high, count) {
  const first = Math.floor(Math.log10(low)), last = Math.ceil(Math.log10(high));
  for (const leads of [[1], [1, 2, 5]]) {
    const ticks = [];
    for (let power = first; power <= last; power++) for (const lead of leads) ticks.push(lead * 10 ** power);
    const inside = ticks.filter(t => t >= low * 0.999 && t <= high * 1.001), every = Math.ceil(inside.length / (count + 2));
    if (inside.length > 2) return inside.filter((_, i) => i % every === 0);
  }
  return linearTicks(low, high, 5).filter(t => t > 0);
}

// A scale maps a value to a pixel, or to null where it has no place (a gap, or 0 on a logarithmic axis).
function makeScale(low, high, from, to, log) {
  const f = log ? Math.log10 : v => v, a = f(low), b = f(high);
  const scale = v => v === null || v === undefined || (log && v <= 0) ? null : from + (to - from) * (f(v) - a) / (b - a);
  scale.low = low; scale.high = high; scale.log = log;
  scale.ticks = count => log ? logTicks(low, high, count) : linearTicks(low, high, count);
  return scale;
}

function extent(values, log) {
  const kept = values.filter(v => v !== null && v !== undefined && (!log || v > 0));
  return kept.length ? kept.reduce(([a, b], v) => [Math.min(a, v), Math.max(b, v)], [Infinity, -Infinity]) : [1, 10];
}

function padded([low, high], log, fromZero) {
  if (log) {
    const room = Math.max((high / low) ** 0.06, 1.15);
    return [low / room, high * room];
  }
  const room = (high - low) * 0.06 || Math.abs(high) * 0.1 || 1;
  if (!fromZero) return [low - room, high + room];
  return [low < 0 ? low - room : 0, low < 0 && high <= 0 ? 0 : high + room];  // never empty, also where all is 0
}

function scales(panel, width, height) {
  const xs = panel.series.flatMap(s => s.x);
  const ys = panel.series.flatMap(s => [...s.y, ...(s.low ?? []), ...(s.high ?? [])]);
  if (panel.reference) ys.push(panel.reference[1]);
  const scattered = panel.series.some(s => s.style === "points");
  let xRange = extent([...xs, ...panel.phases.flatMap(p => [p.start, p.end])], panel.log_x);
  if (!scattered) xRange[0] = Math.min(0, xRange[0]);  // training starts at step 0, also where nothing was logged
  if (scattered || xRange[0] === xRange[1]) xRange = padded(xRange, panel.log_x, false);
  let [low, high] = padded(extent(ys, panel.log_y), panel.log_y, panel.from_zero);
  if (panel.reverse_y) [low, high] = [high, Math.min(low, 0.5)];
  const bottom = height - BOTTOM;
  const trial = makeScale(Math.min(low, high), Math.max(low, high), bottom, TOP, panel.log_y);
  const yTicks = panel.reverse_y ? [1, ...trial.ticks(4).filter(t => t >= 2 && Number.isInteger(t))] : trial.ticks(5);
  const left = 12 + 6.6 * Math.max(...yTicks.map(t => tickText(t).length));
  const y = makeScale(low, high, bottom, TOP, panel.log_y);
  return {x: makeScale(...xRange, left, width - RIGHT, panel.log_x), y, yTicks, left, bottom};
}

function drawAxes(svg, panel, {x, y, yTicks, left, bottom}, width) {
  for (const phase of panel.phases) {
    const from = x(phase.start), to = x(phase.end);
    svgNode(svg, "rect", {class: "phase", x: from, y: TOP, width: Math.max(0, to - from), height: bottom - TOP});
  }
  for (const tick of yTicks) {
    svgNode(svg, "line", {class: "grid", x1: left, x2: width - RIGHT, y1: y(tick), y2: y(tick)});
    svgNode(svg, "text", {x: left - 7, y: y(tick), "text-anchor": "end", "dominant-baseline": "central"}, tickText(tick));
  }
  for (const tick of x.ticks(Math.max(2, Math.floor((width - left) / 85)))) {
    svgNode(svg, "line", {class: "axis", x1: x(tick), x2: x(tick), y1: bottom, y2: bottom + 4});
    svgNode(svg, "text", {x: x(tick), y: bottom + 17, "text-anchor": "middle"}, tickText(tick));
  }
  const zero = y.low < 0 && y.high > 0 ? y(0) : bottom;
  svgNode(svg, "line", {class: "axis", x1: left, x2: width - RIGHT, y1: bottom, y2: bottom});
  if (zero !== bottom) svgNode(svg, "line", {class: "axis", x1: left, x2: width - RIGHT, y1: zero, y2: zero});
  svgNode(svg, "text", {class: "axis-label", x: 0, y: 13}, panel.y_label);
  svgNode(svg, "text", {class: "axis-label", x: (left + width - RIGHT) / 2, y: bottom + 36, "text-anchor": "middle"}, panel.x_label);
}

function pathOf(series, x, y, values) {
  let path = "", last = null;
  series.x.forEach((step, i) => {
    const px = x(step), py = y(values[i]);
    if (px === null || py === null) { last = null; return; }
    path += last === null ? `M${px.toFixed(1)},${py.toFixed(1)}`
      : series.style === "step" ? `H${px.toFixed(1)}V${py.toFixed(1)}` : `L${px.toFixed(1)},${py.toFixed(1)}`;
    last = py;
  });
  return path;
}

const MARKS = [r => `M${-r},0a${r},${r} 0 1,0 ${2 * r},0a${r},${r} 0 1,0 ${-2 * r},0`, r => `M${-r},${-r}h${2 * r}v${2 * r}h${-2 * r}z`,
  r => `M0,${-1.25 * r}L${1.2 * r},${r}H${-1.2 * r}z`, r => `M0,${-1.35 * r}L${1.35 * r},0L0,${1.35 * r}L${-1.35 * r},0z`,
  r => `M0,${1.25 * r}L${1.2 * r},${-r}H${-1.2 * r}z`, r => `M${-1.3 * r},${-r / 2}h${2.6 * r}v${r}h${-2.6 * r}z`];
const markPath = (slot, radius) => MARKS[(slot ?? 0) % MARKS.length](radius);

function drawSeries(svg, panel, series, {x, y}, highlight) {
  const stroke = series.name === highlight ? "var(--ink)" : ink(series);
  if (series.style === "bars") {
    const gap = Math.min(...series.x.slice(1).map((v, i) => x(v) - x(series.x[i])), 40), wide = Math.min(16, gap * 0.62);
    series.x.forEach((step, i) => {
      const top = Math.min(y(series.y[i]), y(0)), tall = Math.abs(y(series.y[i]) - y(0));
      svgNode(svg, "rect", {x: x(step) - wide / 2, y: top, width: wide, height: tall, style: `fill: ${stroke}`});
    });
    return;
  }
  const scattered = series.style === "points";
  if (series.low && scattered) {
    series.x.forEach((step, i) => {
      const from = y(series.low[i]), to = y(series.high[i]);
      if (from !== null && to !== null) svgNode(svg, "line", {class: "error", x1: x(step), x2: x(step), y1: from, y2: to, style: `stroke: ${stroke}`});
    });
  } else if (series.low) {
    const lower = {...series, x: [...series.x].reverse()}, back = pathOf(lower, x, y, [...series.low].reverse());
    const area = pathOf(series, x, y, series.high) + back.replace("M", "L") + "Z";
    svgNode(svg, "path", {class: "spread", d: area, style: `fill: ${stroke}`});
  }
  if (!scattered) {
    const kind = series.name === highlight ? "highlight" : series.faint ? "faint" : series.color === null ? "quiet" : "";
    const many = kind === "quiet" && panel.series.length > 60 ? " many" : "";
    svgNode(svg, "path", {class: `curve ${kind}${many}`, d: pathOf(series, x, y, series.y), style: `stroke: ${stroke}`});
  }
  if (scattered || (series.style === "line" && series.color !== null && series.x.length <= 12)) {
    series.x.forEach((step, i) => {
      const px = x(step), py = y(series.y[i]);
      if (px === null || py === null) return;
      const place = `translate(${px.toFixed(1)},${py.toFixed(1)})`, mark = markPath(scattered ? series.color : 0, scattered ? 5 : 3.2);
      svgNode(svg, "path", {class: "mark", d: mark, transform: place, style: `fill: ${stroke}`});
    });
  }
}

function drawLegend(host, panel, highlight) {
  const named = panel.series.filter(s => !s.faint && (s.color !== null || s.name === highlight));
  const list = htmlNode(host, "ul", "legend");
  if (panel.phases.length) {
    const item = htmlNode(list, "li"), swatch = svgNode(item, "svg", {width: 16, height: 12, "aria-hidden": "true"});
    svgNode(swatch, "rect", {class: "phase", width: 16, height: 12});
    item.append("ranks fixed");
  }
  if (named.length > 1) {
    for (const series of named) {
      const item = htmlNode(list, "li"), swatch = svgNode(item, "svg", {width: 16, height: 12, "aria-hidden": "true"});
      const paint = series.name === highlight ? "var(--ink)" : ink(series);
      if (series.style === "line" || series.style === "step") svgNode(swatch, "path", {class: "curve", d: "M1,6H15", style: `stroke: ${paint}`});
      else svgNode(swatch, "path", {d: markPath(series.style === "bars" ? 1 : series.color, 4.5), transform: "translate(8,6)", style: `fill: ${paint}`});
      item.append(series.name);
    }
  }
}

function summary(panel) {
  const told = panel.series.filter(s => !s.faint && s.color !== null && s.style !== "points").slice(0, 8)
    .map(s => `${s.name} from ${shown(s.y[0])} to ${shown(s.y.at(-1))}`);
  return `${panel.title}: ${panel.y_label} against ${panel.x_label}. ${told.join("; ")}`;
}

function drawChart(host, panel, highlight = "") {
  const width = Math.max(240, host.clientWidth), height = Math.round(Math.min(330, Math.max(236, width * 0.58)));
  host.replaceChildren();
  htmlNode(host, "h4", "", panel.title);
  drawLegend(host, panel, highlight);
  const svg = svgNode(host, "svg", {class: "chart", height, viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": summary(panel)});
  const axes = scales(panel, width, height);
  drawAxes(svg, panel, axes, width);
  if (panel.reference) {
    const [name, value] = panel.reference, at = axes.y(value);
    svgNode(svg, "line", {class: "reference", x1: axes.left, x2: width - RIGHT, y1: at, y2: at});
    svgNode(svg, "text", {x: axes.left + 6, y: at + 15}, `${name} ${shown(value)}`);
  }
  const order = [...panel.series].sort((a, b) => (a.name === highlight) - (b.name === highlight));
  for (const series of order) drawSeries(svg, panel, series, axes, highlight);
  followPointer(host, svg, panel, axes, width);
}
