// The spectrogram, what patchout leaves of it, and attention, on canvases.

const MAGMA = ["#000004", "#1d1147", "#51127c", "#832681", "#b73779", "#e75263", "#fc8961", "#fec488", "#fcfdbf"];
const GRAY = ["#1c1c1c", "#9a9a9a"];
const HEAT = [230, 159, 0];
const HEAT_MAX = 8; // times uniform attention, where a color is full

const parse = (color) => [1, 3, 5].map((i) => parseInt(color.slice(i, i + 2), 16));

function makeColors(stops) {
  const rgb = stops.map(parse);
  return Array.from({ length: 256 }, (_, i) => {
    const place = (i / 255) * (rgb.length - 1);
    const low = Math.min(Math.floor(place), rgb.length - 2);
    return rgb[low].map((value, c) => value + (place - low) * (rgb[low + 1][c] - value));
  });
}

const colors = { patches: makeColors(MAGMA), attention: makeColors(GRAY) };

function makeImage(width, height, pixel) {
  const canvas = Object.assign(document.createElement("canvas"), { width, height });
  const context = canvas.getContext("2d");
  const image = context.createImageData(width, height);
  for (let y = 0; y < height; y++)
    for (let x = 0; x < width; x++) image.data.set(pixel(x, height - 1 - y), 4 * (y * width + x)); // low at the bottom
  context.putImageData(image, 0, 0);
  return canvas;
}

// Bands and frames that a patch that is left covers.
function covered({ rows, columns, kept }, { patch, stride }, bands, frames) {
  const mask = new Uint8Array(bands * frames);
  for (const index of kept) {
    const [row, column] = [Math.floor(index / columns), index % columns];
    for (let y = row * stride; y < row * stride + patch; y++)
      mask.fill(1, y * frames + column * stride, y * frames + column * stride + patch);
  }
  return mask;
}

// view: patches or attention; picture: mel (bands × frames), kept patches of a grid, attention to each of them
export function drawSpectrogram(canvas, view, picture, config) {
  const { mel, frames, grid, kept, attention } = picture;
  const bands = mel.length / frames;
  const context = canvas.getContext("2d");
  let [low, high] = [Infinity, -Infinity];
  for (const value of mel) [low, high] = [Math.min(low, value), Math.max(high, value)];
  const shown = covered({ ...grid, kept }, config, bands, frames);
  const palette = colors[view];
  const sound = makeImage(frames, bands, (x, y) => {
    const at = y * frames + x;
    const level = Math.round((255 * (mel[at] - low)) / (high - low || 1));
    return [...palette[level], shown[at] || view === "attention" ? 255 : 36];
  });
  context.clearRect(0, 0, canvas.width, canvas.height);
  context.imageSmoothingEnabled = false;
  context.drawImage(sound, 0, 0, canvas.width, canvas.height);
  if (view === "attention") drawAttention(context, attention, { ...grid, kept }, config, bands, frames);
}

function drawAttention(context, attention, { rows, columns, kept }, { patch, stride }, bands, frames) {
  const mean = attention.reduce((sum, value) => sum + value, 0) / attention.length;
  const heat = new Float32Array(rows * columns);
  kept.forEach((index, i) => (heat[index] = Math.min(1, attention[i] / mean / HEAT_MAX)));
  const map = makeImage(columns, rows, (x, y) => [...HEAT, 255 * heat[y * columns + x] ** 0.6]);
  const [scaleX, scaleY] = [context.canvas.width / frames, context.canvas.height / bands];
  const edge = (patch - stride) / 2; // a patch is drawn where it is nearest
  context.imageSmoothingEnabled = true;
  context.drawImage(map, edge * scaleX, context.canvas.height - (edge + rows * stride) * scaleY,
    columns * stride * scaleX, rows * stride * scaleY);
}

// One square for each patch; those that are left are filled.
export function drawGrid(canvas, { rows, columns }, kept) {
  const context = canvas.getContext("2d");
  const style = getComputedStyle(canvas);
  const left = new Set(kept);
  const [width, height] = [canvas.width / columns, canvas.height / rows];
  context.clearRect(0, 0, canvas.width, canvas.height);
  for (let row = 0; row < rows; row++)
    for (let column = 0; column < columns; column++) {
      context.fillStyle = style.getPropertyValue(left.has(row * columns + column) ? "--accent" : "--faint");
      context.fillRect(column * width + 1, canvas.height - (row + 1) * height + 1, width - 2, height - 2);
    }
}
