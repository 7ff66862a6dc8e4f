// Elements, numbers in words, and colours that colour-blind readers tell apart.
const $ = id => document.getElementById(id);

/** An element; texts only ever become text nodes, never markup. */
function el(tag, attributes = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else if (name === "style") node.style.cssText = value;
    else if (value !== false && value !== undefined) node.setAttribute(name, value === true ? "" : value);
  }
  node.append(...children.map(child => (typeof child === "number" ? String(child) : child)));
  return node;
}

function svg(tag, attributes, text) {
  const node = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  if (text !== undefined) node.textContent = text;
  return node;
}

const percent = value => (100 * value).toFixed(1) + "%";

function number(value) {
  if (value === null || value === undefined || Number.isNaN(value)) return "–";
  const size = Math.abs(value);
  if (size >= 1e5 || (size && size < 1e-3)) return value.toExponential(2);
  return size >= 100 ? value.toFixed(0) : String(Number(value.toPrecision(4)));
}

function seconds(value) {
  if (value < 1) return (1000 * value).toFixed(value < 0.01 ? 1 : 0) + " ms";
  return value < 120 ? value.toFixed(2) + " s" : (value / 60).toFixed(1) + " min";
}

// Paul Tol's muted scheme, which holds for the common kinds of colour blindness.
const TOL = ["#88ccee", "#cc6677", "#ddcc77", "#117733", "#332288", "#aa4499", "#44aa99", "#999933",
  "#882255", "#999999", "#ee7733"];
const REGION_COLOURS = {
  REASONING: "#88ccee", FORMAT: "#44aa99", TOOL_NAME: "#cc6677", ARG_KEY: "#999933",
  ARG_VALUE: "#117733", ARG_SCAFFOLD: "#ddcc77", SCAFFOLD: "#aa4499", ANSWER: "#332288",
  END_OF_TURN: "#882255", OBSERVATION: "#999999", MALFORMED: "#ee3377",
};
const PHASE_COLOURS = {
  rollout: "#88ccee", score: "#ddcc77", train: "#117733", publish: "#cc6677", evaluate: "#aa4499",
  save: "#999933",
};
const RUN_COLOURS = ["#0077bb", "#ee7733", "#009988", "#aa3377", "#997700", "#777777", "#cc3311", "#44bb99"];
const DASHES = ["", "6 3", "2 3", "8 3 2 3", "1 2", "10 4", "4 2 1 2", "12 3"];

const colourOf = (name, index) => REGION_COLOURS[name] || PHASE_COLOURS[name] || TOL[index % TOL.length];
/** Lines are lifted towards white on a dark page, where indigo would drown. */
const line = colour => `color-mix(in srgb, ${colour} 62%, light-dark(${colour}, #fff))`;

// Cividis: told apart by brightness alone.
const SEQUENTIAL = [[0, 34, 78], [65, 77, 107], [124, 123, 120], [188, 175, 111], [254, 232, 56]];
const DIVERGING = [[33, 102, 172], [146, 197, 222], [247, 247, 247], [253, 184, 99], [179, 88, 6]];

function ramp(stops, fraction) {
  const at = Math.max(0, Math.min(1, fraction)) * (stops.length - 1), low = Math.floor(at);
  const high = Math.min(stops.length - 1, low + 1);
  return stops[low].map((c, i) => Math.round(c + (stops[high][i] - c) * (at - low)));
}

/** Background and a text colour that stands out from it. */
function shade(stops, fraction) {
  const [r, g, b] = ramp(stops, fraction);
  const dark = 0.299 * r + 0.587 * g + 0.114 * b < 140;
  return `background:rgb(${r} ${g} ${b});color:${dark ? "#fff" : "#111"}`;
}

const gradient = stops => `linear-gradient(90deg, ${stops.map(c => `rgb(${c.join(" ")})`).join(", ")})`;

function tip(text, event) {
  const node = $("tip");
  node.hidden = !text;
  if (!text) return;
  node.textContent = text;
  const box = node.getBoundingClientRect();
  const x = event.clientX + 14, y = event.clientY + 14;
  node.style.left = Math.max(4, Math.min(x, innerWidth - box.width - 8)) + "px";
  node.style.top = (y + box.height > innerHeight ? event.clientY - box.height - 8 : y) + "px";
}

function select(options, value, onchange) {
  const node = el("select", { onchange: () => onchange(node.value) });
  for (const [key, text] of options) node.append(new Option(text, key, false, key === value));
  return node;
}

const labelled = (text, node) => el("label", {}, text, node);
