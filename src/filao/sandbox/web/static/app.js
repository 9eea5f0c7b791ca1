// The page: it draws the scenes that the socket brings, and sends what the learner does. What is only looked at stays here.

import { draw, h, stayed } from "./dom.js";
import { align, editor, keep, kept, outside } from "./implement.js";
import { BEATS, numbers, panel, strip } from "./lesson.js";
import { opening } from "./opening.js";
import { booksPanel, comparePanel, glossaryPanel, loadPanel, pythonPanel, storyPanel } from "./panels.js";
import { sheet } from "./sheet.js";
import { frames, replayed, slowPanel } from "./slow.js";
import { language, number, say, steps } from "./say.js";
import { stage } from "./stage.js";
import { timeline } from "./timeline.js";

const KEPT = "filao-lesson";
const MOVES_MAX = 3000;
const TABS = ["timeline", "slow", "story", "load", "books", "python", "compare", "glossary"];
const STAGES = [0, 1, 2, 3, 4, 5];
const ON_DISK = ["state", "attempts", "reason"]; // columns of a claim's row that stand above the stage: the row's id is another number than the claim's
const BESIDE = 1100; // pixels of the page's width from which the stage stands beside the lesson, as in the style sheet
const BELOW_HEIGHT = 330; // pixels of the stage that stands below it
const PLAY_EVERY = 1300; // milliseconds for a frame of slow motion
const TOLD_FOR = 9000; // milliseconds that a note stays
const BARS_AT_ONCE = 10; // of a lane that a frame adds to a timeline that has just appeared

const root = document.getElementById("page");
const state = {
  scene: null, moves: [], tab: "timeline", at: 0, playing: false, claim: 0, sought: 0, note: "", beat: 0, presenting: false, hidden: false,
  shown: "stage", code: kept(), leaves: false, lost: false, rule: "filao", pinned: true, bars: BARS_AT_ONCE, proofs: {}, theme: localStorage.getItem("filao-theme"),
  view: (name) => change({ shown: name }),
  tell,
  write: (code, anew) => { keep(code); change({ code, leaves: false }); if (anew) document.querySelector("textarea.code").value = code; },
  toTimeline: (claim) => change({ tab: "timeline", claim, sought: claim }),
  choose: (rule) => change({ rule }),
};

// --- the socket ------------------------------------------------------------------------------------------------------

let socket;

function connect() {
  socket = new WebSocket(`${location.protocol === "https:" ? "wss" : "ws"}://${location.host}/socket`);
  socket.onopen = () => {
    Object.assign(state, { lost: false, moves: [] }); // those of the step come again
    const stored = localStorage.getItem(KEPT);
    if (stored) { try { restore(JSON.parse(stored)); } catch { localStorage.removeItem(KEPT); } }
    if (state.claim) ask({ do: "story", claim: state.claim });
  };
  socket.onmessage = (event) => {
    const told = JSON.parse(event.data);
    if (told.scene) arrive(told.scene);
    if (told.note) tell(say(`error_${told.note.key}`, told.note.values));
  };
  socket.onclose = () => { state.lost = true; schedule(); setTimeout(connect, 1500); };
}

function restore({ proofs, ...told }) {
  state.proofs = { ...proofs };
  ask({ do: "restore", ...told });
}

function ask(what) {
  if (socket?.readyState === WebSocket.OPEN) socket.send(JSON.stringify(what));
}

function arrive(scene) {
  const isNew = state.scene?.since !== scene.since || state.scene?.lesson.current !== scene.lesson.current;
  if (isNew) Object.assign(state, { moves: [], at: 0, beat: state.scene?.lesson.current === scene.lesson.current ? state.beat : 0, pinned: true, sought: 0 });
  if (isNew && state.scene && state.claim) { // the claim that was followed belongs to what went before
    state.claim = 0;
    ask({ do: "story", claim: 0 });
  }
  state.moves = [...state.moves, ...scene.moves].slice(-MOVES_MAX);
  if (state.scene && state.scene.lesson.is_done !== scene.lesson.is_done && scene.lesson.is_done) state.justDone = true;
  state.scene = scene;
  remember(scene.lesson);
  schedule();
}

