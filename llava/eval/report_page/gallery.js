// The pairs: a grid of cards of one height, of which only those near the window exist.

const gallery = $("gallery");
const GAP = 16, MIN_CARD = 264, MAX_CARD = 420, SPARE_ROWS = 2;
// Two lines of each caption and of the reference; of a task, also of the question and one of each value read.
const TEXT_HEIGHT = (two ? 212 : 164) + (TASKS.length ? 44 + 24 * runs.length : 0);
const ratio = Math.min(1.9, Math.max(0.75, data.ratio)); // width / height of the picture box
const cards = new Map(); // index of a pair -> its element
let grid = { columns: 1, width: 0, row: 0 };

// The text with what the search found marked in it.
function marked(text) {
  const wanted = words(state.query.toLowerCase());
  const lower = text.toLowerCase();
  if (!wanted.length || lower.length !== text.length) return [text];
  const pieces = [];
  let done = 0;
  while (done < text.length) {
    let start = -1, size = 0;
    for (const word of wanted) {
      const at = lower.indexOf(word, done);
      if (at >= 0 && (start < 0 || at < start || (at === start && word.length > size))) [start, size] = [at, word.length];
    }
    if (start < 0) break;
    pieces.push(text.slice(done, start), h("mark", {}, text.slice(start, start + size)));
    done = start + size;
  }
  return [...pieces, text.slice(done)];
}

const outcomeChip = (outcome) => h("span", { class: "chip " + (isRight(outcome) ? "right" : "wrong") }, (isRight(outcome) ? "\u2713 " : "\u2717 ") + LABELS[outcome]);
const caption = (text) => (text.trim() ? marked(text) : [h("em", {}, TASKS.length ? "empty answer" : "empty caption")]);

function makeCard(pair) {
  const stage = h("div", { class: "stage" });
  const card = h("article", { class: "card", role: "listitem", tabindex: "-1", "aria-label": pair.uid }, stage, h("div", { class: "card-text" }));
  card.dataset.index = pair.index;
  fillStage(stage, pair);
  return card;
}

function fillText(card, pair) {
  const measure = (run) => (columns.length ? h("span", { class: "score", title: measureName() }, number(pair.said[run].scores[state.column] ?? null, 1)) : null);
  const said = pair.said.map((said, run) =>
    h(
      "div",
      { class: "said" },
      h("div", { class: "said-head" }, badge(run), outcomeChip(said.outcome), h("span", { class: "gap" }), measure(run)),
      h("p", { class: "prediction" }, caption(said.text)),
      readAs(pair, said) === null ? null : h("p", { class: "parsed", title: "As the answer was read" }, "\u2192 ", readAs(pair, said)),
    ),
  );
  const difference = two && columns.length ? valueOf(pair, 2) : null;
  card.querySelector(".card-text").replaceChildren(
    pair.task ? h("p", { class: "question", title: pair.question }, h("b", {}, pair.task), " ", marked(pair.question)) : "",
    ...said,
    pair.references.length ? h("p", { class: "reference", title: "A reference" }, marked(bestReference(pair))) : "",
    h(
      "div",
      { class: "card-foot" },
      h("span", { class: "uid", title: pair.uid }, marked(pair.uid)),
      difference === null ? null : h("span", { class: "delta " + (difference > 0 ? "up" : difference < 0 ? "down" : "") }, signed(difference, 1)),
      h("button", { type: "button", class: "open", tabindex: "-1", "aria-label": `Open ${pair.uid}`, title: "Open (Enter)", onclick: () => openPair(pair) }, "\u2922"),
    ),
  );
}

// Of the references the one that the search found, else the first.
function bestReference(pair) {
  const wanted = words(state.query.toLowerCase());
  return pair.references.find((text) => wanted.length && wanted.every((word) => text.toLowerCase().includes(word))) ?? pair.references[0];
}

function measureGrid() {
  const width = gallery.clientWidth;
  const count = Math.max(1, Math.min(Math.floor((width + GAP) / (MIN_CARD + GAP)), Math.ceil((width + GAP) / (MAX_CARD + GAP)) + 1));
  const card = Math.floor((width - GAP * (count - 1)) / count);
  grid = { columns: count, width: card, picture: Math.round(card / ratio), row: Math.round(card / ratio) + TEXT_HEIGHT + GAP };
  gallery.style.setProperty("--card-width", card + "px");
  gallery.style.setProperty("--picture-height", grid.picture + "px");
  gallery.style.setProperty("--card-height", grid.row - GAP + "px");
}

