// The page: choose music, tag it, leave patches out.

import { decode, record } from "./audio.js";
import { drawGrid, drawSpectrogram } from "./draw.js";
import { encodeWav, silenceDropped } from "./left.js";
import { config, countGflop, cutWindow, gridOf, listWindows, loadModel, selectPatches } from "./model.js";

const TOP = 10; // tags shown
const RECORD_S = 30;
const DROP_ROWS = [0, 7, 8]; // the lowest and the two highest
const limits = { ...config, min_s: 0.5, max_s: 600 };

const $ = (id) => document.getElementById(id);
const percent = (value) => `${Math.round(100 * value)} %`;
const clock = (s) => `${Math.floor(Math.round(s) / 60)}:${String(Math.round(s) % 60).padStart(2, "0")}`;
const startOf = (window) => (window.first * config.hop_length) / config.sample_rate;
const endOf = (window) => startOf(window) + (window.frames * config.hop_length) / config.sample_rate;
const nameOf = (label) => config.labels[label].split("---").at(-1);
const groupOf = (label) => (config.labels[label].includes("---") ? config.labels[label].split("---")[0] : "");
const element = (tag, properties = {}, ...children) => {
  const node = Object.assign(document.createElement(tag), properties);
  node.append(...children);
  return node;
};

let model; // a promise
let song = null; // what is shown: { name, blob, wave, windows, chosen }
// a window has `full` once it is tagged, and `now` with patches left out
let latest = null; // what is being tagged, shown from its first window on
let listening = Promise.resolve();
let heard = null; // the window whose rest can be played

function topLabels(activations, count = TOP, group = "") {
  return [...activations.keys()]
    .filter((label) => !group || groupOf(label) === group)
    .sort((a, b) => activations[b] - activations[a])
    .slice(0, count);
}

// The mean over the windows that are tagged already, as `maestlib.tag`.
function meanActivations(windows) {
  const tagged = windows.filter((window) => window.full);
  return config.labels.map((_, label) =>
    tagged.reduce((sum, { full }) => sum + full.activations[label], 0) / tagged.length);
}

// ---------------------------------------------------------------- choose music

function say(text) {
  $("status").textContent = text;
}

function fail(error) {
  $("error").textContent = error.message;
  $("error").hidden = false;
  $("progress").hidden = $("stop").hidden = true;
}

async function open(blob, name) {
  $("error").hidden = true;
  say(`Decoding “${name}” …`);
  try {
    const wave = await decode(blob, name, limits);
    const mine = { name, blob, wave, windows: listWindows(wave.length), chosen: 0 };
    latest = mine;
    const follow = () => tag(mine).catch((error) => {
      say(`“${name}” was not tagged.`);
      fail(error);
    });
    listening = listening.then(follow); // after the window that is being computed for another
    await listening;
  } catch (error) {
    say(song ? `Still showing “${song.name}”.` : "Choose another file.");
    fail(error);
  }
}

async function tag(mine) {
  if (mine !== latest) return; // another one was chosen
  say(`Waiting for the model to tag “${mine.name}” …`);
  const { run, backend } = await model;
  const seconds = mine.wave.length / config.sample_rate;
  const start = performance.now();
  const progress = Object.assign($("progress"), { hidden: false, max: mine.windows.length, value: 0 });
  say(`Tagging ${clock(seconds)} of “${mine.name}” …`);
  $("stop").hidden = mine.windows.length === 1;
  $("stop").onclick = () => (mine.isStopped = true);
  for (const window of mine.windows) {
    const kept = selectPatches(gridOf(window.frames), 1, []);
    window.full = await compute(run, mine.wave, window, kept);
    if (window === mine.windows[0]) window.full = faster(window.full, await compute(run, mine.wave, window, kept));
    if (mine !== latest) return;
    progress.value += 1;
    if (window === mine.windows[0]) present(mine);
    drawTime();
    if (mine.isStopped) break;
  }
  progress.hidden = $("stop").hidden = true;
  const took = ((performance.now() - start) / 1000).toFixed(1);
  const by = backend === "webgpu" ? "WebGPU" : "WebAssembly";
  const tagged = mine.windows.filter(({ full }) => full);
  const end = mine.windows.length === tagged.length ? "" : `Stopped after ${clock(endOf(tagged.at(-1)))}. `;
  mine.windows = tagged;
  drawCost();
  say(`${end}Tagged ${clock(end ? endOf(tagged.at(-1)) : seconds)} of “${mine.name}” in ${took} s by ${by}, on this machine.`);
  offerTable();
}

