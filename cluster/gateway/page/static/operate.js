// An operator's verbs. The admin API decides on each; this only asks, and says what came of it.

import { find, make, ratio, say } from "./format.js";
import { adminHeaders, askAdmin, confirmed, forgetAdmin, hasAdmin } from "./keys.js";
import { checked } from "./stream.js";

export class Operate {
  /** `told(text, failed)` says what came of a verb; `changed()` after the key came or went. */
  constructor(told, changed) {
    this.told = told;
    this.changed = changed;
    find("operate").addEventListener("click", async () => {
      if (hasAdmin()) forgetAdmin();
      else await askAdmin();
      this.#show();
    });
    find("rebalance").addEventListener("click", () => this.#rebalance());
  }

  get on() {
    return hasAdmin();
  }

  /** Buttons of a worker's card. */
  worker(id, drained) {
    if (drained) return [make("button", { type: "button", onclick: () => this.#do(`workers/${id}/undrain`, {}, `${id} may be used again`) }, "Undrain")];
    const drain = async () => {
      if (await confirmed(`Drain ${id}?`, "Everything it holds moves to the other workers, and nothing comes to it until it is undrained.", "Drain"))
        this.#do(`workers/${id}/drain`, {});
    };
    return [make("button", { type: "button", onclick: drain }, "Drain")];
  }

  /** Buttons for the cell that is held: another replica, a move, one replica less. */
  cell(layer, expert, homes, workers) {
    const where = `${layer}:${expert}`, holders = homes.map(([worker]) => worker), others = workers.filter((id) => !holders.includes(id));
    const choice = (label, ids) => make("select", { "aria-label": label }, ...ids.map((id) => make("option", {}, id)));
    const to = choice(`Worker that is to hold ${where}`, others), from = choice(`Worker that gives ${where} up`, holders);
    const button = (text, act) => make("button", { type: "button", onclick: act }, text);
    const parts = [];
    if (others.length) parts.push(
      button("Replicate", () => this.#do("placement/replicate", { layer, expert, worker: to.value })),
      button("Move", () => this.#do("placement/move", { layer, expert, source: holders.length > 1 ? from.value : null, target: to.value })),
      "to", to);
    if (holders.length > 1) parts.push(button("Drop", () => this.#do("placement/drop", { layer, expert, worker: from.value })), "from", from);
    return parts.length ? [make("strong", { class: "figure" }, where), ...parts] : ["Every worker has a replica of it."];
  }

  async #rebalance() {
    const planned = await this.#post("rebalance", { dry_run: true });
    if (!planned) return;
    const { imbalance_before: before, imbalance_after: after, moved_replicas: moved, seconds } = planned.forecast;
    const why = `The plan for the recent load: imbalance ${ratio(before)} to ${ratio(after)}, ${moved} replicas to load in about ${seconds.toFixed(1)} s.`;
    if (await confirmed("Rebalance?", why, "Rebalance")) this.#do("rebalance", {});
  }

  async #do(verb, body, done) {
    this.told("Asked; it takes as long as the weights take to load.");
    const receipt = await this.#post(verb, body);
    if (receipt) this.told(done ?? `${receipt.action}: epoch ${receipt.epoch_after} after ${receipt.seconds.toFixed(2)} s, ${receipt.added} replicas loaded, ${receipt.removed} unloaded`);
  }

  async #post(verb, body) {
    try {
      const response = await checked(await fetch(`live/operate/${verb}`, { method: "POST", headers: adminHeaders(), body: JSON.stringify(body) }));
      return await response.json();
    } catch (error) {
      if (error.status === 401) {
        forgetAdmin();
        this.#show();
      }
      this.told(error.status === 401 ? `The key was refused: ${error.message}` : error.message, true);
      return null;
    }
  }

  #show() {
    say(find("operate"), hasAdmin() ? "Stop operating" : "Operate");
    find("rebalance").hidden = !hasAdmin();
    this.changed();
  }
}
