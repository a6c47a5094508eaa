// Put every chart in its place, as wide as the place is.
const {panels, theme} = JSON.parse(document.getElementById("figures").textContent);
for (const host of document.querySelectorAll(".chart")) {
  const autosize = {type: "fit-x", contains: "padding"};
  const spec = {height: 260, ...panels[host.id], autosize, width: "container"};
  // `ast`: expressions are interpreted, so that the page needs no right to run text as code.
  await vegaEmbed(host, spec, {config: theme, actions: false, ast: true, renderer: "svg"});
}
document.body.dataset.drawn = "yes";
