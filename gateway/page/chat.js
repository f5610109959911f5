// The chat: several turns, streamed, each answer with its own figures.

import { byId, html, setText } from "./dom.js";
import { count, milliseconds, plural, rate } from "./format.js";
import { drawLanes, route } from "./lanes.js";
import { ask, events } from "./server.js";

const TEMPERATURE = 0.7; // small models wander at 1, OpenAI's default

export class Chat {
  /** `announce` tells screen readers of a whole answer, not of each word. */
  constructor(announce) {
    this.announce = announce;
    this.model = null;
    this.turns = [];
    this.answers = new Map();
    this.running = null;
    this.question = byId("question");
    byId("ask").addEventListener("submit", (event) => {
      event.preventDefault();
      this.send(this.question.value.trim());
    });
    this.question.addEventListener("keydown", (event) => {
      if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
      event.preventDefault();
      this.send(this.question.value.trim());
    });
    byId("stop").addEventListener("click", () => this.running?.abort());
    byId("new-chat").addEventListener("click", () => this.clear());
    for (const example of document.querySelectorAll(".example")) {
      example.addEventListener("click", () => this.send(example.textContent));
    }
  }

  clear() {
    this.running?.abort();
    this.turns = [];
    this.answers.clear();
    byId("messages").replaceChildren();
    byId("welcome").hidden = false;
    byId("new-chat").disabled = true;
    this.question.focus();
  }

  /** What the mesh tells of requests: those that are answers here show which workers served them. */
  update(requests) {
    for (const request of requests) this.answers.get(request.id)?.served(request);
  }

  async send(text) {
    if (!text || this.running || !this.model) return;
    this.question.value = "";
    this.question.focus();
    byId("welcome").hidden = true;
    const turns = this.turns;
    turns.push({ role: "user", content: text });
    this.show("you", "You", html("div", { class: "said" }, text));
    const answer = new Answer();
    this.show("model", this.model, ...answer.parts);
    this.running = new AbortController();
    this.buttons();
    try {
      await this.stream(turns, answer);
      this.announce(answer.text.data);
    } catch (error) {
      const stopped = error.name === "AbortError";
      answer.fail(stopped ? "stopped" : error.message, !stopped);
      this.announce(stopped ? "Stopped." : `The answer failed: ${error.message}`);
    } finally {
      this.running = null;
      this.buttons();
    }
    if (answer.text.data) turns.push({ role: "assistant", content: answer.text.data });
    else turns.pop();
  }

  async stream(messages, answer) {
    const body = { model: this.model, messages, stream: true, stream_options: { include_usage: true }, temperature: TEMPERATURE };
    const response = await ask("/v1/chat/completions", {
      method: "POST",
      headers: { "Content-Type": "application/json" },
      body: JSON.stringify(body),
      signal: this.running.signal,
    });
    for await (const { data } of events(response)) {
      if (data === "[DONE]") return;
      const chunk = JSON.parse(data);
      if (chunk.error) throw new Error(chunk.error.message);
      this.answers.set(chunk.id, answer);
      this.keepInView(() => answer.take(chunk));
    }
    throw new Error("the connection broke");
  }

  show(kind, who, ...parts) {
    byId("messages").append(html("li", { class: kind }, html("div", { class: "who" }, who), ...parts));
    byId("conversation").scrollTop = byId("conversation").scrollHeight;
  }

  /** Follow the text, unless the reader has scrolled up. */
  keepInView(change) {
    const view = byId("conversation");
    const atEnd = view.scrollHeight - view.scrollTop - view.clientHeight < 40;
    change();
    if (atEnd) view.scrollTop = view.scrollHeight;
  }

  buttons() {
    if (!this.running && document.activeElement === byId("stop")) this.question.focus();
    byId("stop").disabled = this.running === null;
    byId("send").disabled = this.running !== null;
    byId("new-chat").disabled = this.turns.length === 0;
  }
}

class Answer {
  constructor() {
    this.asked = performance.now();
    this.first = null;
    this.last = null;
    this.usage = null;
    this.request = null;
    this.text = document.createTextNode("");
    this.lanes = html("div", { class: "lanes", "aria-hidden": "true" });
    this.facts = html("p", { class: "facts" }, "waiting");
    this.note = html("p", { class: "facts" });
    this.parts = [html("div", { class: "said" }, this.text), this.lanes, this.facts, this.note];
  }

  take(chunk) {
    const now = performance.now();
    const text = chunk.choices[0]?.delta.content;
    if (text) {
      this.text.data += text;
      this.first ??= now;
      this.last = now;
    }
    if (chunk.usage) this.usage = chunk.usage;
    this.write();
  }

  served(request) {
    this.request = request;
    this.write();
  }

  fail(text, bad) {
    setText(this.note, text);
    this.note.classList.toggle("error", bad);
    this.write();
  }

  /** Time to first token and rate as this page saw them; the rest as the mesh tells it. */
  write() {
    const facts = [];
    if (this.first !== null) facts.push(`first token ${milliseconds(this.first - this.asked)}`);
    const tokens = this.usage?.completion_tokens ?? this.request?.output_tokens ?? 0;
    if (tokens > 1 && this.last > this.first) facts.push(`${rate(((tokens - 1) / (this.last - this.first)) * 1000)} tok/s`);
    if (tokens) facts.push(plural(tokens, "token"));
    const attempts = this.request?.attempts ?? [];
    const drafted = this.usage?.completion_tokens_details?.accepted_prediction_tokens ?? attempts.reduce((sum, attempt) => sum + attempt.accepted, 0);
    if (drafted) facts.push(`${count(drafted)} of them drafted`);
    const routes = attempts.filter((attempt) => attempt.prefill_worker).map(route);
    if (routes.length) facts.push(routes.join(", then "));
    setText(this.facts, facts.join(" · ") || "waiting");
    if (attempts.length) drawLanes(this.lanes, attempts, this.request.elapsed, Math.max(this.request.elapsed, 1));
  }
}
