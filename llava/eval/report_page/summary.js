// The upper half: headline figures, table, confusion, distributions, how it was made.

const SUBSETS = ["all", "changed", "unchanged"];
const HEADLINES = ["Sm", "BLEU-4", "METEOR", "ROUGE-L", "CIDEr-D"];
const captions = (row, subset = "all") => row?.captions?.[subset] ?? null;
const METRICS = (() => {
  const names = Object.keys(captions(runs[0].scores.predictions) ?? {});
  return names.filter((name) => name !== "pairs");
})();
const baselines = runs[0].scores.baselines ?? [];
const badge = (run) => (two ? h("span", { class: "badge " + "ab"[run], title: runs[run].name }, SHORT[run]) : null);

const intervalOf = (run, subset, name) => run.scores.intervals?.[subset]?.[name] ?? null;
const versus = data.comparison?.versus[0] ?? null;
const compared = (subset, name) => versus?.differences.find((one) => one.subset === subset && one.metric === name) ?? null;
const chance = (p) => (p < 0.001 ? "p < 0.001" : `p = ${number(p, 3)}`);

// What is shown for one metric: [value, [low, high] or null] of each run, and each baseline's value.
function figure(name) {
  const pick = (row) => (name === "accuracy" ? row?.decision?.accuracy : captions(row)?.[name]) ?? null;
  return {
    own: runs.map((run) => [pick(run.scores.predictions), intervalOf(run, "all", name)]),
    beside: baselines.map((row) => [row.name, pick(row)]),
  };
}

function tile(label, name) {
  const { own, beside } = figure(name);
  const every = [...own.flatMap(([value, interval]) => [value, ...(interval ?? [])]), ...beside.map(([, value]) => value)];
  const top = Math.max(100, ...every.filter((value) => value !== null).map((value) => 1.06 * value));
  const tone = (by) => "delta " + (by < 0 ? "down" : "up");
  const place = (element, value, end = null) => {
    element.style.left = `${(100 * Math.max(0, value)) / top}%`;
    if (end !== null) element.style.width = `${(100 * (end - Math.max(0, value))) / top}%`;
    return element;
  };
  const strip = h("div", { class: "strip", "aria-hidden": "true" });
  for (const [, value] of beside) if (value !== null) strip.append(place(h("i", { class: "base" }), value));
  own.forEach(([value, interval], run) => {
    if (interval) strip.append(place(h("i", { class: "span " + "ab"[run] }), ...interval));
    if (value !== null) strip.append(place(h("i", { class: "dot " + "ab"[run] }), value));
  });
  const figures = own.map(([value, interval], run) =>
    h(
      "div",
      { class: "figure" },
      badge(run),
      h("b", {}, number(value)),
      interval ? h("span", { class: "interval", title: "bootstrap interval" }, `${number(interval[0], 1)} \u2013 ${number(interval[1], 1)}`) : null,
    ),
  );
  const [a, b] = own.map(([value]) => value);
  return h(
    "div",
    { class: "tile" },
    h("div", { class: "tile-head" }, h("span", { class: "name" }, label), two && a !== null && b !== null ? h("span", { class: tone(b - a), title: "B \u2212 A" }, signed(b - a)) : null),
    h("div", { class: "figures" }, figures),
    strip,
    h("dl", {}, beside.map(([of, value]) => h("div", {}, h("dt", {}, of), h("dd", {}, number(value))))),
  );
}

