// Layers by experts on a canvas. One pixel a cell in an image of its own, stretched: so 58 x 256 cells cost as much as 32 x 8.

import { category, load as loadColour, pixels, position, replicas as replicaColour } from "./colours.js";
import { ratio } from "./format.js";

const STEPS = 64; // of the load's scale
const PARTS = 4; // of a cell, for experts with several homes
const AXIS = 34, TOP = 16, BAND = 8;
const NAMED = 512; // cells that are labelled, if they are large enough

export class Heatmap {
  mode = "load";
  /** Layer and expert under the cursor, or null. */
  at = null;
  held = false;

  constructor(canvas, axis, cursor, scroll, moved) {
    Object.assign(this, { canvas, axis, cursor, scroll, moved });
    this.image = document.createElement("canvas");
    canvas.addEventListener("pointermove", (event) => !this.held && this.#point(event));
    canvas.addEventListener("pointerdown", (event) => {
      this.#point(event);
      this.held = this.at !== null;
      this.#place();
    });
    canvas.addEventListener("pointerleave", () => !this.held && this.#go(null));
    canvas.addEventListener("keydown", (event) => this.#key(event));
    canvas.addEventListener("focus", () => this.experts && !this.at && this.#go([0, 0]));
    new ResizeObserver(() => this.draw()).observe(scroll);
  }

  /** Colours anew: the theme is another one. */
  restyle() {
    this.palettes = null;
    this.draw();
  }

  show(experts) {
    this.experts = experts;
    this.draw();
  }

  draw() {
    const { experts, canvas } = this;
    if (!experts || !experts.layers || !experts.experts) return;
    this.#measure();
    const { columns, rows, width, height } = this, scale = devicePixelRatio || 1;
    const [across, down] = [columns * width + this.bandWidth, TOP + rows * height + this.bandHeight];
    this.#size(canvas, across, down, scale);
    const context = canvas.getContext("2d", { alpha: false });
    context.setTransform(scale, 0, 0, scale, 0, 0);
    const style = getComputedStyle(canvas);
    context.fillStyle = style.getPropertyValue("--panel");
    context.fillRect(0, 0, across, down);
    this.#paint();
    context.imageSmoothingEnabled = false;
    context.drawImage(this.image, 0, TOP, columns * width, rows * height);
    this.#grid(context);
    if (this.mode === "load") this.#band(context);
    context.fillStyle = style.getPropertyValue("--dim");
    context.font = `10px ${style.fontFamily}`;
    this.#ticks(context, this.byExpert ? "expert" : "layer");
    this.#label(context, style);
    this.#axes(style, scale);
    this.#place();
  }

  #measure() {
    const { layers, experts } = this.experts;
    this.byExpert = experts > layers; // the longer side lies
    [this.columns, this.rows] = this.byExpert ? [experts, layers] : [layers, experts];
    const room = this.scroll.clientWidth - AXIS;
    const band = this.mode === "load" && this.byExpert ? BAND + 16 : 0;
    this.width = Math.max(4, Math.floor(10 * (room - band) / this.columns) / 10);
    if (this.width > 8) this.width = Math.floor(this.width);
    this.height = Math.max(6, Math.min(26, Math.floor(420 / this.rows)));
    this.bandHeight = this.mode === "load" && !this.byExpert ? BAND + Math.min(14, this.height) : 0;
    this.bandWidth = band;
  }

  #size(canvas, width, height, scale) {
    const [w, h] = [Math.round(width * scale), Math.round(height * scale)];
    if (canvas.width !== w || canvas.height !== h) {
      canvas.width = w;
      canvas.height = h;
      canvas.style.width = `${width}px`;
      canvas.style.height = `${height}px`;
    }
  }

  /** Every cell's colour into the image. */
  #paint() {
    const { experts, image, columns, rows, byExpert, mode } = this;
    const parts = mode === "worker" ? PARTS : 1;
    image.width = columns * parts;
    image.height = rows;
    const context = image.getContext("2d"), data = context.createImageData(image.width, rows);
    const out = new Uint32Array(data.data.buffer), colours = this.#palette(), [empty] = this.palettes.none;
    for (let row = 0; row < rows; row++) for (let column = 0; column < columns; column++) {
      const [layer, expert] = byExpert ? [row, column] : [column, row];
      const first = row * columns * parts + column * parts;
      if (!experts.has(layer, expert)) out.fill(0, first, first + parts);
      else if (mode === "load") {
        const times = experts.ratio(layer, expert);
        out[first] = times ? colours[Math.round((position(times) + 1) / 2 * STEPS)] : empty;
      } else if (mode === "replicas") out[first] = colours[Math.min(4, experts.replicas?.[layer]?.[expert]?.length ?? 0)];
      else {
        const homes = experts.replicas?.[layer]?.[expert] ?? [];
        for (let part = 0; part < parts; part++) out[first + part] = homes.length ? colours[homes[Math.floor(part * homes.length / parts)]] : empty;
      }
    }
    context.putImageData(data, 0, 0);
  }

  #palette() {
    const n = this.experts.workers.length;
    this.palettes ??= {};
    const style = getComputedStyle(this.canvas);
    this.palettes.none ??= pixels([style.getPropertyValue("--cell")]);
    this.palettes.load ??= pixels(Array.from({ length: STEPS + 1 }, (_, i) => loadColour(2 * i / STEPS - 1)));
    this.palettes.replicas ??= pixels([0, 1, 2, 3, 4].map((n) => replicaColour(n)));
    if (this.palettes.worker?.length !== n && n) this.palettes.worker = pixels(Array.from({ length: n }, (_, i) => category(i, n)));
    return this.palettes[this.mode] ?? this.palettes.none;
  }

