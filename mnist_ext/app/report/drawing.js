// A digit that is drawn on the page, and what the network says of it at each movement.
const byId = (id) => document.getElementById(id);
const network = JSON.parse(byId("network").textContent);
const bytes = Uint8Array.from(atob(network.parameters), (c) => c.charCodeAt(0));
const parameters = Float32Array.from(new Uint16Array(bytes.buffer), fromFloat16);
const SIDE = 28, BOX = 20, PEN = 2.4; // pixels
const seen = byId("seen").getContext("2d", { willReadFrequently: true });
Object.assign(seen, { strokeStyle: "#fff", lineCap: "round", lineJoin: "round" });
let path = ""; // as SVG writes it

function fromFloat16(bits) {
  const exponent = (bits >> 10) & 31, fraction = bits & 1023;
  const size = exponent ? (1 + fraction / 1024) * 2 ** (exponent - 15) : fraction * 2 ** -24;
  return bits >> 15 ? -size : size;
}

// The probabilities of the classes for 784 pixels of 0 to 1.
function classify(pixels) {
  let values = pixels.map((p) => (p - network.mean) / network.std), at = 0;
  for (const { inputs, outputs, relu } of network.layers) {
    const weight = parameters.subarray(at, (at += inputs * outputs));
    values = Array.from(parameters.subarray(at, (at += outputs)), (bias, o) => {
      const sum = values.reduce((s, v, i) => s + weight[o * inputs + i] * v, bias);
      return relu ? Math.max(sum, 0) : sum;
    });
  }
  const most = Math.max(...values), powers = values.map((v) => Math.exp(v - most));
  const total = powers.reduce((a, b) => a + b);
  return powers.map((p) => p / total);
}

// Draw the path as MNIST's digits are: their longer side fills 20 of 28 pixels, and the middle of
// their mass (of the embedded digits that of their box) lies in the middle.
function picture() {
  const { x, y, width, height } = byId("ink").getBBox();
  const scale = (BOX - PEN) / Math.max(width, height, 0.1);
  const place = (left, top) => {
    clear();
    seen.setTransform(scale, 0, 0, scale, left + PEN / 2 - x * scale, top + PEN / 2 - y * scale);
    seen.lineWidth = PEN / scale;
    seen.stroke(new Path2D(path));
    const { data } = seen.getImageData(0, 0, SIDE, SIDE);
    return Array.from({ length: SIDE * SIDE }, (_, i) => data[4 * i] / 255);
  };
  const size = [width, height].map((extent) => Math.ceil(extent * scale + PEN));
  const start = size.map((s) => Math.floor((SIDE - s) / 2));
  const pixels = place(...start);
  if (!network.by_mass) return pixels;
  const mass = pixels.reduce((a, b) => a + b);
  const middle = [(i) => i % SIDE, (i) => Math.floor(i / SIDE)].map((along) =>
    Math.floor(pixels.reduce((sum, p, i) => sum + p * (along(i) + 0.5), 0) / mass));
  return place(...start.map((s, axis) =>
    Math.min(Math.max(s + SIDE / 2 - middle[axis], 0), SIDE - size[axis])));
}

function clear() {
  seen.resetTransform();
  seen.fillRect(0, 0, SIDE, SIDE);
}

function show() {
  byId("ink").setAttribute("d", path);
  clear();
  const shares = path ? classify(picture()) : network.names.map(() => 0);
  shares.forEach((share, i) => {
    byId("bars").rows[i].style.setProperty("--share", share);
    byId("bars").rows[i].cells[1].textContent = path ? `${(100 * share).toFixed(1)} %` : "";
  });
  byId("answer").textContent = path ? network.names[shares.indexOf(Math.max(...shares))] : "?";
}

function draw(event) {
  if (!event.isPrimary || !event.buttons) return; // a second finger, or a mouse that passes by
  const { left, top, width } = byId("square").getBoundingClientRect();
  const at = `${(event.clientX - left) / width},${(event.clientY - top) / width}`;
  path += event.type === "pointerdown" ? `M${at}h0` : path && `L${at}`;
  show();
}

byId("square").onpointermove = draw;
byId("square").onpointerdown = (event) => {
  byId("square").setPointerCapture(event.pointerId);
  draw(event);
};
byId("clear").onclick = () => {
  path = "";
  show();
};
show();
