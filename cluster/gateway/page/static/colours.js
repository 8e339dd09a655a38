// Colours, the same in every part of the page. Load is against the mean, in steps of doubling; workers and experts have hues.

export const SPAN = 2; // doublings from the mean to either end of the scale

const HUES = [255, 45, 150, 325, 95, 205, 20, 290, 125, 230];

export const isDark = () => getComputedStyle(document.documentElement).colorScheme === "dark" ||
  (document.documentElement.dataset.theme !== "light" && matchMedia("(prefers-color-scheme: dark)").matches);

/** One of `n` things that have no order. */
export function category(i, n, dark = isDark()) {
  if (n <= HUES.length) return `oklch(${dark ? 0.7 : 0.62} 0.14 ${HUES[i]})`;
  const hue = (i * 137.508) % 360, light = [0, 0.09, -0.09][i % 3];
  return `oklch(${(dark ? 0.7 : 0.62) + light} 0.13 ${hue.toFixed(1)})`;
}

/** Load `at` from -1 (a quarter of the mean or less) over 0 (the mean) to 1 (four times it or more). */
export function load(at, dark = isDark()) {
  const mix = (from, to, part) => from + (to - from) * part;
  const part = Math.abs(at);
  const [l, c] = dark ? [0.33, 0.012] : [0.93, 0.012];
  if (at < 0) {
    const [end, chroma] = dark ? [0.43, 0.085] : [0.77, 0.075];
    return `oklch(${mix(l, end, part)} ${mix(c, chroma, part)} 250)`;
  }
  const [end, chroma] = dark ? [0.74, 0.19] : [0.6, 0.21];
  return `oklch(${mix(l, end, part)} ${mix(c, chroma, Math.sqrt(part))} ${mix(75, 38, part)})`;
}

/** Where a load that is `r` times the mean lies on the scale. */
export const position = (r) => Math.max(-1, Math.min(1, Math.log2(r) / SPAN));

/** So many replicas; none is an alarm. */
export function replicas(n, dark = isDark()) {
  if (n === 0) return dark ? "oklch(0.62 0.21 25)" : "oklch(0.58 0.22 27)";
  const step = Math.min(n, 4) - 1;
  return dark ? `oklch(${0.36 + 0.13 * step} ${0.03 + 0.035 * step} 165)` : `oklch(${0.92 - 0.14 * step} ${0.02 + 0.035 * step} 165)`;
}

/** CSS colours as the pixels of an ImageData. */
export function pixels(colours) {
  const canvas = new OffscreenCanvas(colours.length, 1), context = canvas.getContext("2d", { willReadFrequently: true });
  colours.forEach((colour, i) => {
    context.fillStyle = colour;
    context.fillRect(i, 0, 1, 1);
  });
  return new Uint32Array(context.getImageData(0, 0, colours.length, 1).data.buffer);
}
