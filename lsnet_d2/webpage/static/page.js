// The page of lsnet-demo: sends a picture to the server, draws its answer and saves it as files.
// All is drawn from one answer; the score, the parts and the style need no further request.

const settings = JSON.parse(document.getElementById("settings").textContent);
const get = (id) => document.getElementById(id);
const picture = get("picture");
const LABEL_SIZE = 12; // lengths of what is drawn are in pixels of the screen
const LINE_WIDTH = 2;

let answer = null; // the last one; see lsnet_d2/webpage/answer.py
let busy = false;
let skipped = ""; // what is said of a picture that came meanwhile

// --- asking the server

async function detect(file, name) {
  if (busy) {
    skipped = `${name} was not looked at: another picture was, give it again`;
    say(skipped, true);
    return;
  }
  if (file.size > settings.maxBytes) {
    say(`${name}: ${settings.tooLarge}`, true);
    return;
  }
  setBusy(true);
  say(`Looking at ${name} …`);
  try {
    const response = await fetch(`detect?name=${encodeURIComponent(name)}`, {
      method: "POST",
      headers: { "Content-Type": "application/octet-stream" },
      body: file,
    });
    const content = await response.json().catch(() => ({}));
    if (!response.ok) {
      const reason = response.status === 413 ? settings.tooLarge : `status ${response.status}`;
      say(content.error ?? `${name}: ${reason}`, true);
      return;
    }
    show(content);
  } catch (error) {
    sayNoAnswer(error);
  } finally {
    setBusy(false);
    if (skipped) say(`${get("status").textContent}; ${skipped}`, true);
    skipped = "";
  }
}

function setBusy(value) {
  busy = value;
  document.body.classList.toggle("busy", value);
}

function sayNoAnswer(error) {
  say(`The server does not answer: is lsnet-demo still running? (${error.message})`, true);
}

function say(message, isError = false) {
  get("status").textContent = message;
  get("status").classList.toggle("error", isError);
}

// --- drawing

function show(content) {
  answer = content;
  get("result").hidden = false;
  const there = new Set(answer.geojson.features.map((feature) => feature.properties.part));
  there.add("box").add("label");
  if (answer.extreme_points) there.add("extreme_points");
  for (const input of get("parts").querySelectorAll("input")) {
    input.parentElement.hidden = !there.has(input.value);
  }
  get("style").hidden = !there.has("contour");
  say(`${answer.name}: ${answer.width} × ${answer.height} pixels, ${answer.seconds} s`);
  draw();
}

// How many detections are above the score; they are ordered by it.
function countShown() {
  const threshold = Number(get("threshold").value);
  return answer.detections.filter((found) => found.score >= threshold).length;
}

function draw() {
  get("threshold-value").textContent = `${Math.round(get("threshold").value * 100)} %`;
  if (!answer) return;
  const count = countShown();
  picture.replaceChildren();
  picture.setAttribute("viewBox", `0 0 ${answer.width} ${answer.height}`);
  picture.style.aspectRatio = `${answer.width} / ${answer.height}`;
  // The picture may be a smaller one, whose sides were rounded.
  const { width, height } = answer;
  add(picture, "image", { href: answer.picture, width, height, preserveAspectRatio: "none" });
  const { clientWidth, clientHeight } = picture;
  const unit = Math.max(answer.width / clientWidth, answer.height / clientHeight) || 1;
  const parts = new Set(
    [...get("parts").querySelectorAll("input:checked")].map((input) => input.value),
  );
  const objects = answer.detections.slice(0, count).map((found, index) => ({
    ...found, index, color: color(index), features: {}, extremes: answer.extreme_points?.[index],
  }));
  for (const { geometry, properties } of answer.geojson.features) {
    if (properties.object < count) objects[properties.object].features[properties.part] = { geometry, properties };
  }
  for (const object of objects) drawObject(object, parts, unit);
  if (parts.has("label")) {
    const taken = [];
    for (const object of objects) drawLabel(object, unit, taken); // on top of all
  }
  fillTable(objects);
}

