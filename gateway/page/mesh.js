// The picture of the mesh. It is drawn anew when workers come or go or its width changes; otherwise figures change.

import { byId, html, setText, svg } from "./dom.js";
import { clock, count, plural, rate } from "./format.js";
import { back, flow, layout } from "./layout.js";
import { Motes } from "./motes.js";

const MOST_OF_A_TIER = 16;
const POND = 14;
const TEXT = POND + 10;
const PAGE_TOKENS = 16;
const MOST_PAGES_SHOWN = 14;

export class MeshPicture {
  constructor(holder) {
    this.holder = holder;
    this.drawn = "";
    this.workers = [];
    this.queued = null;
    this.open = 0;
    new ResizeObserver(() => this.draw()).observe(holder);
  }

  /** Show a snapshot; workers that are gone and not back yet are shown as gone. */
  show(mesh) {
    const alive = new Set(mesh.workers.map((worker) => worker.id));
    const gone = new Map(mesh.departed.filter((worker) => !alive.has(worker.id)).map((worker) => [worker.id, { ...worker, gone: true }]));
    this.workers = [...mesh.workers, ...gone.values()].sort((a, b) => (a.id < b.id ? -1 : 1));
    this.queued = mesh.queued;
    this.open = mesh.open;
    this.draw();
    fillTable(this.workers);
  }

  draw() {
    const width = Math.round(this.holder.clientWidth);
    if (!width) return;
    const ids = this.workers.map((worker) => `${worker.id}@${worker.started}${worker.gone ? "-" : ""}`);
    const key = `${width} ${ids}`;
    if (key !== this.drawn) {
      this.drawn = key;
      this.build(width);
    }
    setText(this.openText, plural(this.open, "request"));
    setText(this.queueText, this.queued == null ? "away" : count(this.queued));
    for (const worker of this.workers) this.cards.get(worker.id)?.update(worker);
  }

  build(width) {
    this.motes?.clear();
    const [prefill, decode] = ["prefill", "decode"].map((tier) => this.workers.filter((worker) => worker.tier === tier));
    const shown = [prefill, decode].map((tier) => tier.slice(0, MOST_OF_A_TIER).map((worker) => worker.id));
    const plan = layout(width, ...shown);
    const live = (tier) => tier.filter((worker) => !worker.gone && plan.boxes.has(worker.id)).map((worker) => worker.id);
    const links = svg("g");
    const link = (d) => links.appendChild(svg("path", { class: "link", d }));
    this.intake = link(straight(plan.gateway, plan.queue));
    this.pulls = new Map(live(prefill).map((id) => [id, link(flow(plan.queue, plan.boxes.get(id), plan.vertical))]));
    this.handoffs = new Map();
    for (const from of live(prefill)) {
      for (const to of live(decode)) this.handoffs.set(`${from} ${to}`, link(flow(plan.boxes.get(from), plan.boxes.get(to), plan.vertical)));
    }
    this.returns = new Map(live(decode).map((id) => [id, link(back(plan.boxes.get(id), plan))]));
    this.cards = new Map([...prefill, ...decode].filter(({ id }) => plan.boxes.has(id)).map((worker) => [worker.id, new Card(worker, plan.boxes.get(worker.id))]));
    const moving = svg("g");
    this.motes = new Motes(moving);
    this.queueText = svg("text", { class: "big", x: plan.queue.x + 12, y: plan.queue.y + 55 });
    this.openText = svg("text", { class: "soft", x: plan.gateway.x + 12, y: plan.gateway.y + 52 });
    const labels = [prefill, decode].map((tier, index) => {
      const more = tier.length > MOST_OF_A_TIER ? `, ${MOST_OF_A_TIER} of ${tier.length}` : "";
      return svg("text", { class: "label", ...plan.labels[index] }, `${["prefill", "decode"][index]} workers${tier.length ? more : ": none"}`);
    });
    this.holder.replaceChildren(
      svg(
        "svg",
        { viewBox: `0 0 ${width} ${plan.height}`, height: plan.height, role: "img", "aria-label": "The mesh: gateway, queue, prefill and decode workers. The table below has the same figures." },
        links, moving, ...labels,
        hub(plan.gateway, "gateway", this.openText),
        hub(plan.queue, "queue", this.queueText),
        ...[...this.cards.values()].map((card) => card.group),
      ),
    );
  }

  /** A request goes into the queue. */
  queue() {
    this.motes?.send(this.intake, "request", { duration: 500 });
  }

