// All samples: an index in memory to filter and sort, texts and tokens unpacked a chunk at a time when they are needed.

class Samples {
  constructor(index, vocabulary, runs) {
    Object.assign(this, index);
    this.runs = runs;
    this.words = vocabulary.map(({ ids, texts }) => new Map(ids.map((id, i) => [id, texts[i]])));
    this.response = this.numbers.tokens.map((n, i) => n - this.numbers.prompt[i]);
    this.texts = remembering((chunk) => unpackJson(`texts-${chunk}`), 24);
    this.tokens = remembering((chunk) => unpackColumns(`tokens-${chunk}`), 12);
    this.haystacks = new Map(); // chunk -> texts in lower case, to search
  }

  chunkOf(i) {
    let low = 0, high = this.starts.length - 1;
    while (low < high) {
      const middle = (low + high + 1) >> 1;
      if (this.starts[middle] <= i) low = middle;
      else high = middle - 1;
    }
    return low;
  }

  /** Everything about sample `i`. */
  async read(i) {
    const chunk = this.chunkOf(i);
    const [texts, columns] = await Promise.all([this.texts(chunk), this.tokens(chunk)]);
    let at = 0;
    for (let k = this.starts[chunk]; k < i; k++) at += this.numbers.tokens[k];
    const text = texts.samples[i - this.starts[chunk]];
    const own = Object.fromEntries(Object.entries(columns).map(([name, values]) => [name, values.subarray(at, at + this.numbers.tokens[i])]));
    const { tokens, ...rest } = own;
    return { ...text, prompt: texts.prompts[text.prompt], tokens, columns: rest, index: i };
  }

  /** The text of a token of a run; its number where there is no tokenizer. */
  word(run, id) {
    return this.words[run].get(id) ?? `⟨${id}⟩`;
  }

  get(name, i) {
    return (this.values[name] ?? (name === "response" ? this.response : this.numbers[name]))[i];
  }

  /** Indices of samples that pass, in order; not yet searched. */
  filter({ run, set, status, group, steps, reward }) {
    const { run: runs, set: sets, status: statuses, step, group: groups } = this.numbers;
    const rewards = this.values.reward;
    const kept = [];
    for (let i = 0; i < this.count; i++) {
      if (run !== null && runs[i] !== run) continue;
      if (set !== null && sets[i] !== set) continue;
      if (status !== null && statuses[i] !== status) continue;
      if (group !== null && (groups[i] !== group.id || runs[i] !== group.run || step[i] !== group.step)) continue;
      if (step[i] < steps[0] || step[i] > steps[1]) continue;
      if (reward.some((bound) => bound !== null)) {
        if (rewards[i] === null) continue;
        if (reward[0] !== null && rewards[i] < reward[0]) continue;
        if (reward[1] !== null && rewards[i] > reward[1]) continue;
      }
      kept.push(i);
    }
    return kept;
  }

  /** Those whose prompt, response, label or error contain the text, found chunk by chunk; `told(kept, share)` as it goes. */
  async search(indices, text, told, cancelled) {
    const needle = text.toLowerCase();
    const kept = [];
    let at = 0, last = performance.now();
    while (at < indices.length) {
      const chunk = this.chunkOf(indices[at]);
      const end = this.starts[chunk + 1] ?? this.count;
      const lines = await this.haystack(chunk);
      if (cancelled()) return null;
      for (; at < indices.length && indices[at] < end; at++) {
        if (lines[indices[at] - this.starts[chunk]].includes(needle)) kept.push(indices[at]);
      }
      if (performance.now() - last > 100) {
        told(kept, at / indices.length);
        await new Promise((resolve) => setTimeout(resolve));
        last = performance.now();
      }
    }
    return kept;
  }

  async haystack(chunk) {
    let lines = this.haystacks.get(chunk);
    if (!lines) {
      const { prompts, samples } = await unpackJson(`texts-${chunk}`);
      const said = prompts.map((prompt) => plainText(prompt).toLowerCase());
      lines = samples.map((s) => [said[s.prompt], s.response, s.label, s.error, s.prompt_id].map((part) => plainText(part)).join("\n").toLowerCase());
      this.haystacks.set(chunk, lines);
    }
    return lines;
  }

  sort(indices, key, down) {
    if (key === "order") return down ? indices.slice().reverse() : indices;
    const value = (i) => this.get(key, i);
    const sign = down ? -1 : 1;
    return indices.slice().sort((a, b) => {
      const x = value(a), y = value(b);
      if (x === y) return a - b;
      if (x === null || y === null) return x === null ? 1 : -1; // what has no value comes last either way
      return sign * (x - y);
    });
  }
}

/** Text of a prompt (a string or messages), a label, or whatever a data set holds. */
function plainText(value) {
  if (value === null || value === undefined) return "";
  if (typeof value === "string") return value;
  if (Array.isArray(value) && value.every((part) => part && typeof part === "object" && "role" in part)) {
    return value.map((message) => `${message.role}: ${plainText(message.content)}`).join("\n");
  }
  return JSON.stringify(value);
}
