// The newest requests as a waterfall. Rows are kept while their request is, so that focus and open details stay.

import { byId, html, setText } from "./dom.js";
import { count, milliseconds, plural, rate } from "./format.js";
import { drawLanes, route, speed } from "./lanes.js";

const MOST = 100;
const FEW = 12;
const STEPS = [1, 1.5, 2, 3, 4, 5, 7.5];

export class Requests {
  constructor() {
    this.requests = new Map();
    this.rows = new Map();
    this.all = false;
    byId("more").addEventListener("click", () => {
      this.all = !this.all;
      this.draw();
    });
  }

  /** Take requests that are new or changed. */
  update(changed) {
    for (const request of changed) {
      request.seen = this.requests.get(request.id)?.seen ?? performance.now();
      this.requests.set(request.id, request);
    }
    for (const id of this.requests.keys()) {
      if (this.requests.size <= MOST) break;
      this.requests.delete(id);
    }
  }

  draw() {
    const shown = [...this.requests.values()].reverse().slice(0, this.all ? MOST : FEW);
    const scale = niceAbove(Math.max(...shown.map(elapsed), 100));
    const kept = new Set(shown.map((request) => request.id));
    for (const [id, row] of this.rows) {
      if (kept.has(id)) continue;
      row.item.remove();
      this.rows.delete(id);
    }
    shown.forEach((request, index) => {
      const row = this.rows.get(request.id) ?? new Row(request);
      this.rows.set(request.id, row);
      const list = byId("rows");
      if (list.children[index] !== row.item) list.insertBefore(row.item, list.children[index] ?? null);
      row.update(request, scale);
    });
    byId("no-requests").hidden = byId("axis").hidden = false;
    byId(shown.length ? "no-requests" : "axis").hidden = true;
    const ticks = byId("axis").children;
    setText(ticks[1], milliseconds(scale / 2));
    setText(ticks[2], milliseconds(scale));
    const more = byId("more");
    more.hidden = this.requests.size <= FEW;
    more.setAttribute("aria-expanded", this.all);
    setText(more, this.all ? "Show fewer" : `Show all ${this.requests.size}`);
  }
}

class Row {
  constructor(request) {
    this.name = html("span", { class: "mono" }, request.id.split("-")[1].slice(0, 6));
    this.size = html("span", { class: "size" });
    this.route = html("span", { class: "route" });
    this.lanes = html("div", { class: "lanes", "aria-hidden": "true" });
    this.first = html("span");
    this.result = html("span");
    this.table = html("tbody");
    const head = ["workers", "queue", "prefill", "handoff", "decode", "cached", "tokens", "drafted"];
    this.item = html(
      "li", { "data-request": request.id },
      html(
        "details", {},
        html("summary", {}, this.name, this.size, this.route, this.lanes, html("span", { class: "outcome" }, this.first, this.result)),
        html(
          "div", { class: "scroll", tabindex: "0", role: "region", "aria-label": `Attempts of ${this.name.textContent}` },
          html("table", {}, html("thead", {}, html("tr", {}, html("th", { scope: "col" }, "attempt"), ...head.map((text) => html("th", { scope: "col" }, text)))), this.table),
        ),
      ),
    );
    this.drawn = "";
  }

  update(request, scale) {
    const key = JSON.stringify([request, scale, request.outcome === "running" && elapsed(request)]);
    if (key === this.drawn) return;
    this.drawn = key;
    const { first, perSecond } = speed(request);
    setText(this.size, `${count(request.prompt_tokens)} → ${count(request.output_tokens)} tok`);
    setText(this.route, request.attempts.at(-1).prefill_worker ? route(request.attempts.at(-1)) : "");
    this.item.classList.toggle("running", request.outcome === "running");
    setText(this.first, first == null ? "" : `ttft ${milliseconds(first)}`);
    const [text, bad] = resultOf(request, perSecond);
    setText(this.result, text);
    this.result.classList.toggle("bad", bad);
    drawLanes(this.lanes, request.attempts, elapsed(request), scale);
    this.table.replaceChildren(...request.attempts.flatMap((attempt, index) => attemptRows(attempt, index)));
  }
}

function resultOf(request, perSecond) {
  if (request.outcome === "running") return [perSecond == null ? "running" : `${rate(perSecond)} tok/s`, false];
  if (request.outcome !== "ok") return [request.outcome.replaceAll("_", " "), request.outcome !== "cancelled"];
  return [perSecond == null ? milliseconds(request.elapsed) : `${rate(perSecond)} tok/s`, false];
}

function attemptRows(attempt, index) {
  const decode = attempt.first_token == null ? null : attempt.last_token - attempt.first_token;
  const times = [attempt.queue_ms, attempt.prefill_ms, attempt.handoff_ms, decode].map(milliseconds);
  const counts = [attempt.cached_tokens, attempt.tokens, attempt.accepted].map(count);
  const cells = [route(attempt), ...times, ...counts].map((text) => html("td", {}, text));
  const rows = [html("tr", {}, html("th", { scope: "row" }, `${index + 1}`), ...cells)];
  const why = [];
  if (attempt.redeliveries) why.push(`claimed from ${plural(attempt.redeliveries, "prefill worker")} that fell silent`);
  if (attempt.failure) why.push(`went on elsewhere after ${milliseconds(attempt.failed)}: ${attempt.failure}`);
  if (why.length) rows.push(html("tr", { class: "why" }, html("td"), html("td", { colspan: "8" }, why.join("; "))));
  return rows;
}

/** Milliseconds that a request has taken so far; one that nothing is heard of grows by this page's own clock. */
function elapsed(request) {
  if (request.outcome !== "running" || request.elapsed > 0) return Math.max(request.elapsed, 1);
  return Math.max(performance.now() - request.seen, 1);
}

function niceAbove(value) {
  const power = 10 ** Math.floor(Math.log10(value));
  return (STEPS.find((step) => step * power >= value) ?? 10) * power;
}
