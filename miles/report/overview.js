// The head of the page, and the settings: what ran, how it went, and what was different between runs.

const METHOD = [["algorithm", "advantage_estimator"], ["algorithm", "policy_loss"]];

const named = (spec) => (spec && typeof spec === "object" ? spec.name : spec);

function algorithmOf(run) {
  const parts = METHOD.map(([section, key]) => named(run.config[section]?.[key])).filter((name) => name && name !== "none");
  return parts.join(" · ") || "–";
}

/** Mean of the first or the last tenth of a curve: one number that noise does not decide. */
function ends(values) {
  const there = (values ?? []).filter((value) => value !== null);
  if (!there.length) return null;
  const n = Math.max(1, Math.round(there.length / 10));
  const mean = (part) => part.reduce((a, b) => a + b, 0) / part.length;
  return { first: mean(there.slice(0, n)), last: mean(there.slice(-n)) };
}

function median(values) {
  const sorted = (values ?? []).filter((value) => value).sort((a, b) => a - b);
  return sorted.length ? sorted[Math.floor(sorted.length / 2)] : null;
}

const change = (pair) => (pair ? (pair.first === pair.last ? show(pair.last) : `${show(round(pair.first))} → ${show(round(pair.last))}`) : null);
const round = (value) => Number(value.toPrecision(3));

/** What a run came to, `{name: text}`, with the same names for every run that has them. */
function figures(run) {
  const found = {};
  const { metrics, summary } = run;
  const main = metrics["rollout/reward"] ? ["reward", "rollout/reward"] : ["loss", "train/loss"];
  const pair = change(ends(metrics[main[1]]));
  if (pair) found[main[0]] = pair;
  for (const [set, { first, last }] of Object.entries(summary.evaluation ?? {})) {
    const key = last?.accuracy !== undefined ? "accuracy" : "reward";
    if (typeof last?.[key] === "number") found[`${set} ${key}`] = change({ first: first[key], last: last[key] });
  }
  const speed = median(metrics["perf/tokens_per_second"]);
  if (speed) found["tokens/s"] = show(Math.round(speed));
  return found;
}

/** What the figures are, in words: `names` of those that are shown. */
function meaningOf(names) {
  const said = {
    reward: "reward: mean over the first → over the last tenth of the steps",
    loss: "loss: mean over the first → over the last tenth of the steps",
    sets: "evaluation sets: first → last evaluation",
    "tokens/s": "tokens/s: median over the steps",
  };
  const there = new Set(names.map((name) => (name in said ? name : "sets")));
  return there.size ? el("p.muted", {}, Object.keys(said).filter((name) => there.has(name)).map((name) => said[name]).join(" · ")) : null;
}

function when(run) {
  if (!run.ended) return "–";
  const date = new Date(run.ended);
  return Number.isNaN(date.getTime()) ? run.ended : date.toLocaleString("sv").slice(0, 16); // 2026-01-31 17:05
}

const stepsOf = (run) => run.summary.steps ?? Math.max(0, ...(run.metrics.step ?? [0]));

function statusBadge(run) {
  const said = { unfinished: "unfinished: killed, or not ended properly" }[run.status] ?? "";
  return el(`span.status.${run.status}`, { title: said }, run.status);
}

function fact(name, value, title = value) {
  return el("div.fact", {}, el("dt", {}, name), el("dd", { title }, value ?? "–"));
}

/** Of a long path its end, which tells models apart. */
function modelOf(run) {
  const name = run.config.model?.hf_checkpoint;
  return typeof name === "string" && name.length > 36 ? `…/${name.split("/").slice(-2).join("/")}` : name;
}

function showHead(place, report) {
  const { runs } = report;
  const errors = runs.filter((run) => run.summary.error).map((run) =>
    el("p.note.error", {}, runs.length > 1 ? el("b", {}, `${run.label}: `) : null, run.summary.error));
  fill(place, runs.length === 1 ? headOfOne(runs[0]) : headOfSeveral(runs), errors, notesOf(runs, runs.map((run) => run.notes)));
}

