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
    return { written, state, n: 0 };
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
    try {
      for await (const choice of complete(request, control.signal)) {
        const sample = samples[choice.index];
        sample.n += 1;
        sample.written.append(choice.text);
        if (choice.finish_reason) sample.state.textContent = choice.finish_reason;
      }
    } finally {
      const seconds = (performance.now() - started) / 1000;
      for (const { state, n } of samples) {
        if (state.textContent === "…") state.textContent = "stopped";
        state.textContent += `, ${Math.round(n / seconds)} tokens/s`;
      }
      if (running === control) $("stop").disabled = true;
    }
  }

  form.addEventListener("submit", (event) => {
    event.preventDefault();
    if ($("options").reportValidity()) shown(write);
  });
  $("stop").addEventListener("click", () => running?.abort());
  document.addEventListener("keydown", (event) => {
    if (event.key === "Escape") running?.abort();
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey) && !$("write").hidden) {
      form.requestSubmit();
    }
  });
}
