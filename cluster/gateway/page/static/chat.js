// A chat whose answer shows, token by token, which expert took it in the chosen layer.

import { category } from "./colours.js";
import { find, make, plural, say } from "./format.js";
import { headers } from "./keys.js";
import { checked, events } from "./stream.js";

export class Chat {
  #messages = [];
  #answers = [];
  #stop = null;

  constructor() {
    find("ask").addEventListener("submit", (event) => {
      event.preventDefault();
      this.#ask();
    });
    find("prompt").addEventListener("keydown", (event) => {
      if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
        event.preventDefault();
        find("ask").requestSubmit();
      }
    });
    find("layer").addEventListener("input", () => {
      find("layer").dataset.chosen = "yes";
      this.#recolour();
    });
    find("colour").addEventListener("change", () => this.#recolour());
    find("new-chat").addEventListener("click", () => {
      this.#stop?.abort();
      this.#messages = [];
      this.#answers = [];
      find("talk").replaceChildren();
      say(find("token"), "");
      find("prompt").focus();
    });
  }

  /** The cluster as it is now: the model's name, and how many layers and experts it has. */
  show(model, experts) {
    this.model = model;
    const slider = find("layer"), last = Math.max(0, (experts?.layers ?? 1) - 1);
    this.experts = experts?.experts ?? this.experts;
    if (Number(slider.max) !== last) {
      slider.max = last;
      if (slider.dataset.chosen !== "yes") slider.value = Math.floor(last / 2);
      this.#recolour();
    }
  }

  /** Colours anew: the theme is another one. */
  restyle() {
    this.#recolour();
  }

  async #ask() {
    if (this.#stop) return this.#stop.abort();
    const field = find("prompt"), content = field.value.trim();
    if (!content) return;
    field.value = "";
    if (!this.#messages.length) find("talk").replaceChildren();
    this.#messages.push({ role: "user", content });
    find("talk").append(make("p", { class: "asked" }, content));
    const answer = new Answer(find("talk"), (text) => say(find("token"), text));
    this.#answers.push(answer);
    this.#stop = new AbortController();
    say(find("send"), "Stop");
    try {
      await this.#stream(answer);
      this.#messages.push({ role: "assistant", content: answer.text });
    } catch (error) {
      const stopped = error.name === "AbortError";
      if (answer.text) this.#messages.push({ role: "assistant", content: answer.text });
      else this.#messages.pop();
      answer.end(stopped ? "stopped" : error.message, !stopped);
      if (!answer.text && !stopped) field.value = content;
    }
    this.#stop = null;
    say(find("send"), "Send");
  }

  async #stream(answer) {
    const body = {
      model: this.model, messages: this.#messages, stream: true, logprobs: true, return_routing: true,
      stream_options: { include_usage: true },
    };
    const began = performance.now();
    const response = await checked(await fetch("v1/chat/completions", {
      method: "POST", headers: { ...headers(), "Content-Type": "application/json" }, body: JSON.stringify(body), signal: this.#stop.signal,
    }));
    let usage = null;
    for await (const { data } of events(response)) {
      if (data === "[DONE]") break;
      const chunk = JSON.parse(data);
      if (chunk.error) throw new Error(chunk.error.message);
      usage = chunk.usage ?? usage;
      for (const choice of chunk.choices) {
        for (const token of choice.logprobs?.content ?? []) answer.add(token);
        if (choice.routing) answer.route(choice.routing, this.#look());
        if (choice.finish_reason === "length") answer.cut = true;
      }
      find("talk").scrollTop = find("talk").scrollHeight;
      this.#legend(answer);
    }
    const n = usage?.completion_tokens, seconds = (performance.now() - began) / 1000;
    answer.end(`${n ? `${plural(n, "token")}, ${(n / seconds).toFixed(1)} a second` : "done"}${answer.cut ? "; cut at the limit" : ""}`);
  }

  #look() {
    return { layer: Number(find("layer").value), on: find("colour").checked, experts: this.experts };
  }

  #recolour() {
    const look = this.#look();
    say(find("layer-value"), String(look.layer));
    for (const answer of this.#answers) answer.colour(look);
    this.#legend(this.#answers.at(-1));
  }

  /** Which colour is which expert, for those that took a token of the last answer. */
  #legend(answer) {
    const { layer, on, experts } = this.#look(), counts = new Map();
    for (const chosen of answer?.routed ?? []) if (chosen?.[layer]?.length) counts.set(chosen[layer][0], (counts.get(chosen[layer][0]) ?? 0) + 1);
    const total = [...counts.values()].reduce((sum, n) => sum + n, 0);
    const entries = [...counts].sort((a, b) => b[1] - a[1]).slice(0, 12).map(([expert, n]) => {
      const swatch = make("i", { class: "swatch" });
      swatch.style.background = category(expert, experts ?? 8);
      return make("span", { class: "figure" }, swatch, `expert ${expert}: ${Math.round(100 * n / total)}%`);
    });
    find("chat-legend").hidden = !on || !entries.length;
    find("chat-legend").replaceChildren(...entries);
  }
}

/** One answer: its tokens as elements, and the experts of each as they become known. */
class Answer {
  text = "";
  routed = [];
  #spans = [];
  #decoder = new TextDecoder();

  constructor(talk, tell) {
    this.element = make("p", { class: "answer" });
    this.note = make("small", { class: "dim" });
    this.tell = tell;
    talk.append(make("div", {}, this.element, this.note));
    this.element.addEventListener("pointerover", ({ target }) => this.#describe(target));
    this.element.addEventListener("focusin", ({ target }) => this.#describe(target));
    this.element.addEventListener("keydown", (event) => this.#walk(event));
  }

  add({ token, bytes }) {
    const piece = bytes ? this.#decoder.decode(new Uint8Array(bytes), { stream: true }) : token;
    this.text += piece;
    const span = make("span", { "data-token": this.#spans.length, tabindex: this.#spans.length ? -1 : 0 }, piece);
    this.#spans.push(span);
    this.element.append(span);
  }

  route({ start, experts }, look) {
    experts.forEach((layers, i) => {
      this.routed[start + i] = layers;
      this.#paint(start + i, look);
    });
  }

  colour(look) {
    this.#spans.forEach((_, i) => this.#paint(i, look));
  }

  end(text, failed = false) {
    say(this.note, text);
    this.note.classList.toggle("failed", failed);
  }

  #paint(i, { layer, on, experts }) {
    const span = this.#spans[i], chosen = this.routed[i]?.[layer];
    if (!span) return;
    const [first, second] = on && chosen?.length ? chosen : [];
    span.style.setProperty("--first", first == null ? "transparent" : category(first, experts ?? 8));
    span.style.setProperty("--second", second == null ? "transparent" : category(second, experts ?? 8));
    span.dataset.expert = first ?? "";
    this.layer = layer;
  }

  #describe(span) {
    const i = span.dataset?.token;
    if (i == null) return;
    const chosen = this.routed[i]?.[this.layer];
    const experts = chosen == null ? "its experts are not known" : !chosen.length ? "this layer has no experts" : `experts ${chosen.join(", ")}`;
    this.tell(`token ${Number(i) + 1} ${JSON.stringify(span.textContent)}: ${experts} in layer ${this.layer ?? 0}`);
  }

  #walk(event) {
    const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    const next = this.#spans[Number(event.target.dataset.token) + step];
    if (!next) return;
    event.preventDefault();
    event.target.tabIndex = -1;
    next.tabIndex = 0;
    next.focus();
  }
}
