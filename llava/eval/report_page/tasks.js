// What was asked: scores of each task, and the words around an answer.

const TASKS = [...new Set(runs.flatMap((run) => (run.tasks ?? []).map((one) => one.task)))];
const ofTask = (pair, name) => (pair.task ?? "caption") === name;
const captioned = pairs.filter((pair) => ofTask(pair, "caption"));

// A value read from an answer: yes, no, numbers, places.
function readable(value) {
  if (value === null || value === undefined) return null;
  if (typeof value === "boolean") return value ? "yes" : "no";
  if (Array.isArray(value)) return value.length ? value.join(", ") : "none";
  if (typeof value === "object") return Object.entries(value).map(([name, inner]) => `${name}: ${readable(inner) ?? "?"}`).join("; ");
  return String(value);
}
const readAs = (pair, said) => (pair.task && !said.valid ? "cannot be read" : readable(said.parsed));

function taskTable(name, tables) {
  const present = tables.filter(Boolean);
  const first = present[0];
  const measures = Object.keys(first.rows[0].values);
  const rows = [];
  tables.forEach((table, run) => table && rows.push([[badge(run), two ? runs[run].name : "predictions"], table.rows[0], "model"]));
  for (const row of first.rows.slice(1)) rows.push([[row.name], row, /^predictions/.test(row.name) ? "model" : "baseline"]);
  return h(
    "section",
    { class: "task-table" },
    h("h3", {}, name, h("span", { class: "hint" }, first.about)),
    h(
      "div",
      { class: "scroll", tabindex: "0", role: "group", "aria-label": `Scores: ${name}` },
      h(
        "table",
        {},
        h("thead", {}, h("tr", {}, h("th", { scope: "col" }), ["n", "invalid", ...measures].map((text) => h("th", { scope: "col", class: "number" }, text)))),
        h(
          "tbody",
          {},
          rows.map(([title, row, kind]) =>
            h(
              "tr",
              { class: kind },
              h("th", { scope: "row" }, ...title),
              h("td", {}, whole(row.n)),
              h("td", {}, whole(row.n_invalid)),
              measures.map((measure) => h("td", {}, number(row.values[measure] ?? null), row.zero_division.includes(measure) ? h("abbr", { title: "nothing to divide by, counted as 0" }, "*") : null)),
            ),
          ),
        ),
      ),
    ),
  );
}

function taskPanel(name) {
  const own = runs.map((run) => (run.tasks ?? []).find((one) => one.task === name) ?? null);
  // The words of captions have a table of their own above.
  const titles = [...new Set(own.flatMap((one) => (one ? one.tables.map((table) => table.name) : [])))].filter((title) => name !== "caption" || title !== "words");
  if (!titles.length) return null;
  const invalid = own.map((one) => (one ? whole(one.n_invalid) : "\u2013")).join(" / ");
  const notes = own.flatMap((one, run) => (one ? one.notes.map((note) => (two ? `${SHORT[run]}: ` : "") + note) : []));
  const show = () => {
    update({ task: name });
    $("pairs").scrollIntoView({ behavior: calm() });
  };
  return h(
    "details",
    { class: "panel task", open: true },
    h("summary", {}, h("h2", {}, name), h("span", { class: "hint" }, `${plural(own.find(Boolean).n, "answer")}, ${invalid} of them cannot be read`)),
    h("div", { class: "task-tables" }, titles.map((title) => taskTable(title, own.map((one) => one?.tables.find((table) => table.name === title) ?? null)))),
    h("div", { class: "notes" }, notes.map((note) => h("p", {}, note)), h("p", {}, h("button", { type: "button", class: "link", onclick: show }, "Show these answers"))),
  );
}

function drawTasks() {
  if (TASKS.length) $("tasks").append(...TASKS.map(taskPanel).filter(Boolean));
  else $("tasks").remove();
}

// All rounds of a dialogue before the last, with what was said and what is true.
function roundsOf(pair) {
  return pair.before.map(([question, gold], round) =>
    h(
      "section",
      { class: "round" },
      h("h3", {}, `Round ${round + 1}`),
      h("p", { class: "question" }, question),
      pair.said.map((said, run) => h("p", { class: "prediction" }, badge(run), said.earlier[round] ?? "")),
      h("p", { class: "reference" }, gold),
    ),
  );
}
