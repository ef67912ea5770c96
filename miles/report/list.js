// A list of any length: rows of one height, of which only those in view are in the page.

const ROW = 46;

class VirtualList {
  /** `row(i)` makes the content of an item, `pick(i)` is called when one is chosen. */
  constructor(row, pick) {
    this.row = row;
    this.pick = pick;
    this.items = [];
    this.chosen = null;
    this.space = el("div.space");
    this.node = el("div.list", { tabindex: 0, role: "listbox", "aria-label": "Samples", onscroll: () => this.draw() }, this.space);
    this.node.addEventListener("click", (event) => {
      const found = event.target.closest("[data-item]");
      if (found) this.choose(Number(found.dataset.item));
    });
    new ResizeObserver(() => this.draw()).observe(this.node);
  }

  show(items) {
    this.items = items;
    this.space.style.height = `${items.length * ROW}px`;
    this.draw();
  }

  draw() {
    const first = Math.max(0, Math.floor(this.node.scrollTop / ROW) - 4);
    const last = Math.min(this.items.length, first + Math.ceil(this.node.clientHeight / ROW) + 9);
    this.space.replaceChildren(...this.items.slice(first, last).map((item, k) => {
      const node = el("div.row", { role: "option", id: `row-${item}`, "data-item": item, "aria-selected": String(item === this.chosen) }, this.row(item));
      node.style.top = `${(first + k) * ROW}px`;
      return node;
    }));
    if (this.chosen === null) this.node.removeAttribute("aria-activedescendant");
    else this.node.setAttribute("aria-activedescendant", `row-${this.chosen}`);
  }

  choose(item) {
    this.chosen = item;
    const at = this.items.indexOf(item);
    if (at >= 0) {
      const top = at * ROW, { scrollTop, clientHeight } = this.node;
      if (top < scrollTop) this.node.scrollTop = top;
      else if (top + ROW > scrollTop + clientHeight) this.node.scrollTop = top + ROW - clientHeight;
    }
    this.draw();
    this.pick(item);
  }

  /** The item `by` places further on, or the nearest end. */
  move(by) {
    if (!this.items.length) return;
    const at = this.items.indexOf(this.chosen);
    const next = at < 0 ? (by > 0 ? 0 : this.items.length - 1) : Math.min(this.items.length - 1, Math.max(0, at + by));
    this.choose(this.items[next]);
  }
}
