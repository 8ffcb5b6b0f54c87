// What the modules of the page share: elements, the model, and the way to the server.

const TRIES = 4;

export const byId = (id) => document.getElementById(id);

/** What GET api/model tells; filled before anything else happens. */
export const model = {};

/** Height and width of the model's input, for people. */
export const size = () => `${model.input_shape[1]} × ${model.input_shape[0]}`;

/** The JSON of a response. Waits where the server asks for it; throws its message otherwise, with `status` if it answered. */
export async function ask(path, options) {
  for (let tried = 1; ; tried++) {
    let response;
    try {
      response = await fetch(path, options);
    } catch {
      throw new Error("The server does not answer. Is it still running?");
    }
    if (response.ok) return response.json();
    const told = await response.json().catch(() => ({}));
    if (![429, 503].includes(response.status) || tried === TRIES) {
      throw Object.assign(new Error(told.error || `The server answers ${response.status}.`), { status: response.status });
    }
    const seconds = Number(response.headers.get("Retry-After")) || 1;
    await new Promise((done) => setTimeout(done, 1000 * seconds));
  }
}

/** Shows an error, or that there is none any more. */
export function show(error) {
  byId("error").textContent = error ? error.message : "";
  byId("error").hidden = !error;
  document.body.dataset.state = error ? "error" : "ready";
}