function drawObject({ index, color, features, extremes }, parts, unit) {
  const group = add(picture, "g", { "data-object": index });
  const line = { fill: "none", stroke: color, "stroke-width": LINE_WIDTH * unit, "stroke-linejoin": "round" };
  const contour = parts.has("contour") && features.contour;
  if (contour) {
    const { type, coordinates } = contour.geometry;
    const rings = type === "Polygon" ? coordinates : coordinates.flat();
    const isFilled = get("contours").value === "filled";
    add(group, "path", {
      ...line, class: "contour", d: rings.map(toPath).join(""),
      fill: isFilled ? color : "none", "fill-opacity": 0.35,
    });
  }
  if (parts.has("box") && features.box) {
    add(group, "path", { ...line, class: "box", d: toPath(features.box.geometry.coordinates[0]) });
  }
  if (parts.has("extreme_points") && extremes) {
    if (!contour) add(group, "path", { ...line, class: "extreme-lines", d: toPath(extremes) });
    for (const [x, y] of extremes) {
      add(group, "circle", {
        class: "extreme-point", cx: x, cy: y, r: 3.6 * unit, fill: color, stroke: "#fff", "stroke-width": unit,
      });
    }
  }
  if (parts.has("keypoints") && features.keypoints) drawSkeleton(group, features.keypoints, color, unit);
}

function drawSkeleton(group, { geometry, properties }, color, unit) {
  const joints = new Map(properties.names.map((name, index) => [name, geometry.coordinates[index]]));
  for (const bone of settings.bones) {
    if (!bone.ends.flat().every((name) => joints.has(name))) continue;
    const [[x1, y1], [x2, y2]] = bone.ends.map((names) => middle(names.map((name) => joints.get(name))));
    const ends = { x1, y1, x2, y2, "stroke-linecap": "round" };
    add(group, "line", { ...ends, stroke: "#000", "stroke-opacity": 0.5, "stroke-width": 4 * unit });
    add(group, "line", { ...ends, class: "bone", stroke: bone.color, "stroke-width": 2.4 * unit });
  }
  for (const [x, y] of geometry.coordinates) {
    add(group, "circle", {
      class: "keypoint", cx: x, cy: y, r: 3.2 * unit, fill: color, stroke: "#fff", "stroke-width": 0.8 * unit,
    });
  }
}

// A line higher or lower where another label is in the way.
function drawLabel({ index, label, score, box, color }, unit, taken) {
  const size = LABEL_SIZE * unit;
  const text = add(picture, "text", {
    "data-object": index, fill: lighter(color), stroke: "#000", "stroke-width": 0.28 * size,
    "stroke-linejoin": "round", "paint-order": "stroke", "font-size": size, "font-weight": "bold",
    "font-family": "sans-serif",
  });
  text.textContent = `${label} ${Math.round(score * 100)} %`;
  const width = text.getComputedTextLength();
  const x = Math.max(Math.min(box[0], answer.width - width - 2 * unit), 0);
  const lines = [0, -1, 1, -2, 2, -3, 3].map((line) => box[1] + (1.15 * line - 0.35) * size);
  const inside = lines.map((y) => Math.min(Math.max(y, size), answer.height - 0.3 * size));
  const isFree = (y) => taken.every((other) => (
    x > other.x + other.width || other.x > x + width || Math.abs(y - other.y) > size
  ));
  const y = inside.find(isFree) ?? inside[0];
  taken.push({ x, y, width });
  text.setAttribute("x", x);
  text.setAttribute("y", y);
}

function fillTable(objects) {
  const total = answer.detections.length;
  get("count").textContent = total
    ? `${objects.length} of ${total} found`
    : "Nothing was found in this picture";
  const rows = objects.map(({ index, label, score, box, color }) => {
    const [x0, y0, x1, y1] = box;
    const row = document.createElement("tr");
    const swatch = document.createElement("span");
    swatch.className = "swatch";
    swatch.style.background = color;
    row.insertCell().append(swatch);
    for (const value of [label, score.toFixed(2), [x0, y0, x1 - x0, y1 - y0].map(Math.round).join(", ")]) {
      row.insertCell().textContent = value;
    }
    row.tabIndex = 0;
    const highlight = (on) => {
      for (const drawn of picture.querySelectorAll("[data-object]")) {
        drawn.setAttribute("opacity", on && Number(drawn.dataset.object) !== index ? 0.15 : 1);
      }
    };
    for (const [event, on] of [["mouseenter", true], ["focus", true], ["mouseleave", false], ["blur", false]]) {
      row.addEventListener(event, () => highlight(on));
    }
    return row;
  });
  get("detections").replaceChildren(...rows);
}

