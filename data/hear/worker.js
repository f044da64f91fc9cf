// The model in a thread of its own: {wave, kept} in; activations, attention, mel and milliseconds out.

const files = new URL("./", import.meta.url).href;
let session, ort;

async function create(backend) {
  ort = await import(`${files}ort/ort.${backend}.min.mjs`);
  ort.env.wasm.wasmPaths = `${files}ort/`;
  ort.env.wasm.numThreads = self.crossOriginIsolated ? Math.min(4, navigator.hardwareConcurrency) : 1;
  ort.env.logLevel = "error";
  session = await ort.InferenceSession.create(`${files}model.onnx`, { executionProviders: [backend] });
}

async function run(wave, kept) {
  const start = performance.now();
  const outputs = await session.run({
    wave: new ort.Tensor("float32", wave, [wave.length]),
    kept: new ort.Tensor("int32", kept, [kept.length]),
  });
  const [activations, attention, mel] = await Promise.all(
    ["activations", "attention", "mel"].map((name) => outputs[name].getData()),
  );
  return { activations, attention, mel, frames: outputs.mel.dims[1], ms: performance.now() - start };
}

async function answer({ id, backend, wave, kept }) {
  try {
    postMessage({ id, result: backend ? await create(backend) : await run(wave, kept) });
  } catch (error) {
    postMessage({ id, error: String(error?.message ?? error) });
  }
}

let last = Promise.resolve(); // a session runs one window at a time
onmessage = ({ data }) => (last = last.then(() => answer(data)));
