// Numbers and times as the page writes them.

export function milliseconds(ms) {
  if (ms == null) return "–";
  if (ms >= 9950) return `${(ms / 1000).toFixed(0)} s`;
  if (ms >= 1000) return `${(ms / 1000).toFixed(1)} s`;
  return `${ms.toFixed(ms < 10 && ms > 0 ? 1 : 0)} ms`;
}

export function rate(perSecond) {
  return perSecond >= 10 || perSecond === 0 ? perSecond.toFixed(0) : perSecond.toFixed(1);
}

export function count(number) {
  return Math.round(number).toLocaleString("en");
}

export function plural(number, thing) {
  return `${count(number)} ${thing}${number === 1 ? "" : "s"}`;
}

/** The time of day of a Unix time in seconds. */
export function clock(seconds) {
  return new Date(seconds * 1000).toTimeString().slice(0, 8);
}
