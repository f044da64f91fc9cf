// The slider of the front page: keep every k-th column of patches of ten seconds of a mel-spectrogram.
// Patches span 16 frames by 16 bands, ten apart: 61 columns of 9 patches (models/patchout.ipynb).
const FRAMES = 625, PATCH = 16, STRIDE = 10, COLUMNS = 61, ROWS = 9;
const slider = document.querySelector(".patchout input");
const veil = document.querySelector(".patchout .veil");
const text = document.querySelector(".patchout output");

function draw() {
  const every = Number(slider.value);
  let path = "", end = 0, kept = 0;
  for (let column = 0; column < COLUMNS; column += every, kept++) {
    const start = column * STRIDE;
    if (start > end) path += `M${end} 0H${start}V96H${end}Z`;
    end = start + PATCH;
  }
  if (end < FRAMES) path += `M${end} 0H${FRAMES}V96H${end}Z`;
  veil.setAttribute("d", path);
  const patches = kept * ROWS, all = COLUMNS * ROWS;
  const share = every == 1 ? "every column" : `one column in ${every}`;
  text.innerHTML = `${share}: <b>${patches}</b> of ${all} patches, ${Math.round((100 * patches) / all)}\u00a0%`;
  slider.setAttribute("aria-valuetext", share);
}
slider.addEventListener("input", draw);
draw();
