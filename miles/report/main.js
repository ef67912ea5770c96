// Start: head and curves as soon as their blocks are there, samples when the page is whole and somebody asks for them.

const TABS = { curves: "Curves", samples: "Samples", settings: "Settings" };

function showTab(name) {
  for (const key of Object.keys(TABS)) {
    byId(key).hidden = key !== name;
    byId(`tab-${key}`).setAttribute("aria-selected", String(key === name));
    byId(`tab-${key}`).tabIndex = key === name ? 0 : -1;
  }
  byId("hint").hidden = true;
  if (name === "samples") loadSamples();
}

function makeTabs() {
  const names = Object.keys(TABS);
  fill(byId("tabs"), names.map((name) => el("button", {
    type: "button", role: "tab", id: `tab-${name}`, "aria-controls": name,
    onclick: () => { history.replaceState(null, "", `#${name}`); showTab(name); },
    onkeydown: (event) => {
      const by = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
      if (!by) return;
      const next = byId(`tab-${names[(names.indexOf(name) + by + names.length) % names.length]}`);
      next.focus();
      next.click();
    },
  }, TABS[name])));
}

const whole = new Promise((resolve) => {
  if (document.readyState === "loading") document.addEventListener("DOMContentLoaded", resolve);
  else resolve();
});
let report = null;
let loading = null;

function loadSamples() {
  loading ??= (async () => {
    const place = byId("samples");
    fill(place, el("p.empty", {}, "Unpacking the samples …"));
    await whole;
    const [index, vocabulary, ending] = await Promise.all(["index", "vocabulary", "ending"].map(unpackJson));
    const notes = notesOf(report.runs, report.runs.map((run, r) => [...leftOut(run), ...ending.notes[r]]));
    if (index.count) new Viewer(place, new Samples(index, vocabulary, report.runs), notes);
    else fill(place, report.runs.map((run) => el("p.empty", {}, `${report.runs.length > 1 ? `${run.label}: ` : ""}No samples are shown: ${run.why_no_samples}.`)), notes);
  })().catch((error) => fail(byId("samples"), error));
}

function fail(place, error) {
  fill(place, el("p.note.error", {}, `This part of the report cannot be shown: ${error.message}`));
}

async function start() {
  report = await unpackJson("overview");
  report.runs.forEach((run, index) => { run.colour = colour(index); });
  showHead(byId("head"), report);
  makeTabs();
  showSettings(byId("settings"), report);
  const asked = location.hash.slice(1);
  showTab(asked in TABS ? asked : "curves");
  await unpackScript("plotly");
  showCurves(byId("curves"), report.runs);
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", redraw);
}

start().catch((error) => fail(byId("curves"), error)).finally(() => { document.documentElement.dataset.ready = "yes"; });
