
const draw = VIEW.prototype.perform_render;
VIEW.prototype.perform_render = function () {
  draw.call(this);
  const fit = () => {
    const [is, drawn] = [this.el.clientWidth, this.el._fullLayout?.width];
    if (is && drawn && Math.abs(is - drawn) >= 1) this.autosizeFigure();
  };
  new ResizeObserver(fit).observe(this.el);
};
