// One trajectory: its tokens coloured by what is asked for, and its tool calls.

/** Ways of colouring: name -> [words, value of sampled token i (undefined: not known), ramp, unit]. */
const COLOURINGS = {
  region: ["region"],
  weight: ["weight", (t, i) => t.weight?.at(i), SEQUENTIAL, ""],
  entropy: ["entropy", (t, i) => t.entropy?.at(i), SEQUENTIAL, "nats"],
  advantage: ["advantage x weight", (t, i) => t.token_advantage && t.token_advantage.at(i) * (t.weight?.at(i) ?? 1), DIVERGING, ""],
  mask: ["mask"],
  gap: ["|trainer - engine| log-prob", (t, i) => t.token_gap && Math.abs(t.token_gap.at(i)), SEQUENTIAL, "nats"],
  logprob: ["log-prob of the engine", (t, i) => t.logprob?.at(i), SEQUENTIAL, "nats"],
};
const WORDS = { weight: "weight", entropy: "entropy", token_advantage: "advantage", logprob: "log-prob of the engine",
  token_gap: "trainer - engine" };
const SEEN_SHOWN = 1500; // characters of a prompt or tool output that are shown unfolded

/** The tokens of trajectory n: text, region, turn, and the index among sampled ones (or -1). */
function tokensOf(data, n) {
  const found = [];
  let sampled = data.sampled_at[n];
  for (let i = data.token_at[n]; i < data.token_at[n + 1]; i++) {
    found.push({ text: data.vocabulary[data.id[i]], region: data.region[i], turn: data.turn[i], at: data.turn[i] < 0 ? -1 : sampled++ });
  }
  return found;
}

const textOf = (data, n) => tokensOf(data, n).map(t => t.text).join("");

/** [low, high] of a colouring over this trajectory; symmetric where the ramp diverges. */
function extent(data, tokens, [, value, stops]) {
  let low = Infinity, high = -Infinity;
  for (const token of tokens) {
    const v = token.at < 0 ? NaN : value(data, token.at);
    if (Number.isFinite(v)) { low = Math.min(low, v); high = Math.max(high, v); }
  }
  if (low > high) return null;
  const far = Math.max(Math.abs(low), Math.abs(high));
  return stops === DIVERGING ? [-far, far] : [low, high];
}

class TokenView {
  constructor(run, n, colour) {
    this.run = run; this.data = run.trajectories; this.n = n; this.colour = colour;
    this.tokens = tokensOf(this.data, n);
    this.box = el("div", { class: "tokens", tabindex: 0, "aria-label": "tokens" });
    this.about = el("div", { class: "soft", "aria-live": "polite", style: "min-height:21px" }, "point at a token, or walk with [ and ]");
    this.legend = el("div", { class: "legend" });
    this.node = el("div", {}, this.legend, this.box, this.about);
    this.box.addEventListener("pointermove", event => {
      const t = event.target.dataset?.t;
      tip(t === undefined ? "" : this.words(Number(t)), event);
    });
    this.box.addEventListener("pointerleave", () => tip(""));
    this.box.addEventListener("click", event => event.target.dataset?.t && this.mark(Number(event.target.dataset.t)));
    this.draw();
  }

  recolour(colour) { this.colour = colour; this.draw(); }

  draw() {
    const kind = COLOURINGS[this.colour], range = kind[1] ? extent(this.data, this.tokens, kind) : null;
    const parts = [];
    let seen = [];
    const flush = () => { if (seen.length) parts.push(this.seen(seen)); seen = []; };
    this.tokens.forEach((token, i) => {
      if (token.at < 0) { seen.push(i); return; }
      flush();
      parts.push(el("span", { "data-t": i, "data-region": token.region, style: this.style(token, kind, range) }, token.text));
    });
    flush();
    this.box.replaceChildren(...parts);
    this.box.classList.remove("dim");
    this.legend.replaceChildren(...this.legendParts(kind, range));
  }

  /** What the policy has not written: one piece of text, folded where it is long. */
  seen(indices) {
    const text = indices.map(i => this.tokens[i].text).join("");
    const style = this.colour === "mask" ? "background:color-mix(in srgb, #999 22%, transparent)" : "";
    const body = el("span", { class: "seen", style }, text);
    if (text.length <= SEEN_SHOWN) return body;
    return el("details", {}, el("summary", {}, `${indices.length} tokens that the policy was shown, ${text.length} characters`), body);
  }

