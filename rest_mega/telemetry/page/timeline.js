// Phases of every rank over time, and who waited for whom.

/** Indices of the phases of a rank that belong to the steps first..last. */
function within(timeline, first, last) {
  const found = [];
  for (let i = 0; i < timeline.step.length; i++) {
    if (timeline.step[i] >= first && timeline.step[i] <= last) found.push(i);
  }
  return found;
}

/** Per phase: seconds of the slowest rank, and what each rank waited. */
function waitsByPhase(timelines, first, last) {
  const phases = new Map();
  timelines.forEach((t, r) => {
    const waited = new Float64Array(t.step.length);
    for (let i = 0; i < t.wait_of.length; i++) waited[t.wait_of[i]] += t.wait_seconds[i];
    for (const i of within(t, first, last)) {
      const name = t.names[t.name[i]];
      if (!phases.has(name)) phases.set(name, { seconds: timelines.map(() => 0), waited: timelines.map(() => 0) });
      const phase = phases.get(name);
      phase.seconds[r] += t.seconds[i]; phase.waited[r] += waited[i];
    }
  });
  return phases;
}

class TimelineView {
  constructor(run, title) {
    this.run = run; this.node = el("div", { class: "timeline" });
    const steps = new Set();
    run.timelines.forEach(t => t.step.forEach(s => steps.add(s)));
    this.steps = [...steps].sort((a, b) => a - b);
    this.node.append(el("h2", {}, title));
    if (!this.steps.length) { this.node.append(el("p", { class: "soft" }, "This run kept no timeline (telemetry.timelines).")); return; }
    this.width = 2;
    this.range = el("input", { type: "range", min: 0, max: this.steps.length - 1, value: Math.max(0, this.steps.length - 2),
      "aria-label": "first step shown", oninput: () => this.draw(), style: "width:320px" });
    this.label = el("b");
    const widths = [["1", "1 step"], ["2", "2 steps"], ["5", "5 steps"], ["20", "20 steps"], ["1000000", "all"]];
    this.body = el("div");
    this.node.append(el("div", { class: "bar" }, this.range, this.label,
      labelled("show", select(widths, "2", value => { this.width = Number(value); this.draw(); })), this.legend()), this.body);
    this.draw();
  }

  phases() { return [...new Set(this.run.timelines.flatMap(t => t.names))]; }

  legend() {
    const names = this.phases();
    return el("span", { class: "legend" }, ...names.map((name, i) =>
      el("span", { class: "scale" }, el("i", { style: `width:14px;background:${colourOf(name, i)}` }), name)),
      el("span", { class: "scale ranks" }, el("span", { class: "track", style: "width:26px;height:14px" }, el("i", { class: "wait", style: "left:0;width:26px;top:3px" })), "waiting"));
  }

  draw() {
    const at = Number(this.range.value), first = this.steps[at];
    const last = this.steps[Math.min(this.steps.length - 1, at + this.width - 1)];
    this.label.textContent = first === last ? `step ${first}` : `steps ${first} to ${last}`;
    let t0 = Infinity, t1 = -Infinity;
    const parts = this.run.timelines.map(t => within(t, first, last));
    this.run.timelines.forEach((t, r) => parts[r].forEach(i => {
      t0 = Math.min(t0, t.start[i]); t1 = Math.max(t1, t.start[i] + t.seconds[i]);
    }));
    const rows = el("div", { class: "ranks" });
    this.run.timelines.forEach((t, r) => rows.append(...this.track(t, parts[r], t0, t1 - t0 || 1)));
    this.body.replaceChildren(rows, el("p", { class: "soft" }, `0 to ${seconds(t1 - t0)}, by the first rank's clock`), this.table(first, last));
  }

  track(t, indices, t0, span) {
    const names = this.phases(), track = el("div", { class: "track" }), place = new Map();
    const left = x => `left:${100 * (x - t0) / span}%`, wide = x => `width:${100 * x / span}%`;
    for (const i of indices) {
      const name = t.names[t.name[i]], colour = colourOf(name, names.indexOf(name));
      place.set(i, t.start[i]);
      track.append(el("i", { style: `${left(t.start[i])};${wide(t.seconds[i])};background:${colour}`,
        onpointermove: e => tip(`${name}, step ${t.step[i]}: ${seconds(t.seconds[i])}\nfrom ${seconds(t.start[i] - t0)}`, e),
        onpointerleave: () => tip("") }));
    }
    for (let w = 0; w < t.wait_of.length; w++) {
      if (!place.has(t.wait_of[w])) continue;
      const start = place.get(t.wait_of[w]) + t.wait_at[w];
      track.append(el("i", { class: "wait", style: `${left(start)};${wide(t.wait_seconds[w])}`,
        onpointermove: e => tip(`rank ${t.rank} waits ${seconds(t.wait_seconds[w])}`, e), onpointerleave: () => tip("") }));
    }
    return [el("span", { class: "who", title: t.host }, `rank ${t.rank} `, el("span", { class: "soft" }, t.place)), track];
  }

  table(first, last) {
    const head = ["phase", "slowest rank", "waited, of all ranks' time", "waited most", "waited least: the others waited for it"];
    const table = el("table", {}, el("tr", {}, ...head.map(h => el("th", {}, h))));
    const sum = values => values.reduce((a, b) => a + b, 0), ranks = this.run.timelines;
    const who = (values, r) => `rank ${ranks[r].rank} (${seconds(values[r])})`;
    for (const [name, { seconds: times, waited }] of waitsByPhase(ranks, first, last)) {
      const most = waited.indexOf(Math.max(...waited)), least = waited.indexOf(Math.min(...waited));
      const long = times.indexOf(Math.max(...times)), some = waited[most] > 0.001 && ranks.length > 1;
      table.append(el("tr", {}, el("td", {}, name), el("td", {}, who(times, long)),
        el("td", {}, `${seconds(sum(waited))} (${percent(sum(waited) / (sum(times) || 1))})`),
        el("td", {}, some ? who(waited, most) : "–"), el("td", {}, some ? who(waited, least) : "–")));
    }
    return table;
  }
}

function showTimeline(root, runs) {
  runs.forEach((run, r) => root.append(new TimelineView(run, runs.length > 1 ? `run ${r + 1}: ${run.title}` : "Phases of the ranks").node));
}
