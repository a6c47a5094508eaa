// Put every chart in its place; hand it what the reader sets; draw again when the page turns narrow or dark.
const {panels, themes} = JSON.parse(document.getElementById("figures").textContent);
const dark = matchMedia("(prefers-color-scheme: dark)"), narrow = matchMedia("(max-width: 759px)");
const views = new Map();

function sized(host) {
  const autosize = {type: "fit-x", contains: "padding"};
  const spec = {...panels[host.id], autosize, width: "container", height: Math.min(300, Math.max(220, host.clientWidth * 0.55))};
  if (!panels[host.id].height) return spec;
  const count = field => new Set(spec.data.values.map(cell => cell[field])).size;
  // The map of a deep model stands upright where its columns would be too narrow to read.
  if (host.clientWidth >= 140 + 20 * count("depth")) return {...spec, height: 34 * count("type")};
  const upright = ({x, y, ...rest}) => ({...rest, x: {...y, axis: {...y.axis, labelAngle: -40, orient: "top"}}, y: x});
  const layer = spec.layer.map(each => ({...each, encoding: upright(each.encoding)}));
  return {...spec, height: 22 * count("depth"), layer};
}

async function draw(host) {
  views.get(host)?.finalize();
  const theme = themes[dark.matches ? "dark" : "light"], rows = panels[host.id].data.values;
  const letters = Math.max(4, ...rows.map(row => row.kind === "drawn" ? row.name.length : 0));
  const columns = Math.max(1, Math.floor((host.clientWidth - 60) / (36 + 6.6 * letters)));
  // `ast`: expressions are interpreted, so that the page needs no right to run text as code.
  const legend = {...theme.legend, columns, labelLimit: Math.min(300, host.clientWidth - 60)};
  const options = {config: {...theme, legend}, actions: false, ast: true, renderer: "svg"};
  views.set(host, await vegaEmbed(host, sized(host), options));
}

function hand(slider) {
  const host = slider.closest(".panel").querySelector(".chart");
  views.get(host)?.view.signal(slider.dataset.set, Number(slider.value)).runAsync();
}

async function drawAll() {
  for (const host of document.querySelectorAll(".chart")) await draw(host);
  for (const slider of sliders) hand(slider);
  document.body.dataset.drawn = "yes";
}

const sliders = document.querySelectorAll("[data-set]");
for (const slider of sliders) slider.addEventListener("input", () => {
  slider.parentElement.querySelector("output").textContent = JSON.parse(slider.dataset.frames)[slider.value];
  hand(slider);
});

for (const button of document.querySelectorAll("[data-play]")) {
  const slider = button.parentElement.querySelector("input");
  let timer = null;
  const stop = () => { clearInterval(timer); timer = null; button.textContent = "Play"; };
  const show = place => { slider.value = place; slider.dispatchEvent(new Event("input")); };
  button.addEventListener("click", () => {
    if (timer !== null) return stop();
    if (slider.value === slider.max) show(0);
    button.textContent = "Pause";
    timer = setInterval(() => { show(Number(slider.value) + 1); if (slider.value === slider.max) stop(); }, 450);
  });
}

// One after the other: of two at once, the charts of the earlier could be left.
let drawing = drawAll();
for (const query of [dark, narrow]) query.addEventListener("change", () => { drawing = drawing.then(drawAll); });
