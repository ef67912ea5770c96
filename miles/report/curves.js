// Curves: one card a chart, all runs over each other, drawn when they come into view.

const DASHES = ["solid", "dot", "dash", "dashdot"];
const view = { smooth: 0, axis: "step", hidden: new Set() };
const cards = new Set();

/** Exponential moving average that starts unbiased; `weight` 0 leaves values as they are. */
function smoothed(values, weight) {
  let sum = 0, count = 0;
  return values.map((value) => {
    sum = sum * weight + value;
    count = count * weight + 1;
    return sum / count;
  });
}

/** The points of a metric of a run that exist: `{x, y}`. */
function points(run, metric) {
  const y = run.metrics[metric] ?? [];
  const x = view.axis === "step" ? run.metrics.step : run.minutes;
  const there = y.map((value, i) => i).filter((i) => y[i] !== null);
  return { x: there.map((i) => x[i]), y: there.map((i) => y[i]) };
}

function minutesOf(run) {
  let total = 0;
  return (run.metrics.step ?? []).map((_, i) => (total += (run.metrics["perf/step_time"]?.[i] ?? 0) / 60));
}

function tracesOf(chart, runs, log) {
  const several = runs.length > 1;
  return runs.flatMap((run, r) => view.hidden.has(r) ? [] : chart.curves.flatMap((curve, c) => {
    const { x, y } = points(run, curve.metric);
    if (!y.length) return [];
    const line = { color: several ? run.colour : colour(c), dash: several ? DASHES[c % DASHES.length] : "solid", width: 2 };
    const name = several ? (chart.curves.length > 1 ? `${run.label} · ${curve.name}` : run.label) : curve.name;
    const mode = y.length < 2 ? "markers" : y.length <= 12 ? "lines+markers" : "lines";
    const main = { x, y, name, mode, line, marker: { color: line.color, size: 6 }, hovertemplate: "%{y:.5~g}" };
    if (view.smooth === 0 || y.length < 4) return [main];
    const faint = { ...main, mode: "lines", line: { ...line, width: 1 }, opacity: 0.28, hoverinfo: "skip", hovertemplate: null };
    const usable = log ? y.map((value) => Math.max(value, Number.MIN_VALUE)) : y;
    return [faint, { ...main, y: smoothed(usable, view.smooth) }];
  }));
}

function layoutOf(log) {
  const ink = css("--muted"), grid = css("--line");
  const axis = { gridcolor: grid, zerolinecolor: grid, linecolor: grid, tickcolor: grid, automargin: true };
  return {
    height: 230,
    margin: { l: 46, r: 14, t: 8, b: 26 },
    paper_bgcolor: "rgba(0,0,0,0)",
    plot_bgcolor: "rgba(0,0,0,0)",
    font: { family: css("--sans"), size: 11.5, color: ink },
    showlegend: false,
    hovermode: "x unified",
    hoverlabel: { bgcolor: css("--raised"), bordercolor: grid, font: { color: css("--ink"), size: 12 }, namelength: 40 },
    xaxis: { ...axis, showgrid: false, zeroline: false, hoverformat: ".6~g", ticksuffix: view.axis === "step" ? "" : " min", unifiedhovertitle: { text: view.axis === "step" ? "step %{x}" : "%{x}" } },
    yaxis: { ...axis, type: log ? "log" : "linear", exponentformat: "e", nticks: 6, ...(log ? { dtick: 1, minor: { showgrid: false } } : {}) },
    dragmode: "zoom",
  };
}

const PLOT = { displayModeBar: false, responsive: true, doubleClick: "reset" };

/** Draws `card.draw()` when the card comes into view, and again when `redraw` is called. */
const watcher = new IntersectionObserver((entries) => {
  for (const { target, isIntersecting } of entries) {
    target.card.seen = isIntersecting;
    if (isIntersecting && target.card.stale) draw(target.card);
  }
}, { rootMargin: "300px" });

function draw(card) {
  card.stale = false;
  card.draw();
}

function redraw() {
  for (const card of cards) {
    card.stale = true;
    if (card.seen) draw(card);
  }
}

/** A card in the page around a plot: `drawInto(plot)` is called when it is seen or has to change. */
function makeCard(title, hint, drawInto, key, control) {
  const plot = el("div.plot");
  const node = el("article.card", {}, el("header", {}, el("h3", {}, title), control), plot, key, hint ? el("p.hint", {}, hint) : null);
  const card = { stale: true, seen: false, draw: () => drawInto(plot) };
  node.card = card;
  cards.add(card);
  watcher.observe(node);
  return node;
}