function table() {
  const cell = (value, interval, show = number) =>
    h("td", {}, show(value), interval ? h("small", {}, `${number(interval[0], 1)}\u2013${number(interval[1], 1)}`) : null);
  const difference = (value, found) =>
    h("td", {}, signed(value), found?.interval ? h("small", {}, `${signed(found.interval[0], 1)} to ${signed(found.interval[1], 1)}`) : null, found ? h("small", {}, chance(found.p)) : null);
  const bodies = SUBSETS.map((subset) => {
    const rows = [];
    const own = runs.map((run) => captions(run.scores.predictions, subset));
    own.forEach((scores, run) => {
      if (scores) rows.push([[badge(run), runs[run].name], scores.pairs, METRICS.map((name) => cell(scores[name] ?? null, intervalOf(runs[run], subset, name))), "model"]);
    });
    if (two && own[0] && own[1]) {
      const change = (name) => (own[0][name] == null || own[1][name] == null ? null : own[1][name] - own[0][name]);
      rows.push([["B \u2212 A", versus ? h("small", { class: "under" }, "interval, chance") : null], null, METRICS.map((name) => difference(change(name), compared(subset, name))), "difference"]);
    }
    for (const row of baselines) {
      const scores = captions(row, subset);
      if (scores) rows.push([[row.name], scores.pairs, METRICS.map((name) => cell(scores[name] ?? null)), "baseline"]);
    }
    return h(
      "tbody",
      {},
      rows.map(([name, count, cells, kind], i) =>
        h(
          "tr",
          { class: kind },
          i === 0 ? h("th", { class: "subset", scope: "rowgroup", rowspan: String(rows.length) }, subset, h("small", {}, count === null ? "" : plural(count, "pair"))) : null,
          h("th", { scope: "row", class: "name" }, ...name),
          cells,
        ),
      ),
    );
  });
  $("table").append(
    h("thead", {}, h("tr", {}, h("th", { scope: "col" }, "Pairs"), h("th", { scope: "col" }, "Captions"), METRICS.map((name) => h("th", { scope: "col", class: "number" }, name)))),
    ...bodies,
  );
}

function notes() {
  const lines = ["In percent. Sm is the mean of BLEU-4, METEOR, ROUGE-L and CIDEr-D. CIDEr-D weighs words by the references of the set it is computed on, and says nothing on unchanged pairs alone."];
  const { level, resamples } = runs[0].scores.resampling ?? {};
  if (runs.some((run) => Object.keys(run.scores.intervals ?? {}).length)) lines.push(`Small figures are bootstrap intervals over the pairs${resamples ? `: ${level} %, ${whole(resamples)} resamples` : ""}.`);
  const tokenizers = runs.map((run) => run.scores.tokenizer ?? "release").filter((name) => name !== "release");
  if (tokenizers.length) lines.push(`Words by the tokenizer ${tokenizers.join(" / ")}: published scores of change captions are without it.`);
  for (const row of baselines) if (row.sentences?.length) lines.push(`${row.name}: ${row.sentences.map((text) => `\u201c${text}\u201d`).join(" / ")}`);
  runs.forEach((run, i) => {
    for (const note of run.scores.notes ?? []) lines.push((two ? `${SHORT[i]}: ` : "") + note);
  });
  $("notes").append(...lines.map((line) => h("p", {}, line)));
}

function confusion() {
  const panel = $("decision");
  const matrices = h("div", { class: "matrices" });
  panel.append(matrices);
  runs.forEach((run, index) => {
    const count = (outcome) => captioned.filter((pair) => pair.said[index].outcome === outcome).length;
    const counts = Object.fromEntries(Object.keys(OUTCOMES).map((outcome) => [outcome, count(outcome)]));
    const cell = (outcome, of) => {
      const share = of ? counts[outcome] / of : 0;
      const button = h(
        "button",
        {
          type: "button",
          class: `cell ${isRight(outcome) ? "right" : "wrong"}`,
          "aria-pressed": "false",
          onclick: () => {
            const wanted = `${index}:${outcome}`;
            update({ outcome: state.outcome === wanted ? "" : wanted });
            if (state.outcome) $("pairs").scrollIntoView({ behavior: calm() });
          },
        },
        h("b", {}, whole(counts[outcome])),
        h("span", {}, OUTCOMES[outcome]),
        h("small", {}, of ? `${number(100 * share, 1)} %` : "\u2013"),
      );
      button.dataset.outcome = `${index}:${outcome}`;
      button.style.setProperty("--share", share.toFixed(3));
      return button;
    };
    const changed = counts.hit + counts.miss, unchanged = counts.alarm + counts.quiet;
    matrices.append(
      h(
        "div",
        { class: "confusion", role: "group", "aria-label": `Change decision of ${run.name}` },
        h("span", { class: "corner" }, badge(index)),
        h("span", { class: "col" }, "says change"),
        h("span", { class: "col" }, "says none"),
        h("span", { class: "row" }, "changed", h("small", {}, whole(changed))),
        cell("hit", changed),
        cell("miss", changed),
        h("span", { class: "row" }, "unchanged", h("small", {}, whole(unchanged))),
        cell("alarm", unchanged),
        cell("quiet", unchanged),
      ),
    );
  });
  if (two) {
    const verdict = (kind, label) => {
      const button = h("button", { type: "button", class: "chip-button", "aria-pressed": "false", onclick: () => update({ outcome: state.outcome === kind ? "" : kind }) }, label, " ", h("b", {}, whole(captioned.filter((pair) => {
        const [a, b] = pair.said.map((said) => isRight(said.outcome));
        return kind === "fixed" ? !a && b : kind === "broken" ? a && !b : !a && !b;
      }).length)));
      button.dataset.outcome = kind;
      return button;
    };
    panel.append(h("div", { class: "between" }, verdict("fixed", "B mends"), verdict("broken", "B breaks"), verdict("both", "both wrong")));
  }
  listeners.push(() => {
    for (const button of panel.querySelectorAll("[data-outcome]")) button.setAttribute("aria-pressed", String(button.dataset.outcome === state.outcome));
  });
}

