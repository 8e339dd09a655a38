// What happened, newest first.

import { find, make, say, time, UNKNOWN } from "./format.js";

const LEVELS = { info: "", good: "good: ", warning: "warning: ", error: "error: " };

export class Events {
  #newest = 0;

  show({ events, rebalancer }) {
    const list = find("events");
    if (events.length && events[0].number > this.#newest && this.#newest && events.length >= 200) list.replaceChildren();
    for (const event of events) if (event.number > this.#newest) {
      this.#newest = event.number;
      list.prepend(make("li", { "data-level": event.level },
        make("time", { datetime: new Date(1000 * event.at).toISOString(), class: "figure dim" }, time(event.at)),
        make("span", { class: "kind" }, event.kind), make("span", {}, make("span", { class: "hidden" }, LEVELS[event.level] ?? ""), event.text)));
    }
    while (list.children.length > 200) list.lastElementChild.remove();
    list.hidden = !list.children.length;
    find("events-empty").hidden = !list.hidden;
    if (rebalancer) {
      const looked = rebalancer.looked ? ` at ${time(rebalancer.looked)}` : "";
      say(find("rebalancer"), rebalancer.mode === "off" ? "rebalancer off" : `rebalancer ${rebalancer.mode}: ${rebalancer.decision ?? UNKNOWN}${looked}`);
    }
  }
}
