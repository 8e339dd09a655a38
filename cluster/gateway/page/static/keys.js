// Keys: the API's lives as long as the tab, the admin's as long as the page. Neither is written anywhere else.

import { find, say } from "./format.js";

const NAME = "expertmesh-api-key";

let api = "", admin = "";
try {
  api = sessionStorage.getItem(NAME) ?? "";
} catch { /* storage is off */ }

export const headers = () => (api ? { Authorization: `Bearer ${api}` } : {});
export const adminHeaders = () => ({ ...headers(), "X-Admin-Key": admin, "Content-Type": "application/json" });
export const hasAdmin = () => admin !== "";
export const forgetAdmin = () => (admin = "");

let given = () => {};

/** Resolves once an API key is given. */
export const keyGiven = () => new Promise((resolve) => (given = resolve));

/** Asks for the API key, and says why; false where none was given. */
export async function askApi(why) {
  const key = await ask("API key", why, "Key");
  if (!key) return false;
  api = key;
  try {
    sessionStorage.setItem(NAME, key);
  } catch { /* it lasts as long as the page */ }
  given();
  return true;
}

export async function askAdmin() {
  const why = "Moving experts needs the cluster's admin key. `expertmesh serve` keeps it in the file admin_token of its run directory, which `expertmesh status --json` names.";
  admin = (await ask("Operate the cluster", why, "Admin key")) || admin;
  return admin !== "";
}

/** A question with two answers. */
export const confirmed = async (title, why, verb) => (await ask(title, why, "", verb)) === "yes";

find("ask-key-cancel").addEventListener("click", () => find("ask-key").close("cancel"));

function ask(title, why, label, verb = "Continue") {
  const dialog = find("ask-key"), field = find("ask-key-value");
  say(find("ask-key-title"), title);
  say(find("ask-key-why"), why);
  say(find("ask-key-label"), label);
  say(dialog.querySelector(".primary"), verb);
  field.hidden = find("ask-key-label").hidden = !label;
  field.required = Boolean(label);
  field.value = "";
  dialog.returnValue = "";
  if (!dialog.open) dialog.showModal();
  (label ? field : dialog.querySelector(".primary")).focus();
  return new Promise((resolve) => {
    dialog.addEventListener("close", () => {
      resolve(dialog.returnValue === "ok" ? (label ? field.value.trim() : "yes") : "");
      field.value = "";
    }, { once: true });
  });
}
