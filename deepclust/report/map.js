/* The map of a report: points on a canvas, drawn pixel by pixel so that tens of thousands move fluently. */
const data = JSON.parse(document.getElementById("map-data").textContent);
const box = document.querySelector(".map"), stage = box.querySelector(".map-stage");
const canvas = box.querySelector("canvas"), card = box.querySelector(".map-card");
const pen = canvas.getContext("2d");
const bytes = (text) => Uint8Array.from(atob(text), (c) => c.charCodeAt(0));
const words = (text) => new Uint16Array(bytes(text).buffer);
const count = data.count, GRID = 65535;
const xs = words(data.x), ys = words(data.y), cluster = words(data.cluster), confidence = data.confidence && bytes(data.confidence);
const legend = data.legend.map(([id, title, label, colour, x, y]) => ({ id, title, label, colour, x, y, rgb: rgb(colour), size: 0 }));
for (const each of cluster) legend[each].size++;
for (let i = 0; i < count; i++) {
  const each = legend[cluster[i]];
  each.reach = (each.reach || 0) + Math.hypot(xs[i] - each.x, ys[i] - each.y) / each.size;
}
const shown = legend.map(() => true);
const names = unpackNames(), folders = unpackFolders();
const sheet = data.thumbs ? new Image() : null;
const slots = new Map(data.thumbs ? [...new Uint32Array(bytes(data.thumbs.places).buffer)].map((place, slot) => [place, slot]) : []);
const still = { photos: slots.size > 0, labels: true };
let width = 0, height = 0, ratio = 1, scale = 1, left = 0, top = 0, fitted = 1;
let found = null; // 1 for each point that is looked for
let pixels = null, current = -1, kept = false, marked = -1, colours = null, due = false, failures = 0, waiting = 0;

/* Points in an order of their own, so that no cluster hides the others; noise lies below them. */
const order = Uint32Array.from({ length: count }, (_, i) => i);
for (let i = count - 1, seed = 1; i > 0; i--) {
  seed = (Math.imul(seed, 1664525) + 1013904223) >>> 0;
  const j = Math.floor((seed / 4294967296) * (i + 1)), kept = order[i];
  order[i] = order[j];
  order[j] = kept;
}
const noise = legend.findIndex((each) => each.id < 0);
if (noise >= 0) order.sort((a, b) => (cluster[b] === noise) - (cluster[a] === noise));

/* Cells that say which points lie where, for what is near the pointer. */
const across = Math.max(1, Math.min(256, Math.round(Math.sqrt(count / 4))));
const cellOf = (i) => Math.floor((ys[i] * across) / (GRID + 1)) * across + Math.floor((xs[i] * across) / (GRID + 1));
const starts = new Uint32Array(across * across + 1), members = new Uint32Array(count);
for (let i = 0; i < count; i++) starts[cellOf(i) + 1]++;
for (let c = 0; c < across * across; c++) starts[c + 1] += starts[c];
const filled = starts.slice();
for (let i = 0; i < count; i++) members[filled[cellOf(i)]++] = i;

function rgb(colour) {
  return [1, 3, 5].map((i) => parseInt(colour.slice(i, i + 2), 16));
}

function unpackNames() {
  let before = "";
  return data.names.split("/").map((text) => (before = before.slice(0, parseInt(text[0], 36)) + text.slice(1)));
}

function unpackFolders() {
  const found = new Uint32Array(count);
  for (let run = 0, i = 0; run < data.runs.length; run += 2) {
    found.fill(data.runs[run], i, (i += data.runs[run + 1]));
  }
  return found;
}

function path(i) {
  const folder = data.folders[folders[i]];
  return folder ? `${folder}/${names[i]}` : names[i];
}

/* What is where: a point's place on the canvas in CSS pixels, and zooming around a place. */
const screenX = (x) => x * scale + left, screenY = (y) => y * scale + top;

function fit() {
  const spread = (values) => values.reduce(([a, b], v) => [v < a ? v : a, v > b ? v : b], [GRID, 0]);
  const [x0, x1] = spread(xs), [y0, y1] = spread(ys);
  const room = Math.min(46, width / 10);
  scale = fitted = Math.min((width - 2 * room) / Math.max(x1 - x0, 1), (height - 2 * room) / Math.max(y1 - y0, 1));
  left = width / 2 - ((x0 + x1) / 2) * scale;
  top = height / 2 - ((y0 + y1) / 2) * scale;
  draw();
}

