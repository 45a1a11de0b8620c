// What is asked for again and again: not while the tab is hidden, and never twice at the same time.

import { caller } from "./calls.js";
import { server } from "./shown-server.js";

let polls = [];
let ticked = 0;

/**
 * Each has a name, a task, and the seconds from an answer to the next question. `ofServer`: asked only while a server
 * is shown; `whenFound`: and only when there is such a server.
 */
export function setPolls(all) {
  polls = all.map((poll) => ({ ...poll, at: 0, running: false }));
}

const pollOf = (name) => polls.find((poll) => poll.name === name);

export function pollEvery(name, everyS) {
  pollOf(name).everyS = everyS;
}

/** Asks for all of it at the next tick. */
export function pollAnew() {
  for (const poll of polls) poll.at = 0;
}

export function pollServerAnew() {
  for (const poll of polls) if (poll.ofServer) poll.at = 0;
}

/** Asks within a second, or at once, but never twice at the same time. */
export function pollSoon(name, waitMs = 1000) {
  const poll = pollOf(name);
  poll.at = Math.min(poll.at, Date.now() + waitMs);
  if (waitMs === 0) tick();
}

async function run(poll) {
  poll.running = true;
  poll.at = Infinity;
  try {
    await poll.task();
  } finally {
    poll.running = false;
    poll.at = Math.min(poll.at, Date.now() + poll.everyS * 1000);
  }
}

export function tick() {
  if (Date.now() < ticked) pollAnew(); // the clock was set back: what was due would be due as much later
  ticked = Date.now();
  if (!caller || document.hidden) return;
  for (const poll of polls) {
    const isWanted = (!poll.ofServer || server) && (!poll.whenFound || server.answer);
    if (isWanted && !poll.running && Date.now() >= poll.at) run(poll);
  }
}
