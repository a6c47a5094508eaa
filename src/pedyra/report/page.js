"use strict";
// Put every panel in its place, and draw it again when its width changes.

const figures = JSON.parse(document.getElementById("figures").textContent);

for (const host of document.querySelectorAll(".panel")) {
  const panel = figures[host.dataset.figure][host.dataset.panel], select = host.closest("figure").querySelector("[data-highlight]");
  panel.key = `${host.dataset.figure}-${host.dataset.panel}`;
  // A map opens on its last frame: the ranks the run ended with.
  const view = panel.kind === "map" ? {index: panel.frames.length - 1} : null;
  const draw = () => view ? drawMap(host, panel, view) : drawChart(host, panel, select?.value ?? "");
  select?.addEventListener("change", draw);
  let width = 0;
  new ResizeObserver(() => {
    if (host.clientWidth === width) return;
    width = host.clientWidth;
    requestAnimationFrame(draw);
  }).observe(host);
}

for (const select of document.querySelectorAll("[data-highlight]")) {
  const names = new Set(figures[select.closest("figure").id].flatMap(panel => panel.series.map(series => series.name)));
  for (const name of [...names].sort((a, b) => a.localeCompare(b, "en", {numeric: true}))) select.add(new Option(name));
}
