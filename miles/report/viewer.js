// The sample viewer: filters above, the list on the left, the chosen sample on the right.

const SORTS = { order: "as it came", reward: "reward", advantage: "advantage", loss: "loss", response: "response length", prompt: "prompt length", step: "step" };

class Viewer {
  constructor(place, samples, notes) {
    this.samples = samples;
    this.asked = 0; // counts questions, so that late answers to earlier ones are dropped
    this.group = null;
    this.colourings = colouringsFor(Object.keys(samples.extents));
    this.colouring = Object.keys(this.colourings).find((key) => !this.colourings[key].missing) ?? "none";
    this.tokens = new TokenView(samples, this.colourings);
    this.list = new VirtualList((i) => this.row(i), (i) => this.open(i));
    this.detail = el("article.detail", { "aria-live": "polite" });
    this.count = el("output.count");
    fill(place, notes, this.filters(), el("div.viewer", {}, this.list.node, this.detail));
    document.addEventListener("keydown", (event) => this.key(event, place));
    this.apply();
  }

  // ------------------------------------------------------------------------------------------------------ filters

  filters() {
    const { samples } = this;
    const later = calmly(() => this.apply(), 180);
    const now = () => this.apply();
    const number = (label, placeholder) => el("input.small", { type: "number", step: "any", "aria-label": label, placeholder, oninput: later });
    const choice = (label, names) => el("select", { "aria-label": label, onchange: now }, el("option", { value: "" }, `every ${label}`), names.map((name, i) => el("option", { value: i }, name)));
    const steps = samples.numbers.step;
    const ends = steps.reduce(([low, high], step) => [Math.min(low, step), Math.max(high, step)], [Infinity, -Infinity]);
    this.inputs = {
      text: el("input.search", { type: "search", placeholder: "search prompts, responses, labels", "aria-label": "Search", oninput: later }),
      run: choice("run", samples.runs.map((run) => run.label)),
      set: choice("set", samples.sets),
      status: choice("status", samples.statuses),
      rewards: [number("lowest reward", "min"), number("highest reward", "max")],
      steps: [number("first step", String(ends[0])), number("last step", String(ends[1]))],
      sort: el("select", { "aria-label": "sort by", onchange: now }, Object.entries(SORTS).map(([key, text]) => el("option", { value: key }, text))),
    };
    this.down = false;
    const direction = el("button", { type: "button", title: "turn the order round", "aria-label": "ascending", onclick: () => {
      this.down = !this.down;
      direction.textContent = this.down ? "↓" : "↑";
      direction.setAttribute("aria-label", this.down ? "descending" : "ascending");
      this.apply();
    } }, "↑");
    const { text, run, set, status, rewards, sort } = this.inputs;
    this.groupChip = el("button.chip", { type: "button", hidden: true, title: "show all prompts again", onclick: () => { this.group = null; this.apply(true); } });
    return el("div.bar.filters", {}, text,
      samples.runs.length > 1 ? run : null, samples.sets.length > 1 ? set : null, status,
      el("span.range", {}, "reward", rewards), el("span.range", {}, "step", this.inputs.steps),
      el("span.range", {}, "sort", sort, direction), this.groupChip, this.count);
  }

  wanted() {
    const number = (input) => (input.value.trim() === "" ? null : Number(input.value));
    const index = (select) => (select.value === "" ? null : Number(select.value));
    const { run, set, status, rewards, steps } = this.inputs;
    return {
      run: index(run), set: index(set), status: index(status), group: this.group, reward: rewards.map(number),
      steps: [number(steps[0]) ?? -Infinity, number(steps[1]) ?? Infinity],
    };
  }

  /** Filter, search and sort as the inputs say; the first one found is opened, or with `keep` the one that is open. */
  async apply(keep = false) {
    const asked = ++this.asked;
    this.groupChip.hidden = this.group === null;
    if (this.group) this.groupChip.textContent = `group ${this.group.id} ✕`;
    const text = this.inputs.text.value.trim();
    let found = this.samples.filter(this.wanted());
    if (text) {
      const told = (kept, share) => { this.count.textContent = `${show(kept.length)} found, searched ${Math.round(100 * share)} %`; };
      found = await this.samples.search(found, text, told, () => asked !== this.asked);
      if (found === null) return;
    }
    found = this.samples.sort(found, this.inputs.sort.value, this.down);
    this.count.textContent = found.length === this.samples.count ? `${show(found.length)} samples` : `${show(found.length)} of ${show(this.samples.count)} samples`;
    this.list.node.scrollTop = 0;
    this.list.show(found);
    if (!found.length) fill(this.detail, el("p.empty", {}, "No sample is like that."));
    else this.list.choose(keep && found.includes(this.list.chosen) ? this.list.chosen : found[0]);
  }

  // --------------------------------------------------------------------------------------------------------- list

