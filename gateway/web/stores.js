// The stores: which are up, and what is wrong with the others.

import { call, OTHER_CALLER, sentence } from "./calls.js";
import { $, badge, fromTemplate, reconcile, text } from "./elements.js";
import { problem, problemsNow } from "./problems.js";
import { duration, quantity, stamp, whole } from "./times-and-units.js";

const stores = new Map();
let storesKnown = [];

export async function readStores() {
  try {
    const { value } = await call("stores");
    storesKnown = value.stores;
    problem("stores");
  } catch (error) {
    if (error.reason === OTHER_CALLER) return;
    if (error.status) problem("stores", "warning", `How the stores are is not known. ${error.message}`);
    return;
  }
  drawStores();
}

const storeKey = (store) => [store.service, store.name, store.address].join(" ");
const storeState = (store) => store.state.replace("STORE_STATE_", "").toLowerCase().replace("unspecified", "unknown");

export function drawStores() {
  const ill = storesKnown.filter((store) => ["down", "degraded"].includes(storeState(store)));
  for (const about of problemsNow()) {
    if (about.startsWith("store ") && !ill.some((store) => about === `store ${storeKey(store)}`)) problem(about);
  }
  for (const store of ill) {
    const since = store.since ? ` since ${stamp(Date.parse(store.since))}` : "";
    const state = storeState(store);
    const level = state === "down" && store.role !== "follower" ? "critical" : "warning";
    const why = store.lastError ? ` ${sentence(store.lastError)}` : "";
    problem(`store ${storeKey(store)}`, level, `The store ${store.name} (${store.role}) is ${state}${since}.${why}`);
  }
  const count = `${storesKnown.length} ${storesKnown.length === 1 ? "store" : "stores"}`;
  const up = storesKnown.filter((store) => storeState(store) === "up").length;
  text($("stores-summary"), up === storesKnown.length ? `${count}, all up` : `${count}, ${up} up`);
  reconcile($("stores-rows"), storesKnown, stores, storeKey, () => ({ element: fromTemplate("store-row") }), storeRow);
}

function storeRow({ element: row }, store) {
  const [name, state, since, behind, free, said] = row.children;
  text(name, `${store.name} (${store.role})`);
  badge(state.firstElementChild, storeState(store));
  text(since, store.since ? stamp(Date.parse(store.since)) : "–");
  const lag = `${whole.format(store.lagPoints)} points, ${duration(store.lagSeconds * 1000)}`;
  text(behind, store.lagPoints === "0" ? "–" : lag);
  const seen = store.diskFreeBytes !== "0" || store.name === "engine" || store.role === "embedded"; // of ours 0 is full
  text(free, seen ? quantity(Number(store.diskFreeBytes), "By") : "–");
  const when = store.lastErrorTime ? ` (${stamp(Date.parse(store.lastErrorTime))})` : "";
  text(said, [store.lastError && `${store.lastError}${when}`, store.note].filter(Boolean).join(" · "));
}

export function forgetStores() {
  storesKnown = [];
  drawStores();
}
