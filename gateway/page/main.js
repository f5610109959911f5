// Puts the page together: what the gateway tells goes to the picture, the time lines and the chat.

import { Chat } from "./chat.js";
import { byId, html, setText } from "./dom.js";
import { clock, count, rate } from "./format.js";
import { MeshPicture } from "./mesh.js";
import { Requests } from "./requests.js";
import { follow, useKey } from "./server.js";

const MOST_NEWS = 4;
const NEW_SECONDS = 15;

const announce = (text) => setText(byId("announcer"), text);
const picture = new MeshPicture(byId("picture"));
const requests = new Requests();
const chat = new Chat(announce);
const news = [];
let mesh = null;
let known = null; // workers by id and epoch, once the first snapshot is there
let caughtUp = false; // the first event tells of what was before: nothing moves then
let paused = false;

function takeMesh(snapshot) {
  const now = new Map(snapshot.workers.map((worker) => [keyOf(worker), worker]));
  const before = known ?? now;
  const told = new Set(news.map((item) => item.key));
  for (const gone of snapshot.departed) {
    const key = `${keyOf(gone)} gone`;
    if (!told.has(key)) tell(key, gone.at, gone.id, gone.died ? "died" : "left");
  }
  for (const [key, worker] of now) {
    if (!before.has(key)) tell(key, Date.now() / 1000, worker.id, "joined");
  }
  known = now;
  mesh = snapshot;
  chat.model = snapshot.model;
}

/** A worker that was started again is another one. */
function keyOf({ id, started }) {
  return `${id}@${started}`;
}

function tell(key, at, id, what) {
  news.push({ key, at, id, what });
  if (known) announce(`${id} ${what}`);
  if (news.length > 100) news.shift();
}

function takeRequests(changed) {
  if (caughtUp && !paused) {
    for (const request of changed) animate(requests.requests.get(request.id), request);
  }
  caughtUp = true;
  requests.update(changed);
  chat.update(changed);
}

/** Show what happened to a request since it was last heard of. */
function animate(before, request) {
  if (!before) picture.queue();
  request.attempts.forEach((attempt, index) => {
    const old = before?.attempts[index];
    if (!old && index > 0) picture.queue();
    if (attempt.prefill_worker && !old?.prefill_worker) picture.handOff(attempt, request.prompt_tokens);
    const fresh = attempt.tokens - (old?.tokens ?? 0);
    if (fresh > 0) picture.tokens(attempt.decode_worker, fresh);
  });
}

function draw() {
  if (paused) return;
  requests.draw();
  if (!mesh) return;
  const recent = new Set(news.filter((item) => item.at > Date.now() / 1000 - NEW_SECONDS).map((item) => item.key));
  for (const worker of mesh.workers) worker.isNew = recent.has(keyOf(worker));
  picture.show(mesh);
  setText(byId("model"), mesh.model);
  const sum = (field, tier) => mesh.workers.reduce((total, worker) => total + (tier && worker.tier !== tier ? 0 : worker[field]), 0);
  const totals = {
    rate: mesh.workers.some((worker) => worker.tokens_per_second != null) ? rate(sum("tokens_per_second", "decode")) : "–",
    running: count(sum("running")),
    waiting: count(sum("waiting")),
    pages: `${count((100 * sum("pages_in_use")) / (sum("pages_total") || 1))} %`,
  };
  for (const [name, text] of Object.entries(totals)) setText(document.querySelector(`[data-total="${name}"]`), text);
  const items = news.slice(-MOST_NEWS).reverse();
  byId("news").replaceChildren(
    ...items.map(({ at, id, what }) => html("li", { class: what }, html("span", {}, clock(at)), html("span", {}, `${id} `, html("b", {}, what)))),
  );
  linkIs("live", mesh.not_ready ?? "live");
}

function linkIs(state, text) {
  byId("link").dataset.state = state;
  setText(byId("link-text"), text);
}

async function onState(state, message) {
  if (state === "live") {
    byId("key").hidden = true;
    caughtUp = false;
    linkIs("live", "live");
  } else if (state === "away") {
    linkIs("away", message ?? "the gateway is away");
  } else {
    linkIs("away", "key wanted");
    await keyGiven(message);
  }
}

function keyGiven(message) {
  const again = !byId("key").hidden;
  byId("key").hidden = false;
  setText(byId("key-note"), again ? message : "");
  byId("key-field").focus();
  return new Promise((resolve) => {
    byId("key").addEventListener("submit", (event) => {
      event.preventDefault();
      useKey(byId("key-field").value);
      resolve();
    }, { once: true });
  });
}

byId("pause").addEventListener("click", () => {
  paused = !paused;
  byId("pause").setAttribute("aria-pressed", paused);
  draw();
});

setInterval(draw, 1000); // bars of requests that wait, and workers that are no longer new
follow((name, data) => {
  if (name === "mesh") takeMesh(data);
  if (name === "requests") takeRequests(data);
  draw();
}, onState);