// The faster of two runs of the same window: memory is allocated in the first.
const faster = (first, second) => ({ ...first, ms: Math.min(first.ms, second.ms) });

async function compute(run, wave, window, kept) {
  return { kept, ...(await run(cutWindow(wave, window), kept)) };
}

async function toggleRecording(button) {
  if (button.stop) return button.stop();
  $("error").hidden = true;
  try {
    const { stop, done } = await record(RECORD_S);
    Object.assign(button, { stop, textContent: "Stop" });
    say(`Recording; it stops by itself after ${RECORD_S} seconds.`);
    const blob = await done;
    Object.assign(button, { stop: null, textContent: "Record" });
    await open(blob, "Your recording");
  } catch (error) {
    fail(new Error(`There is no microphone to record from (${error.message}); choose a file.`));
  }
}

// ---------------------------------------------------------------- patchout

const setting = () => ({ every: Number($("every").value), rows: $("rows").checked ? DROP_ROWS : [] });
const isAll = ({ every, rows }) => every === 1 && rows.length === 0;
let computing = false;
let again = false;

// Compute the chosen window with the patches that are left; while one is computed, only the last wish is kept.
async function leaveOut() {
  drawPatches();
  again = computing;
  if (computing) return;
  computing = true;
  try {
    do {
      again = false;
      const [mine, window] = [song, song.windows[song.chosen]];
      const wanted = setting();
      const kept = selectPatches(gridOf(window.frames), wanted.every, wanted.rows);
      let now = window.full;
      await offerSound(mine, window, kept);
      if (!isAll(wanted)) {
        const { run } = await model;
        now = faster(await compute(run, mine.wave, window, kept), await compute(run, mine.wave, window, kept));
      }
      if (mine === song && window === song.windows[song.chosen] && !again) {
        window.now = now;
        drawPatches();
        drawCost();
        drawBars();
      }
    } while (again);
  } catch (error) {
    fail(error);
  }
  computing = false;
}

// Put what is left of the window into its player, which goes on where it was.
async function offerSound(mine, window, kept) {
  const left = $("left");
  const wave = cutWindow(mine.wave, window).subarray(config.context);
  const sound = encodeWav(await silenceDropped(wave, gridOf(window.frames), kept, config), config.sample_rate);
  const [isSame, wasPlaying, time] = [window === heard, !left.paused, left.currentTime];
  heard = window;
  URL.revokeObjectURL(left.src);
  left.src = URL.createObjectURL(sound);
  if (!isSame) return;
  left.currentTime = time;
  if (wasPlaying) left.play().catch(() => {}); // it was changed once more
}

function drawPatches() {
  const window = song.windows[song.chosen];
  const grid = gridOf(window.frames);
  const { every, rows } = setting();
  const kept = selectPatches(grid, every, rows);
  const view = document.querySelector("[name=view]:checked").value;
  const { now = window.full } = window;
  const block = Number($("block").value);
  const size = now.kept.length;
  const picture = { mel: window.full.mel, frames: window.frames, grid, kept: view === "attention" ? now.kept : kept };
  picture.attention = now.attention.subarray(block * size, (block + 1) * size);
  drawSpectrogram($("spectrogram"), view, picture, config);
  drawGrid($("grid"), grid, kept);
  const what = view === "attention" ? `attention of block ${block}` : "what no kept patch covers is faded out";
  $("spectrogram").ariaLabel = `Spectrogram from ${clock(startOf(window))} to ${clock(endOf(window))}; ${what}`;
  $("grid").ariaLabel = `${kept.length} of ${grid.rows * grid.columns} patches are left`;
  $("every-value").textContent = every === 1 ? "1: all" : every;
  $("every").ariaValueText = every === 1 ? "all columns" : `one column of ${every}`;
}

function fastest(length) {
  return Math.min(...song.windows.filter(({ full, frames }) => full && frames === length).map(({ full }) => full.ms));
}