const color = (index) => settings.palette[index % settings.palette.length];
// A hexadecimal colour half way to white, to be read on anything.
const lighter = (hex) => `#${[1, 3, 5].map((at) => (
  Math.round((parseInt(hex.slice(at, at + 2), 16) + 255) / 2).toString(16).padStart(2, "0")
)).join("")}`;
const toPath = (points) => `M${points.map((point) => point.join(",")).join("L")}Z`;
const middle = (points) => [0, 1].map((axis) => points.reduce((sum, point) => sum + point[axis], 0) / points.length);

function add(parent, name, attributes) {
  const element = document.createElementNS("http://www.w3.org/2000/svg", name);
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
  parent.append(element);
  return element;
}

// --- saving: what is above the score, of all parts; the picture as it is drawn

const exports = {
  coco: (count) => [answer.coco.slice(0, count), "_coco.json"],
  labelme: (count) => {
    const shapes = answer.labelme.shapes.filter((shape) => shape.group_id < count);
    return [{ ...answer.labelme, shapes }, ".json"];
  },
  geojson: (count) => {
    const features = answer.geojson.features.filter((feature) => feature.properties.object < count);
    return [{ ...answer.geojson, features }, ".geojson"];
  },
};

async function save(kind) {
  const stem = answer.name.replace(/\.[^.]+$/, "");
  if (kind === "picture") {
    saveAs(await paint(), `${stem}_found.png`);
    return;
  }
  const [content, ending] = exports[kind](countShown());
  saveAs(new Blob([JSON.stringify(content)], { type: "application/json" }), stem + ending);
}

async function paint() {
  const image = new Image();
  const copy = picture.cloneNode(true);
  const shown = new Image();
  shown.src = answer.picture;
  await shown.decode();
  const { clientWidth, clientHeight } = picture;
  const scale = Math.max(1, Math.min(clientWidth / shown.width, clientHeight / shown.height));
  const canvas = document.createElement("canvas");
  canvas.width = Math.round(shown.width * scale);
  canvas.height = Math.round(shown.height * scale);
  copy.setAttribute("width", canvas.width);
  copy.setAttribute("height", canvas.height);
  copy.removeAttribute("style");
  image.src = URL.createObjectURL(
    new Blob([new XMLSerializer().serializeToString(copy)], { type: "image/svg+xml" }),
  );
  await image.decode();
  canvas.getContext("2d").drawImage(image, 0, 0);
  URL.revokeObjectURL(image.src);
  return new Promise((resolve) => canvas.toBlob(resolve, "image/png"));
}

function saveAs(blob, name) {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(blob);
  link.download = name;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10000);
}

// --- what the user does

get("file").addEventListener("change", (event) => {
  const [file] = event.target.files;
  if (file) detect(file, file.name).then(() => { event.target.value = ""; });
});
for (const button of document.querySelectorAll(".example")) {
  button.addEventListener("click", async () => {
    try {
      const response = await fetch(`examples/${button.dataset.number}`);
      if (response.ok) detect(await response.blob(), button.dataset.name);
      else say(`${button.dataset.name} is not there any more`, true);
    } catch (error) {
      sayNoAnswer(error);
    }
  });
}
document.addEventListener("dragover", (event) => {
  event.preventDefault();
  document.body.classList.add("dragging");
});
document.addEventListener("dragleave", () => document.body.classList.remove("dragging"));
document.addEventListener("drop", (event) => {
  event.preventDefault();
  document.body.classList.remove("dragging");
  const [file] = event.dataTransfer.files;
  if (file) detect(file, file.name);
});
get("threshold").addEventListener("input", draw);
for (const id of ["parts", "contours"]) get(id).addEventListener("change", draw);
for (const button of get("downloads").querySelectorAll("button")) {
  button.addEventListener("click", () => save(button.dataset.kind));
}
new ResizeObserver(() => draw()).observe(get("stage"));
draw();
