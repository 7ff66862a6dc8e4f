// The page: tabs, theme, keys; a view is made when it is first looked at.
const VIEWS = {
  curves: ["Curves", showCurves], timeline: ["Timeline", showTimeline],
  trajectories: ["Trajectories", (root, runs) => { page.list = new TrajectoriesView(root, runs); }],
  config: ["Config", showConfig],
};
const KEYS = [["c l r g", "curves, timeline, trajectories (r), config (g)"], ["j k", "next and previous trajectory"],
  ["1 ... 7", "colour tokens by region, weight, entropy, advantage, mask, gap, log-prob"],
  ["[ ]", "walk over the sampled tokens"], ["/", "find trajectories"], ["t", "light or dark"], ["?", "these keys"]];
const page = { runs: [], made: new Set(), list: null };

function runCard(run, r) {
  const last = name => { const c = run.metrics.columns[name]; return c ? [...c].filter(v => !Number.isNaN(v)).at(-1) : undefined; };
  const facts = Object.entries(run.outcome).map(([mode, [a, b]]) => [`held-out success, ${mode}`, `${percent(a)} → ${percent(b)}`]);
  facts.push(["steps", run.metrics.step.length ? run.metrics.step.at(-1) : 0]);
  for (const [name, words] of [["reward/mean", "reward"], ["tokens/s", "trained tokens/s"]]) {
    if (last(name) !== undefined) facts.push([words, number(last(name))]);
  }
  const mark = svg("svg", { viewBox: "0 0 26 8", width: 26, height: 8 });
  mark.append(svg("line", { x1: 0, x2: 26, y1: 4, y2: 4, "stroke-width": 3, "stroke-dasharray": DASHES[r], style: `stroke:${line(RUN_COLOURS[r])}` }));
  const name = page.runs.length > 1 ? [mark, `run ${r + 1}: ${run.title}`] : [run.title];
  return el("div", { class: "run" }, el("div", { class: "name" }, ...name),
    el("div", { class: "facts" }, ...facts.map(([words, value]) => el("span", {}, el("b", {}, value), " ", el("span", { class: "soft" }, words)))));
}

function leaves(tree, path = "") {
  return Object.entries(tree).flatMap(([key, value]) => value && typeof value === "object" && !Array.isArray(value) && Object.keys(value).length
    ? leaves(value, path + key + ".") : [[path + key, JSON.stringify(value)]]);
}

/** The configs as the runs saw them; of several runs first what differs. */
function showConfig(root, runs) {
  const maps = runs.map(run => new Map(leaves(run.config))), keys = [...new Set(maps.flatMap(m => [...m.keys()]))];
  const differ = keys.filter(key => new Set(maps.map(m => m.get(key))).size > 1);
  const table = list => el("table", {}, ...list.map(key => el("tr", {}, el("td", {}, el("code", {}, key)),
    ...maps.map(m => el("td", {}, el("code", {}, m.get(key) ?? "–"))))));
  if (runs.length > 1) root.append(el("h2", {}, "What differs"), table(differ));
  root.append(el("h2", {}, "Configuration"), table(keys));
}

function open(name) {
  if (!VIEWS[name]) name = "curves";
  for (const [key] of Object.entries(VIEWS)) {
    $(key).hidden = key !== name;
    $("tab-" + key).setAttribute("aria-selected", key === name ? "true" : "false");
  }
  if (!page.made.has(name)) { page.made.add(name); VIEWS[name][1]($(name), page.runs); }
  page.open = name;
  history.replaceState(null, "", "#" + name);
}

function theme() {
  const dark = matchMedia("(prefers-color-scheme: dark)").matches;
  const now = document.documentElement.dataset.theme || (dark ? "dark" : "light");
  document.documentElement.dataset.theme = now === "dark" ? "light" : "dark";
}

function onKey(event) {
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  if (event.target.closest("input, select, dialog")) { if (event.key === "Escape") event.target.blur(); return; }
  const view = { c: "curves", l: "timeline", r: "trajectories", g: "config" }[event.key];
  if (view) open(view);
  else if (event.key === "t") theme();
  else if (event.key === "?") $("keys").showModal();
  else if (!(page.open === "trajectories" && page.list.key(event.key))) return;
  event.preventDefault();
}

async function start() {
  page.runs = (await readData()).runs;
  $("tabs").append(...Object.entries(VIEWS).map(([name, [words]]) =>
    el("button", { id: "tab-" + name, type: "button", role: "tab", "aria-controls": name, onclick: () => open(name) }, words)));
  $("runs").append(...page.runs.map(runCard));
  $("theme").addEventListener("click", theme);
  $("help").addEventListener("click", () => $("keys").showModal());
  $("keylist").append(...KEYS.flatMap(([key, words]) => [el("dt", {}, key), el("dd", {}, words)]));
  document.addEventListener("keydown", onKey);
  addEventListener("hashchange", () => open(location.hash.slice(1)));
  open(location.hash.slice(1));
  $("state").hidden = true;
  document.documentElement.dataset.ready = Math.round(performance.now());
}

start().catch(error => { $("state").textContent = `This page cannot show its data: ${error}`; throw error; });
