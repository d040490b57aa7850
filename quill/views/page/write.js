// Write: texts stream in, side by side.

import { complete } from "./api.js";
import { $, element, numbers, shown } from "./dom.js";

export function setUpWrite(model, cuts, open) {
  const form = $("prompt-form");
  form.max_tokens.max = model.max_tokens;
  form.n.max = model.max_texts;
  let running = null; // an AbortController

  function newSample(prompt) {
    const given = element("span", { className: "given", textContent: prompt });
    const written = element("span", { className: "written" });
    const state = element("span", { className: "state", textContent: "…" });
    const text = () => prompt + written.textContent;
    const toChoose = element("button", { type: "button", textContent: "Choose from here" });
    const toSee = element("button", { type: "button", textContent: "See this text" });
    toChoose.addEventListener("click", () => open("choose", text()));
    toSee.addEventListener("click", () => open("see", text()));
    const footer = element("footer", {}, state, toChoose, toSee);
    $("samples").append(element("article", {}, element("pre", {}, given, written), footer));
    return { written, state };
  }

  async function write() {
    running?.abort();
    const control = (running = new AbortController());
    const prompt = $("prompt").value || "\n";
    const request = { model: model.name, prompt, ...numbers(form), ...cuts() };
    $("samples").replaceChildren();
    const samples = Array.from({ length: request.n }, () => newSample(prompt));
    $("stop").disabled = false;
    const started = performance.now();
    let n = 0;
    try {
      for await (const choice of complete(request, control.signal)) {
        n += 1;
        const { written, state } = samples[choice.index];
        written.append(choice.text);
        if (choice.finish_reason) state.textContent = choice.finish_reason;
      }
    } finally {
      const rate = Math.round((1000 * n) / (performance.now() - started));
      for (const { state } of samples) {
        if (state.textContent === "…") state.textContent = "stopped";
        state.textContent += `, ${rate} tokens/s`;
      }
      if (running === control) $("stop").disabled = true;
    }
  }

  form.addEventListener("submit", (event) => {
    event.preventDefault();
    shown(write);
  });
  $("stop").addEventListener("click", () => running?.abort());
  document.addEventListener("keydown", (event) => {
    if (event.key === "Escape") running?.abort();
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey) && !$("write").hidden) {
      form.requestSubmit();
    }
  });
}
