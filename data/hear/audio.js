// Sound as the model takes it: 16 kHz, mono. Decoded, filtered and recorded by the browser.

const MAX_BYTES = 500e6;
const FACTOR = 3; // browsers resample with short filters: here to 48 kHz, far above what the model reads
const CROSSINGS = 64, ROLLOFF = 0.9475937, BETA = 14.769656; // the low-pass filter is that of Python

// The modified Bessel function of order 0.
function bessel(x) {
  let sum = 1;
  for (let k = 1, term = 1; term > 1e-12 * sum; k++) sum += term *= (x / (2 * k)) ** 2;
  return sum;
}

// A windowed sinc that passes what one sample in `FACTOR` can hold.
function lowpass() {
  const half = Math.floor((CROSSINGS * FACTOR) / ROLLOFF);
  return Float32Array.from({ length: 2 * half + 1 }, (_, i) => {
    const t = ((i - half) * ROLLOFF) / FACTOR;
    const window = bessel(BETA * Math.sqrt(1 - (t / CROSSINGS) ** 2)) / bessel(BETA);
    return (ROLLOFF / FACTOR) * window * (t ? Math.sin(Math.PI * t) / (Math.PI * t) : 1);
  });
}

async function downsample(wave, rate) {
  const taps = lowpass();
  const context = new OfflineAudioContext(1, wave.length + taps.length, rate);
  const [sound, kernel] = [wave, taps].map((samples) => {
    const buffer = context.createBuffer(1, samples.length, rate);
    buffer.copyToChannel(samples, 0);
    return buffer;
  });
  const source = new AudioBufferSourceNode(context, { buffer: sound });
  const filter = new ConvolverNode(context, { buffer: kernel, disableNormalization: true });
  source.connect(filter).connect(context.destination);
  source.start();
  const filtered = (await context.startRendering()).getChannelData(0);
  const delay = (taps.length - 1) / 2;
  return Float32Array.from({ length: Math.ceil(wave.length / FACTOR) }, (_, i) => filtered[delay + i * FACTOR]);
}

export async function decode(blob, name, { sample_rate: rate, min_s, max_s }) {
  if (blob.size > MAX_BYTES) throw new Error(`${name}: larger than ${MAX_BYTES / 1e6} MB; give a shorter file.`);
  let buffer;
  try {
    buffer = await new OfflineAudioContext(1, 1, FACTOR * rate).decodeAudioData(await blob.arrayBuffer());
  } catch {
    throw new Error(`${name}: this browser cannot read it as audio. Try an mp3, m4a, flac or wav file.`);
  }
  if (buffer.duration < min_s) throw new Error(`${name}: shorter than ${min_s} s; give a longer recording.`);
  const channels = Array.from({ length: buffer.numberOfChannels }, (_, i) => buffer.getChannelData(i));
  const wave = channels[0].slice(0, max_s * FACTOR * rate);
  for (const channel of channels.slice(1)) for (let i = 0; i < wave.length; i++) wave[i] += channel[i];
  for (let i = 0; i < wave.length; i++) wave[i] /= channels.length;
  return downsample(wave, FACTOR * rate);
}

// Record until `stop()` or `seconds` have passed; `done` is the recording. Rejects where there is no microphone.
export async function record(seconds) {
  const plain = { echoCancellation: false, noiseSuppression: false, autoGainControl: false };
  const stream = await navigator.mediaDevices.getUserMedia({ audio: plain });
  const recorder = new MediaRecorder(stream);
  const parts = [];
  recorder.ondataavailable = ({ data }) => parts.push(data);
  const done = new Promise((resolve) => {
    recorder.onstop = () => {
      for (const track of stream.getTracks()) track.stop();
      resolve(new Blob(parts, { type: recorder.mimeType }));
    };
  });
  const stop = () => recorder.state === "recording" && recorder.stop();
  recorder.start();
  setTimeout(stop, seconds * 1000);
  return { stop, done };
}
