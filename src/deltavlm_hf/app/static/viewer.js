// The viewer: both dates, one over the other or side by side, and layers over them. Its value is the pair; the layers
// of an answer come from the conversation, as an event.
const find = (selector) => element.querySelector(selector);
const viewer = find(".viewer"), stage = find(".stage"), swipe = find(".swipe"), layerBar = find(".layers");
const panes = { before: find('[data-date="before"]'), after: find('[data-date="after"]') };
const calm = matchMedia("(prefers-reduced-motion: reduce)");
const SECOND_DATE = ["after"], BOTH = ["before", "after"];
// What can lie over the images: on which dates, and whether it shows before anybody asks for it.
const LAYERS = {
  cells: { name: "Answer", dates: BOTH, on: true, opacity: 100 },
  mask: { name: "Mask", dates: SECOND_DATE, on: true, opacity: 70 },
  change: { name: "Change heat", dates: BOTH, on: false, opacity: 80 },
  attention: { name: "Attention", dates: BOTH, on: false, opacity: 90 },
};
const chosen = Object.fromEntries(Object.entries(LAYERS).map(([id, { on, opacity }]) => [id, { on, opacity }]));
const view = { scale: 1, x: 0, y: 0, mode: "swipe", blink: 0 };
let pair = null, turn = null;

function make(tag, attributes = {}, ...children) {
  const made = Object.assign(document.createElement(tag), attributes);
  made.append(...children);
  return made;
}

// --- what is shown

function showPair() {
  pair = props.value || null;
  turn = null;
  for (const date of BOTH) {
    const photo = pair && pair[date], pane = panes[date];
    pane.hidden = !photo;
    if (!photo) continue;
    pane.querySelector("img").src = photo.url;
    pane.querySelector("img").alt = `${date === "before" ? "First" : "Second"} date: ${photo.name}`;
    pane.querySelector(".tag").textContent = `${date === "before" ? "Before" : "After"} · ${photo.name}`;
  }
  const first = pair && (pair.before || pair.after);
  if (first) stage.style.setProperty("--aspect", first.width / first.height);
  viewer.classList.toggle("whole-pair", Boolean(pair && pair.before && pair.after));
  viewer.classList.toggle("empty", !first);
  find(".invitation").hidden = Boolean(pair && pair.before && pair.after);
  if (first && !find(".invitation").hidden)
    find(".invitation").replaceChildren(make("p", { textContent: `Now the image ${pair.before ? "after" : "before"}.` }));
  find(".notices").replaceChildren(
    ...((pair && pair.notices) || []).map((notice) =>
      make("li", {}, notice.text, ...(notice.command ? [" ", make("code", { textContent: notice.command })] : []))));
  zoomTo(1);
  showLayers();
}

function makeLegend() {
  const on = (id) => chosen[id].on && layerBar.querySelector(`[data-layer="${id}"]`);
  const colours = { ...(on("mask") ? pair.mask.colours : {}),
    ...(on("cells") ? Object.fromEntries(turn.cells.map(({ kind, colour }) => [kind, colour])) : {}) };
  const kinds = Object.entries(colours).map(([kind, colour]) => {
    const key = make("span", { className: "key" });
    key.style.background = colour;
    return make("span", { className: "kind" }, key, `${kind}s`);
  });
  const words = on("attention") ? ["Attention is where the model looks, not proof of what its answer rests on."] : [];
  find(".legend").replaceChildren(...kinds, ...words);
}

function contentOf(id, date) {
  if (id === "mask") return pair.mask && make("img", { src: pair.mask.url, alt: "" });
  if (!turn) return null;
  if (id === "cells") return turn.cells && drawCells();
  const url = id === "change" ? turn.change : turn.attention && turn.attention[BOTH.indexOf(date)];
  return url && make("img", { src: url, alt: "" });
}

function drawCells() {
  const [left, top, width, height] = turn.box, across = turn.across;
  const box = make("div", { className: "grid" });
  Object.assign(box.style, { left: `${100 * left}%`, top: `${100 * top}%`, width: `${100 * width}%`, height: `${100 * height}%` });
  box.style.setProperty("--across", across);
  turn.cells.forEach(({ kind, colour, cells }, order) => {
    for (const cell of cells) {
      const frame = make("div", { className: "cell", title: kind });
      frame.style.left = `${100 * (cell % across) / across}%`;
      frame.style.top = `${100 * Math.floor(cell / across) / across}%`;
      frame.style.setProperty("--colour", colour);
      frame.style.setProperty("--inset", `${4 + 6 * order}px`);
      box.append(frame);
    }
  });
  return box;
}