function zoom(factor, x = width / 2, y = height / 2) {
  const next = Math.min(Math.max(scale * factor, fitted), fitted * 400);
  left = x - ((x - left) * next) / scale;
  top = y - ((y - top) * next) / scale;
  scale = next;
  limit();
  draw();
}

function limit() {
  left = Math.min(Math.max(left, width / 2 - GRID * scale), width / 2);
  top = Math.min(Math.max(top, height / 2 - GRID * scale), height / 2);
}

function draw() {
  if (due) return;
  due = true;
  requestAnimationFrame(() => {
    due = false;
    if (!pixels) return;
    drawPoints();
    pen.putImageData(pixels, 0, 0);
    pen.setTransform(ratio, 0, 0, ratio, 0, 0);
    const labels = still.labels ? placeLabels() : [];
    if (still.photos && sheet.complete) drawPhotos(labels);
    drawLabels(labels);
    drawCurrent();
  });
}

function radius() {
  const base = Math.min(4.5, Math.max(1.6, 150 / Math.sqrt(count)));
  return Math.min(base * Math.pow(scale / fitted, 0.3), 7);
}

/* A disc with a soft edge, as steps from its midst through the pixels of a picture: whole ones, and shares of others. */
function disc(size, wide) {
  const reach = Math.ceil(size), whole = [], edge = [], shares = [];
  for (let y = -reach; y <= reach; y++) {
    for (let x = -reach; x <= reach; x++) {
      const share = size + 0.5 - Math.hypot(x, y);
      if (share >= 1) whole.push(y * wide + x);
      else if (share > 0.05) {
        edge.push(y * wide + x);
        shares.push(share);
      }
    }
  }
  return { reach, whole, edge, shares };
}

function drawPoints() {
  const wide = pixels.width, high = pixels.height, part = pixels.data, all = new Uint32Array(part.buffer);
  all.fill(packed(colours.paper));
  const { reach, whole, edge, shares } = disc(radius() * ratio, wide);
  const mixed = (rgb, strong) => rgb.map((value, i) => Math.round(colours.paper[i] + (value - colours.paper[i]) * strong));
  const faint = legend.map(({ rgb }) => mixed(rgb, 0.14));
  const full = legend.map(({ rgb }, c) => (marked >= 0 && marked !== c ? faint[c] : mixed(rgb, c === noise ? 0.6 : 0.92)));
  const inks = [...full, ...faint], packs = Uint32Array.from(inks, packed), clusters = legend.length;
  for (let n = 0; n < count; n++) {
    const i = order[n], c = cluster[i];
    if (!shown[c]) continue;
    const x = Math.round((xs[i] * scale + left) * ratio), y = Math.round((ys[i] * scale + top) * ratio);
    if (x < reach || y < reach || x >= wide - reach || y >= high - reach) continue;
    const middle = y * wide + x, which = found !== null && found[i] === 0 ? c + clusters : c;
    const pack = packs[which], r = inks[which][0], g = inks[which][1], b = inks[which][2];
    for (let k = 0; k < whole.length; k++) all[middle + whole[k]] = pack;
    for (let k = 0; k < edge.length; k++) {
      const at = 4 * (middle + edge[k]), share = shares[k];
      part[at] += (r - part[at]) * share;
      part[at + 1] += (g - part[at + 1]) * share;
      part[at + 2] += (b - part[at + 2]) * share;
    }
  }
}

function packed([r, g, b]) {
  return ((255 << 24) | (b << 16) | (g << 8) | r) >>> 0;
}

