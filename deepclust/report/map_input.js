/* The card of the map, and what pointers, keys and buttons do. Runs behind map.js in the same module. */
/* The visible point nearest to a place, at most `reach` pixels away; -1 for none. */
function nearest(x, y, reach) {
  const cell = (value) => Math.min(Math.max(Math.floor((value * across) / (GRID + 1)), 0), across - 1);
  const x0 = cell((x - reach - left) / scale), x1 = cell((x + reach - left) / scale);
  const y0 = cell((y - reach - top) / scale), y1 = cell((y + reach - top) / scale);
  let best = -1, least = reach * reach;
  for (let row = y0; row <= y1; row++) {
    for (let n = starts[row * across + x0]; n < starts[row * across + x1 + 1]; n++) {
      const i = members[n];
      if (!shown[cluster[i]]) continue;
      const away = (screenX(xs[i]) - x) ** 2 + (screenY(ys[i]) - y) ** 2;
      if (away <= least) [best, least] = [i, away];
    }
  }
  return best;
}

/* The visible point to go to from the current one with an arrow key. */
function neighbour(dx, dy) {
  const x = current < 0 ? width / 2 : screenX(xs[current]), y = current < 0 ? height / 2 : screenY(ys[current]);
  if (current < 0) return nearest(x, y, width + height);
  let best = -1, least = Infinity;
  for (let i = 0; i < count; i++) {
    if (!shown[cluster[i]] || i === current) continue;
    const a = screenX(xs[i]) - x, b = screenY(ys[i]) - y;
    const along = a * dx + b * dy, beside = Math.abs(a * dy - b * dx);
    if (along > 0.5 && beside <= along && along + 2 * beside < least) [best, least] = [i, along + 2 * beside];
  }
  return best;
}

function element(tag, text, name) {
  const made = document.createElement(tag);
  if (text) made.textContent = text;
  if (name) made.className = name;
  return made;
}

function show(i, keep = false) {
  if (i === current && keep === kept) return;
  clearTimeout(waiting);
  current = i;
  kept = keep && i >= 0;
  card.hidden = i < 0;
  card.classList.toggle("is-kept", kept);
  if (i >= 0) fill(i);
  draw();
}

function fill(i) {
  const each = legend[cluster[i]], folder = data.folders[folders[i]];
  const sure = each.id < 0 || !confidence ? each.title : `${each.title} · ${Math.round((100 * confidence[i]) / 255)} % confident`;
  card.replaceChildren(element("b", names[i]), ...(folder ? [element("span", folder)] : []), element("span", sure));
  if (slots.has(i)) card.prepend(embedded(slots.get(i)));
  if (kept && document.getElementById(`cluster-${each.id}`)) card.append(link("Its cluster's images", `#cluster-${each.id}`));
  if (location.protocol === "file:" && data.root) {
    if (kept) card.append(link("Open the image", address(i), "_blank"));
    waiting = setTimeout(() => loadOriginal(i), kept ? 0 : slots.has(i) ? 300 : 90);
  }
  place();
}

function link(text, address, target = "") {
  const made = element("a", text);
  made.href = address;
  made.target = target;
  return made;
}

function embedded(slot) {
  const shape = element("canvas", "", "thumb"), side = data.thumbs.side, columns = data.thumbs.columns;
  shape.width = shape.height = 2 * side;
  const draw = () => {
    const brush = shape.getContext("2d");
    brush.imageSmoothingQuality = "high";
    brush.drawImage(sheet, (slot % columns) * side, Math.floor(slot / columns) * side, side, side, 0, 0, 2 * side, 2 * side);
  };
  if (sheet.complete) draw();
  else sheet.addEventListener("load", draw);
  return shape;
}

function address(i) {
  return `${data.root}/${path(i).split("/").map(encodeURIComponent).join("/")}`;
}

/* The image itself from its file; after some that are gone, the page asks for no more. */
function loadOriginal(i) {
  if (failures > 2) return;
  const picture = element("img", "", "thumb");
  picture.alt = "";
  picture.addEventListener("load", () => {
    if (i !== current) return;
    card.querySelector(".thumb")?.remove();
    card.prepend(picture);
    place();
  });
  picture.addEventListener("error", () => failures++);
  picture.src = address(i);
}

function place() {
  const x = screenX(xs[current]), y = screenY(ys[current]), wide = card.offsetWidth, high = card.offsetHeight;
  const side = x + 16 + wide > width ? x - 16 - wide : x + 16;
  const across = Math.min(Math.max(side, 6), Math.max(width - wide - 6, 6));
  const down = Math.min(Math.max(y - high / 3, 6), Math.max(height - high - 6, 6));
  card.style.transform = `translate(${Math.round(across)}px, ${Math.round(down)}px)`;
}

/* Pointers: one moves, two zoom, none pressed looks. */
const pressed = new Map();
let moved = false;
const spot = (event) => {
  const frame = canvas.getBoundingClientRect();
  return [event.clientX - frame.left, event.clientY - frame.top];
};

canvas.addEventListener("pointerdown", (event) => {
  canvas.setPointerCapture(event.pointerId);
  pressed.set(event.pointerId, spot(event));
  moved = pressed.size > 1;
});

