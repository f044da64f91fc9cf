// The model as the page calls it, its patch grid and its cost.

const files = new URL("./", import.meta.url).href;
const WEBGPU_LIMIT_MS = 30000; // to compile the model; some drivers never end

export const config = await (await fetch("model.json")).json();

export const gridOf = (frames) => ({
  rows: Math.floor((config.n_mels - config.patch) / config.stride) + 1,
  columns: Math.floor((frames - config.patch) / config.stride) + 1,
});

// The patches that are left, row by row from the lowest frequencies.
export function selectPatches({ rows, columns }, keepEvery, dropRows) {
  const kept = [];
  for (let row = 0; row < rows; row++)
    if (!dropRows.includes(row)) for (let c = 0; c < columns; c += keepEvery) kept.push(row * columns + c);
  return Int32Array.from(kept);
}

// 10⁹ operations of the transformer; its last block computes cls and dist only.
export function countGflop(patches) {
  const [dim, tokens] = [config.embed_dim, patches + 2];
  const block = (queries) => 4 * tokens * dim ** 2 + 20 * queries * dim ** 2 + 4 * queries * tokens * dim;
  const projection = 2 * patches * config.patch ** 2 * dim;
  return (projection + (config.depth - 1) * block(tokens) + block(2) + 2 * dim * config.labels.length) / 1e9;
}

// A frame starts half a window before its place: `context` samples before the first one are needed.
export function cutWindow(wave, { first, frames }) {
  const { hop_length: hop, context } = config;
  const cut = new Float32Array(context + frames * hop);
  const start = first * hop - context;
  cut.set(wave.subarray(Math.max(0, start), first * hop + frames * hop), Math.max(0, -start));
  return cut;
}

// As `window_starts` of the package places them: half overlapping; the last one ends with the recording, or nearly.
export function listWindows(samples) {
  const total = Math.floor(samples / config.hop_length);
  const frames = Math.min(total, config.frames);
  const starts = [];
  for (let first = 0; first <= total - frames; first += config.hop_frames) starts.push(first);
  if (total - frames - starts.at(-1) >= config.min_rest * frames) starts.push(total - frames);
  return starts.map((first) => ({ first, frames }));
}

class Thread {
  #worker;
  #waiting = new Map();
  #count = 0;

  constructor() {
    // a worker started from a blob inherits the page's Content-Security-Policy, one started from a file does not
    const source = new Blob([`import ${JSON.stringify(`${files}worker.js`)};`], { type: "text/javascript" });
    const url = URL.createObjectURL(source);
    this.#worker = new Worker(url, { type: "module" });
    this.#worker.onmessage = ({ data: { id, result, error } }) => {
      const { resolve, reject } = this.#waiting.get(id);
      this.#waiting.delete(id);
      error ? reject(new Error(error)) : resolve(result);
    };
    this.#worker.onerror = (event) => {
      for (const { reject } of this.#waiting.values()) reject(new Error(event.message || "the worker cannot start"));
    };
  }

  call(message) {
    return new Promise((resolve, reject) => {
      this.#waiting.set(++this.#count, { resolve, reject });
      this.#worker.postMessage({ id: this.#count, ...message });
    });
  }

  end() {
    this.#worker.terminate();
  }
}

// A sweep whose activations Python computed: it warms the model up, and shows that this backend computes the same.
async function check(thread) {
  const wave = Float32Array.from({ length: config.context + config.frames * config.hop_length }, (_, i) =>
    0.3 * Math.sin(i * (0.02 + i * 2e-7)));
  const kept = selectPatches(gridOf(config.frames), 1, []);
  const { activations } = await thread.call({ wave, kept });
  const difference = Math.max(...config.probe.map((value, i) => Math.abs(value - activations[i])));
  if (!(difference < 0.01)) throw new Error(`the model computes something else here: a tag differs by ${difference}`);
}

async function start(backend, limitMs) {
  const thread = new Thread();
  const late = new Promise((_, reject) => limitMs && setTimeout(() => reject(new Error(`${backend}: no answer`)), limitMs));
  try {
    await Promise.race([late, thread.call({ backend }).then(() => check(thread))]);
  } catch (error) {
    thread.end();
    throw error;
  }
  return { backend, run: (wave, kept) => thread.call({ wave, kept }) };
}

// WebGPU where there is a real one and it computes the same; else WebAssembly.
export async function loadModel() {
  const adapter = await navigator.gpu?.requestAdapter().catch(() => null);
  if (adapter && !adapter.info?.isFallbackAdapter) {
    try {
      return await start("webgpu", WEBGPU_LIMIT_MS);
    } catch (error) {
      console.info(`WebAssembly instead of WebGPU: ${error.message}`);
    }
  }
  return start("wasm");
}
