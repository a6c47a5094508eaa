"use strict";
// What is under the pointer: all curves at its step, or the one nearest if there are many.

const NEAREST_FROM = 9; // curves; a tip that lists more than eight hides the chart

function followPointer(host, svg, panel, axes, width) {
  const tip = htmlNode(host, "div", "tip"), cursor = svgNode(svg, "line", {class: "cursor", y1: TOP, y2: axes.bottom, visibility: "hidden"});
  tip.hidden = true;
  const one = panel.series.length >= NEAREST_FROM || panel.series.some(s => s.style === "points");
  const hide = () => { tip.hidden = true; cursor.setAttribute("visibility", "hidden"); };
  svg.addEventListener("pointerleave", hide);
  svg.addEventListener("pointermove", event => {
    const box = svg.getBoundingClientRect(), at = {x: event.clientX - box.left, y: event.clientY - box.top};
    const found = one ? nearestPoint(panel, axes, at) : pointsAtStep(panel, axes, at.x);
    if (!found) return hide();
    tip.replaceChildren();
    htmlNode(tip, "b", "", `${panel.x_label} ${shown(found.x)}`);
    for (const {series, i} of found.points) {
      const row = htmlNode(tip, "span"), key = htmlNode(row, "i", "key");
      key.style.setProperty("--key", ink(series));
      row.append(`${series.labels?.[i] ?? series.name}: ${shown(series.y[i])}`);
    }
    tip.hidden = false;
    const px = axes.x(found.x), room = tip.offsetWidth;
    if (!one) for (const [name, value] of [["x1", px], ["x2", px], ["visibility", "visible"]]) cursor.setAttribute(name, value);
    tip.style.left = `${Math.max(0, px + 14 + room > width ? px - 14 - room : px + 14)}px`;
    const chartTop = box.top - host.getBoundingClientRect().top;
    tip.style.top = `${chartTop + (one ? Math.max(TOP, at.y - tip.offsetHeight - 12) : TOP + 4)}px`;
  });
}

function pointsAtStep(panel, axes, px) {
  let x = null, best = Infinity;
  const told = panel.series.filter(s => !s.faint);
  for (const series of told) {
    for (const value of series.x) {
      const off = Math.abs(axes.x(value) - px);
      if (off < best) [best, x] = [off, value];
    }
  }
  // A curve without a point at this step tells its last value before it.
  const points = told.map(series => ({series, i: series.x.findLastIndex(value => value <= x)})).filter(p => p.i >= 0);
  return points.length ? {x, points} : null;
}

function nearestPoint(panel, axes, at) {
  let found = null, best = 30;
  for (const series of panel.series) {
    series.x.forEach((value, i) => {
      const off = Math.hypot(axes.x(value) - at.x, axes.y(series.y[i]) - at.y);
      if (off < best) [best, found] = [off, {x: value, points: [{series, i}]}];
    });
  }
  return found;
}
