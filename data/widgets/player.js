function render({ model, el }) {
  const audio = document.createElement("audio");
  Object.assign(audio, { controls: true, className: "maestlib-audio" });
  audio.setAttribute("aria-label", "audio at the input rate of the model");
  audio.style.cssText = "width: 100%; height: 36px";
  const load = () => {
    const time = model.get("time"), goesOn = time > 0 && !audio.paused;  // the same clip, in another version
    URL.revokeObjectURL(audio.src);
    const flac = model.get("flac");
    if (flac.byteLength) audio.src = URL.createObjectURL(new Blob([flac], { type: "audio/flac" }));
    audio.currentTime = time;
    if (goesOn) audio.play().catch(() => {});
  };
  const report = () => { model.set("time", audio.currentTime); model.save_changes(); };
  let clock;
  audio.onplay = () => {
    document.querySelectorAll(".maestlib-audio").forEach(other => other == audio || other.pause());
    clearInterval(clock); clock = setInterval(report, 100);
  };
  audio.onpause = audio.onseeked = () => { if (audio.paused) clearInterval(clock); report(); };
  model.on("change:flac", load);
  model.on("msg:custom", ({ seek }) => { audio.currentTime = seek; audio.play().catch(() => {}); });
  load();
  el.append(audio);
  return () => { clearInterval(clock); audio.pause(); model.off("change:flac", load); };
}
export default { render };