function drawCost() {
  const { full, now, frames } = song.windows[song.chosen];
  const [before, after] = [topLabels(full.activations), topLabels(now.activations)];
  const stay = before.filter((label) => after.includes(label)).length;
  const ms = now === full ? fastest(frames) : now.ms;
  const faster = (fastest(frames) / ms).toFixed(1);
  const [all, kept] = [full.kept.length, now.kept.length];
  const tags = stay === TOP ? `all of its ${TOP} first tags stay` : `${stay} of its ${TOP} first tags stay`;
  $("sentence").textContent = now === full
    ? `The model sees all ${all} patches. Move the slider to leave some of them out.`
    : `The model now sees ${kept} of ${all} patches, runs ${faster}\u00a0×\u00a0faster, and ${tags}.`;
  const change = Math.max(...full.activations.map((value, label) => Math.abs(value - now.activations[label])));
  $("tokens").textContent = `${kept + 2} of ${all + 2}`;
  $("gflop").textContent = `${countGflop(kept).toFixed(2)} of ${countGflop(all).toFixed(2)} GFLOP`;
  $("ms").textContent = `${Math.round(ms)} of ${Math.round(fastest(frames))} ms`;
  $("change").textContent = now === full ? "0" : change.toFixed(2);
}

// ---------------------------------------------------------------- tags

function drawBars() {
  const { full, now = full } = song.windows[song.chosen];
  const group = $("group").value;
  const before = topLabels(full.activations, TOP, group);
  const after = topLabels(now.activations, TOP, group);
  const shown = [...before, ...after.filter((label) => !before.includes(label))];
  $("bars").replaceChildren(...shown.map((label) => {
    const fate = !after.includes(label) ? "gone" : before.includes(label) ? "stays" : "new";
    const [was, is] = [full.activations[label], now.activations[label]];
    const threshold = config.thresholds?.[label];
    const assigned = threshold !== undefined && is >= threshold;
    const bar = element("span", { className: "bar", ariaHidden: "true" },
      element("span", { className: "before" }), element("span", { className: "now" }));
    bar.children[0].style.width = `${100 * was}%`;
    bar.children[1].style.width = `${100 * is}%`;
    if (threshold !== undefined) bar.append(element("span", { className: "threshold" }));
    if (threshold !== undefined) bar.lastChild.style.left = `${100 * threshold}%`;
    const note = { gone: "no longer among the first", new: "new among the first", stays: "" }[fate];
    return element("li", { className: `${fate}${assigned ? " assigned" : ""}` },
      element("span", { className: "label" }, nameOf(label), element("small", { textContent: ` ${groupOf(label)}` })),
      bar,
      element("span", { className: "value" }, percent(is),
        element("span", { className: "unseen", textContent: `, ${percent(was)} with all patches` }),
        element("span", { className: "unseen", textContent: assigned ? ", assigned" : "" })),
      element("span", { className: "note", textContent: note }));
  }));
}

function drawTime() {
  const windows = song.windows.filter(({ full }) => full);
  const mean = meanActivations(windows);
  const head = element("tr", {}, element("th", { scope: "col", textContent: "tag" }), element("th", { scope: "col", textContent: "whole" }));
  for (const [i, window] of windows.entries()) {
    const button = element("button", { type: "button", textContent: clock(startOf(window)), ariaPressed: String(i === song.chosen) });
    button.setAttribute("aria-label", `Look at ${clock(startOf(window))} to ${clock(endOf(window))}`);
    button.onclick = () => choose(i);
    head.append(element("th", { scope: "col" }, button));
  }
  const rows = topLabels(mean).map((label) => {
    const values = [mean, ...windows.map(({ full }) => full.activations)].map((activations) => activations[label]);
    const cells = values.map((value) => {
      const cell = element("td", {}, element("span", { textContent: Math.round(100 * value) }));
      cell.style.setProperty("--level", value.toFixed(2));
      return cell;
    });
    return element("tr", {}, element("th", { scope: "row", textContent: nameOf(label) }), ...cells);
  });
  const focused = [...$("time").querySelectorAll("button")].indexOf(document.activeElement);
  $("time").replaceChildren(element("thead", {}, head), element("tbody", {}, ...rows));
  $("time").querySelectorAll("button")[focused]?.focus();
}

