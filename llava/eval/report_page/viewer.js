// One pair, large: two views, all its texts and scores, and the way to its neighbours.

const viewer = $("viewer");
const view = { pair: null, split: false };

// Words that no reference says are marked: there an invention is found first.
function oddWords(text, references) {
  const plain = (word) => word.toLowerCase().replace(/^[^\p{L}\p{N}]+|[^\p{L}\p{N}]+$/gu, "");
  const known = new Set(references.flatMap(words).map(plain));
  return text.split(/(\s+)/).map((piece) => (piece.trim() && references.length && plain(piece) && !known.has(plain(piece)) ? h("span", { class: "odd", title: "in no reference" }, piece) : piece));
}

function scoresTable(pair) {
  const difference = ([a, b]) => (a === null || b === null ? null : b - a);
  return h(
    "table",
    { class: "pair-scores" },
    two ? h("thead", {}, h("tr", {}, h("th", {}), runs.map((_, run) => h("th", { scope: "col" }, badge(run))), h("th", { scope: "col" }, "B \u2212 A"))) : null,
    h(
      "tbody",
      {},
      columns.map((name, i) => {
        const own = pair.said.map((said) => said.scores[i] ?? null);
        return h(
          "tr",
          {},
          h("th", { scope: "row" }, name),
          own.map((value) => h("td", {}, number(value, 1))),
          two ? h("td", { class: "difference" }, signed(difference(own), 1)) : null,
        );
      }),
    ),
  );
}

function drawViewer() {
  const { pair } = view;
  const at = state.shown.indexOf(pair);
  const stage = h("div", { class: "stage large" + (view.split ? " split" : "") });
  const there = fillStage(stage, pair, { large: true });
  const step = (by, label, sign, key) => h("button", { type: "button", class: "plain", disabled: at < 0 || at + by < 0 || at + by >= state.shown.length, "aria-label": label, title: `${label} (${key})`, onclick: () => neighbour(by) }, sign);
  viewer.replaceChildren(
    h(
      "div",
      { class: "viewer-head" },
      h("span", { class: "uid" }, pair.uid),
      h("span", { class: "hint" }, at < 0 ? "not among the pairs shown" : `${whole(at + 1)} of ${whole(state.shown.length)}`),
      h("span", { class: "gap" }),
      step(-1, "Previous pair", "\u2190", "K"),
      step(1, "Next pair", "\u2192", "J"),
      h("button", { type: "button", class: "plain close", "aria-label": "Close", title: "Close (Esc)", onclick: () => viewer.close() }, "\u2715"),
    ),
    h(
      "div",
      { class: "viewer-body" },
      h(
        "div",
        { class: "viewer-stage" },
        stage,
        there
          ? h(
              "div",
              { class: "viewer-tools" },
              h("button", { type: "button", class: "toggle", "aria-pressed": String(view.split), id: "split", onclick: () => setSplit(!view.split) }, "Side by side", h("kbd", {}, "s")),
              h("button", { type: "button", class: "toggle", onclick: () => flip(stage, pair) }, "Flip", h("kbd", {}, "b")),
              h("span", { class: "gap" }),
              layerButtons(true),
            )
          : null,
      ),
      h(
        "div",
        { class: "viewer-text" },
        h("div", { class: "line" }, h("span", { class: "chip" }, pair.changed ? "changed" : "unchanged"), pair.said.map((said, run) => [badge(run), outcomeChip(said.outcome)])),
        roundsOf(pair),
        pair.task ? h("section", {}, h("h3", {}, `Question (${pair.task})`), h("p", { class: "question" }, pair.question)) : null,
        pair.said.map((said, run) => h("section", {}, h("h3", {}, badge(run), two ? runs[run].name : pair.task ? "Answer" : "Prediction"), h("p", { class: "prediction" }, said.text.trim() ? oddWords(said.text, pair.references) : h("em", {}, "empty caption")), readAs(pair, said) === null ? null : h("p", { class: "parsed" }, `read as ${readAs(pair, said)}`))),
        columns.length ? scoresTable(pair) : null,
        h("section", {}, h("h3", {}, pair.task && pair.task !== "caption" ? "Gold answer" : pair.references.length ? `References (${pair.references.length})` : "No references"), h("ol", {}, pair.references.map((text) => h("li", {}, text)))),
      ),
    ),
  );
  (there ? stage.querySelector("input") : viewer.querySelector(".close")).focus();
}

function setSplit(on) {
  view.split = on;
  viewer.querySelector(".stage").classList.toggle("split", on);
  $("split")?.setAttribute("aria-pressed", String(on));
}

const address = (uid) => "#" + encodeURIComponent(uid.toWellFormed?.() ?? uid);

function openPair(pair, { tell = true } = {}) {
  view.pair = pair;
  const at = state.shown.indexOf(pair);
  if (at >= 0) activate(at, false);
  if (!viewer.open) viewer.showModal();
  drawViewer();
  if (tell && location.hash !== address(pair.uid)) history.replaceState(null, "", address(pair.uid));
}

function neighbour(by) {
  const at = state.shown.indexOf(view.pair);
  const next = at < 0 ? undefined : state.shown[at + by];
  if (next) openPair(next);
}

function followAddress() {
  let uid = location.hash.slice(1);
  try {
    uid = decodeURIComponent(uid);
  } catch (error) {
    if (!(error instanceof URIError)) throw error; // typed by hand, with a bare "%": taken as it is
  }
  const pair = byUid.get(uid);
  if (pair) openPair(pair, { tell: false });
  else if (viewer.open) viewer.close();
}

function startViewer() {
  viewer.addEventListener("close", () => {
    history.replaceState(null, "", location.href.split("#")[0]);
    if (state.shown.includes(view.pair)) activate(state.shown.indexOf(view.pair));
    view.pair = null;
    viewer.replaceChildren();
  });
  viewer.addEventListener("click", (event) => event.target === viewer && viewer.close());
  viewer.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    const keys = { j: () => neighbour(1), k: () => neighbour(-1), s: () => setSplit(!view.split), b: () => flip(viewer.querySelector(".stage"), view.pair) };
    const act = keys[event.key.toLowerCase()];
    if (!act) return;
    act();
    event.preventDefault();
  });
  document.addEventListener("DOMContentLoaded", () => view.pair && drawViewer());
  addEventListener("hashchange", followAddress);
  followAddress();
}
