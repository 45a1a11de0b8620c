// What is wrong, said plainly, above everything.

import { caller } from "./calls.js";
import { $, element } from "./elements.js";

const problems = new Map(); // what it is about -> level and sentence

/** Says it, or takes it back when there is no sentence. */
export function problem(about, level, sentenceOfIt) {
  if (sentenceOfIt && caller) problems.set(about, { level, sentenceOfIt });
  else problems.delete(about);
  drawProblems();
}

function drawProblems() {
  const wanted = [...problems.values()];
  const shown = [...$("banners").children];
  const same = wanted.length === shown.length && wanted.every((one, at) => one.sentenceOfIt === shown[at].textContent);
  if (same) return; // or screen readers would say it all again
  $("banners").replaceChildren(...wanted.map((one) => element("p", `banner ${one.level}`, one.sentenceOfIt)));
}

/** What they are about. */
export const problemsNow = () => [...problems.keys()];

export function forgetProblems() {
  problems.clear();
  drawProblems();
}
