// The lesson: claim, predict, do, see, why. The panel beside the stage, or one of the five at a time for a projector.

import { h } from "./dom.js";
import { lesson, rich, say, steps } from "./say.js";

const NARROW = 600; // pixels of a page that is higher than wide
export const BEATS = ["claim", "predict", "do", "see", "why"];

// A hint says what to do now, in the place of what the step says on the whole: the panel has room for one of the two.
export function panel(told, state, ask, go) {
  const step = steps[told.current];
  const text = lesson[step.key];
  return h("aside", { class: "lesson", "aria-label": say("lesson"), "data-step": step.key },
    h("div", { class: "lesson-body", key: step.key },
      h("h2", {}, `${told.current + 1} · ${text.title}`),
      h("p", { class: "claim" }, rich(text.claim, told.values, h)),
      predict(step, text, told, ask),
      told.is_done || (told.hint && step.acts.length) ? null : h("div", {}, h("h3", { class: "runin" }, say("do")), rich(text.do, told.values, h)),
      hint(text, told), told.trials ? null : acts(step.acts, text, told, ask),
      step.key === "implement" ? null : told.trials ? trials(step, text, told, ask) : [told.is_done ? null : h("h3", {}, say("see")), sees(step, text, told)],
      told.is_done ? why(step, text, told) : null),
    h("div", { class: "lesson-foot" }, foot(told, state, go)));
}

// Once the step is done, only what was chosen and what was right are left of the options: the explanation needs the room.
function predict(step, text, told, ask) {
  const chosen = told.chosen[step.key];
  const shown = (place) => !told.is_done || place === step.answer || place === chosen;
  return h("fieldset", { class: "predict" }, h("legend", {}, h("span", { class: "cap" }, say("predict")), h("span", { class: "question" }, rich(text.question, told.values, h))),
    text.options.map((option, place) => shown(place) && h("label", { key: place, class: `option${chosen === place ? " on" : ""}${told.is_done && place === step.answer ? " right" : ""}` },
      h("input", { type: "radio", name: `predict-${step.key}`, checked: chosen === place, onchange: () => ask({ do: "predict", place }) }), h("span", {}, rich(option, told.values, h)))),
    h("p", { class: "noted", role: "status" }, say(told.is_done ? (chosen === undefined ? "skipped" : chosen === step.answer ? "right" : "wrong") : chosen === undefined ? "unpredicted" : "noted")));
}

// Once the step is done, only what can be done again is left of the buttons.
function acts(keys, text, told, ask) {
  return h("div", { class: "acts" }, keys.filter((key) => !told.is_done || told.busy || told.ready.includes(key)).map((key) => h("button", { key,
    class: "act", "data-act": key, disabled: !told.ready.includes(key), onclick: (event) => { if (event.detail < 2) ask({ do: "act", key }); },
  }, rich(text.acts[key], told.values, h))));
}

function sees(step, text, told) {
  return h("ul", { class: "sees" }, step.conditions.map((key) => {
    const met = told.met.includes(key);
    return h("li", { class: met ? "met" : "", "data-condition": key }, h("span", { class: "mark", "aria-hidden": "true" }, met ? "✓" : "○"),
      h("span", { class: "sr-only" }, say(met ? "seen" : "not_seen")), h("span", {}, rich(text.conditions[key], told.values, h)));
  }));
}

function hint(text, told) {
  if (!told.hint) return h("p", { class: "hint", role: "status" });
  const words = { missed: text.missed, stranded: say("stranded") }[told.hint] ?? text.hints?.[told.hint];
  return h("p", { class: `hint on ${told.hint}`, role: "status" }, words ? rich(words, told.values, h) : "");
}

function why(step, text, told) {
  return h("div", { class: "why" }, h("h3", { class: "runin" }, say("why")), rich(text.why, told.values, h));
}