// The proofs stay here: another room, of a sandbox that was started again, knows what was done, and not with which numbers.
function remember({ done, current, chosen, proofs }) {
  Object.assign(state.proofs, proofs);
  const text = JSON.stringify({ done, current, chosen, proofs: state.proofs });
  if (text !== state.remembered && state.remembered !== undefined) localStorage.setItem(KEPT, text);
  state.remembered = text;
}

// --- drawing ---------------------------------------------------------------------------------------------------------

let scheduled = false;

function schedule() {
  if (scheduled) return;
  scheduled = true;
  requestAnimationFrame(() => { scheduled = false; render(); });
}

function change(what) {
  Object.assign(state, what);
  schedule();
}

let clearing;

function tell(text) {
  clearTimeout(clearing);
  clearing = setTimeout(() => change({ note: "" }), TOLD_FOR);
  change({ note: text });
}

function go(place) {
  change({ shown: "stage", beat: 0, note: "" });
  ask({ do: "go", step: place });
}

function follow(claim) {
  if (!claim) return;
  if (state.tab === "slow") change({ claim });
  else showStory(claim);
}

function showStory(claim) {
  change({ claim, tab: "story" });
  ask({ do: "story", claim });
}

function render() {
  const { scene } = state;
  document.documentElement.dataset.theme = state.theme ?? "";
  if (!scene) {
    draw(root, h("main", { class: "loading" }, h("h1", {}, say("title")), h("p", { role: "status" }, state.note || (state.lost ? say("connection_lost") : say("loading")))));
    return;
  }
  const begins = state.shown === "stage" && !state.started && !scene.lesson.ran && !scene.lesson.done.length && scene.lesson.current === 0 && !scene.stage.queue;
  const body = begins ? opening(() => change({ started: true })) : state.shown === "sheet" ? sheet(scene, state.proofs, () => change({ shown: "stage" })) : lessonPage(scene);
  draw(root, h("a", { class: "skip", href: "#stage" }, say("skip")), top(scene, begins), body, notes());
  if (state.justDone) {
    state.justDone = false;
    document.querySelector(".why")?.scrollIntoView({ block: "nearest", behavior: matchMedia("(prefers-reduced-motion: reduce)").matches ? "auto" : "smooth" });
  }
  unfold(scene);
  seek();
  pin();
  align();
}

// A timeline that appears draws its last bars first, and older ones in the frames that follow: none of them waits for all bars.
function unfold(scene) {
  if (!document.querySelector(".timeline")) state.bars = BARS_AT_ONCE;
  else if (scene.timeline.lanes.some((lane) => lane.bars.length > state.bars)) change({ bars: state.bars + BARS_AT_ONCE });
}

function top(scene, begins) {
  const other = language === "fr" ? "en" : "fr";
  const isLesson = !begins && state.shown === "stage";
  return h("header", { class: "top" },
    h("p", { class: "brand" }, h("strong", {}, "Filao"), h("span", {}, say("subtitle"))),
    begins ? null : numbers(scene.lesson, go, isLesson),
    h("div", { class: "actions" },
      isLesson && h("button", { class: "link present", "aria-pressed": String(state.presenting), onclick: present }, say(state.presenting ? "leave" : "present")),
      isLesson && !state.presenting && h("button", { class: "link hide", "aria-pressed": String(state.hidden), onclick: () => change({ hidden: !state.hidden }) }, say(state.hidden ? "show_lesson" : "hide_lesson")),
      h("button", { class: "link theme", onclick: toggleTheme }, say(isDark() ? "light" : "dark")),
      h("a", { class: "link", href: `/${other}`, hreflang: other, lang: other }, say("other_language"))));
}

