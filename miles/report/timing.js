// Where the time went: seconds of every phase, step by step and in all.

/** Seconds of a run by phase, `{names, perStep: {name: []}, total: {name: seconds}}`; `other` is the rest of each step. */
function phasesOf(run) {
  const steps = run.metrics["perf/step_time"] ?? [];
  const perStep = {};
  for (const { name, metric } of PHASES) {
    if (run.metrics[metric]) perStep[name] = steps.map((_, i) => run.metrics[metric][i] ?? 0);
  }
  const measured = Object.values(perStep);
  perStep.other = steps.map((whole, i) => Math.max(0, (whole ?? 0) - measured.reduce((sum, values) => sum + values[i], 0)));
  const total = Object.fromEntries(Object.entries(perStep).map(([name, values]) => [name, values.reduce((a, b) => a + b, 0)]));
  return { perStep, total };
}

const phaseColour = (name) => (name === "other" ? PALETTE[7] : colour(PHASES.findIndex((phase) => phase.name === name)));

function timingSection(runs) {
  const timed = runs.filter((run) => (run.metrics["perf/step_time"] ?? []).some(Boolean));
  if (!timed.length) return "";
  const all = timed.map((run) => ({ run, ...phasesOf(run) }));
  const names = [...PHASES.map((phase) => phase.name), "other"].filter((name) => all.some(({ total }) => total[name] > 0));
  const key = () => el("span.key", {}, names.map((name) => el("span", { title: PHASES.find((p) => p.name === name)?.hint }, el("i.block", { "--hue": phaseColour(name) }), name)));
  return el("section.group", {}, el("h2", {}, "Where the time went"), el("div.cards", {},
    makeCard("In all", "seconds; generation, rewards and evaluations count as rollouts, checkpoints as training", (plot) => drawTotals(plot, all, names), key()),
    all.filter(({ run }) => run.metrics.step.length > 1).map(({ run, perStep }) => makeCard(timed.length > 1 ? `Step by step: ${run.label}` : "Step by step", "seconds per step", (plot) => drawSteps(plot, run, perStep, names), key()))));
}

function drawTotals(plot, all, names) {
  const traces = names.map((name) => ({
    type: "bar", orientation: "h", name, y: all.map(({ run }) => run.label), x: all.map(({ total }) => total[name] ?? 0),
    marker: { color: phaseColour(name) }, hovertemplate: `${name}: %{x:.4~g} s<extra></extra>`,
    text: all.map(({ total }) => {
      const share = (total[name] ?? 0) / Object.values(total).reduce((a, b) => a + b, 0);
      return share > 0.05 ? `${Math.round(100 * share)} %` : "";
    }),
    textposition: "inside", insidetextanchor: "middle", textangle: 0, textfont: { color: "#fff" },
  }));
  const layout = layoutOf(false);
  const one = all.length === 1;
  Plotly.react(plot, traces, { ...layout, barmode: "stack", bargap: one ? 0.55 : 0.3, hovermode: "closest",
    xaxis: { ...layout.xaxis, ticksuffix: " s" }, yaxis: { ...layout.yaxis, type: "category", autorange: "reversed", showticklabels: !one, ticklabelstandoff: 4 } }, PLOT);
}

function drawSteps(plot, run, perStep, names) {
  const x = view.axis === "step" ? run.metrics.step : run.minutes;
  const traces = names.map((name) => ({
    name, x, y: smoothed(perStep[name] ?? x.map(() => 0), view.smooth), stackgroup: "time", mode: "none",
    fillcolor: phaseColour(name), hovertemplate: "%{y:.3~g} s",
  }));
  Plotly.react(plot, traces, layoutOf(false), PLOT);
}
