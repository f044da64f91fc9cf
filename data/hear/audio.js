// Sound as the model takes it: 16 kHz, mono. Decoded, resampled and recorded by the browser.

const MAX_BYTES = 500e6;

export async function decode(blob, name, { sample_rate: rate, min_s, max_s }) {
  if (blob.size > MAX_BYTES) throw new Error(`${name}: larger than ${MAX_BYTES / 1e6} MB; give a shorter file.`);
  let buffer;
  try {
    buffer = await new OfflineAudioContext(1, 1, rate).decodeAudioData(await blob.arrayBuffer());
  } catch {
    throw new Error(`${name}: this browser cannot read it as audio. Try an mp3, m4a, flac or wav file.`);
  }
  if (buffer.duration < min_s) throw new Error(`${name}: shorter than ${min_s} s; give a longer recording.`);
  const channels = Array.from({ length: buffer.numberOfChannels }, (_, i) => buffer.getChannelData(i));
  const wave = channels[0].slice(0, max_s * rate);
  for (const channel of channels.slice(1)) for (let i = 0; i < wave.length; i++) wave[i] += channel[i];
  return channels.length > 1 ? wave.map((value) => value / channels.length) : wave;
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