// What was pressed gives the focus away: the arrow keys would draw its ring before the class.
function present(event) {
  event.currentTarget.blur();
  change({ presenting: !state.presenting, beat: 0 });
}

const isDark = () => (state.theme ? state.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches);

function toggleTheme() {
  const theme = isDark() ? "light" : "dark";
  localStorage.setItem("filao-theme", theme);
  change({ theme });
}

function notes() {
  return h("div", { class: "notes", key: "notes" },
    h("div", { class: `notice${state.note ? " on" : ""}`, role: "alert" }, state.note ? [h("span", {}, state.note), h("button", { class: "plain", onclick: () => change({ note: "" }) }, say("close"))] : null),
    state.lost ? h("div", { class: "notice on lost", role: "alert" }, say("connection_lost")) : null,
    h("div", { class: "sr-only", "aria-live": "polite" }, aloud()));
}

function aloud() {
  const last = state.scene?.events.at(-1);
  return last ? say(`event_${last.key}`, last.values) : "";
}

function lessonPage(scene) {
  const isCode = steps[scene.lesson.current].key === "implement";
  return h("main", { class: `page${state.presenting ? " presenting" : ""}${state.hidden ? " alone" : ""}` },
    h("h1", { class: "sr-only" }, say("title")),
    state.presenting ? strip(scene.lesson, state, ask, go) : state.hidden ? null : panel(scene.lesson, state, ask, go),
    h("div", { class: `main${isCode ? " coding" : ""}`, id: "stage", tabindex: -1 },
      scene.stage.error ? h("p", { class: "banner", role: "alert" }, scene.stage.error === "full" ? say("error_disk_full") : say("error_storage", { why: scene.stage.error })) : null,
      isCode ? editor(scene.exercise ?? { checks: [], running: false, output: "" }, state, ask) : theStage(scene),
      isCode ? outside(scene.exercise ?? { output: "" }, state) : lower(scene)));
}

function theStage(scene) {
  const all = state.tab === "slow" ? frames(state.moves) : [];
  const at = Math.min(state.at, all.length - 1);
  const isSlow = state.tab === "slow" && all.length > 0 && scene.stage.queue;
  const shown = isSlow ? replayed(scene.stage, all.slice(0, at + 1)) : scene.stage;
  const { width, height } = room();
  const scale = width < 820 ? 1 : Math.max(1, Math.min(width / 900, height / 312, 1.9));
  const hero = isSlow ? all[at].claim : scene.life?.claim ?? state.claim;
  return h("div", { class: "theatre", key: "theatre" },
    life(isSlow ? { claim: all[at].claim, stage: all[at].stage, row: all[at].after, what: all[at].what, attempt: all[at].attempt } : scene.life),
    isSlow ? null : controls(scene),
    h("div", { class: `view${isSlow ? " slowed" : ""}` }, drawnStage(shown, width / scale, height / scale, scale, scene.lesson.setting.grouped, hero, isSlow)),
    sums(scene));
}

const drawnStage = stayed((shown, width, height, scale, grouped, hero, still) => stage(shown, width, height, ask, { follow, scale, grouped, hero, still }));

function room() {
  const view = document.querySelector(".view");
  const width = Math.max(240, Math.floor(view?.clientWidth ?? document.documentElement.clientWidth - 400));
  const isBesideTheLesson = innerWidth > BESIDE; // else the view is as high as its drawing, which asks how high that is
  return { width, height: isBesideTheLesson ? Math.max(274, Math.floor(view?.clientHeight ?? 300)) : BELOW_HEIGHT };
}

