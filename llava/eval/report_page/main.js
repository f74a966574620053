// The tools above the pairs, keys for all of it, and the start.

const way = (id, label) => h("button", { type: "button", class: "plain way", onclick: () => $(id).scrollIntoView({ behavior: calm() }) }, label);
const option = (value, label) => h("option", { value }, label);
const choice = (label, value, options, change) => {
  const select = h("select", { "aria-label": label, onchange: () => change(select.value) }, options);
  select.value = value;
  return h("label", { class: "field" }, h("span", {}, label), select);
};

function buttonsOf(label, key, entries) {
  const buttons = entries.map(([value, text]) => {
    const button = h("button", { type: "button", "aria-pressed": "false", onclick: () => update({ [key]: value }) }, text);
    listeners.push(() => button.setAttribute("aria-pressed", String(state[key] === value)));
    return button;
  });
  return h("div", { class: "segments", role: "group", "aria-label": label }, buttons);
}

function tools() {
  const changed = pairs.filter((pair) => pair.changed).length;
  const search = h("input", { type: "search", id: "search", placeholder: "Search predictions, references, uids", "aria-label": "Search", autocomplete: "off", spellcheck: "false" });
  let timer = 0;
  search.addEventListener("input", () => {
    clearTimeout(timer);
    timer = setTimeout(() => update({ query: search.value }), 80);
  });
  const ofRun = (run) => [
    ["right", "decision right"],
    ["wrong", "decision wrong"],
    ...Object.entries(OUTCOMES),
  ].map(([kind, label]) => option(`${run}:${kind}`, (two ? SHORT[run] + ": " : "") + label));
  const outcome = choice("Decision", "", [
    option("", "any"),
    ...(two ? [option("fixed", "B mends what A got wrong"), option("broken", "B breaks what A got right"), option("both", "both wrong")] : []),
    ...runs.flatMap((_, run) => ofRun(run)),
  ], (value) => update({ outcome: value }));
  const sort = choice("Sort", state.sort, [
    ...(columns.length ? [option("worst", "worst first"), option("best", "best first")] : []),
    ...(two && columns.length ? [option("gain", "B gains most"), option("loss", "B loses most")] : []),
    option("random", "random"),
    option("uid", "uid"),
    option("given", "as given"),
  ], (value) => update({ sort: value }));
  const shuffle = h("button", { type: "button", title: "Another random order", id: "shuffle", onclick: () => update({ seed: state.seed + 1 }) });
  const bound = (key, label) => {
    const input = h("input", { type: "number", step: "any", class: "bound", "aria-label": `${label} score`, placeholder: label, onchange: () => update({ [key]: input.value === "" || Number.isNaN(input.valueAsNumber) ? null : input.valueAsNumber }) });
    listeners.push(() => {
      if (document.activeElement !== input) input.value = state[key] === null ? "" : String(Number(state[key].toFixed(3)));
    });
    return input;
  };
  const measures = columns.length
    ? [
        choice("Score", "0", columns.map((name, i) => option(String(i), name)), (value) => update({ column: Number(value), low: null, high: null })),
        two ? choice("of", "0", [option("0", "A"), option("1", "B"), option("2", "B \u2212 A")], (value) => update({ run: Number(value), low: null, high: null })) : null,
        h("span", { class: "field bounds" }, bound("low", "min"), "\u2013", bound("high", "max")),
      ]
    : [];
  const count = h("output", { class: "count", id: "count", "aria-live": "polite" });
  const reset = h("button", { type: "button", class: "link", id: "reset", onclick: resetAll }, "Reset");
  const more = h("button", { type: "button", id: "more", "aria-expanded": "false", "aria-controls": "filters", onclick: () => more.setAttribute("aria-expanded", String($("tools").classList.toggle("more"))) }, "Filters");
  $("tools").append(
    h("div", { class: "tools-row" }, search, count, reset, more, h("span", { class: "gap" }), layerButtons(), way("summary", "Summary \u2191")),
    h(
      "div",
      { class: "tools-row filters", id: "filters" },
      TASKS.length ? buttonsOf("Task", "task", [["", "All tasks"], ...TASKS.map((name) => [name, `${name} ${whole(pairs.filter((pair) => ofTask(pair, name)).length)}`])]) : null,
      buttonsOf("Subset", "subset", [["all", `All ${whole(pairs.length)}`], ["changed", `Changed ${whole(changed)}`], ["unchanged", `Unchanged ${whole(pairs.length - changed)}`]]),
      outcome,
      ...measures,
      h("span", { class: "gap" }),
      sort,
      shuffle,
    ),
  );
  listeners.push(() => {
    count.textContent = `${whole(state.shown.length)} of ${whole(pairs.length)}`;
    outcome.querySelector("select").value = state.outcome;
    sort.querySelector("select").value = state.sort;
    shuffle.hidden = state.sort !== "random";
    shuffle.textContent = `Shuffle (seed ${state.seed})`;
    reset.hidden = !(state.query || state.task || state.outcome || state.subset !== "all" || state.low !== null || state.high !== null);
  });
}

