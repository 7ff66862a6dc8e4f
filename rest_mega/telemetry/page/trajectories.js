// The list of trajectories with its filters and orders, a pane per run.
const MALFORMED = 1, FAILED_CALL = 2, TRUNCATED = 4;
const FILTERS = {
  all: ["all", () => true],
  success: ["successful", (d, n) => d.success[n] === 1],
  failure: ["failed", (d, n) => d.success[n] === 0],
  malformed: ["malformed replies", (d, n) => d.flags[n] & MALFORMED],
  failedcall: ["failed calls", (d, n) => d.flags[n] & FAILED_CALL],
  truncated: ["truncated", (d, n) => d.flags[n] & TRUNCATED],
  untrained: ["not trained on", (d, n) => Number.isNaN(d.gap[n])],
};
const ORDERS = {
  step: ["in order", (d, n) => n],
  newest: ["newest", (d, n) => -n],
  worst: ["worst reward", (d, n) => d.reward[n]],
  best: ["best reward", (d, n) => -d.reward[n]],
  gap: ["biggest gap to the engine", (d, n) => (Number.isNaN(d.gap[n]) ? Infinity : -d.gap[n])],
  long: ["longest", (d, n) => d.token_at[n] - d.token_at[n + 1]],
};
const ROW = 24;

class Pane {
  constructor(run, view) {
    this.run = run; this.data = run.trajectories; this.view = view; this.at = 0; this.order = [];
    const names = ["step", "prompt", "#", "reward", "gap", "success", "ended"];
    this.head = el("div", { class: "row head" }, ...names.map(name => el("span", {}, name)));
    this.rows = el("div");
    this.list = el("div", { class: "list", tabindex: 0, role: "listbox", "aria-label": "trajectories" }, this.head, this.rows);
    this.list.addEventListener("scroll", () => this.paint());
    this.detail = el("div");
    this.count = el("div", { class: "soft" });
    this.node = el("div", { class: "pane" }, el("div", {}, this.count, this.list), this.detail);
  }

  /** Keep what the filters let through, in their order; stay at the trajectory if it is among them. */
  filter({ keep, order, step, words }) {
    const before = this.order[this.at], d = this.data, rank = ORDERS[order][1];
    const all = Array.from({ length: d.shown }, (_, n) => n);
    const key = all.map(n => rank(d, n));
    this.order = all.filter(n => FILTERS[keep][1](d, n) && (!step || String(d.step[n]) === step) &&
      (!words || `${d.prompt[n]} ${d.kind[n]}\n${textOf(d, n)}`.toLowerCase().includes(words)));
    this.order.sort((a, b) => key[a] - key[b] || a - b);
    const where = this.order.indexOf(before);
    const many = d.of > d.shown ? `, ${d.of} in the run` : "";
    this.count.textContent = `${this.order.length} of ${d.shown}${many}`;
    this.rows.style.height = this.order.length * ROW + "px";
    this.go(order === this.ordered && where >= 0 ? where : 0);
    this.ordered = order;
  }

  /** Only the rows in sight exist. */
  paint() {
    const first = Math.max(0, Math.floor(this.list.scrollTop / ROW) - 8);
    const last = Math.min(this.order.length, first + Math.ceil((this.list.clientHeight || 300) / ROW) + 16);
    const d = this.data, rows = [];
    for (let i = first; i < last; i++) {
      const n = this.order[i], good = d.success[n];
      const cells = [d.step[n], d.prompt[n], d.sibling[n], number(Number(d.reward[n].toPrecision(3))), number(d.gap[n]),
        good < 0 ? "–" : good ? "✓" : "✗", d.stop[n] + (d.flags[n] & MALFORMED ? ", malformed" : "")];
      rows.push(el("div", { class: "row" + (i === this.at ? " on" : ""), role: "option", "aria-selected": i === this.at ? "true" : "false",
        style: `top:${ROW * (i + 1)}px`, onclick: () => this.go(i, true) },
        ...cells.map((c, k) => el("span", { class: k === 5 && good >= 0 ? (good ? "ok" : "bad") : "", title: c }, c))));
    }
    this.rows.replaceChildren(...rows);
  }

  go(i, chosen = false) {
    this.at = Math.max(0, Math.min(this.order.length - 1, i));
    const top = this.at * ROW;
    if (top < this.list.scrollTop) this.list.scrollTop = top;
    else if (top + 2 * ROW > this.list.scrollTop + this.list.clientHeight) this.list.scrollTop = top + 2 * ROW - this.list.clientHeight;
    this.paint();
    this.show();
    if (chosen) this.view.chosen(this);
  }

  get current() { return this.order[this.at]; }