function showLayers() {
  for (const pane of Object.values(panes)) pane.querySelectorAll(".layer").forEach((layer) => layer.remove());
  const there = pair && pair.before && pair.after ? Object.keys(LAYERS).filter((id) => contentOf(id, "after")) : [];
  for (const id of there)
    for (const date of LAYERS[id].dates) {
      const layer = make("div", { className: "layer" }, contentOf(id, date));
      layer.dataset.layer = id;
      panes[date].querySelector(".canvas").append(layer);
    }
  const shown = [...layerBar.children].map((child) => child.dataset.layer);
  if (shown.join() !== there.join()) layerBar.replaceChildren(...there.map(makeControl)); // keeps the focus otherwise
  applyLayers();
}

function makeControl(id) {
  const { name } = LAYERS[id], { on, opacity } = chosen[id];
  const box = make("input", { type: "checkbox", checked: on });
  const slider = make("input", { type: "range", min: 10, max: 100, value: opacity, ariaLabel: `Opacity of ${name.toLowerCase()}` });
  box.onchange = () => { chosen[id].on = box.checked; applyLayers(); };
  slider.oninput = () => { chosen[id].opacity = Number(slider.value); applyLayers(); };
  const control = make("div", { className: "control" }, make("label", {}, box, name), slider);
  control.dataset.layer = id;
  return control;
}

function applyLayers() {
  for (const layer of element.querySelectorAll(".layer")) {
    const { on, opacity } = chosen[layer.dataset.layer];
    layer.hidden = !on;
    layer.style.opacity = opacity / 100;
  }
  makeLegend();
}

document.addEventListener("deltavlm:turn", (event) => {
  turn = event.detail;
  if (pair) showLayers();
});

// --- how it is shown

for (const radio of element.querySelectorAll(".modes input"))
  radio.onchange = () => {
    view.mode = radio.value;
    viewer.dataset.mode = view.mode;
    clearInterval(view.blink);
    viewer.classList.remove("second");
    if (view.mode === "blink" && !calm.matches) view.blink = setInterval(() => viewer.classList.toggle("second"), 900);
  };
viewer.dataset.mode = view.mode;

swipe.oninput = () => stage.style.setProperty("--swipe", `${swipe.value}%`);

function zoomTo(scale, x = view.x, y = view.y) {
  view.scale = Math.min(12, Math.max(1, scale));
  const box = panes.after.getBoundingClientRect();
  const most = (side) => (view.scale - 1) * side / 2;
  view.x = Math.min(most(box.width), Math.max(-most(box.width), x));
  view.y = Math.min(most(box.height), Math.max(-most(box.height), y));
  stage.style.setProperty("--scale", view.scale);
  stage.style.setProperty("--x", `${view.x}px`);
  stage.style.setProperty("--y", `${view.y}px`);
  viewer.classList.toggle("enlarged", view.scale > 1);
  find(".zoom output").textContent = `${Math.round(100 * view.scale)} %`;
}

function zoomBy(factor, event) {
  const pane = event && event.target.closest(".pane");
  const box = (pane || stage).getBoundingClientRect();
  const [x, y] = event ? [event.clientX - box.left - box.width / 2, event.clientY - box.top - box.height / 2] : [0, 0];
  const scale = Math.min(12, Math.max(1, view.scale * factor)), grown = scale / view.scale;
  zoomTo(scale, x - (x - view.x) * grown, y - (y - view.y) * grown); // what is under the pointer stays there
}

for (const button of element.querySelectorAll("[data-zoom]"))
  button.onclick = () => (Number(button.dataset.zoom) ? zoomBy(Number(button.dataset.zoom)) : zoomTo(1, 0, 0));

stage.addEventListener("wheel", (event) => {
  if (!pair) return;
  event.preventDefault();
  zoomBy(event.deltaY < 0 ? 1.15 : 1 / 1.15, event);
}, { passive: false });

