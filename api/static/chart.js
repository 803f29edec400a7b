// Draws the points of a search, on the axes and scales that a person chooses, and keeps the selected one in hand.
// Colours come from the style sheet, so that both themes agree. What is drawn: `chart_document` of api/pages/charts.py.
(() => {
  "use strict";

  const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
  const narrow = () => window.innerWidth < 560;
  const escaped = (text) => text.replaceAll("&", "&amp;").replaceAll("<", "&lt;");
  const number = (value) => (Math.abs(value) >= 1e-4 || !value ? String(+value.toPrecision(3)) : value.toExponential(1));

  // What every figure has: fonts, and the page behind it.
  function look() {
    const font = { family: getComputedStyle(document.body).fontFamily, size: 13, color: colour("--quiet") };
    const label = { bgcolor: colour("--card"), bordercolor: colour("--rule"), font: { ...font, color: colour("--ink") }, align: "left" };
    return { font, paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", hoverlabel: label };
  }

  // The ticks of a log axis from 10^from to 10^to, written in full: 1, 2 and 5 of every power of ten; of many powers,
  // the powers alone; where fewer than three are in sight, round numbers evenly apart.
  function logTicks([from, to]) {
    const low = 10 ** from, high = 10 ** to, powers = [];
    for (let power = Math.floor(from); power <= to; power++) powers.push(power);
    const among = (digits) => powers.flatMap((power) => digits.map((digit) => Number(`${digit}e${power}`))).filter((value) => value >= low && value <= high);
    const fine = among([1, 2, 5]), tickvals = fine.length > 10 ? among([1]) : fine.length > 2 ? fine : evenly(low, high);
    const text = (value) => (value >= 1e-4 ? String(value) : value.toExponential());
    return { type: "log", tickmode: "array", tickvals, ticktext: tickvals.map(text) };
  }

  function evenly(low, high) {
    const unit = 10 ** Math.floor(Math.log10((high - low) / 5)), step = unit * [1, 2, 5, 10].find((digit) => digit * unit >= (high - low) / 5);
    const values = [];
    for (let count = Math.ceil(low / step); count * step <= high; count++) values.push(Number((count * step).toPrecision(8)));
    return values;
  }
  window.bitfrontierLook = { colour, look, logTicks };

  const ROLES = ["baseline", "fits", "over", "rejected", "searched"];
  const REMARKS = {
    over: "over a budget", rejected: "rejected: not clearly better on unseen data",
    searched: "searched on the calibration data only",
  };
  const REFERENCES = { lower_bound: "least predicted", rate_distortion: "rate–distortion limit" };
  // In the legend of a narrow screen.
  const SHORT = {
    "least predicted": "predicted", "rate–distortion limit": "ideal", "searched only": "searched", "over budget": "over", "uniform baseline": "uniform",
    "expected before measuring": "expected", "best that fits": "best",
  };
  const MANY = 300; // points with error bars, or with what was expected of them

  const figure = document.getElementById("chart-figure"), place = document.getElementById("chart");
  if (!figure) return;
  const { source, points: permalink, panel, plotly } = figure.dataset;
  const chosen = {};
  let told = null, read = "", selected = null, drawn = false;

  // Where an annotation stands on an axis.
  const at = (value, log) => (log ? Math.log10(value) : value);

  // ---- What is drawn ----

  function hover(row) {
    const { points, x, y } = told, role = ROLES[points.role[row]];
    const error = points.loss_stderr[row] ? ` ± ${number(points.loss_stderr[row])}` : "";
    const amount = (name) => `${number(points[name][row])} ${x[name].unit}`;
    const extra = Object.keys(y).filter((name) => name !== "loss" && points[name][row] !== null);
    return [
      `<b>Point ${points.number[row]}</b>  ${escaped(points.label[row])}`,
      `loss ${number(points.loss[row])}${error}`,
      Object.keys(x).map(amount).join(" · "),
      ...extra.map((name) => `${name} ${+points[name][row].toPrecision(4)}`),
      ...(REMARKS[role] ? [`<i>${REMARKS[role]}</i>`] : []),
    ].join("<br>");
  }

  function trace(name, rows, style) {
    const { points } = told, x = points[chosen.x], y = points[chosen.y];
    const kept = rows.filter((row) => y[row] !== null);
    return {
      type: "scatter", mode: "markers", name, ...style,
      x: kept.map((row) => x[row]), y: kept.map((row) => y[row]), customdata: kept.map((row) => points.number[row]),
      text: kept.map(hover), hovertemplate: "%{text}<extra></extra>",
      ...(style.errors && chosen.y === "loss" ? { error_y: errors(kept.map((row) => points.loss_stderr[row]), style.marker.color) } : {}),
    };
  }

  const errors = (array, color) => ({ type: "data", array: array.map((one) => one ?? 0), color, thickness: 1, width: 3 });

  // What was expected of the points before they were measured: a dash with its interval, beside what was measured.
  function expected(rows) {
    const { points } = told, of = rows.filter((row) => points.expected[row] !== null);
    const x = points[chosen.x], y = of.map((row) => points.expected[row]);
    return {
      type: "scatter", mode: "markers", name: "expected before measuring", x: of.map((row) => x[row]), y,
      customdata: of.map((row) => points.number[row]),
      text: of.map((row, at) => `<b>Point ${points.number[row]}</b><br>expected ${number(y[at])}, 90 % within ${number(points.expected_low[row])} to ${number(points.expected_high[row])}<br>measured ${number(points.loss[row])}`),
      hovertemplate: "%{text}<extra></extra>",
      marker: { symbol: "line-ew", size: 13, line: { width: 2, color: colour("--good") } },
      error_y: {
        type: "data", symmetric: false, color: colour("--good"), thickness: 1, width: 0,
        array: of.map((row, at) => points.expected_high[row] - y[at]), arrayminus: of.map((row, at) => y[at] - points.expected_low[row]),
      },
    };
  }

  function references() {
    const { reference } = told;
    if (!reference || reference.axis !== chosen.x || chosen.y !== "loss") return [];
    return Object.entries(REFERENCES).filter(([role]) => reference[role]?.some((loss) => loss > 0)).map(([role, name]) => ({
      type: "scatter", mode: "lines", name, x: reference.levels, y: reference[role].map((loss) => (loss > 0 ? loss : null)),
      hovertemplate: `${name}<br>loss %{y:.3g}<extra></extra>`, visible: role === "lower_bound" ? true : "legendonly",
      line: { width: 1.3, dash: role === "lower_bound" ? "dot" : "dashdot", color: colour(role === "lower_bound" ? "--good" : "--limit") },
    }));
  }

  function traces() {
    const { points, lines } = told, dot = colour("--dot"), accent = colour("--accent"), card = colour("--card");
    const line = lines[chosen.x][chosen.y], on = new Set(line), of = Object.fromEntries(ROLES.map((role) => [role, []]));
    points.role.forEach((role, row) => { if (!on.has(row) || ROLES[role] === "baseline") of[ROLES[role]].push(row); });
    const few = of.fits.length <= MANY, best = points.number.indexOf(told.best);
    return [
      ...references(),
      trace("searched only", of.searched, { marker: { size: 5, color: dot, opacity: 0.45 } }),
      trace("rejected", of.rejected, { marker: { size: 8, symbol: "x-thin", line: { width: 1.5, color: dot } } }),
      trace("over budget", of.over, { marker: { size: 7, symbol: "circle-open", color: dot, line: { width: 1.5, color: dot } } }),
      trace("dominated", of.fits, { marker: { size: 7, color: dot, line: { width: few ? 1 : 0, color: card } }, errors: few }),
      trace("frontier", line, { mode: "lines+markers", line: { width: 2, shape: "hv", color: accent }, marker: { size: 9, color: accent, line: { width: 1, color: card } }, errors: true }),
      trace("uniform baseline", of.baseline, { marker: { size: 11, symbol: "diamond", color: colour("--baseline"), line: { width: 1, color: card } }, errors: true }),
      ...(chosen.expected && chosen.y === "loss" ? [expected(few ? [...line, ...of.fits] : line)] : []),
      trace("best that fits", best < 0 ? [] : [best], { marker: { size: 17, symbol: "circle-open", color: accent, line: { width: 2.5, color: accent } }, hoverinfo: "skip" }),
    ].filter((one) => one.x.length).map((one) => ({ ...one, name: (narrow() && SHORT[one.name]) || one.name }));
  }

  // A frame around the selected point. As an annotation, it moves without all else being drawn again.
  function frame() {
    const { points } = told, row = points.number.indexOf(selected), y = row < 0 ? null : points[chosen.y][row];
    if (y === null) return [];
    const box = { text: " ", width: 20, height: 20, borderpad: 1, bordercolor: colour("--ink"), borderwidth: 1.5, showarrow: false };
    return [{ ...box, name: `point ${selected}`, x: at(points[chosen.x][row], chosen.logX), y: at(y, chosen.logY) }];
  }

  // Budgets as dashed lines, full precision as a dotted one, names beside the baselines and the knee.
  function marks() {
    const { points, x, y } = told, shapes = [], notes = [], limit = colour("--limit");
    const limits = { x: x[chosen.x].budget, y: y[chosen.y].budget }, [from, to] = across();
    // How far right a value stands: words stay clear of the axis and of the edge.
    const share = (value) => (at(value, chosen.logX) - from) / (to - from), edge = narrow() ? 0.7 : 0.92;
    const rule = (along, value, dash) => shapes.push({ type: "line", ...(along === "x" ? { xref: "x", yref: "paper", x0: value, x1: value, y0: 0, y1: 1 } : { xref: "paper", yref: "y", x0: 0, x1: 1, y0: value, y1: value }), line: { color: limit, width: 1.5, dash } });
    const note = (text, spot, color = limit) => notes.push({ text, showarrow: false, font: { size: 12, color }, ...spot });
    if (limits.x) { rule("x", limits.x, "dash"); note(` budget ${number(limits.x)} `, { x: at(limits.x, chosen.logX), yref: "paper", y: 0, yanchor: "bottom", xanchor: share(limits.x) < 0.5 ? "left" : "right" }); }
    if (limits.y) { rule("y", limits.y, "dash"); note(`budget ${number(limits.y)}`, { xref: "paper", x: 1, xanchor: "right", y: at(limits.y, chosen.logY), yanchor: "bottom" }); }
    const full = y[chosen.y].full;
    if (full) { rule("y", full, "dot"); note("full precision", { xref: "paper", x: 1, xanchor: "right", y: at(full, chosen.logY), yanchor: "bottom" }); }
    points.role.forEach((role, row) => {
      if (ROLES[role] !== "baseline" || points[chosen.y][row] === null) return;
      const name = escaped(points.label[row].replace(/^uniform[ :]*/, ""));
      const side = share(points[chosen.x][row]) > edge ? { xanchor: "right", xshift: -9 } : { xanchor: "left", xshift: 9 };
      note(name, { x: at(points[chosen.x][row], chosen.logX), y: at(points[chosen.y][row], chosen.logY), ...side, yshift: 8 }, colour("--baseline-ink"));
    });
    const knee = points.number.indexOf(told.knee);
    if (knee >= 0 && chosen.x === Object.keys(x)[0] && chosen.y === "loss") note("knee", { x: at(points[chosen.x][knee], chosen.logX), y: at(points.loss[knee], chosen.logY), yshift: -21 }, colour("--accent"));
    return { shapes, annotations: [...notes, ...frame()] };
  }

  // An axis range around what is drawn: Plotly's own would make room for the words of annotations.
  function range(name, log, others) {
    const values = [...told.points[name].filter((value) => value !== null), ...others].map((value) => (log ? Math.log10(value) : value));
    const least = values.reduce((a, b) => Math.min(a, b)), most = values.reduce((a, b) => Math.max(a, b));
    const room = (most - least) * 0.06 || Math.abs(most) * 0.05 || 1;
    return [least - room, most + room];
  }

  // The range of the cost axis; a budget near it is in sight.
  function across() {
    const [from, to] = range(chosen.x, chosen.logX, []), { budget } = told.x[chosen.x], room = to - from;
    const near = budget && !chosen.logX && budget > from - room && budget < to + room;
    return near ? range(chosen.x, chosen.logX, [budget]) : [from, to];
  }

  function layout() {
    const shared = look(), { font } = shared, quiet = colour("--quiet"), rule = colour("--rule");
    const axis = { gridcolor: rule, linecolor: rule, zeroline: false, ticks: "", fixedrange: true, exponentformat: "power" };
    const { x, y } = told, side = across();
    const up = range(chosen.y, chosen.logY, y[chosen.y].full && chosen.y !== "loss" ? [y[chosen.y].full] : []);
    const ticks = (log, span) => (log ? logTicks(span) : { type: "linear", tickmode: "auto" });
    return {
      ...shared, ...marks(), height: narrow() ? 400 : 470, hovermode: "closest", dragmode: false,
      margin: { l: narrow() ? 52 : 74, r: narrow() ? 10 : 64, t: 18, b: narrow() ? 130 : 92 },
      legend: { orientation: "h", x: 0.5, xanchor: "center", y: narrow() ? -0.24 : -0.2, yanchor: "top", font: { size: narrow() ? 11 : 12, color: quiet }, ...(narrow() ? { entrywidth: 60 } : {}) },
      xaxis: { ...axis, ...ticks(chosen.logX, side), range: side, title: { text: x[chosen.x].title, font, standoff: 10 } },
      yaxis: { ...axis, ...ticks(chosen.logY, up), range: up, title: { text: y[chosen.y].title, font, standoff: 8 }, automargin: true },
    };
  }

  function draw() {
    if (!told || !window.Plotly) return;
    Plotly.react(place, traces(), layout(), { displayModeBar: false, responsive: true, doubleClick: false });
    place.classList.remove("waiting");
    if (!drawn && panel) listen();
    drawn = true;
  }

  // ---- What a person chooses ----

  function choice(legend, name, words) {
    const names = Object.keys(words);
    if (names.length < 2) return "";
    const items = names.map((one) => `<label><input type="radio" name="${name}" value="${one}"${chosen[name] === one ? " checked" : ""}>${words[one].short}</label>`);
    return `<fieldset class="choose"><legend>${legend}</legend>${items.join("")}</fieldset>`;
  }

  const toggle = (name, words) => `<label><input type="checkbox" name="${name}"${chosen[name] ? " checked" : ""}>${words}</label>`;

  // What a page shows unless a person chose otherwise. A loss spans decades; perplexity and accuracy do not.
  const usual = () => ({ x: Object.keys(told.x)[0], y: Object.keys(told.y)[0], logY: chosen.y === "loss", logX: false, expected: false });

  // The choice is kept in the fragment of the address, so that what is passed on shows the same chart.
  function keep() {
    const usually = usual(), url = new URL(location);
    url.hash = new URLSearchParams(Object.entries(chosen).filter(([name, value]) => value !== usually[name]));
    if (url.href !== location.href) history.replaceState(history.state, "", url);
  }

  function recall() {
    const kept = new URLSearchParams(location.hash.slice(1));
    for (const name of ["x", "y"]) chosen[name] = Object.hasOwn(told[name], kept.get(name)) ? kept.get(name) : usual()[name];
    for (const name of ["logX", "logY", "expected"]) chosen[name] = kept.has(name) ? kept.get(name) === "true" : usual()[name];
  }

  function controls() {
    const form = document.getElementById("axes"), { x, y, points } = told;
    const guessed = points.expected.some((value) => value !== null);
    form.innerHTML = choice("Quality", "y", y) + choice("Cost", "x", x)
      + `<fieldset class="choose"><legend>Show</legend>${toggle("logY", "Log quality")}${toggle("logX", "Log cost")}${guessed ? toggle("expected", "Expected") : ""}</fieldset>`;
    form.hidden = false;
    form.onchange = ({ target }) => {
      chosen[target.name] = target.type === "checkbox" ? target.checked : target.value;
      if (target.name === "y") form.elements.logY.checked = chosen.logY = usual().logY;
      keep();
      draw();
    };
  }

  // ---- The selected point ----

  function select(number) {
    if (!window.htmx || number === undefined) return;
    const url = new URL(location);
    url.searchParams.set("point", number);
    history.replaceState(null, "", url);
    mark(number);
    htmx.ajax("GET", `${panel}${url.search}`, { target: "#selected", swap: "outerMorph" });
  }

  function mark(number) {
    selected = number;
    const kept = document.querySelector("#view [name=point]");
    if (kept && new URLSearchParams(location.search).has("point")) { kept.value = number; kept.disabled = false; }
    for (const row of document.querySelectorAll("#points tr[data-point]")) {
      if (row.dataset.point === String(number)) row.setAttribute("aria-current", "true"); else row.removeAttribute("aria-current");
    }
    if (drawn) Plotly.relayout(place, { annotations: marks().annotations });
  }

  function listen() {
    let last = { number: null, time: 0 };
    place.on("plotly_click", ({ points: [{ customdata }] }) => {
      if (customdata === undefined) return;
      if (last.number === customdata && Date.now() - last.time < 600) { location.href = permalink + customdata; return; }
      last = { number: customdata, time: Date.now() };
      select(customdata);
    });
    place.classList.add("clickable");
  }

  // The step that the keyboard took may be gone with the panel that it led away from.
  let stepped = null;
  document.addEventListener("click", ({ target }) => { stepped = target.closest("#selected .steps a")?.textContent ?? null; });

  function sync() {
    if (stepped !== null && document.activeElement?.textContent !== stepped) document.querySelector("#selected h3 a")?.focus();
    stepped = null;
    const now = document.getElementById("selected")?.dataset.point;
    if (now !== undefined && Number(now) !== selected) mark(Number(now)); else if (selected !== null) mark(selected);
    if (told) keep(); // links lead to addresses without a fragment
  }

  // ---- Bringing it in ----

  async function load() {
    const inline = document.getElementById("figures");
    const text = inline ? inline.textContent : await (await fetch(source)).text();
    const found = JSON.parse(text);
    if (!found.points || text === read) return;
    const first = !told;
    [told, read] = [found, text];
    if (first) recall();
    figure.hidden = false;
    document.getElementById("no-points")?.remove();
    if (selected === null) selected = Number(document.getElementById("selected")?.dataset.point ?? NaN);
    controls();
    draw();
  }

  function bringPlotly() {
    if (!plotly || window.Plotly) return Promise.resolve();
    return new Promise((done, failed) => {
      const script = document.createElement("script");
      Object.assign(script, { src: plotly, onload: done, onerror: failed });
      document.head.append(script);
    });
  }

  // The page is painted first: Plotly is a large script.
  requestAnimationFrame(() => setTimeout(() => Promise.all([bringPlotly(), load()]).then(draw)));

  document.addEventListener("htmx:after:swap", ({ target }) => {
    sync();
    // The page of a live search asks for its table now and then; what is new in the table is new in the chart.
    if (target.id === "results") load();
  });
  document.addEventListener("click", ({ target }) => {
    const row = target.closest("#points tr[data-point]");
    if (row && !target.closest("a") && panel) select(Number(row.dataset.point));
  });
  addEventListener("hashchange", () => { if (told && location.hash.includes("=")) { recall(); controls(); draw(); } });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);
  addEventListener("resize", draw);
})();