function resetAll() {
  $("search").value = "";
  update({ query: "", task: "", subset: "all", outcome: "", low: null, high: null });
}

const KEYS = [
  ["Anywhere", [["/", "search"], ["m", two ? "change map of A (n: of B)" : "change map"], ["t", "true mask"], ["?", "these keys"]]],
  ["In the grid", [["Tab", "to the pairs, their wipe, their button"], ["\u2190 \u2192 \u2191 \u2193", "from pair to pair; also Home, End, Page"], ["Enter", "open large"], ["Space", "flip before and after"]]],
  ["One pair", [["j, k", "next, previous"], ["\u2190 \u2192", "wipe"], ["s", "side by side"], ["b", "flip before and after"], ["Esc", "close"]]],
];

function startKeys() {
  const dialog = $("keys");
  dialog.append(
    h("div", { class: "viewer-head" }, h("h2", {}, "Keys"), h("span", { class: "gap" }), h("button", { type: "button", class: "plain", "aria-label": "Close", onclick: () => dialog.close() }, "\u2715")),
    h("div", { class: "keys" }, KEYS.map(([part, keys]) => h("section", {}, h("h3", {}, part), h("dl", {}, keys.map(([key, text]) => h("div", {}, h("dt", {}, h("kbd", {}, key)), h("dd", {}, text))))))),
  );
  dialog.addEventListener("click", (event) => event.target === dialog && dialog.close());
  $("help").addEventListener("click", () => dialog.showModal());
  document.addEventListener("keydown", (event) => {
    const typing = event.target.closest?.("input:not([type=range]), select, textarea");
    if (typing && event.key === "Escape") event.target.blur();
    if (typing || event.ctrlKey || event.metaKey || event.altKey) return;
    const layer = LAYERS.find(({ letter }) => letter === event.key.toLowerCase());
    if (layer) showLayer(layer.key, !state.layers.has(layer.key));
    else if (event.key === "?" && !dialog.open) dialog.showModal();
    else if (event.key === "/" && !viewer.open && !dialog.open) $("search").focus();
    else return;
    event.preventDefault();
  });
}

function startTheme() {
  const button = $("theme");
  const themes = ["system", "light", "dark"];
  const set = (theme) => {
    document.documentElement.dataset.theme = theme;
    button.textContent = { system: "\u25d0", light: "\u25cb", dark: "\u25cf" }[theme];
    button.setAttribute("aria-label", `Colours: ${theme}`);
  };
  button.addEventListener("click", () => set(themes[(themes.indexOf(document.documentElement.dataset.theme) + 1) % 3]));
  set("system");
}

document.documentElement.classList.toggle("two", two);
startTheme();
$("parts").append(way("pairs", "Pairs"));
$("empty-reset").addEventListener("click", resetAll);
drawSummary();
tools();
startKeys();
startGallery();
update();
startViewer();
document.addEventListener("DOMContentLoaded", () => {
  const count = Object.keys(skipped).length;
  if (count) $("pictures-fact").append(`. Pictures of ${plural(count, "pair")} could not be read: ${Object.keys(skipped).slice(0, 20).join(", ")}${count > 20 ? ", \u2026" : ""}`);
});