// The six stages of a message's life, and where the claim that the step is about stands.
function life(told) {
  const place = told?.stage ?? -1;
  const where = told?.row ? JSON.parse(told.row) : null;
  return h("div", { class: "life" },
    h("ol", { class: "stages", "aria-label": say("life_of", { n: told?.claim ?? "" }) }, STAGES.map((one) => h("li", {
      class: one === place ? "now" : one < place ? "past" : "", "aria-current": one === place ? "step" : null,
    }, h("span", {}, say(`stage_${one}`))))),
    h("p", { class: "disk" }, told?.claim ? [h("strong", {}, say("claim_n", { n: told.claim })), ` · ${say("on_disk")} `,
      where ? h("code", {}, Object.entries(where).filter(([name]) => ON_DISK.includes(name)).map(([name, value]) => `${name} = ${value}`).join(" · ")) : h("code", {}, say("no_row"))] : say("life_none")));
}

function controls(scene) {
  const off = !scene.stage.queue;
  const busy = scene.stage.frozen;
  return h("div", { class: "controls" },
    h("span", { class: "group" }, h("button", { class: "plain", disabled: off, "data-do": "one", onclick: () => ask({ do: "submit", count: 1 }) }, say("send_one")),
      h("button", { class: "plain", disabled: off, onclick: () => ask({ do: "submit", count: 20 }) }, say("send_many")),
      h("button", { class: "plain", disabled: off, onclick: () => ask({ do: "submit", poison: true }) }, say("send_poison")),
      h("label", { class: `plain file${off ? " off" : ""}`, title: say("csv_hint") }, say("csv"), h("input", { class: "sr-only", type: "file", accept: ".csv,text/csv", disabled: off, onchange: read }))),
    h("span", { class: "group" }, h("button", { class: "plain", disabled: off, onclick: () => ask({ do: "purge" }) }, say("purge")),
      h("button", { class: "plain", disabled: off, "aria-pressed": String(busy), onclick: () => ask({ do: "freeze" }) }, say(busy ? "thaw" : "freeze"))),
    h("span", { class: "group" }, h("button", { class: "plain", disabled: off || busy || scene.load.consumers === 0, "data-do": "remove", "aria-label": say("remove_consumer"), title: say("remove_consumer"), onclick: () => ask({ do: "remove" }) }, "−"),
      h("span", {}, say("consumers_word")),
      h("button", { class: "plain", disabled: off || busy || scene.load.consumers >= 6, "aria-label": say("add_consumer"), title: say("add_consumer"), onclick: () => ask({ do: "add" }) }, "+")));
}

async function read(event) {
  const file = event.target.files[0];
  if (!file) return;
  if (file.size > 500_000) tell(say("error_large", { size: Math.round(file.size / 1000) }));
  else ask({ do: "submit_file", name: file.name, text: await file.text() });
  event.target.value = "";
}

function sums(scene) {
  const told = scene.stage.queue;
  const { lost, doubled } = scene.books;
  if (!told) return h("p", { class: "sums" }, say("sums_none"));
  const terms = ["ready", "delayed", "leased", "acked", "dead", "removed"].map((state) => (told[state] || ["ready", "leased", "acked"].includes(state) ? say(`${state}_n`, { n: told[state] }) : null));
  return h("p", { class: `sums${told.holds ? " holds" : ""}` }, h("strong", {}, say("all_sent", { n: told.sent }), " = "), terms.filter(Boolean).join(" + "), " ",
    h("button", { class: `verdict${lost || doubled ? " bad" : ""}`, onclick: () => change({ tab: "books" }) }, lost || doubled ? "✖\ufe0e " : "✓ ", say("lost_n", { n: lost }), ", ", say("doubled_n", { n: doubled })));
}

function lower(scene) {
  const tabs = h("div", { class: "tabs", role: "tablist", "aria-label": say("panels") }, TABS.map((tab) => h("button", {
    role: "tab", id: `tab-${tab}`, "aria-selected": String(tab === state.tab), "aria-controls": "panel", tabindex: tab === state.tab ? 0 : -1,
    onclick: () => open(tab), onkeydown: (event) => move(event, tab),
  }, say(`tab_${tab}`))));
  return h("section", { class: "lower", "data-tab": state.tab }, tabs, h("div", { class: "panel", id: "panel", role: "tabpanel", key: `panel-${state.tab}`, "aria-labelledby": `tab-${state.tab}`, tabindex: state.tab === "timeline" ? null : 0 }, content(scene)));
}

