// Brings in the heat map of the page's metric once it comes into view. Colours come from the style sheet.
(() => {
  "use strict";

  const { colour, look } = window.bitfrontierLook;
  const box = document.getElementById("sensitivities");
  if (!box) return;

  async function show() {
    const answer = await fetch(`/searches/${box.dataset.search}/sensitivities/${encodeURIComponent(box.dataset.metric)}`);
    box.innerHTML = answer.ok ? await answer.text() : "It could not be loaded.";
    draw();
  }

  function draw() {
    const place = box.querySelector(".heat");
    if (!place) return;
    const { data, layout } = JSON.parse(box.querySelector("script").textContent);
    const scale = (name) => [0, 1, 2].map((step) => [step / 2, colour(`--${name}-${step}`)]);
    const rows = data[0].y.length, columns = data[0].z[0].length;
    place.style.minWidth = `${columns * 5}px`;
    const wide = place.clientWidth / columns > 12;
    const bar = { orientation: "h", x: 0, xanchor: "left", y: 1, yanchor: "bottom", len: 220, lenmode: "pixels", thickness: 8, ypad: 4, outlinewidth: 0 };
    const traces = data.map((trace, index) => ({
      ...trace,
      colorscale: scale(trace.meta === "negative" ? "cool" : "heat"),
      showscale: index === 0,
      colorbar: { ...trace.colorbar, ...bar },
      xgap: wide ? 1 : 0,
      ygap: 1,
    }));
    const base = look();
    const axis = { fixedrange: true, showgrid: false, zeroline: false, ticks: "" };
    Plotly.react(place, traces, {
      ...base,
      width: place.clientWidth,
      height: 88 + rows * Math.max(16, 30 - rows),
      margin: { l: 10, r: 10, t: 40, b: 48 },
      xaxis: { ...axis, ...layout.xaxis, title: { ...layout.xaxis.title, font: base.font, standoff: 6 }, range: [-0.5, columns - 0.5] },
      yaxis: { ...axis, type: "category", autorange: "reversed", automargin: true },
      shapes: layout.shapes.map((shape) => ({ ...shape, line: { color: colour("--card"), width: wide ? 3 : 1 } })),
    }, { displayModeBar: false });
  }

  const seen = new IntersectionObserver((entries) => {
    if (!entries.some((entry) => entry.isIntersecting)) return;
    seen.disconnect();
    show();
  }, { rootMargin: "200px" });
  seen.observe(box);
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);
  addEventListener("resize", draw);
})();
