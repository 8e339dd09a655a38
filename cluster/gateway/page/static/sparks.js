// The numbers at the top: what is now, and the line of the last two minutes.

import { count, duration, find, make, ratio, say, UNKNOWN } from "./format.js";

const WIDTH = 120, HEIGHT = 28;
const SVG = "http://www.w3.org/2000/svg";

const KINDS = [
  { name: "Throughput", unit: "tokens/s", of: (p) => p.tokens_per_s, show: count, why: "given to clients by all gateways, over 5 s" },
  { name: "First token", unit: "median", of: (p) => p.first_token_s?.[0], second: (p) => p.first_token_s?.[1], show: duration, why: "from a request's start, over 10 s" },
  { name: "Next token", unit: "median", of: (p) => p.next_token_s?.[0], second: (p) => p.next_token_s?.[1], show: duration, why: "between two tokens of an answer, over 10 s" },
  { name: "Imbalance", unit: "max / mean", of: (p) => p.imbalance, show: ratio, least: 1, why: "of the expert workers' rows of the last minute; 1.00 is perfect" },
  { name: "Open requests", unit: "", of: (p) => p.open, show: count, why: "running or waiting" },
];

export class Sparks {
  constructor() {
    this.rows = KINDS.map((kind) => {
      const line = document.createElementNS(SVG, "polyline"), area = document.createElementNS(SVG, "path");
      const svg = document.createElementNS(SVG, "svg");
      svg.setAttribute("viewBox", `0 0 ${WIDTH} ${HEIGHT}`);
      svg.setAttribute("preserveAspectRatio", "none");
      svg.setAttribute("aria-hidden", "true");
      svg.append(area, line);
      const value = make("strong", { class: "figure" }, UNKNOWN), more = make("span", { class: "dim figure" });
      find("numbers").append(make("figure", { title: kind.why },
        make("figcaption", {}, kind.name), make("p", {}, value, " ", make("span", { class: "dim" }, kind.unit)), svg, more));
      return { kind, line, area, value, more };
    });
  }

  show(history) {
    for (const { kind, line, area, value, more } of this.rows) {
      const values = history.map(kind.of), known = values.filter((v) => v != null), now = values.at(-1);
      say(value, kind.show(now));
      if (known.length < 2) {
        line.setAttribute("points", "");
        area.setAttribute("d", "");
        say(more, known.length ? "collecting" : "no requests yet");
        continue;
      }
      const low = kind.least ?? 0, high = Math.max(...known, low + 1e-9), wide = Math.max(history.length - 1, 60);
      const y = (v) => HEIGHT - 1.5 - (HEIGHT - 4) * (v - low) / (high - low || 1);
      const left = wide - (history.length - 1);
      const points = values.flatMap((v, i) => (v == null ? [] : [`${(WIDTH * (left + i) / wide).toFixed(1)},${y(v).toFixed(1)}`]));
      const [first, last] = [points[0], points.at(-1)].map((point) => point.split(",")[0]);
      line.setAttribute("points", points.join(" "));
      area.setAttribute("d", `M${first},${HEIGHT} L${points.join(" L")} L${last},${HEIGHT} Z`);
      const second = kind.second?.(history.at(-1));
      say(more, second != null ? `95%: ${kind.show(second)}` : `up to ${kind.show(high)}`);
    }
  }
}