  style(token, kind, range) {
    if (this.colour === "region") {
      const colour = colourOf(this.run.regions[token.region], token.region);
      return `background:color-mix(in srgb, ${colour} 32%, var(--card));box-shadow:inset 0 -2px ${colour}`;
    }
    if (this.colour === "mask") return "background:#0077bb;color:#fff";
    const value = kind[1](this.data, token.at);
    return range && Number.isFinite(value) ? shade(kind[2], (value - range[0]) / (range[1] - range[0] || 1)) : "";
  }

  legendParts(kind, range) {
    if (this.colour === "region") {
      const used = [...new Set(this.tokens.filter(t => t.at >= 0).map(t => t.region))].sort((a, b) => a - b);
      return used.map(r => el("button", { type: "button", onclick: event => this.light(r, event.currentTarget) },
        el("i", { style: `background:${colourOf(this.run.regions[r], r)}` }), this.run.regions[r].toLowerCase()));
    }
    if (this.colour === "mask") return [el("i", { style: "background:#0077bb" }), "sampled: carries loss", el("i", { style: "background:#999" }), "seen: does not"];
    if (!range) return [el("span", { class: "soft" }, "not known of this trajectory: it was not trained on, or the run did not keep it")];
    return [el("span", { class: "scale" }, number(range[0]), el("i", { style: `background:${gradient(kind[2])}` }), number(range[1]), ` ${kind[3]} ${kind[0]}`)];
  }

  /** Only one region in colour; again: all of them. */
  light(region, button) {
    const on = button.classList.toggle("on");
    this.legend.querySelectorAll("button").forEach(b => b !== button && b.classList.remove("on"));
    this.box.classList.toggle("dim", on);
    this.box.querySelectorAll("span[data-t]").forEach(s => s.classList.toggle("lit", Number(s.dataset.region) === region));
  }

  words(t) {
    const token = this.tokens[t], d = this.data;
    const lines = [`${JSON.stringify(token.text)}, token ${t}, turn ${token.turn + 1}, ${this.run.regions[token.region].toLowerCase()}`];
    for (const name of ["weight", "entropy", "token_advantage", "logprob", "token_gap"]) {
      const value = d[name]?.at(token.at);
      if (Number.isFinite(value)) lines.push(`${WORDS[name]} ${number(value)}`);
    }
    return lines.join("\n");
  }

  mark(t) {
    this.box.querySelector(".at")?.classList.remove("at");
    const span = this.box.querySelector(`[data-t="${t}"]`);
    if (!span) return;
    span.classList.add("at"); span.scrollIntoView({ block: "nearest" });
    this.marked = t; this.about.textContent = this.words(t).replaceAll("\n", " · ");
  }

  walk(by) {
    const sampled = this.tokens.map((t, i) => i).filter(i => this.tokens[i].at >= 0);
    const now = sampled.indexOf(this.marked);
    if (sampled.length) this.mark(sampled[Math.max(0, Math.min(sampled.length - 1, now < 0 ? 0 : now + by))]);
  }
}

/** Calls with arguments, output, outcome and time. */
function callTable(turns) {
  const head = ["turn", "call", "outcome", "time", "output"];
  const table = el("table", { class: "calls" }, el("tr", {}, ...head.map(h => el("th", {}, h))));
  turns.forEach((turn, i) => turn.outcomes.forEach((outcome, j) => {
    const call = turn.calls[j], good = outcome.status === "ok";
    const words = call ? `${call.name}(${JSON.stringify(call.arguments, null, 1)})` : "(a reply that does not parse)";
    table.append(el("tr", {}, el("td", {}, i + 1), el("td", {}, el("code", {}, words)),
      el("td", { class: good ? "ok" : "bad" }, (good ? "✓ " : "✗ ") + outcome.status),
      el("td", {}, seconds(outcome.seconds)), el("td", {}, el("code", {}, outcome.content))));
  }));
  return table.rows.length > 1 ? table : el("p", { class: "soft" }, "no tool calls");
}