const measureName = () => (columns.length ? columns[state.column] : "");
const calm = () => (matchMedia("(prefers-reduced-motion: reduce)").matches ? "auto" : "smooth");

function legend(...entries) {
  return h("div", { class: "legend" }, entries.filter(Boolean).map(([kind, text]) => h("span", {}, h("i", { class: "key " + kind }), text)));
}

function drawScores(found) {
  const panel = $("score-chart");
  const chosen = new Set(found);
  const values = pairs.map((pair) => valueOf(pair));
  const other = two && state.run < 2 ? pairs.map((pair) => valueOf(pair, 1 - state.run)) : null;
  const bins = binsOf([...values, ...(other ?? [])], 24);
  const title = state.run === 2 ? `B \u2212 A, ${measureName()} of a pair` : `${measureName()} of a pair`;
  const rows = pairs.map((pair, i) => ({ value: values[i], changed: pair.changed, chosen: chosen.has(pair) }));
  const ranged = state.low !== null || state.high !== null;
  const range = ranged ? [state.low ?? bins.low, state.high ?? bins.low + bins.count * bins.step] : null;
  const known = found.map((pair) => valueOf(pair)).filter((value) => value !== null).sort((a, b) => a - b);
  const middle = known.length ? known[known.length >> 1] : null;
  panel.replaceChildren(
    h("div", { class: "panel-head" }, h("h2", {}, title), h("span", { class: "hint" }, ranged ? "click again to clear" : "click or drag to filter")),
    histogram({
      width: panel.clientWidth - 24,
      rows,
      bins,
      line: other,
      range,
      label: `Histogram: ${title}`,
      onRange: (low, high) => update(ranged && (low === null || (low >= range[0] && high <= range[1])) ? { low: null, high: null } : { low, high }),
    }),
    legend(["changed", "changed"], ["unchanged", "unchanged"], other && ["outline", `run ${SHORT[1 - state.run]}, all pairs`]),
    h("p", { class: "aside" }, `median ${number(middle)}`, two && state.run === 2 ? wins(found) : ""),
  );
}

function wins(found) {
  const known = found.map((pair) => valueOf(pair, 2)).filter((value) => value !== null);
  const better = known.filter((value) => value > 0).length, worse = known.filter((value) => value < 0).length;
  return `, B better on ${whole(better)}, worse on ${whole(worse)}, equal on ${whole(known.length - better - worse)}`;
}

