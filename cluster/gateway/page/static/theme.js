// Light or dark: what the system says, until somebody chooses.

import { find, say } from "./format.js";

const NAMES = ["auto", "light", "dark"];

/** `changed()` is called whenever colours are others. */
export function themes(changed) {
  const button = find("theme");
  let name = "auto";
  try {
    name = localStorage.getItem("expertmesh-theme") ?? "auto";
  } catch { /* storage is off: the choice lasts as long as the page */ }
  if (!NAMES.includes(name)) name = "auto";
  const show = () => {
    if (name === "auto") delete document.documentElement.dataset.theme;
    else document.documentElement.dataset.theme = name;
    say(button, `Theme: ${name}`);
    changed();
  };
  button.addEventListener("click", () => {
    name = NAMES[(NAMES.indexOf(name) + 1) % NAMES.length];
    try {
      localStorage.setItem("expertmesh-theme", name);
    } catch { /* as above */ }
    show();
  });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", show);
  show();
}
