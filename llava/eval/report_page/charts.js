// Histograms as SVG: the chosen pairs over all pairs, changed on top of unchanged.

const SVG = "http://www.w3.org/2000/svg";
function s(tag, attributes = {}, ...children) {
  const element = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.append(...children);
  return element;
}

function niceStep(span, steps) {
  const raw = span / steps || 1;
  const power = 10 ** Math.floor(Math.log10(raw));
  return [1, 2, 2.5, 5, 10].map((factor) => factor * power).find((step) => step >= raw - 1e-12);
}

// Bins of equal, round width that hold all values.
function binsOf(values, wanted) {
  const known = values.filter((value) => value !== null);
  let low = Math.min(0, ...known.length ? [known.reduce((a, b) => Math.min(a, b))] : [0]);
  let high = known.length ? known.reduce((a, b) => Math.max(a, b)) : 1;
  const step = niceStep(Math.max(high - low, 1e-9), wanted);
  low = Math.floor(low / step + 1e-9) * step;
  const count = Math.max(1, Math.ceil((high - low) / step + 1e-9));
  return { low, step, count, at: (value) => Math.min(count - 1, Math.max(0, Math.floor((value - low) / step + 1e-9))) };
}

const HEIGHT = 168, PAD = { left: 34, right: 8, top: 8, bottom: 22 };

// width: in pixels; rows: [{value, changed, chosen}]; line: values drawn as an outline; onRange(low, high) makes bars clickable.
function histogram({ width, rows, line, lineScale = 1, bins, label, last = "", range = null, onRange = null }) {
  const WIDTH = Math.max(240, width);
  const counts = Array.from({ length: bins.count }, () => ({ changed: 0, unchanged: 0, all: 0 }));
  for (const { value, changed, chosen } of rows) {
    if (value === null) continue;
    const bin = counts[bins.at(value)];
    bin.all += 1;
    if (chosen) bin[changed ? "changed" : "unchanged"] += 1;
  }
  const outline = new Array(bins.count).fill(0);
  for (const value of line ?? []) if (value !== null) outline[bins.at(value)] += lineScale;

  const most = Math.max(1, ...counts.map((bin) => bin.all), ...outline);
  const rise = niceStep(most, 3);
  const top = Math.ceil(most / rise) * rise;
  const wide = (WIDTH - PAD.left - PAD.right) / bins.count;
  const x = (bin) => PAD.left + bin * wide;
  const y = (count) => HEIGHT - PAD.bottom - (count / top) * (HEIGHT - PAD.top - PAD.bottom);
  const svg = s("svg", { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, class: "histogram" + (onRange ? " active" : ""), role: "img", "aria-label": label });

  for (let count = 0; count <= top + 1e-9; count += rise) {
    svg.append(s("line", { class: "grid", x1: PAD.left, x2: WIDTH - PAD.right, y1: y(count), y2: y(count) }));
    svg.append(s("text", { class: "tick", x: PAD.left - 6, y: y(count) + 3.5, "text-anchor": "end" }, whole(Math.round(count))));
  }
  const shade = s("rect", { class: "range", y: PAD.top, height: HEIGHT - PAD.top - PAD.bottom, visibility: "hidden" });
  svg.append(shade);
  const shadeBins = (from, to) => {
    shade.setAttribute("x", x(Math.min(from, to)));
    shade.setAttribute("width", (Math.abs(to - from) + 1) * wide);
    shade.setAttribute("visibility", "visible");
  };
  if (range) shadeBins(bins.at(range[0]), bins.at(range[1] - bins.step * 1e-6));

  counts.forEach((bin, i) => {
    const inner = Math.max(1, wide - 1);
    const bar = (from, to, kind) => {
      if (to > from) svg.append(s("rect", { class: kind, x: x(i), width: inner, y: y(to), height: y(from) - y(to) }));
    };
    bar(0, bin.all, "ghost");
    bar(0, bin.unchanged, "unchanged");
    bar(bin.unchanged, bin.unchanged + bin.changed, "changed");
  });
  if (line) {
    const steps = outline.map((count, i) => `${i ? "L" : "M"}${x(i)},${y(count)}H${x(i + 1)}`);
    svg.append(s("path", { class: "outline", d: steps.join("") }));
  }
  const nice = niceStep(bins.step * bins.count, WIDTH / 70);
  const digits = nice < 1 ? 1 : 0;
  for (let value = Math.ceil(bins.low / nice - 1e-9) * nice; value <= bins.low + bins.step * bins.count + 1e-9; value += nice) {
    const at = PAD.left + ((value - bins.low) / bins.step) * wide;
    const anchor = at > WIDTH - PAD.right - 14 ? "end" : "middle";
    svg.append(s("text", { class: "tick", x: at, y: HEIGHT - 6, "text-anchor": anchor }, number(value + 0, digits).replace("\u22120", "0") + (last && value + nice > bins.low + bins.step * bins.count ? last : "")));
  }
  const target = (event) => {
    const box = svg.getBoundingClientRect();
    const bin = Math.floor((((event.clientX - box.left) / box.width) * WIDTH - PAD.left) / wide);
    return Math.min(bins.count - 1, Math.max(0, bin));
  };
  const hint = s("title");
  svg.prepend(hint);
  let from = null;
  svg.addEventListener("pointermove", (event) => {
    const i = target(event);
    const low = bins.low + i * bins.step;
    const said = bins.step === 1 && last ? `${whole(low)}` : `${number(low, digits)} to ${number(low + bins.step, digits)}`;
    hint.textContent = `${said}: ${whole(counts[i].changed)} changed, ${whole(counts[i].unchanged)} unchanged of ${whole(counts[i].all)}`;
    if (from !== null) shadeBins(from, i);
  });
  if (onRange) {
    svg.addEventListener("pointerdown", (event) => {
      if (event.button) return;
      from = target(event);
      svg.setPointerCapture(event.pointerId);
      shadeBins(from, from);
    });
    svg.addEventListener("pointerup", (event) => {
      if (from === null) return;
      const to = target(event);
      const [a, b] = [Math.min(from, to), Math.max(from, to)];
      from = null;
      onRange(bins.low + a * bins.step, bins.low + (b + 1) * bins.step);
    });
    svg.addEventListener("pointercancel", () => {
      from = null;
      onRange(null, null);
    });
  }
  return svg;
}
