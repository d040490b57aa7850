// Train: the losses of the run while it trains, and what it wrote at each evaluation.

import { metrics } from "./api.js";
import { $, shown, svg } from "./dom.js";

const EVERY_MS = 2000;
const [WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM] = [640, 320, 44, 24, 12, 30];

export function setUpTrain(model) {
  let next = 0;
  let records = [];
  let samples = []; // the records of evaluations that have one
  let timer = null;
  let isPolling = false;

  async function poll() {
    if (isPolling) return;
    isPolling = true;
    try {
      while (await pollOnce()); // a long file comes in parts
    } finally {
      isPolling = false;
    }
  }

  // -> whether there may be more
  async function pollOnce() {
    const answer = await metrics(next);
    if (answer.start === 0 && answer.records.length) records = [];
    records = records.concat(answer.records);
    if (answer.records.length) show();
    const isMore = answer.next !== answer.start;
    next = answer.next;
    $("train-state").textContent = state();
    return isMore;
  }

  function state() {
    if (!records.length) return model.is_run ? "No line of metrics yet." : "These weights come without a run.";
    const last = records.at(-1);
    const val = records.findLast((record) => typeof record.val_loss === "number");
    return `Step ${last.step.toLocaleString("en")}` + (val ? `, val loss ${val.val_loss.toFixed(4)} at step ${val.step}` : "");
  }

  function show() {
    const slider = $("evaluation");
    const wasLast = Number(slider.value) === samples.length - 1 || !samples.length;
    samples = records.filter((record) =>
      typeof record.sample === "string" && typeof record.val_loss === "number");
    slider.max = Math.max(0, samples.length - 1);
    if (wasLast) slider.value = slider.max;
    $("evaluations").hidden = !samples.length;
    $("no-samples").hidden = samples.length > 0;
    showSample();
  }

  function showSample() {
    const record = samples[Number($("evaluation").value)];
    if (record) {
      $("evaluation-step").textContent = `step ${record.step}, val loss ${record.val_loss.toFixed(4)}`;
      $("evaluation-sample").textContent = record.sample;
    }
    draw(record?.step);
  }

  const points = (name) => records.filter((record) => typeof record[name] === "number")
    .map((record) => [record.step, record[name]]);

  function draw(step) {
    const curves = { batch: points("loss"), train: points("train_loss"), val: points("val_loss") };
    const all = Object.values(curves).flat();
    if (!all.length) return;
    const steps = all.reduce((most, [x]) => Math.max(most, x), 1);
    const low = all.reduce((least, [, y]) => Math.min(least, y), Infinity);
    const high = all.reduce((most, [, y]) => Math.max(most, y), low + 1e-9);
    const x = (value) => LEFT + (value / steps) * (WIDTH - LEFT - RIGHT);
    const y = (value) => TOP + ((high - value) / (high - low)) * (HEIGHT - TOP - BOTTOM);
    const parts = [];
    for (const i of [0, 1, 2, 3, 4]) {
      const [loss, at] = [low + (i / 4) * (high - low), Math.round((i / 4) * steps)];
      parts.push(svg("line", { x1: LEFT, x2: WIDTH - RIGHT, y1: y(loss), y2: y(loss) }));
      parts.push(svg("text", { x: LEFT - 6, y: y(loss) + 4, "text-anchor": "end" }, loss.toFixed(2)));
      parts.push(svg("text", { x: x(at), y: HEIGHT - 10, "text-anchor": "middle" }, at));
    }
    for (const [name, curve] of Object.entries(curves)) {
      const path = curve.map(([a, b]) => `${x(a).toFixed(1)},${y(b).toFixed(1)}`).join(" ");
      parts.push(svg("polyline", { class: name, points: path }));
    }
    parts.push(...curves.val.map(([a, b]) => svg("circle", { cx: x(a), cy: y(b), r: 2.5 })));
    if (step !== undefined) {
      parts.push(svg("line", { class: "now", x1: x(step), x2: x(step), y1: TOP, y2: HEIGHT - BOTTOM }));
    }
    $("curves").replaceChildren(...parts);
  }

  $("evaluation").addEventListener("input", showSample);
  $("evaluations").addEventListener("submit", (event) => event.preventDefault());

  return () => {
    clearInterval(timer);
    timer = setInterval(() => {
      if ($("train").hidden) return clearInterval(timer);
      shown(poll);
    }, EVERY_MS);
    shown(poll);
  };
}