function open(tab) {
  change({ tab, at: tab === "slow" ? 0 : state.at, playing: false });
}

function move(event, tab) {
  const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
  if (!step || state.presenting) return;
  const next = TABS[(TABS.indexOf(tab) + step + TABS.length) % TABS.length];
  open(next);
  requestAnimationFrame(() => document.getElementById(`tab-${next}`)?.focus());
}

function content(scene) {
  const panel = document.querySelector(".panel");
  const width = Math.max(300, (panel?.clientWidth ?? 860) - 2);
  switch (state.tab) {
    case "timeline": return timeline(scene.timeline, width / enlarged(), Math.max(110, panel?.clientHeight ?? 150) / enlarged(), { scale: enlarged(), bars: state.bars, claim: state.claim, follow, onscroll: scrolled });
    case "slow": { const all = frames(state.moves); return slowPanel(all, Math.min(state.at, all.length - 1), state, step); }
    case "story": return storyPanel(scene, state, ask, showStory);
    case "load": return loadPanel(scene.load, ask);
    case "books": return booksPanel(scene, ask, showStory);
    case "python": return pythonPanel(steps[scene.lesson.current].key, state);
    case "compare": return comparePanel(state);
    default: return glossaryPanel();
  }
}

const enlarged = () => (innerWidth >= 1500 ? 1.3 : 1);

function scrolled(event) {
  const view = event.target;
  state.pinned = view.scrollLeft + view.clientWidth >= view.scrollWidth - 24;
  view.parentNode.classList.toggle("more", view.scrollLeft > 4);
}

// Bring a claim's last bar into sight, as soon as it is drawn.
function seek() {
  const bar = state.sought && [...document.querySelectorAll(`.bar[data-claim="${state.sought}"]`)].at(-1);
  if (!bar) return;
  bar.scrollIntoView({ block: "nearest", inline: "center" });
  Object.assign(state, { sought: 0, pinned: false });
}

function pin() {
  const view = document.querySelector(".timeline");
  if (view && state.pinned && view.scrollWidth - view.clientWidth - view.scrollLeft > 2) view.scrollLeft = view.scrollWidth;
}

// --- slow motion, the projector --------------------------------------------------------------------------------------

let playing;

function step(to) {
  const all = frames(state.moves);
  clearInterval(playing);
  if (to === "play") {
    change({ playing: !state.playing, at: state.at >= all.length - 1 ? 0 : state.at });
    if (state.playing) playing = setInterval(() => advance(), PLAY_EVERY);
  } else change({ playing: false, at: Math.max(0, Math.min(all.length - 1, to)) });
}

function advance() {
  if (state.at >= frames(state.moves).length - 1) { clearInterval(playing); change({ playing: false }); } else change({ at: state.at + 1 });
}

document.addEventListener("keydown", (event) => {
  const typing = event.target.closest?.("textarea, input, select");
  if (!state.presenting || typing || !state.scene) return;
  const told = state.scene.lesson;
  if (event.key === "ArrowRight" || event.key === "PageDown") {
    if (state.beat < BEATS.length - 1) change({ beat: state.beat + 1 });
    else if (told.current < steps.length - 1) go(told.current + 1);
  } else if (event.key === "ArrowLeft" || event.key === "PageUp") {
    if (state.beat > 0) change({ beat: state.beat - 1 });
    else if (told.current > 0) go(told.current - 1);
  } else if (event.key === "Escape") change({ presenting: false });
  else return;
  event.preventDefault();
});

addEventListener("resize", schedule);
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", schedule);
render();
connect();