function offerTable() {
  const quote = (text) => `"${String(text).replaceAll('"', '""')}"`;
  const times = song.windows.map((window) => `${startOf(window).toFixed(2)}-${endOf(window).toFixed(2)} s`);
  const mean = meanActivations(song.windows);
  const rows = config.labels.map((label, i) => [quote(label), config.thresholds?.[i] ?? "", mean[i].toFixed(4),
    ...song.windows.map(({ full }) => full.activations[i].toFixed(4))]);
  const text = [["label", "threshold", "whole", ...times], ...rows].map((row) => row.join(",")).join("\n");
  URL.revokeObjectURL($("save").href);
  $("save").href = URL.createObjectURL(new Blob([`${text}\n`], { type: "text/csv" }));
  $("save").hidden = false;
}

// ---------------------------------------------------------------- the window that is shown

function present(mine) {
  song = mine;
  URL.revokeObjectURL($("player").src);
  $("player").src = URL.createObjectURL(mine.blob);
  $("name").textContent = mine.name;
  $("save").hidden = true;
  show();
}

function choose(index) {
  song.chosen = index;
  $("player").currentTime = startOf(song.windows[index]);
  show();
  drawTime();
}

function show() {
  const window = song.windows[song.chosen];
  window.now = window.full;
  $("result").hidden = false;
  $("from").textContent = clock(startOf(window));
  $("to").textContent = clock(endOf(window));
  $("window-name").textContent = `${clock(startOf(window))} to ${clock(endOf(window))}`;
  drawCost();
  drawBars();
  leaveOut();
}

function moveCursor() {
  const window = song.windows[song.chosen];
  const start = startOf(window);
  const place = ($("left").paused ? $("player").currentTime - start : $("left").currentTime) / (endOf(window) - start);
  $("cursor").hidden = !(place > 0 && place < 1);
  $("cursor").style.left = `${100 * place}%`;
  if (!$("player").paused || !$("left").paused) requestAnimationFrame(moveCursor);
}

function fillMenus() {
  const groups = [...new Set(config.labels.map((_, label) => groupOf(label)))].filter(Boolean);
  $("group").append(new Option("the first tags of all groups", ""), ...groups.map((group) => new Option(group, group)));
  for (let block = 0; block < config.depth; block++) $("block").append(new Option(block, block));
  $("block").value = config.depth - 1;
  $("model-name").textContent = config.name;
  $("runtime").textContent = config.runtime;
}

function listen() {
  const files = (list) => list?.[0] && open(list[0], list[0].name);
  $("file").onchange = () => {
    files($("file").files);
    $("file").value = ""; // the same file can be chosen again
  };
  document.addEventListener("dragover", (event) => {
    event.preventDefault();
    $("drop").classList.add("over");
  });
  document.addEventListener("dragleave", (event) => event.relatedTarget || $("drop").classList.remove("over"));
  document.addEventListener("drop", (event) => {
    event.preventDefault();
    $("drop").classList.remove("over");
    files(event.dataTransfer.files);
  });
  for (const button of document.querySelectorAll("[data-clip]"))
    button.onclick = async () => open(await (await fetch(`clips/${button.dataset.clip}.mp3`)).blob(), button.textContent);
  $("record").onclick = () => toggleRecording($("record"));
  $("record").hidden = !navigator.mediaDevices || !window.MediaRecorder; // only over https and on this machine
  for (const id of ["every", "rows"]) $(id).oninput = leaveOut;
  for (const input of document.querySelectorAll("[name=view], #block"))
    input.onchange = () => {
      const attention = document.querySelector("[name=view]:checked").value === "attention";
      $("block-label").hidden = $("attention-note").hidden = !attention;
      drawPatches();
    };
  $("group").onchange = drawBars;
  for (const [player, other] of [["player", "left"], ["left", "player"]]) {
    $(player).onplay = () => {
      $(other).pause();
      moveCursor();
    };
    $(player).onseeked = moveCursor;
  }
  matchMedia("(prefers-color-scheme: dark)").onchange = () => song && drawPatches();
}

fillMenus();
listen();
model = loadModel();
model.then(() => latest || say("Ready."), (error) => {
  say("The model cannot be loaded.");
  fail(error);
});
