// The page: asks which model there is, and shows what suits it.

import { answer } from "./answer.js";
import { redraw } from "./drawing.js";
import "./files.js";
import { ask, byId, model, show, size } from "./server.js";

async function start() {
  Object.assign(model, await ask("api/model"));
  const isDrawn = model.pictures === "digits", areDigits = model.class_names.every((name) => /^\d$/.test(name));
  byId("title").textContent = document.title = model.model_name;
  byId("model").textContent =
    `${model.class_names.length} classes · ${size()} pixels, ${model.input_shape[2] === 1 ? "gray" : "colour"}`;
  byId("seen-size").textContent = `${size()} pixels`;
  byId("drawing").hidden = !isDrawn;
  byId("drawing-title").textContent = areDigits ? "Draw a digit" : "Draw";
  byId("files-title").textContent = isDrawn ? "Or read pictures" : "Classify pictures";
  byId("bars").style.setProperty("--names", `min(${Math.max(...model.class_names.map((name) => name.length))}ch, 45%)`);
  redraw();
  answer(null, false);
  show(null);
}

start().catch(show);