  #grid(context) {
    const { columns, rows, width, height } = this;
    context.fillStyle = getComputedStyle(this.canvas).getPropertyValue("--panel");
    const gap = width >= 6 ? 1 : 0.5;
    for (let column = 1; column <= columns; column++) context.fillRect(column * width - gap, TOP, gap, rows * height);
    for (let row = 1; row <= rows; row++) context.fillRect(0, TOP + row * height - 1, columns * width, 1);
  }

  /** The busiest expert of each layer against the mean, on the same scale: where the layer's row or column ends. */
  #band(context) {
    const { columns, rows, width, height, byExpert, experts } = this;
    for (let layer = 0; layer < experts.layers; layer++) {
      const skew = experts.counted ? experts.skew[layer] : null;
      if (skew == null) continue;
      context.fillStyle = loadColour(position(skew));
      if (byExpert) context.fillRect(columns * width + BAND, TOP + layer * height, this.bandWidth - BAND, height - 1);
      else context.fillRect(layer * width, TOP + rows * height + BAND - 1, width - 1, this.bandHeight - BAND);
    }
  }

  #ticks(context, what) {
    const { columns, width } = this, step = [1, 2, 4, 8, 16, 32, 64].find((n) => n * width >= 26);
    context.textBaseline = "top";
    for (let column = 0; column < columns; column += step) {
      const text = column === 0 ? `${what} 0` : String(column);
      if (column > 0 && column * width < 48) continue;
      context.textAlign = column === 0 ? "left" : "center";
      context.fillText(text, column === 0 ? 0 : (column + 0.5) * width, 2);
    }
    context.textAlign = "right";
    if (this.bandWidth) context.fillText("max", columns * width + this.bandWidth, 2);
  }

  #axes(style, scale) {
    const { axis, rows, height } = this;
    this.#size(axis, AXIS, TOP + rows * height + this.bandHeight, scale);
    const context = axis.getContext("2d");
    context.setTransform(scale, 0, 0, scale, 0, 0);
    context.clearRect(0, 0, AXIS, TOP + rows * height + this.bandHeight);
    context.fillStyle = style.getPropertyValue("--dim");
    context.font = `10px ${style.fontFamily}`;
    context.textAlign = "right";
    context.textBaseline = "middle";
    const step = [1, 2, 4, 8, 16].find((n) => n * height >= 12);
    for (let row = 0; row < rows; row += step) context.fillText(String(row), AXIS - 6, TOP + (row + 0.5) * height - 0.5);
    context.fillText(this.byExpert ? "layer" : "exp.", AXIS - 6, 7);
    if (this.bandHeight) context.fillText("max", AXIS - 6, TOP + rows * height + BAND + (this.bandHeight - BAND) / 2 - 1);
  }

  /** Numbers in the cells, where they have room. */
  #label(context, style) {
    const { experts, columns, rows, width, height, byExpert, mode } = this;
    if (columns * rows > NAMED || width < 28 || height < 14) return;
    context.textAlign = "center";
    context.textBaseline = "middle";
    const [ink, inverse] = [style.getPropertyValue("--text"), style.getPropertyValue("--on-colour")];
    for (let row = 0; row < rows; row++) for (let column = 0; column < columns; column++) {
      const [layer, expert] = byExpert ? [row, column] : [column, row];
      if (!experts.has(layer, expert)) continue;
      const times = experts.ratio(layer, expert), homes = experts.replicas?.[layer]?.[expert] ?? [];
      const text = mode === "load" ? (times == null ? "" : ratio(times)) : mode === "replicas" ? String(homes.length) : homes.join(" ");
      const strong = mode === "worker" || (mode === "load" && times && position(times) > 0.55) || (mode === "replicas" && homes.length === 0);
      context.fillStyle = strong ? inverse : ink;
      context.fillText(text, (column + 0.5) * width, TOP + (row + 0.5) * height);
    }
  }

  #point(event) {
    const box = this.canvas.getBoundingClientRect();
    const column = Math.floor((event.clientX - box.left) / this.width), row = Math.floor((event.clientY - box.top - TOP) / this.height);
    const [layer, expert] = this.byExpert ? [row, column] : [column, row];
    this.#go(layer >= 0 && expert >= 0 && this.experts?.has(layer, expert) ? [layer, expert] : null);
  }

  #key(event) {
    if (!this.experts) return;
    const [layer, expert] = this.at ?? [0, 0], { layers, experts } = this.experts;
    let [column, row] = this.byExpert ? [expert, layer] : [layer, expert];
    const step = event.shiftKey ? 8 : 1;
    switch (event.key) {
      case "ArrowLeft": column -= step; break;
      case "ArrowRight": column += step; break;
      case "ArrowUp": row -= step; break;
      case "ArrowDown": row += step; break;
      case "Home": column = 0; break;
      case "End": column = this.columns - 1; break;
      case "Enter": case " ": this.held = !this.held; break;
      case "Escape": this.held = false; break;
      default: return;
    }
    event.preventDefault();
    const [x, y] = [Math.max(0, Math.min(this.columns - 1, column)), Math.max(0, Math.min(this.rows - 1, row))];
    this.#go(this.byExpert ? [Math.min(y, layers - 1), Math.min(x, experts - 1)] : [x, y]);
  }

  #go(at) {
    this.at = at;
    this.#place();
    this.moved(at, this.held);
  }

  #place() {
    const { cursor, at, width, height } = this;
    cursor.hidden = !at;
    if (!at) return;
    const [column, row] = this.byExpert ? [at[1], at[0]] : at;
    Object.assign(cursor.style, { left: `${column * width - 1}px`, top: `${TOP + row * height - 1}px`, width: `${width}px`, height: `${height}px` });
    cursor.classList.toggle("held", this.held);
    if (document.activeElement === this.canvas) cursor.scrollIntoView({ block: "nearest", inline: "nearest" });
  }
}
