// Tokens of a sample, coloured by what is known of each.

const SHOWN = 4000; // tokens drawn at once; the rest on demand

/** Small values are seen beside large ones; `most` is the largest size of the column in this report. */
const signedRoot = (value, most) => (most ? Math.sign(value) * Math.sqrt(Math.abs(value) / most) : 0);

/** What tokens can be coloured by. `shade(value)` is -1 to 1, or null where there is nothing to show. */
const COLOURINGS = {
  log_prob: { column: "rollout_log_probs", text: "log-prob", title: "of the sampled token, by the engine that sampled it", shade: (v) => Math.sqrt(Math.min(1, Math.max(0, -v / 6))), ends: () => ["certain", "e⁻⁶ or less"], hues: ["--rare", "--rare"] },
  advantage: { column: "advantages", text: "advantage", title: "what the policy was told of this token", shade: signedRoot, ends: (most) => [show(-most), `+${show(most)}`], hues: ["--bad", "--good"] },
  mask: { column: "loss_mask", text: "loss mask", title: "which tokens were learned from", shade: (v) => (v ? 0.75 : null), ends: () => ["not trained", "trained"], hues: ["--trained", "--trained"] },
};

/** Colourings that the samples of this report have data for, columns of plugins included. */
function colouringsFor(columns) {
  const found = {};
  const known = new Set(["tokens", "weight_version"]);
  for (const [key, colouring] of Object.entries(COLOURINGS)) {
    known.add(colouring.column);
    found[key] = { ...colouring, missing: !columns.includes(colouring.column) };
  }
  for (const column of columns.filter((name) => !known.has(name))) {
    found[column] = { column, text: column.replaceAll("_", " "), title: `column ${column}`, shade: signedRoot, ends: (most) => [show(-most), `+${show(most)}`], hues: ["--bad", "--good"] };
  }
  return found;
}

/** Stretches of a sample: prompt, what the model said turn by turn, and what came between from an environment. */
function stretches(sample, promptLength) {
  const total = sample.tokens.length;
  const found = [];
  const add = (kind, start, end, note) => { if (end > start) found.push({ kind, start, end, note }); };
  add("prompt", 0, Math.min(promptLength, total), "");
  let at = promptLength;
  const turns = sample.turns ?? [];
  turns.forEach((turn, k) => {
    add("environment", at, turn.start, "");
    const said = [turn.finish_reason, typeof turn.reward === "number" ? `reward ${show(turn.reward)}` : ""].filter(Boolean).join(", ");
    add("model", turn.start, turn.end, turns.length > 1 ? `turn ${k + 1} · ${said}` : said);
    at = turn.end;
  });
  add(turns.length ? "environment" : "response", at, total, "");
  return found;
}

/** How a token is shown: line ends and tabs are seen and still do their work. */
function tokenText(word) {
  return word.replaceAll("\t", "⇥\t").replaceAll("\r", "␍").replaceAll("\n", "⏎\n");
}

class TokenView {
  constructor(samples, colourings) {
    this.samples = samples;
    this.colourings = colourings;
    this.node = el("div.tokens");
    this.hint = byId("hint");
    this.node.addEventListener("mouseover", (event) => this.explain(event.target.closest("[data-t]")));
    this.node.addEventListener("mouseleave", () => this.explain(null));
    this.node.addEventListener("focusin", (event) => this.explain(event.target.closest("[data-t]")));
  }

  show(sample, colouring) {
    this.sample = sample;
    this.run = this.samples.numbers.run[sample.index];
    this.explain(null);
    this.draw(SHOWN);
    this.paint(colouring);
  }

  draw(limit) {
    const { sample, samples } = this;
    this.spans = [];
    const parts = stretches(sample, samples.numbers.prompt[sample.index]).map(({ kind, start, end, note }) => {
      const text = el("div.text");
      for (let t = start; t < Math.min(end, limit); t++) {
        const span = el("span", { "data-t": t }, tokenText(samples.word(this.run, sample.tokens[t])));
        this.spans.push(span);
        text.append(span);
      }
      const count = `${show(end - start)} token${end - start === 1 ? "" : "s"}`;
      return start >= limit ? null : el(`section.stretch.${kind}`, {}, el("h4", {}, kind, el("small", {}, [count, note].filter(Boolean).join(" · "))), text);
    });
    const rest = sample.tokens.length - limit;
    fill(this.node, parts, rest > 0 ? el("button.more", { type: "button", onclick: () => { this.draw(Infinity); this.paint(this.colouring); } }, `show the other ${show(rest)} tokens`) : null);
  }

  paint(key) {
    this.colouring = key;
    const colouring = this.colourings[key];
    const values = this.sample.columns[colouring?.column];
    const most = this.samples.extents[colouring?.column] ?? 0;
    for (const span of this.spans) {
      const value = values?.[Number(span.dataset.t)];
      const shade = value === undefined || Number.isNaN(value) ? null : colouring.shade(value, most);
      span.className = shade === null ? "" : "shaded";
      if (shade === null) continue;
      span.style.setProperty("--hue", `var(${colouring.hues[shade < 0 ? 0 : 1]})`);
      span.style.setProperty("--much", `${Math.round(Math.min(1, Math.abs(shade)) * 62)}%`);
    }
  }

  /** What is known of a token, beside it. */
  explain(span) {
    this.hint.hidden = !span;
    if (!span) return;
    const t = Number(span.dataset.t), { sample } = this, id = sample.tokens[t];
    const rows = [["token", `${id}`], ["position", `${t}`]];
    for (const [column, values] of Object.entries(sample.columns)) {
      const value = values[t];
      if (Number.isNaN(value)) continue;
      const chance = column.endsWith("log_probs") ? ` (${show(Number((100 * Math.exp(value)).toPrecision(3)))} %)` : "";
      const name = column === "rollout_log_probs" ? "log-prob" : column === "advantages" ? "advantage" : column.replaceAll("_", " ");
      rows.push([name, `${show(Number(value.toFixed(4)))}${chance}`]);
    }
    fill(this.hint, el("code", {}, JSON.stringify(this.samples.word(this.run, id))), el("dl", {}, rows.map(([name, value]) => [el("dt", {}, name), el("dd", {}, value)])));
    const box = span.getClientRects()[0] ?? span.getBoundingClientRect(), own = this.hint.getBoundingClientRect();
    const below = box.bottom + 8 + own.height < innerHeight;
    this.hint.style.left = `${Math.max(8, Math.min(box.left, innerWidth - own.width - 12))}px`;
    this.hint.style.top = `${below ? box.bottom + 8 : Math.max(8, box.top - own.height - 8)}px`;
  }
}

function scaleOf(colouring, most) {
  const [low, high] = colouring.hues, ends = colouring.ends(most);
  const diverging = low !== high;
  return el(`span.scale${diverging ? ".diverging" : ""}`, { "--low": `var(${low})`, "--high": `var(${high})` }, ends[0], el("i"), ends[1]);
}