// What is to be done and to be seen of the three guarantees: a row for each is an act and a condition of the step.
function trials(step, text, told, ask) {
  return h("table", { class: "trials" }, h("thead", {}, h("tr", {}, h("td", {}), h("th", { scope: "col" }, say("trial_before")), h("th", { scope: "col" }, say("trial_after")), h("td", {}))),
    h("tbody", {}, told.trials.map((row, place) => {
      const met = told.met.includes(step.conditions[place]);
      return h("tr", { class: met ? "met" : "", "data-condition": step.conditions[place] },
        h("th", { scope: "row" }, acts([step.acts[place]], text, told, ask)), row.times.map(trial), h("td", { class: "mark" }, mark(met)));
    })));
}

// The same for a projector, where there is more width than height: a column for each.
function acrossTrials(step, text, told, ask) {
  const line = (word, at) => h("tr", {}, h("th", { scope: "row" }, say(word)), told.trials.map((row) => trial(row.times[at])));
  return h("table", { class: "trials across" }, h("thead", {}, h("tr", {}, h("td", {}), step.conditions.map((key, place) => {
    const met = told.met.includes(key);
    return h("th", { scope: "col", class: met ? "met" : "", "data-condition": key }, acts([step.acts[place]], text, told, ask), h("span", { class: "mark" }, mark(met)));
  }))), h("tbody", {}, line("trial_before", 0), line("trial_after", 1)));
}

const trial = (times) => h("td", { class: `times-${times}` }, say(`trial_${times}`));
const mark = (met) => [h("span", { "aria-hidden": "true" }, met ? "✓" : "○"), h("span", { class: "sr-only" }, say(met ? "seen" : "not_seen"))];

function foot(told, state, go) {
  const last = told.current === steps.length - 1;
  const isReady = told.is_done || told.done.includes(steps[told.current].key);
  return [
    h("button", { class: "plain previous", disabled: told.current === 0, onclick: () => go(told.current - 1) }, say("previous")),
    last ? h("button", { class: `next${isReady ? " strong" : ""}`, onclick: () => state.view("sheet") }, say("finish"))
      : h("button", { class: `next${isReady ? " strong" : ""}`, onclick: () => go(told.current + 1) }, say("next"), " →"),
  ];
}

export function numbers(told, go, isLesson) {
  return h("nav", { class: "numbers", "aria-label": say("steps") }, h("ol", {}, steps.map((step, place) => {
    const done = told.done.includes(step.key);
    const current = isLesson && told.current === place;
    return h("li", {}, h("button", {
      class: `${done ? "done" : ""}${current ? " current" : ""}`, "aria-current": current ? "step" : null, title: lesson[step.key].title,
      "aria-label": say(done ? "step_done" : "step_open", { n: place + 1, title: lesson[step.key].title }), onclick: () => go(place),
    }, done && !current ? "✓" : String(place + 1)));
  })));
}

// One beat of the step, large, for a projector.
export function strip(told, state, ask, go) {
  const step = steps[told.current];
  const text = lesson[step.key];
  const beat = BEATS[state.beat];
  const body = {
    claim: () => h("p", {}, rich(text.claim, told.values, h)),
    predict: () => h("div", {}, h("p", {}, rich(text.question, told.values, h)), h("ol", { class: "choices" }, text.options.map((option, place) => h("li", {},
      h("button", { class: `plain${told.chosen[step.key] === place ? " on" : ""}`, "aria-pressed": String(told.chosen[step.key] === place), onclick: () => ask({ do: "predict", place }) }, rich(option, told.values, h)))))),
    do: () => h("div", { class: "row-of" }, h("p", {}, rich(text.do, told.values, h)), acts(step.acts, text, told, ask)),
    see: () => h("div", { class: "row-of" }, told.trials ? (innerWidth > NARROW ? acrossTrials : trials)(step, text, told, ask) : sees(step, text, told), hint(text, told)),
    why: () => (told.is_done ? h("p", {}, rich(text.why, told.values, h)) : h("p", { class: "soft" }, say("not_yet"))),
  }[beat]();
  return h("section", { class: "strip", "aria-label": say("lesson"), "data-step": step.key }, h("div", { class: "strip-head" }, h("h2", {}, `${told.current + 1} · ${text.title}`),
    h("ol", { class: "beats" }, BEATS.map((one, place) => h("li", { class: place === state.beat ? "on" : "" }, say(one)))), h("span", { class: "soft" }, say("arrows"))), body);
}