  /** Go to the trajectory of the same prompt, nearest in step and sibling. */
  follow(prompt, step, sibling) {
    const d = this.data;
    let best = -1, least = Infinity;
    this.order.forEach((n, i) => {
      const far = Math.abs(d.step[n] - step) * 1000 + Math.abs(d.sibling[n] - sibling);
      if (d.prompt[n] === prompt && far < least) { best = i; least = far; }
    });
    if (best >= 0) this.go(best);
    return best >= 0;
  }

  show() {
    const n = this.current, d = this.data;
    this.tokens = undefined;
    if (n === undefined) { this.detail.replaceChildren(el("p", { class: "soft" }, "No trajectory passes these filters.")); return; }
    const judged = d.success[n] < 0 ? "not judged" : d.success[n] ? "success" : "failure";
    const parts = Object.entries(d.parts).filter(([, v]) => !Number.isNaN(v[n])).map(([k, v]) => `${k} ${number(v[n])}`);
    this.tokens = new TokenView(this.run, n, this.view.colour);
    this.detail.replaceChildren(
      el("div", {}, el("b", {}, `${d.kind[n]}: ${d.prompt[n]}`), ` · step ${d.step[n]} · sibling ${d.sibling[n]} · `,
        el("span", { class: d.success[n] > 0 ? "ok" : "bad" }, judged), ` · ended: ${d.stop[n]}`),
      el("div", { class: "soft" }, `reward ${number(d.reward[n])} (${parts.join(", ")}) · advantage ${number(d.advantage[n])} · ` +
        `largest gap ${number(d.gap[n])} nats · ${d.sampled_at[n + 1] - d.sampled_at[n]} of ${d.token_at[n + 1] - d.token_at[n]} tokens sampled`),
      this.tokens.node, el("h2", {}, "Tool calls"), callTable(JSON.parse(d.turns[n])));
  }
}

class TrajectoriesView {
  constructor(root, runs) {
    this.colour = "region"; this.asked = { keep: "all", order: "step", step: "", words: "" };
    this.panes = runs.map(run => new Pane(run, this));
    this.active = this.panes[0];
    const ask = name => value => { this.asked[name] = value; this.filter(); };
    const words = table => Object.entries(table).map(([key, [text]]) => [key, text]);
    const steps = [...new Set(runs.flatMap(run => [...run.trajectories.step]))].sort((a, b) => a - b);
    this.colours = select(words(COLOURINGS), this.colour, value => this.recolour(value));
    this.colours.id = "colour";
    this.search = el("input", { type: "search", id: "search", placeholder: "prompt, kind or text", oninput: () => {
      clearTimeout(this.timer);
      this.timer = setTimeout(() => ask("words")(this.search.value.toLowerCase()), 200);
    } });
    this.link = el("input", { type: "checkbox", checked: true });
    const filter = select(words(FILTERS), "all", ask("keep")), order = select(words(ORDERS), "step", ask("order"));
    filter.id = "filter"; order.id = "order";
    const bar = el("div", { class: "bar" }, labelled("show", filter), labelled("order", order),
      labelled("step", select([["", "any"], ...steps.map(s => [String(s), s])], "", ask("step"))),
      labelled("find", this.search), labelled("colour by", this.colours));
    if (runs.length > 1) bar.append(labelled("same prompt in all", this.link));
    const panes = el("div", { class: runs.length > 1 ? "panes" : "panes single", style: `--panes:${Math.min(runs.length, 3)}` });
    this.panes.forEach((pane, r) => panes.append(runs.length > 1 ? el("div", {}, el("h2", {}, `run ${r + 1}: ${runs[r].title}`), pane.node) : pane.node));
    root.append(bar, panes);
    this.filter();
  }

  filter() {
    this.panes.forEach(pane => pane.filter(this.asked));
    this.chosen(this.active);
  }

  recolour(colour) {
    this.colour = colour; this.colours.value = colour;
    this.panes.forEach(pane => pane.tokens?.recolour(colour));
  }

  /** The reader chose in one pane: the others follow to the same prompt. */
  chosen(pane) {
    this.active = pane;
    const n = pane.current;
    if (n === undefined || !this.link.checked) return;
    const d = pane.data;
    this.panes.forEach(other => other !== pane && other.follow(d.prompt[n], d.step[n], d.sibling[n]));
  }

  key(key) {
    const names = Object.keys(COLOURINGS), to = names[Number(key) - 1];
    if (to) this.recolour(to);
    else if (key === "j" || key === "ArrowDown") this.active.go(this.active.at + 1, true);
    else if (key === "k" || key === "ArrowUp") this.active.go(this.active.at - 1, true);
    else if (key === "]" || key === "[") this.active.tokens?.walk(key === "]" ? 1 : -1);
    else if (key === "/") this.search.focus();
    else return false;
    return true;
  }
}
