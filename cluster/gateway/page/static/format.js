// Numbers and elements.

const compact = new Intl.NumberFormat("en", { notation: "compact", maximumSignificantDigits: 3 });
const clock = new Intl.DateTimeFormat("en-GB", { hour: "2-digit", minute: "2-digit", second: "2-digit" });

export const UNKNOWN = "–";

export const count = (n) => (n == null ? UNKNOWN : n < 100 ? String(Math.round(n * 10) / 10) : compact.format(n));
export const ratio = (r) => (r == null ? UNKNOWN : r.toFixed(2));
export const percent = (part) => (part == null ? UNKNOWN : `${Math.round(100 * part)}%`);
export const time = (seconds) => clock.format(new Date(1000 * seconds));
export const duration = (s) =>
  s == null ? UNKNOWN : s < 0.01 ? `${(1000 * s).toFixed(1)} ms` : s < 1 ? `${Math.round(1000 * s)} ms` : `${s.toFixed(1)} s`;
export const plural = (n, noun) => (n === 1 ? `1 ${noun}` : `${n} ${noun}s`);

/** An element with attributes and children; text is text, never markup. */
export function make(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name === "class") element.className = value;
    else if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (value != null && value !== false) element.setAttribute(name, value === true ? "" : value);
  }
  element.append(...children);
  return element;
}

/** Sets a text that may be the same already: unchanged nodes cost no layout and are not read out again. */
export function say(element, text) {
  if (element.textContent !== text) element.textContent = text;
}

export const find = (id) => document.getElementById(id);
