// The answer to one picture: class, probabilities, and what the network saw.

import { byId, model, size } from "./server.js";

const MOST_BARS = 10;

/** A probability for people; none is told as certain. */
export const percent = (value) => (value > 0.9995 ? "> 99.9" : (100 * value).toFixed(1)) + " %";

/** An element with a class and a text. */
export function element(name, className, text) {
  const made = document.createElement(name);
  if (className) made.className = className;
  if (text !== undefined) made.textContent = text;
  return made;
}

/** Shows a prediction, or with null none. Final: no other will follow by itself. `button`: that of its row in the table. */
export function answer(prediction, isFinal, button = null) {
  const box = byId("answer");
  for (const other of byId("rows").querySelectorAll("button")) other.setAttribute("aria-pressed", String(other === button));
  box.dataset.state = prediction ? "answered" : "empty";
  box.dataset.class = prediction ? prediction.class_name : "";
  byId("label").textContent = prediction ? prediction.class_name : "–";
  byId("label").toggleAttribute("data-long", Boolean(prediction) && prediction.class_name.length > 3);
  byId("confidence").textContent = prediction ? `Probability ${percent(prediction.probability)}` : "Nothing to read yet";
  byId("seen").hidden = !prediction;
  if (prediction) byId("seen").src = prediction.input;
  byId("seen").alt = prediction ? `The picture after preprocessing, ${size()} pixels` : "";
  bars(prediction ? prediction.probabilities : model.class_names.map(() => 0), prediction ? prediction.digit : -1);
  if (isFinal) byId("status").textContent = prediction ? `${prediction.class_name}, probability ${percent(prediction.probability)}` : "";
  box.dataset.final = String(isFinal);
  if (prediction) box.dataset.count = Number(box.dataset.count) + 1;
}

function bars(probabilities, best) {
  let order = probabilities.map((_, index) => index);
  // Few classes keep their places, so that bars can be followed by eye; of many, the likeliest.
  if (order.length > MOST_BARS) order = order.sort((a, b) => probabilities[b] - probabilities[a]).slice(0, MOST_BARS);
  const list = byId("bars");
  while (list.children.length < order.length) {
    const row = element("li"), track = element("span", "track");
    track.setAttribute("aria-hidden", "true");
    track.append(element("span", "fill"));
    row.append(element("span", "name"), track, element("span", "value"));
    list.append(row);
  }
  order.forEach((index, place) => {
    const row = list.children[place], [name, track, value] = row.children;
    row.dataset.class = name.textContent = name.title = model.class_names[index];
    row.classList.toggle("best", index === best);
    track.firstChild.style.width = `${100 * probabilities[index]}%`;
    value.textContent = best < 0 ? "" : percent(probabilities[index]);
  });
}