function headOfOne(run) {
  const extra = (run.summary.header ?? []).slice(2);
  return [
    el("div.title", {}, el("h1", {}, run.label), statusBadge(run), el("span.push"), el("span.muted", { title: run.directory }, when(run))),
    el("dl.facts", {},
      fact("model", modelOf(run), run.config.model?.hf_checkpoint), fact("algorithm", algorithmOf(run)), fact("steps", show(stepsOf(run))),
      fact("took", showSeconds(run.summary.seconds)), Object.entries(figures(run)).map(([name, value]) => fact(name, value))),
    meaningOf(Object.keys(figures(run))),
    extra.length ? el("p.muted", {}, extra.join(" · ")) : null,
  ];
}

function headOfSeveral(runs) {
  const all = runs.map((run) => ({ "": null, model: modelOf(run), algorithm: algorithmOf(run), steps: show(stepsOf(run)), took: showSeconds(run.summary.seconds), ...figures(run), ended: when(run) }));
  const columns = [...new Set(all.flatMap((row) => Object.keys(row)))].filter((name) => name && name !== "ended");
  columns.push("ended");
  return [
    el("div.title", {}, el("h1", {}, `${runs.length} runs`)),
    el("div.scroll", {}, el("table.runs", {},
      el("thead", {}, el("tr", {}, el("th", { scope: "col" }, "run"), el("th", { scope: "col" }, "status"), columns.map((name) => el("th", { scope: "col" }, name)))),
      el("tbody", {}, runs.map((run, r) => el("tr", {},
        el("th", { scope: "row", title: run.directory }, el("i.swatch", { "--hue": run.colour }), run.label), el("td", {}, statusBadge(run)),
        columns.map((name) => el("td", {}, all[r][name] ?? "–"))))))),
    meaningOf([...new Set(runs.flatMap((run) => Object.keys(figures(run))))]),
  ];
}

/** What the report lacks, as paragraphs: `notes[r]` of run `r`. The first few are open to see. */
function notesOf(runs, notes) {
  const said = runs.flatMap((run, r) => notes[r].map((note) => (runs.length > 1 ? `${run.label}: ${note}` : note)));
  const [some, more] = [said.slice(0, 4), said.slice(4)];
  return [some.map((note) => el("p.note", {}, note)),
    more.length ? el("details.note", {}, el("summary", {}, `${more.length} more notes`), more.map((note) => el("p", {}, note))) : null];
}

/** Which samples the report does not hold, and how to get at them. */
const leftOut = (run) => (run.left_out ? [`${show(run.samples - run.left_out)} of ${show(run.samples)} samples are in this report, the first ones of each step shown; ` +
  `${show(run.left_out)} are left out. For others: miles report ${run.directory} --steps FIRST:LAST, or --samples N for more.`] : []);

function showSettings(place, report) {
  const { runs, differences } = report;
  const table = (head, rows) => el("div.scroll", {}, el("table.plain", {}, el("thead", {}, el("tr", {}, head.map((text) => el("th", { scope: "col" }, text)))), el("tbody", {}, rows)));
  const several = runs.length > 1;
  const parts = [];
  if (several) {
    parts.push(el("h2", {}, "What differs"), differences.length
      ? table(["setting", ...runs.map((run) => run.label)], differences.map(({ key, values }) =>
        el("tr", {}, el("th", { scope: "row" }, key), values.map((value) => el("td.value", {}, value ?? el("span.muted", {}, "not there"))))))
      : el("p.empty", {}, "Nothing: the runs have the same settings."));
  }
  for (const run of runs) {
    const { versions = {}, tokens = {} } = run.summary;
    const counts = Object.entries(tokens).map(([name, count]) => `${show(count)} ${name}`).join(", ");
    parts.push(el("h2", {}, several ? run.label : "The run"),
      el("p.muted", {}, [run.directory, ...(run.summary.header ?? []), counts && `tokens: ${counts}`].filter(Boolean).join(" · ")),
      el("details", { open: !several }, el("summary", {}, "Plugins and versions"),
        table(["plugin", "package", "version", "components"], run.plugins.map((plugin) => el("tr", {},
          el("th", { scope: "row" }, String(plugin.name)), el("td", {}, String(plugin.distribution ?? "–")), el("td", {}, String(plugin.version ?? "–")),
          el("td", {}, plugin.components.join(" · "))))),
        el("p.muted", {}, Object.entries(versions).map(([name, version]) => `${name} ${version}`).join(" · "))),
      el("details", { open: !several }, el("summary", {}, "Settings"), el("pre.settings", {}, run.settings)));
  }
  parts.push(el("p.muted.foot", {}, `written by miles ${report.version}, ${report.written}`));
  fill(place, parts);
}
