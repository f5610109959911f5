// What moves in the picture: a mote runs along a path once. Where less motion is wanted, the path lights up instead.

import { svg } from "./dom.js";

const MOST = 160;
const LIT_MS = 700;
const calm = matchMedia("(prefers-reduced-motion: reduce)");

export class Motes {
  constructor(layer) {
    this.layer = layer;
    this.moving = new Set();
    this.frame = null;
  }

  /** Send one mote of a kind (`request`, `page` or `token`) along a path, after a delay. */
  send(path, kind, { delay = 0, duration = 700 } = {}) {
    if (calm.matches) {
      path.classList.add("lit");
      setTimeout(() => path.classList.remove("lit"), LIT_MS);
    } else if (this.moving.size < MOST && !document.hidden) {
      this.moving.add({ path, length: path.getTotalLength(), shape: null, kind, begin: performance.now() + delay, duration });
      this.frame ??= requestAnimationFrame((now) => this.step(now));
    }
  }

  clear() {
    for (const mote of this.moving) mote.shape?.remove();
    this.moving.clear();
  }

  step(now) {
    for (const mote of this.moving) {
      const part = (now - mote.begin) / mote.duration;
      if (part >= 1) {
        mote.shape?.remove();
        this.moving.delete(mote);
      } else if (part >= 0) {
        mote.shape ??= this.layer.appendChild(shapeOf(mote.kind));
        const { x, y } = mote.path.getPointAtLength(mote.length * part);
        mote.shape.setAttribute("transform", `translate(${x} ${y})`);
      }
    }
    this.frame = this.moving.size ? requestAnimationFrame((next) => this.step(next)) : null;
  }
}

function shapeOf(kind) {
  if (kind === "page") return svg("rect", { class: "mote page", x: -3.5, y: -3.5, width: 7, height: 7, rx: 1.5 });
  return svg("circle", { class: `mote ${kind}`, r: kind === "token" ? 2.5 : 4.5 });
}
