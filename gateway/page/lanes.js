// One request's time line: a lane for each attempt, in it the phases, all on one scale.

import { html } from "./dom.js";

/** Phases `{kind, from, to}` of an attempt in milliseconds; `until` is where an attempt that still runs ends. */
export function phases(attempt, until) {
  const end = attempt.failed ?? attempt.last_token ?? until;
  if (attempt.queue_ms == null) {
    return [{ kind: attempt.failed == null ? "queue" : "lost", from: attempt.begun, to: end }];
  }
  const found = [];
  let from = attempt.begun;
  for (const [kind, ms] of [["queue", attempt.queue_ms], ["prefill", attempt.prefill_ms], ["handoff", attempt.handoff_ms]]) {
    found.push({ kind, from, to: from + ms });
    from += ms;
  }
  const stalled = attempt.failed == null ? end : attempt.last_token ?? from; // nothing came between there and its end
  if (stalled > from) found.push({ kind: "decode", from, to: stalled });
  if (end > Math.max(stalled, from)) found.push({ kind: "lost", from: Math.max(stalled, from), to: end });
  return found;
}

/** Fill `holder` with the lanes of a request; `scale` milliseconds are its whole width. */
export function drawLanes(holder, attempts, until, scale) {
  const part = (ms) => `${Math.min((ms / scale) * 100, 100)}%`;
  const bars = attempts.map((attempt) => {
    const lane = html("div", { class: "lane" });
    const bar = (kind, from, to) => {
      const element = lane.appendChild(html("i", { class: kind }));
      element.style.left = part(from);
      element.style.width = part(to - from);
    };
    for (const { kind, from, to } of phases(attempt, until)) bar(kind, from, to);
    if (attempt.failed != null) bar("cross", attempt.failed, attempt.failed);
    return lane;
  });
  holder.replaceChildren(...bars);
}

/** Time to the first token, and tokens a second after it; null where there is none. */
export function speed({ attempts, output_tokens }) {
  const made = attempts.filter((attempt) => attempt.first_token != null);
  if (!made.length) return { first: null, perSecond: null };
  const first = made[0].first_token;
  const seconds = (made.at(-1).last_token - first) / 1000;
  return { first, perSecond: output_tokens > 1 && seconds > 0 ? (output_tokens - 1) / seconds : null };
}

/** The workers of each attempt, such as `prefill-0 → decode-1`. */
export function route(attempt) {
  return `${attempt.prefill_worker ?? "?"} → ${attempt.decode_worker ?? "?"}`;
}