// Places the cards near the window, and takes away the others; one that has the focus stays.
function place() {
  const rows = Math.ceil(state.shown.length / grid.columns);
  gallery.style.height = `${Math.max(0, rows * grid.row - GAP)}px`;
  const top = gallery.getBoundingClientRect().top;
  const first = Math.max(0, Math.floor(-top / grid.row) - SPARE_ROWS);
  const last = Math.min(rows - 1, Math.floor((innerHeight - top) / grid.row) + SPARE_ROWS);
  const wanted = new Map();
  const want = (at) => at >= 0 && at < state.shown.length && wanted.set(state.shown[at].index, at);
  for (let at = first * grid.columns; at < (last + 1) * grid.columns; at++) want(at);
  want(state.active);
  for (const [index, card] of cards) {
    if (wanted.has(index)) continue;
    if (card.contains(document.activeElement)) document.activeElement.blur();
    card.remove();
    cards.delete(index);
  }
  for (const [index, at] of wanted) {
    let card = cards.get(index);
    if (!card) {
      card = makeCard(pairs[index]);
      cards.set(index, card);
      gallery.append(card);
      card.stale = true;
    }
    if (card.stale) {
      fillText(card, pairs[index]);
      card.stale = false;
    }
    card.style.transform = `translate(${(at % grid.columns) * (grid.width + GAP)}px, ${Math.floor(at / grid.columns) * grid.row}px)`;
    card.setAttribute("aria-posinset", at + 1);
    card.setAttribute("aria-setsize", state.shown.length);
    const active = at === state.active;
    card.tabIndex = active ? 0 : -1;
    for (const inner of card.querySelectorAll("input, button")) inner.tabIndex = active ? 0 : -1;
  }
}

function activate(at, focus = true) {
  if (!state.shown.length) return;
  state.active = Math.min(state.shown.length - 1, Math.max(0, at));
  const top = gallery.getBoundingClientRect().top + Math.floor(state.active / grid.columns) * grid.row;
  const head = $("bar").offsetHeight + 60;
  if (top < head) scrollBy(0, top - head);
  else if (top + grid.row > innerHeight) scrollBy(0, top + grid.row - innerHeight);
  place();
  if (focus) cards.get(state.shown[state.active].index).focus({ preventScroll: true });
}

function startGallery() {
  let waiting = false;
  const soon = () => {
    if (waiting) return;
    waiting = true;
    requestAnimationFrame(() => {
      waiting = false;
      place();
    });
  };
  addEventListener("scroll", soon, { passive: true });
  new ResizeObserver(() => {
    measureGrid();
    soon();
  }).observe(gallery.parentElement);
  gallery.addEventListener("focusin", (event) => {
    const card = event.target.closest(".card");
    const at = card ? state.shown.indexOf(pairs[card.dataset.index]) : -1;
    if (at < 0 || at === state.active) return;
    state.active = at;
    soon();
  });
  gallery.addEventListener("keydown", (event) => {
    if (!event.target.classList.contains("card") || event.ctrlKey || event.metaKey || event.altKey) return;
    const rows = Math.max(1, Math.floor((innerHeight - 120) / grid.row));
    const steps = { ArrowLeft: -1, ArrowRight: 1, ArrowUp: -grid.columns, ArrowDown: grid.columns, PageUp: -rows * grid.columns, PageDown: rows * grid.columns, Home: -Infinity, End: Infinity };
    const pair = pairs[event.target.dataset.index];
    if (event.key in steps) activate(state.active + steps[event.key]);
    else if (event.key === "Enter") openPair(pair);
    else if (event.key === " ") flip(event.target.querySelector(".stage"), pair);
    else return;
    event.preventDefault();
  });
  gallery.addEventListener("dblclick", (event) => {
    const card = event.target.closest(".card");
    if (card) openPair(pairs[card.dataset.index]);
  });
  measureGrid();
  listeners.push(() => {
    state.active = 0;
    for (const card of cards.values()) card.stale = true;
    $("empty").hidden = state.shown.length > 0;
    // Behind the head of the list when the list was cut above the window.
    const top = $("pairs").getBoundingClientRect().top;
    if (top < 0) scrollBy({ top, behavior: "instant" });
    place();
  });
  if (document.readyState === "loading") {
    const fill = () => {
      for (const [index, card] of cards) {
        const stage = card.querySelector(".stage.bare");
        if (stage) fillStage(stage, pairs[index]);
        place();
      }
    };
    const timer = setInterval(fill, 120);
    document.addEventListener("DOMContentLoaded", () => {
      clearInterval(timer);
      skipped = JSON.parse($("skipped").textContent);
      fill();
    });
  } else skipped = JSON.parse($("skipped").textContent);
}