/* Thumbnails that overlap neither each other nor a name, in the order in which the page gives them. */
function drawPhotos(labels) {
  const size = width < 600 ? 30 : 40, apart = size * (scale > 4 * fitted ? 1.2 : 1.4), half = size / 2 + 3;
  const taken = new Map();
  for (const [i, slot] of slots) {
    if (!shown[cluster[i]] || (marked >= 0 && marked !== cluster[i]) || (found && !found[i])) continue;
    const x = screenX(xs[i]), y = screenY(ys[i]);
    if (x < size / 2 || y < size / 2 || x > width - size / 2 || y > height - size / 2) continue;
    const column = Math.floor(x / apart), row = Math.floor(y / apart);
    let free = !labels.some((label) => Math.abs(label.x - x) < label.half + half && Math.abs(label.y - y) < 10 + half);
    for (let dy = -1; dy <= 1 && free; dy++) {
      for (let dx = -1; dx <= 1 && free; dx++) {
        const other = taken.get((row + dy) * 10000 + column + dx);
        free = !other || Math.max(Math.abs(other[0] - x), Math.abs(other[1] - y)) >= apart;
      }
    }
    if (!free) continue;
    taken.set(row * 10000 + column, [x, y]);
    pen.fillStyle = legend[cluster[i]].colour;
    pen.beginPath();
    pen.roundRect(x - size / 2 - 2, y - size / 2 - 2, size + 4, size + 4, 5);
    pen.fill();
    drawThumb(slot, x - size / 2, y - size / 2, size);
  }
}

function drawThumb(slot, x, y, size) {
  const { side, columns } = data.thumbs;
  pen.drawImage(sheet, (slot % columns) * side, Math.floor(slot / columns) * side, side, side, x, y, size, size);
}

/* Names in the midst of their clusters, above those that they would hide: the marked one, then the largest first, none over another. */
function placeLabels() {
  const placed = [];
  pen.font = "600 13px system-ui, sans-serif";
  const ranked = legend.map((each, c) => c).filter((c) => shown[c] && c !== noise && legend[c].size);
  for (const c of ranked.sort((a, b) => (b === marked) - (a === marked) || legend[b].size - legend[a].size)) {
    const each = legend[c], text = each.label.length > 24 ? `${each.label.slice(0, 23)}…` : each.label;
    const half = pen.measureText(text).width / 2 + 8, x = screenX(each.x);
    const y = screenY(each.y) - (each.reach * scale > 26 ? 0 : still.photos ? 36 : 22);
    if (x + half < 0 || y + 10 < 0 || x - half > width || y - 10 > height) continue;
    if (placed.some((other) => Math.abs(other.x - x) < other.half + half && Math.abs(other.y - y) < 24)) continue;
    placed.push({ c, text, x, y, half });
  }
  return placed;
}

function drawLabels(labels) {
  pen.textAlign = "center";
  pen.textBaseline = "middle";
  for (const { c, text, x, y, half } of labels) {
    pen.globalAlpha = marked >= 0 && marked !== c ? 0.3 : 0.92;
    pen.fillStyle = colours.card;
    pen.beginPath();
    pen.roundRect(x - half, y - 10.5, 2 * half, 21, 10.5);
    pen.fill();
    pen.lineWidth = 1.5;
    pen.strokeStyle = legend[c].colour;
    pen.stroke();
    pen.fillStyle = colours.ink;
    pen.fillText(text, x, y + 0.5);
  }
  pen.globalAlpha = 1;
}

function drawCurrent() {
  if (current < 0) return;
  pen.lineWidth = 2.5;
  pen.strokeStyle = colours.ink;
  pen.fillStyle = legend[cluster[current]].colour;
  pen.beginPath();
  pen.arc(screenX(xs[current]), screenY(ys[current]), radius() + 4, 0, 2 * Math.PI);
  pen.fill();
  pen.stroke();
}

function look() {
  const style = getComputedStyle(document.documentElement), value = (name) => style.getPropertyValue(name).trim();
  colours = { card: value("--card"), ink: value("--ink"), paper: rgb(value("--card")) };
  draw();
}

function resize() {
  const before = [width, height];
  width = canvas.clientWidth;
  height = canvas.clientHeight;
  ratio = Math.min(window.devicePixelRatio || 1, 2);
  if (!width || !height || (before[0] === width && before[1] === height && pixels)) return;
  canvas.width = Math.round(width * ratio);
  canvas.height = Math.round(height * ratio);
  pixels = pen.createImageData(canvas.width, canvas.height);
  fit();
  if (current >= 0) place();
}