  /** A worker has taken a request and handed its pages over. */
  handOff({ prefill_worker: from, decode_worker: to, handoff_ms, cached_tokens }, promptTokens) {
    const pull = this.pulls?.get(from);
    if (pull) this.motes.send(pull, "request", { delay: 350, duration: 500 });
    const path = this.handoffs?.get(`${from} ${to}`);
    if (!path) return;
    const pages = Math.max(1, Math.min(MOST_PAGES_SHOWN, Math.ceil((promptTokens - cached_tokens) / PAGE_TOKENS)));
    for (let page = 0; page < pages; page++) {
      this.motes.send(path, "page", { delay: 850 + page * 70, duration: 650 + Math.min(handoff_ms, 600) });
    }
  }

  /** Tokens go back to the gateway. */
  tokens(worker, number) {
    const path = this.returns?.get(worker);
    for (let token = 0; path && token < Math.min(number, 8); token++) {
      this.motes.send(path, "token", { delay: token * 55, duration: 1400 });
    }
  }
}

/** One worker: its pages are the water in its pond. */
class Card {
  constructor(worker, { x, y, width, height }) {
    const clip = `pond-${worker.id}`;
    this.height = height;
    this.narrow = width < 180;
    this.state = svg("text", { class: "soft state", x: width - 10, y: 20, "text-anchor": "end" });
    this.pages = svg("text", { class: "soft", x: TEXT, y: 40 });
    this.load = svg("text", { class: "soft", x: TEXT, y: 57 });
    this.rate = svg("text", { x: TEXT, y: 76 });
    this.water = svg("rect", { class: "water", width: POND, height });
    const outline = { width, height, rx: 7 };
    this.group = svg(
      "g",
      { transform: `translate(${x} ${y})`, "data-worker": worker.id },
      svg("clipPath", { id: clip }, svg("rect", outline)),
      svg("rect", { class: "box", ...outline }),
      svg("g", { "clip-path": `url(#${clip})` }, svg("rect", { class: "pond", width: POND, height }), this.water),
      svg("rect", { class: "rim", ...outline }),
      svg("text", { class: "name", x: TEXT, y: 20 }, worker.id),
      this.state, this.pages, this.load, this.rate,
    );
  }

  update(worker) {
    const fill = worker.pages_total ? worker.pages_in_use / worker.pages_total : 0;
    const state = stateOf(worker);
    this.group.setAttribute("class", worker.gone ? "gone" : state === "joined" ? "new" : "");
    this.water.style.transform = `translateY(${worker.gone || !fill ? this.height : Math.min(this.height * (1 - fill), this.height - 3)}px)`;
    setText(this.state, state);
    setText(this.pages, worker.gone ? clock(worker.at) : `${count(worker.pages_in_use)}${this.narrow ? "" : ` of ${count(worker.pages_total)}`} pages`);
    setText(this.load, worker.gone ? "" : loadOf(worker));
    setText(this.rate, worker.gone || !worker.tokens_per_second ? "" : `${rate(worker.tokens_per_second)} tok/s`);
  }
}

function loadOf({ running, waiting }) {
  const parts = [running && `${count(running)} running`, waiting && `${count(waiting)} waiting`];
  return parts.filter(Boolean).join(", ") || "idle";
}

function stateOf(worker) {
  if (worker.gone) return worker.died ? "died" : "left";
  if (worker.draining) return "leaving";
  return worker.isNew ? "joined" : "";
}

function hub({ x, y, width, height }, name, second) {
  return svg(
    "g", {},
    svg("rect", { class: "box", x, y, width, height, rx: 7 }),
    svg("text", { class: "name", x: x + 12, y: y + 24 }, name),
    second,
  );
}

function straight(from, to) {
  const y = from.y + from.height / 2;
  return from.x < to.x ? `M${from.x + from.width} ${y}H${to.x}` : `M${from.x} ${y}H${to.x + to.width}`;
}

function fillTable(workers) {
  const body = byId("figures").querySelector("tbody");
  while (body.rows.length > workers.length) body.deleteRow(-1);
  workers.forEach((worker, index) => {
    const row = body.rows[index] ?? body.appendChild(html("tr", {}, html("th", { scope: "row" }), ...Array.from({ length: 5 }, () => html("td"))));
    const pages = worker.gone ? "" : `${count(worker.pages_in_use)} of ${count(worker.pages_total)}`;
    const figures = worker.gone ? ["", "", ""] : [count(worker.running), count(worker.waiting), worker.tokens_per_second == null ? "" : rate(worker.tokens_per_second)];
    [worker.id, stateOf(worker) || "serving", pages, ...figures].forEach((text, column) => setText(row.cells[column], text));
  });
}