function chartCard(chart, runs) {
  const values = runs.flatMap((run) => chart.curves.flatMap(({ metric }) => (run.metrics[metric] ?? []).filter((v) => v !== null)));
  const low = values.reduce((a, b) => Math.min(a, b), Infinity), high = values.reduce((a, b) => Math.max(a, b), -Infinity);
  let log = Boolean(chart.log && low > 0 && high / low > 20);
  const button = el("button.log", {
    type: "button", title: "logarithmic scale", "aria-pressed": String(log), disabled: !(high > 0),
    onclick: () => {
      log = !log;
      button.setAttribute("aria-pressed", String(log));
      redrawThis();
    },
  }, "log");
  const several = runs.length > 1;
  const key = chart.curves.length > 1
    ? el("span.key", {}, chart.curves.map((curve, c) => el("span", {}, el(`i.${several ? DASHES[c % DASHES.length] : "solid"}`, { "--hue": several ? "currentColor" : colour(c) }), curve.name)))
    : null;
  const node = makeCard(chart.title, chart.hint, (plot) => Plotly.react(plot, tracesOf(chart, runs, log), layoutOf(log), PLOT), key, button);
  const redrawThis = () => draw(node.card);
  return node;
}

/** Charts worth a place: with data, not silently constant, and none twice within a section. */
function worthDrawing(charts, runs) {
  const known = new Map();
  const kept = [];
  for (const chart of charts) {
    const series = runs.flatMap((run) => chart.curves.map(({ metric }) => run.metrics[metric] ?? []));
    const values = series.flat().filter((value) => value !== null);
    if (!values.length || (chart.quiet !== undefined && values.every((value) => value === chart.quiet))) continue;
    const key = chart.curves.length === 1 ? JSON.stringify(series) : null;
    const twin = key && known.get(key);
    if (twin) {
      twin.hint = [twin.hint, `${chart.title} is the same curve`].filter(Boolean).join("; ");
      continue;
    }
    const copy = { ...chart };
    if (key) known.set(key, copy);
    kept.push(copy);
  }
  return kept;
}

/** Metrics that never change say more in a line than in a chart. */
function splitConstant(charts, runs) {
  const constant = [], moving = [];
  for (const chart of charts) {
    const values = chart.curves.map(({ metric }) => new Set(runs.flatMap((run) => (run.metrics[metric] ?? []).filter((v) => v !== null))));
    if (chart.always || values.some((set) => set.size > 1)) moving.push(chart);
    else {
      chart.curves.forEach(({ name }, c) => {
        if (values[c].size) constant.push({ name: chart.curves.length > 1 || chart.named ? `${chart.title}${chart.named ? ":" : ","} ${name}` : chart.title, value: [...values[c]][0], hint: chart.hint });
      });
    }
  }
  return { constant, moving };
}

function curveControls(runs) {
  const slider = el("input", { type: "range", min: 0, max: 0.98, step: 0.02, value: view.smooth, id: "smooth" });
  const amount = el("output", { for: "smooth" }, "off");
  slider.addEventListener("input", () => {
    view.smooth = Number(slider.value);
    amount.textContent = view.smooth ? view.smooth.toFixed(2) : "off";
    later();
  });
  const later = calmly(redraw, 60);
  const legend = runs.length > 1 ? el("div.legend", { role: "group", "aria-label": "Runs" }, runs.map((run, r) => {
    const button = el("button", { type: "button", "aria-pressed": "true", title: `${run.directory}\nclick to hide or show`, onclick: () => {
      if (!view.hidden.delete(r)) view.hidden.add(r);
      button.setAttribute("aria-pressed", String(!view.hidden.has(r)));
      redraw();
    } }, el("i", { "--hue": run.colour }), run.label);
    return button;
  })) : null;
  const axes = [{ value: "step", text: "steps" }, { value: "minutes", text: "minutes", title: "time that the run itself took, pauses left out" }];
  return el("div.bar", {}, legend, el("span.push"),
    el("label", { for: "smooth", title: "exponential moving average" }, "smoothing"), slider, amount,
    segmented("Horizontal axis", axes, view.axis, (axis) => { view.axis = axis; redraw(); }));
}

function showCurves(place, runs) {
  runs.forEach((run) => { run.minutes = minutesOf(run); });
  const names = [...new Set(runs.flatMap((run) => Object.keys(run.metrics)))];
  const shown = [];
  for (const { title, charts } of arrange(names)) {
    if (title === "Other") shown.push(timingSection(runs));
    const { constant, moving } = splitConstant(worthDrawing(charts, runs), runs);
    if (!moving.length && !constant.length) continue;
    shown.push(el("section.group", {}, el("h2", {}, title),
      moving.length ? el("div.cards", {}, moving.map((chart) => chartCard(chart, runs))) : null,
      constant.length ? el("p.constants", {}, el("span", {}, "throughout:"), constant.map(({ name, value, hint }) => el("span", { title: hint }, `${name} `, el("b", {}, show(value))))) : null));
  }
  const steps = Math.max(0, ...runs.map((run) => (run.metrics.step ?? []).length));
  fill(place, steps
    ? [curveControls(runs), ...shown]
    : el("p.empty", {}, "There are no curves: no step was finished, or there is no metrics.jsonl (the tracker jsonl writes it)."));
}
