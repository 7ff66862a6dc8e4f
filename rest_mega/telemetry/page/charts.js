// Curves of every metric, of one run or of several.
const has = prefix => name => name.startsWith(prefix);
const is = (...names) => name => names.includes(name);
const region = name => name.split("/").pop();
const REGIONAL = prefix => name => name.startsWith(prefix) && region(name) in REGION_COLOURS;
const success = name => /^eval\/[^/]+_success$/.test(name);
const plain = name => name.replace(/^eval\//, "").replace(/_success|_entropy/, "");

/** [section, [[title, which metrics, name in the legend]]]; a metric stands in the first that fits. */
const CHARTS = [
  ["Outcome", [
    ["Held-out success", success, plain], ["Held-out success by kind, sampled", has("eval/sampled_success/"), region],
    ["Held-out success by kind, greedy", has("eval/greedy_success/"), region],
    ["Benchmarks", name => /^eval\/(api-bank|bfcl)\//.test(name), name => name.replace(/^eval\//, "")],
    ["Success while training", is("success/train")], ["Reward", has("reward/"), region]]],
  ["Regions", [
    ["Entropy (nats)", REGIONAL("entropy/"), region], ["Weight (mean one)", REGIONAL("weight/"), region],
    ["Share of the gradient", REGIONAL("gradient/"), region], ["Share of trained tokens", REGIONAL("share/"), region],
    ["Held-out entropy (nats)", name => /^eval\/.*_entropy/.test(name), plain],
    ["Variance bound, HM/AM", is("credit/variance_bound_ratio")], ["Entropy of all tokens (nats)", is("entropy/policy")],
    ["Tokens with a gradient (share)", is("credit/tokens_with_gradient")]]],
  ["Optimisation", [
    ["Loss", is("train/loss")], ["Gradient norm", is("train/grad_norm")], ["Learning rate", is("train/lr")],
    ["Skipped steps", is("train/skipped")], ["Clipped (share)", name => name.startsWith("policy/clip"), region]]],
  ["Trainer against engine", [
    ["|trainer - engine| (nats)", is("gap/mean", "gap/p99", "gap/max", "policy/rollout_gap", "policy/rollout_gap_max"), name => name],
    ["|trainer - engine| by region", REGIONAL("gap/"), region], ["Turns that would tokenise otherwise", is("drift/turns")],
    ["Stale tokens (share)", is("rollout/stale_tokens")]]],
  ["Rollouts", [
    ["Tokens per trajectory", is("rollout/length", "rollout/tokens"), region], ["How they end (share)", has("stop/"), region],
    ["Turns", is("rollout/turns")], ["Malformed (share)", is("rollout/malformed")],
    ["Groups of a step", is("groups/trained", "groups/resampled", "groups/carried"), region],
    ["Groups without signal (share)", is("groups/without_signal")]]],
  ["Time", [
    ["Seconds per phase", name => name.startsWith("time/") && name !== "time/elapsed", region],
    ["Trained tokens per second", is("tokens/s")], ["Seconds since the start", is("time/elapsed")]]],
];
const MOST_POINTS = 500;

/** [[section, [[title, names, legend]]]] of the metrics that these runs have. */
function planCharts(runs) {
  const left = new Set(runs.flatMap(run => Object.keys(run.metrics.columns)));
  const take = which => { const found = [...left].filter(which).sort(); found.forEach(n => left.delete(n)); return found; };
  const plan = CHARTS.map(([section, charts]) =>
    [section, charts.map(([title, which, legend]) => [title, take(which), legend]).filter(c => c[1].length)]);
  plan.push(["Everything else", [...left].sort().map(name => [name, [name]])]);
  return plan.filter(section => section[1].length);
}

/** Points of a metric of a run: [steps, values]; smoothed by an exponential mean, at most MOST_POINTS. */
function points(run, name, smooth) {
  const column = run.metrics.columns[name], steps = [], values = [];
  if (!column) return [steps, values];
  let mean = NaN, weight = 0;
  for (let i = 0; i < column.length; i++) {
    if (Number.isNaN(column[i])) continue;
    weight = smooth * weight + 1;
    mean = Number.isNaN(mean) ? column[i] : mean + (column[i] - mean) / weight;
    steps.push(run.metrics.step[i]); values.push(smooth ? mean : column[i]);
  }
  if (steps.length <= MOST_POINTS) return [steps, values];
  const kept = Array.from({ length: MOST_POINTS }, (_, i) => Math.floor((i + 1) * steps.length / MOST_POINTS) - 1);
  return [kept.map(i => steps[i]), kept.map(i => values[i])];
}

class Chart {
  constructor(runs, title, names, legend) {
    this.runs = runs; this.names = names; this.legend = legend || (name => name); this.off = new Set();
    this.node = el("figure", { tabindex: 0, "data-chart": title }, el("figcaption", {}, title));
    this.node.addEventListener("keydown", event => this.key(event));
    this.title = title; this.smooth = 0; this.drawn = false;
  }

  series() {
    const found = [];
    this.runs.forEach((run, r) => this.names.forEach((name, i) => {
      const [steps, values] = points(run, name, this.smooth), label = this.legend(name);
      if (!steps.length) return;
      const colour = this.names.length > 1 ? colourOf(label, i) : RUN_COLOURS[r];
      found.push({ key: r + name, name: label, run: r, steps, values, colour, dash: DASHES[r] });
    }));
    return found;
  }

  draw() {
    this.drawn = true;
    this.lines = this.series();
    const shown = this.lines.filter(l => !this.off.has(l.key));
    const body = el("div", {}, this.plot(shown));
    if (this.lines.length > 1) body.append(this.legendNode());
    this.node.replaceChildren(this.node.firstChild, body);
  }

  plot(lines) {
    const W = 360, H = 160, L = 44, R = 8, T = 8, B = 18;
    const root = svg("svg", { viewBox: `0 0 ${W} ${H}`, role: "img", "aria-label": this.title });
    const all = lines.flatMap(l => l.values).filter(Number.isFinite), steps = lines.flatMap(l => l.steps);
    if (!all.length) return root;
    let x0 = Infinity, x1 = -Infinity, y0 = Infinity, y1 = -Infinity;
    for (const s of steps) { x0 = Math.min(x0, s); x1 = Math.max(x1, s); }
    for (const v of all) { y0 = Math.min(y0, v); y1 = Math.max(y1, v); }
    if (y0 > 0 && y0 < y1 * 0.6) y0 = 0;
    if (y1 === y0) { y1 += Math.abs(y1) / 2 || 0.5; y0 -= Math.abs(y0) / 2 || 0.5; }
    const X = x => L + (x - x0) / (x1 - x0 || 1) * (W - L - R), Y = y => T + (y1 - y) / (y1 - y0) * (H - T - B);
    this.scale = { x0, x1, L, W, R };
    for (let i = 0; i <= 3; i++) {
      const y = y0 + (y1 - y0) * i / 3;
      root.append(svg("line", { class: "axis", x1: L, x2: W - R, y1: Y(y), y2: Y(y) }));
      root.append(svg("text", { x: L - 5, y: Y(y) + 3, "text-anchor": "end" }, number(Number(y.toPrecision(3)))));
    }
    root.append(svg("text", { x: L, y: H - 4 }, "step " + x0), svg("text", { x: W - R, y: H - 4, "text-anchor": "end" }, x1));
    for (const l of lines) {
      let path = "", pen = "M";
      l.steps.forEach((s, j) => {
        if (!Number.isFinite(l.values[j])) { pen = "M"; return; }
        path += pen + X(s).toFixed(1) + " " + Y(l.values[j]).toFixed(1); pen = "L";
      });
      const look = { fill: "none", "stroke-width": 1.6, "stroke-dasharray": l.dash, style: `stroke:${line(l.colour)}` };
      root.append(svg("path", { d: path, ...look }));
      if (l.steps.length < 40) l.steps.forEach((s, j) => Number.isFinite(l.values[j]) &&
        root.append(svg("circle", { cx: X(s), cy: Y(l.values[j]), r: 1.8, style: `fill:${line(l.colour)}` })));
    }
    this.cursor = svg("line", { class: "cursor", y1: T, y2: H - B, x1: -9, x2: -9 });
    root.append(this.cursor);
    root.addEventListener("pointermove", event => this.point(event));
    root.addEventListener("pointerleave", () => { tip(""); this.cursor.setAttribute("x1", -9); this.cursor.setAttribute("x2", -9); });
    this.svg = root; this.visible = lines; this.X = X;
    return root;
  }

  point(event) {
    const box = this.svg.getBoundingClientRect(), { x0, x1, L, W, R } = this.scale;
    const u = (event.clientX - box.left) / box.width * W;
    this.read(x0 + (u - L) / (W - L - R) * (x1 - x0), event);
  }

  /** Show every line's value nearest to a step. */
  read(step, event) {
    const near = l => l.steps.reduce((best, s, j) => Math.abs(s - step) < Math.abs(l.steps[best] - step) ? j : best, 0);
    const found = this.visible.map(l => [l, near(l)]).sort((a, b) => b[0].values[b[1]] - a[0].values[a[1]]);
    if (!found.length) return;
    const nearest = found.map(([l, j]) => l.steps[j]).reduce((a, b) => Math.abs(b - step) < Math.abs(a - step) ? b : a);
    this.at = nearest;
    for (const name of ["x1", "x2"]) this.cursor.setAttribute(name, this.X(nearest));
    const many = this.runs.length > 1;
    tip(`step ${nearest}\n` + found.map(([l, j]) => `${number(l.values[j])}  ${l.name}${many ? ` (run ${l.run + 1})` : ""}`).join("\n"), event);
  }

  key(event) {
    const move = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (!move || !this.visible?.length) return;
    event.preventDefault();
    const steps = this.visible[0].steps, now = steps.indexOf(this.at);
    const box = this.node.getBoundingClientRect();
    this.read(steps[Math.max(0, Math.min(steps.length - 1, now < 0 ? 0 : now + move))], { clientX: box.left + 60, clientY: box.bottom });
  }

  /** One entry per line; where runs share names, one per name, and the cards say how a run is dashed. */
  legendNode() {
    const groups = Map.groupBy(this.lines, l => (this.names.length > 1 ? l.name : `${l.name} (${l.run + 1})`));
    return el("div", { class: "legend" }, ...[...groups].map(([name, lines]) => {
      const { colour, dash } = lines[0], hidden = lines.every(l => this.off.has(l.key));
      const mark = svg("svg", { viewBox: "0 0 22 8" });
      mark.append(svg("line", { x1: 0, x2: 22, y1: 4, y2: 4, "stroke-width": 3, "stroke-dasharray": dash, style: `stroke:${line(colour)}` }));
      const flip = () => { lines.forEach(l => (hidden ? this.off.delete(l.key) : this.off.add(l.key))); this.draw(); };
      return el("button", { type: "button", "aria-pressed": hidden ? "false" : "true", onclick: flip }, mark, name.toLowerCase());
    }));
  }
}

/** The view: charts are drawn when they come into sight. */
function showCurves(root, runs) {
  const charts = [];
  const seen = new IntersectionObserver(entries => entries.forEach(e => {
    const chart = charts.find(c => c.node === e.target);
    if (e.isIntersecting && !chart.drawn) chart.draw();
  }), { rootMargin: "300px" });
  const smooth = select([["0", "no"], ["0.6", "some"], ["0.9", "much"], ["0.97", "very much"]], "0", value =>
    charts.forEach(chart => { chart.smooth = Number(value); if (chart.drawn) chart.draw(); }));
  const find = el("input", { type: "search", placeholder: "metric", "aria-label": "find metrics" });
  root.append(el("div", { class: "bar" }, labelled("smoothing", smooth), labelled("find", find),
    el("span", { class: "soft" }, "click a name to hide its line; with a chart in focus, arrow keys read it")));
  for (const [section, list] of planCharts(runs)) {
    const grid = el("div", { class: "charts" });
    for (const [title, names, legend] of list) {
      const chart = new Chart(runs, title, names, legend);
      charts.push(chart); grid.append(chart.node); seen.observe(chart.node);
    }
    root.append(el("div", { class: "section" }, el("h2", {}, section), grid));
  }
  find.addEventListener("input", () => {
    const word = find.value.toLowerCase();
    charts.forEach(c => { c.node.hidden = !(c.title + " " + c.names.join(" ")).toLowerCase().includes(word); });
    root.querySelectorAll(".section").forEach(s => { s.hidden = !s.querySelector("figure:not([hidden])"); });
  });
}
