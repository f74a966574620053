// What the report knows, what the reader asked for, and small helpers.

const $ = (id) => document.getElementById(id);
const data = JSON.parse($("data").textContent);
const { runs, columns } = data;
const two = runs.length === 2;
const SHORT = two ? ["A", "B"] : [""];

// An element with properties and children; strings become text, never markup.
function h(tag, properties = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (value === null || value === undefined || value === false) continue;
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (name === "class") element.className = value;
    else if (name in element && typeof value !== "string") element[name] = value;
    else element.setAttribute(name, value);
  }
  element.append(...children.flat(Infinity).filter((child) => child !== null && child !== undefined));
  return element;
}

const plural = (count, noun) => `${whole(count)} ${noun}${count === 1 ? "" : "s"}`;
const whole = (count) => String(count).replace(/\B(?=(\d{3})+$)/g, "\u2009");
const number = (value, digits = 2) =>
  value === null || value === undefined ? "\u2013" : value.toFixed(digits).replace("-", "\u2212");
const signed = (value, digits = 2) =>
  value === null || value === undefined ? "\u2013" : (value > 0 ? "+" : "") + number(value, digits);
const words = (text) => text.split(/\s+/).filter(Boolean);

// A caption tells change or not; an answer to another task is right or not.
const outcomeOf = (task, changed, told, valid) => {
  if (task && task !== "caption") return told ? "right" : valid ? "wrong" : "unread";
  return changed ? (told ? "hit" : "miss") : told ? "alarm" : "quiet";
};
const pairs = data.pairs.map(([uid, changed, references, said, task = null, question = "", before = []], index) => ({
  index,
  uid,
  changed: changed === 1,
  references,
  task,
  question,
  before, // of a dialogue: the earlier rounds, question and gold answer
  said: said.map(([text, told, scores, earlier = [], parsed = null, valid = true]) => ({
    text,
    told: told === 1,
    scores,
    earlier,
    parsed,
    valid,
    outcome: outcomeOf(task, changed, told, valid),
    length: words(text).length,
  })),
  text: null, // for the search, made when first needed
  wipe: 50,
}));
const byUid = new Map(pairs.map((pair) => [pair.uid, pair]));
const pictured = new Set(data.pictures.chosen);

const OUTCOMES = {
  hit: "change told",
  miss: "missed change",
  alarm: "false alarm",
  quiet: "no change told",
};
const LABELS = { ...OUTCOMES, right: "right", wrong: "not right", unread: "cannot be read" };
const isRight = (outcome) => outcome === "hit" || outcome === "quiet" || outcome === "right";

// Pictures lie behind the script, so the page is there before they are.
function picturesOf(pair) {
  const element = pictured.has(pair.index) && $("pictures-" + pair.index);
  return element ? JSON.parse(element.textContent) : null;
}
let skipped = {};
function whyNoPictures(pair) {
  if (Object.hasOwn(skipped, pair.uid)) return skipped[pair.uid];
  if (!pictured.has(pair.index)) return "no picture of this pair in the report";
  return document.readyState === "loading" ? "loading" : "picture missing from the file";
}
const START = {
  query: "",
  task: "",
  subset: "all",
  outcome: "",
  run: 0, // whose scores: a run, or 2 for the difference
  column: 0,
  low: null,
  high: null,
  sort: columns.length ? "worst" : "given",
  seed: 1,
};
const state = { ...START, layers: new Set(), shown: pairs, active: 0 };

function valueOf(pair, run = state.run) {
  if (run < 2) return pair.said[run].scores[state.column] ?? null;
  const [a, b] = pair.said.map((said) => said.scores[state.column] ?? null);
  return a === null || b === null ? null : b - a;
}

function outcomeFits(pair) {
  if (!state.outcome) return true;
  const [a, b] = pair.said.map((said) => isRight(said.outcome));
  if (state.outcome === "fixed") return !a && b;
  if (state.outcome === "broken") return a && !b;
  if (state.outcome === "both") return !a && !b;
  const [run, wanted] = state.outcome.split(":");
  const outcome = pair.said[Number(run)].outcome;
  return wanted === outcome || (wanted === "right" && isRight(outcome)) || (wanted === "wrong" && !isRight(outcome));
}

function textOf(pair) {
  pair.text ??= [pair.uid, pair.question, ...pair.said.map((said) => said.text), ...pair.references].join("\n").toLowerCase();
  return pair.text;
}

// Mulberry32: the same seed gives everyone the same order.
function dice(seed) {
  let a = seed >>> 0;
  return () => {
    a = (a + 0x6d2b79f5) >>> 0;
    let t = Math.imul(a ^ (a >>> 15), 1 | a);
    t = (t + Math.imul(t ^ (t >>> 7), 61 | t)) ^ t;
    return ((t ^ (t >>> 14)) >>> 0) / 4294967296;
  };
}

function sorted(list) {
  const by = (key, sign) =>
    list
      .map((pair) => [key(pair), pair])
      .sort(([a, p], [b, q]) => (a === null) - (b === null) || sign * (a - b) || p.index - q.index)
      .map(([, pair]) => pair);
  switch (state.sort) {
    case "worst":
      return by(valueOf, 1);
    case "best":
      return by(valueOf, -1);
    case "gain":
      return by((pair) => valueOf(pair, 2), -1);
    case "loss":
      return by((pair) => valueOf(pair, 2), 1);
    case "uid":
      return [...list].sort((p, q) => (p.uid < q.uid ? -1 : 1));
    case "random": {
      const roll = dice(state.seed);
      const keys = pairs.map(roll); // over all pairs: a filter does not change the order
      return by((pair) => keys[pair.index], 1);
    }
    default:
      return [...list];
  }
}

// Everything but the range of scores, which the histogram still shows.
function fits(pair) {
  if (state.subset !== "all" && pair.changed !== (state.subset === "changed")) return false;
  if (state.task && (pair.task ?? "caption") !== state.task) return false;
  if (!outcomeFits(pair)) return false;
  const wanted = words(state.query.toLowerCase());
  return wanted.every((word) => textOf(pair).includes(word));
}
function inRange(pair) {
  if (state.low === null && state.high === null) return true;
  const value = valueOf(pair);
  return value !== null && (state.low === null || value >= state.low) && (state.high === null || value <= state.high);
}

const listeners = [];
function update(changes = {}) {
  Object.assign(state, changes);
  const found = pairs.filter(fits);
  state.shown = sorted(found.filter(inRange));
  for (const listener of listeners) listener(found);
}
