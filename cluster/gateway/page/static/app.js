// The live page: one stream in, every part drawn from one document.

import { Chat } from "./chat.js";
import { Events } from "./events.js";
import { busiest, expertsOf } from "./experts.js";
import { count, find, make, plural, ratio, say, time, UNKNOWN } from "./format.js";
import { Heatmap } from "./heatmap.js";
import { askApi, headers, keyGiven } from "./keys.js";
import { legend } from "./legend.js";
import { Operate } from "./operate.js";
import { Sparks } from "./sparks.js";
import { Store } from "./store.js";
import { follow } from "./stream.js";
import { themes } from "./theme.js";
import { Workers } from "./workers.js";

const MODES = { load: "load", worker: "worker", replicas: "replicas" };
const TABLE_MS = 500; // tables are read, not watched

let experts = null, link = { state: "connecting", error: null }, tables = 0;

const store = new Store(render);
const operate = new Operate(told, () => {
  cell();
  store.touch();
});
const heat = new Heatmap(find("heat"), find("heat-axis"), find("heat-cursor"), find("heat-scroll"), cell);
const sparks = new Sparks(), workers = new Workers((...of) => operate.worker(...of)), events = new Events(), chat = new Chat();

for (const [mode, name] of Object.entries(MODES)) {
  const input = make("input", { type: "radio", name: "mode", value: mode, checked: mode === "load", onchange: () => {
    heat.mode = mode;
    heat.draw();
    if (experts) legend(mode, experts);
  } });
  find("modes").append(make("label", {}, input, make("span", {}, name)));
}

themes(() => {
  heat.restyle();
  chat.restyle();
  if (experts) legend(heat.mode, experts);
  store.touch();
});
find("by-layer").addEventListener("toggle", () => {
  tables = 0;
  store.touch();
});
find("key").addEventListener("click", () => askApi("The key is kept for this tab alone."));

follow("live", headers, (kind, document) => store.apply(kind, document), async (state, error) => {
  link = { state, error, at: Date.now() };
  store.touch();
  if (state !== "refused") return;
  find("key").hidden = false;
  const next = keyGiven();
  if (!(await askApi(`This gateway asks for an API key. ${headers().Authorization ? error.message : ""}`))) await next;
});

function render(document) {
  status(document);
  if (!document) return;
  say(find("model"), document.model);
  say(find("foot"), `ExpertMesh ${document.version} · ${document.gateway} · epoch ${document.epoch ?? UNKNOWN}`);
  sparks.show(document.history);
  events.show(document);
  if (!document.members) return;
  const before = experts;
  experts = expertsOf(document);
  workers.show(document, operate.on);
  chat.show(document.model, experts);
  heatmap(document, before);
}

function heatmap(document, before) {
  const there = experts && experts.layers && experts.experts;
  find("heat-body").hidden = !there;
  const empty = !there ? "This model has no experts: a router computes it whole."
    : !experts.load ? "No router has said yet what it sent to the experts; workers and replicas are shown."
    : !experts.counted ? "No expert has got a row yet: load appears with the first request." : "";
  find("heat-empty").hidden = !empty;
  say(find("heat-empty"), empty);
  if (!there) return;
  say(find("shape"), `${plural(experts.layers, "layer")} × ${plural(experts.experts, "expert")}, rows of the last minute`);
  heat.show(experts);
  find("heat").setAttribute("aria-label", `Experts by ${heat.mode}, ${experts.layers} layers and ${experts.experts} experts`);
  if (!before || before.workers.length !== experts.workers.length) legend(heat.mode, experts);
  cell();
  if (performance.now() - tables < TABLE_MS) return;
  tables = performance.now();
  rows(find("hottest").tBodies[0], busiest(experts, 8).map(([layer, expert, n]) => [
    `${layer}:${expert}`, count(n / document.window_s), ratio(experts.ratio(layer, expert)), experts.homes(layer, expert).map(([id]) => id).join(", ")]));
  if (find("by-layer").open) rows(find("by-layer").querySelector("tbody"), Array.from({ length: experts.layers }, (_, layer) => byLayer(document, layer)));
}