stage.addEventListener("keydown", (event) => {
  if (event.target !== stage) return;
  const moves = { ArrowLeft: [40, 0], ArrowRight: [-40, 0], ArrowUp: [0, 40], ArrowDown: [0, -40] };
  if (event.key === "+" || event.key === "=") zoomBy(1.25);
  else if (event.key === "-") zoomBy(0.8);
  else if (moves[event.key] && view.scale > 1) zoomTo(view.scale, view.x + moves[event.key][0], view.y + moves[event.key][1]);
  else return;
  event.preventDefault();
});

stage.addEventListener("pointerdown", (event) => {
  if (event.target === swipe || !pair || event.button) return;
  if (view.mode === "blink" && calm.matches) viewer.classList.toggle("second");
  if (view.scale === 1 && view.mode !== "swipe") return;
  const start = { x: event.clientX - view.x, y: event.clientY - view.y };
  const move = (now) => {
    if (view.scale > 1) return zoomTo(view.scale, now.clientX - start.x, now.clientY - start.y);
    const box = stage.getBoundingClientRect();
    swipe.value = 100 * (now.clientX - box.left) / box.width;
    swipe.oninput();
  };
  const end = () => {
    stage.removeEventListener("pointermove", move);
    removeEventListener("pointerup", end);
    removeEventListener("pointercancel", end);
  };
  stage.addEventListener("pointermove", move);
  addEventListener("pointerup", end);
  addEventListener("pointercancel", end);
  if (view.scale === 1) move(event);
});

// --- images that are dropped go where the buttons would put them

const hand = (date, file) => {
  const files = new DataTransfer(), input = document.getElementById(date).previousElementSibling; // of the button
  files.items.add(file);
  input.files = files.files;
  input.dispatchEvent(new Event("change", { bubbles: true }));
};
stage.addEventListener("dragover", (event) => { event.preventDefault(); stage.classList.add("over"); });
stage.addEventListener("dragleave", () => stage.classList.remove("over"));
stage.addEventListener("drop", (event) => {
  event.preventDefault();
  stage.classList.remove("over");
  const files = [...event.dataTransfer.files].slice(0, 2);
  const dates = files.length === 2 ? BOTH : [!pair || !pair.before || pair.after ? "before" : "after"];
  files.forEach((file, number) => hand(dates[number], file));
});

// --- a picture of what is seen, for the conversation to offer

document.addEventListener("deltavlm:picture", async ({ detail: lines }) => {
  if (!pair || !pair.before || !pair.after) return;
  const { width, height } = pair.before, side = Math.round(640 * Math.min(1, width / height));
  const tall = Math.round(side * height / width), gap = 16, line = 24;
  const canvas = make("canvas", { width: 2 * side + 3 * gap, height: tall + 3 * gap + line * (lines.length + 1) });
  const pen = canvas.getContext("2d");
  pen.fillStyle = "#fff";
  pen.fillRect(0, 0, canvas.width, canvas.height);
  pen.font = "15px system-ui, sans-serif";
  BOTH.forEach((date, column) => {
    const left = gap + column * (side + gap), top = gap + line;
    pen.fillStyle = "#1f2933";
    pen.fillText(panes[date].querySelector(".tag").textContent, left, gap + 12);
    pen.drawImage(panes[date].querySelector("img"), left, top, side, tall);
    for (const layer of panes[date].querySelectorAll(".layer:not([hidden])")) {
      pen.globalAlpha = Number(layer.style.opacity);
      const image = layer.querySelector("img");
      if (image) pen.drawImage(image, left, top, side, tall);
      else drawFrames(pen, left, top, side, tall);
      pen.globalAlpha = 1;
    }
  });
  pen.fillStyle = "#1f2933";
  lines.forEach((text, number) => pen.fillText(text, gap, tall + 2 * gap + line * (number + 1.6), canvas.width - 2 * gap));
  canvas.toBlob((blob) => document.dispatchEvent(new CustomEvent("deltavlm:save", { detail: { blob, name: "deltavlm.png" } })));
});

function drawFrames(pen, left, top, wide, tall) {
  const [x, y, width, height] = turn.box, across = turn.across;
  turn.cells.forEach(({ colour, cells }, order) => {
    const inset = 4 + 6 * order, [w, h] = [wide * width / across, tall * height / across];
    pen.strokeStyle = colour;
    pen.lineWidth = 4;
    for (const cell of cells)
      pen.strokeRect(left + wide * x + (cell % across) * w + inset, top + tall * y + Math.floor(cell / across) * h + inset,
        w - 2 * inset, h - 2 * inset);
  });
}

watch("value", showPair);
showPair();
