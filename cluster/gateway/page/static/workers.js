// Processes: expert workers as cards with state and load, routers and gateways as lines.

import { category } from "./colours.js";
import { count, find, make, percent, plural, ratio, say, UNKNOWN } from "./format.js";

const MANY = 24; // workers whose cards say less
const STATES = { ready: "ready", starting: "starting", draining: "draining", lost: "lost", drained: "drained", isolated: "isolated" };

export class Workers {
  #cards = new Map();
  #others = new Map();

  /** `verbs(id, drained)`: buttons for a worker; none without the admin key. */
  constructor(verbs) {
    this.verbs = verbs;
  }

  show(document, operates) {
    const workers = document.members.filter((member) => member.role === "expert").sort((a, b) => a.id.localeCompare(b.id, "en", { numeric: true }));
    const many = workers.length > MANY;
    const placed = document.placement?.workers ?? workers.map((worker) => worker.id);
    const total = workers.reduce((sum, worker) => sum + (worker.rows ?? 0), 0), mean = total / (workers.length || 1);
    const most = Math.max(1, ...workers.map((worker) => worker.rows ?? 0));
    find("workers").classList.toggle("many", many);
    keep(this.#cards, find("workers"), workers, () => new Card(this.verbs)).forEach(([card, worker]) =>
      card.show(worker, { total, mean, most, window: document.window_s, colour: colourOf(placed, worker.id), operates, many }));
    const balance = document.imbalance == null ? "" : `imbalance ${ratio(document.imbalance)} (max / mean, ${document.window_s} s window)`;
    say(find("balance"), workers.length ? balance : "There are none: each router computes the experts itself.");
    const others = document.members.filter((member) => member.role !== "expert" && member.role !== "controller");
    keep(this.#others, find("others"), others, () => new Line()).forEach(([line, member]) => line.show(member));
  }
}

/** The hue that stands for a worker everywhere. */
export const colourOf = (placed, id) => (placed.includes(id) ? category(placed.indexOf(id), placed.length) : "var(--dim)");

class Card {
  constructor(verbs) {
    this.makeVerbs = verbs;
    this.name = make("strong");
    this.state = make("span", { class: "state" });
    this.meter = make("meter", { min: 0, max: 1 });
    this.swatch = make("i", { class: "swatch" });
    this.rows = make("span", { class: "figure" });
    this.times = make("span", { class: "figure" });
    this.slots = make("span", { class: "dim figure" });
    this.verbs = make("span", { class: "verbs" });
    this.element = make("li", {}, make("p", {}, this.swatch, this.name, this.state), this.meter,
      make("p", {}, this.rows, this.times), make("p", {}, this.slots), this.verbs);
  }

  show(worker, { total, mean, most, window, colour, operates, many }) {
    const state = worker.drained && worker.state === "ready" ? "drained" : worker.state;
    say(this.name, worker.id);
    say(this.state, STATES[state] ?? state);
    this.state.dataset.state = state;
    this.swatch.style.background = colour;
    this.meter.value = (worker.rows ?? 0) / most;
    this.meter.setAttribute("aria-label", `load of ${worker.id}`);
    say(this.rows, worker.rows == null ? "load unknown" : `${count(worker.rows / window)} rows/s`);
    say(this.times, total > 0 ? `${ratio(worker.rows / mean)}×${many ? "" : ` · ${percent(worker.rows / total)}`}` : UNKNOWN);
    this.element.title = `process ${worker.pid}, epoch ${worker.epoch || UNKNOWN}`;
    say(this.slots, worker.slots ? `${worker.replicas} of ${worker.slots} slots` : plural(worker.replicas, "replica"));
    const wanted = operates ? `${worker.id} ${worker.drained}` : "";
    if (this.verbs.dataset.of !== wanted) {
      this.verbs.dataset.of = wanted;
      this.verbs.replaceChildren(...(operates ? this.makeVerbs(worker.id, worker.drained) : []));
    }
  }
}

class Line {
  constructor() {
    this.name = make("strong");
    this.state = make("span", { class: "state" });
    this.says = make("span", { class: "dim figure" });
    this.element = make("li", {}, this.name, this.state, this.says);
  }

  show({ id, role, state, detail }) {
    say(this.name, id);
    say(this.state, STATES[state] ?? state);
    this.state.dataset.state = state;
    const { running, waiting, free_blocks: free, total_blocks: blocks, open, requests } = detail;
    if (role === "router" && blocks) say(this.says, `${running} running, ${waiting} waiting, KV ${percent(1 - free / blocks)}`);
    else if (role === "gateway" && requests != null) say(this.says, `${open} open of ${plural(requests, "request")}`);
    else say(this.says, "has said no numbers yet");
  }
}

/** One part of the page for each member, in their order; those of members that left go. */
function keep(parts, list, members, create) {
  for (const [id, part] of parts) if (!members.some((member) => member.id === id)) {
    part.element.remove();
    parts.delete(id);
  }
  return members.map((member, i) => {
    if (!parts.has(member.id)) parts.set(member.id, create());
    const part = parts.get(member.id);
    if (list.children[i] !== part.element) list.insertBefore(part.element, list.children[i] ?? null);
    return [part, member];
  });
}
