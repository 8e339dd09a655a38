// What the colours of the heat map say.

import { category, load, replicas, SPAN } from "./colours.js";
import { find, make } from "./format.js";

const MANY = 12;

export function legend(mode, experts) {
  const of = { load: scale, worker: () => names(experts.workers), replicas: steps }[mode];
  find("legend").replaceChildren(...of());
}

const swatch = (colour) => {
  const element = make("i", { class: "swatch" });
  element.style.background = colour;
  return element;
};

function scale() {
  const bar = make("span", { class: "scale", "aria-hidden": "true" });
  bar.style.background = `linear-gradient(90deg, ${Array.from({ length: 17 }, (_, i) => load(i / 8 - 1)).join(", ")})`;
  const ends = make("span", { class: "ends figure" }, `≤ ${1 / 2 ** SPAN}×`, make("span", {}, "mean of the layer"), `≥ ${2 ** SPAN}×`);
  return [make("span", { class: "ramp" }, bar, ends), make("span", {}, make("i", { class: "swatch none" }), "no rows")];
}

function names(workers) {
  const shown = workers.slice(0, MANY).map((id, i) => make("span", {}, swatch(category(i, workers.length)), id));
  return workers.length > MANY ? [...shown, make("span", { class: "dim" }, `and ${workers.length - MANY} more, as in the cards below`)] : shown;
}

const steps = () => [0, 1, 2, 3, 4].map((n) => make("span", {}, swatch(replicas(n)), n === 0 ? "none" : n === 4 ? "4 or more" : String(n)));
