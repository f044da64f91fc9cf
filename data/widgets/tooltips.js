function render({ model, el }) {
  const hint = ({ target }) => {
    if (!target.closest?.(".maestlib")?.contains(el)) return;
    target.setAttribute("data-lm-suppress-shortcuts", "true");
    for (const [name, tip] of Object.entries(model.get("tips")))
      target.closest("." + name)?.setAttribute("title", tip);
  };
  const events = ["focusin", "mouseover"];
  events.forEach(name => document.addEventListener(name, hint));
  return () => events.forEach(name => document.removeEventListener(name, hint));
}
export default { render };