canvas.addEventListener("pointermove", (event) => {
  const [x, y] = spot(event), before = pressed.get(event.pointerId);
  if (!before) {
    const i = nearest(x, y, 14);
    canvas.classList.toggle("is-over", i >= 0);
    if (!kept) show(i);
    return;
  }
  if (!moved && Math.hypot(x - before[0], y - before[1]) < 4) return;
  moved = true;
  canvas.classList.add("is-moving");
  const other = [...pressed].find(([id]) => id !== event.pointerId)?.[1];
  if (other) {
    const was = Math.hypot(before[0] - other[0], before[1] - other[1]);
    const now = Math.hypot(x - other[0], y - other[1]);
    zoom(now / Math.max(was, 1), (x + other[0]) / 2, (y + other[1]) / 2);
  }
  const share = other ? 0.5 : 1;
  left += (x - before[0]) * share;
  top += (y - before[1]) * share;
  pressed.set(event.pointerId, [x, y]);
  limit();
  if (current >= 0) place();
  draw();
});

function release(event) {
  if (!pressed.delete(event.pointerId)) return;
  canvas.classList.remove("is-moving");
  if (moved || event.type === "pointercancel") return;
  const i = nearest(...spot(event), event.pointerType === "touch" ? 26 : 14);
  show(kept && i === current ? -1 : i, true);
}
canvas.addEventListener("pointerup", release);
canvas.addEventListener("pointercancel", release);
canvas.addEventListener("pointerleave", () => kept || pressed.size || show(-1));

canvas.addEventListener(
  "wheel",
  (event) => {
    if (event.deltaY > 0 && scale <= fitted) return; // nothing to zoom out of: the page scrolls
    event.preventDefault();
    zoom(Math.exp(-event.deltaY * (event.ctrlKey ? 0.01 : event.deltaMode ? 0.05 : 0.0018)), ...spot(event));
    if (current >= 0) place();
  },
  { passive: false },
);

const ARROWS = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };
canvas.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  const arrow = ARROWS[event.key];
  if (arrow && event.shiftKey) {
    left -= arrow[0] * 60;
    top -= arrow[1] * 60;
    limit();
  } else if (arrow) {
    const i = neighbour(...arrow);
    if (i >= 0) show(i);
    if (current >= 0) bring(current);
  } else if (event.key === "+" || event.key === "=" || event.key === "-") {
    const at = current < 0 ? [] : [screenX(xs[current]), screenY(ys[current])];
    zoom(event.key === "-" ? 1 / 1.5 : 1.5, ...at);
  } else if (event.key === "0") fit();
  else if (event.key === "Enter" && current >= 0) show(current, !kept);
  else if (event.key === "Escape") show(-1);
  else return;
  event.preventDefault();
  if (current >= 0) place();
  draw();
});

/* Moves the map as far as a point needs to be in view. */
function bring(i) {
  const x = screenX(xs[i]), y = screenY(ys[i]), room = 30;
  left += Math.max(room - x, 0) - Math.max(x - width + room, 0);
  top += Math.max(room - y, 0) - Math.max(y - height + room, 0);
}

const buttons = [...box.querySelectorAll("[data-cluster]")];
function toggle(c, on) {
  shown[c] = on;
  buttons[c].setAttribute("aria-pressed", String(on));
  if (current >= 0 && !shown[cluster[current]]) show(-1);
  draw();
}
buttons.forEach((button, c) => {
  const mark = (on) => () => {
    marked = on && shown[c] ? c : -1;
    draw();
  };
  button.addEventListener("click", () => {
    toggle(c, !shown[c]);
    mark(true)();
  });
  button.addEventListener("pointerenter", (event) => event.pointerType === "touch" || mark(true)());
  button.addEventListener("pointerleave", mark(false));
  button.addEventListener("focus", () => button.matches(":focus-visible") && mark(true)());
  button.addEventListener("blur", mark(false));
});

const actions = {
  in: () => zoom(1.6),
  out: () => zoom(1 / 1.6),
  fit,
  photos: (button) => press(button, "photos"),
  labels: (button) => press(button, "labels"),
  all: () => legend.forEach((_, c) => toggle(c, true)),
  none: () => legend.forEach((_, c) => toggle(c, false)),
};
function press(button, name) {
  still[name] = !still[name];
  button.setAttribute("aria-pressed", String(still[name]));
  draw();
}
for (const button of box.querySelectorAll("[data-do]")) {
  button.addEventListener("click", () => {
    actions[button.dataset.do](button);
    if (current >= 0) place();
  });
}

/* Paths that hold a text stand out; Enter goes from one to the next. */
const search = box.querySelector("input"), told = box.querySelector("output");
function find() {
  const text = search.value.trim().toLowerCase();
  found = text ? Uint8Array.from({ length: count }, (_, i) => path(i).toLowerCase().includes(text)) : null;
  const number = found ? found.reduce((sum, each) => sum + each, 0) : 0;
  told.textContent = found ? `${number.toLocaleString("en")} found${number ? "; Enter shows them in turn" : ""}` : "";
  draw();
}
search.addEventListener("input", find);
search.addEventListener("keydown", (event) => {
  if (event.key !== "Enter" || !found) return;
  const next = found.indexOf(1, current + 1), i = next < 0 ? found.indexOf(1) : next;
  if (i < 0) return;
  toggle(cluster[i], true);
  bring(i);
  show(i, true);
});

/* An address that ends in #image=N opens the point of row N of clusters.csv. */
function fromAddress() {
  const found = /^#image=(\d+)$/.exec(location.hash);
  if (!found || Number(found[1]) >= count) return;
  const i = Number(found[1]);
  toggle(cluster[i], true);
  bring(i);
  show(i, true);
  stage.scrollIntoView({ block: "center" });
}

if (sheet) {
  sheet.addEventListener("load", draw);
  sheet.src = data.thumbs.image;
} else box.querySelector('[data-do="photos"]').hidden = true;
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", look);
window.addEventListener("hashchange", fromAddress);
new ResizeObserver(resize).observe(canvas);
look();
resize();
fromAddress();
