// Draws the frontier from the figures in the page. Colours come from the style sheet, so that both themes agree.
(() => {
  "use strict";

  const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
  const ROLES = {
    frontier: "--accent", best: "--accent", dominated: "--dot", over: "--dot", baseline: "--baseline", searched: "--dot",
    lower_bound: "--good", rate_distortion: "--limit",
  };
  const NOTES = { baseline: "--baseline-ink", knee: "--accent" };
  const NAMES = { avg_bits: "Bits per weight", size_bytes: "Size", bitops: "Bit operations", latency_us: "Latency" };
  const narrow = () => window.innerWidth < 560;

  // What every figure has: fonts, and the page behind it.
  function look() {
    const font = { family: getComputedStyle(document.body).fontFamily, size: 13, color: colour("--quiet") };
    const label = { bgcolor: colour("--card"), bordercolor: colour("--rule"), font: { ...font, color: colour("--ink") }, align: "left" };
    return { font, paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", hoverlabel: label };
  }

  function painted(figure) {
    const shared = look(), { font } = shared, quiet = colour("--quiet"), rule = colour("--rule");
    const data = figure.data.map((trace) => ({
      ...trace,
      marker: { ...trace.marker, color: colour(ROLES[trace.meta]), line: { ...trace.marker?.line, color: colour(trace.meta === "best" ? "--accent" : "--card") } },
      line: trace.line && { ...trace.line, color: colour(ROLES[trace.meta]) },
    }));
    for (const trace of data) if (trace.meta === "over") trace.marker.line = { width: 1.5, color: colour("--dot") };
    const axis = { gridcolor: rule, linecolor: rule, zeroline: false, ticks: "", fixedrange: true };
    const { xaxis, yaxis, shapes, annotations } = figure.layout;
    return {
      data,
      layout: {
        ...shared,
        height: narrow() ? 380 : 460,
        margin: { l: narrow() ? 58 : 74, r: 64, t: 18, b: 92 },
        hovermode: "closest",
        legend: { orientation: "h", x: 0.5, xanchor: "center", y: -0.2, yanchor: "top", font: { size: 12, color: quiet } },
        xaxis: { ...axis, ...xaxis, title: { ...xaxis.title, font, standoff: 10 } },
        yaxis: { ...axis, ...yaxis, title: { ...yaxis.title, font, standoff: 8 }, automargin: true, exponentformat: "power" },
        shapes: shapes.map((shape) => ({ ...shape, line: { color: colour("--limit"), width: 1.5, dash: "dash" } })),
        annotations: annotations.map(({ meta, ...note }) => ({ ...note, font: { size: 12, color: colour(NOTES[meta] || "--limit") } })),
      },
    };
  }

  let figures = {}, shown = null;

  function draw() {
    const chart = document.getElementById("chart");
    if (!shown || !chart) return;
    const { data, layout } = painted(figures[shown]);
    Plotly.react(chart, data, layout, { displayModeBar: false, responsive: true });
  }

  // Makes room for a reference line that waited in the legend, as long as it is shown.
  function makeRoom() {
    const { layout } = figures[shown], { widest } = layout.meta || {};
    if (!widest) return;
    const waiting = figures[shown].data.filter((trace) => trace.visible === "legendonly").map((trace) => trace.meta);
    const now = document.getElementById("chart").data.some(({ meta, visible }) => waiting.includes(meta) && visible !== "legendonly");
    Plotly.relayout("chart", { "yaxis.range": now ? widest : layout.yaxis.range });
  }

  function axisSwitch(names) {
    const fieldset = document.getElementById("axes");
    fieldset.querySelectorAll("label").forEach((label) => label.remove());
    for (const name of names) {
      const label = document.createElement("label"), input = document.createElement("input");
      Object.assign(input, { type: "radio", name: "axis", value: name, checked: name === shown });
      input.addEventListener("change", () => { shown = name; draw(); });
      label.append(input, document.createTextNode(NAMES[name] || name));
      fieldset.append(label);
    }
    fieldset.hidden = names.length < 2;
  }

  function start() {
    const source = document.getElementById("figures");
    if (!source) return;
    figures = JSON.parse(source.textContent);
    const names = Object.keys(figures);
    if (!names.length) return;
    if (!names.includes(shown)) shown = names[0];
    document.getElementById("chart-figure").hidden = false;
    axisSwitch(names);
    draw();
    const base = document.getElementById("search")?.dataset.points;
    const chart = document.getElementById("chart");
    chart.on("plotly_restyle", makeRoom);
    if (base) chart.on("plotly_click", ({ points: [{ customdata }] }) => { if (customdata) location.href = base + customdata; });
    chart.classList.toggle("clickable", Boolean(base));
  }

  window.bitfrontierLook = { colour, look };
  window.bitfrontierChart = start;
  start();
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);
  addEventListener("resize", draw);
})();
