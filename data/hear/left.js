// What patchout leaves of a window, to be heard: gaps where no column is kept, filters where rows are dropped.

const RAMP_S = 0.005; // no clicks
const QUALITIES = [0.541, 1.307]; // of a Butterworth filter of order 4

// Times (s) and frequencies (Hz) that the kept rows and columns of patches cover, where they are apart.
function spans(kept, first, last) {
  const joined = [];
  for (const i of kept) {
    if (joined.length && first(i) <= joined.at(-1)[1]) joined.at(-1)[1] = last(i);
    else joined.push([first(i), last(i)]);
  }
  return joined;
}

// wave: of a window; kept: patches of a grid; the result is as long, at the same rate
export async function silenceDropped(wave, { rows, columns }, kept, config) {
  const { sample_rate: rate, hop_length: hop, patch, stride, row_hz: hertz } = config;
  if (kept.length === rows * columns) return wave;
  const context = new OfflineAudioContext(1, wave.length, rate);
  const buffer = context.createBuffer(1, wave.length, rate);
  buffer.copyToChannel(wave, 0);
  const gate = new GainNode(context, { gain: 0 });
  const keptColumns = new Set(kept.map((index) => index % columns)); // as the rows, in order: each row has the same
  const seconds = (frame) => (frame * hop) / rate;
  for (const [start, end] of spans(keptColumns, (c) => seconds(c * stride), (c) => seconds(c * stride + patch))) {
    gate.gain.setValueAtTime(0, start).linearRampToValueAtTime(1, start + RAMP_S);
    gate.gain.setValueAtTime(1, end - RAMP_S).linearRampToValueAtTime(0, end);
  }
  const keptRows = new Set(kept.map((index) => Math.floor(index / columns)));
  const source = new AudioBufferSourceNode(context, { buffer });
  for (const [low, high] of spans(keptRows, (r) => hertz[r][0], (r) => hertz[r][1])) {
    const filters = [["highpass", low], ["lowpass", high]]
      .filter(([, frequency]) => frequency > 0 && frequency < rate / 2)
      .flatMap(([type, frequency]) => QUALITIES.map((quality) =>
        new BiquadFilterNode(context, { type, frequency, Q: 20 * Math.log10(quality) })));
    [source, ...filters, gate].reduce((from, to) => from.connect(to));
  }
  gate.connect(context.destination);
  source.start();
  return (await context.startRendering()).getChannelData(0);
}

// A WAV file of 16 bits.
export function encodeWav(wave, rate) {
  const bytes = new DataView(new ArrayBuffer(44 + 2 * wave.length));
  const write = (at, text) => [...text].forEach((letter, i) => bytes.setUint8(at + i, letter.charCodeAt(0)));
  write(0, "RIFF");
  bytes.setUint32(4, 36 + 2 * wave.length, true);
  write(8, "WAVEfmt ");
  bytes.setUint32(16, 16, true);
  bytes.setUint16(20, 1, true); // PCM
  bytes.setUint16(22, 1, true); // mono
  bytes.setUint32(24, rate, true);
  bytes.setUint32(28, 2 * rate, true);
  bytes.setUint16(32, 2, true);
  bytes.setUint16(34, 16, true);
  write(36, "data");
  bytes.setUint32(40, 2 * wave.length, true);
  wave.forEach((sample, i) => bytes.setInt16(44 + 2 * i, 32767 * Math.max(-1, Math.min(1, sample)), true));
  return new Blob([bytes], { type: "audio/wav" });
}
