const CHUNK = 4 << 20;
function render({ model, el }) {
  const button = document.createElement("button"), input = document.createElement("input");
  button.className = "jupyter-button widget-button";
  button.textContent = model.get("description");
  button.onclick = () => input.click();
  Object.assign(input, { type: "file", accept: "audio/*", hidden: true });
  let resolve;
  const onReply = () => resolve?.();
  model.on("msg:custom", onReply);
  const send = async ([file]) => {
    if (!file || button.disabled) return;
    button.disabled = true;
    for (let at = 0; at == 0 || at < file.size; at += CHUNK) {
      const bytes = await file.slice(at, at + CHUNK).arrayBuffer();
      const reply = new Promise(done => { resolve = done; });
      model.send({ name: file.name, first: at == 0, last: at + CHUNK >= file.size }, undefined, [bytes]);
      button.textContent = `${Math.round(100 * at / (file.size || 1))} %`;
      await reply;
    }
    input.value = "";
    button.disabled = false;
    button.textContent = model.get("description");
  };
  input.onchange = () => send(input.files);
  const panel = ({ target }) => {
    const box = target.closest?.(".maestlib");
    return box?.contains(el) ? box : null;
  };
  const listeners = {
    dragover: event => {
      if (!panel(event) || !event.dataTransfer?.types.includes("Files")) return;
      event.preventDefault();
      panel(event).classList.add("maestlib-drop");
    },
    dragleave: event => panel(event)?.classList.remove("maestlib-drop"),
    drop: event => {
      if (!panel(event) || !event.dataTransfer?.files.length) return;
      event.preventDefault();
      panel(event).classList.remove("maestlib-drop");
      send(event.dataTransfer.files);
    },
  };
  for (const [name, listener] of Object.entries(listeners)) document.addEventListener(name, listener);
  el.append(button, input);
  return () => {
    model.off("msg:custom", onReply);
    for (const [name, listener] of Object.entries(listeners)) document.removeEventListener(name, listener);
  };
}
export default { render };
