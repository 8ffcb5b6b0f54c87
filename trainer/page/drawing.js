// The drawing area, for pointers and for keys. What is drawn is sent as a picture, black on white, whatever the theme.

import { answer } from "./answer.js";
import { ask, byId, show } from "./server.js";

const PEN = 22; // Of 280 pixels: the digit is scaled to 20 of 28, so about MNIST's two.
const STEP = 10, SMALL_STEP = 2; // Of the arrow keys, canvas pixels.
const BETWEEN_MS = 120; // Of predictions while a stroke is drawn.
const ARROWS = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };

const canvas = byId("canvas"), pen = canvas.getContext("2d");

let strokes = []; // Lists of [x, y], canvas pixels.
let version = 0, emptied = 0; // Counts changes, and those that left nothing.
let asking = false, waiting = null, askedAt = 0, timer = 0;
const cursor = { x: 140, y: 140, stroke: null };

/** Paints the strokes on an empty page. */
export function redraw() {
  pen.fillStyle = "#fff";
  pen.fillRect(0, 0, canvas.width, canvas.height);
  pen.strokeStyle = "#000";
  pen.lineWidth = PEN;
  pen.lineCap = pen.lineJoin = "round";
  for (const stroke of strokes) {
    pen.beginPath();
    pen.moveTo(...stroke[0]);
    // A dot, too, is drawn: a line to where it starts.
    for (const point of stroke) pen.lineTo(...point);
    pen.stroke();
  }
  byId("drawing").toggleAttribute("data-inked", strokes.length > 0);
  byId("undo").disabled = byId("clear").disabled = !strokes.length;
}

function changed(isFinal) {
  redraw();
  clearTimeout(timer);
  version++;
  byId("answer").dataset.final = "false";
  if (!strokes.length) {
    emptied++;
    waiting = null;
    show(null);
    answer(null, true);
  } else if (isFinal) read(true);
  else timer = setTimeout(read, Math.max(0, askedAt + BETWEEN_MS - performance.now()), false);
}

// One request at a time: of what is drawn meanwhile, only the last state is asked for.
async function read(isFinal) {
  if (asking) {
    waiting = { isFinal: isFinal || Boolean(waiting && waiting.isFinal) };
    return;
  }
  asking = true;
  askedAt = performance.now();
  const askedVersion = version, askedEmptied = emptied;
  byId("answer").setAttribute("aria-busy", "true");
  try {
    const picture = await new Promise((done) => canvas.toBlob(done, "image/png"));
    const { predictions } = await ask("api/predict", { method: "POST", body: picture });
    if (emptied === askedEmptied) {
      show(null);
      answer(predictions[0], isFinal && version === askedVersion);
    }
  } catch (error) {
    show(error);
  } finally {
    asking = false;
    byId("answer").removeAttribute("aria-busy");
    if (waiting) {
      const next = waiting;
      waiting = null;
      read(next.isFinal);
    }
  }
}

function place(event) {
  const box = canvas.getBoundingClientRect();
  return [((event.clientX - box.left) / box.width) * canvas.width, ((event.clientY - box.top) / box.height) * canvas.height];
}

let pointer = null; // Of the stroke that is being drawn: a second finger draws nothing.

canvas.addEventListener("pointerdown", (event) => {
  if (pointer !== null || event.button !== 0) return;
  pointer = event.pointerId;
  canvas.setPointerCapture(pointer);
  showCursor(false);
  lift();
  strokes.push([place(event)]);
  changed(false);
});

canvas.addEventListener("pointermove", (event) => {
  if (event.pointerId !== pointer) return;
  const moves = event.getCoalescedEvents ? event.getCoalescedEvents() : [];
  for (const move of moves.length ? moves : [event]) strokes.at(-1).push(place(move));
  changed(false);
});

for (const name of ["pointerup", "pointercancel"]) {
  canvas.addEventListener(name, (event) => {
    if (event.pointerId !== pointer) return;
    pointer = null;
    changed(true);
  });
}

function lift() {
  cursor.stroke = null;
  byId("cursor").removeAttribute("data-down");
}

function undo() {
  if (pointer !== null) return;
  lift();
  strokes.pop();
  changed(true);
}

function clear() {
  if (pointer !== null) return;
  lift();
  strokes = [];
  changed(true);
}

canvas.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  if (event.key in ARROWS) {
    const [x, y] = ARROWS[event.key], step = event.shiftKey ? SMALL_STEP : STEP;
    cursor.x = Math.min(canvas.width, Math.max(0, cursor.x + x * step));
    cursor.y = Math.min(canvas.height, Math.max(0, cursor.y + y * step));
    if (cursor.stroke) {
      cursor.stroke.push([cursor.x, cursor.y]);
      changed(false);
    }
  } else if (event.key === " ") {
    if (event.repeat) return event.preventDefault();
    if (cursor.stroke) {
      lift();
      changed(true);
    } else {
      cursor.stroke = [[cursor.x, cursor.y]];
      strokes.push(cursor.stroke);
      byId("cursor").toggleAttribute("data-down", true);
      byId("status").textContent = "Pen down";
      changed(false);
    }
  } else if (event.key.toLowerCase() === "u") undo();
  else if (["c", "C", "Delete", "Backspace"].includes(event.key)) clear();
  else return;
  event.preventDefault();
  showCursor(true);
});

function showCursor(isShown) {
  canvas.toggleAttribute("data-keys", isShown);
  byId("cursor").style.left = `${(100 * cursor.x) / canvas.width}%`;
  byId("cursor").style.top = `${(100 * cursor.y) / canvas.height}%`;
}

canvas.addEventListener("focus", () => showCursor(canvas.matches(":focus-visible")));
for (const [id, act] of [["undo", undo], ["clear", clear]]) {
  byId(id).addEventListener("click", () => {
    act();
    // The button is out of use now, and would take the focus with it.
    if (!strokes.length) canvas.focus();
  });
}
document.addEventListener("keydown", (event) => {
  if ((event.ctrlKey || event.metaKey) && !event.shiftKey && event.key.toLowerCase() === "z" && strokes.length) {
    event.preventDefault();
    undo();
  }
});
