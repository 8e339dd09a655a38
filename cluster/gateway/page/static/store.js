// The document that the gateway keeps, and its changes applied to it.

const EVENTS = 200, POINTS = 240;

export class Store {
  /** What is known; null before the first snapshot. */
  document = null;
  #waiting = false;

  /** `render(document)` is called in the next frame after any number of changes. */
  constructor(render) {
    this.render = render;
  }

  apply(kind, content) {
    if (kind === "snapshot") this.document = content;
    else if (this.document) this.#change(content);
    this.touch();
  }

  touch() {
    if (this.#waiting) return;
    this.#waiting = true;
    requestAnimationFrame(() => {
      this.#waiting = false;
      this.render(this.document);
    });
  }

  #change({ rows, new_events: events, point, ...fields }) {
    const document = this.document;
    Object.assign(document, fields);
    if (rows && document.load) for (const [layer, row] of Object.entries(rows)) document.load[layer] = row;
    if (events) document.events = [...document.events, ...events].slice(-EVENTS);
    if (point) document.history = [...document.history, point].slice(-POINTS);
  }
}
