// The elements of the page, and the rows of its tables.

export const ROWS_AT_ONCE = 200; // so many rows of a table are drawn before more are asked for

export const $ = (id) => document.getElementById(id);
export const on = (id, event, act) => $(id).addEventListener(event, act);

export function text(node, value) {
  if (node.textContent !== value) node.textContent = value;
}

export function element(tag, className = "", content = "") {
  const node = document.createElement(tag);
  if (className) node.className = className;
  if (content) node.textContent = content;
  return node;
}

export function badge(node, word) {
  node.className = `badge ${word}`;
  text(node, word);
}

/** Shows a score, 0 to 1, in a cell with a number and a bar. */
export function score(cell, value) {
  text(cell.firstElementChild, value.toFixed(2));
  cell.lastElementChild.firstElementChild.style.width = `${Math.round(value * 100)}%`;
}

/** Makes the rows of a table those of the items, in their order. What is right already is not touched. */
export function reconcile(body, items, rows, keyOf, make, update) {
  const focused = document.activeElement;
  const kept = new Set();
  let place = body.firstElementChild;
  for (const item of items) {
    const key = keyOf(item);
    kept.add(key);
    let row = rows.get(key);
    if (!row) rows.set(key, (row = make(item)));
    update(row, item);
    if (row.element === place) place = place.nextElementSibling;
    else body.insertBefore(row.element, place);
  }
  for (const [key, row] of rows) {
    if (!kept.has(key)) {
      row.element.remove();
      rows.delete(key);
    }
  }
  if (focused !== document.activeElement && body.contains(focused)) focused.focus({ preventScroll: true });
}

export function fromTemplate(id) {
  return $(id).content.firstElementChild.cloneNode(true);
}

/** One of the sections, and none of the others. */
export function show(section) {
  for (const id of ["notice", "log-in", "fleet", "server"]) $(id).hidden = id !== section;
}
