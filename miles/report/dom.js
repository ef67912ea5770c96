// Elements and numbers. Text reaches the page through textContent alone: what a model wrote is never read as HTML.

/** An element: `el("button.small", {onclick: f, title: "..."}, "text", otherElement)`. */
function el(what, properties = {}, ...children) {
  const [tag, ...classes] = what.split(".");
  const node = document.createElement(tag || "div");
  if (classes.length) node.className = classes.join(" ");
  for (const [name, value] of Object.entries(properties)) {
    if (value === null || value === undefined || value === false) continue;
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else if (name.startsWith("--")) node.style.setProperty(name, value);
    else node.setAttribute(name, value === true ? "" : value);
  }
  node.append(...children.flat(Infinity).filter((child) => child !== null && child !== undefined && child !== false));
  return node;
}

const byId = (id) => document.getElementById(id);

function fill(node, ...children) {
  node.replaceChildren(...children.flat(Infinity).filter((child) => child !== null && child !== undefined && child !== false));
  return node;
}

/** A number for people: four digits that say something, thousands apart. */
function show(value) {
  if (value === null || value === undefined || Number.isNaN(value)) return "–";
  const size = Math.abs(value);
  if (Number.isInteger(value) && size < 1e15) return value.toLocaleString("en");
  if (size >= 1000) return value.toLocaleString("en", { maximumFractionDigits: 0 });
  if (size >= 0.001) return String(Number(value.toPrecision(4)));
  return value.toExponential(2);
}

function showSeconds(seconds) {
  if (seconds === null || seconds === undefined) return "–";
  if (seconds < 120) return `${Number(seconds.toPrecision(3))} s`;
  const minutes = Math.round(seconds / 60);
  return minutes < 120 ? `${minutes} min` : `${Math.floor(minutes / 60)} h ${minutes % 60} min`;
}

/** Colours of runs or metrics: far apart also for eyes that tell red from green badly, readable on light and dark. */
const PALETTE = ["#3f78d8", "#e0812f", "#2a9d78", "#b3589f", "#b8962a", "#4fa3c7", "#96705b", "#7f8791"];
const colour = (index) => PALETTE[index % PALETTE.length];

/** The value of a CSS variable, for charts, which do not read style sheets. */
const css = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

/** Calls `f` once nothing has called for it in `wait` milliseconds. */
function calmly(f, wait) {
  let timer = 0;
  return (...given) => {
    clearTimeout(timer);
    timer = setTimeout(() => f(...given), wait);
  };
}

/** Choices of which one is pressed: `[{value, text, title}]`; calls `pick(value)`. */
function segmented(label, choices, chosen, pick) {
  const buttons = choices.map(({ value, text, title }) =>
    el("button", { type: "button", title, "data-value": value, "aria-pressed": String(value === chosen), onclick: () => choose(value) }, text));
  function choose(value) {
    for (const button of buttons) button.setAttribute("aria-pressed", String(button.dataset.value === value));
    pick(value);
  }
  return el("div.segmented", { role: "group", "aria-label": label }, buttons);
}