function byLayer(document, layer) {
  const row = experts.load?.[layer] ?? [], width = experts.widths[layer], sum = experts.sums[layer];
  if (!width) return [layer, "no experts", "", "", "", ""];
  const top = sum ? row.indexOf(Math.max(...row)) : null;
  const replicas = (experts.replicas?.[layer] ?? []).reduce((n, homes) => n + homes.length, 0);
  return [layer, count(sum / document.window_s), top ?? UNKNOWN, sum ? ratio(experts.skew[layer]) : UNKNOWN, sum ? row.slice(0, width).filter((n) => !n).length : UNKNOWN, replicas];
}

function rows(body, lines) {
  while (body.rows.length > lines.length) body.deleteRow(-1);
  lines.forEach((line, i) => {
    const row = body.rows[i] ?? body.insertRow();
    line.forEach((text, j) => say(row.cells[j] ?? row.insertCell(), String(text)));
  });
  body.parentElement.classList.toggle("void", !lines.length);
}

/** Says what the cell under the cursor is, and what an operator may do with it. */
function cell() {
  const at = heat.at, verbs = find("cell-verbs");
  if (!experts || !at || !experts.has(...at)) {
    say(find("cell"), "");
    verbs.hidden = true;
    return;
  }
  const [layer, expert] = at, times = experts.ratio(layer, expert), homes = experts.homes(layer, expert), window = store.document.window_s;
  const load = times == null ? "no rows in this layer" : `${count(experts.load[layer][expert] / window)} rows/s, ${ratio(times)}× the layer's mean`;
  const on = homes.length ? `on ${homes.map(([id, share]) => (homes.length > 1 ? `${id} (${Math.round(100 * share)}%)` : id)).join(", ")}` : "on no worker";
  say(find("cell"), `layer ${layer}, expert ${expert}: ${load}; ${on}`);
  verbs.hidden = !(operate.on && heat.held);
  const of = `${layer}:${expert} ${store.document.epoch}`;
  if (!verbs.hidden && verbs.dataset.of !== of) {
    verbs.dataset.of = of;
    verbs.replaceChildren(...operate.cell(layer, expert, homes, store.document.members.filter((m) => m.role === "expert" && m.state === "ready").map((m) => m.id)));
  }
}

/** One word in the pill, and a sentence wherever the numbers are not of now. */
function status(document) {
  const source = document?.source.state, lost = document?.members?.filter((member) => member.state === "lost").map((member) => member.id) ?? [];
  const [word, level, text] = link.state === "refused" ? ["key needed", "warning", "This gateway asks for an API key: give it with the button “API key”."]
    : link.state === "connecting" ? ["connecting", "", ""]
    : link.state === "lost" ? ["no connection", "error", `The gateway does not answer (${link.error?.message ?? "no reason given"}); trying again. ${document ? "What is shown is from before." : ""}`]
    : source === "away" ? ["controller away", "error", `The controller has not answered since ${time(document.source.since)}: requests are served, and what is shown here is from before.`]
    : source === "waiting" ? ["waiting", "", "The controller has not said anything yet."]
    : document.draining ? ["stopping", "warning", "The cluster is being stopped: open requests finish, new ones are refused."]
    : document.change ? ["changing", "busy", `Under way: ${document.change}`]
    : lost.length ? ["degraded", "warning", `Lost: ${lost.join(", ")}. Requests go on; what can be started again is.`]
    : ["live", "good", ""];
  say(find("state"), word);
  find("state").dataset.level = level;
  if (spoken && text === "") return;
  spoken = "";
  say(find("notice"), text);
  find("notice").hidden = !text;
  find("notice").dataset.level = level;
}

let spoken = "", hush = 0;

/** What came of an operator's verb stays for a while. */
function told(text, failed = false) {
  spoken = text;
  clearTimeout(hush);
  hush = setTimeout(() => {
    spoken = "";
    store.touch();
  }, failed ? 15000 : 8000);
  say(find("notice"), text);
  find("notice").hidden = false;
  find("notice").dataset.level = failed ? "error" : "busy";
}