  row(i) {
    const { samples } = this;
    const { reward } = samples.values;
    const [prompts, responses] = samples.previews;
    const status = samples.statuses[samples.numbers.status[i]];
    return [
      el("span.line", {},
        samples.runs.length > 1 ? el("i.swatch", { "--hue": samples.runs[samples.numbers.run[i]].colour }) : null,
        el("span.mono.prompt", {}, prompts[i]), el("span.push"), el("b", {}, reward[i] === null ? "" : show(reward[i]))),
      el("span.line.second", {}, el("span.mono", {}, responses[i] || "–"), el("span.push"),
        status === "completed" ? null : el(`span.status.${status}`, {}, status), el("small", {}, `step ${samples.numbers.step[i]}`)),
    ];
  }

  // ------------------------------------------------------------------------------------------------------- detail

  async open(i) {
    const opening = (this.opening = i);
    let sample;
    try {
      sample = await this.samples.read(i);
    } catch (error) {
      if (this.opening === opening) fill(this.detail, el("p.note.error", {}, `Sample cannot be read: ${error.message}`));
      return;
    }
    if (this.opening !== opening) return;
    this.sample = sample;
    fill(this.detail, this.facts(sample), this.colourBar(), this.tokens.node, this.plain(sample));
    this.tokens.show(sample, this.colouring);
    this.detail.scrollTop = 0;
  }

  facts(sample) {
    const { samples } = this, i = sample.index, { numbers, values } = samples;
    const trained = (sample.columns.loss_mask ?? []).reduce((sum, value) => sum + (value || 0), 0);
    const parts = Object.entries(sample.reward_parts ?? {});
    const status = samples.statuses[numbers.status[i]];
    const group = { id: numbers.group[i], run: numbers.run[i], step: numbers.step[i] };
    return el("header", {},
      el("div.title", {}, el("h2", {}, `Sample ${numbers.id[i]}`), el(`span.status.${status}`, {}, status), el("span.push"),
        el("button", { type: "button", title: "the other samples of this prompt", onclick: () => { this.group = group; this.apply(true); } }, `group ${group.id}`),
        el("button", { type: "button", title: "previous (k or ↑)", "aria-label": "previous sample", onclick: () => this.list.move(-1) }, "‹"),
        el("button", { type: "button", title: "next (j or ↓)", "aria-label": "next sample", onclick: () => this.list.move(1) }, "›")),
      el("dl.facts", {}, fact("reward", show(values.reward[i])), parts.map(([name, value]) => fact(name, show(value))),
        fact("advantage", show(values.advantage[i])), fact("loss", show(values.loss[i])),
        fact("tokens", `${numbers.prompt[i]} + ${samples.response[i]}`), fact("trained on", `${trained}`), fact("step", show(numbers.step[i])),
        fact("prompt", String(sample.prompt_id ?? "–")), sample.label === null ? null : fact("label", plainText(sample.label)),
        samples.runs.length > 1 ? fact("run", samples.runs[numbers.run[i]].label) : null),
      sample.error ? el("p.note.error", {}, sample.error) : null);
  }

  colourBar() {
    const choices = Object.entries(this.colourings).map(([value, { text, title, missing }]) => ({ value, text, title: missing ? `${title}: not in these samples` : title }));
    const scale = el("span");
    const paint = (key) => {
      this.colouring = key;
      this.tokens.paint(key);
      said(key);
    };
    const said = (key) => {
      const colouring = this.colourings[key];
      const absent = colouring && !this.sample.columns[colouring.column];
      fill(scale, !colouring ? [] : absent ? el("span.muted", {}, `no ${colouring.text} was written for this sample`) : scaleOf(colouring, this.samples.extents[colouring.column]));
    };
    said(this.colouring);
    return el("div.bar", {}, segmented("Colour tokens by", [...choices, { value: "none", text: "nothing" }], this.colouring, paint), el("span.push"), scale);
  }

  /** Prompt and response as text, for copying, and for what single tokens cannot show. */
  plain(sample) {
    const open = !this.samples.words[this.samples.numbers.run[sample.index]].size; // tokens are numbers there
    return el("details", { open }, el("summary", {}, "As text"), el("h4", {}, "prompt"), el("pre", {}, plainText(sample.prompt)), el("h4", {}, "response"), el("pre", {}, plainText(sample.response)));
  }

  key(event, place) {
    if (place.hidden || event.ctrlKey || event.metaKey || event.altKey) return;
    const typing = /^(INPUT|SELECT|TEXTAREA)$/.test(event.target.tagName);
    if (event.key === "Escape" && typing) {
      event.preventDefault(); // or the browser empties the search field, and tells nobody
      event.target.blur();
    }
    if (typing) return;
    const by = { j: 1, ArrowDown: 1, k: -1, ArrowUp: -1, PageDown: 10, PageUp: -10, Home: -1e9, End: 1e9 }[event.key];
    const moves = by !== undefined && (event.key.length === 1 || !this.detail.contains(event.target));
    if (moves) this.list.move(by);
    else if (event.key === "/") this.inputs.text.focus();
    else return;
    event.preventDefault();
  }
}
