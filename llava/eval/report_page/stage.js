// Two dates on top of each other with a wipe between them, and layers over both.

const LAYERS = [
  ...runs.map((_, run) => ({ key: "map" + run, label: two ? `Map ${SHORT[run]}` : "Change map", letter: "mn"[run], kind: "map", there: data.layers.maps[run], of: (pictures) => pictures.maps[run] })),
  { key: "truth", label: "True mask", letter: "t", kind: "truth", there: data.layers.truth, of: (pictures) => pictures.truth },
].filter(({ there }) => there);

// Fills a `.stage` element; returns whether the pictures are there.
function fillStage(stage, pair, { large = false } = {}) {
  const pictures = picturesOf(pair);
  stage.replaceChildren();
  stage.classList.toggle("bare", !pictures);
  if (!pictures) {
    stage.append(h("p", { class: "why" }, whyNoPictures(pair)));
    return false;
  }
  const image = (address, kind, text) => {
    const element = h("img", { class: kind, alt: text, decoding: "async", draggable: "false" });
    element.addEventListener("error", () => stage.replaceChildren(h("p", { class: "why" }, `${text} cannot be shown: ${address.startsWith("data:") ? "damaged" : decodeURI(address)}`)));
    element.src = address;
    return element;
  };
  const [width, height] = pictures.size;
  stage.style.setProperty("--shape", `${width} / ${height}`);
  stage.style.setProperty("--shape-number", String(width / height));
  const frame = h("div", { class: "frame" });
  frame.append(image(pictures.before, "before", "Before"), image(pictures.after, "after", "After"));
  for (const { key, kind, of, label } of LAYERS) {
    const address = of(pictures);
    if (!address) continue;
    const element = image(address, `layer ${kind}`, label);
    element.dataset.layer = key;
    element.hidden = !state.layers.has(key);
    frame.append(element);
  }
  const slider = h("input", {
    type: "range",
    min: "0",
    max: "100",
    step: "1",
    value: String(pair.wipe),
    "aria-label": `Wipe between before and after of ${pair.uid}`,
    tabindex: large ? "0" : "-1",
  });
  const wipe = () => {
    pair.wipe = Number(slider.value);
    stage.style.setProperty("--wipe", slider.value + "%");
    slider.setAttribute("aria-valuetext", `${slider.value} % before`);
  };
  slider.addEventListener("input", wipe);
  frame.append(h("span", { class: "tag left" }, "before"), h("span", { class: "tag right" }, "after"), h("span", { class: "handle" }), slider);
  stage.append(frame);
  wipe();
  return true;
}

// Before becomes after, and back: what moves is what changed.
function flip(stage, pair) {
  const slider = stage.querySelector("input");
  if (!slider) return;
  slider.value = pair.wipe > 50 ? "0" : "100";
  slider.dispatchEvent(new Event("input"));
}

function showLayer(key, on) {
  if (on) state.layers.add(key);
  else state.layers.delete(key);
  for (const image of document.querySelectorAll(`[data-layer="${key}"]`)) image.hidden = !on;
  for (const button of document.querySelectorAll(`[data-toggle="${key}"]`)) button.setAttribute("aria-pressed", String(on));
}

const layerButtons = (withKeys = false) =>
  LAYERS.map(({ key, label, letter, kind }) => {
    const button = h(
      "button",
      { type: "button", class: "toggle", "aria-pressed": String(state.layers.has(key)), "aria-label": label, title: `${label} (${letter})`, onclick: () => showLayer(key, !state.layers.has(key)) },
      h("i", { class: "swatch " + kind }),
      h("span", {}, label),
      withKeys ? h("kbd", {}, letter) : null,
    );
    button.dataset.toggle = key;
    return button;
  });
