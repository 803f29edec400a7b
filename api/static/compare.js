// Draws the frontiers of several searches. Colours come from the style sheet.
(() => {
  "use strict";

  const { colour, look, logTicks } = window.bitfrontierLook;
  const source = document.getElementById("comparison-data"), place = document.getElementById("comparison");
  if (!source) return;
  const figure = JSON.parse(source.textContent);
  if (!figure.data.length) return;

  // The range of the loss axis, around what is shown.
  function losses(data) {
    const shown = data.filter(({ visible }) => visible !== "legendonly").flatMap(({ y }) => y).map(Math.log10);
    const least = Math.min(...shown), most = Math.max(...shown), room = (most - least) * 0.08 || 0.1;
    return shown.length ? [least - room, most + room] : [-3, 0];
  }

  function draw() {
    const shared = look(), rule = colour("--rule"), narrow = window.innerWidth < 560;
    const axis = { gridcolor: rule, linecolor: rule, zeroline: false, ticks: "", fixedrange: true };
    const data = figure.data.map((trace, index) => {
      const own = colour(`--series-${trace.meta}`), shown = place.data?.[index]?.visible ?? trace.visible;
      return { ...trace, visible: shown, marker: { ...trace.marker, color: own }, line: { ...trace.line, color: own } };
    });
    const { xaxis, yaxis } = figure.layout, range = losses(data);
    Plotly.react(place, data, {
      ...shared,
      width: place.clientWidth,
      height: narrow ? 420 : 480,
      margin: { l: narrow ? 58 : 74, r: 20, t: 18, b: 92 },
      hovermode: "closest",
      legend: { orientation: "h", x: 0, xanchor: "left", y: -0.2, yanchor: "top", font: { size: 12, color: colour("--quiet") } },
      xaxis: { ...axis, ...xaxis, title: { ...xaxis.title, font: shared.font, standoff: 10 } },
      yaxis: { ...axis, ...yaxis, ...logTicks(range), range, title: { ...yaxis.title, font: shared.font, standoff: 8 }, automargin: true },
    }, { displayModeBar: false });
  }

  document.getElementById("comparison-figure").hidden = false;
  draw();
  place.on("plotly_click", ({ points: [{ customdata }] }) => { location.href = customdata; });
  place.on("plotly_restyle", draw);
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);
  addEventListener("resize", draw);
})();
