// Picture files, one or many: chosen, dropped or pasted.

import { answer, element, percent } from "./answer.js";
import { ask, byId, model, show } from "./server.js";

const PART_BYTES = 1024; // At most, of a part's headers in a form.

// As many requests as the server's limits make of the files.
function batches(files) {
  const found = [];
  let bytes = Infinity;
  for (const file of files) {
    const needed = file.size + PART_BYTES;
    if (bytes + needed > model.limits.body_bytes || found.at(-1).length >= model.limits.pictures) {
      found.push([]);
      bytes = PART_BYTES;
    }
    found.at(-1).push(file);
    bytes += needed;
  }
  return found;
}

async function predict(files) {
  if (files.length === 1 && files[0].size + 2 * PART_BYTES > model.limits.body_bytes) {
    return [{ error: new Error(`${files[0].name} is too large: at most ${model.limits.body_bytes / 2 ** 20} MiB are taken`) }];
  }
  const form = new FormData();
  for (const file of files) form.append("files", file, file.name || "pasted picture");
  try {
    return (await ask("api/predict", { method: "POST", body: form })).predictions;
  } catch (error) {
    if (error.status === undefined || error.status >= 500 || files.length === 1) return files.map(() => ({ error }));
    // One of them is refused: the others are read all the same.
    const found = [];
    for (const file of files) found.push(...(await predict([file])));
    return found;
  }
}

async function readFiles(files) {
  if (!files.length || !model.limits) return;
  byId("files").setAttribute("aria-busy", "true");
  show(null);
  let first = true;
  for (const batch of batches(files)) {
    const found = await predict(batch);
    const only = files.length === 1 && found[0].error;
    if (only) show(found[0].error);
    batch.forEach((file, index) => {
      if (only) return;
      const button = addRow(file, found[index]);
      if (button && first) {
        button.click();
        first = false;
      }
    });
  }
  byId("files").removeAttribute("aria-busy");
}

function addRow(file, prediction) {
  const row = element("tr"), thumbnail = element("img"), name = file.name || "pasted picture";
  thumbnail.alt = "";
  thumbnail.addEventListener("error", () => (thumbnail.hidden = true));
  thumbnail.src = URL.createObjectURL(file);
  const first = element("td");
  first.append(thumbnail);
  row.append(first, element("td", "file", name));
  let button = null;
  if (prediction.error) {
    const wrong = element("td", "wrong", prediction.error.message);
    wrong.colSpan = 2;
    row.append(wrong);
  } else {
    button = element("button", "class", prediction.class_name);
    button.type = "button";
    button.setAttribute("aria-label", `${prediction.class_name}: show the probabilities of ${name}`);
    button.setAttribute("aria-pressed", "false");
    button.addEventListener("click", () => answer(prediction, true, button));
    const cell = element("td");
    cell.append(button);
    row.append(cell, element("td", "probability", percent(prediction.probability)));
  }
  byId("rows").append(row);
  count();
  return button;
}

function count() {
  const rows = byId("rows").children.length;
  byId("results").hidden = !rows;
  byId("results-count").textContent = `${rows} ${rows === 1 ? "picture" : "pictures"}`;
}

byId("results-clear").addEventListener("click", () => {
  for (const image of byId("rows").querySelectorAll("img")) URL.revokeObjectURL(image.src);
  byId("rows").replaceChildren();
  count();
  show(null);
  byId("upload").focus();
});

byId("upload").addEventListener("change", (event) => {
  const files = [...event.target.files];
  event.target.value = ""; // The same file can be chosen again.
  readFiles(files);
});

document.addEventListener("paste", (event) => readFiles([...event.clipboardData.files]));

document.addEventListener("dragover", (event) => {
  if (!event.dataTransfer.types.includes("Files")) return;
  event.preventDefault();
  document.body.dataset.dragging = "";
});
document.addEventListener("dragleave", (event) => {
  if (!event.relatedTarget) delete document.body.dataset.dragging;
});
document.addEventListener("drop", (event) => {
  delete document.body.dataset.dragging;
  if (!event.dataTransfer.files.length) return;
  event.preventDefault();
  readFiles([...event.dataTransfer.files]);
});