function drawLengths(found) {
  const panel = $("length-chart");
  const run = Math.min(state.run, 1);
  const chosen = new Set(found);
  const told = pairs.flatMap((pair) => pair.references.map((text) => words(text).length));
  const most = Math.max(8, ...pairs.flatMap((pair) => pair.said.map((said) => said.length)), told.reduce((a, b) => Math.max(a, b), 0));
  const count = Math.min(most + 1, 41);
  const bins = { low: 0, step: 1, count, at: (value) => Math.min(count - 1, value) };
  const rows = pairs.map((pair) => ({ value: pair.said[run].length, changed: pair.changed, chosen: chosen.has(pair) }));
  const own = found.map((pair) => pair.said[run].length);
  const mean = (list) => (list.length ? list.reduce((a, b) => a + b, 0) / list.length : null);
  panel.replaceChildren(
    h("div", { class: "panel-head" }, h("h2", {}, TASKS.length ? "Words in an answer" : "Words in a caption"), two ? badge(run) : null),
    histogram({ width: panel.clientWidth - 24, rows, bins, line: told, lineScale: pairs.length / Math.max(1, told.length), label: "Histogram: words in a caption", last: most + 1 > count ? "+" : "" }),
    legend(["changed", "changed"], ["unchanged", "unchanged"], told.length ? ["outline", "references"] : null),
    h("p", { class: "aside" }, `mean ${number(mean(own), 1)} words; references ${number(mean(told), 1)}`),
  );
}

function made() {
  const names = [...new Set(runs.flatMap((run) => run.facts.map(([name]) => name)))];
  const facts = runs.map((run) => Object.fromEntries([
    ...run.facts,
    ["predictions, sha256", run.scores.predictions_sha256 ?? "unknown"],
    ["references, sha256", run.scores.references_sha256 ?? "unknown"],
  ]));
  const { images, side, shown } = data.pictures;
  const rest = pairs.length - shown;
  const pictures =
    (shown === 0 ? "none in this report" : images === "embed" ? `embedded, at most ${side} pixels a side` : "linked: they stay where they are, and this file must stay where it is to them") +
    (shown && rest ? `; of ${whole(shown)} of ${whole(pairs.length)} pairs, up to half of them pairs with a wrong change decision, all spread over the scores` : "");
  $("made").append(
    h(
      "div",
      { class: "scroll" },
      h(
        "table",
        { class: "facts" },
        two ? h("thead", {}, h("tr", {}, h("th", {}), runs.map((run, i) => h("th", { scope: "col" }, badge(i), run.name)))) : null,
        h(
          "tbody",
          {},
          [...names, "predictions, sha256", "references, sha256"].map((name) => {
            const own = facts.map((fact) => fact[name] ?? "\u2013");
            return h("tr", { class: two && own[0] !== own[1] ? "differs" : "" }, h("th", { scope: "row" }, name), own.map((text) => h("td", {}, h("code", {}, text))));
          }),
          h("tr", {}, h("th", { scope: "row" }, "pictures"), h("td", { colspan: String(runs.length), id: "pictures-fact" }, pictures)),
        ),
      ),
    ),
  );
  const short = facts.map((fact) => (fact["predictions, sha256"] ?? "").slice(0, 12)).join(" / ");
  $("made-hint").textContent = [facts[0].model, facts[0].data, facts[0].date, short].filter(Boolean).join(" \u00b7 ");
}

function drawSummary() {
  $("top-title").textContent = data.title;
  $("title").textContent = data.title;
  const changed = pairs.filter((pair) => pair.changed).length;
  $("intro").textContent = (data.intro ? data.intro + " " : "") + `${plural(pairs.length, TASKS.length ? "answer" : "pair")} scored: ${whole(changed)} changed, ${whole(pairs.length - changed)} unchanged.`;
  if (two) $("run-names").append(...runs.map((run, i) => h("span", {}, badge(i), run.name)));
  if (versus) $("run-names").after(h("ul", { class: "verdict" }, versus.verdict.split("\n").map((text) => h("li", {}, text))));
  const headlines = [...HEADLINES.map((name) => [name, name]), ["Decision right", "accuracy"]];
  $("tiles").append(...headlines.filter(([, name]) => figure(name).own.some(([value]) => value !== null)).map(([label, name]) => tile(label, name)));
  if (captioned.length) {
    table();
    notes();
    confusion();
  } else {
    $("table").closest(".panel").remove();
    $("decision").remove();
  }
  drawTasks();
  made();
  if (columns.length) listeners.push(drawScores);
  else $("score-chart").remove();
  listeners.push(drawLengths);
  new ResizeObserver(() => {
    const found = pairs.filter(fits);
    if (columns.length) drawScores(found);
    drawLengths(found);
  }).observe($("summary"));
}
